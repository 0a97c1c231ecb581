"""Records an environment as a dataset of clips: which files to make, their clips, and continuing where a run stopped.

A shard (one file) is the unit of work. It has random numbers of its own, from (seed, split, index of the shard), so
the same seed gives the same bytes with any number of workers. Finished shards and what they belong to are noted in
`<output_dir>/unfinished/`; running the same command again continues there. `metadata.json` comes last: a folder
without it is not a dataset.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from models.errors import InputError
from sources import workers
from sources.environment import EPISODE_STEPS, Environment, Recording, RecordingOptions
from sources.levels import Outcomes, clips_of, outcomes_of, total
from utils.records import FORMAT_VERSION, SPLITS, Clip, Metadata, Shard, write_metadata, write_shard

RECORDER_VERSION = 7  # changes where the same seed gives other bytes: a run is not continued by another recorder
SHARD_BYTES = 16 * EPISODE_STEPS * 64 * 64 * 3  # of frames: 0.2 GB in memory while it is made


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to make: a file of `num_episodes` episodes."""

    split: str
    index: int
    num_episodes: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.index:05d}"

    @property
    def file(self) -> str:
        return f"{self.name}.array_record"


class Made(NamedTuple):
    """A shard that is finished, and what became of the levels in it."""

    shard: Shard
    outcomes: Outcomes


def record(
    environment: Environment, options: RecordingOptions, folder: str | Path, num_workers: int
) -> tuple[Metadata, int]:
    """Plays `environment` and writes the dataset to `folder`, or the rest of it.

    Returns:
      What metadata.json holds, and the number of episodes that an interrupted run had already recorded.

    Raises:
      InputError: The options cannot work, or the folder holds something else.
      OSError: A file cannot be written; once that is mended, the same call continues.
    """
    options.check()
    environment.check(options)
    made_by = _made_by(environment, options)
    tasks = plan(options, math.prod(environment.frame_shape))
    folder = Path(folder)
    with _unfinished(folder, environment, made_by) as unfinished:
        done = {task: noted for task in tasks if (noted := _finished_shard(folder, unfinished, task))}
        num_reused = sum(task.num_episodes for task in done)
        if done:
            print(f"continuing {folder}: {num_reused} of {options.num_episodes} episodes are done", file=sys.stderr)
        missing = [task for task in tasks if task not in done]
        # Each run writes in a folder of its own, so that a worker which outlives a killed run by a moment does no harm.
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=unfinished, ignore_cleanup_errors=True) as scratch:
            make = functools.partial(_make_shard, environment, options, folder, Path(scratch))
            with workers.running(make, missing, num_workers) as made:
                done |= _with_progress(made, missing, num_reused, options.num_episodes)
        if not any(made.shard.lengths for made in done.values()):
            kind = "solved level" if options.only_solved else "level"
            raise InputError(
                f"`min_clip_length` {options.min_clip_length}: no {kind} of {environment.name} was as long; delete "
                f"{folder}, and play otherwise"
            )
        levels = total(done[task].outcomes for task in tasks)
        metadata = Metadata(
            environment=environment.name,
            frame_shape=environment.frame_shape,
            fps=environment.fps,
            action_names=environment.action_names or None,
            splits={split: tuple(done[task].shard for task in tasks if task.split == split) for split in SPLITS},
            made_by=made_by,
            same_actions=dict(environment.same_actions),
            idle_action=environment.idle_action,
            levels=levels.as_json(),
            action_columns=environment.action_columns,
        )
        write_metadata(folder, metadata)
    return metadata, num_reused


