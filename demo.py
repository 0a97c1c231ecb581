"""The whole way in one command: real CoinRun, three trainings, a rollout beside the truth, and its measurement.

    make demo

Everything goes to runs/demo. An interrupted demo continues where it stopped.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs every script once on two cores of a CPU, in under ten minutes; for a small world, in an hour and a half."""

    output_dir: str = "runs/demo"
    """Where everything goes."""
    preset: Literal["tiny", "small"] = "tiny"
    """Of the three trainings; small wants --num_episodes 600."""
    num_episodes: int = 100
    """Episodes of CoinRun, without backgrounds and in one theme."""
    seed: int = 0
    """Of everything: levels, parameters, the order of the data, the choice of clips."""


def together(*commands: list[str]) -> None:
    """Runs scripts side by side; once all have ended, ends too if one of them failed."""
    for command in commands:
        print(f"\n$ python {' '.join(command)}", flush=True)
    since = time.monotonic()
    env = os.environ | ({"TQDM_DISABLE": "1"} if len(commands) > 1 else {})  # two bars would overwrite each other
    folder = Path(__file__).parent
    processes = [subprocess.Popen([sys.executable, folder / name, *flags], env=env) for name, *flags in commands]
    try:
        failed = [status for process in processes if (status := process.wait())]
    except KeyboardInterrupt:
        for process in processes:
            process.wait()
        raise
    if failed:
        raise SystemExit(failed[0])
    print(f"({time.monotonic() - since:.0f} s)", flush=True)


def main(cfg: Config) -> None:
    root = Path(cfg.output_dir)
    data, tokenizer, lam, world = (str(root / name) for name in ("data", "tokenizer", "lam", "dynamics"))
    seed = ["--seed", str(cfg.seed)]
    preset = ["--preset", cfg.preset, "--data_dir", data, *seed]
    parts = ["--tokenizer_checkpoint", tokenizer, "--lam_checkpoint", lam]
    began = time.monotonic()
    if not (root / "data" / "metadata.json").exists():
        episodes = ["--num_episodes", str(cfg.num_episodes), "--policy", "sticky", "--val_fraction", "0.08"]
        looks = ["--no-use_backgrounds", "--restrict_themes"]
        together(["generate_dataset.py", "--output_dir", data, *episodes, *looks, *seed])
    # Neither of these two needs the other, and side by side they leave no core idle; nor do the last two.
    together(
        ["train_tokenizer.py", *preset, "--ckpt_dir", tokenizer],
        ["train_lam.py", *preset, "--ckpt_dir", lam],
    )
    together(["train_dynamics.py", *preset, "--ckpt_dir", world, *parts])
    samples, clips = str(root / "samples"), ["--num_clips", "48", "--rollout_clips", "48", "--long_frames", "30", *seed]
    together(
        ["sample.py", "--checkpoint", world, "--output_dir", samples, "--num_clips", "8", *seed],
        ["evaluate.py", "--checkpoint", world, "--data_dir", data, "--output_dir", str(root), *clips],
    )
    file = root / "metrics.json"
    metrics = json.loads(file.read_text()) | {"wall_s": round(time.monotonic() - began, 1)}
    file.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\ndone in {metrics['wall_s']:.0f} s; look at {root}/samples/rollout.gif and {root}/metrics.json")


if __name__ == "__main__":
    run(main, Config)
