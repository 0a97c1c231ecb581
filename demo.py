"""The whole way in one command: real CoinRun, three trainings, a rollout beside the truth, and its measurement.

    make demo

Everything goes to runs/demo. An interrupted demo continues where it stopped.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs every script once, at the tiny preset, on a laptop's CPU in under ten minutes."""

    output_dir: str = "runs/demo"
    """Where everything goes."""
    num_episodes: int = 100
    """Episodes of CoinRun."""


def main(cfg: Config) -> None:
    root = Path(cfg.output_dir)
    data, tokenizer, lam, world = (str(root / name) for name in ("data", "tokenizer", "lam", "dynamics"))
    tiny = ["--preset", "tiny", "--data_dir", data]
    parts = ["--tokenizer_checkpoint", tokenizer, "--lam_checkpoint", lam]
    # A world this young is unsure of most tokens: its likeliest guess is nearer to the truth than a draw.
    likeliest = ["--temperature", "0", "--steps", "8"]
    stages = [
        f"generate_dataset.py --output_dir {data} --num_episodes {cfg.num_episodes} --policy sticky".split(),
        ["train_tokenizer.py", *tiny, "--ckpt_dir", tokenizer],
        ["train_lam.py", *tiny, "--ckpt_dir", lam],
        ["train_dynamics.py", *tiny, "--ckpt_dir", world, *parts],
        ["sample.py", "--checkpoint", world, "--output_dir", str(root / "samples"), "--num_clips", "24", *likeliest],
        [
            *f"evaluate.py --checkpoint {world} --data_dir {data} --output_dir {root} --rollout_clips 24".split(),
            *likeliest,
        ],
    ]
    began = time.monotonic()
    for stage in stages:
        if stage[0] == "generate_dataset.py" and (root / "data" / "metadata.json").exists():
            continue
        print(f"\n$ python {' '.join(stage)}", flush=True)
        since = time.monotonic()
        done = subprocess.run([sys.executable, *stage], cwd=Path(__file__).parent)
        if done.returncode:
            raise SystemExit(done.returncode)
        print(f"({time.monotonic() - since:.0f} s)", flush=True)
    file = root / "metrics.json"
    metrics = json.loads(file.read_text()) | {"wall_s": round(time.monotonic() - began, 1)}
    file.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\ndone in {metrics['wall_s']:.0f} s; look at {root}/samples/rollout.gif and {root}/metrics.json")


if __name__ == "__main__":
    run(main, Config)
