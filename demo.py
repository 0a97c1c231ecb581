"""The whole way in one command: real CoinRun, three trainings, a rollout beside the truth, and its measurement.

make demo                        # everything goes to runs/demo
make world DATA=my_videos        # the same with your own videos, or a dataset of your own, in runs/my_videos
make agent                       # after the demo: a policy from videos without actions, played in the real game
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from evaluation.verdict import verdict
from models.errors import InputError
from sources.environment import options_of
from sources.workers import num_cores
from utils.cli import run
from utils.records import read_metadata


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs every script once on two cores of a CPU, in under ten minutes; for a small world, in two hours."""

    data_dir: str = ""
    """Your own data: a dataset, or a folder of videos, arrays or pictures. Empty records CoinRun."""
    output_dir: str = ""
    """Where everything goes, and goes on; default: runs/demo, or runs/<name of your data>."""
    preset: Literal["tiny", "flow", "latents", "small"] = "latents"
    """Of the trainings; flow and small need no tokenizer's, tiny has tokens, small wants --num_episodes 600."""
    num_episodes: int = 100
    """Episodes of CoinRun, without backgrounds and in one theme."""
    height: int = 64
    """Of the frames that your videos become, and"""
    width: int = 64
    """their width."""
    fps: float | None = None
    """Their rate; default: the rate of most of your videos."""
    use_gt_actions: bool = False
    """Learn your dataset's own actions instead of finding latent ones: where little moves, those cannot be found."""
    init_from: str = ""
    """World whose parameters the trainings begin with, such as worlds/coinrun-small with --preset small."""
    agent: bool = False
    """Once the world is there, clone who solves CoinRun, from videos alone, and play the real game."""
    expert_episodes: int = 120
    """Of who solves CoinRun, for the agent."""
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


def coinrun(cfg: Config, root: Path) -> str:
    """Records CoinRun, unless that is done; returns the dataset's folder."""
    data = root / "data"
    if not (data / "metadata.json").exists():
        episodes = ["--num_episodes", str(cfg.num_episodes), "--policy", "sticky", "--val_fraction", "0.08"]
        looks = ["--no-use_backgrounds", "--restrict_themes"]
        together(["generate_dataset.py", "--output_dir", str(data), *episodes, *looks, "--seed", str(cfg.seed)])
    return str(data)


def own_data(cfg: Config, root: Path) -> str:
    """Reads videos where these are no dataset yet, and inspects; returns the dataset's folder.

    Raises:
      InputError: There is too little to train on and to measure on.
    """
    data = Path(cfg.data_dir)
    if not (data / "metadata.json").exists():
        data = root / "data"
        size = {"height": cfg.height, "width": cfg.width, "fps": cfg.fps}
        if not (data / "metadata.json").exists():
            source = ["--input_dir", cfg.data_dir, "--output_dir", str(data), "--seed", str(cfg.seed)]
            given = [f"--{name}={value}" for name, value in size.items() if value is not None]
            together(["preprocess_dataset.py", *source, *given])
        elif any(read_metadata(data).made_by["arguments"][name] != value for name, value in size.items()):
            raise InputError(f"`output_dir` {root}: has clips of another `height`, `width` or `fps`; give another")
    if cfg.use_gt_actions and not read_metadata(data).has_actions:
        raise InputError(f"`use_gt_actions`: {cfg.data_dir} has no actions; leave it out, to find latent ones")
    inspection = root / "inspection"
    count = lambda split: sum(shard.count() for shard in read_metadata(data).splits.get(split, ()))
    clips, held_out = count("train"), count("val")
    if not clips or clips + held_out < 2:
        raise InputError(f"`data_dir` {cfg.data_dir}: {clips} clip(s) to train on, {held_out} to measure on; give more")
    fix = [] if held_out else ["--fix", "val"]  # of a single video the end is held out
    if not (inspection / "dataset" / "metadata.json" if fix else inspection / "summary.json").exists():
        together(["inspect_dataset.py", str(data), "--output_dir", str(inspection), *fix])
    print(estimate(cfg, json.loads((inspection / "summary.json").read_text())), flush=True)
    return str(inspection / "dataset" if fix else data)


MINUTES = {"tiny": 5, "flow": 8, "latents": 4, "small": 180}
"""Of trainings and measurement on two cores, 64 × 64 pixels (benchmarks/RESULTS.md)."""


