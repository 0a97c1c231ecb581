"""Plays by a policy: what it has seen, how it chooses, and which true action a latent one stands for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agents.labels import ActionMap
from models.policy import Agent

ROWS = 64  # levels for which a policy chooses at once


class Chooser:
    """An agent's policy, compiled once, for any number of players, of whom it serves `rows` at once."""

    def __init__(self, agent: Agent, rows: int = ROWS):
        self.context, self._rows = agent.cfg.policy.context, rows
        graphdef, self._variables = nnx.split(agent)

        @jax.jit
        def choose(variables: Any, frames_NSHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = nnx.merge(graphdef, variables).policy(frames_NSHWC.astype(jnp.float32) / 255)
            return chosen.logits_BTA[:, -1], chosen.hidden_BTM[:, -1]

        self._choose = choose

    def __call__(self, frames_NSHWC: np.ndarray) -> tuple[np.ndarray, ...]:
        """From windows of `context` frames, uint8, to logits (N, A) and hidden states (N, M)."""
        return in_rows(lambda frames: self._choose(self._variables, frames), frames_NSHWC, self._rows)


class PolicyPlayer:
    """Plays N levels side by side, as `sources.once.Player`.

    With a map an action is as likely as all latent actions together that may stand for it.

    Args:
      temperature: Of the choice among actions; 0 takes the likeliest one. Who always does the likeliest
        thing can stand before a wall for ever.
      action_map: From latent actions to the game's; None where the policy's are the game's own.
      seed: Of all choices. Those in a level do not depend on how the others go.
    """

    def __init__(self, choose: Chooser, temperature: float, action_map: ActionMap | None, seed: int):
        self._choose, self._temperature = choose, temperature
        self._map, self._rng = action_map, np.random.default_rng(seed)
        self._seen_NSHWC: np.ndarray | None = None
        self._before_N = np.zeros(0, np.int32)

    def see(self, frames_NHWC: np.ndarray, first_N: np.ndarray | None = None) -> np.ndarray:
        """Takes note of what is seen, by itself where somebody else acts: the last frames (N, S, H, W, C).

        Args:
          first_N: Whether a level begins, where one follows another: what was before it is forgotten.
        """
        if self._seen_NSHWC is None:  # what was before the first frame counts as that frame
            self._seen_NSHWC = np.repeat(frames_NHWC[:, None], self._choose.context, axis=1)
            self._before_N = np.full(len(frames_NHWC), -1, np.int32)
        else:
            self._seen_NSHWC = np.concatenate([self._seen_NSHWC[:, 1:], frames_NHWC[:, None]], axis=1)
        if first_N is not None:
            self._seen_NSHWC[first_N] = frames_NHWC[first_N, None]
            self._before_N[first_N] = -1
        return self._seen_NSHWC

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray, first_N: np.ndarray | None = None) -> np.ndarray:
        """Actions (N,) int32."""
        seen_NSHWC = self.see(frames_NHWC, first_N)
        die_N = self._rng.random(len(frames_NHWC))
        playing = np.flatnonzero(playing_N)
        logits_NA, hidden_NM = self._choose(seen_NSHWC[playing])
        if self._map is None:
            shares_NA = shares(logits_NA)
        else:
            codes_NK, before_N = shares(logits_NA), self._before_N[playing]
            each = [np.full(len(playing), k) for k in range(codes_NK.shape[1])]
            meant_NKA = np.stack([self._map.shares(codes_N, before_N, hidden_NM) for codes_N in each], axis=1)
            both_NKA = codes_NK[..., None] * meant_NKA
            shares_NA = both_NKA.sum(axis=1)
        chosen = draw(sharpened(shares_NA, self._temperature), die_N[playing])
        if self._map is not None:  # the latent action that most likely stood behind it
            self._before_N[playing] = both_NKA[np.arange(len(playing)), :, chosen].argmax(axis=1)
        actions_N = np.zeros(len(frames_NHWC), np.int32)
        actions_N[playing] = chosen
        return actions_N


def in_rows(fn: Any, frames_NX: np.ndarray, at_once: int) -> tuple[np.ndarray, ...]:
    """`fn` on `at_once` rows at a time, the last ones filled up: one shape means one compilation."""
    parts = []
    for start in range(0, len(frames_NX), at_once):
        rows = frames_NX[start : start + at_once]
        filled = np.concatenate([rows, np.repeat(rows[:1], at_once - len(rows), axis=0)])
        parts.append([np.asarray(x)[: len(rows)] for x in fn(filled)])
    return tuple(np.concatenate(xs) for xs in zip(*parts, strict=True))


def shares(logits_NA: np.ndarray) -> np.ndarray:
    """Probabilities (N, A)."""
    weights = np.exp((logits_NA - logits_NA.max(axis=1, keepdims=True)).astype(np.float64))
    return weights / weights.sum(axis=1, keepdims=True)


def sharpened(shares_NA: np.ndarray, temperature: float) -> np.ndarray:
    """The same at a temperature: powers of it, of which 0 leaves the likeliest alone."""
    if temperature == 0:
        return np.eye(shares_NA.shape[1])[shares_NA.argmax(axis=1)]
    weights = (shares_NA / shares_NA.max(axis=1, keepdims=True)) ** (1 / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


def draw(shares_NA: np.ndarray, dice_N: np.ndarray) -> np.ndarray:
    """One number of each row by its probabilities, int32: where the die in [0, 1) falls."""
    return np.minimum((shares_NA.cumsum(axis=1) <= dice_N[:, None]).sum(axis=1), shares_NA.shape[1] - 1).astype(
        np.int32
    )
