"""Speed of the loader.

python -m benchmarks.dataloader --data_dir data/coinrun
"""

import dataclasses
import time

import numpy as np

from benchmarks.common import Output, show
from utils.cli import run
from utils.data import ClipSource, batches


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures frames per second of the train split as the training scripts read it."""

    data_dir: str = "data/coinrun"
    """Dataset to read."""
    batch_size: int = 48
    """Clips in a batch."""
    seq_len: int = 16
    """Frames in a clip."""
    num_workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes to try."""
    windows_per_clip: tuple[int, ...] = (1, 2)
    """Numbers of windows to cut from each clip."""
    seconds: float = 6.0
    """How long to read with each."""


def frames_per_s(source: ClipSource, cfg: Config, num_workers: int, windows: int) -> float:
    """Steady rate: workers have started and the buffers are empty when the clock starts."""
    stream = batches(source, cfg.batch_size, 0, num_workers=num_workers, windows_per_clip=windows)
    for _ in range(16 + 4 * num_workers):
        next(stream)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < cfg.seconds:
        next(stream)
        count += 1
    rate = count * cfg.batch_size * cfg.seq_len / (time.perf_counter() - began)
    stream.close()  # type: ignore[attr-defined]
    return rate


def records_per_s(source: ClipSource, cfg: Config) -> float:
    """The floor: the same records read and decompressed in the same batches, and nothing else done."""
    rng = np.random.default_rng(0)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < cfg.seconds:
        source.records(rng.integers(0, len(source), cfg.batch_size).tolist())
        count += cfg.batch_size
    return count / (time.perf_counter() - began)


def main(cfg: Config) -> None:
    source = ClipSource(cfg.data_dir, "train", cfg.seq_len)
    values: dict[str, float] = {
        "frames_per_s_floor": records_per_s(source, cfg) * cfg.seq_len,
    }
    for n in cfg.num_workers:
        for k in cfg.windows_per_clip:
            values[f"frames_per_s_{n}_workers_{k}_windows"] = frames_per_s(source, cfg, n, k)
    show(
        f"dataloader {cfg.data_dir}, batch {cfg.batch_size} x {cfg.seq_len} (floor: decompression alone)",
        values,
        cfg.json,
    )


if __name__ == "__main__":
    run(main, Config)
