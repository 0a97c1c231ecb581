"""Converts videos, arrays and folders of images to the dataset that the training scripts read (see utils/data.py).

    python preprocess_dataset.py                                        # Jafar's data/coinrun_episodes → data/coinrun
    python preprocess_dataset.py --input_dir my_videos --output_dir data/mine --height 64 --width 64 --fps 10
    python preprocess_dataset.py tokens --tokenizer_checkpoint runs/tokenizer --lam_checkpoint runs/lam

Each file, or folder of images, is one episode. An episode is cut into clips that follow one another.
"""

import dataclasses
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from models.errors import InputError
from sources import images, tokens
from sources import video as video_source
from utils import video
from utils.cli import run
from utils.records import SPLITS, Clip, Metadata, Shard, write_metadata, write_shard

ARRAY_SUFFIXES = (".npy", ".npz")
FRAME_KEYS = ("frames", "observations", "video", "arr_0")  # where an .npz holds its frames, in order of preference
DEFAULT_FPS = 15  # for arrays and images; CoinRun plays naturally at 15 frames per second
TASK_BYTES = 32 * 2**20  # raw frames of the sources that a worker takes at once
SHARD_BYTES = 64 * 2**20  # raw frames in one file of clips, at most; larger than a task, which so fits into one file
LARGE_FRAME = 256 * 256  # pixels; far more than the models are made for
MAX_ACTIONS = 4096  # a larger number in `actions` is not the index of a discrete action


@dataclass(frozen=True)
class Config:
    """Converts videos, arrays and folders of images to a dataset of clips for training."""

    input_dir: str = "data/coinrun_episodes"
    """Folder to read, with its sub-folders. Each file is one episode: videos (.mp4 .avi .webm .mkv .mov .gif); .npy
    with frames (T, H, W, C), uint8 or floats in [0, 1]; .npz with frames under `frames`, `observations`, `video` or
    `arr_0` and, if you have them, one integer per frame in `actions` and one number per frame in `rewards`, which may
    lack the last frame's (then 0). A folder of .png or .jpg, in the order of their numbers, is one episode too."""
    output_dir: str = "data/coinrun"
    """Dataset to write; must not exist yet."""
    source: Literal["auto", "npy", "video", "images"] = "auto"
    """What to read from the input folder: arrays (.npy and .npz), videos or folders of images; auto takes what is
    there."""
    height: int | None = None
    """Resize frames to this height, together with --width; pictures are stretched. Without it all files must have
    frames of one size."""
    width: int | None = None
    """Resize frames to this width."""
    fps: float | None = None
    """Frames per second. Videos are resampled to it, by dropping or repeating frames; by default to the rate of the
    first video. For arrays and images it only says how fast they play; default 15."""
    clip_length: int = 32
    """Frames in a clip."""
    min_clip_length: int = 16
    """The rest of an episode becomes a shorter clip if it has at least this many frames, otherwise it is dropped."""
    val_fraction: float = 0.05
    """Share of the files whose clips are for validation; at least one if there are two files."""
    test_fraction: float = 0.05
    """Share of the files whose clips are for testing; at least one if there are three files."""
    seed: int = 0
    """Decides which files go to which split."""
    environment: str = ""
    """Name of where the episodes come from; by default the name of the input folder."""
    num_workers: int = 4
    """Processes that convert files; 0 converts in this one. The dataset is the same for any number."""
    strict: bool = False
    """Stop at the first file that cannot be used, instead of skipping it."""


@dataclass(frozen=True)
class Source:
    """One episode to read: a file, or a folder of images.

    name: Path within the input folder.
    """

    name: str
    path: Path
    kind: str


