"""Plays CoinRun and writes what happens as a dataset of clips (the format of `utils/data.py`).

    python generate_dataset.py --num_episodes 10000     # 10M transitions, as in Genie's appendix F

One episode is 1,000 time steps of one environment. Where the agent dies or takes the coin, the recording goes on in a
new clip, so that a clip never crosses the end of a level and next to nothing is thrown away.

A shard (one file) is the unit of work. It has random numbers of its own, from (seed, split, index of the shard), so
the same seed gives the same bytes with any number of workers. Finished shards and what they belong to are noted in
`<output_dir>/unfinished/`; running the same command again continues there. `metadata.json` comes last: a folder
without it is not a dataset.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from models.errors import InputError
from utils.cli import run

if TYPE_CHECKING:
    from utils.records import Clip, Shard

EPISODE_STEPS = 1000
FRAME_SHAPE = (64, 64, 3)
FPS = 15
# Beyond 4 environments at once their images no longer fit a core's cache: 16 are 40 % slower.
ENVS_AT_ONCE = 4
MAX_EPISODES_PER_SHARD = 16  # about 14 MB on disk, 0.2 GB in memory while it is made
# So far apart that no split of any dataset shares a level with another split of any other.
FIRST_LEVEL = {"train": 0, "val": 2**29, "test": 2**30}
MAX_LEVELS = 2**29
ACTION_NAMES = (
    *("LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NONE", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP"),
    *("D", "A", "W", "S", "Q", "E"),  # keys of other games: in CoinRun they do what NONE does
)
STICKY_WEIGHTS = (
    1,
    3,
    3,
    1,
    2,
    4,
    2,
    6,
    9,
    *[0.25] * 6,
)  # of ACTION_NAMES: half move right, three times as often as left
STICKY_HOLD = 8  # mean time steps for which the sticky policy holds an action


@dataclasses.dataclass(frozen=True)
class Config:
    """Plays CoinRun and writes a dataset of clips."""

    num_episodes: int = 10_000
    """Episodes of 1,000 time steps, over all splits: N episodes give N * 1,000 transitions."""
    output_dir: str = "data/coinrun"
    """Folder of the new dataset. A finished dataset is never overwritten, an unfinished one is continued."""
    seed: int = 0
    """Decides the levels and the actions. The same seed gives the same files."""
    num_workers: int | None = None
    """Worker processes, 0.8 GB of memory each; by default one for each core. It has no effect on the files."""
    distribution_mode: Literal["hard", "easy"] = "hard"
    """Procgen's difficulty of the levels."""
    policy: Literal["uniform", "sticky"] = "uniform"
    """How to act: uniformly at random as in the paper, or "sticky": hold an action for a while, mostly one that moves
    right, which gets much further into the levels."""
    clip_length: int = 32
    """Frames in a clip; the last clip of a level is shorter."""
    min_clip_length: int = 16
    """Clips shorter than this are dropped."""
    num_levels: int = 10_000
    """Levels of each split. The splits share none."""
    val_fraction: float = 0.02
    """Share of the episodes for validation: at least one where there are 3 episodes or more, none if 0."""
    test_fraction: float = 0.02
    """Share of the episodes for testing, as above."""


def main(config: Config) -> None:
    from utils.records import SPLITS, Metadata, write_metadata

    _check(config)
    made_by = _made_by(config, _import_procgen().__version__.strip())
    tasks = plan(config)
    folder = Path(config.output_dir)
    with _unfinished(folder, made_by) as unfinished:
        shards = {task: shard for task in tasks if (shard := _finished_shard(folder, unfinished, task))}
        num_reused = sum(task.num_episodes for task in shards)
        if shards:
            print(f"continuing {folder}: {num_reused} of {config.num_episodes} episodes are done", file=sys.stderr)
        start = time.perf_counter()
        _generate(config, [task for task in tasks if task not in shards], unfinished, shards)
        seconds = time.perf_counter() - start
        splits = {split: tuple(shards[task] for task in tasks if task.split == split) for split in SPLITS}
        metadata = Metadata(
            environment="coinrun",
            frame_shape=FRAME_SHAPE,
            fps=FPS,
            action_names=ACTION_NAMES,
            splits=splits,
            made_by=made_by,
        )
        write_metadata(folder, metadata)
    num_clips = sum(shard.count() for shard in shards.values())
    num_frames = sum(length * count for shard in shards.values() for length, count in shard.lengths)
    speed = (config.num_episodes - num_reused) * EPISODE_STEPS / seconds
    megabytes = sum((folder / shard.file).stat().st_size for shard in shards.values()) / 1e6
    print(
        f"{num_frames:,} frames (of {config.num_episodes * EPISODE_STEPS:,} time steps) in {num_clips:,} clips, "
        f"{speed:,.0f} frames/s, {megabytes:,.1f} MB: {folder}"
    )


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


