"""Actions: what latent ones mean, in terms of the true ones that a dataset knows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.measured import Measured
from evaluation.statistics import (
    NOT_MEASURED,
    Figure,
    adjusted_mutual_information,
    best_map,
    contingency,
    figure,
    jackknife,
)

LABELLED = (10, 50, 200, 1000)  # labelled transitions from which a map of latent to true actions is learned
DRAWS = 20  # of which transitions these are


class MergedActions(NamedTuple):
    """Actions that differ in effect: their names, and for each of the dataset's actions the index among them."""

    names: list[str]
    index_A: np.ndarray


def merge_actions(names: Sequence[str], same: Mapping[str, str]) -> MergedActions:
    """Counts actions that do the same as one.

    Args:
      names: The dataset's.
      same: For each action that does the same as another, that other's name (`Metadata.same_actions`).
    """
    merged = [same.get(name, name) for name in names]
    kept = list(dict.fromkeys(merged))
    return MergedActions(kept, np.array([kept.index(name) for name in merged]))


def measure_meaning(latent: np.ndarray, true: np.ndarray, num_latent: int, names: Sequence[str], seed: int) -> Measured:
    """How far latent actions tell true ones.

    A map of latent to true actions is learned on some transitions of the first half of the clips and scored on the
    second half.

    Args:
      latent, true: (B, Tm1); true ones are indices of `names`.
    """
    both = np.stack([latent, true], axis=-1)
    ami = lambda pairs: adjusted_mutual_information(contingency(pairs[..., 0], pairs[..., 1], num_latent, len(names)))
    half, rng = len(latent) // 2, np.random.default_rng(seed)
    codes, labels = latent[:half].reshape(-1), true[:half].reshape(-1)
    accuracy: dict[str, Figure] = {}
    for n in LABELLED:
        if n > len(codes):
            accuracy[str(n)] = NOT_MEASURED
            continue
        hits = []
        for _ in range(DRAWS):
            drawn = rng.choice(len(codes), n, replace=False)
            guess = best_map(codes[drawn], labels[drawn], num_latent, len(names))
            hits.append((guess[latent[half:]] == true[half:]).mean(axis=1))
        accuracy[str(n)] = figure(np.mean(hits, axis=0))
    most_frequent = np.bincount(labels, minlength=len(names)).argmax() if half else 0
    majority = figure((true[half:] == most_frequent).mean(axis=1))
    figures = {
        "latent_action_ami": jackknife(ami, both),
        **{f"action_accuracy_{n}": found for n, found in accuracy.items() if found is not NOT_MEASURED},
        "action_accuracy_majority": majority,
    }
    details = {
        "transitions": int(latent.size),
        "action_names": list(names),
        "table": contingency(latent, true, num_latent, len(names)),
        "accuracy": accuracy,
        "accuracy_majority": majority,
        "accuracy_chance": 1 / len(names),
    }
    return Measured(figures=figures, details={"latent_actions": details})


@dataclasses.dataclass(frozen=True)
class ActionLabel:
    """What is known of a world's action.

    name: What it does in the world; of a LAM alone, as `true`.
    true: The true action that it mostly stands for, in the share `share` of `count` transitions; empty where the
      dataset has none.
    """

    name: str
    true: str
    share: float | None
    count: int


def action_labels(table: np.ndarray, names: Sequence[str]) -> list[ActionLabel]:
    """Labels of latent actions, from how often each meets each true action: (latent, true)."""
    labels = []
    for row in np.asarray(table):
        n, best = int(row.sum()), int(row.argmax())
        name = names[best] if n else ""
        labels.append(ActionLabel(name, name, round(row[best] / n, 4) if n else None, n))
    return labels


def true_action_labels(actions: np.ndarray, names: Sequence[str]) -> list[ActionLabel]:
    """Labels of actions that are the true ones, which stand for themselves."""
    counts = np.bincount(actions.reshape(-1), minlength=len(names))
    return [ActionLabel(name, name, 1.0 if n else None, int(n)) for name, n in zip(names, counts, strict=True)]


def named(
    labels: Sequence[ActionLabel] | None, buttons: Sequence[Mapping[str, Any]], actions: np.ndarray
) -> list[ActionLabel]:
    """Labels with the names that `evaluation.buttons` found; without labels, of latent `actions` (B, Tm1)."""
    if labels is None:
        counts = np.bincount(actions.reshape(-1), minlength=len(buttons))
        labels = [ActionLabel("", "", None, int(n)) for n in counts]
    return [dataclasses.replace(x, name=button["name"]) for x, button in zip(labels, buttons, strict=True)]
