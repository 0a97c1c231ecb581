"""Converts a folder of videos, arrays or pictures to a dataset: finds the episodes, settles what their clips have in
common, divides them among the splits and has workers make the clips (`sources/clips.py`).

Each file, or folder of pictures, is one episode. `sources/registry.py` knows what can be read.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from models.errors import InputError
from sources import workers
from sources.clips import Form, Source, Task, convert_task, too_short, wrong_size
from sources.kind import Header, natural
from sources.registry import KINDS
from utils.cli import with_flags
from utils.records import SPLITS, Metadata, Shard, write_metadata

DEFAULT_FPS = 15  # for sources without a rate; CoinRun plays naturally at 15 frames per second
TASK_BYTES = 32 * 2**20  # raw frames of the sources that a worker takes at once
SHARD_BYTES = 64 * 2**20  # raw frames in one file of clips, at most; larger than a task, which so fits into one file
LARGE_FRAME = 256 * 256  # pixels; far more than the models are made for


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """All that decides what a folder is converted to."""

    input_dir: str = "data/coinrun_episodes"
    """Folder to read, with its sub-folders. Each file is one episode: videos (.mp4 .avi .webm .mkv .mov .gif); .npy
    with frames (T, H, W, C), uint8 or floats in [0, 1]; .npz with frames under `frames`, `observations`, `video` or
    `arr_0` and, if you have them, one integer per frame in `actions` and one number per frame in `rewards`, which may
    lack the last frame's (then 0). A folder of .png or .jpg, in the order of their numbers, is one episode too."""
    source: Literal["auto", *KINDS] = "auto"  # type: ignore[valid-type]
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
    strict: bool = False
    """Stop at the first file that cannot be used, instead of skipping it."""

    def check(self) -> None:
        """Raises an InputError for a value that cannot work."""
        if self.source not in ("auto", *KINDS):
            raise InputError(f"`source` {self.source}: must be auto or one of {', '.join(KINDS)}")
        if (self.height is None) != (self.width is None):
            raise InputError(f"`height` {self.height} `width` {self.width}: give both, or neither to keep the size")
        for name in ("height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"`{name}` {value}: must be positive")
        if not 1 <= self.min_clip_length <= self.clip_length:
            raise InputError(
                f"`min_clip_length` {self.min_clip_length}: must be from 1 to `clip_length` {self.clip_length}"
            )
        fractions = (self.val_fraction, self.test_fraction)
        if not (min(fractions) >= 0 and sum(fractions) < 1):
            raise InputError(
                f"`val_fraction` {fractions[0]} `test_fraction` {fractions[1]}: must leave files for training"
            )


def convert(options: ConversionOptions, output_dir: str | Path, num_workers: int = 0) -> Metadata:
    """Converts `options.input_dir` to the dataset `output_dir`, which must not exist.

    Args:
      num_workers: Processes; 0 converts in this one. They change nothing in the dataset.

    Returns:
      What metadata.json holds; its `made_by` counts the sources, and those that were skipped.

    Raises:
      InputError: Options that cannot work, nothing to read, nothing that can be used, or the dataset exists.
    """
    options.check()
    _check_output(output_dir)
    output = Path(output_dir).resolve()
    sources = find_sources(options)
    print(f"{options.input_dir}: {len(sources)} {sources[0].kind.plural}", flush=True)

    skipped: list[str] = []
    headers = read_headers(sources, options, num_workers, skipped)
    form = choose_form(headers, options, skipped)
    splits = split_sources(list(headers), options.val_fraction, options.test_fraction, options.seed)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir(parents=True)
    try:
        tasks = make_tasks(partial, splits, headers, form, options.strict)
        shards, num_actions = run_tasks(tasks, num_workers, skipped)
        if not any(shards.values()):
            raise InputError(f"`input_dir` {options.input_dir}: none of its {len(sources)} sources can be used")
        metadata = Metadata(
            environment=options.environment or Path(options.input_dir).resolve().name,
            frame_shape=(form.height, form.width, 3),
            fps=float(form.fps),
            action_names=tuple(map(str, range(num_actions))) if form.has_actions else None,
            splits=shards,
            made_by=_made_by(options, len(sources), len(skipped)),
        )
        write_metadata(partial, metadata)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def find_sources(options: ConversionOptions) -> list[Source]:
    """The episodes in the input folder, in natural order (2 before 10).

    Raises:
      InputError: There is no such folder, nothing in it, or more than one kind and no choice of `source`.
    """
    root = Path(options.input_dir)
    remedy = (
        "put episodes there (.npy, .npz, videos, or folders of images) or name another folder with `input_dir`; for "
        "CoinRun run generate_dataset.py, which needs no preprocessing"
    )
    if not root.is_dir():
        raise InputError(f"`input_dir` {root}: no such folder; {remedy}")
    found: dict[str, list[Source]] = {name: [] for name in KINDS}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]
        for kind in KINDS.values():
            paths = kind.detect(Path(folder), names)
            found[kind.name] += [Source(str(path.relative_to(root)), path, kind) for path in paths]
    kinds = [name for name in found if found[name]] if options.source == "auto" else [options.source]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[name])} {name}" for name in kinds)
        raise InputError(f"`input_dir` {root}: holds several kinds of sources ({counts}); choose one with `source`")
    sources = found[kinds[0]] if kinds else []
    if not sources:
        raise InputError(f"`input_dir` {root}: nothing to read (`source` {options.source}); {remedy}")
    return sorted(sources, key=lambda source: natural(source.name))