class Header(NamedTuple):
    """What can be known of a source without reading all of it.

    num_frames: A guess for videos, 0 if the file does not say.
    fps: None for arrays and images.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction | None = None
    has_actions: bool = False


class Form(NamedTuple):
    """What all clips of the dataset have in common, and how episodes become clips."""

    height: int
    width: int
    resizes: bool
    fps: Fraction
    has_actions: bool
    clip_length: int
    min_clip_length: int


class Episode(NamedTuple):
    """The frames of a source, one at a time: uint8 (H, W, 3)."""

    frames: Iterable[np.ndarray]
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None


class Task(NamedTuple):
    """Sources that one worker turns into shards; their number does not depend on the number of workers."""

    folder: Path
    split: str
    number: int
    sources: tuple[Source, ...]
    form: Form
    strict: bool
    shard_bytes: int


class Converted(NamedTuple):
    """What became of a task: its shards, the reasons for skipping sources, and the number of actions seen."""

    shards: list[Shard]
    skipped: list[str]
    num_actions: int


def main(config: Config) -> None:
    """Converts `config.input_dir` to a dataset.

    Raises:
      InputError: Nothing to read, nothing that can be used, a flag that cannot work, or the dataset exists.
    """
    _check(config)
    output = Path(config.output_dir).resolve()
    if _already_done(config, output):
        print(f"{config.output_dir} already holds a dataset and {config.input_dir} does not exist: nothing to convert")
        return
    _check_output(config, output)
    sources = find_sources(config)
    kind = {"npy": "arrays", "video": "videos", "images": "folders of images"}[sources[0].kind]
    print(f"{config.input_dir}: {len(sources)} {kind}", flush=True)

    skipped: list[str] = []
    headers = read_headers(sources, config, skipped)
    form = choose_form(headers, config, skipped)
    splits = split_sources(list(headers), config.val_fraction, config.test_fraction, config.seed)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir(parents=True)
    try:
        tasks = make_tasks(partial, splits, headers, form, config.strict)
        shards, num_actions = convert(tasks, config.num_workers, skipped)
        if not any(shards.values()):
            raise InputError(f"--input_dir {config.input_dir}: none of its {len(sources)} sources can be used")
        metadata = Metadata(
            environment=config.environment or Path(config.input_dir).resolve().name,
            frame_shape=(form.height, form.width, 3),
            fps=float(form.fps),
            action_names=tuple(map(str, range(num_actions))) if form.has_actions else None,
            splits=shards,
            made_by=_made_by(config, len(sources), len(skipped)),
        )
        write_metadata(partial, metadata)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(config, metadata, len(sources), len(skipped))


def find_sources(config: Config) -> list[Source]:
    """The episodes in the input folder, in natural order (2 before 10).

    Raises:
      InputError: There is no such folder, nothing in it, or more than one kind and no --source.
    """
    root = Path(config.input_dir)
    remedy = (
        "put episodes there (.npy, .npz, videos, or folders of images) or name another folder with --input_dir; for "
        "CoinRun run generate_dataset.py, which needs no preprocessing"
    )
    if not root.is_dir():
        raise InputError(f"--input_dir {root}: no such folder; {remedy}")
    found: dict[str, list[Source]] = {"npy": [], "video": [], "images": []}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        has_images = False
        for name in names:
            path = Path(folder, name)
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if name == "metadata.npy":
                print(f"{path}: not read; Jafar keeps a pickle there, which could run code, and it is not needed")
            elif suffix in ARRAY_SUFFIXES:
                found["npy"].append(Source(str(path.relative_to(root)), path, "npy"))
            elif suffix in video_source.VIDEO_SUFFIXES:
                found["video"].append(Source(str(path.relative_to(root)), path, "video"))
            has_images |= suffix in images.IMAGE_SUFFIXES
        if has_images:
            found["images"].append(Source(str(Path(folder).relative_to(root)), Path(folder), "images"))
    kinds = [kind for kind in found if found[kind]] if config.source == "auto" else [config.source]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} {kind}" for kind in kinds)
        raise InputError(f"--input_dir {root}: holds several kinds of sources ({counts}); choose one with --source")
    sources = found[kinds[0]] if kinds else []
    if not sources:
        raise InputError(f"--input_dir {root}: nothing to read (--source {config.source}); {remedy}")
    return sorted(sources, key=lambda source: (_natural(source.name), source.name))


def read_headers(sources: Sequence[Source], config: Config, skipped: list[str]) -> dict[Source, Header]:
    """Headers of the sources that have one; the others are skipped."""

    def read(source: Source) -> Header | InputError:
        try:
            return read_header(source)
        except InputError as error:
            return error

    headers = {}
    threads = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        for source, header in zip(sources, threads.map(read, sources), strict=True):
            if isinstance(header, InputError):
                _skip(str(header), skipped, config.strict)
            elif source.kind != "video" and header.num_frames < config.min_clip_length:
                _skip(_too_short(source, header.num_frames, config.min_clip_length), skipped, config.strict)
            else:
                headers[source] = header
    finally:
        threads.shutdown(cancel_futures=True)
    if not headers:
        raise InputError(f"--input_dir {config.input_dir}: none of its {len(sources)} sources can be used")
    return headers


def choose_form(headers: dict[Source, Header], config: Config, skipped: list[str]) -> Form:
    """Settles size, rate and actions; drops sources of another size from `headers`."""
    first = next(iter(headers))
    height, width = config.height or headers[first].height, config.width or headers[first].width
    if not config.height:
        for source, header in list(headers.items()):
            if (header.height, header.width) != (height, width):
                _skip(_wrong_size(source.path, (header.height, header.width), (height, width)), skipped, config.strict)
                del headers[source]
    if height * width > LARGE_FRAME:
        print(f"frames are large, {height}×{width}; --height and --width make them smaller, for instance 64×64")
    without = [source for source in headers if not headers[source].has_actions]
    if 0 < len(without) < len(headers):
        message = f"{without[0].path}: has no actions, as {len(without)} of {len(headers)} sources"
        if config.strict:
            raise InputError(f"{message} (--strict)")
        print(f"{message}; the dataset will be without actions", file=sys.stderr)
    return Form(
        height=height,
        width=width,
        resizes=config.height is not None,
        fps=Fraction(config.fps or headers[first].fps or DEFAULT_FPS),
        has_actions=not without,
        clip_length=config.clip_length,
        min_clip_length=config.min_clip_length,
    )


def split_sources(
    sources: Sequence[Source], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[Source]]:
    """Divides sources among the splits, by a hash of seed and name; each split keeps their order.

    From three sources on every split with a share above 0 gets at least one. Of two sources one is for validation; a
    single one is for training.
    """
    n = len(sources)
    num_test = max(1, round(n * test_fraction)) if test_fraction and n > 2 else 0
    num_val = max(1, round(n * val_fraction)) if val_fraction and n > 1 else 0
    num_test = min(num_test, n - 1 - (num_val > 0))  # one is left for training, and for validation if it has a share
    num_val = min(num_val, n - 1 - num_test)
    by_hash = sorted(sources, key=lambda source: hashlib.sha256(f"{seed}/{source.name}".encode()).digest())
    split_of = {
        source.name: "val" if i < num_val else "test" if i < num_val + num_test else "train"
        for i, source in enumerate(by_hash)
    }
    if n < 3 and (val_fraction or test_fraction):
        use = "one for training, one for validation" if num_val else "for training"
        print(f"{n} usable {'source' if n == 1 else 'sources'}, {use}; all three splits take three or more")
    return {split: [source for source in sources if split_of[source.name] == split] for split in SPLITS}


def make_tasks(
    folder: Path, splits: dict[str, list[Source]], headers: dict[Source, Header], form: Form, strict: bool
) -> list[Task]:
    """Groups the sources of each split so that a group makes about one shard."""
    tasks: list[Task] = []
    for split, sources in splits.items():
        group: list[Source] = []
        size = 0.0
        for i, source in enumerate(sources):
            header = headers[source]
            frames = header.num_frames * (float(form.fps / header.fps) if header.fps else 1)
            group.append(source)
            size += frames * form.height * form.width * 3
            if size >= TASK_BYTES or i == len(sources) - 1:
                tasks.append(Task(folder, split, len(tasks), tuple(group), form, strict, SHARD_BYTES))
                group, size = [], 0.0
    return tasks


def convert(tasks: Sequence[Task], num_workers: int, skipped: list[str]) -> tuple[dict[str, tuple[Shard, ...]], int]:
    """Runs the tasks and gathers their shards, in order.

    Returns:
      Shards of each split, under their final names, and the number of actions.
    """
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    num_actions = done = 0
    total = sum(len(task.sources) for task in tasks)
    told = time.monotonic()
    with (
        tqdm(total=total, unit=" files", disable=not sys.stderr.isatty()) as bar,
        closing(_in_order(tasks, num_workers)) as results,  # workers end before anyone cleans up after them
    ):
        for task, converted in zip(tasks, results, strict=True):
            for reason in converted.skipped:
                _skip(reason, skipped, task.strict)
            for shard in converted.shards:
                name = f"{task.split}/{len(shards[task.split]):05d}.array_record"
                os.replace(task.folder / shard.file, task.folder / name)
                shards[task.split].append(Shard(name, shard.lengths))
            num_actions = max(num_actions, converted.num_actions)
            done += len(task.sources)
            bar.update(len(task.sources))
            if bar.disable and time.monotonic() - told > 10:  # a log file gets lines, not a bar
                told = time.monotonic()
                print(f"{done} of {total} files", flush=True)
    return {split: tuple(shards[split]) for split in SPLITS}, num_actions


def convert_task(task: Task) -> Converted:
    """Turns the sources of one task into shards of at most about `shard_bytes`.

    Holds one shard in memory, and one frame of its source. A source that fails half-way leaves no clips behind.
    """
    shards: list[Shard] = []
    skipped: list[str] = []
    finished: list[Clip] = []  # of sources that have been read to their end
    num_actions = 0

    def write(clips: list[Clip]) -> None:
        file = f"{task.split}/task-{task.number:05d}-{len(shards):05d}.array_record"
        shards.append(write_shard(task.folder, file, clips))
        clips.clear()

    clips_per_shard = max(1, task.shard_bytes // (task.form.clip_length * task.form.height * task.form.width * 3))
    for source in task.sources:
        clips: list[Clip] = []
        num_own_shards = largest_action = 0
        try:
            for clip in read_clips(source, task.form):
                clips.append(clip)
                if clip.actions_T is not None:
                    largest_action = max(largest_action, int(clip.actions_T.max()))
                if len(finished) + len(clips) < clips_per_shard:
                    continue
                # Until a source has been read to its end, its clips share no shard with those of others.
                if finished:
                    write(finished)
                else:
                    write(clips)
                    num_own_shards += 1
        except InputError as error:
            skipped.append(str(error))
            for _ in range(num_own_shards):
                (task.folder / shards.pop().file).unlink()
            if task.strict:
                break
        else:
            finished += clips
            num_actions = max(num_actions, largest_action + 1)
    if finished:
        write(finished)
    return Converted(shards, skipped, num_actions)


def read_clips(source: Source, form: Form) -> Iterator[Clip]:
    """Cuts an episode into clips that follow one another.

    Raises:
      InputError: The source cannot be read, has frames of another size, or is too short for a clip.
    """
    episode = read_episode(source, form.fps)
    frames: list[np.ndarray] = []
    count = 0

    def clip() -> Clip:
        span = slice(count - len(frames), count)
        return Clip(
            frames_THWC=np.stack(frames),
            clip_id=f"{source.name}/{span.start:06d}",
            actions_T=episode.actions_T[span] if form.has_actions and episode.actions_T is not None else None,
            rewards_T=None if episode.rewards_T is None else episode.rewards_T[span],
        )

    for frame in episode.frames:
        if form.resizes:
            frame = video.resize(frame[None], form.height, form.width)[0]
        elif frame.shape[:2] != (form.height, form.width):
            raise InputError(_wrong_size(source.path, frame.shape[:2], (form.height, form.width)))
        frames.append(frame)
        count += 1
        if len(frames) == form.clip_length:
            yield clip()
            frames = []
    if len(frames) >= form.min_clip_length:
        yield clip()
    elif count < form.min_clip_length:
        raise InputError(_too_short(source, count, form.min_clip_length))


def read_header(source: Source) -> Header:
    """Reads what a source says of itself, or its first picture.

    Raises:
      InputError: It cannot be read.
    """
    if source.kind == "video":
        info = video_source.read_video_info(source.path)
        return Header(info.num_frames, info.height, info.width, info.fps)
    if source.kind == "images":
        files = _image_files(source.path)
        height, width = images.read_image(files[0]).shape[:2]
        return Header(len(files), height, width)
    key, names = _frames_key(source.path)
    shape = _array_shape(source.path, key)
    return Header(shape[0], shape[1], shape[2], has_actions="actions" in names)


def read_episode(source: Source, fps: Fraction) -> Episode:
    """Opens a source; frames are read as they are asked for, except that an .npz is read at once.

    Raises:
      InputError: It cannot be read; also while frames are being asked for.
    """
    if source.kind == "video":
        return Episode(video_source.iterate_video(source.path, fps))
    if source.kind == "images":
        return Episode(images.read_image(file) for file in _image_files(source.path))
    key, names = _frames_key(source.path)
    num_frames = _array_shape(source.path, key)[0]
    try:
        if key is None:
            # Mapped, not read; and never unpickled.
            return Episode(_rgb_frames(source.path, np.load(source.path, mmap_mode="r", allow_pickle=False)))
        with np.load(source.path, allow_pickle=False) as archive:
            frames, given = archive[key], {name: archive[name] for name in ("actions", "rewards") if name in names}
    except _DAMAGED as error:
        raise InputError(f"{source.path}: cannot be read ({error})") from error
    actions = _per_frame(source.path, "actions", given.get("actions"), num_frames)
    rewards = _per_frame(source.path, "rewards", given.get("rewards"), num_frames)
    if actions is not None and not (actions.dtype.kind in "iu" and actions.min() >= 0 and actions.max() < MAX_ACTIONS):
        raise InputError(
            f"{source.path}: actions are {actions.dtype} from {actions.min()} to {actions.max()}; expected whole "
            f"numbers from 0 to {MAX_ACTIONS - 1}, one for each discrete action"
        )
    return Episode(
        _rgb_frames(source.path, frames),
        None if actions is None else actions.astype(np.int32),
        None if rewards is None else rewards.astype(np.float32),
    )


# What reading a damaged .npy or .npz raises.
_DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def _frames_key(path: Path) -> tuple[str | None, set[str]]:
    """Where an array file holds its frames, None for .npy, and the names of all its arrays."""
    if path.suffix.lower() == ".npy":
        return None, set()
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGED as error:
        raise InputError(f"{path}: not an .npz file ({error})") from error
    key = next((key for key in FRAME_KEYS if key in names), None)
    if key is None:
        raise InputError(f"{path}: holds {sorted(names)}; expected frames under one of {', '.join(FRAME_KEYS)}")
    return key, names


def _array_shape(path: Path, key: str | None) -> tuple[int, ...]:
    """The shape of the frames of an array file, from its header alone, if they can be used."""
    try:
        if key is None:
            with open(path, "rb") as file:
                shape, dtype = _array_header(file)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
                shape, dtype = _array_header(member)
    except _DAMAGED as error:
        raise InputError(f"{path}: not a NumPy array file ({error})") from error
    if dtype.hasobject:
        raise InputError(f"{path}: holds Python objects, that is a pickle, which could run code; save uint8 frames")
    if dtype != np.uint8 and dtype.kind != "f":
        raise InputError(f"{path}: frames are {dtype}; expected uint8, or floats in [0, 1]")
    if len(shape) != 4 or shape[-1] not in (1, 3):
        hint = "; transpose them" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise InputError(f"{path}: frames have shape {shape}; expected (T, H, W, 3) or (T, H, W, 1){hint}")
    if min(shape) <= 0:
        raise InputError(f"{path}: frames have shape {shape}, which is empty")
    return shape


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type from the header of a .npy stream; executes nothing."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _rgb_frames(path: Path, frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
    """Frames of an array as uint8 RGB."""
    for t in range(len(frames_THWC)):
        frame = np.asarray(frames_THWC[t])
        if frame.dtype != np.uint8:
            low, high = frame.min(), frame.max()
            if not (low >= 0 and high <= 1):  # also refuses NaN
                raise InputError(f"{path}: frame {t} has floats from {low} to {high}; expected [0, 1], or save uint8")
            frame = np.rint(frame.astype(np.float32) * 255).astype(np.uint8)
        yield frame.repeat(3, axis=-1) if frame.shape[-1] == 1 else frame


def _per_frame(path: Path, name: str, values: np.ndarray | None, num_frames: int) -> np.ndarray | None:
    """One value per frame; a missing last one becomes 0."""
    if values is None:
        return None
    if values.dtype.kind not in "iufb":
        raise InputError(f"{path}: {name} are {values.dtype}; expected numbers")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or len(values) not in (num_frames - 1, num_frames):
        raise InputError(f"{path}: {name} have shape {values.shape}; expected {num_frames} or {num_frames - 1} values")
    return np.pad(values, (0, num_frames - len(values)))


def _image_files(folder: Path) -> list[Path]:
    """The pictures in a folder in natural order."""
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in images.IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{folder}: has no pictures")
    return sorted(files, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[str | int]:
    """A key that sorts numbers in names by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _in_order(tasks: Sequence[Task], num_workers: int) -> Generator[Converted, None, None]:
    """Results of the tasks in their order, whoever computes them."""
    num_workers = min(num_workers, len(tasks))
    if num_workers < 2:
        yield from map(convert_task, tasks)
        return
    # Spawned, since JAX, which utils.data imports, does not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_quiet_worker)
    try:
        yield from pool.map(convert_task, tasks)
    except BrokenProcessPool as error:
        raise InputError("a worker process died, perhaps for lack of memory; lower --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _quiet_worker() -> None:
    """Makes a worker end without a word at Ctrl-C, and also when the main process has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _skip(reason: str, skipped: list[str], strict: bool) -> None:
    """Notes a source that cannot be used, or stops if `strict`."""
    if strict:
        raise InputError(f"{reason} (--strict)")
    skipped.append(reason)
    tqdm.write(f"skipped {reason}", file=sys.stderr)


def _too_short(source: Source, num_frames: int, min_clip_length: int) -> str:
    return f"{source.path}: has {num_frames} frames, fewer than --min_clip_length {min_clip_length}"


def _wrong_size(path: Path, size: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{path}: has frames of {size[0]}×{size[1]} (height × width), the first source {expected[0]}×{expected[1]}; "
        "resize all with --height and --width"
    )


def _check(config: Config) -> None:
    """Refuses flags that cannot work."""
    if (config.height is None) != (config.width is None):
        raise InputError(f"--height {config.height} --width {config.width}: give both, or neither to keep the size")
    for name in ("height", "width", "fps"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value}: must be positive")
    if not 1 <= config.min_clip_length <= config.clip_length:
        raise InputError(
            f"--min_clip_length {config.min_clip_length}: must be from 1 to --clip_length {config.clip_length}"
        )
    fractions = (config.val_fraction, config.test_fraction)
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        raise InputError(f"--val_fraction {fractions[0]} --test_fraction {fractions[1]}: must leave files for training")
    if config.num_workers < 0:
        raise InputError(f"--num_workers {config.num_workers}: must be 0 or more")


def _already_done(config: Config, output: Path) -> bool:
    """Whether the script runs as written after generate_dataset.py, which leaves nothing to convert."""
    default = Config()
    paths_given = (config.input_dir, config.output_dir) != (default.input_dir, default.output_dir)
    return not paths_given and not Path(config.input_dir).exists() and (output / "metadata.json").is_file()


def _check_output(config: Config, output: Path) -> None:
    """Refuses to overwrite anything."""
    remedy = "remove it, or choose another folder with --output_dir"
    if (output / "metadata.json").exists():
        raise InputError(f"--output_dir {config.output_dir}: already holds a dataset; {remedy}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir()) and not output.is_mount()):
        raise InputError(f"--output_dir {config.output_dir}: exists and is not an empty folder; {remedy}")


def _made_by(config: Config, num_sources: int, num_skipped: int) -> dict[str, Any]:
    """What made the dataset, without what leaves it the same."""
    arguments = dataclasses.asdict(config)
    del arguments["num_workers"], arguments["output_dir"]
    versions = {name: importlib.metadata.version(name) for name in ("av", "numpy", "pillow")}
    return {
        "script": "preprocess_dataset.py",
        "arguments": arguments,
        "sources": num_sources,
        "skipped": num_skipped,
        "versions": versions,
    }


def _report(config: Config, metadata: Metadata, num_sources: int, num_skipped: int) -> None:
    """Prints what was made."""
    clips = {split: sum(shard.count() for shard in metadata.splits[split]) for split in SPLITS}
    frames = sum(n * k for shards in metadata.splits.values() for shard in shards for n, k in shard.lengths)
    for split, fraction in (("train", 1), ("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and not clips[split]:
            print(f"the {split} split is empty; add more files, or change --seed", file=sys.stderr)
    height, width, _ = metadata.frame_shape
    print(
        f"{config.output_dir}: {num_sources - num_skipped} files read, {num_skipped} skipped; {sum(clips.values())} "
        f"clips ({', '.join(f'{split} {clips[split]}' for split in SPLITS)}), {frames} frames of {height}×{width} at "
        f"{metadata.fps:g} per second"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["tokens"]:
        del sys.argv[1]
        run(tokens.main, tokens.Config)
    else:
        run(main, Config)
