"""Clips that are shorter than those beside them: what fills them up counts nothing.

Frames depend on earlier ones alone, so what follows a clip's last frame changes nothing that is computed of it; only
means over a batch must leave it out. Weights say how: 1 for a true frame, 0 for others; None: all are true.
"""

import jax
import jax.numpy as jnp


def even(weight_BT: jax.Array | None, first: int = 0) -> jax.Array | None:
    """Weights of a whole batch, scaled so that those of frames from number `first` on have a mean of 1; none before.

    Then a mean over parts of the batch, of what counts so much, is one over its true frames.
    """
    if weight_BT is None:
        return None
    counted_BT = weight_BT.at[:, :first].set(0.0)
    return counted_BT / jnp.mean(counted_BT[:, first:])


def after_first(weight_BT: jax.Array | None) -> jax.Array | None:
    """Weights of the transitions between frames, (B, T - 1): one to a true frame comes from a true frame."""
    return None if weight_BT is None else weight_BT[:, 1:]


def each_token(weight_BT: jax.Array | None, num_patches: int) -> jax.Array | None:
    """Weights of the tokens of frames, (B, T, N)."""
    return None if weight_BT is None else jnp.repeat(weight_BT[..., None], num_patches, axis=2)


def mean_of_true(values: jax.Array, weight_X: jax.Array | None) -> jax.Array:
    """Mean of values, whose first axes are those of the weights."""
    if weight_X is None:
        return jnp.mean(values)
    return jnp.mean(values * weight_X.reshape(*weight_X.shape, *(1,) * (values.ndim - weight_X.ndim)))
