"""Videos and pictures in and out: files, contact sheets, labels.

Frames are uint8 RGB. Files are written under a temporary name and then renamed, so a reader never sees half a file;
missing folders are made. PyAV and pillow are imported where they are used: importing this module needs neither.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_LONGEST_HOLD_S = 10  # a frame on screen for longer than this is a jump in the timestamps


class VideoInfo(NamedTuple):
    """What a video says of itself.

    num_frames: At the rate `fps`; 0 if the file does not say.
    fps: Exact frames per second.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Reads a whole video into memory.

    Returns:
      frames_THWC: uint8 RGB, at a constant rate; see `iterate_video`.
      fps: Frames per second.

    Raises:
      InputError: The file is missing or cannot be decoded.
    """
    fps = read_video_info(path).fps
    return np.stack(list(iterate_video(path))), float(fps)


def read_video_info(path: str | Path) -> VideoInfo:
    """Reads the header and decodes the first frame.

    Raises:
      InputError: The file is missing or cannot be decoded.
    """
    with _opened(path) as (container, stream):
        fps, num_frames = _rate(path, container, stream)
    with _opened(path) as (container, stream):
        frame = next(_decoded(path, container, stream))
        turned = frame.rotation % 180 != 0
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        return VideoInfo(num_frames, height, width, fps)


def iterate_video(path: str | Path, fps: float | Fraction | None = None) -> Iterator[np.ndarray]:
    """Decodes a video, holding one frame at a time.

    Frames come at a constant rate whatever the file does: a frame that stays on screen longer is repeated, of frames
    that come faster some are dropped. Where two frames are equally near in time, the earlier one is taken.

    Args:
      fps: The rate to resample to, by taking for each moment the nearest frame; None keeps the video's own.

    Yields:
      uint8 (H, W, 3), RGB, turned upright if the file says so.

    Raises:
      InputError: The file is missing or cannot be decoded.
    """
    own_fps = read_video_info(path).fps
    # Time is counted in ticks, the periods of the video's own rate, in exact fractions.
    ticks_per_frame = own_fps / Fraction(fps) if fps else Fraction(1)
    longest_hold = max(1, round(_LONGEST_HOLD_S * own_fps))
    with _opened(path) as (container, stream):
        shown, tick, end = None, -1, 0
        anchor_time, anchor_tick = Fraction(0), 0
        emitted = 0
        for frame in _decoded(path, container, stream):
            time = None if frame.pts is None else frame.pts * Fraction(frame.time_base)
            next_tick = -1 if time is None else anchor_tick + round((time - anchor_time) * own_fps)
            if shown is None or not tick <= next_tick <= tick + longest_hold:
                # The first frame, or its time is unknown or jumps: it follows directly, and time is counted from here.
                next_tick = tick + 1
                anchor_time, anchor_tick = time or Fraction(0), next_tick
            while shown is not None and _nearest(emitted * ticks_per_frame) < next_tick:
                yield _to_rgb(shown)
                emitted += 1
            shown, tick = frame, next_tick
            hold = round((frame.duration or 0) * Fraction(frame.time_base) * own_fps) if frame.time_base else 1
            end = tick + min(max(hold, 1), longest_hold)
        while shown is not None and _nearest(emitted * ticks_per_frame) < end:
            yield _to_rgb(shown)
            emitted += 1


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


def write_png(path: str | Path, image_HWC: np.ndarray) -> None:
    """Writes one uint8 RGB image."""
    from PIL import Image

    with _replacing(Path(path)) as temporary:
        Image.fromarray(image_HWC).save(temporary, format="png")


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


def _nearest(tick: Fraction) -> int:
    """The nearest whole number, the smaller one of two."""
    return math.ceil(tick - Fraction(1, 2))


def _to_rgb(frame: Any) -> np.ndarray:
    """A decoded frame as upright RGB."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video: its container and its video stream."""
    import av

    if not Path(path).is_file():
        raise InputError(f"{path}: no such video file")
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: cannot be decoded as a video ({error.strerror})") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{path}: has no pictures in it, only {container.format.long_name}")
        yield container, container.streams.video[0]


def _decoded(path: str | Path, container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames of a stream, at least one."""
    import av

    frames, count = container.decode(stream), 0
    while True:
        try:
            frame = next(frames, None)
        except av.error.FFmpegError as error:
            raise InputError(f"{path}: cannot be decoded after frame {count} ({error.strerror})") from error
        if frame is None:
            break
        count += 1
        yield frame
    if not count:
        raise InputError(f"{path}: has no frames that can be decoded")


def _rate(path: str | Path, container: Any, stream: Any) -> tuple[Fraction, int]:
    """Frames per second, and the number of frames at that rate (0: unknown)."""
    if container.format.name == "gif":
        # Writers of gifs merge equal frames into one that stays longer: the shortest stay is the period.
        stays = [packet.duration for packet in container.demux(stream) if packet.duration]
        if stays:
            return 1 / (min(stays) * Fraction(stream.time_base)), sum(stays) // min(stays)
    fps, base = stream.average_rate, stream.base_rate
    # The average is off where a file gets the length of its last frame wrong; the base rate is then close by.
    if not fps or (base and abs(base / fps - 1) < 0.1):
        fps = base
    if not fps:
        raise InputError(f"{path}: has no frame rate; convert it to .mp4")
    fps = Fraction(fps)
    if stream.duration:
        return fps, round(stream.duration * Fraction(stream.time_base) * fps)
    return fps, stream.frames or round((container.duration or 0) * fps / 1_000_000)  # in microseconds


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
