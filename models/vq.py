"""Vector quantisation with a codebook of directions (van den Oord et al. 2017; cosine form, Yu et al. 2022).

The codebook follows the encoder by a moving average instead of a gradient; codes that nobody uses are moved to where
the encoder is. Both happen in `update`, once a step, and their state is saved with the model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.padding import mean_of_true


class Codebook(nnx.Variable):
    """State of a codebook: changed by training, but not by gradients."""


class Quantized(NamedTuple):
    """What a quantiser gives for latents of any number of axes.

    vectors_XL: Unit codes, with the latents' gradient (straight through); unit latents while unquantised.
    codes_X: int32.
    latents_XL: The latents as they came, float32, without gradient; what `update` learns from.
    commitment: Mean squared distance of the unit latents from their codes, float32.
    """

    vectors_XL: jax.Array
    codes_X: jax.Array
    latents_XL: jax.Array
    commitment: jax.Array


def unit(x_XL: jax.Array) -> jax.Array:
    """Scales vectors to length 1 in float32; zero stays zero."""
    x_XL = x_XL.astype(jnp.float32)
    return x_XL * jax.lax.rsqrt(jnp.sum(x_XL * x_XL, axis=-1, keepdims=True) + 1e-12)


def batch_mean(latents_XL: jax.Array, weight_X: jax.Array | None = None) -> jax.Array:
    """Mean (L) of latents, without gradient; of those that count (see `models.padding`)."""
    latents_BL = latents_XL.reshape(-1, latents_XL.shape[-1])
    if weight_X is None:
        return jax.lax.stop_gradient(jnp.mean(latents_BL, axis=0))
    weight_B = weight_X.reshape(-1)
    return jax.lax.stop_gradient(weight_B @ latents_BL / jnp.maximum(jnp.sum(weight_B), 1e-6))


def first_of_largest(scores_XK: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis as int32, in two plain reductions, which a CPU has instructions for."""
    K = scores_XK.shape[-1]
    is_largest_XK = scores_XK == jnp.max(scores_XK, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest_XK, jnp.arange(K, dtype=jnp.int32), K - 1), axis=-1)


class VectorQuantizer(nnx.Module):
    """Replaces each latent by the code nearest in direction.

    Args:
      num_codes: K.
      code_width: L.
      decay: Of the moving average that codes follow.
      centred: Look at latents from their mean: the batch's in training, else its moving average. Without, what latents
        have in common leaves them in one narrow cone and, where codes are few, in one code (Łańcucki et al. 2020).
      reset_after: Steps without use after which a code is moved to a random latent of the batch; 0 never.
      unquantized_steps: Steps at the start of training in which latents pass as they are, while codes follow them. A
        decoder that meets codes before they mean anything learns to ignore them.
    """

    def __init__(
        self,
        num_codes: int,
        code_width: int,
        decay: float,
        reset_after: int,
        rngs: nnx.Rngs,
        centred: bool = False,
        unquantized_steps: int = 0,
    ):
        self.decay = decay
        self.reset_after = reset_after
        self.centred = centred
        self.unquantized_steps = unquantized_steps
        self.updates = Codebook(jnp.int32(0))
        # Only directions count; lengths weigh a code's past against the batch in `update`.
        self.sums_KL = Codebook(unit(jax.random.normal(rngs.params(), (num_codes, code_width))))
        self.idle_K = Codebook(jnp.zeros(num_codes, jnp.int32))
        self.centre_L = Codebook(jnp.zeros(code_width))

    @property
    def codebook_KL(self) -> jax.Array:
        """The codes, of length 1."""
        return unit(self.sums_KL[...])

    def __call__(self, z_XL: jax.Array, train: bool = False, weight_X: jax.Array | None = None) -> Quantized:
        """Quantises latents; weights say what counts in a batch's means (see `models.padding`)."""
        latents_XL = z_XL.astype(jnp.float32)
        z_XL = unit(latents_XL - (batch_mean(latents_XL, weight_X) if train and self.centred else self.centre_L[...]))
        # float32 products also where the rest is bfloat16: near-ties decide which codes are learned.
        scores_XK = jnp.einsum("...l,kl->...k", z_XL, self.codebook_KL, precision=jax.lax.Precision.HIGHEST)
        codes_X = first_of_largest(jax.lax.stop_gradient(scores_XK))
        vectors_XL = self.codebook_KL[codes_X]
        commitment = mean_of_true(jnp.sum(jnp.square(z_XL - vectors_XL), axis=-1), weight_X)
        out_XL = z_XL + jax.lax.stop_gradient(vectors_XL - z_XL)
        if train and self.unquantized_steps:
            quantizing = self.updates[...] >= self.unquantized_steps
            out_XL, commitment = jnp.where(quantizing, out_XL, z_XL), jnp.where(quantizing, commitment, 0.0)
        return Quantized(out_XL, codes_X, jax.lax.stop_gradient(latents_XL), commitment)

    def lookup(self, codes_X: jax.Array) -> jax.Array:
        """Codes to unit vectors (..., L)."""
        return self.codebook_KL[codes_X]

    def update(
        self, latents_XL: jax.Array, codes_X: jax.Array, key: jax.Array, weight_X: jax.Array | None = None
    ) -> None:
        """Moves codes towards the latents of a whole batch that chose them, and resets idle ones.

        Args:
          latents_XL: Of the batch, as `__call__` returns them.
          codes_X: The codes they chose.
          key: Chooses which latents replace idle codes.
          weight_X: Latents without weight are not there.
        """
        sums_KL, idle_K = self.sums_KL[...], self.idle_K[...]
        num_codes, width = sums_KL.shape
        latents_BL, codes_B = latents_XL.reshape(-1, width), codes_X.reshape(-1)
        true_B = jnp.ones(len(codes_B)) if weight_X is None else (weight_X.reshape(-1) > 0).astype(jnp.float32)
        if self.centred:
            mean_L = batch_mean(latents_BL, weight_X if weight_X is None else true_B)
            self.centre_L[...] = self.decay * self.centre_L[...] + (1 - self.decay) * mean_L
            latents_BL -= mean_L
        latents_BL = unit(latents_BL)
        counts_K = jnp.zeros(num_codes).at[codes_B].add(true_B)
        batch_KL = jnp.zeros_like(sums_KL).at[codes_B].add(latents_BL * true_B[:, None])
        used_K = counts_K > 0
        moved_KL = self.decay * sums_KL + (1 - self.decay) * batch_KL
        sums_KL = jnp.where(used_K[:, None], moved_KL, sums_KL)
        idle_K = jnp.where(used_K, 0, idle_K + 1)
        if self.reset_after:
            reset_K = idle_K >= self.reset_after
            # Latents far from their code are the likeliest (k-means++), and none is taken twice while there are enough.
            distances_B = jnp.sum(jnp.square(latents_BL - unit(sums_KL)[codes_B]), axis=-1)
            scores_B = jnp.log(distances_B + 1e-9) + jax.random.gumbel(key, distances_B.shape)
            _, order = jax.lax.top_k(jnp.where(true_B > 0, scores_B, -jnp.inf), min(num_codes, len(latents_BL)))
            there = len(order) if weight_X is None else jnp.clip(jnp.sum(true_B).astype(jnp.int32), 1, len(order))
            fresh_KL = latents_BL[order[jnp.cumsum(reset_K) % there]]
            sums_KL = jnp.where(reset_K[:, None], fresh_KL, sums_KL)
            idle_K = jnp.where(reset_K, 0, idle_K)
        self.sums_KL[...] = sums_KL
        self.idle_K[...] = idle_K
        self.updates[...] += 1
