"""Vector quantisation with a codebook of directions (van den Oord et al. 2017; cosine form, Yu et al. 2022).

The codebook follows the encoder by a moving average instead of a gradient; codes that nobody uses are moved to where
the encoder is. Both happen in `update`, once a step, and their state is saved with the model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Codebook(nnx.Variable):
    """State of a codebook: changed by training, but not by gradients."""


class Quantized(NamedTuple):
    """What a quantiser gives for latents of shape (..., L).

    vectors: (..., L), unit codes, with the latents' gradient (straight through); unit latents while unquantised.
    codes: (...) int32.
    latents: (..., L), the latents as they came, float32, without gradient; what `update` learns from.
    commitment: Mean squared distance of the unit latents from their codes, float32.
    """

    vectors: jax.Array
    codes: jax.Array
    latents: jax.Array
    commitment: jax.Array


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors to length 1 in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def batch_mean(latents: jax.Array) -> jax.Array:
    """Mean (L) of latents (..., L), without gradient."""
    return jax.lax.stop_gradient(jnp.mean(latents.reshape(-1, latents.shape[-1]), axis=0))


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

    def __call__(self, z: jax.Array, train: bool = False) -> Quantized:
        """Quantises latents (..., L)."""
        latents = z.astype(jnp.float32)
        z = unit(latents - (batch_mean(latents) if train and self.centred else self.centre_L[...]))
        # float32 products also where the rest is bfloat16: near-ties decide which codes are learned.
        scores = jnp.einsum("...l,kl->...k", z, self.codebook_KL, precision=jax.lax.Precision.HIGHEST)
        codes = jnp.argmax(jax.lax.stop_gradient(scores), axis=-1).astype(jnp.int32)
        vectors = self.codebook_KL[codes]
        commitment = jnp.mean(jnp.sum(jnp.square(z - vectors), axis=-1))
        out = z + jax.lax.stop_gradient(vectors - z)
        if train and self.unquantized_steps:
            quantizing = self.updates[...] >= self.unquantized_steps
            out, commitment = jnp.where(quantizing, out, z), jnp.where(quantizing, commitment, 0.0)
        return Quantized(out, codes, jax.lax.stop_gradient(latents), commitment)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Codes (...) to unit vectors (..., L)."""
        return self.codebook_KL[codes]

    def update(self, latents: jax.Array, codes: jax.Array, key: jax.Array) -> None:
        """Moves codes towards the latents of a whole batch that chose them, and resets idle ones.

        Args:
          latents: (..., L), of the batch, as `__call__` returns them.
          codes: (...), the codes they chose.
          key: Chooses which latents replace idle codes.
        """
        sums_KL, idle_K = self.sums_KL[...], self.idle_K[...]
        num_codes, width = sums_KL.shape
        latents = latents.reshape(-1, width)
        if self.centred:
            mean_L = batch_mean(latents)
            self.centre_L[...] = self.decay * self.centre_L[...] + (1 - self.decay) * mean_L
            latents -= mean_L
        latents = unit(latents)
        counts_K = jnp.zeros(num_codes).at[codes.reshape(-1)].add(1.0)
        batch_KL = jnp.zeros_like(sums_KL).at[codes.reshape(-1)].add(latents)
        used_K = counts_K > 0
        moved_KL = self.decay * sums_KL + (1 - self.decay) * batch_KL
        sums_KL = jnp.where(used_K[:, None], moved_KL, sums_KL)
        idle_K = jnp.where(used_K, 0, idle_K + 1)
        if self.reset_after:
            reset_K = idle_K >= self.reset_after
            # Latents far from their code are the likeliest (k-means++), and none is taken twice while there are enough.
            distances = jnp.sum(jnp.square(latents - unit(sums_KL)[codes.reshape(-1)]), axis=-1)
            scores = jnp.log(distances + 1e-9) + jax.random.gumbel(key, distances.shape)
            _, order = jax.lax.top_k(scores, min(num_codes, len(latents)))
            fresh_KL = latents[order[jnp.cumsum(reset_K) % len(order)]]
            sums_KL = jnp.where(reset_K[:, None], fresh_KL, sums_KL)
            idle_K = jnp.where(reset_K, 0, idle_K)
        self.sums_KL[...] = sums_KL
        self.idle_K[...] = idle_K
        self.updates[...] += 1