def read_headers(
    sources: Sequence[Source], options: ConversionOptions, num_workers: int, skipped: list[str]
) -> dict[Source, Header]:
    """Headers of the sources that have one; the others are skipped."""

    def read(source: Source) -> Header | InputError:
        try:
            return source.kind.header(source.path)
        except InputError as error:
            return error

    headers = {}
    threads = ThreadPoolExecutor(max(1, num_workers))
    try:
        for source, header in zip(sources, threads.map(read, sources), strict=True):
            if isinstance(header, InputError):
                _skip(str(header), skipped, options.strict)
            elif not header.is_guess and header.num_frames < options.min_clip_length:
                _skip(too_short(source, header.num_frames, options.min_clip_length), skipped, options.strict)
            else:
                headers[source] = header
    finally:
        threads.shutdown(cancel_futures=True)
    if not headers:
        raise InputError(f"`input_dir` {options.input_dir}: none of its {len(sources)} sources can be used")
    return headers


def choose_form(headers: dict[Source, Header], options: ConversionOptions, skipped: list[str]) -> Form:
    """Settles size, rate and actions; drops sources of another size from `headers`."""
    first = next(iter(headers))
    height, width = options.height or headers[first].height, options.width or headers[first].width
    if not options.height:
        for source, header in list(headers.items()):
            if (header.height, header.width) != (height, width):
                _skip(wrong_size(source, (header.height, header.width), (height, width)), skipped, options.strict)
                del headers[source]
    if height * width > LARGE_FRAME:
        _tell(f"frames are large, {height}×{width}; `height` and `width` make them smaller, for instance 64×64")
    without = [source for source in headers if not headers[source].has_actions]
    if 0 < len(without) < len(headers):
        message = f"{without[0].path}: has no actions, as {len(without)} of {len(headers)} sources"
        if options.strict:
            raise InputError(f"{message} (`strict`)")
        print(f"{message}; the dataset will be without actions", file=sys.stderr)
    return Form(
        height=height,
        width=width,
        resizes=options.height is not None,
        fps=Fraction(options.fps or headers[first].fps or DEFAULT_FPS),
        has_actions=not without,
        clip_length=options.clip_length,
        min_clip_length=options.min_clip_length,
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


def run_tasks(tasks: Sequence[Task], num_workers: int, skipped: list[str]) -> tuple[dict[str, tuple[Shard, ...]], int]:
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
        # For a single task no process is worth its start.
        workers.running(convert_task, tasks, num_workers if len(tasks) > 1 else 0) as results,
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


def _skip(reason: str, skipped: list[str], strict: bool) -> None:
    """Notes a source that cannot be used, or stops if `strict`."""
    if strict:
        raise InputError(f"{reason} (`strict`)")
    skipped.append(reason)
    _tell(f"skipped {reason}", sys.stderr)


def _tell(message: str, file: Any = None) -> None:
    """Prints a line, above the progress bar if there is one, with the fields that it names as flags."""
    tqdm.write(with_flags(InputError(message), ConversionOptions), file=file)


def _check_output(output_dir: str | Path) -> None:
    """Refuses to overwrite anything."""
    remedy = "remove it, or choose another folder with `output_dir`"
    output = Path(output_dir).resolve()
    if (output / "metadata.json").exists():
        raise InputError(f"`output_dir` {output_dir}: already holds a dataset; {remedy}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir()) and not output.is_mount()):
        raise InputError(f"`output_dir` {output_dir}: exists and is not an empty folder; {remedy}")


def _made_by(options: ConversionOptions, num_sources: int, num_skipped: int) -> dict[str, Any]:
    """What made the dataset, without what leaves it the same."""
    return {
        "script": "preprocess_dataset.py",
        "arguments": {field.name: getattr(options, field.name) for field in dataclasses.fields(ConversionOptions)},
        "sources": num_sources,
        "skipped": num_skipped,
        "versions": {name: importlib.metadata.version(name) for name in ("av", "numpy", "pillow")},
    }
