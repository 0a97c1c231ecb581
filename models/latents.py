"""Latents of real numbers, in the place of codes: squashed by tanh, and normalised by statistics kept with the model.

They stand where a tokenizer of the other kind has its quantiser (`models.vq`): what decodes sees the numbers within
(-1, 1) as they are, so that statistics change nothing there; who models latents sees them with mean 0 and variance 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.vq import Codebook

DECAY = 0.99
"""Of the moving averages."""
LEAST_VARIANCE = 1e-4
"""Below it a number is not spread out: it says next to nothing, and what it says would be noise."""


class Squashed(NamedTuple):
    """As `models.vq.Quantized`, without codes, and without codes that latents are to be held near of.

    vectors_XL: Within (-1, 1), float32.
    latents_XL: The same without gradient; what `update` learns from.
    """

    vectors_XL: jax.Array
    latents_XL: jax.Array
    commitment: jax.Array
    codes_X: None = None


class Bottleneck(nnx.Module):
    """Squashes each number of a latent to (-1, 1), and knows the mean and the spread of each.

    Args:
      code_width: L.
    """

    def __init__(self, code_width: int):
        # Moving averages of latents and of their squares, and of the two losses of a training (`train_tokenizer.py`).
        self.updates = Codebook(jnp.int32(0))
        self.mean_L = Codebook(jnp.zeros(code_width))
        self.square_L = Codebook(jnp.ones(code_width))
        self.mse = Codebook(jnp.float32(1.0))
        self.perceptual = Codebook(jnp.float32(1.0))

    def __call__(self, z_XL: jax.Array, train: bool = False) -> Squashed:
        """Squashes latents, in training as ever."""
        latents_XL = jnp.tanh(z_XL.astype(jnp.float32))
        return Squashed(latents_XL, jax.lax.stop_gradient(latents_XL), jnp.float32(0.0))

    @property
    def spread_L(self) -> jax.Array:
        """The standard deviation of each number."""
        variance_L = self.square_L[...] - jnp.square(self.mean_L[...])
        return jnp.sqrt(jnp.maximum(variance_L, LEAST_VARIANCE))

    def normalised(self, latents_XL: jax.Array) -> jax.Array:
        """Latents within (-1, 1) as those with mean 0 and variance 1."""
        return (latents_XL - self.mean_L[...]) / self.spread_L

    def restored(self, normalised_XL: jax.Array) -> jax.Array:
        """The way back; what a model has put outside of [-1, 1], where no latent is, is cut off."""
        return jnp.clip(normalised_XL.astype(jnp.float32) * self.spread_L + self.mean_L[...], -1.0, 1.0)

    def update(self, latents_BTNL: jax.Array, hidden_BTN: jax.Array, key: jax.Array) -> None:
        """Follows the latents of a batch, those of clips alone of which nothing was hidden: such are met in use.

        Args:
          latents_BTNL: As `__call__` returns them.
          hidden_BTN: Which patches the encoder did not see.
          key: For a quantiser.
        """
        whole_B = ~jnp.any(hidden_BTN, axis=(1, 2))
        count = jnp.sum(whole_B)
        # The first batch counts for all that went before; one without a whole clip, for nothing.
        rate = jnp.where(count > 0, jnp.maximum(1 - DECAY, 1 / (self.updates[...] + 1)), 0.0)
        share_B111 = (whole_B / jnp.maximum(count, 1))[:, None, None, None]
        for average, values_BTNL in ((self.mean_L, latents_BTNL), (self.square_L, jnp.square(latents_BTNL))):
            batch_L = jnp.sum(jnp.mean(values_BTNL * share_B111, axis=(1, 2)), axis=0)
            average[...] += rate * (batch_L - average[...])
        self.updates[...] += (count > 0).astype(jnp.int32)

    def follow_losses(self, mse: jax.Array, perceptual: jax.Array) -> None:
        """Follows the losses of a step; the very first ones are taken as they are."""
        rate = jnp.maximum(1 - DECAY, 1 / (self.updates[...] + 1))
        for average, value in ((self.mse, mse), (self.perceptual, perceptual)):
            average[...] += rate * (value - average[...])
