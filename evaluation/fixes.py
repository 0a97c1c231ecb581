"""Datasets made of another one's clips, without what an inspection found fault with (inspect_dataset.py --fix)."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evaluation.duplicates import Duplicates
from evaluation.scan import Place, Scan, read_clips
from models.errors import InputError
from utils.records import SPLITS, Metadata, Shard, write_metadata, write_shard

VAL_FRACTION = 0.1

Splits = Mapping[Place, str]
"""Which of the clips a new dataset has, and in which split. What cannot be read is in none."""


def without_repeats(scan: Scan, duplicates: Duplicates) -> Splits:
    """All clips but those that repeat another one."""
    repeats = duplicates.repeats()
    return {place: place.split for place, again in zip(scan.places, repeats, strict=True) if not again}


def with_val(scan: Scan) -> Splits:
    """All clips, of which the last tenth of the train split, by their names, is held out: of one video its end.

    Raises:
      InputError: There is a val split, or a single clip.
    """
    if scan.of_split("val").any():
        raise InputError("`fix` val: there is a val split already")
    train = [i for i, place in enumerate(scan.places) if place.split == "train"]
    if len(train) < 2:
        raise InputError(f"`fix` val: {len(train)} train clips, of which none can be held out; add longer videos")
    in_order = sorted(train, key=lambda i: scan.clip_ids[i])
    first = len(train) - max(1, round(VAL_FRACTION * len(train)))
    val = set(in_order[first:])
    # A level's last clip may reach back over frames of the one before it, which then is in neither split.
    ends_N = np.cumsum(scan.lengths_N)
    frames = lambda i: scan.frame_digests_F[ends_N[i] - scan.lengths_N[i] : ends_N[i]]
    before, after = frames(in_order[first - 1]), frames(in_order[first])
    shared = any(np.array_equal(before[-n:], after[:n]) for n in range(1, min(len(before), len(after)) + 1))
    left_out = {in_order[first - 1]} if first > 1 and shared else set()
    return {p: "val" if i in val else p.split for i, p in enumerate(scan.places) if i not in left_out}


def write_fixed(folder: str | Path, metadata: Metadata, splits: Splits, out: Path, fix: str) -> int:
    """Writes the new dataset; returns how many clips it has.

    What an interrupted call has left is removed: it is in a folder `.partial` beside, until all is written.

    Raises:
      InputError: There is something in its folder already.
    """
    expect_empty(out)
    whole, out = out, out.with_name(f"{out.name}.partial")
    if out.exists():
        shutil.rmtree(out)
    by_file: dict[tuple[str, str], list[Place]] = {}
    for place, split in splits.items():
        by_file.setdefault((split, place.file), []).append(place)
    shards: dict[str, list[Shard]] = {split: [] for split in dict.fromkeys((*metadata.splits, *SPLITS))}
    for (split, file), places in by_file.items():
        name = file if split == places[0].split else f"{split}/{Path(file).name}"
        shards[split].append(write_shard(out, name, read_clips(folder, places)))
    made_by = {"script": "inspect_dataset.py", "fix": fix, "of": metadata.made_by}
    fixed = {split: tuple(found) for split, found in shards.items()}
    write_metadata(out, dataclasses.replace(metadata, splits=fixed, made_by=made_by))
    out.replace(whole)
    return len(splits)


def expect_empty(out: Path) -> None:
    """Raises an InputError where there is something in a new dataset's folder already."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; choose another `output_dir`, or delete it")
