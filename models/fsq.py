"""Finite scalar quantisation: a fixed grid in place of a learned codebook (Mentzer et al. 2023).

Each number of a latent is squashed to (-1, 1) and rounded to one of a few levels; a code is one choice for each. There
are no codes to move, so none can die or settle where chance put it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError
from models.vq import Codebook, Quantized, VectorQuantizer, batch_mean


class FiniteScalarQuantizer(nnx.Module):
    """Rounds each number of a latent to one of a few levels; in the place of `models.vq.VectorQuantizer`.

    Args:
      levels: How many values each of the L numbers can take, at least 2; their product is the number of codes.
      decay: Of the moving average of the latents' mean, if `centred`.
      centred, unquantized_steps: See `VectorQuantizer`.
    """

    def __init__(self, levels: Sequence[int], decay: float, centred: bool = False, unquantized_steps: int = 0):
        self.levels, self.decay = tuple(levels), decay
        self.centred, self.unquantized_steps = centred, unquantized_steps
        self.updates = Codebook(jnp.int32(0))
        self.centre_L = Codebook(jnp.zeros(len(self.levels)))

    @property
    def codebook_KL(self) -> jax.Array:
        """All codes; their mean length is about 1."""
        return self.lookup(jnp.arange(math.prod(self.levels)))

    def __call__(self, z_XL: jax.Array, train: bool = False, weight_X: jax.Array | None = None) -> Quantized:
        """Quantises latents; weights say what counts in a batch's mean."""
        latents_XL = z_XL.astype(jnp.float32)
        centre_L = batch_mean(latents_XL, weight_X) if train and self.centred else self.centre_L[...]
        u_XL = jnp.tanh(latents_XL - centre_L)
        steps_L = jnp.array(self.levels, jnp.float32) - 1
        places_XL = jax.lax.stop_gradient(jnp.round((u_XL + 1) / 2 * steps_L))
        codes_X = jnp.sum(places_XL.astype(jnp.int32) * self._strides_L, axis=-1)
        rounded_XL = places_XL / steps_L * 2 - 1
        out_XL = u_XL + jax.lax.stop_gradient(rounded_XL - u_XL)
        if train and self.unquantized_steps:
            out_XL = jnp.where(self.updates[...] >= self.unquantized_steps, out_XL, u_XL)
        scale = len(self.levels) ** -0.5
        return Quantized(scale * out_XL, codes_X, jax.lax.stop_gradient(latents_XL), jnp.float32(0.0))

    def lookup(self, codes_X: jax.Array) -> jax.Array:
        """Codes to vectors (..., L)."""
        places_XL = codes_X[..., None] // self._strides_L % jnp.array(self.levels)
        return (places_XL / (jnp.array(self.levels) - 1) * 2 - 1) * len(self.levels) ** -0.5

    def update(
        self, latents_XL: jax.Array, codes_X: jax.Array, key: jax.Array, weight_X: jax.Array | None = None
    ) -> None:
        """Follows the latents' mean; `codes_X` and `key` are for a learned codebook."""
        if self.centred:
            self.centre_L[...] = self.decay * self.centre_L[...] + (1 - self.decay) * batch_mean(latents_XL, weight_X)
        self.updates[...] += 1

    @property
    def _strides_L(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)


def check_levels(cfg: Any) -> None:
    """Refuses levels that do not make up the codes of a tokenizer's or a LAM's configuration.

    Raises:
      InputError: They do not.
    """
    if cfg.levels and (
        min(cfg.levels) < 2 or (math.prod(cfg.levels), len(cfg.levels)) != (cfg.num_codes, cfg.code_width)
    ):
        raise InputError(
            f"`levels` {' '.join(map(str, cfg.levels))}: must be at least 2 each, as many as `code_width` "
            f"{cfg.code_width}, and their product `num_codes` {cfg.num_codes}",
            of=type(cfg),
        )


def quantizer(cfg: Any, rngs: nnx.Rngs, centred: bool = False) -> VectorQuantizer | FiniteScalarQuantizer:
    """What a tokenizer's or a LAM's configuration asks for."""
    if cfg.levels:
        return FiniteScalarQuantizer(cfg.levels, cfg.codebook_decay, centred, cfg.unquantized_steps)
    sizes = cfg.num_codes, cfg.code_width, cfg.codebook_decay, cfg.reset_after
    return VectorQuantizer(*sizes, rngs, centred=centred, unquantized_steps=cfg.unquantized_steps)
