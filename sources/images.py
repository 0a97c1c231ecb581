"""Folders of pictures as a source of frames: one episode in each folder, in the order of the pictures' numbers."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from models.errors import InputError
from sources.kind import Episode, Header, Kind, files_ending, natural

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class Images(Kind):
    """A folder with at least one picture."""

    name = "images"
    plural = "folders of images"

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return [folder] if files_ending(IMAGE_SUFFIXES, folder, names) else []

    def header(self, path: Path) -> Header:
        files = _pictures(path)
        height, width = read_image(files[0]).shape[:2]
        return Header(len(files), height, width)

    def open(self, path: Path, fps: Fraction) -> Episode:
        return Episode(read_image(file) for file in _pictures(path))


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder in natural order."""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    files = files_ending(IMAGE_SUFFIXES, folder, names)
    if not files:
        raise InputError(f"{folder}: has no pictures")
    return sorted(files, key=lambda path: natural(path.name))


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture as uint8 RGB (H, W, 3); gray becomes RGB, transparency is dropped.

    Raises:
      InputError: The file is missing, cannot be decoded, or has more than 8 bits per channel.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what pillow raises for damaged files
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error
