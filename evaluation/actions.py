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
from utils.actions import ActionLabel

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


def measure_meaning(
    latent: np.ndarray,
    true: np.ndarray,
    num_latent: int,
    names: Sequence[str],
    seed: int,
    levels_B: np.ndarray | None = None,
) -> Measured:
    """How far latent actions tell true ones.

    A map of latent to true actions is learned on some transitions of the first half of the clips and scored on the
    second half.

    Args:
      latent, true: (B, Tm1); true ones are indices of `names`.
      levels_B: Of the clips; those of one level count as dependent.
    """
    # The same code may mean another action after another code: the pair of both tells more, and has more to learn.
    alone = _told(latent, true, num_latent, len(names), seed, levels_B)
    if latent.shape[1] > 1:
        pairs = latent[:, 1:] * num_latent + latent[:, :-1]
        told = _told(pairs, true[:, 1:], num_latent**2, len(names), seed, levels_B)
    else:
        told = _Told(NOT_MEASURED, dict.fromkeys(map(str, LABELLED), NOT_MEASURED))
    half = len(latent) // 2
    most_frequent = np.bincount(true[:half].reshape(-1), minlength=len(names)).argmax() if half else 0
    levels = None if levels_B is None else levels_B[half:]
    majority = figure((true[half:] == most_frequent).mean(axis=1), levels)
    figures = {"latent_action_ami": alone.ami, "latent_action_pair_ami": told.ami, "action_accuracy_majority": majority}
    for mark, accuracy in (("", alone.accuracy), ("_pair", told.accuracy)):
        known = {n: found for n, found in accuracy.items() if found is not NOT_MEASURED}
        figures |= {f"action_accuracy{mark}_{n}": found for n, found in known.items()}
    details = {
        "transitions": int(latent.size),
        "action_names": list(names),
        "table": contingency(latent, true, num_latent, len(names)),
        "accuracy": alone.accuracy,
        "accuracy_pair": told.accuracy,
        "accuracy_majority": majority,
        "accuracy_chance": 1 / len(names),
    }
    return Measured(figures=figures, details={"latent_actions": details})


class _Told(NamedTuple):
    ami: Figure
    accuracy: dict[str, Figure]


def _told(
    codes_BS: np.ndarray, true_BS: np.ndarray, num_codes: int, num_names: int, seed: int, levels_B: np.ndarray | None
) -> _Told:
    """Agreement of codes with true actions, and the accuracy of a map by the number of labels it is learned from."""
    ami = lambda both: adjusted_mutual_information(contingency(both[..., 0], both[..., 1], num_codes, num_names))
    half, rng = len(codes_BS) // 2, np.random.default_rng(seed)
    codes, labels = codes_BS[:half].reshape(-1), true_BS[:half].reshape(-1)
    levels = None if levels_B is None else levels_B[half:]
    accuracy: dict[str, Figure] = {}
    for n in LABELLED:
        if n > len(codes):
            accuracy[str(n)] = NOT_MEASURED
            continue
        hits = []
        for _ in range(DRAWS):
            drawn = rng.choice(len(codes), n, replace=False)
            guess = best_map(codes[drawn], labels[drawn], num_codes, num_names)
            hits.append((guess[codes_BS[half:]] == true_BS[half:]).mean(axis=1))
        accuracy[str(n)] = figure(np.mean(hits, axis=0), levels)
    return _Told(jackknife(ami, np.stack([codes_BS, true_BS], axis=-1), groups=[levels_B]), accuracy)


def action_labels(table: np.ndarray, names: Sequence[str]) -> list[ActionLabel]:
    """Labels of latent actions, from how often each meets each true action: (latent, true)."""
    labels = []
    for row in np.asarray(table):
        n, best = int(row.sum()), int(row.argmax())
        name = names[best] if n else ""
        labels.append(ActionLabel(name, round(row[best] / n, 4) if n else None, n, name))
    return labels


def true_action_labels(actions: np.ndarray, names: Sequence[str]) -> list[ActionLabel]:
    """Labels of actions that are the true ones, which stand for themselves."""
    counts = np.bincount(actions.reshape(-1), minlength=len(names))
    return [ActionLabel(name, None, int(n), name) for name, n in zip(names, counts, strict=True)]


def with_names(
    labels: Sequence[ActionLabel] | None, buttons: Sequence[Mapping[str, Any]], actions: np.ndarray
) -> list[ActionLabel]:
    """Labels with the names that `evaluation.buttons` found; without labels, of latent `actions` (B, Tm1)."""
    if labels is None:
        counts = np.bincount(actions.reshape(-1), minlength=len(buttons))
        labels = [ActionLabel(count=int(n)) for n in counts]
    return [dataclasses.replace(x, name=button["name"]) for x, button in zip(labels, buttons, strict=True)]
