"""Steps from noise to a frame, and what is drawn to learn them (shortcut models, Frans et al. 2025)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.dynamics_config import FlowConfig
from models.nn import patchify

WAVES = 4
"""Frequencies by which the head is told a level and a step's size."""


class Drawn(NamedTuple):
    """What training draws; Tm1 are the frames after the first, which are to be made, and X some of them.

    context_BTNP: Noise of what the backbone reads.
    own_BT: Which past frames give way to the model's own; never the first.
    start_BTm1NP: Noise that frames are made of, of unit variance.
    level_BTm1: How far each has come, from 0, all noise, to 1.
    size_BTm1: How far the next step is to lead.
    halved_BX: Which frames learn a step from the model's own two steps of half its size.
    halved_level_BX, halved_size_BX: Of these.
    counts_BTm1: What the frames count (see `models.padding`); None: all alike.
    untold_BTm1: Of which frames the head is not told the action; None: of none.
    """

    context_BTNP: jax.Array
    own_BT: jax.Array
    start_BTm1NP: jax.Array
    level_BTm1: jax.Array
    size_BTm1: jax.Array
    halved_BX: jax.Array
    halved_level_BX: jax.Array
    halved_size_BX: jax.Array
    counts_BTm1: jax.Array | None = None
    untold_BTm1: jax.Array | None = None


def draw_steps(cfg: FlowConfig, key: jax.Array, num_clips: int, frames_TNP: tuple[int, ...]) -> Drawn:
    """Half of the frames are made in one step, others in the smallest; of all of them up to a quarter learn from two.

    Args:
      frames_TNP: Shape of a clip's values.
    """
    keys = iter(jax.random.split(key, 9))
    B, T = num_clips, frames_TNP[0]
    share_B1 = jax.random.uniform(next(keys), (B, 1))
    own_BT = jax.random.bernoulli(next(keys), share_B1, (B, T)).at[:, 0].set(False)
    context_BTNP = 2.0 * cfg.context_noise * jax.random.normal(next(keys), (B, *frames_TNP))
    start_BTm1NP = jax.random.normal(next(keys), (B, T - 1, *frames_TNP[1:]))
    plain_BTm1 = jax.random.bernoulli(next(keys), 0.5 if cfg.flow_steps > 1 else 1.0, (B, T - 1))
    level_BTm1 = jnp.where(plain_BTm1, 0.0, jax.random.uniform(next(keys), (B, T - 1)))
    size_BTm1 = jnp.where(plain_BTm1, 1.0, 1.0 / cfg.flow_steps)
    # Sizes between the smallest and the whole are learned from two steps of half of them.
    between = cfg.flow_steps.bit_length() - 2
    count = (T - 1) // 4 if between > 0 else 0
    order_BTm1 = jnp.argsort(jax.random.uniform(next(keys), (B, T - 1)), axis=1)
    steps_BX = 2 ** jax.random.randint(next(keys), (B, count), 1, max(between, 1) + 1)
    at_BX = jnp.floor(jax.random.uniform(next(keys), (B, count)) * steps_BX)
    halved = order_BTm1[:, :count], at_BX / steps_BX, 1.0 / steps_BX
    untold_BTm1 = None
    if cfg.action_dropout:
        apart = jax.random.fold_in(key, 9)  # a key beyond the nine; other draws are as they are without this one
        untold_BTm1 = jax.random.bernoulli(apart, cfg.action_dropout, (B, T - 1))
    return Drawn(context_BTNP, own_BT, start_BTm1NP, level_BTm1, size_BTm1, *halved, untold_BTm1=untold_BTm1)


def waves(level_BT: jax.Array, size_BT: jax.Array) -> jax.Array:
    """Levels and sizes as the head is told them, (B, T, 4 · `WAVES`)."""
    told = jnp.stack([level_BT, size_BT], axis=-1)[..., None] * jnp.pi * 2.0 ** jnp.arange(-1, WAVES - 1)
    told = told.reshape(*level_BT.shape, -1)
    return jnp.concatenate([jnp.sin(told), jnp.cos(told)], axis=-1)


def mixed(noise_BTNP: jax.Array, values_BTNP: jax.Array, level_BT: jax.Array) -> jax.Array:
    """What is on its way from noise to a frame, and has come as far as its level."""
    return noise_BTNP + level_BT[:, :, None, None] * (values_BTNP - noise_BTNP)


def towards(noisy_BTNP: jax.Array, made_BTNP: jax.Array, level_BT: jax.Array, size: jax.Array) -> jax.Array:
    """One step on the straight way from noise to a predicted frame; the last one ends there."""
    share_BT11 = jnp.minimum(size / (1.0 - level_BT), 1.0)[:, :, None, None]
    return noisy_BTNP + share_BT11 * (made_BTNP - noisy_BTNP)


def edge_error(made_BTHWC: jax.Array, goal_BTHWC: jax.Array, patch_size: int) -> jax.Array:
    """By how much edges are too weak or too strong, (B, T): a mean over patches, wherever in one they lie.

    Squared error alone blurs an edge whose place is unsure. The strength is the root mean square of the differences of
    neighbours, which a blurred edge has less of.
    """

    def strength(frames_BTHWC: jax.Array) -> jax.Array:
        padded = jnp.pad(frames_BTHWC, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
        down, across = jnp.diff(padded[:, :, :, :-1], axis=2), jnp.diff(padded[:, :, :-1], axis=3)
        edges = patchify(jnp.square(jnp.concatenate([down, across], axis=-1)), patch_size)
        return jnp.sqrt(jnp.mean(edges.reshape(*edges.shape[:3], patch_size**2, -1), axis=3) + 1e-4)

    return jnp.mean(jnp.abs(strength(made_BTHWC) - strength(goal_BTHWC)), axis=(2, 3))


def pick(values: jax.Array, frames_BX: jax.Array) -> jax.Array:
    """Those of some frames, of arrays (B, T, ...)."""
    return jax.vmap(lambda clip, frames: clip[frames])(values, frames_BX)


def put(values: jax.Array, frames_BX: jax.Array, others: jax.Array) -> jax.Array:
    """Arrays (B, T, ...) with others in the place of some frames'."""
    return jax.vmap(lambda clip, frames, new: clip.at[frames].set(new))(values, frames_BX, others)
