"""Finds the episodes in a folder, and divides them among the splits."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.errors import InputError
from sources.clips import Source
from sources.kind import STARTS_SUFFIX, Kind, Told, natural
from sources.options import ConversionOptions
from sources.registry import KINDS
from utils.records import SPLITS, read_metadata


def find_sources(options: ConversionOptions) -> tuple[list[Source], Counter[str]]:
    """The episodes in the input folder, in natural order (2 before 10), and the files passed over, by suffix.

    Raises:
      InputError: There is no such folder, nothing in it, or more than one kind and no choice of `source`; or what is
        there cannot be read at all, for instance for lack of a package.
    """
    root = Path(options.input_dir)
    remedy = (
        "put episodes there (.npy, .npz, videos, or folders of images) or name another folder with `input_dir`; for "
        "CoinRun run generate_dataset.py, which needs no preprocessing"
    )
    if not root.is_dir():
        raise InputError(f"`input_dir` {root}: no such folder; {remedy}")
    if is_dataset(root):
        raise InputError(f"`input_dir` {root}: is a dataset already, ready to train on (the trainings' --data_dir)")
    told = Told(options.height, options.width, options.camera)
    asked = KINDS if options.source == "auto" else {options.source: KINDS[options.source]}
    found: dict[Kind, list[Source]] = {kind.told(told): [] for kind in asked.values()}
    files: list[Path] = []
    for folder, folders, names in _walk(root):
        owned = _detect(root, folder, names, found)
        if owned:
            folders.clear()
        else:
            files += [folder / name for name in names if not name.endswith(STARTS_SUFFIX)]
    kinds = [kind for kind in found if found[kind]]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} {kind.name}" for kind in kinds)
        raise InputError(f"`input_dir` {root}: holds several kinds of sources ({counts}); choose one with `source`")
    if not kinds:
        raise InputError(f"`input_dir` {root}: nothing to read (`source` {options.source}); {remedy}")
    (kind,) = kinds
    if kind.knows_steps and options.actions_lead_to:
        raise InputError(f"`actions_lead_to`: {kind.plural} say which frame an action leads from; leave it out")
    kind.check()
    read = {source.path for source in found[kind]}
    others = [file for file in files if file not in read and not file.name.lower().endswith(tuple(kind.suffixes))]
    passed_over = Counter(file.suffix.lower() or "without a suffix" for file in others)
    return sorted(found[kind], key=lambda source: natural(source.name)), passed_over


def is_dataset(folder: str | Path) -> bool:
    """Whether a folder holds a dataset of clips, which needs no conversion."""
    try:
        read_metadata(folder)
    except InputError:
        return False
    return True


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk, with what links lead to, each folder once, and without what is hidden."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield Path(folder), folders, [name for name in names if not name.startswith(".")]


def _detect(root: Path, folder: Path, names: list[str], found: dict[Kind, list[Source]]) -> bool:
    """Asks each kind for the episodes in a folder. A kind is not offered what an earlier one has taken.

    Returns:
      Whether all that lies below belongs to the kind that was found.
    """
    for kind, sources in found.items():
        paths = kind.detect(folder, names)
        sources += [Source(_printable(path.relative_to(root)), path, kind) for path in paths]
        if paths and kind.owns_folder:
            return True
        taken = {path.name for path in paths}
        names = [name for name in names if name not in taken]
    return False


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
