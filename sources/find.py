"""Finds the episodes in a folder, and divides them among the splits."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from models.errors import InputError
from sources.clips import Source
from sources.kind import STARTS_SUFFIX, natural
from sources.options import ConversionOptions
from sources.registry import KINDS
from utils.records import SPLITS


def find_sources(options: ConversionOptions) -> tuple[list[Source], Counter[str]]:
    """The episodes in the input folder, in natural order (2 before 10), and the files passed over, by suffix.

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
    files: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.endswith(STARTS_SUFFIX)]
        for kind in KINDS.values():
            paths = kind.detect(Path(folder), names)
            found[kind.name] += [Source(_printable(path.relative_to(root)), path, kind) for path in paths]
    kinds = [name for name in found if found[name]] if options.source == "auto" else [options.source]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[name])} {name}" for name in kinds)
        raise InputError(f"`input_dir` {root}: holds several kinds of sources ({counts}); choose one with `source`")
    sources = found[kinds[0]] if kinds else []
    if not sources:
        raise InputError(f"`input_dir` {root}: nothing to read (`source` {options.source}); {remedy}")
    read, suffixes = {source.path for source in sources}, KINDS[kinds[0]].suffixes
    others = [file for file in files if file not in read and file.suffix.lower() not in suffixes]
    passed_over = Counter(file.suffix.lower() or "without a suffix" for file in others)
    return sorted(sources, key=lambda source: natural(source.name)), passed_over


def _printable(path: Path) -> str:
    """A path as text: what is not UTF-8 in it becomes \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def split_sources(
    sources: Sequence[Source], val_fraction: float, test_fraction: float, seed: int, group: str = ""
) -> dict[str, list[Source]]:
    """Divides sources among the splits, by a hash of seed and name; each split keeps their order.

    From three sources on every split with a share above 0 gets at least one. Of two sources one is for validation; a
    single one is for training.

    Args:
      group: Regular expression; sources in whose names it finds the same text count as one.
    """
    group_of = {source.name: _group(source.name, group) for source in sources}
    groups = list(dict.fromkeys(group_of.values()))
    n = len(groups)
    num_test = max(1, round(n * test_fraction)) if test_fraction and n > 2 else 0
    num_val = max(1, round(n * val_fraction)) if val_fraction and n > 1 else 0
    num_test = min(num_test, n - 1 - (num_val > 0))  # one is left for training, and for validation if it has a share
    num_val = min(num_val, n - 1 - num_test)
    by_hash = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    split_of = {
        name: "val" if i < num_val else "test" if i < num_val + num_test else "train" for i, name in enumerate(by_hash)
    }
    if group:
        print(f"{len(sources)} usable sources in {n} {'group' if n == 1 else 'groups'}, which are not divided")
    if n < 3 and (val_fraction or test_fraction):
        use = "one for training, one for validation" if num_val else "for training"
        kind = "group" if group else "usable source"
        print(f"{n} {kind}{'' if n == 1 else 's'}, {use}; all three splits take three or more")
    return {split: [source for source in sources if split_of[group_of[source.name]] == split] for split in SPLITS}


def _group(name: str, group: str) -> str:
    """What a source shares with those that it must not be parted from; alone, its name."""
    found = re.search(group, name) if group else None
    if not found:
        return name
    return found.group(1 if found.re.groups else 0) or name
