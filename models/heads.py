"""Heads: what an action earns, and whether it ends the level, judged by a dynamics model's hidden states.

An outcome belongs to an action: the reward that the action after frame t earns, and the end that it makes, come with
frame t + 1 and are predicted from frame t, its past, and the action. Frame t + 1 is not looked at, for after an end
there is none: a recorded clip stops at the last frame of its level. Nor is a latent action, which only frame t + 1
would tell: there heads know the action that led to frame t, and judge the next one as the training data chose it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import init
from models.ends import GOES_ON, TIME_UP
from models.kernels import RMSNorm
from models.nn import Compute, linear

NAMES = ("reward", "end")
BINS = 41
QUERIES = 4  # places that a head looks at, each a weighted mean over all of them


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Which heads a world has.

    names: Of `NAMES`.
    sees_action: Whether they see the action that they judge: where it is the dataset's own.
    """

    names: tuple[str, ...]
    sees_action: bool


class Judged(NamedTuple):
    """What actions lead to, float32.

    reward_X: What each is expected to earn; 0 without that head.
    end_X: Probability that it ends the level, time limits aside; 0 without that head.
    solved_X: Probability that it ends the level because that is solved; at most `end_X`.
    """

    reward_X: jax.Array
    end_X: jax.Array
    solved_X: jax.Array


class Head(nnx.Module):
    """A small network on the hidden states of a frame's N places and, if it is known, the action after it."""

    def __init__(self, places: int, width: int, outputs: int, sees_action: bool, compute: Compute, rngs: nnx.Rngs):
        self.norm = RMSNorm(width)
        self.place_NM = init.embeddings(rngs, places, width)  # hidden states hardly say where they stand
        self.look = linear(width, QUERIES, compute, rngs)
        self.frame_in = linear(QUERIES * width, width, compute, rngs, bias=True)
        if sees_action:
            self.action_in = linear(width, width, compute, rngs)
        self.middle = linear(width, width, compute, rngs, bias=True)
        self.out = linear(width, outputs, compute, rngs, bias=True)
        # So large rewards of either sign, until one is seen, weigh the same, and cancel.
        self.out.kernel[...] = jnp.zeros_like(self.out.kernel[...])

    def __call__(self, hidden_XNM: jax.Array, action_XM: jax.Array | None) -> jax.Array:
        """Logits (..., outputs), float32."""
        x_XNM = self.norm(hidden_XNM) + self.place_NM[...].astype(hidden_XNM.dtype)
        weights_XNQ = jax.nn.softmax(self.look(x_XNM).astype(jnp.float32), axis=-2).astype(x_XNM.dtype)
        seen_XQM = jnp.einsum("...nq,...nm->...qm", weights_XNQ, x_XNM)
        x_XM = self.frame_in(seen_XQM.reshape(*seen_XQM.shape[:-2], -1))
        if action_XM is not None:
            x_XM += self.action_in(action_XM.astype(x_XM.dtype))
        return self.out(nnx.gelu(self.middle(nnx.gelu(x_XM)))).astype(jnp.float32)


