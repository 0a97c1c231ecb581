"""Videos and pictures to look at: files, contact sheets, labels.

Frames are uint8 RGB. Files are written under a temporary name and then renamed, so a reader never sees half a file;
missing folders are made. PyAV and pillow are imported where they are used: importing this module needs neither.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError


def write_video(path: str | Path, frames_THWC: np.ndarray, fps: float) -> None:
    """Writes a video; the suffix decides the format.

    .mp4: H.264, yuv420p, which every browser plays. Its sides must be even: an odd height or width gets one more row
      or column, a copy of the last. Colour has half the resolution, so enlarge small frames first (`upscale`).
    .gif: Loops for ever; one palette of 256 colours for the whole video, not dithered. A gif counts time in 1/100 s, so
      the rate is rounded to 100 / n frames per second.

    Args:
      frames_THWC: uint8 RGB, at least one frame.

    Raises:
      InputError: The suffix is another.
    """
    path, frames = Path(path), np.asarray(frames_THWC)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (T, H, W, 3) with T > 0, not {frames.dtype} {frames.shape}")
    writers = {".mp4": _write_mp4, ".gif": _write_gif}
    if path.suffix.lower() not in writers:
        raise InputError(f"{path}: cannot write a {path.suffix or 'nameless'} video; use a name ending in .mp4 or .gif")
    with _replacing(path) as temporary:
        writers[path.suffix.lower()](temporary, frames, fps)


def write_png(path: str | Path, image_HWC: np.ndarray) -> None:
    """Writes one uint8 RGB image."""
    from PIL import Image

    with _replacing(Path(path)) as temporary:
        Image.fromarray(image_HWC).save(temporary, format="png")


def over_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 (..., 4) with straight alpha as RGB over black."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)


def resize(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames; the picture is stretched where the aspect ratio differs.

    Shrinking averages areas, enlarging interpolates (Lanczos). Frames of the right size are returned as they are.
    """
    from PIL import Image

    old_height, old_width = frames_THWC.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames_THWC
    shrinks = height <= old_height and width <= old_width
    method = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), method)) for frame in frames_THWC])


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel `factor` times in height and width: (..., H, W, C) → (..., factor·H, factor·W, C)."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def label(frame_HWC: np.ndarray, text: str) -> np.ndarray:
    """Adds a dark band with one line of text above a frame, which stays as it is.

    The height of the band depends on the width of the frame alone, so labelled frames of one size fit together. Text
    that is too wide is set smaller, then cut. It is legible from 64 pixels of width (about 12 characters), better
    after `upscale`.

    Returns:
      uint8 (H + band, W, 3).
    """
    from PIL import Image, ImageDraw, ImageFont

    smallest = 10  # below this the default font loses strokes
    width = frame_HWC.shape[1]
    size = max(smallest, width // 16)
    band = Image.new("RGB", (width, size + 4), (24, 24, 24))
    draw = ImageDraw.Draw(band)
    font = ImageFont.load_default(size)
    while size > smallest and draw.textlength(text, font=font) > width - 4:
        size -= 1
        font = ImageFont.load_default(size)
    while text and draw.textlength(text, font=font) > width - 2:
        text = text[:-1]
    draw.text((2, band.height // 2), text, font=font, fill=(255, 255, 255), anchor="lm")
    return np.concatenate([np.asarray(band), frame_HWC])


def strip(rows_RTHWC: np.ndarray | Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """Lays videos out as a contact sheet: one row per video, time to the right.

    Args:
      rows_RTHWC: R videos of one shape.
      gap: White pixels between neighbours.

    Returns:
      uint8 (R·H + (R - 1)·gap, T·W + (T - 1)·gap, C).
    """
    rows = np.asarray(rows_RTHWC)
    R, T, H, W, C = rows.shape
    image = np.full((R * (H + gap) - gap, T * (W + gap) - gap, C), 255, np.uint8)
    for r in range(R):
        for t in range(T):
            y, x = r * (H + gap), t * (W + gap)
            image[y : y + H, x : x + W] = rows[r, t]
    return image


def sweep(frames_ATHWC: np.ndarray, names: Sequence[str], scale: int = 2) -> np.ndarray:
    """One row for each action, held throughout from the same prompt; its number and name stand over the first frame."""
    return strip(
        [
            np.stack([label(frame, "" if t else f"{a} {names[a]}") for t, frame in enumerate(upscale(row, scale))])
            for a, row in enumerate(frames_ATHWC)
        ]
    )


def _write_mp4(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    import av

    height, width = frames_THWC.shape[1:3]
    frames_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(float(fps)).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14"}
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    from PIL import Image

    # The palette fits up to 32 frames, evenly spread over the video.
    sample = frames_THWC[np.linspace(0, len(frames_THWC) - 1, min(len(frames_THWC), 32)).astype(int)]
    palette = Image.fromarray(np.concatenate(sample)).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames_THWC]
    period_ms = 10 * max(2, round(100 / fps))  # players slow down gifs that ask for less than 2/100 s
    images[0].save(
        path, format="gif", save_all=True, append_images=images[1:], duration=period_ms, loop=0, optimize=False
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
