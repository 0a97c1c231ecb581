"""Speed of generating CoinRun, from playing it to compressed clips on disk.

python -m benchmarks.generate
"""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.common import Output, show
from sources.workers import num_cores
from utils.cli import run

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures a whole run of generate_dataset.py, its start included, against the environment alone."""

    num_episodes: int = 300
    """Episodes of 1,000 time steps."""
    policy: Literal["uniform", "sticky"] = "uniform"
    """How to act."""


def play(steps: int) -> float:
    """Frames per second of CoinRun in one process, with random actions, keeping nothing."""
    from procgen import ProcgenGym3Env

    num = 64
    env = ProcgenGym3Env(num=num, env_name="coinrun", distribution_mode="hard", num_threads=0)
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(steps):
        env.act(rng.integers(0, 15, num, np.int32))
        env.observe()
    return steps * num / (time.perf_counter() - began)


def main(cfg: Config) -> None:
    cores = num_cores()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        floor = sum(pool.map(play, [600] * cores))
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num_episodes", str(cfg.num_episodes), "--policy", cfg.policy, "--output_dir", f"{folder}/data"]
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "generate_dataset.py", *flags], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        files = list(Path(folder).rglob("*.array_record"))
        size = sum(file.stat().st_size for file in files)
        summary = json.loads((Path(folder) / "data" / "metadata.json").read_text())["summary"]
        frames = sum(split["frames"] for split in summary.values())
    values = {
        "frames_per_s": frames / seconds,
        "frames_kept": frames,
        "bytes_per_frame": size / frames,
        "wall_s": seconds,
        "frames_per_s_floor": floor,
        "share_of_floor": frames / seconds / floor,
    }
    show(f"generate {cfg.num_episodes} episodes on {cores} cores (floor: the environment alone)", values, cfg.json)


if __name__ == "__main__":
    run(main, Config)
