"""Videos as a source of frames: decoded with PyAV, at a constant rate, upright.

PyAV is imported where it is used: importing this module does not need it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from sources.kind import Episode, Header, Kind, files_ending

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".gif")

_LONGEST_HOLD_S = 10  # a frame on screen for longer than this is a jump in the timestamps


class Video(Kind):
    """A file that PyAV can decode."""

    name = "video"
    plural = "videos"

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return files_ending(VIDEO_SUFFIXES, folder, names)

    def header(self, path: Path) -> Header:
        return Header(*read_video_info(path), is_guess=True)

    def open(self, path: Path, fps: Fraction) -> Episode:
        return Episode(iterate_video(path, fps))


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
