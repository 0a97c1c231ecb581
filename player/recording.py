"""Recordings of a game, as the video files that players save."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.video import label, upscale, write_video


class Moment(NamedTuple):
    """A recorded frame: when it was drawn (s), the picture of each world, and what led to it in each."""

    time: float
    frames: list[np.ndarray]
    labels: list[str]


def encode_recording(recording: list[Moment], suffix: str) -> bytes:
    """A video file of times, frames of each world and their labels, at the rate at which it was played."""
    video = []
    for _, frames, labels in recording:
        views = [
            label(upscale(f, max(1, 192 // min(f.shape[:2]))), name) for f, name in zip(frames, labels, strict=True)
        ]
        height = max(len(view) for view in views)
        views = [np.pad(view, ((0, height - len(view)), (0, 0), (0, 0))) for view in views]
        video.append(np.concatenate(views, axis=1))
    # The median: a pause counts as one frame.
    gaps = np.diff([moment.time for moment in recording])
    fps = float(np.clip(1 / np.median(gaps), 1, 50)) if len(gaps) else 10.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"recording.{suffix}"
        write_video(file, np.stack(video), fps)
        return file.read_bytes()
