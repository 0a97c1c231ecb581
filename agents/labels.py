"""What latent actions mean to a game: maps that are learned from a few steps whose true actions are known."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import optimize, special

from models.errors import InputError
from models.policy import Agent
from utils.data import ClipSource

RIDGE = 1.0  # how strongly the weights of `ContextMap` are held near 0


class Labelled(NamedTuple):
    """Steps of which the true action is known.

    codes_N: The latent actions that the LAM infers for them; before_N: for the step before each.
    hidden_NM: The hidden state of the policy before them.
    actions_N: The true ones.
    """

    codes_N: np.ndarray
    before_N: np.ndarray
    hidden_NM: np.ndarray
    actions_N: np.ndarray

    def first(self, num: int) -> "Labelled":
        """So many of them."""
        return Labelled(*(x[:num] for x in self))


class ActionMap(Protocol):
    """From latent actions to a game's."""

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        """Probabilities (N, A) of the game's actions, for latent ones that a policy chose in a hidden state.

        Args:
          before_N: Those that it chose at the step before; -1 at the first.
        """


class CodeMap:
    """The paper's: of the labelled steps with the same code, the shares of the true actions (Genie, §3.3).

    A code that none of them has gets the shares of all; without any, each code stands for one action at random.
    """

    def __init__(self, labelled: Labelled, num_codes: int, num_actions: int, seed: int = 0):
        table_KA = np.zeros((num_codes, num_actions))
        np.add.at(table_KA, (labelled.codes_N, labelled.actions_N), 1.0)
        if not len(labelled.codes_N):
            table_KA = np.eye(num_actions)[np.random.default_rng(seed).integers(num_actions, size=num_codes)]
        table_KA[table_KA.sum(axis=1) == 0] = table_KA.sum(axis=0)
        self.table_KA = table_KA / table_KA.sum(axis=1, keepdims=True)

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        return self.table_KA[codes_N]


class PairMap:
    """By the code and the one before it; a pair that no labelled step has gets the shares of its code."""

    def __init__(self, labelled: Labelled, num_codes: int, num_actions: int):
        alone_KA = CodeMap(labelled, num_codes, num_actions).table_KA
        self.table_KKA = np.zeros((num_codes + 1, num_codes, num_actions))  # the last row: nothing was before
        np.add.at(self.table_KKA, (labelled.before_N, labelled.codes_N, labelled.actions_N), 1.0)
        total_KK1 = self.table_KKA.sum(axis=2, keepdims=True)
        self.table_KKA = np.where(total_KK1 > 0, self.table_KKA / np.maximum(total_KK1, 1), alone_KA)

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        return self.table_KKA[before_N, codes_N]


class ContextMap:
    """By the code and the policy's hidden state: a multinomial logistic regression, held near 0 by a ridge.

    A few codes that tell how things move leave open which button is down, in the air for instance; what the policy sees
    tells more.
    """

    def __init__(self, labelled: Labelled, num_codes: int, num_actions: int):
        self.num_codes = num_codes
        x_NF, target_NA = self._features(labelled.codes_N, labelled.hidden_NM), np.eye(num_actions)[labelled.actions_N]
        F = x_NF.shape[1]
        held_F1 = np.ones((F, 1))
        held_F1[-1] = 0  # not the bias

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w_FA = flat.reshape(F, num_actions)
            logs_NA = special.log_softmax(x_NF @ w_FA, axis=1)
            slope_FA = x_NF.T @ (np.exp(logs_NA) - target_NA) + RIDGE * held_F1 * w_FA
            return float(0.5 * RIDGE * np.sum(held_F1 * w_FA**2) - np.sum(target_NA * logs_NA)), slope_FA.reshape(-1)

        found = optimize.minimize(loss, np.zeros(F * num_actions), jac=True, method="L-BFGS-B")
        self.w_FA = found.x.reshape(F, num_actions)

    def _features(self, codes_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        """The code, the hidden state at a length of about 1, and a bias."""
        hidden = hidden_NM / hidden_NM.shape[1] ** 0.5
        return np.concatenate([np.eye(self.num_codes)[codes_N], hidden, np.ones((len(codes_N), 1))], axis=1)

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        return special.softmax(self._features(codes_N, hidden_NM) @ self.w_FA, axis=1)


def label(agent: Agent, source: ClipSource, num: int, seed: int, rows: int = 32) -> Labelled:
    """Draws steps of a dataset and asks for their true actions; fewer steps are the first of more.

    Each is of a window of its own, of which the LAM sees no frame after the step.

    Raises:
      InputError: The dataset has not as many clips, or no actions.
    """
    context, S = agent.cfg.policy.context, source.seq_len
    if not source.metadata.num_actions:
        raise InputError(f"`data_dir` {source.folder}: has no actions to take labels from")
    if num > len(source):
        raise InputError(f"`labels` {num}: {source.folder} has {len(source)} clips, and takes one label from each")
    rng = np.random.default_rng(seed)
    clips, positions = rng.permutation(len(source)), rng.random(len(source))
    graphdef, variables = nnx.split(agent)

    @jax.jit
    def look(variables: Any, frames_BSHWC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model: Any = nnx.merge(graphdef, variables)
        frames = frames_BSHWC.astype(jnp.float32) / 255
        codes_BTm1 = model.lam.infer(frames)
        hidden_BM = model.policy(frames[:, -1 - context : -1]).hidden_BTM[:, -1]
        return codes_BTm1[:, -1], codes_BTm1[:, -2], hidden_BM

    parts: list[Any] = []
    for start in range(0, num, rows):
        chosen = slice(start, start + rows)
        batch = source.windows(clips[chosen].tolist(), positions[chosen].tolist())
        parts.append([*map(np.asarray, look(variables, batch.frames_BTHWC)), batch.actions_BT[:, S - 2]])
    if not parts:
        none_N = np.zeros(0, np.int32)
        return Labelled(none_N, none_N, np.zeros((0, agent.cfg.policy.width), np.float32), none_N)
    return Labelled(*(np.concatenate(xs)[:num] for xs in zip(*parts, strict=True)))