def plan(options: RecordingOptions, frame_bytes: int) -> list[Task]:
    """Divides the episodes among splits and shards; training first, since it has the largest shards."""
    most = max(SHARD_BYTES // (EPISODE_STEPS * frame_bytes), 1)
    held_out = {"val": options.val_fraction, "test": options.test_fraction}
    num_episodes = {
        split: max(round(share * options.num_episodes), 1) if share and options.num_episodes >= 3 else 0
        for split, share in held_out.items()
    }
    num_episodes = {"train": options.num_episodes - sum(num_episodes.values())} | num_episodes
    tasks = []
    for split, count in num_episodes.items():
        # Small datasets also come in several shards, so that several cores have work.
        size = min(most, -(-count // 8)) or 1
        tasks += [Task(split, start // size, min(size, count - start)) for start in range(0, count, size)]
    return tasks


def make_clips(environment: Environment, options: RecordingOptions, task: Task) -> tuple[list[Clip], Outcomes]:
    """Plays the episodes of one shard: a function of the seed, the split and the index of the shard alone."""
    key = (SPLITS.index(task.split), task.index)
    rng = np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=key))
    clips: list[Clip] = []
    outcomes = []
    for start in range(0, task.num_episodes, environment.at_once):
        num_envs = min(environment.at_once, task.num_episodes - start)
        played = _checked(environment, num_envs, environment.play(options, task.split, num_envs, rng))
        outcomes.append(outcomes_of(played))
        for i in range(num_envs):
            name = f"{task.name}/episode{start + i:02d}"
            clips += clips_of(played, i, name, options.clip_length, options.min_clip_length, options.only_solved)
    return clips, total(outcomes)


def _checked(environment: Environment, num_envs: int, played: Recording) -> Recording:
    """What an environment has played, if it is what the environment promised."""
    columns = environment.action_columns
    shapes = {"frames_BTHWC": environment.frame_shape, "actions_BT": (len(columns),) if columns else ()}
    for name, array in played._asdict().items():
        shape = (num_envs, EPISODE_STEPS, *shapes.get(name, ()))
        if array is not None and array.shape != shape:
            raise ValueError(f"{environment.name}: {name} has shape {array.shape}; expected {shape}")
    for i, values in enumerate([column.values for column in columns] or [environment.action_names]):
        chosen_BT = played.actions_BT[..., i] if columns else played.actions_BT
        if values is not None and not (chosen_BT.min() >= 0 and chosen_BT.max() < len(values)):
            raise ValueError(f"{environment.name}: actions beyond the {len(values)} that have names")
    if not played.first_BT[:, 0].all():
        raise ValueError(f"{environment.name}: first_BT must be true at t = 0")
    return played


def _made_by(environment: Environment, options: RecordingOptions) -> dict[str, Any]:
    """All that decides the bytes of the dataset, but for the environment's name."""
    config = environment.options_of(options)
    made_by = {"command": "generate_dataset.py", "recorder": RECORDER_VERSION, "config": config}
    return made_by | environment.provenance(options)


@contextlib.contextmanager
def _unfinished(folder: Path, environment: Environment, made_by: dict[str, Any]) -> Iterator[Path]:
    """The folder of notes on finished shards; it disappears when the dataset is complete.

    Raises:
      InputError: The dataset exists, or is the unfinished one of another configuration, or the folder is not ours.
    """
    unfinished = folder / "unfinished"
    noted = unfinished / "made_by.json"
    expected = made_by | {"environment": environment.name, "format_version": FORMAT_VERSION}
    choose = f"`output_dir` {folder}: {{}}; choose another `output_dir` or delete this one"
    if (folder / "metadata.json").exists():
        raise InputError(choose.format("already holds a dataset"))
    if noted.exists():
        # Notes that name no environment are from a time when there was only one.
        found = {"environment": "coinrun"} | json.loads(noted.read_text())
        defaults = {field.name: field.default for field in dataclasses.fields(RecordingOptions)}
        chosen = found.get("config", {})  # it lacks what an older run could not choose
        found["config"] = {name: defaults.get(name) for name in expected["config"]} | chosen
        if found != expected:
            raise InputError(choose.format(f"holds an unfinished dataset with {_differences(found, expected)}"))
    elif folder.exists() and any(path != unfinished for path in folder.iterdir()):
        raise InputError(choose.format("is not empty, and no unfinished dataset"))
    unfinished.mkdir(parents=True, exist_ok=True)
    for leftover in unfinished.glob("scratch-*"):
        shutil.rmtree(leftover)
    _write_json(noted, expected, unfinished)
    try:
        yield unfinished
    except (KeyboardInterrupt, SystemExit):
        print(f"{folder} is unfinished; the same command continues there", file=sys.stderr)
        raise
    shutil.rmtree(unfinished)


def _differences(found: Any, expected: Any, name: str = "") -> str:
    """Names the values that differ, for instance "seed 1, not 2"."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return f"{name} {found}, not {expected}"
    names = [name for name in found | expected if found.get(name) != expected.get(name)]
    return ", ".join(_differences(found.get(name), expected.get(name), name) for name in names)


def _write_json(path: Path, value: Any, scratch: Path) -> None:
    """Writes in one step, by way of `scratch`."""
    temporary = scratch / f"{path.name}.tmp"
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _note_of(unfinished: Path, task: Task) -> Path:
    return unfinished / f"{task.split}-{task.index:05d}.json"


def _finished_shard(folder: Path, unfinished: Path, task: Task) -> Made | None:
    """The shard as an interrupted run noted it, or None if it is still to be made."""
    note = _note_of(unfinished, task)
    if not (note.exists() and (folder / task.file).exists()):
        return None
    noted = json.loads(note.read_text())
    return Made(Shard(task.file, noted["lengths"]), Outcomes(**noted["outcomes"]))


def _make_shard(environment: Environment, options: RecordingOptions, folder: Path, scratch: Path, task: Task) -> Made:
    """Makes one file and notes that it is finished; runs in a worker."""
    clips, outcomes = make_clips(environment, options, task)
    try:
        shard = write_shard(scratch, task.file, clips)
        (folder / task.split).mkdir(exist_ok=True)
        os.replace(scratch / task.file, folder / task.file)
        note = {"lengths": shard.lengths, "outcomes": dataclasses.asdict(outcomes)}
        _write_json(_note_of(folder / "unfinished", task), note, scratch)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError, for instance when the disk is full
        raise OSError(f"{folder / task.file}: {error}; once that is mended, the same command continues") from error
    return Made(shard, outcomes)


def _with_progress(
    made: Iterator[Made], tasks: Sequence[Task], num_reused: int, num_episodes: int
) -> Iterator[tuple[Task, Made]]:
    """Each task with its shard, as they are made; shows how far this is of all `num_episodes`."""
    num_done = num_reused
    with tqdm(
        total=num_episodes * EPISODE_STEPS,
        initial=num_done * EPISODE_STEPS,
        unit=" frames",
        unit_scale=True,
        disable=None,  # where stderr is no terminal; there, ten lines tell
    ) as bar:
        for task, finished in zip(tasks, made, strict=True):
            tenth = num_done * 10 // num_episodes
            num_done += task.num_episodes
            bar.update(task.num_episodes * EPISODE_STEPS)
            if bar.disable and num_done * 10 // num_episodes > tenth:
                print(f"{num_done} of {num_episodes} episodes", file=sys.stderr, flush=True)
            yield task, finished
