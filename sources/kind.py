"""What a kind of source is: videos, arrays, folders of pictures. `sources/registry.py` has the table of all kinds."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np


class Header(NamedTuple):
    """What can be known of an episode without reading all of it.

    num_frames: At the rate `fps`.
    fps: Frames per second, exactly; None for sources that have no rate.
    has_actions: Whether it holds an action for each frame.
    is_guess: Whether `num_frames` may be wrong; 0 is then "unknown".
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction | None = None
    has_actions: bool = False
    is_guess: bool = False


class Episode(NamedTuple):
    """An episode that has been opened.

    frames: One at a time, uint8 RGB (H, W, 3).
    actions_T: int32 from 0, or None; `actions_T[t]` leads from frame t to frame t + 1.
    rewards_T: float32 or None; `rewards_T[t]` was earned by the action at t.
    """

    frames: Iterable[np.ndarray]
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None


class Kind(ABC):
    """One kind of source. Errors of a single source are `InputError`s that name its path: it is skipped.

    name: What --source calls it.
    plural: What messages call several of them, for instance "videos".
    """

    name: ClassVar[str]
    plural: ClassVar[str]

    @abstractmethod
    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        """The episodes of this kind in a folder: files of it, or the folder itself.

        Args:
          names: Of the files that are in the folder itself, without hidden ones.
        """

    @abstractmethod
    def header(self, path: Path) -> Header:
        """Reads what an episode says of itself, or its first frame.

        Raises:
          InputError: It cannot be read, or not be used.
        """

    @abstractmethod
    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens an episode; its frames are read as they are asked for, where the format allows it.

        Args:
          fps: Rate of the dataset. Where `header` gives a rate, frames must be resampled to this one.

        Raises:
          InputError: It cannot be read; also while frames are being asked for.
        """


def files_ending(suffixes: Sequence[str], folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the files in a folder that have one of the suffixes, in upper or lower case."""
    return [folder / name for name in names if Path(name).suffix.lower() in suffixes]


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts numbers in names by value: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name
