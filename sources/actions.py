"""Actions of all sorts: as arrays give them, and what a dataset's metadata says of them.

An action is one integer, several of them, or a row in which some columns hold real numbers.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from models.errors import InputError
from sources.kind import Header
from utils.actions import ActionColumn

MAX_ACTIONS = 4096  # a larger number in `actions` is not the index of a discrete action


def as_actions(where: str, values: np.ndarray, starts: Collection[int] = ()) -> np.ndarray:
    """An array of actions, one for each frame, as clips hold them.

    One integer: whole numbers (T,) or (T, 1) of any type, one-hot rows (T, A). Several: rows (T, A) of an integer type.
    Real numbers: any others that are finite.

    Args:
      where: Path and name of the array, for messages.
      starts: Frames with which an episode starts; in Dreamer's files the action that led there is a row of zeros.

    Returns:
      int32 (T,) or (T, A), from 0, or float32 (T, A).
    """
    if (
        values.ndim == 2
        and values.shape[1] > 1
        and values.size
        and values.dtype.kind in "iufb"
        and _one_hot(values, starts)
    ):
        return values.argmax(axis=1).astype(np.int32)
    actions = typed_actions(where, values)
    if actions.dtype == np.float32 and actions.shape[1] == 1 and (actions == np.rint(actions)).all():
        return _whole(where, actions[:, 0])
    return actions


def typed_actions(where: str, values: np.ndarray) -> np.ndarray:
    """As `as_actions`, but by the type of the array alone, where that is known to mean what it says."""
    if values.dtype.kind not in "iufb" or values.ndim not in (1, 2) or not values.size:
        raise InputError(f"{where} are {values.dtype} of shape {values.shape}; expected numbers (T,) or (T, A)")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise InputError(f"{where} are not all finite")
        return values.reshape(len(values), -1).astype(np.float32)
    return _whole(where, values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values)


def _whole(where: str, values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 as int32."""
    if values.min() < 0 or values.max() >= MAX_ACTIONS:
        raise InputError(
            f"{where} are {values.dtype} from {values.min()} to {values.max()}; expected whole numbers from 0 to "
            f"{MAX_ACTIONS - 1}, one for each discrete action"
        )
    return values.astype(np.int32)


def _one_hot(values: np.ndarray, starts: Collection[int]) -> bool:
    """Whether each row is 1 in one place and else 0; rows at the start of an episode may be 0 throughout."""
    is_none = np.logical_not(values.any(axis=1))
    is_none[[0, *(start for start in starts if start < len(values))]] = False
    return bool(np.isin(values, (0, 1)).all() and (values.sum(axis=1) <= 1).all() and not is_none.any())


def per_frame(where: str, actions: np.ndarray, num_frames: int) -> np.ndarray:
    """Actions of each frame; of the last one, where it is missing, all is 0."""
    if len(actions) not in (num_frames - 1, num_frames):
        raise InputError(
            f"{where} have shape {actions.shape}; expected {num_frames} or {num_frames - 1} values, for as many frames"
        )
    return np.concatenate([actions, np.zeros_like(actions[:1])])[:num_frames]


def columns_of(actions: np.ndarray, names: Sequence[str] = ()) -> tuple[ActionColumn, ...]:
    """Columns of actions (T, A), whose values are to be counted; none of actions (T,)."""
    if actions.ndim == 1:
        return ()
    values = None if actions.dtype.kind == "f" else ()
    return tuple(ActionColumn(name, values) for name in names or map(str, range(actions.shape[1])))


def counted(number: int) -> tuple[str, ...]:
    """Names of values of which nothing is known but how many there are."""
    return tuple(map(str, range(number)))


class Space(NamedTuple):
    """What the actions of a dataset are.

    columns: Beyond one integer.
    names: Of one integer's values, where they are known.
    """

    columns: tuple[ActionColumn, ...] = ()
    names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        if not self.columns:
            return "one integer" + (f", {len(self.names)} values" if self.names else "")
        kinds = [f"{c.name} ({'real' if c.values is None else len(c.values) or 'discrete'})" for c in self.columns]
        shown = kinds if len(kinds) <= 8 else [*kinds[:8], "…"]
        return f"{len(kinds)} column{'' if len(kinds) == 1 else 's'}: {', '.join(shown)}"

    def check(self, where: str, actions: np.ndarray) -> None:
        """Refuses actions of another shape or type, or beyond the values that have names."""
        shape = (len(self.columns),) if self.columns else ()
        is_real = any(column.values is None for column in self.columns)
        if actions.shape[1:] != shape or (actions.dtype.kind == "f") != is_real:
            raise InputError(f"{where}: actions are {actions.dtype} of shape {actions.shape}; expected {self}")
        named = [column.values for column in self.columns] if self.columns else [self.names]
        for i, values in enumerate(named):
            column = actions[:, i] if self.columns else actions
            if values and not (column.min() >= 0 and column.max() < len(values)):
                name = f" of {self.columns[i].name}" if self.columns else ""
                raise InputError(
                    f"{where}: has the actions {column.min():g} to {column.max():g}{name}, but there are {len(values)}"
                )


def space_of(header: Header) -> Space:
    """What an episode's actions are."""
    return Space(header.columns, header.action_names)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen of actions, for each column.

    count: Frames.
    largest, total, squares: Largest value, sum, and sum of squares.
    """

    count: int = 0
    largest: np.ndarray = dataclasses.field(default_factory=lambda: np.full(1, -1.0))
    total: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))
    squares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1))

    def plus(self, other: "Seen") -> "Seen":
        return Seen(
            self.count + other.count,
            np.maximum(self.largest, other.largest),
            self.total + other.total,
            self.squares + other.squares,
        )


def seen(actions: np.ndarray | None) -> Seen:
    """What one clip's actions add."""
    if actions is None:
        return Seen()
    rows = actions.reshape(len(actions), -1).astype(np.float64)
    return Seen(len(rows), rows.max(axis=0), rows.sum(axis=0), np.square(rows).sum(axis=0))


def described(space: Space, everywhere: Seen, trained_on: Seen) -> Space:
    """The space with what was counted: how many values there are, and mean and scale of real numbers.

    Args:
      trained_on: What was seen in the training split.
    """
    if not space.columns:
        return Space(names=space.names or counted(int(everywhere.largest[0]) + 1))
    of = trained_on if trained_on.count else everywhere
    mean = of.total / of.count
    spread = np.sqrt(np.maximum(of.squares / of.count - mean**2, 0))
    spread[spread <= 1e-6 * np.maximum(1, np.abs(mean))] = 1.0  # what never changes
    columns = []
    for i, column in enumerate(space.columns):
        if column.values is None:
            column = dataclasses.replace(column, mean=float(mean[i]), scale=float(spread[i]))
        elif not column.values:
            column = dataclasses.replace(column, values=counted(int(everywhere.largest[i]) + 1))
        columns.append(column)
    return Space(tuple(columns))
