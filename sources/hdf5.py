"""HDF5 files as a source of frames. How a project lays out its files is a `Layout`, which is told by what they hold.

h5py is imported where it is used.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from models.errors import InputError
from sources.counter_strike import CounterStrike
from sources.kind import ChoiceError, Episode, Header, Kind, Told, files_ending, naming, need
from sources.layout import Layout, opened
from sources.minari import Minari
from sources.tinyworlds import TinyWorlds

LAYOUTS: tuple[Layout, ...] = (TinyWorlds(), CounterStrike(), Minari())


@dataclasses.dataclass(frozen=True)
class HDF5(Kind):
    """An episode in a file; its path is made up of the file's and its key.

    camera: Which entry of the observations, where there are several.
    """

    name = "hdf5"
    plural = "episodes in HDF5 files"
    suffixes = (".h5", ".hdf5", "metadata.json")
    knows_steps = True
    camera: str = ""

    def told(self, told: Told) -> Kind:
        return HDF5(told.camera)

    def check(self) -> None:
        need("h5py", self.plural)

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        found = []
        for path in files_ending(self.suffixes, folder, names):
            try:
                with naming(path), opened(path) as file:
                    keys = _layout(path, file).keys(path, file, self.camera)
            except ChoiceError:
                raise
            except InputError:
                keys = [""]  # whoever opens it will hear what is wrong
            found += [path / key if key else path for key in keys]
        return found

    def header(self, path: Path) -> Header:
        path, key = _split(path)
        with opened(path) as file:
            return _layout(path, file).header(path, file, key, self.camera)

    def open(self, path: Path, fps: Fraction) -> Episode:
        path, key = _split(path)
        with opened(path) as file:
            return _layout(path, file).open(path, file, key, self.camera, fps)


def _split(path: Path) -> tuple[Path, str]:
    """The file that an episode is in, and its key there."""
    return (path, "") if path.is_file() else (path.parent, path.name)


def _layout(path: Path, file: Any) -> Layout:
    for layout in LAYOUTS:
        if layout.fits(file):
            return layout
    held = ", ".join(list(file)[:5]) or "nothing"
    raise InputError(f"{path}: holds {held}; expected what tinyworlds, Minari or the Counter-Strike set have there")
