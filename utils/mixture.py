"""Several datasets as one, by weight: `--data_dir data/mine:0.7,data/coinrun:0.3`."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from utils.data import Batch, ClipSource, Source, longest_clip
from utils.records import Metadata


class Share(NamedTuple):
    """A dataset's folder, and its share of the clips in [0, 1]."""

    folder: str
    weight: float


def shares(data_dir: str) -> list[Share]:
    """The datasets that `data_dir` names: one folder, or several as FOLDER:WEIGHT,FOLDER:WEIGHT.

    Raises:
      InputError: A weight is missing, or not above 0.
    """
    if Path(data_dir).is_dir() or not (":" in data_dir or "," in data_dir):
        return [Share(data_dir, 1.0)]
    found = []
    for text in data_dir.split(","):
        folder, _, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (folder and 0 < weight < math.inf):
            raise InputError(
                f"`data_dir` {data_dir}: there is no such folder, and as a list of FOLDER:WEIGHT, split at commas, "
                f"{text or 'an empty part'} has no weight above 0"
            )
        found.append(Share(os.path.expanduser(folder), weight))
    total = sum(share.weight for share in found)
    return [Share(share.folder, share.weight / total) for share in found]


def open_splits(
    data_dir: str, seq_len: int, shortest: int = 0, tokens_too: bool = False, outcomes: Sequence[str] = ()
) -> tuple[Source, Source]:
    """What to train on, of clips of at least `shortest` frames, and what to validate on: whole clips alone.

    In a mixture a dataset without whole clips has no share in the validations, as long as another one has them.

    Raises:
      InputError: Short clips are to join, and outcomes to be read, which do not go together; or see `ClipSource`.
    """
    if outcomes and shortest < seq_len:
        raise InputError("`pad_short`: not with `heads`; leave one of them out")
    train = open_split(data_dir, "train", seq_len, tokens_too, outcomes, shortest)
    found = shares(data_dir)
    short = [0 < shortest < seq_len and longest_clip(share.folder, "val") < seq_len for share in found]
    if all(short) or not any(short):
        return train, open_split(data_dir, "val", seq_len, tokens_too, outcomes)
    assert isinstance(train, Mixture)
    sources = [
        own if is_short else ClipSource(own.folder, "val", seq_len, tokens_too)  # a short one for its actions' names
        for own, is_short in zip(train.sources, short, strict=True)
    ]
    return train, Mixture(
        sources, [share.weight * (not is_short) for share, is_short in zip(found, short, strict=True)]
    )


def open_split(
    data_dir: str, split: str, seq_len: int, tokens_too: bool = False, outcomes: Sequence[str] = (), shortest: int = 0
) -> Source:
    """The clips of one split of the dataset, or of the mixture, that `data_dir` names; see `ClipSource`, `Mixture`."""
    found = shares(data_dir)
    sources = [ClipSource(share.folder, split, seq_len, tokens_too, outcomes, shortest) for share in found]
    return sources[0] if len(sources) == 1 else Mixture(sources, [share.weight for share in found])


class Mixture:
    """Datasets of frames of one shape, of which each gives its share of the clips; one of weight 0 its actions alone.

    A clip's number counts through the datasets, one after another. Actions go by their names: those of the first
    dataset keep their numbers, what only later ones have comes after them. Actions with columns stay as they are, if
    all datasets have the same columns. Where one dataset has no actions, or others, the mixture has none.

    Raises:
      InputError: The datasets do not fit together.
    """

    def __init__(self, sources: Sequence[ClipSource], weights: Sequence[float]):
        self.sources, self.weights = sources, weights
        self.seq_len, self.outcomes = sources[0].seq_len, sources[0].outcomes
        self.metadata = _joined(sources)
        self._begins = np.cumsum([0, *map(len, sources)])
        names = self.metadata.action_names
        # For each dataset from its action numbers to the mixture's.
        self._numbers = [
            np.array([names.index(name) for name in source.metadata.action_names or ()], np.int32) if names else None
            for source in sources
        ]

    def __len__(self) -> int:
        return int(self._begins[-1])

    def order(self, seed: int) -> Any:
        """Clips by their numbers, without end: at any point each dataset has given its share, to within a clip."""
        import grain

        # Each dataset has an order of its own; that of the first is the one that it would have alone.
        own = [
            grain.MapDataset.range(int(begin), int(end)).seed((seed + i) % 2**32).shuffle().repeat()
            for i, (begin, end) in enumerate(zip(self._begins, self._begins[1:], strict=False))
            if self.weights[i]
        ]
        return grain.MapDataset.mix(own, [weight for weight in self.weights if weight]).seed(seed)

    def windows(self, indices: Sequence[int], positions: Sequence[float]) -> Batch:
        """Reads a batch; see `ClipSource.windows`."""
        clips_B, positions_B = np.asarray(indices), np.asarray(positions)
        of_B = np.searchsorted(self._begins, clips_B, side="right") - 1
        parts, places = [], []
        for i in np.unique(of_B).tolist():
            [place_X] = np.nonzero(of_B == i)
            batch = self.sources[i].windows(
                (clips_B[place_X] - self._begins[i]).tolist(), positions_B[place_X].tolist()
            )
            numbers = self._numbers[i]
            if numbers is not None:
                batch = batch._replace(actions_BT=numbers[batch.actions_BT])
            elif not self.metadata.has_actions:
                batch = batch._replace(actions_BT=None)
            parts.append(batch)
            places.append(place_X)
        back = np.argsort(np.concatenate(places))
        joined = (None if arrays[0] is None else np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True))
        return Batch(*joined)


def _joined(sources: Sequence[ClipSource]) -> Metadata:
    """Metadata of the mixture: the first dataset's, with the actions of all."""
    first = sources[0].metadata
    names = dict.fromkeys(first.action_names or ())
    same, idle = dict(first.same_actions), first.idle_action
    for source in sources[1:]:
        other = source.metadata
        if other.frame_shape != first.frame_shape:
            raise InputError(
                f"`data_dir`: {sources[0].folder} has frames of {first.frame_shape}, {source.folder} of "
                f"{other.frame_shape}; convert one of them to the other's size"
            )
        kinds = [t and dataclasses.replace(t, frames="") for t in (first.tokens, other.tokens)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"`data_dir`: {sources[0].folder} and {source.folder} do not hold tokens of the same models; make them "
                "with the same command, or mix the datasets of frames"
            )
        names |= dict.fromkeys(other.action_names or ())
        same = {name: like for name, like in (same | other.same_actions).items() if _agree(name, like, sources)}
        idle = idle if idle == other.idle_action else None
    everywhere = all(source.metadata.action_names for source in sources)
    columns = [[(column.name, column.values) for column in source.metadata.action_columns] for source in sources]
    return dataclasses.replace(
        first,
        action_names=tuple(names) if everywhere else None,
        same_actions=same,
        idle_action=idle,
        action_columns=first.action_columns if all(c == columns[0] for c in columns) else (),
    )


def _agree(name: str, like: str, sources: Sequence[ClipSource]) -> bool:
    """Whether an action does what another one does in every dataset that has it."""
    having = [source.metadata for source in sources if name in (source.metadata.action_names or ())]
    return all(metadata.same_actions.get(name) == like for metadata in having)
