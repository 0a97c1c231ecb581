"""From episodes to clips to shards: what a worker of `sources/convert.py` does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.errors import InputError
from sources.kind import Kind
from utils.records import Clip, Shard, write_shard
from utils.video import resize


@dataclass(frozen=True)
class Source:
    """One episode to read: a file, or a folder.

    name: Path within the input folder.
    """

    name: str
    path: Path
    kind: Kind


class Form(NamedTuple):
    """What all clips of the dataset have in common, and how episodes become clips."""

    height: int
    width: int
    resizes: bool
    fps: Fraction
    has_actions: bool
    clip_length: int
    min_clip_length: int


class Task(NamedTuple):
    """Sources that one worker turns into shards; their number does not depend on the number of workers.

    shard_bytes: Raw frames in one file of clips, at most.
    """

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
    episode = source.kind.open(source.path, form.fps)
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
            frame = resize(frame[None], form.height, form.width)[0]
        elif frame.shape[:2] != (form.height, form.width):
            raise InputError(wrong_size(source, frame.shape[:2], (form.height, form.width)))
        frames.append(frame)
        count += 1
        if len(frames) == form.clip_length:
            yield clip()
            frames = []
    if len(frames) >= form.min_clip_length:
        yield clip()
    elif count < form.min_clip_length:
        raise InputError(too_short(source, count, form.min_clip_length))


def too_short(source: Source, num_frames: int, min_clip_length: int) -> str:
    """Why an episode without a single clip is skipped."""
    return f"{source.path}: has {num_frames} frames, fewer than `min_clip_length` {min_clip_length}"


def wrong_size(source: Source, size: Sequence[int], expected: Sequence[int]) -> str:
    """Why an episode with frames of another size is skipped."""
    return (
        f"{source.path}: has frames of {size[0]}×{size[1]} (height × width), the first source "
        f"{expected[0]}×{expected[1]}; resize all with `height` and `width`"
    )
