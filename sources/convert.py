"""Converts a folder of videos, arrays or pictures to a dataset: finds the episodes, settles what their clips have in
common, divides them among the splits and has workers make the clips (`sources/clips.py`).

Each file, or folder of pictures, is one episode. `sources/registry.py` knows what can be read.
"""

import dataclasses
import importlib.metadata
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.errors import InputError
from sources import workers
from sources.actions import Seen, Space, described, space_of
from sources.clips import Form, Source, Task, convert_task, too_short, wrong_size
from sources.find import find_sources, split_sources
from sources.kind import Header, naming
from sources.options import ConversionOptions
from utils.cli import with_flags
from utils.records import SPLITS, Metadata, Shard, write_metadata

DEFAULT_FPS = 15  # for sources without a rate; CoinRun plays naturally at 15 frames per second
TASK_BYTES = 32 * 2**20  # raw frames of the sources that a worker takes at once
SHARD_BYTES = 64 * 2**20  # raw frames in one file of clips, at most; larger than a task, which so fits into one file
LARGE_FRAME = 256 * 256  # pixels; far more than the models are made for
HIGHEST_FPS = 240  # a higher rate is that of a clock, not of a camera or a game


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
    sources, passed_over = find_sources(options)
    others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed_over.items()))
    said = f"; passed over: {others}" if others else ""
    print(f"{options.input_dir}: {len(sources)} {sources[0].kind.plural}{said}", flush=True)

    skipped: list[str] = []
    headers = read_headers(sources, options, num_workers, skipped)
    form = choose_form(headers, options, skipped)
    tell_remarks(headers, options.strict)
    splits = divide(headers, options)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir(parents=True)
    try:
        tasks = make_tasks(partial, splits, headers, form, options.strict)
        shards, everywhere, trained_on = run_tasks(tasks, num_workers, skipped)
        if not any(shards.values()):
            raise InputError(f"`input_dir` {options.input_dir}: none of its {len(sources)} sources can be used")
        actions = described(form.actions, everywhere, trained_on) if form.actions is not None else Space()
        metadata = Metadata(
            environment=options.environment or Path(options.input_dir).resolve().name,
            frame_shape=(form.height, form.width, 3),
            fps=float(form.fps),
            action_names=actions.names,
            splits=shards,
            made_by=_made_by(options, len(sources), len(skipped)),
            action_columns=actions.columns,
        )
        write_metadata(partial, metadata)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def read_headers(
    sources: Sequence[Source], options: ConversionOptions, num_workers: int, skipped: list[str]
) -> dict[Source, Header]:
    """Headers of the sources that have one; the others are skipped."""

    def read(source: Source) -> Header | InputError:
        try:
            with naming(source.path):
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
    """Settles size, rate and actions; drops sources that differ from `headers`."""
    if options.height and options.width:
        height, width = options.height, options.width
    else:
        sizes = Counter((header.height, header.width) for header in headers.values())
        height, width = _most(sizes)
        for source, header in list(headers.items()):
            if (header.height, header.width) != (height, width):
                _skip(wrong_size(source, (header.height, header.width), (height, width)), skipped, options.strict)
                del headers[source]
    if height * width > LARGE_FRAME:
        _tell(f"frames are large, {height}×{width}; `height` and `width` make them smaller, for instance 64×64")
    rates = Counter(header.fps for header in headers.values() if header.fps)
    fps = Fraction(options.fps or (_most(rates) if rates else DEFAULT_FPS))
    if fps > HIGHEST_FPS and not options.fps:
        raise InputError(f"`fps`: the videos say {float(fps):g} frames per second; say with `fps` what you want")
    others = sum(rates.values()) - rates[fps]
    resampled = f"; {others} of {sum(rates.values())} have another rate and are resampled" if others else ""
    _tell(f"frames of {height}×{width}, {float(fps):g} per second{resampled}")
    return Form(
        height=height,
        width=width,
        resizes=options.height is not None,
        fps=fps,
        actions=choose_actions(headers, fps, options, skipped),
        actions_lead_to=options.actions_lead_to,
        clip_length=options.clip_length,
        min_clip_length=options.min_clip_length,
    )


