"""What a world's actions do: the labels that evaluate.py leaves beside a checkpoint."""

import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from models.errors import InputError
from utils.actions import ActionColumn, ActionLabel, read_labels
from utils.checkpoint import find_labels

STAY = "stay"
"""What evaluation/buttons.py calls the action that does nothing."""


def read_actions(checkpoint: str, num_actions: int, names: tuple[str, ...] | None) -> list[ActionLabel]:
    """Labels of a world's actions: those that evaluate.py has left, else `names` if they fit, else empty."""
    try:
        if file := find_labels(checkpoint):
            return read_labels(file, num_actions)
    except InputError as error:
        print(f"warning: no labels of the actions: {error}", file=sys.stderr)
    if names is not None and len(names) == num_actions:
        return [ActionLabel(name, true=name) for name in names]
    return [ActionLabel()] * num_actions


def spoken(action: int | np.ndarray, columns: Sequence[ActionColumn] = ()) -> str:
    """An action in words: its number, or those of its columns that are not at rest, with what they say."""
    if np.ndim(action) == 0:
        return f"action {action}"
    said = []
    for column, value in zip(columns, np.asarray(action), strict=True):
        if column.values is None:
            if abs(value - column.rest) > column.scale / 20:
                said.append(f"{column.name} {value:.2f}")
        elif value != column.rest:
            named = column.values[int(value)]
            said.append(column.name if len(column.values) == 2 else f"{column.name} {named}")
    return ", ".join(said) or "nothing"


def _still(action: ActionLabel, idle: str | None) -> tuple[bool, bool]:
    """Whether an action was measured to do nothing, and whether it is called so, which counts less."""
    names = ("NONE", "NOOP", "NO-OP") if idle is None else (idle.upper(),)
    return action.name == STAY, action.name.upper() in names


def idle_action(actions: list[ActionLabel], idle: str | None = None) -> int:
    """The action to take while no key is held: the one that does nothing, by its label, else the most frequent.

    Args:
      idle: What doing nothing is called in the dataset; None goes by what it is usually called.
    """
    return max(range(len(actions)), key=lambda i: (*_still(actions[i], idle), actions[i].count))


def _way(name: str) -> list[str]:
    """The words of a name in alphabetical order, without speed and number: "up, right, fast" is RIGHT+UP."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return sorted(word for word in words if word and word not in ("SLOW", "FAST") and not word.isdigit())


def _similar(name: str, theirs: Sequence[ActionLabel]) -> list[int]:
    """Those of the same name; else of the same direction at any speed. None have no name."""
    same = [i for i, other in enumerate(theirs) if name and other.name.upper() == name.upper()]
    return same or [i for i, other in enumerate(theirs) if _way(name) and _way(other.name) == _way(name)]


def matching_actions(ours: list[ActionLabel], theirs: list[ActionLabel], idle: str | None = None) -> list[int]:
    """For each of our actions the one of another world that does the same; `idle` is what doing nothing is called.

    Codes of two latent action models have nothing to do with each other, so names decide where both know them: the
    same index if it has the name, else the most frequent of that name, or of that direction at another speed; and what
    does nothing here stands for what does nothing there. Else the index decides.
    """
    found, known = [], any(any(_still(other, idle)) for other in theirs)
    for i, action in enumerate(ours):
        same = _similar(action.name, theirs)
        if not same and known and any(_still(action, idle)):
            same = [idle_action(theirs, idle)]
        if i in same or (not same and i < len(theirs)):
            found.append(i)
        else:
            found.append(max(same, key=lambda j: theirs[j].count) if same else idle_action(theirs, idle))
    return found


def actions_doing(
    names: Sequence[str], theirs: list[ActionLabel], surest: Mapping[str, int], idle: str | None = None
) -> list[int]:
    """For each true action of a game that action of a world which does it.

    Args:
      surest: Which one does it most surely, as far as that was measured. Of the others the most frequent one that moves
        as they are called, else the one that does nothing, stands for an action.
    """
    found = []
    for name in names:
        similar = _similar(name, theirs)
        moving = max(similar, key=lambda i: theirs[i].count) if similar else idle_action(theirs, idle)
        found.append(surest.get(name, moving))
    return found


def true_actions(ours: list[ActionLabel], names: Sequence[str], idle: str | None = None) -> list[int]:
    """For each action of a world that of a game, by number, which it mostly does; where that is unknown, nothing."""
    still = idle_action([ActionLabel(name) for name in names], idle)
    return [names.index(action.true) if action.true in names else still for action in ours]
