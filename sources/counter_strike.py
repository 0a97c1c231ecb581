"""Counter-Strike as Pearce and Zhu (2021) published it: files of 1,000 frames.

frame_0_x     uint8 (150, 280, 3), in BGR
frame_0_y     51 values of 0 or 1: what was pressed at the frame, which leads on from it, as here
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.kind import DamageError, Episode, Header
from sources.layout import Layout, opened
from utils.actions import ActionColumn

RATE = Fraction(16)
KEYS = ("w", "a", "s", "d", "space", "ctrl", "shift", "1", "2", "3", "r", "l_click", "r_click")
MOUSE_X = (1000, 500, 300, 200, 100, 60, 30, 20, 10, 4, 2)  # how far to the left; then 0; then to the right
MOUSE_Y = (200, 100, 50, 20, 10, 4, 2)  # how far up; then 0; then down


def _steps(sizes: Sequence[int]) -> tuple[str, ...]:
    return (*(f"-{size}" for size in sizes), "0", *(f"+{size}" for size in reversed(sizes)))


COLUMNS = (
    *(ActionColumn(name, ("up", "down")) for name in KEYS),
    ActionColumn("mouse_x", _steps(MOUSE_X)),
    ActionColumn("mouse_y", _steps(MOUSE_Y)),
)
_SIZES = (len(KEYS), len(_steps(MOUSE_X)), len(_steps(MOUSE_Y)))


class CounterStrike(Layout):
    """A file is one episode."""

    def fits(self, file: Any) -> bool:
        return "frame_0_x" in file

    def keys(self, path: Path, file: Any, camera: str) -> list[str]:
        return [""]

    def header(self, path: Path, file: Any, key: str, camera: str) -> Header:
        frame = file["frame_0_x"]
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise InputError(f"{path}: frame_0_x is {frame.dtype} {frame.shape}; expected uint8 (H, W, 3)")
        height, width, _ = frame.shape
        return Header(len(_numbers(file)), height, width, RATE, has_actions=True, is_guess=True, columns=COLUMNS)

    def open(self, path: Path, file: Any, key: str, camera: str, fps: Fraction) -> Episode:
        rows: list[np.ndarray] = []
        while (name := f"frame_{len(rows)}_y") in file:
            rows.append(_row(path, name, file[name][()]))
        if not rows:
            raise InputError(f"{path}: has no frame_0_y")
        return Episode(_frames(path, len(rows), max(_numbers(file)) + 1), np.stack(rows))


def _numbers(file: Any) -> list[int]:
    """Of the frames in a file."""
    return [int(found[1]) for name in file if (found := re.fullmatch(r"frame_(\d+)_x", name))]


def _row(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """What the 51 values say, as `COLUMNS` has it."""
    if values.shape != (sum(_SIZES),) or not np.isin(values, (0, 1)).all():
        raise InputError(f"{path}: {name} is {values.dtype} {values.shape}; expected {sum(_SIZES)} values of 0 or 1")
    keys, mouse_x, mouse_y = np.split(values, np.cumsum(_SIZES)[:-1])
    if mouse_x.sum() != 1 or mouse_y.sum() != 1:
        raise InputError(f"{path}: {name} does not say where the mouse goes: its last two parts are not one-hot")
    return np.array([*keys, mouse_x.argmax(), mouse_y.argmax()], np.int32)


def _frames(path: Path, num_actions: int, num_frames: int) -> Iterator[np.ndarray]:
    """Frames in RGB, up to the first that lacks, or whose action does."""
    with opened(path) as file:
        for number in range(num_frames):
            if number >= num_actions or f"frame_{number}_x" not in file:
                raise DamageError(f"{path}: frame {number} of {num_frames} lacks, or its action; the rest is left out")
            yield np.ascontiguousarray(file[f"frame_{number}_x"][()][..., ::-1])
