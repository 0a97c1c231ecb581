"""What latent actions mean to a game: maps that are learned from a few steps whose true actions are known."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import optimize, special

from models.errors import InputError
from models.genie import read_config
from models.policy import Agent
from utils.checkpoint import data_of
from utils.data import ClipSource

OTHERS = 5200  # steps without labels from which `ContextMap` learns
RIDGES = 3.0, 0.1  # how strongly its weights are held near 0: of what labels tell, and of what that tells of others
SPREAD = 0.25  # standard deviation of the latents that it sees


class Steps(NamedTuple):
    """Steps of clips.

    codes_N: The latent actions that the LAM infers for them; before_N: for the step before each.
    hidden_NM: The hidden state of the policy before them.
    around_NF: What the LAM makes codes of, at the step before each, at itself, and at the next.
    """

    codes_N: np.ndarray
    before_N: np.ndarray
    hidden_NM: np.ndarray
    around_NF: np.ndarray


class Labelled(NamedTuple):
    """Steps of which the true action is known."""

    steps: Steps
    actions_N: np.ndarray

    def first(self, num: int) -> "Labelled":
        """So many of them."""
        return Labelled(Steps(*(x[:num] for x in self.steps)), self.actions_N[:num])


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
        np.add.at(table_KA, (labelled.steps.codes_N, labelled.actions_N), 1.0)
        if not len(labelled.actions_N):
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
        np.add.at(self.table_KKA, (labelled.steps.before_N, labelled.steps.codes_N, labelled.actions_N), 1.0)
        total_KK1 = self.table_KKA.sum(axis=2, keepdims=True)
        self.table_KKA = np.where(total_KK1 > 0, self.table_KKA / np.maximum(total_KK1, 1), alone_KA)

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        return self.table_KKA[before_N, codes_N]


class ContextMap:
    """By the code and the policy's hidden state, learned from labelled steps and from many others.

    A few codes that tell how things move leave open which button is down; what the policy sees tells more, but not
    from a few labels. What the LAM makes codes of, before it makes them, and at the steps around, does: a first
    regression learns from the labelled steps what that tells, and says it of others; from these a second one learns
    what the code and the hidden state tell. Both are multinomial, logistic, and held near 0 by a ridge.
    """

    def __init__(self, labelled: Labelled, others: Steps, num_codes: int, num_actions: int):
        self.num_codes = num_codes
        scale_F = SPREAD / np.maximum(others.around_NF.std(axis=0), 1e-6)
        around = lambda steps: _with_bias(steps.around_NF * scale_F)
        known_NA = np.eye(num_actions)[labelled.actions_N]
        told_NA = special.softmax(around(others) @ regression(around(labelled.steps), known_NA, RIDGES[0]), axis=1)
        self.w_FA = regression(self._features(others.codes_N, others.hidden_NM), told_NA, RIDGES[1])

    def _features(self, codes_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        """The code, the hidden state at a length of about 2, and a bias."""
        hidden = 2 * hidden_NM / hidden_NM.shape[1] ** 0.5
        return _with_bias(np.concatenate([np.eye(self.num_codes)[codes_N], hidden], axis=1))

    def shares(self, codes_N: np.ndarray, before_N: np.ndarray, hidden_NM: np.ndarray) -> np.ndarray:
        return special.softmax(self._features(codes_N, hidden_NM) @ self.w_FA, axis=1)


def _with_bias(x_NF: np.ndarray) -> np.ndarray:
    return np.concatenate([x_NF, np.ones((len(x_NF), 1))], axis=1)


def regression(x_NF: np.ndarray, target_NA: np.ndarray, ridge: float) -> np.ndarray:
    """Weights (F, A) of a multinomial logistic regression on probabilities; the last of F is not held near 0."""
    F, A = x_NF.shape[1], target_NA.shape[1]
    held_F1 = np.ones((F, 1))
    held_F1[-1] = 0

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w_FA = flat.reshape(F, A)
        logs_NA = special.log_softmax(x_NF @ w_FA, axis=1)
        slope_FA = x_NF.T @ (np.exp(logs_NA) - target_NA) + ridge * held_F1 * w_FA
        return float(0.5 * ridge * np.sum(held_F1 * w_FA**2) - np.sum(target_NA * logs_NA)), slope_FA.reshape(-1)

    return optimize.minimize(loss, np.zeros(F * A), jac=True, method="L-BFGS-B").x.reshape(F, A)


def label(agent: Agent, source: ClipSource, num: int, seed: int) -> Labelled:
    """Draws steps of a dataset and asks for their true actions; fewer steps are the first of more.

    Each is of a window of its own, the last but one, so that the LAM sees what followed.

    Raises:
      InputError: The dataset has not as many clips, or no actions, or its windows are too short.
    """
    if not source.metadata.num_actions:
        raise InputError(f"`data_dir` {source.folder}: has no actions to take labels from")
    if num > len(source):
        raise InputError(f"`labels` {num}: {source.folder} has {len(source)} clips, and takes one label from each")
    rng = np.random.default_rng(seed)
    clips, positions = rng.permutation(len(source)), rng.random(len(source))
    steps, actions_NS = _look(agent, source, clips[: max(num, 1)], positions, last=True)
    return Labelled(Steps(*(x[:, -1] for x in steps)), actions_NS[:, -1]).first(num)


def others(agent: Agent, source: ClipSource, seed: int) -> Steps:
    """Draws steps of a dataset, whose actions are not looked at; raises as `label` does."""
    rng = np.random.default_rng([seed, 1])
    in_each = max(source.seq_len - 2 - _first(agent), 1)
    clips = rng.permutation(len(source))[: -(-OTHERS // in_each)]
    steps, _ = _look(agent, source, clips, rng.random(len(clips)), last=False)
    return Steps(*(x.reshape(-1, *x.shape[2:]) for x in steps))


def in_windows(agent: Agent, checkpoint: str, data_dir: str = "") -> ClipSource:
    """The clips that a policy learned from, or others, in windows as in its training, or, of latent actions, as long as
    it takes to look around a step."""
    seq_len = max(read_config(checkpoint)["train"]["seq_len"], _first(agent) + 3 if agent.lam else 0)
    return ClipSource(data_dir or data_of(checkpoint), "train", seq_len)


def _first(agent: Agent) -> int:
    """The first step of a window that has one before it, and all frames that the policy sees."""
    return max(agent.cfg.policy.context - 1, 1)


def _look(
    agent: Agent, source: ClipSource, clips_N: np.ndarray, positions_N: np.ndarray, last: bool, rows: int = 32
) -> tuple[Steps, np.ndarray]:
    """Of windows of clips the steps that have one before and one after, (N, S, ...), and their true actions (N, S).

    Args:
      last: The last of them alone.
    """
    context, T = agent.cfg.policy.context, source.seq_len
    first, end = _first(agent), T - 2
    if end <= first:
        raise InputError(f"`seq_len` {T}: windows of {first + 3} frames or more are needed, to look around a step")
    first = end - 1 if last else first
    graphdef, variables = nnx.split(agent)

    @jax.jit
    def look(variables: Any, frames_BTHWC: jax.Array) -> tuple[jax.Array, ...]:
        model: Any = nnx.merge(graphdef, variables)
        frames = frames_BTHWC.astype(jnp.float32) / 255
        acted = model.lam.act(frames)
        hidden_BSM = model.policy(frames[:, first - context + 1 : end]).hidden_BTM
        around_BSF = jnp.concatenate([acted.latents_XL[:, first + i : end + i] for i in (-1, 0, 1)], axis=-1)
        return acted.codes_X[:, first:end], acted.codes_X[:, first - 1 : end - 1], hidden_BSM, around_BSF

    N = len(clips_N)
    clips, positions = (np.pad(x, (0, -N % rows), mode="wrap") for x in (clips_N, positions_N[:N]))  # one compilation
    parts: list[Any] = []
    for start in range(0, N, rows):
        chosen = slice(start, start + rows)
        batch = source.windows(clips[chosen].tolist(), positions[chosen].tolist())
        parts.append([*map(np.asarray, look(variables, batch.frames_BTHWC)), batch.actions_BT[:, first:end]])
    *seen, actions = (np.concatenate(xs)[:N] for xs in zip(*parts, strict=True))
    return Steps(*seen), actions
