"""Games as tinyworlds publishes them: a file for each, with one long video, `frames` (N, H, W, 3), and nothing else."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.kind import Episode, Header, episode_starts
from sources.layout import Layout, in_order, opened

RATE = Fraction(60)  # of the videos that the games were taken from; the files do not say
PART = 2000  # frames


class TinyWorlds(Layout):
    """Where no list beside the file says where episodes start, it is cut into parts, so that each split has some."""

    def fits(self, file: Any) -> bool:
        return "frames" in file

    def keys(self, path: Path, file: Any, camera: str) -> list[str]:
        return [f"{begin:07d}" for begin in _bounds(path, _dataset(path, file))[:-1]]

    def header(self, path: Path, file: Any, key: str, camera: str) -> Header:
        frames = _dataset(path, file)
        begin, end = _span(path, frames, key)
        _, height, width, _ = frames.shape
        return Header(end - begin, height, width, RATE)

    def open(self, path: Path, file: Any, key: str, camera: str, fps: Fraction) -> Episode:
        return Episode(_frames(path, *_span(path, _dataset(path, file), key), RATE / fps))


def _dataset(path: Path, file: Any) -> Any:
    frames = file["frames"]
    shape: tuple[int, ...] = getattr(frames, "shape", ())
    dtype = getattr(frames, "dtype", None)
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not len(frames):
        raise InputError(f"{path}: frames are {dtype} {shape}; expected uint8 (N, H, W, 3)")
    return frames


def _bounds(path: Path, frames: Any) -> list[int]:
    """Where each part begins, and where the last one ends."""
    n = len(frames)
    if starts := episode_starts(path):
        return sorted({0, *(start for start in starts if start < n), n})
    parts = max(1, round(n / PART))
    return [n * i // parts for i in range(parts + 1)]


def _span(path: Path, frames: Any, key: str) -> tuple[int, int]:
    """Where a part begins and ends."""
    return next((begin, end) for begin, end in pairwise(_bounds(path, frames)) if f"{begin:07d}" == key)


def _frames(path: Path, begin: int, end: int, step: Fraction) -> Iterator[np.ndarray]:
    """Every `step`-th frame; of two that are equally near, the earlier."""
    places = (begin + max(0, math.ceil(k * step - Fraction(1, 2))) for k in range(math.ceil((end - begin) / step) + 1))
    with opened(path) as file:
        yield from in_order(path, file["frames"], (place for place in places if place < end))
