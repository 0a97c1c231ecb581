"""What buttons and a mouse do, where an action has columns: each button sets one column, all that are held count."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from models.dynamics import DynamicsConfig
from models.errors import InputError
from player.actions import spoken
from utils.actions import ActionColumn, ActionLabel

FURTHEST = 3.0  # standard deviations of a real number that the mouse reaches
TAP = 1 / 3  # how far a button moves what the mouse drives, of that


class Controls:
    """The buttons of a world's actions; the first does nothing.

    mouse: The columns that the mouse drives, across and down; those called x and y, else the first two that it can.
    """

    def __init__(self, columns: Sequence[ActionColumn]):
        self.columns = tuple(columns)
        self.still = np.array([column.rest for column in columns], np.float32)
        drivable = [i for i, column in enumerate(columns) if _numbers(column) is not None]
        named = [next((i for i in drivable if columns[i].name.lower().endswith(end)), None) for end in "xy"]
        self.mouse = [i for i in named if i is not None] if None not in named else drivable[:2]
        self.buttons: list[tuple[int, float]] = []
        for i, column in enumerate(columns):
            if i in drivable:
                others = [_driven(column, TAP * side) for side in (-1, 1)]
            else:
                others = [float(v) for v in range(len(column.values or ())) if v != column.rest]
            self.buttons += [(i, value) for value in others]

    def actions(self) -> list[ActionLabel]:
        """What the buttons are called."""
        named = [ActionLabel("nothing")]
        for i, value in self.buttons:
            column = self.columns[i]
            if _numbers(column) is not None:
                named.append(ActionLabel(f"{column.name} {'-' if value < column.rest else '+'}"))
            else:
                row = self.still.copy()
                row[i] = value
                named.append(ActionLabel(spoken(row[[i]], [column])))
        return named

    def row(self, held: Iterable[int], mouse: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
        """The action, float32 (A,), of buttons that are held and a mouse that moved, from -1 to 1 across and down."""
        row = self.still.copy()
        for button in held:
            if button:
                column, value = self.buttons[button - 1]
                row[column] = value
        for column, moved in zip(self.mouse, mouse, strict=False):
            if moved:
                row[column] = _driven(self.columns[column], moved)
        return row


def controls_of(cfg: DynamicsConfig, columns: Sequence[ActionColumn]) -> Controls | None:
    """The controls of a world, or None if its actions are one integer; a dataset with such columns names them."""
    if not cfg.action_values:
        return None
    if tuple(len(column.values or ()) for column in columns) != cfg.action_values:
        columns = [
            ActionColumn(f"column {i}", tuple(map(str, range(n))) if n else None, mean, scale)
            for i, (n, mean, scale) in enumerate(zip(cfg.action_values, cfg.action_mean, cfg.action_scale, strict=True))
        ]
    return Controls(columns)


def _numbers(column: ActionColumn) -> list[float] | None:
    """What the values of a column that can be driven stand for; none for real numbers. None if it cannot be."""
    if column.values is None:
        return []
    try:
        numbers = [float(value) for value in column.values]
    except ValueError:
        return None
    return numbers if min(numbers) < 0 < max(numbers) else None


def _driven(column: ActionColumn, moved: float) -> float:
    """What a column says when it is moved, from -1 to 1."""
    numbers = _numbers(column)
    if not numbers:
        return column.mean + FURTHEST * column.scale * moved
    return float(np.argmin([abs(number - moved * max(numbers)) for number in numbers]))


def parse_hands(message: dict[str, Any], num_buttons: int) -> dict[str, Any]:
    """The fields `held` and `mouse` of a page's message; nothing held and nothing moved where they are missing.

    Raises:
      InputError: They are malformed.
    """
    held, mouse = message.get("held", []), message.get("mouse", [0, 0])
    if not isinstance(held, list) or len(held) > num_buttons:
        raise InputError(f"step takes held, a list of at most {num_buttons} buttons")
    if not all(type(button) is int and 0 <= button < num_buttons for button in held):
        raise InputError(f"step takes held, a list of integers from 0 to {num_buttons - 1}")
    is_pair = isinstance(mouse, list) and len(mouse) == 2
    if not (is_pair and all(type(moved) in (int, float) and -1 <= moved <= 1 for moved in mouse)):
        raise InputError("step takes mouse, two numbers from -1 to 1")
    return {"held": held, "mouse": mouse}
