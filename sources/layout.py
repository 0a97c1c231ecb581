"""What a layout of HDF5 files is. `sources/hdf5.py` has the list of all of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.kind import DamageError, Episode, Header, need

READ_AT_ONCE = 64  # frames


class Layout(ABC):
    """How a project lays out its files. An episode has a key within its file; "" where it is all of it.

    Args:
      file: The open file at `path`. It is closed when frames are asked for, which open it anew.
      camera: See `Told`.
    """

    @abstractmethod
    def fits(self, file: Any) -> bool:
        """Whether a file is laid out so."""

    @abstractmethod
    def keys(self, path: Path, file: Any, camera: str) -> list[str]:
        """The episodes of a file."""

    @abstractmethod
    def header(self, path: Path, file: Any, key: str, camera: str) -> Header:
        """As `Kind.header`."""

    @abstractmethod
    def open(self, path: Path, file: Any, key: str, camera: str, fps: Fraction) -> Episode:
        """As `Kind.open`."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a file to read from it."""
    need("h5py", str(path))
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from error
    with file:
        yield file


def in_order(path: Path, dataset: Any, places: Iterable[int]) -> Iterator[Any]:
    """What a dataset holds at ascending places, read some at a time."""
    first, block = 0, np.empty(0)
    for number, place in enumerate(places):
        if not first <= place < first + len(block):
            try:
                first, block = place, dataset[place : place + READ_AT_ONCE]
            except OSError as error:  # HDF5's, of a damaged chunk
                reason = f"{path}: cannot be read from frame {place} on ({error})"
                raise (DamageError(f"{reason}; the rest is left out") if number else InputError(reason)) from error
        yield block[place - first]
