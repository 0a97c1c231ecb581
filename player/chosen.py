"""Which actions a world is sampled with: those of a clip, random ones, a list of the user's, or a sweep of all."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.actions import no_actions, random_actions
from models.errors import InputError
from models.genie import World
from player.actions import spoken
from player.controls import Controls
from utils.actions import ActionColumn
from utils.data import Batch, ClipSource

SWEPT = 24  # rows of a sweep over columns, at most


def known_actions(world: World, clips: Batch, length: int) -> np.ndarray:
    """What was done between the first frames of clips, (B, length), int32 or rows: inferred, true, or unknown."""
    unknown = no_actions(world.cfg.dynamics, (len(clips.frames_BTHWC), length))
    if length == 0 or (world.lam is None and clips.actions_BT is None):
        return unknown
    if world.lam is None:
        return np.asarray(clips.actions_BT, unknown.dtype)[:, :length]
    return np.asarray(world.infer_actions(jnp.asarray(clips.frames_BTHWC[:, : length + 1], jnp.float32) / 255))


def check_columns(world: World, source: ClipSource, clips: Batch) -> tuple[ActionColumn, ...]:
    """The columns of a world of true actions, as the dataset names them; none where an action is one integer.

    Raises:
      InputError: The dataset's actions are not those that the world was trained on.
    """
    columns = source.metadata.action_columns
    if world.lam is not None:
        return ()
    if clips.actions_BT is not None and _values(columns) != world.cfg.dynamics.action_values:
        raise InputError(f"`data_dir` {source.folder}: its actions are not those that the world was trained on")
    return columns


def _values(columns: Sequence[ActionColumn]) -> tuple[int, ...]:
    """How many values each column has, 0 for real numbers."""
    return tuple(len(column.values or ()) for column in columns)


def random_like(world: World, seed: int, num_clips: int, num_frames: int) -> np.ndarray:
    """Random actions (B, num_frames), int32 or rows."""
    return np.asarray(random_actions(world.cfg.dynamics, jax.random.key(seed), (num_clips, num_frames)))


def listed_actions(world: World, text: str, columns: Sequence[ActionColumn]) -> np.ndarray:
    """Actions (S,), int32 or rows, from what the user writes: "0,3,3", or of columns "forward+jump,camera_x=-10,none".

    Columns that are not named are at rest (`ActionColumn.rest`).

    Raises:
      InputError: That means nothing here.
    """
    if not world.cfg.dynamics.action_values:
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise InputError(f"`actions` {text}: expected inferred, random, true, sweep or a list such as 0,3,3,5")
        given = np.array([int(a) for a in text.split(",")], np.int32)
        if max(given) >= world.num_actions:
            raise InputError(f"`actions` {text}: this world has the actions 0 to {world.num_actions - 1}")
        return given
    _expect_names(world, columns, text)
    places = {column.name: i for i, column in enumerate(columns)}
    rows = []
    for step in text.split(","):
        rows.append(Controls(columns).still.copy())
        for term in [] if step == "none" else step.split("+"):
            name, _, said = term.partition("=")
            if name not in places:
                raise InputError(f"`actions` {text}: no column {name}; there are {', '.join(places)}, and none")
            rows[-1][places[name]] = _value(text, columns[places[name]], said)
    return np.stack(rows)


def _expect_names(world: World, columns: Sequence[ActionColumn], text: str) -> None:
    if _values(columns) != world.cfg.dynamics.action_values:
        raise InputError(f"`actions` {text}: the dataset does not name the columns of this world's actions; use random")


def _value(text: str, column: ActionColumn, said: str) -> float:
    """The number that stands for a column's value: its name, or a real number."""
    if column.values is not None:
        values = [*column.values]
        if not said and len(values) == 2:
            return 1
        if said in values:
            return values.index(said)
        raise InputError(
            f"`actions` {text}: {column.name} is one of {', '.join(values)}, as in {column.name}={values[-1]}"
        )
    try:
        return float(said)
    except ValueError:
        raise InputError(f"`actions` {text}: {column.name} is a number, as in {column.name}={column.mean:g}") from None


def swept_actions(world: World, columns: Sequence[ActionColumn]) -> tuple[np.ndarray, list[str]]:
    """Each action, (S,) int32; of columns, rows: first nothing, then what each of the page's buttons does.

    Returns:
      The actions, and what those of columns are called.
    """
    if not world.cfg.dynamics.action_values:
        return np.arange(world.num_actions, dtype=np.int32), []
    _expect_names(world, columns, "sweep")
    controls = Controls(columns)
    rows = [controls.row([button]) for button in range(1 + len(controls.buttons))][:SWEPT]
    return np.stack(rows), [spoken(row, columns) for row in rows]
