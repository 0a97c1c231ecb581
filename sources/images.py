"""Folders of pictures as a source of frames: one episode in each folder, in the order of the pictures' numbers."""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from models.errors import InputError
from sources.kind import DamageError, Episode, Header, Kind, episode_starts, files_ending, natural, pattern, separated
from utils.video import over_black

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Images(Kind):
    """A folder with at least one picture."""

    name = "images"
    plural = "folders of images"
    suffixes = IMAGE_SUFFIXES

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return [folder] if files_ending(IMAGE_SUFFIXES, folder, names) else []

    def header(self, path: Path) -> Header:
        files = pictures_in(path)
        pixels, remarks = _read(files[0])
        height, width = pixels.shape[:2]
        return Header(len(files), height, width, remarks=remarks)

    def open(self, path: Path, fps: Fraction) -> Episode:
        return Episode(separated(_frames(path), episode_starts(path)))


def _frames(folder: Path) -> Iterator[np.ndarray]:
    """The pictures in a folder, up to the first that cannot be read."""
    for number, file in enumerate(pictures_in(folder)):
        try:
            yield read_image(file)
        except InputError as error:
            raise (DamageError(f"{error}; the rest of its folder is left out") if number else error) from error


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder in natural order."""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    files = sorted(files_ending(IMAGE_SUFFIXES, folder, names), key=lambda path: natural(path.name))
    if not files:
        raise InputError(f"{folder}: has no pictures")
    kinds = {pattern(file.name): file.name for file in reversed(files)}
    if len(kinds) > 1 and any("#" in kind for kind in kinds):
        first, second = list(kinds.values())[-1:-3:-1]
        raise InputError(
            f"{folder}: holds pictures of {len(kinds)} series, like {first} and {second}, which cannot be one video; "
            "give each series a folder of its own"
        )
    return files


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture as uint8 RGB (H, W, 3), upright as its EXIF says; gray becomes RGB, what is transparent black.

    Raises:
      InputError: The file is missing, cannot be decoded, has more than 8 bits per channel, or is larger than pillow
        takes for safe.
    """
    return _read(path)[0]


def decode_image(where: str, data: bytes) -> np.ndarray:
    """Reads a picture from the bytes of a file, as `read_image` does; `where` names it in errors."""
    return _read(where, data)[0]


def _read(path: str | Path, data: bytes | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """A picture, from its file or from the bytes of one, and what was changed about it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: has more than 8 bits per channel ({image.mode}); convert it to 8 bits")
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return np.asarray(upright.convert("RGB")), ()
            return over_black(np.asarray(upright.convert("RGBA"))), ("transparency, laid over black",)
    except InputError:
        raise
    # What pillow raises for damaged files, and for those far too large.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error
