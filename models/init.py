"""How parameters begin, all in one place.

| what | spread | why |
|---|---|---|
| kernels | 1/√(inputs) | what comes in with unit variance goes out with it (LeCun et al. 1998) |
| output layers of attention and feed-forward | variance 0.5 / blocks of that | two of them in each block: all together add about what a residual stream of unit variance holds, however deep |
| token and action embeddings | 0.5 | the token table also gives the logits; scaled by 2/√M they begin with unit variance |
| … of tokens, before training | 0.4 like the code, 0.6 of the above | again 0.5 in all: 0.4² + (0.6 · 0.5)² = 0.5² |
| positions, and what an encoder sees of a hidden patch | 0.02 | small beside embeddings: what stands somewhere counts before where it stands |
| the LAM's last layer | 0 | it says what changes, and learning starts from "nothing" |
| a head that moves the last frame | a twentieth of the variance; 2 for no shift, 1 for the first move | a frame begins as the last one, nearly |
| codes | unit vectors, all directions alike | only directions count (`models.vq`) |
"""  # noqa: E501

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

MOTION_SCALE, MOTION_STILL, MOTION_FIRST = 0.05, 2.0, 1.0


def kernel(scale: float = 1.0) -> nnx.Initializer:
    """Of a dense layer; `scale` is that of the variance."""
    return nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


def output_scale(num_blocks: int) -> float:
    """`scale` of the layers that add to the residual stream."""
    return 0.5 / num_blocks


def embeddings(rngs: nnx.Rngs, rows: int, width: int) -> nnx.Param:
    """A table of embeddings, (rows, M)."""
    return nnx.Param(0.5 * jax.random.normal(rngs.params(), (rows, width)))


def positions(rngs: nnx.Rngs, num_patches: int, width: int) -> nnx.Param:
    """A learned encoding of space, (N, M)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_patches, width)))


def alike(table_KM: jax.Array, codebook_KL: np.ndarray) -> jax.Array:
    """Embeddings (K, M) that are alike where unit codes are; part of each stays its own, which logits tell them by."""
    L, M = codebook_KL.shape[1], table_KM.shape[1]
    directions_LM = np.asarray(jax.random.orthogonal(jax.random.key(0), max(L, M)))[:L, :M]
    return 0.4 * M**0.5 * jnp.asarray(codebook_KL @ directions_LM) + 0.6 * table_KM
