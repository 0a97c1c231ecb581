"""Videos as a source of frames: decoded with PyAV, at a constant rate, upright.

PyAV is imported where it is used: importing this module does not need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from sources.kind import DamageError, Episode, Header, Kind, episode_starts, files_ending
from sources.rate import frame_rate
from utils.video import over_black

VIDEO_SUFFIXES = (".mp4", ".m4v", ".avi", ".webm", ".mkv", ".mov", ".ts", ".gif")

_LONGEST_HOLD_S = 10  # a frame on screen for longer than this is a jump in the timestamps
_PACKETS = 5000  # whose times settle the rate; reading all of a long video would take as long as its disk takes
_HDR = {16: "PQ", 18: "HLG"}  # ITU-T H.273, transfer characteristics


class Video(Kind):
    """A file that PyAV can decode."""

    name = "video"
    plural = "videos"
    suffixes = VIDEO_SUFFIXES

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return files_ending(VIDEO_SUFFIXES, folder, names)

    def header(self, path: Path) -> Header:
        info = read_video_info(path)
        return Header(info.num_frames, info.height, info.width, info.fps, is_guess=True, remarks=info.remarks)

    def open(self, path: Path, fps: Fraction) -> Episode:
        return Episode(iterate_video(path, fps, episode_starts(path)))


class VideoInfo(NamedTuple):
    """What a video says of itself.

    num_frames: At the rate `fps`; 0 if the file does not say.
    fps: Exact frames per second.
    remarks: What a dataset of it leaves out or changes.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction
    remarks: tuple[str, ...] = ()


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Reads a whole video into memory.

    Returns:
      frames_THWC: uint8 RGB, at a constant rate; see `iterate_video`.
      fps: Frames per second.

    Raises:
      InputError: The file is missing, or cannot be decoded to its end.
    """
    fps = read_video_info(path).fps
    return np.stack([frame for frame in iterate_video(path) if frame is not None]), float(fps)


def read_video_info(path: str | Path) -> VideoInfo:
    """Reads the header, the times of the first frames, and decodes the first frame.

    Raises:
      InputError: The file is missing or cannot be decoded.
    """
    with _opened(path) as (container, stream):
        fps, num_frames = _rate(path, container, stream)
    with _opened(path) as (container, stream):
        frame = next(_decoded(path, container, stream))
        height, width = _upright(frame, np.empty((frame.height, frame.width), bool)).shape
        return VideoInfo(num_frames, height, width, fps, tuple(_remarks(frame, stream)))


def iterate_video(
    path: str | Path, fps: float | Fraction | None = None, starts: Sequence[int] = ()
) -> Iterator[np.ndarray | None]:
    """Decodes a video, holding one frame at a time.

    Frames come at a constant rate whatever the file does: for each moment the picture that is on screen then, by the
    frames' own times. A frame that stays on screen longer is repeated, of frames that come faster some are dropped.
    Times may be off by half a period, of which the nearest frame is taken, the earlier one of two.

    Args:
      fps: The rate to resample to; None keeps the video's own.
      starts: Numbers of those pictures of the file with which an episode starts, in order.

    Yields:
      uint8 (H, W, 3), RGB, turned upright if the file says so; None before the first frame of a further episode.

    Raises:
      InputError: The file is missing or cannot be decoded.
      DamageError: So far the frames were good, from here on they are not.
    """
    own_fps = read_video_info(path).fps
    period, step = 1 / own_fps, 1 / Fraction(fps or own_fps)
    slack = min(period, step) / 2
    longest_hold = max(Fraction(_LONGEST_HOLD_S), 3 * period)
    pending = [start for start in starts if start > 0]
    with _opened(path) as (container, stream):
        shown, shown_at, end = None, Fraction(0), Fraction(0)
        shift, emitted = Fraction(0), 0
        # Where packets carry no time of presentation, that of decoding is given to frames in their right order.
        by_pts = container.format.name != "avi"
        damage = None
        frames = enumerate(_decoded(path, container, stream))
        while True:
            try:
                number, frame = next(frames)
            except StopIteration:
                break
            except DamageError as error:
                damage = error
                break
            stamp = frame.pts if by_pts else frame.dts
            stamp_s = None if stamp is None else stamp * Fraction(frame.time_base)
            at = None if stamp_s is None else stamp_s + shift
            if shown is None or at is None or not shown_at < at <= shown_at + longest_hold:
                # The first frame, or its time is unknown or jumps: it follows directly, and time is counted from here.
                at = shown_at + period if shown is not None else Fraction(0)
                shift = at - (stamp_s or Fraction(0)) if stamp_s is not None else shift
            while shown is not None and emitted * step + slack <= at:
                yield _to_rgb(shown)
                emitted += 1
            if pending and number >= pending[0]:
                pending = [start for start in pending if start > number]
                yield None
            shown, shown_at = frame, at
            stays = (frame.duration or 0) * Fraction(frame.time_base) if frame.time_base else period
            end = at + min(stays if stays >= period / 2 else period, longest_hold)
        while shown is not None and emitted * step + slack <= end:
            yield _to_rgb(shown)
            emitted += 1
        if damage:
            raise damage


def iterate_pictures(path: str | Path, start: Fraction | int = 0, fps: Fraction | None = None) -> Iterator[np.ndarray]:
    """Decodes each picture of a video once, whatever its time, for what is told by number, as actions are.

    Args:
      start: Seconds; the first picture is that which is shown then. It is sought, not decoded up to.
      fps: Pictures per second, needed for any other start than 0.

    Yields:
      uint8 (H, W, 3), as `iterate_video` does.

    Raises:
      InputError: The file is missing or cannot be decoded.
      DamageError: So far the pictures were good, from here on they are not.
    """
    with _opened(path) as (container, stream):
        first = start - 1 / (2 * fps) if fps else start
        if start > 0:
            container.seek(int(max(first, 0) / stream.time_base), stream=stream)  # to a picture that stands by itself
        for frame in _decoded(path, container, stream):
            if start <= 0 or frame.pts is None or frame.pts * stream.time_base >= first:
                yield _to_rgb(frame)


def count_pictures(path: str | Path) -> int:
    """The number of pictures that `iterate_pictures` gives; raises what that does."""
    count = 0
    with _opened(path) as (container, stream):
        for _ in _decoded(path, container, stream):
            count += 1
    return count


def _to_rgb(frame: Any) -> np.ndarray:
    """A decoded frame as upright RGB, what is transparent over black."""
    if _has_alpha(frame):
        rgba = frame.to_ndarray(format="rgba")
        return _upright(frame, over_black(rgba))
    return _upright(frame, frame.to_ndarray(format="rgb24"))


def _upright(frame: Any, pixels: np.ndarray) -> np.ndarray:
    """Turns and mirrors (H, W, ...) as the frame's display matrix says, to the nearest quarter turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return np.ascontiguousarray(pixels)
    # The place (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) < abs(b):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _has_alpha(frame: Any) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _remarks(frame: Any, stream: Any) -> Iterator[str]:
    """What the decoder knows and a dataset of 8-bit RGB does not hold."""
    if frame.color_trc in _HDR:
        yield f"HDR ({_HDR[frame.color_trc]}), whose colours are taken as they are and come out flat"
    if frame.interlaced_frame:
        yield "interlaced: moving edges are combs (ffmpeg -vf yadif mends it)"
    if (stream.sample_aspect_ratio or 1) != 1:
        yield f"pixels that are not square ({stream.sample_aspect_ratio}), taken as if they were"
    if frame.format.name != "pal8" and _has_alpha(frame):
        yield "transparency, laid over black"


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video: its container and its video stream, which is not the cover picture."""
    import av

    if not Path(path).is_file():
        raise InputError(f"{path}: no such video file")
    # For `_decoded`, which listens: what a decoder says twice it must hear twice, for it may be of two videos.
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture():
            container = av.open(str(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: cannot be decoded as a video ({error.strerror})") from error
    with container:
        streams = container.streams.video
        cover = av.stream.Disposition.attached_pic
        moving = [stream for stream in streams if not stream.disposition & cover] or list(streams)
        if not moving:
            raise InputError(f"{path}: has no pictures in it, only {container.format.long_name}")
        if moving[0].codec_context is None:
            raise InputError(f"{path}: is in a format that cannot be decoded, or encrypted")
        yield container, moving[0]


def _decoded(path: str | Path, container: Any, stream: Any) -> Iterator[Any]:
    """The decoded frames of a stream, at least one, up to the first damaged one.

    Raises:
      InputError: There is no good frame.
      DamageError: There is one, but not to the end.
    """
    import av

    stream.codec_context.thread_count = 1  # so that what the decoder complains of belongs to the packet at hand
    packets, count = container.demux(stream), 0
    decoded_as: dict[int, int] = {}  # the place in decoding order of the packet for each time of presentation
    damaged: int | None = None  # place of the first damaged packet
    reason = ""
    for place in range(2**62):
        frames: list[Any] = []
        try:
            with av.logging.Capture() as complaints:
                packet = next(packets, None)
                if packet is not None:
                    if packet.pts is not None:
                        decoded_as[packet.pts] = place
                    frames = packet.decode()
        except av.error.FFmpegError as error:
            complaints = [(av.logging.ERROR, "", str(error.strerror))]
        errors = [message.strip() for level, _, message in complaints if level <= av.logging.ERROR]
        if damaged is None and (errors or (packet is not None and packet.is_corrupt)):
            damaged, reason = place, errors[0] if errors else "corrupt packet"
        for frame in frames:
            # Pictures come out of order: those that were decoded before the damage are good.
            after = damaged is not None and decoded_as.get(frame.pts, damaged) >= damaged
            if after or frame.is_corrupt:
                reason = reason or "corrupt frame"
                packet = None
                break
            count += 1
            yield frame
        if packet is None or (damaged is not None and place > damaged + 32):
            break
    if damaged is None and not reason and count:
        return
    if not count:
        detail = f" ({reason})" if reason else ""
        raise InputError(f"{path}: has no frames that can be decoded{detail}")
    raise DamageError(f"{path}: is damaged after {count} of its pictures ({reason}); the rest is left out")


def _rate(path: str | Path, container: Any, stream: Any) -> tuple[Fraction, int]:
    """Frames per second, and the number of frames at that rate (0: unknown)."""
    tick = Fraction(stream.time_base)
    is_gif = container.format.name == "gif"
    by_pts = container.format.name != "avi"
    packets = _packets(container, stream)
    stamps = [packet.pts if by_pts else packet.dts for packet in packets if not packet.is_discard]
    times = sorted(stamp * tick for stamp in stamps if stamp is not None)
    gaps = [after - before for before, after in pairwise(times)]
    if is_gif and packets and packets[-1].duration:
        gaps.append(packets[-1].duration * tick)
    stated = [Fraction(rate) for rate in (stream.average_rate, stream.base_rate) if rate]
    fps = frame_rate(gaps, stated, tick, merges=is_gif)
    if not fps:
        raise InputError(f"{path}: has no frame rate; convert it to .mp4")
    if is_gif:
        return fps, round(sum(gaps) * fps)
    if stream.duration:
        return fps, round(stream.duration * tick * fps)
    return fps, stream.frames or round((container.duration or 0) * fps / 1_000_000)  # in microseconds


def _packets(container: Any, stream: Any) -> list[Any]:
    """The first packets of a stream, up to where it cannot be read any further."""
    import av

    packets: list[Any] = []
    with av.logging.Capture(), suppress(av.error.FFmpegError):  # who decodes the stream will hear of it again
        for packet in islice(container.demux(stream), _PACKETS):
            if packet.size:
                packets.append(packet)
    return packets
