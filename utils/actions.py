"""What an action says, where it is more than one integer, and what is known of a world's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ActionColumn:
    """One of several things that an action says at once: a key, a mouse's speed, a joint's angle.

    values: Names of the values 0, 1, ... of a discrete column; None where it holds real numbers.
    mean, scale: Of real numbers, mean and standard deviation in the training split; a model sees (x - mean) / scale.
    """

    name: str
    values: tuple[str, ...] | None = None
    mean: float = 0.0
    scale: float = 1.0

    @property
    def rest(self) -> float:
        """What it says where nothing is done: the mean of real numbers, the value called 0, else the first one."""
        if self.values is None:
            return self.mean
        return float(self.values.index("0") if "0" in self.values else 0)


def column_from(fields: dict[str, Any]) -> ActionColumn:
    """A column from JSON, which knows no tuples."""
    values = fields["values"]
    return ActionColumn(**fields | {"values": None if values is None else tuple(values)})


@dataclasses.dataclass(frozen=True)
class ActionLabel:
    """What is known of a world's action.

    name: What it does in the world, of a LAM alone as `true`; empty if unknown.
    share: Of the steps that a latent action was inferred for, the part that took the true action `true`; None if
      unknown.
    count: Steps of the dataset that it was inferred for.
    true: The true action that it mostly stands for; empty where the dataset has none.
    """

    name: str = ""
    share: float | None = None
    count: int = 0
    true: str = ""


def read_labels(file: Path, num_actions: int) -> list[ActionLabel]:
    """What is known of each of a world's actions, as evaluate.py has written it.

    Raises:
      InputError: The file is damaged, or of another world.
    """
    try:
        labels = [_label(**row) for row in json.loads(file.read_text())]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error!r}); run evaluate.py again") from error
    if len(labels) != num_actions:
        raise InputError(f"{file}: {len(labels)} labels for {num_actions} actions; run evaluate.py again")
    return labels


def _label(name: str | None, share: float | None, count: int, true: str | None = None) -> ActionLabel:
    """From a row of the file; where an older one says nothing of the true action, the name is it."""
    share = None if share is None or not count else float(share)
    return ActionLabel(name or "", share, int(count), (name if true is None else true) or "")
