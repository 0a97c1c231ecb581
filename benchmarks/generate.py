"""Speed of generating a dataset, from playing a game to compressed clips on disk.

python -m benchmarks.generate
python -m benchmarks.generate --env gymnasium:ALE/Breakout-v5 --num_episodes 40
"""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.common import Output, show
from sources.gymnasium import import_gymnasium, is_picture, read_kwargs
from sources.procgen import import_procgen
from sources.registry import PREFIX
from sources.workers import num_cores
from utils.cli import run

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures a whole run of generate_dataset.py, its start included, against the environment alone."""

    env: str = "coinrun"
    """As generate_dataset.py has it."""
    num_episodes: int = 300
    """Episodes of 1,000 time steps."""
    policy: Literal["uniform", "sticky", "planner"] = "uniform"
    """How to act."""
    env_kwargs: tuple[str, ...] = ()
    """Of an environment of Gymnasium."""


def play(env_name: str, env_kwargs: tuple[str, ...], seconds: float) -> float:
    """Frames per second of the environment in one process, with random actions, keeping nothing."""
    step = gymnasium_step(env_name, env_kwargs) if env_name.startswith(PREFIX) else procgen_step(env_name)
    frames, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        frames += step()
    return frames / (time.perf_counter() - began)


def procgen_step(game: str) -> Callable[[], int]:
    """A time step of 64 environments side by side, in which one is fastest."""
    env = import_procgen().ProcgenGym3Env(num=64, env_name=game, distribution_mode="hard", num_threads=0)
    rng = np.random.default_rng(0)

    def step() -> int:
        env.act(rng.integers(0, 15, 64, np.int32))
        env.observe()
        return 64

    return step


def gymnasium_step(name: str, env_kwargs: tuple[str, ...]) -> Callable[[], int]:
    """A time step of one environment, and a picture of it."""
    id = name.removeprefix(PREFIX)
    env = import_gymnasium(id).make(id, render_mode="rgb_array", disable_env_checker=True, **read_kwargs(env_kwargs))
    env.reset(seed=0)

    def step() -> int:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        if not is_picture(env.observation_space):
            env.render()
        return 1

    return step


def main(cfg: Config) -> None:
    cores = num_cores()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        floor = sum(pool.starmap(play, [(cfg.env, cfg.env_kwargs, 3.0)] * cores))
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env", cfg.env, "--num_episodes", str(cfg.num_episodes), "--policy", cfg.policy]
        flags += ["--output_dir", f"{folder}/data", *(["--env_kwargs", *cfg.env_kwargs] if cfg.env_kwargs else [])]
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "generate_dataset.py", *flags], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        files = list(Path(folder).rglob("*.array_record"))
        size = sum(file.stat().st_size for file in files)
        metadata = json.loads((Path(folder) / "data" / "metadata.json").read_text())
        frames = sum(split["frames"] for split in metadata["summary"].values())
        levels = metadata["levels"]
    values = {
        "frames_per_s": frames / seconds,
        "frames_kept": frames,
        "steps_per_s": 1000 * cfg.num_episodes / seconds,
        "levels_ended": levels["ended"],
        "levels_solved": levels["solved"],
        "reward_per_level": levels["rewards"],
        "bytes_per_frame": size / frames,
        "wall_s": seconds,
        "frames_per_s_floor": floor,
        "share_of_floor": 1000 * cfg.num_episodes / seconds / floor,
    }
    what = f"{cfg.num_episodes} episodes of {cfg.env}, {cfg.policy}"
    show(f"generate {what}, on {cores} cores (floor: the environment alone)", values, cfg.json)


if __name__ == "__main__":
    run(main, Config)
