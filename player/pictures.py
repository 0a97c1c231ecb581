"""Pictures from strangers: decoded with care, and cut to the shape of a world's frames."""

import io

import numpy as np

from models.errors import InputError
from utils.video import resize

MAX_PIXELS = 4_000_000  # of an uploaded picture; the page shrinks them to far less before it sends them


def fit_picture(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts out the largest middle part of the right aspect ratio and resizes it."""
    H, W = image_HWC.shape[:2]
    h, w = min(H, max(1, round(W * height / width))), min(W, max(1, round(H * width / height)))
    y, x = (H - h) // 2, (W - w) // 2
    return resize(np.ascontiguousarray(image_HWC[None, y : y + h, x : x + w]), height, width)[0]


def decode_picture(data: bytes) -> np.ndarray:
    """Decodes an uploaded picture: uint8 RGB (H, W, 3), upright.

    Raises:
      InputError: It is no picture, or has more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "WEBP", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"the picture has {image.width}×{image.height} pixels; send one of fewer than 4 million"
                )
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # pillow raises anything for damaged files
        raise InputError("this is no picture that can be read; send a PNG, JPEG, GIF, WebP or BMP") from error