def plan(config: Config) -> list[Task]:
    """Divides the episodes among splits and shards; training first, since it has the largest shards."""
    held_out = {"val": config.val_fraction, "test": config.test_fraction}
    num_episodes = {
        split: max(round(share * config.num_episodes), 1) if share and config.num_episodes >= 3 else 0
        for split, share in held_out.items()
    }
    num_episodes = {"train": config.num_episodes - sum(num_episodes.values())} | num_episodes
    tasks = []
    for split, count in num_episodes.items():
        # Small datasets also come in several shards, so that several cores have work.
        size = min(MAX_EPISODES_PER_SHARD, -(-count // 8)) or 1
        tasks += [Task(split, start // size, min(size, count - start)) for start in range(0, count, size)]
    return tasks


class Recording(NamedTuple):
    """What a batch of B environments did in T time steps.

    frames_BTHWC: uint8, the frame before each action.
    actions_BT: int32; `actions_BT[:, t]` leads from frame t to frame t + 1.
    rewards_BT: float32, earned by the action.
    first_BT: bool, whether the frame is the first of a level; true at t = 0.
    levels_BT: int32, the seed of the level that the frame shows.
    """

    frames_BTHWC: np.ndarray
    actions_BT: np.ndarray
    rewards_BT: np.ndarray
    first_BT: np.ndarray
    levels_BT: np.ndarray


def make_clips(config: Config, task: Task) -> list["Clip"]:
    """Plays the episodes of one shard: a function of the seed, the split and the index of the shard alone."""
    from utils.records import SPLITS, Clip

    key = (SPLITS.index(task.split), task.index)
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key))
    clips = []
    for start in range(0, task.num_episodes, ENVS_AT_ONCE):
        played = play(config, task.split, min(ENVS_AT_ONCE, task.num_episodes - start), rng)
        for i, first_T in enumerate(played.first_BT):
            for begin, end in cut(first_T, config.clip_length, config.min_clip_length):
                clips.append(
                    Clip(
                        frames_THWC=played.frames_BTHWC[i, begin:end],
                        clip_id=f"{task.name}/episode{start + i:02d}/step{begin:03d}",
                        actions_T=played.actions_BT[i, begin:end],
                        rewards_T=played.rewards_BT[i, begin:end],
                        level_seed=int(played.levels_BT[i, begin]),
                    )
                )
    return clips


def play(config: Config, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
    """Plays `num_envs` episodes side by side."""
    B, T = num_envs, EPISODE_STEPS
    env = _import_procgen().ProcgenGym3Env(
        num=B,
        env_name="coinrun",
        distribution_mode=config.distribution_mode,
        start_level=FIRST_LEVEL[split],  # Procgen ignores it where num_levels is 0
        num_levels=config.num_levels,
        rand_seed=int(rng.integers(2**31 - 1)),
        num_threads=0,
    )
    actions_BT = choose_actions(config.policy, rng, B, T)
    frames_BTHWC = np.empty((B, T, *FRAME_SHAPE), np.uint8)
    rewards_BT = np.empty((B, T), np.float32)
    first_BT = np.empty((B, T), bool)
    levels_BT = np.empty((B, T), np.int32)
    # At the end of a level the environment shows the next level's first frame at once, with `first` set, together
    # with the reward of the level that has ended: that of the action before.
    _, observation, first_B = env.observe()
    for t in range(T):
        if first_B.any():
            levels_B = [info["level_seed"] for info in env.get_info()]
        frames_BTHWC[:, t] = observation["rgb"]
        first_BT[:, t] = first_B
        levels_BT[:, t] = levels_B
        env.act(actions_BT[:, t])
        rewards_BT[:, t], observation, first_B = env.observe()
    env.close()
    return Recording(frames_BTHWC, actions_BT, rewards_BT, first_BT, levels_BT)


def choose_actions(policy: str, rng: np.random.Generator, num_envs: int, num_steps: int) -> np.ndarray:
    """Actions (num_envs, num_steps) int32 of a policy that does not look at the game."""
    shape = (num_envs, num_steps)
    if policy == "uniform":
        return rng.integers(len(ACTION_NAMES), size=shape, dtype=np.int32)
    weights = np.array(STICKY_WEIGHTS)
    choices_BT = rng.choice(len(ACTION_NAMES), shape, p=weights / weights.sum()).astype(np.int32)
    chosen_BT = rng.random(shape) < 1 / STICKY_HOLD  # at time steps that are not chosen, the action before is held
    held_since_BT = np.maximum.accumulate(np.where(chosen_BT, np.arange(num_steps), 0), axis=1)
    return np.take_along_axis(choices_BT, held_since_BT, axis=1)


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


def _import_procgen() -> Any:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym, which procgen imports, says there that it is outdated
            import procgen
    except ImportError as error:
        raise InputError(
            f"CoinRun needs the package procgen-mirror ({error}); install the pinned packages with "
            "`pip install --no-deps -r requirements.txt`"
        ) from error
    return procgen


def _check(config: Config) -> None:
    """Refuses values that cannot work."""

    def expect(name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise InputError(f"--{name} {getattr(config, name)}: expected {expected}")

    expect("num_episodes", config.num_episodes >= 1, "at least 1")
    expect("seed", config.seed >= 0, "0 or more")
    expect("num_workers", config.num_workers is None or config.num_workers >= 1, "at least 1")
    expect("clip_length", 1 <= config.clip_length <= EPISODE_STEPS, f"1 to {EPISODE_STEPS} frames")
    expect(
        "min_clip_length",
        1 <= config.min_clip_length <= config.clip_length,
        f"1 to {config.clip_length} frames, the --clip_length",
    )
    expect("num_levels", 1 <= config.num_levels <= MAX_LEVELS, f"1 to {MAX_LEVELS}")
    for name in ("val_fraction", "test_fraction"):
        expect(name, 0 <= getattr(config, name) <= 0.25, "0 to 0.25, so that most episodes are for training")


def _made_by(config: Config, procgen_version: str) -> dict[str, Any]:
    """All that decides the bytes of the dataset; neither its place nor the number of workers does."""
    fields = dataclasses.asdict(config)
    for name in ("output_dir", "num_workers"):
        del fields[name]
    return {
        "command": "generate_dataset.py",
        "config": fields,
        "level_seeds": {split: [first, first + config.num_levels] for split, first in FIRST_LEVEL.items()},
        "versions": {"procgen-mirror": procgen_version, "numpy": np.__version__},
    }


@contextlib.contextmanager
def _unfinished(folder: Path, made_by: dict[str, Any]) -> Iterator[Path]:
    """The folder of notes on finished shards; it disappears when the dataset is complete.

    Raises:
      InputError: The dataset exists, or is the unfinished one of another configuration, or the folder is not ours.
    """
    from utils.records import FORMAT_VERSION

    unfinished = folder / "unfinished"
    noted, expected = unfinished / "made_by.json", made_by | {"format_version": FORMAT_VERSION}
    choose = f"--output_dir {folder}: {{}}; choose another --output_dir or delete this one"
    if (folder / "metadata.json").exists():
        raise InputError(choose.format("already holds a dataset"))
    if noted.exists():
        found = json.loads(noted.read_text())
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


def _finished_shard(folder: Path, unfinished: Path, task: Task) -> "Shard | None":
    """The shard as an interrupted run noted it, or None if it is still to be made."""
    from utils.records import Shard

    note = _note_of(unfinished, task)
    if not (note.exists() and (folder / task.file).exists()):
        return None
    return Shard(task.file, json.loads(note.read_text()))


def _make_shard(config: Config, task: Task, unfinished: Path, scratch: Path) -> tuple[Task, "Shard"]:
    """Makes one file and notes that it is finished; runs in a worker."""
    from utils.records import write_shard

    folder = Path(config.output_dir)
    clips = make_clips(config, task)
    try:
        shard = write_shard(scratch, task.file, clips)
        (folder / task.split).mkdir(exist_ok=True)
        os.replace(scratch / task.file, folder / task.file)
        _write_json(_note_of(unfinished, task), shard.lengths, scratch)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError, for instance when the disk is full
        raise OSError(f"{folder / task.file}: {error}; once that is mended, the same command continues") from error
    return task, shard


def _generate(config: Config, tasks: list[Task], unfinished: Path, shards: dict[Task, "Shard"]) -> None:
    """Makes the shards of `tasks` in worker processes and adds them to `shards`."""
    from tqdm import tqdm

    num_workers = config.num_workers or _num_cores()
    # Each run writes in a folder of its own, so that a worker which outlives a killed run by a moment does no harm.
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=unfinished))
    num_done = sum(task.num_episodes for task in shards)
    bar = tqdm(
        total=config.num_episodes * EPISODE_STEPS,
        initial=num_done * EPISODE_STEPS,
        unit=" frames",
        unit_scale=True,
        disable=None,  # where stderr is no terminal; there, ten lines tell
    )
    try:
        calls = [(config, task, unfinished, scratch) for task in tasks]
        with bar, _running(_make_shard, calls, num_workers) as futures:
            for future in as_completed(futures):
                task, shards[task] = future.result()
                tenth = num_done * 10 // config.num_episodes
                num_done += task.num_episodes
                bar.update(task.num_episodes * EPISODE_STEPS)
                if bar.disable and num_done * 10 // config.num_episodes > tenth:
                    print(f"{num_done} of {config.num_episodes} episodes", file=sys.stderr, flush=True)
    except BrokenProcessPool as error:
        raise InputError(
            f"--num_workers {num_workers}: a worker was killed, most likely for lack of memory; run the same command "
            "with fewer, which continues"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _running(function: Callable[..., Any], calls: Sequence[tuple], num_workers: int) -> Iterator[list[Future]]:
    """Runs the calls in worker processes.

    These end at once when an exception, Ctrl-C or SIGTERM leaves the block, and when this process dies. A terminal's
    Ctrl-C, which goes to every process, passes them by: blocked signals are inherited.
    """
    num_workers = max(1, min(num_workers, len(calls)))
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent) as executor:
            try:
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    futures = [executor.submit(function, *call) for call in calls]  # starts the workers
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                yield futures
            except BaseException:
                for process in set(multiprocessing.active_children()).difference(others):
                    process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, sigterm)


def _end_with_parent() -> None:
    """Lets this worker die with its parent, however that dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _num_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    run(main, Config)
