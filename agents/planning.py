"""Planning in a world: of many ways to go on, imagined with its heads, the best one is played."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.genie import World
from models.heads import Judged
from models.kernels import KV
from models.sampling import SamplingConfig, imagine, start_rollout

CONTEXT = 4  # frames of the game that a plan is made from
DISCOUNT = 0.99  # of a reward, for each step that it is away
LOSS = 5.0  # what an end that is no solution takes from a plan's worth
ROWS = 4  # plans that are made in one call

Propose = Callable[[np.random.Generator, int, int], np.ndarray]
"""From a number of plans and their length to actions (plans, length) of the world's, to choose from."""


class Shooter:
    """Random shooting: the worth of plans by what a world's heads say of them.

    Args:
      world: One that has heads.
    """

    def __init__(self, world: World, sampling: SamplingConfig, seed: int = 0):
        graphdef, self._variables = nnx.split(world)
        self.infers = world.lam is not None

        @jax.jit
        def judge(variables: Any, frames_BTHWC: jax.Array, between_BTm1: jax.Array, plans_BXS: jax.Array) -> jax.Array:
            world = nnx.merge(graphdef, variables)
            frames = frames_BTHWC.astype(jnp.float32) / 255
            actions_BTm1 = world.infer_actions(frames) if world.lam is not None else between_BTm1
            B, X, S = plans_BXS.shape
            state = repeat(start_rollout(world, frames, actions_BTm1), X)
            _, judged = imagine(world, state, plans_BXS.reshape(B * X, S), jax.random.key(seed), sampling)
            return worth(judged).reshape(B, X)

        self._judge = judge

    def __call__(self, frames_BTHWC: np.ndarray, between_BTm1: np.ndarray, plans_BXS: np.ndarray) -> np.ndarray:
        """How much plans are worth, (B, X).

        Args:
          frames_BTHWC: uint8, what was seen last; between_BTm1: int32, true actions between, of no account to a world
            that infers them.
          plans_BXS: Actions of the world's.
        """
        found, given = [], (frames_BTHWC, between_BTm1, plans_BXS)
        for start in range(0, len(frames_BTHWC), ROWS):
            rows = [x[start : start + ROWS] for x in given]
            kept = len(rows[0])
            filled = [np.concatenate([x, np.repeat(x[:1], ROWS - kept, axis=0)]) for x in rows]
            found.append(np.asarray(self._judge(self._variables, *filled))[:kept])
        return np.concatenate(found)


def worth(judged: Judged) -> jax.Array:
    """Expected discounted reward of plans (B, S), less what losing costs, (B,)."""
    value_BS = earned(judged)
    return jnp.sum(DISCOUNT ** jnp.arange(value_BS.shape[1]) * reached(judged) * value_BS, axis=1)


def earned(judged: Judged) -> jax.Array:
    """Expected reward of actions (B, S), less what losing costs."""
    return judged.reward_X - LOSS * (judged.end_X - judged.solved_X)


def reached(judged: Judged) -> jax.Array:
    """Probability that none of the actions (B, S) before one has ended the level."""
    return jnp.cumprod(jnp.pad(1.0 - judged.end_X[:, :-1], ((0, 0), (1, 0)), constant_values=1.0), axis=1)


def repeat(state: Any, times: int) -> Any:
    """A state of which each rollout stands `times` times in a row."""

    def part(value: Any) -> Any:
        axis = 1 if isinstance(value, KV) else 0  # caches have the blocks first
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=axis), value)

    return state._replace(**{name: part(value) for name, value in state._asdict().items() if name != "frame"})


class WorldPlanner:
    """Plays N levels of the real game side by side (`sources.once.Player`), of which it sees the frames alone.

    Args:
      shooter: None plays the first plan that comes to mind, for comparison.
      propose: Where plans come from.
      length: Steps of a plan.
      held: Steps of it that are played before the next one is made; at most `length`.
      num_plans: To choose from.
      true_A: From the world's actions to the game's.
      idle: What stands before a level's first frame.
      seed: Of the plans.
    """

    def __init__(
        self,
        shooter: Shooter | None,
        propose: Propose,
        *,
        length: int,
        held: int,
        num_plans: int,
        true_A: np.ndarray,
        idle: int,
        seed: int,
    ):
        self._shooter, self._propose, self._rng = shooter, propose, np.random.default_rng(seed)
        self._length, self._held, self._num_plans = length, min(held, length), num_plans
        self._true_A, self._idle, self._step = true_A, idle, 0

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray) -> np.ndarray:
        """Actions (N,) int32."""
        N = len(frames_NHWC)
        if self._step == 0:
            self._seen_NTHWC = np.repeat(frames_NHWC[:, None], CONTEXT, axis=1)
            self._between_NTm1 = np.full((N, CONTEXT - 1), self._idle, np.int32)
            self._plan_NS = np.zeros((N, self._held), np.int32)
        else:
            self._seen_NTHWC = np.concatenate([self._seen_NTHWC[:, 1:], frames_NHWC[:, None]], axis=1)
        if self._step % self._held == 0:
            plans_NXS = self._propose(self._rng, N * self._num_plans, self._length).reshape(N, -1, self._length)
            best_N = np.zeros(N, int)
            if self._shooter:
                given = self._seen_NTHWC, self._between_NTm1, plans_NXS
                best_N[playing_N] = self._shooter(*(x[playing_N] for x in given)).argmax(axis=1)
            self._plan_NS = plans_NXS[np.arange(N), best_N, : self._held]
        action_N = self._true_A[self._plan_NS[:, self._step % self._held]].astype(np.int32)
        self._between_NTm1 = np.concatenate([self._between_NTm1[:, 1:], action_N[:, None]], axis=1)
        self._step += 1
        return action_N
