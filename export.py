"""Makes a slim folder of a world, to pass on: parameters in half precision, a few clips to start from, and a card.

    python export.py runs/dynamics worlds/mine
    python play.py --checkpoint worlds/mine

sample.py, play.py and evaluate.py take the folder as they take a training's, and write nothing into it.
"""

import dataclasses
import itertools
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx

from evaluation.measured import read_metrics
from evaluation.table import headlines, markdown_table
from models.errors import InputError
from models.genie import World, load_world, read_config, stored_sampling, write_parameters
from models.sampling import SamplingConfig, SamplingFlags
from utils.checkpoint import LABELS, data_of, is_exported
from utils.cli import run
from utils.data import ClipSource, longest_clip
from utils.records import PER_FRAME, Clip, Metadata, read_metadata, write_metadata, write_shard

CARD = """# {name}

A world learned from video (Genie). From the project's folder:

    python play.py --checkpoint {out}
    python sample.py --checkpoint {out}

{note}Frames of {shape} pixels, {fps:g} a second, of {environment}; {actions}. The world sees {window} frames at once;
steps per frame: {sampling.steps}{order}, temperature: {sampling.temperature:g}, guidance: {sampling.guidance:g}.
{num_clips} validation clips: `data/`.

{parts}

## How it was made

{commands}

{figures}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SamplingFlags):
    """Makes a slim folder of a world. It is sampled as its training says, or as the flags here do."""

    run: tyro.conf.Positional[str]
    """--ckpt_dir of the world's training."""
    out: tyro.conf.Positional[str]
    """The new folder; must not exist."""
    num_clips: int = 16
    """Validation clips to take along."""
    num_frames: int = 32
    """Frames of each, at least as many as the world sees at once; or as many as the longest has."""
    data_dir: str = ""
    """Dataset of the clips; default: the one that the world was trained on."""
    metrics: str = ""
    """metrics.json of an evaluation, for the card; default: that in the training's folder, if there is one."""
    note: str = ""
    """A sentence for the card, for instance on which machine the world was trained."""
    seed: int = 0
    """Of the choice of clips."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_clips", "num_frames"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")


PATHS = {
    *("ckpt_dir", "data_dir", "tokenizer_checkpoint", "lam_checkpoint", "init_from"),
    *("compile_cache", "coordinator", "entity"),
}
"""Training flags that mean nothing elsewhere."""


def write_slim_config(folder: Path, run: str, sampling: SamplingConfig) -> None:
    """Writes the configuration of a training, without paths, with the way of sampling that the world is to have."""
    config = read_config(run)
    config.pop("command", None)
    train = {name: value for name, value in config["train"].items() if name not in PATHS}
    config["train"] = train | {"sampling": dataclasses.asdict(sampling)}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_clips(folder: Path, data_dir: str, num_clips: int, num_frames: int, seed: int) -> int:
    """Writes a dataset of windows of validation clips, of as many levels as can be found soon; returns how many."""
    length = min(num_frames, longest_clip(data_dir, "val"))
    source = ClipSource(data_dir, "val", max(length, 1))
    rng = np.random.default_rng(seed)
    by_level: dict[int | str, list[Clip]] = {}
    for i in rng.permutation(len(source))[: 20 * num_clips].tolist():
        [clip] = source.clips([i])
        by_level.setdefault(clip.clip_id if clip.level_seed is None else clip.level_seed, []).append(clip)
        if len(by_level) == num_clips:
            break
    turns = itertools.zip_longest(*by_level.values())  # all first ones, then all second ones
    cut: list[Clip] = []
    for clip in [clip for turn in turns for clip in turn if clip][:num_clips]:
        at = int(rng.integers(len(clip) - length + 1))
        parts = {f: getattr(clip, f) for f in PER_FRAME}
        parts = {f: None if values is None else values[at : at + length] for f, values in parts.items()}
        cut.append(dataclasses.replace(clip, **parts))
    shard = write_shard(folder, "val/00000.array_record", cut)
    made_by = {"command": "export.py", "of": source.metadata.made_by}
    splits = {"train": (), "val": (shard,), "test": ()}
    write_metadata(folder, dataclasses.replace(source.metadata, splits=splits, made_by=made_by))
    return len(cut)


def card(cfg: Config, world: World, metadata: Metadata, sampling: SamplingConfig, num_clips: int) -> str:
    """What README.md says of a world."""
    count = lambda part: sum(x.size for x in jax.tree.leaves(nnx.state(part)))
    parts = [(name, f"{count(part):,}") for name in ("tokenizer", "lam", "dynamics") if (part := getattr(world, name))]
    columns = world.cfg.dynamics.action_values
    figures, file = "", Path(cfg.metrics or Path(cfg.run) / "evaluation" / "metrics.json")
    metrics = read_metrics(file, "metrics") if cfg.metrics or file.is_file() else {}
    if "sampling" in metrics and SamplingConfig(**metrics["sampling"]) == sampling:
        took = f" All of it took {metrics['wall_s'] / 60:.0f} minutes." if "wall_s" in metrics else ""
        figures = f"## How good it is\n\nOn {metrics['rollout_clips']} clips of the {metrics['split']} split.{took}\n\n"
        figures += headlines(metrics) + "\n"
    elif cfg.metrics:
        raise InputError(f"`metrics` {file}: measured with other sampling, {metrics.get('sampling')}; evaluate again")
    return CARD.format(
        name=Path(cfg.out).name,
        out=cfg.out,
        note=cfg.note + "\n\n" if cfg.note else "",
        shape=" × ".join(map(str, metadata.frame_shape[:2])),
        fps=metadata.fps,
        environment=metadata.environment,
        actions=f"actions of {len(columns)} columns" if columns else f"{world.num_actions} actions",
        window=world.cfg.window,
        sampling=sampling,
        order=f", order: {sampling.order}" if world.tokenizer and world.tokenizer.cfg.kind == "vq" else "",
        num_clips=num_clips,
        parts="\n".join(markdown_table(("part", "variables"), parts)),
        commands="\n".join(f"    {command}" for command in commands(cfg, metadata)),
        figures=figures,
    )


def commands(cfg: Config, metadata: Metadata) -> list[str]:
    """The commands that made a world, as far as its folders tell."""
    found, config = [], read_config(cfg.run)
    if options := metadata.made_by.get("config"):
        words = lambda x: [] if isinstance(x, bool) else map(str, x if isinstance(x, list) else [x])
        flags = [[f"--{'no-' * (x is False)}{name}", *words(x)] for name, x in options.items() if x not in ("", [])]
        flags += [["--output_dir", cfg.data_dir or data_of(cfg.run)]]
        found.append(shlex.join([metadata.made_by["command"], *itertools.chain(*flags)]))
    for part in ("tokenizer", "lam"):
        folder = config["model"][part] and config["train"].get(f"{part}_checkpoint", "")
        if folder and (Path(folder) / "config.json").is_file():
            found.append(read_config(folder).get("command", ""))
    found += [config.get("command", ""), shlex.join(["export.py", *sys.argv[1:]])]
    return [f"python {command}" for command in found if command]


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder, or remove it")
    if is_exported(cfg.run):
        raise InputError(f"{cfg.run}: is an exported world already; copy the folder")
    world, sampling = load_world(cfg.run), cfg.over(stored_sampling(cfg.run))
    sampling.expect(world.cfg.dynamics)
    metadata = read_metadata(data_dir := cfg.data_dir or data_of(cfg.run))
    if metadata.frame_shape != world.cfg.frame_shape:
        expected = world.cfg.frame_shape
        raise InputError(f"`data_dir` {data_dir}: frames of {metadata.frame_shape}, the world's are {expected}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there is whole.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        write_parameters(folder, world)
        write_slim_config(folder, cfg.run, sampling)
        num_frames = max(cfg.num_frames, world.cfg.window)  # fewer could not be evaluated on
        num_clips = write_clips(folder / "data", data_dir, cfg.num_clips, num_frames, cfg.seed)
        labels = Path(cfg.run) / LABELS
        if labels.is_file():
            shutil.copyfile(labels, folder / labels.name)
        (folder / "README.md").write_text(card(cfg, world, metadata, sampling, num_clips))
        folder.rename(out)
    megabytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"wrote {out}: {megabytes:.1f} MB")


if __name__ == "__main__":
    run(main, Config)