def estimate(cfg: Config, summary: dict[str, Any]) -> str:
    """How long trainings and measurement will take: by the frames' size and the cores, of which four count at most.

    Half of what two cores take does not get faster with more.
    """
    if os.path.exists("/dev/nvidiactl"):
        return "\ntrainings and their measurement follow; how long they take on a GPU has not been measured"
    height, width, _ = summary["frame_shape"]
    patches, cores = -(-height // 8) * -(-width // 8) / 64, num_cores()
    minutes = max(1, round(MINUTES[cfg.preset] * patches * (0.5 + 1 / min(cores, 4))))
    return f"\ntrainings and their measurement follow: about {minutes} min on {cores} quiet core{'s' * (cores > 1)}"


EXPLORES = ("LEFT=1", "UP=1", "RIGHT=4", "RIGHT+UP=4")
"""What the walker does where it does not walk or jump as it should."""


def agent(cfg: Config, root: Path, data: str, lam: str) -> None:
    """Clones who solves CoinRun by latent actions, and for comparison by true ones; both play levels of the game.

    Raises:
      InputError: The world was trained on something else.
    """
    options = options_of(read_metadata(data).made_by)
    if options is None or read_metadata(data).environment != "coinrun":
        raise InputError(f"`agent`: {data} was not recorded from CoinRun; train_policy.py clones from other data")
    expert, seed = root / "expert", ["--seed", str(cfg.seed)]
    if not (expert / "metadata.json").exists():
        looks = ["--no-use_backgrounds"] * (not options.use_backgrounds)
        looks += ["--restrict_themes"] * options.restrict_themes
        walker = ["--policy", "walker", "--planner_explore", "0.03", "--only_solved", "--action_weights", *EXPLORES]
        cut = ["--clip_length", "16", "--min_clip_length", "8", "--num_episodes", str(cfg.expert_episodes)]
        together(["generate_dataset.py", "--output_dir", str(expert), *walker, *cut, *looks, *seed])
    policy, oracle = (str(root / name) for name in ("policy", "oracle"))
    clone = ["train_policy.py", "--preset", "tiny", "--data_dir", str(expert), *seed]
    together(
        [*clone, "--ckpt_dir", policy, "--lam_checkpoint", lam],
        [*clone, "--ckpt_dir", oracle, "--targets", "true"],
    )
    few = ["--num_levels", "200", "--curve_levels", "100", "--planner_levels", "50", *seed]
    together(["evaluate_policy.py", "--checkpoint", policy, "--oracle_checkpoint", oracle, *few])


def main(cfg: Config) -> None:
    own = Path(cfg.data_dir).resolve().name
    root = Path(cfg.output_dir or (f"runs/{own}" if cfg.data_dir else "runs/demo"))
    tokenizer, lam, world = (str(root / name) for name in ("tokenizer", "lam", "dynamics"))
    began = time.monotonic()
    if cfg.agent and (root / "metrics.json").exists():  # the world is there
        agent(cfg, root, cfg.data_dir or str(root / "data"), lam)
        print(f"\ndone in {time.monotonic() - began:.0f} s; look at {root}/policy/evaluation/report.html")
        return
    data = own_data(cfg, root) if cfg.data_dir else coinrun(cfg, root)
    seed = ["--seed", str(cfg.seed)]
    preset = ["--preset", cfg.preset, "--data_dir", data, *seed]
    preset += ["--init_from", cfg.init_from] if cfg.init_from else []
    actions = ["--use_gt_actions"] if cfg.use_gt_actions else ["--lam_checkpoint", lam]
    # Neither of these two needs the other, and side by side they leave no core idle; nor do the last two.
    in_pixels = cfg.preset in ("flow", "small")
    parts = [] if in_pixels else [["train_tokenizer.py", *preset, "--ckpt_dir", tokenizer]]
    if not cfg.use_gt_actions:
        parts.append(["train_lam.py", *preset, "--ckpt_dir", lam])
    if parts:
        together(*parts)
    coded = [] if in_pixels else ["--tokenizer_checkpoint", tokenizer]
    together(["train_dynamics.py", *preset, "--ckpt_dir", world, *coded, *actions])
    samples, clips = str(root / "samples"), ["--num_clips", "48", "--rollout_clips", "48", "--long_frames", "30", *seed]
    together(
        ["sample.py", "--checkpoint", world, "--output_dir", samples, "--num_clips", "8", *seed],
        ["evaluate.py", "--checkpoint", world, "--data_dir", data, "--output_dir", str(root), *clips],
    )
    file = root / "metrics.json"
    metrics = json.loads(file.read_text()) | {"wall_s": round(time.monotonic() - began, 1)}
    file.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\ndone in {metrics['wall_s']:.0f} s; look at {root}/samples/rollout.gif and {root}/report.html")
    print(f"{verdict(metrics)}\nplay it: make play WORLD={world}")
    if cfg.agent:
        main(cfg)


if __name__ == "__main__":
    run(main, Config)
