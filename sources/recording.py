"""Records an environment as a dataset of clips: which files to make, their clips, and continuing where a run stopped.

A shard (one file) is the unit of work. It has random numbers of its own, from (seed, split, index of the shard), so
the same seed gives the same bytes with any number of workers. Finished shards and what they belong to are noted in
`<output_dir>/unfinished/`; running the same command again continues there. `metadata.json` comes last: a folder
without it is not a dataset.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.errors import InputError
from sources import workers
from sources.environment import EPISODE_STEPS, Environment, Recording, RecordingOptions
from utils.records import FORMAT_VERSION, SPLITS, Clip, Metadata, Shard, write_metadata, write_shard

# Beyond 4 of Procgen's environments at once their images no longer fit a core's cache: 16 are 40 % slower.
ENVS_AT_ONCE = 4
MAX_EPISODES_PER_SHARD = 16  # of CoinRun about 14 MB on disk, 0.2 GB in memory while it is made


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
    tasks = plan(options)
    folder = Path(folder)
    with _unfinished(folder, environment, made_by) as unfinished:
        shards = {task: shard for task in tasks if (shard := _finished_shard(folder, unfinished, task))}
        num_reused = sum(task.num_episodes for task in shards)
        if shards:
            print(f"continuing {folder}: {num_reused} of {options.num_episodes} episodes are done", file=sys.stderr)
        missing = [task for task in tasks if task not in shards]
        # Each run writes in a folder of its own, so that a worker which outlives a killed run by a moment does no harm.
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=unfinished, ignore_cleanup_errors=True) as scratch:
            make = functools.partial(_make_shard, environment, options, folder, Path(scratch))
            with workers.running(make, missing, num_workers) as made:
                shards |= _with_progress(made, missing, num_reused, options.num_episodes)
        metadata = Metadata(
            environment=environment.name,
            frame_shape=environment.frame_shape,
            fps=environment.fps,
            action_names=environment.action_names,
            splits={split: tuple(shards[task] for task in tasks if task.split == split) for split in SPLITS},
            made_by=made_by,
            same_actions=dict(environment.same_actions),
            idle_action=environment.idle_action,
        )
        write_metadata(folder, metadata)
    return metadata, num_reused


def plan(options: RecordingOptions) -> list[Task]:
    """Divides the episodes among splits and shards; training first, since it has the largest shards."""
    held_out = {"val": options.val_fraction, "test": options.test_fraction}
    num_episodes = {
        split: max(round(share * options.num_episodes), 1) if share and options.num_episodes >= 3 else 0
        for split, share in held_out.items()
    }
    num_episodes = {"train": options.num_episodes - sum(num_episodes.values())} | num_episodes
    tasks = []
    for split, count in num_episodes.items():
        # Small datasets also come in several shards, so that several cores have work.
        size = min(MAX_EPISODES_PER_SHARD, -(-count // 8)) or 1
        tasks += [Task(split, start // size, min(size, count - start)) for start in range(0, count, size)]
    return tasks


def make_clips(environment: Environment, options: RecordingOptions, task: Task) -> list[Clip]:
    """Plays the episodes of one shard: a function of the seed, the split and the index of the shard alone."""
    key = (SPLITS.index(task.split), task.index)
    rng = np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=key))
    clips = []
    for start in range(0, task.num_episodes, ENVS_AT_ONCE):
        num_envs = min(ENVS_AT_ONCE, task.num_episodes - start)
        played = _checked(environment, num_envs, environment.play(options, task.split, num_envs, rng))
        for i, first_T in enumerate(played.first_BT):
            for begin, end in cut(first_T, options.clip_length, options.min_clip_length):
                clips.append(
                    Clip(
                        frames_THWC=played.frames_BTHWC[i, begin:end],
                        clip_id=f"{task.name}/episode{start + i:02d}/step{begin:03d}",
                        actions_T=played.actions_BT[i, begin:end],
                        rewards_T=played.rewards_BT[i, begin:end],
                        level_seed=None if played.levels_BT is None else int(played.levels_BT[i, begin]),
                    )
                )
    return clips


def _checked(environment: Environment, num_envs: int, played: Recording) -> Recording:
    """What an environment has played, if it is what the environment promised."""
    for name, values in played._asdict().items():
        shape = (num_envs, EPISODE_STEPS, *(environment.frame_shape if name == "frames_BTHWC" else ()))
        if values is not None and values.shape != shape:
            raise ValueError(f"{environment.name}: {name} has shape {values.shape}; expected {shape}")
    if not (played.actions_BT.min() >= 0 and played.actions_BT.max() < len(environment.action_names)):
        raise ValueError(f"{environment.name}: actions beyond the {len(environment.action_names)} that have names")
    if not played.first_BT[:, 0].all():
        raise ValueError(f"{environment.name}: first_BT must be true at t = 0")
    return played


def cut(first_T: np.ndarray, clip_length: int, min_clip_length: int) -> Iterator[tuple[int, int]]:
    """Cuts an episode into clips: pairs (begin, end) that lie within one level each.

    Args:
      first_T: Whether a level begins at the time step; true at 0.
    """
    for begin, end in itertools.pairwise([*np.flatnonzero(first_T).tolist(), len(first_T)]):
        for start in range(begin, end, clip_length):
            stop = min(start + clip_length, end)
            if stop - start >= min_clip_length:
                yield start, stop


def _made_by(environment: Environment, options: RecordingOptions) -> dict[str, Any]:
    """All that decides the bytes of the dataset, but for the environment's name."""
    config = {field.name: getattr(options, field.name) for field in dataclasses.fields(RecordingOptions)}
    return {"command": "generate_dataset.py", "config": config} | environment.provenance(options)


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
        found["config"] = defaults | found.get("config", {})  # what an older run could not choose
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


def _finished_shard(folder: Path, unfinished: Path, task: Task) -> Shard | None:
    """The shard as an interrupted run noted it, or None if it is still to be made."""
    note = _note_of(unfinished, task)
    if not (note.exists() and (folder / task.file).exists()):
        return None
    return Shard(task.file, json.loads(note.read_text()))


def _make_shard(environment: Environment, options: RecordingOptions, folder: Path, scratch: Path, task: Task) -> Shard:
    """Makes one file and notes that it is finished; runs in a worker."""
    clips = make_clips(environment, options, task)
    try:
        shard = write_shard(scratch, task.file, clips)
        (folder / task.split).mkdir(exist_ok=True)
        os.replace(scratch / task.file, folder / task.file)
        _write_json(_note_of(folder / "unfinished", task), shard.lengths, scratch)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError, for instance when the disk is full
        raise OSError(f"{folder / task.file}: {error}; once that is mended, the same command continues") from error
    return shard


def _with_progress(
    made: Iterator[Shard], tasks: Sequence[Task], num_reused: int, num_episodes: int
) -> Iterator[tuple[Task, Shard]]:
    """Each task with its shard, as they are made; shows how far this is of all `num_episodes`."""
    num_done = num_reused
    with tqdm(
        total=num_episodes * EPISODE_STEPS,
        initial=num_done * EPISODE_STEPS,
        unit=" frames",
        unit_scale=True,
        disable=None,  # where stderr is no terminal; there, ten lines tell
    ) as bar:
        for task, shard in zip(tasks, made, strict=True):
            tenth = num_done * 10 // num_episodes
            num_done += task.num_episodes
            bar.update(task.num_episodes * EPISODE_STEPS)
            if bar.disable and num_done * 10 // num_episodes > tenth:
                print(f"{num_done} of {num_episodes} episodes", file=sys.stderr, flush=True)
            yield task, shard
