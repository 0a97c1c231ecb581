"""Actions as a dynamics model takes them: one integer, or a row of columns.

A row is float32: of a discrete column the number of its value, of another a real number. A row of NaN is no action, as
is -1 where an action is one integer. Names such as `actions_BT` leave out the axis of the columns.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import init
from models.kernels import whole
from models.nn import Compute, linear

if TYPE_CHECKING:
    from models.dynamics import DynamicsConfig

LARGEST = 10.0  # standard deviations of a real number that still count


class ColumnEmbedding(nnx.Module):
    """Embeds each discrete column by a table and all real ones by a small network; the sum stands for the action."""

    def __init__(self, cfg: "DynamicsConfig", compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        num_real = cfg.action_values.count(0)
        if any(cfg.action_values):
            self.table = init.embeddings(rngs, sum(cfg.action_values), cfg.width)
        if num_real:
            self.real_in = linear(num_real, cfg.width, compute, rngs, bias=True)
            self.real_out = linear(cfg.width, cfg.width, compute, rngs, bias=True)

    def __call__(self, actions_XA: jax.Array) -> jax.Array:
        """Embeddings (..., M), float32."""
        values_A = np.array(self.cfg.action_values)
        discrete, real = np.flatnonzero(values_A), np.flatnonzero(values_A == 0)
        parts, terms = [], 0
        if len(discrete):
            first = np.cumsum([0, *values_A[discrete][:-1]])  # row of each column's first value
            number = jnp.nan_to_num(actions_XA[..., discrete])
            row = first + jnp.clip(number, 0, values_A[discrete] - 1).astype(jnp.int32)
            parts.append(jnp.sum(whole(self.table[...])[row], axis=-2))
            terms += len(discrete)
        if len(real):
            mean, scale = (np.array(x, np.float32)[real] for x in (self.cfg.action_mean, self.cfg.action_scale))
            number = jnp.clip(jnp.nan_to_num((actions_XA[..., real] - mean) / scale), -LARGEST, LARGEST)
            parts.append(self.real_out(nnx.gelu(self.real_in(number))).astype(jnp.float32))
            terms += 1
        return sum(parts[1:], parts[0]) * terms**-0.5


def no_actions(cfg: "DynamicsConfig", shape: tuple[int, ...]) -> np.ndarray:
    """What stands for unknown actions, int32 of a shape, or rows."""
    if cfg.action_values:
        return np.full((*shape, len(cfg.action_values)), np.nan, np.float32)
    return np.full(shape, -1, np.int32)


def random_actions(cfg: "DynamicsConfig", key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform actions, int32 of a shape, or rows; real numbers are spread as in the dataset."""
    if not cfg.action_values:
        return jax.random.randint(key, shape, 0, cfg.num_actions)
    values_A, shape = np.array(cfg.action_values), (*shape, len(cfg.action_values))
    mean_A, scale_A = (np.array(x, np.float32) for x in (cfg.action_mean, cfg.action_scale))
    whole_key, real_key = jax.random.split(key)
    whole = jnp.floor(jax.random.uniform(whole_key, shape) * values_A)
    return jnp.where(values_A > 0, whole, mean_A + scale_A * jax.random.normal(real_key, shape)).astype(jnp.float32)


def actions_to(actions_BTm1: jax.Array) -> jax.Array:
    """From actions between frames to the action that led to each frame (B, T); none to the first."""
    none = -1 if jnp.issubdtype(actions_BTm1.dtype, jnp.integer) else jnp.nan
    return jnp.pad(actions_BTm1, ((0, 0), (1, 0), *((0, 0),) * (actions_BTm1.ndim - 2)), constant_values=none)