def choose_actions(
    headers: dict[Source, Header], fps: Fraction, options: ConversionOptions, skipped: list[str]
) -> Space | None:
    """Settles what the actions are, None for none; drops sources with others, or with none, from `headers`."""
    without = [source for source in headers if not headers[source].has_actions]
    if len(without) == len(headers):
        return None
    if without:
        message = f"{len(without)} of {len(headers)} sources have no actions, for instance {without[0].path}"
        if not options.drop_without_actions:
            raise InputError(
                f"{message}; `drop_without_actions` leaves these out, or convert them to a dataset of their own"
            )
        _tell(f"{message}: left out")
        for source in without:
            del headers[source]
    space = _most(Counter(map(space_of, headers.values())))
    for source, header in list(headers.items()):
        own = space_of(header)
        if own != space:
            reason = f"its actions are {own}; those of most sources {space}"
        elif header.fps and header.fps != fps:
            rate = f"each of its {float(header.fps):g} frames per second has an action"
            if options.fps:
                raise InputError(f"`fps` {options.fps:g}: {source.path}: {rate}; leave it out")
            reason = f"{rate}, the dataset has {float(fps):g}"
        else:
            continue
        _skip(f"{source.path}: {reason}", skipped, options.strict)
        del headers[source]
    if space.columns:
        _tell(f"actions of {space}")
    return space


def divide(headers: dict[Source, Header], options: ConversionOptions) -> dict[str, list[Source]]:
    """The sources of each split: as their publisher has divided them, if there is one for training and one for
    validation; others by a hash of their names.
    """
    given = {header.split for header in headers.values()}
    headers = dict(headers) if {"train", "val"} <= given else {s: h._replace(split=None) for s, h in headers.items()}
    others = [source for source, header in headers.items() if not header.split]
    shares = options.val_fraction, options.test_fraction
    splits = split_sources(others, *shares, options.seed, options.group) if others else {split: [] for split in SPLITS}
    return {
        split: [*(source for source, header in headers.items() if header.split == split), *splits[split]]
        for split in SPLITS
    }


def _most(counts: Counter[Any]) -> Any:
    """The most frequent one, the first of equals."""
    return counts.most_common(1)[0][0]


def tell_remarks(headers: dict[Source, Header], strict: bool) -> None:
    """Says, once for each kind of remark, of how many sources the decoder made it; refuses any if `strict`."""
    first: dict[str, Source] = {}
    counts: Counter[str] = Counter()
    for source, header in headers.items():
        for remark in header.remarks:
            first.setdefault(remark, source)
            counts[remark] += 1
    for remark, source in first.items():
        if strict:
            raise InputError(f"{source.path}: {remark} (`strict`)")
        _tell(f"{counts[remark]} of {len(headers)} {source.kind.plural}: {remark}", sys.stderr)


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


def run_tasks(
    tasks: Sequence[Task], num_workers: int, skipped: list[str]
) -> tuple[dict[str, tuple[Shard, ...]], Seen, Seen]:
    """Runs the tasks and gathers their shards, in order.

    Returns:
      Shards of each split, under their final names, and what was seen of actions: everywhere, and in training.
    """
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    everywhere = trained_on = Seen()
    done = 0
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
            for note in converted.damaged:
                _tell(note, sys.stderr)
            for shard in converted.shards:
                name = f"{task.split}/{len(shards[task.split]):05d}.array_record"
                os.replace(task.folder / shard.file, task.folder / name)
                shards[task.split].append(Shard(name, shard.lengths))
            everywhere = everywhere.plus(converted.seen)
            if task.split == "train":
                trained_on = trained_on.plus(converted.seen)
            done += len(task.sources)
            bar.update(len(task.sources))
            if bar.disable and time.monotonic() - told > 10:  # a log file gets lines, not a bar
                told = time.monotonic()
                print(f"{done} of {total} files", flush=True)
    return {split: tuple(shards[split]) for split in SPLITS}, everywhere, trained_on


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
