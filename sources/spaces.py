"""Actions of Gymnasium's environments: what they are called, how they are chosen, how they are handed over."""

from typing import Any

import numpy as np

from models.errors import InputError
from sources.actions import Space, counted
from sources.policies import choose_actions, hold
from utils.actions import ActionColumn

# Names where the environment itself has none, by the beginning of its ID: of discrete actions, and of columns.
ACTION_NAMES = {
    "CarRacing": ("NOOP", "RIGHT", "LEFT", "GAS", "BRAKE"),
    "CartPole": ("LEFT", "RIGHT"),
    "LunarLander": ("NOOP", "LEFT ENGINE", "MAIN ENGINE", "RIGHT ENGINE"),
    "MountainCar": ("LEFT", "NOOP", "RIGHT"),
}
COLUMN_NAMES = {"CarRacing": ("STEER", "GAS", "BRAKE"), "LunarLander": ("MAIN ENGINE", "SIDE ENGINES")}
MINATAR_NAMES = {"n": "NOOP", "l": "LEFT", "u": "UP", "r": "RIGHT", "d": "DOWN", "f": "FIRE"}


def space_of(id: str, env: Any) -> Space:
    """What the actions of an environment are.

    Real numbers come from anywhere in their range as often as from anywhere else, which gives their mean and scale.

    Raises:
      InputError: They are of a kind that a dataset has no room for, or real numbers without bounds.
    """
    space, kind, name = env.action_space, type(env.action_space).__name__, id.rpartition(":")[2]
    if kind == "Discrete":
        return Space(names=_names(name, env.unwrapped, int(space.n)))
    if kind not in ("MultiDiscrete", "MultiBinary", "Box") or len(space.shape) != 1:
        raise InputError(f"`env` gymnasium:{id}: its actions are {space}; expected one integer, or a row of numbers")
    num_columns = int(space.shape[0])
    known = next((names for prefix, names in COLUMN_NAMES.items() if name.startswith(prefix)), ())
    names = known if len(known) == num_columns else counted(num_columns)
    if kind == "Box":
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        if not np.isfinite([low, high]).all():
            raise InputError(f"`env` gymnasium:{id}: its actions are {space}; expected bounds to choose between")
        means, scales = (low + high) / 2, np.where(high > low, (high - low) / np.sqrt(12), 1.0)
        return Space(tuple(ActionColumn(names[i], None, float(means[i]), float(scales[i])) for i in range(num_columns)))
    sizes = space.nvec if kind == "MultiDiscrete" else [2] * num_columns
    return Space(tuple(ActionColumn(each, counted(int(n))) for each, n in zip(names, sizes, strict=True)))


def choose(space: Any, policy: str, rng: np.random.Generator, num_envs: int, num_steps: int) -> np.ndarray:
    """Actions (num_envs, num_steps) or (num_envs, num_steps, A) of a Gymnasium space, as a dataset holds them."""
    kind, shape = type(space).__name__, (num_envs, num_steps)
    if kind == "Discrete":
        return choose_actions(policy, [1.0] * int(space.n), rng, *shape)
    actions: np.ndarray
    if kind == "Box":
        actions = rng.uniform(space.low, space.high, (*shape, *space.shape)).astype(np.float32)
    else:
        sizes = space.nvec if kind == "MultiDiscrete" else 2
        actions = rng.integers(0, sizes, (*shape, *space.shape), dtype=np.int32)
    return hold(actions, rng) if policy == "sticky" else actions


def handed_over(space: Any, action: np.ndarray) -> Any:
    """An action of a dataset as the environment wants it."""
    if type(space).__name__ == "Discrete":
        return int(space.start) + int(action)
    start = space.start if type(space).__name__ == "MultiDiscrete" else 0
    return (action + start).astype(space.dtype)


def _names(id: str, env: Any, num_actions: int) -> tuple[str, ...]:
    """Names of discrete actions, or their numbers where the environment has none."""
    names: list[str] = []
    if hasattr(env, "get_action_meanings"):
        names = list(env.get_action_meanings())
    elif id.startswith("MinAtar/"):
        names = [MINATAR_NAMES[env.game.env.action_map[action]] for action in env.action_set]
    elif isinstance(getattr(env, "actions", None), type):  # MiniGrid's and others' are an enumeration
        names = [str(action.name).upper() for action in env.actions]
    for prefix, known in ACTION_NAMES.items():
        if not names and id.startswith(prefix):
            names = list(known)
    return tuple(names) if len(names) == num_actions else counted(num_actions)
