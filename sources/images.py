"""Folders of pictures as a source of frames."""

from pathlib import Path

import numpy as np

from models.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


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