class Heads(nnx.Module):
    """Those of a world; they learn from the dynamics model and teach it nothing."""

    def __init__(self, cfg: HeadsConfig, places: int, width: int, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        if "reward" in cfg.names:
            self.reward = Head(places, width, BINS, cfg.sees_action, compute, rngs)
        if "end" in cfg.names:
            self.end = Head(places, width, 3, cfg.sees_action, compute, rngs)  # goes on, lost, solved

    def __call__(self, hidden_XNM: jax.Array, action_XM: jax.Array) -> Judged:
        """Judges actions.

        Args:
          hidden_XNM: Hidden states of the frames after which they are taken.
          action_XM: Their embeddings; of no account where the heads do not see them.
        """
        hidden_XNM, action = self._given(hidden_XNM, action_XM)
        none_X = jnp.zeros(hidden_XNM.shape[:-2], jnp.float32)
        reward_X, end_X, solved_X = none_X, none_X, none_X
        if "reward" in self.cfg.names:
            reward_X = jax.nn.softmax(self.reward(hidden_XNM, action)) @ bins()
        if "end" in self.cfg.names:
            p_X3 = jax.nn.softmax(self.end(hidden_XNM, action))
            end_X, solved_X = p_X3[..., 1] + p_X3[..., 2], p_X3[..., 2]
        return Judged(reward_X, end_X, solved_X)

    def loss(
        self, hidden_BTNM: jax.Array, action_BTM: jax.Array, rewards_BT: jax.Array, ends_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropies in nats, and what an average precision is made of.

        Args:
          rewards_BT, ends_BT: What the action after each frame earned, and how it ended the level; None of a head that
            is not there.
        Returns:
          The loss, and metrics: `reward_loss`, `end_loss`; `reward_ap`, `end_ap`: (B, T, 2), score and 1 for what
          earned something or was an end, NaN where time was up.
        """
        hidden_BTNM, action = self._given(hidden_BTNM, action_BTM)
        judged = self(hidden_BTNM, action_BTM)
        metrics = {}
        if "reward" in self.cfg.names:
            log_p_BTK = jax.nn.log_softmax(self.reward(hidden_BTNM, action))
            metrics["reward_loss"] = -jnp.mean(jnp.sum(two_hot(rewards_BT) * log_p_BTK, axis=-1))
            metrics["reward_ap"] = jnp.stack([judged.reward_X, (rewards_BT > 0).astype(jnp.float32)], axis=-1)
        if "end" in self.cfg.names:
            log_p_BT3 = jax.nn.log_softmax(self.end(hidden_BTNM, action))
            ended_BT = jnp.logaddexp(log_p_BT3[..., 1], log_p_BT3[..., 2])
            log_p_BT5 = jnp.stack([*(log_p_BT3[..., i] for i in range(3)), ended_BT, jnp.zeros_like(ended_BT)], axis=-1)
            way_BT1 = ends_BT[..., None].astype(jnp.int32)
            metrics["end_loss"] = -jnp.mean(jnp.take_along_axis(log_p_BT5, way_BT1, axis=-1))
            is_end_BT = jnp.where(ends_BT == TIME_UP, jnp.nan, (ends_BT != GOES_ON).astype(jnp.float32))
            metrics["end_ap"] = jnp.stack([judged.end_X, is_end_BT], axis=-1)
        return sum(metrics[f"{name}_loss"] for name in self.cfg.names), metrics  # type: ignore[return-value]

    def _given(self, hidden_XNM: jax.Array, action_XM: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """What the heads may see, through which no gradient goes back."""
        return jax.lax.stop_gradient((hidden_XNM, action_XM if self.cfg.sees_action else None))


@functools.cache
def bins() -> np.ndarray:
    """Rewards (`BINS`,) of which each expected one is a mean: dense about 0, and up to ±22,000 (Hafner et al. 2023)."""
    x = np.linspace(-10.0, 10.0, BINS)
    return (np.sign(x) * np.expm1(np.abs(x))).astype(np.float32)


def two_hot(reward_X: jax.Array) -> jax.Array:
    """Weights (..., `BINS`) of the two bins beside each reward, whose mean it is."""
    edges = jnp.asarray(bins())
    x_X = jnp.clip(reward_X.astype(jnp.float32), edges[0], edges[-1])
    above_X = jnp.clip(jnp.searchsorted(edges, x_X, side="right"), 1, BINS - 1)
    low_X, high_X = edges[above_X - 1], edges[above_X]
    share_X1 = ((x_X - low_X) / (high_X - low_X))[..., None]
    hot = functools.partial(jax.nn.one_hot, num_classes=BINS)
    return (1 - share_X1) * hot(above_X - 1) + share_X1 * hot(above_X)
