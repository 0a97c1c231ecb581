"""Ways to act that do not look at the game."""

from collections.abc import Sequence

import numpy as np

STICKY_HOLD = 8  # mean time steps for which the sticky policy holds an action


def choose_actions(
    policy: str, weights_A: Sequence[float], rng: np.random.Generator, num_envs: int, num_steps: int
) -> np.ndarray:
    """Actions (num_envs, num_steps) int32.

    Args:
      policy: "uniform", or "sticky", which holds each action for a while.
      weights_A: How often "sticky" chooses each action, by comparison.
    """
    shape, num_actions = (num_envs, num_steps), len(weights_A)
    if policy == "uniform":
        return rng.integers(num_actions, size=shape, dtype=np.int32)
    weights = np.array(weights_A)
    return hold(rng.choice(num_actions, shape, p=weights / weights.sum()).astype(np.int32), rng)


def hold(choices_BT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choices (B, T) or (B, T, A), each of which is held for a while in the place of those after it."""
    shape = choices_BT.shape[:2]
    chosen_BT = rng.random(shape) < 1 / STICKY_HOLD  # at time steps that are not chosen, the action before is held
    held_since_BT = np.maximum.accumulate(np.where(chosen_BT, np.arange(shape[1]), 0), axis=1)
    return choices_BT[np.arange(shape[0])[:, None], held_since_BT]
