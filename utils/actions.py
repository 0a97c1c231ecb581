"""What an action says, where it is more than one integer."""

import dataclasses
from typing import Any


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


def column_from(fields: dict[str, Any]) -> ActionColumn:
    """A column from JSON, which knows no tuples."""
    values = fields["values"]
    return ActionColumn(**fields | {"values": None if values is None else tuple(values)})
