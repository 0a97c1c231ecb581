"""Making a frame by moving the last one (kin: pixels moved by predicted kernels, Finn et al. 2016).

Tokens of such a decoder say how a patch changes instead of what it shows: a scroll is nearly the same token everywhere,
which an action predicts. The paper's decoders make each frame anew; that is a reach of 0, in which case nothing of this
is used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import init
from models.nn import Compute, linear, unpatchify

WAYS = 2
"""Moves a patch can choose from, pixel by pixel: what scrolls, and what moves before it."""


def frames_before(frames_BTHWC: jax.Array) -> jax.Array:
    """For each frame in [0, 1] the one before it, in the same shape; grey before the first."""
    return jnp.pad(frames_BTHWC[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)), constant_values=0.5)


class Damage(NamedTuple):
    """What training does to the pictures that a model is shown, so that it learns to mend its own.

    blur_BT: From 0, as they are, by 0.5, once (1, 2, 1) / 4 along rows and columns, to 1, three times; None: no blur.
    noise_BTHWC: What is added.
    """

    blur_BT: jax.Array | None
    noise_BTHWC: jax.Array

    def __call__(self, frames_BTHWC: jax.Array) -> jax.Array:
        """The damaged frames, in the same shape; noise may leave [0, 1]."""
        if self.blur_BT is not None:
            once = softened(frames_BTHWC)
            level = 2.0 * self.blur_BT[:, :, None, None, None]
            frames_BTHWC += jnp.minimum(level, 1.0) * (once - frames_BTHWC)
            frames_BTHWC += jnp.maximum(level - 1.0, 0.0) * (softened(softened(once)) - frames_BTHWC)
        return frames_BTHWC + self.noise_BTHWC


DAMAGED = 0.2
"""Share of the pictures that are damaged where there is a blur. The others stay as they are: most pictures of a rollout
are good, and to mend what is whole would spoil it."""


def draw_damage(key: jax.Array, num_clips: int, frames_THWC: tuple[int, ...], blur: float, noise: float) -> Damage:
    """Draws how each frame is damaged: evenly up to a blur, and to a standard deviation of the noise.

    With a blur, most frames are not damaged at all, see `DAMAGED`.
    """
    level_key, noise_key = jax.random.split(jax.random.fold_in(key, 0))
    level_BT111 = noise * jax.random.uniform(level_key, (num_clips, frames_THWC[0], 1, 1, 1))
    noise_BTHWC = level_BT111 * jax.random.normal(noise_key, (num_clips, *frames_THWC))
    if not blur:
        return Damage(None, noise_BTHWC)
    blur_key, hurt_key = jax.random.split(jax.random.fold_in(key, 1))
    hurt_BT = jax.random.bernoulli(hurt_key, DAMAGED, (num_clips, frames_THWC[0]))
    blur_BT = blur * jax.random.uniform(blur_key, hurt_BT.shape)
    return Damage(hurt_BT * blur_BT, hurt_BT[:, :, None, None, None] * noise_BTHWC)


def softened(frames_BTHWC: jax.Array) -> jax.Array:
    """Each pixel mixed with its neighbours, by (1, 2, 1) / 4 along rows and along columns; edges go on."""
    H, W = frames_BTHWC.shape[2:4]
    x = jnp.pad(frames_BTHWC, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    x = 0.25 * (x[:, :, :H] + 2.0 * x[:, :, 1:-1] + x[:, :, 2:])
    return 0.25 * (x[:, :, :, :W] + 2.0 * x[:, :, :, 1:-1] + x[:, :, :, 2:])


class MotionHead(nnx.Module):
    """Hidden states to frames: each patch moves the last frame in some ways, and each pixel chooses among them.

    A move is a distribution over shifts of at most `reach` pixels in x and another in y; their means are sub-pixel. A
    pixel mixes the moved pictures and one that the patch makes itself.

    Args:
      reach: Pixels, at least 1.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        frame_shape: tuple[int, int, int],
        reach: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.frame_shape, self.reach = patch_size, frame_shape, reach
        self.recompute = compute.remat != "none"
        self.shifts = 2 * reach + 1
        self.sizes = (
            patch_size**2 * frame_shape[2],  # the patch's own picture
            WAYS * 2 * self.shifts,  # moves in x and in y
            patch_size**2 * (WAYS + 1),  # whom a pixel follows
        )
        self.out = linear(width, sum(self.sizes), compute, rngs, scale=init.MOTION_SCALE, bias=True)

    def __call__(self, x_BTNM: jax.Array, source_BTHWC: jax.Array) -> jax.Array:
        """Frames (B, T, H, W, C), float32, about [0, 1].

        Args:
          source_BTHWC: What to move, in [0, 1]: for each frame the one before it.
        """
        make = jax.checkpoint(self._make) if self.recompute else self._make
        return make(self.out(x_BTNM).astype(jnp.float32), source_BTHWC.astype(jnp.float32))

    def _make(self, out_BTNX: jax.Array, source_BTHWC: jax.Array) -> jax.Array:
        B, T, N, _ = out_BTNX.shape
        own_BTNP, moves, choice = jnp.split(out_BTNX, np.cumsum(self.sizes)[:-1], axis=-1)
        # At first nothing moves, and all pixels follow the first move.
        still = jnp.zeros(self.shifts).at[self.reach].set(init.MOTION_STILL)
        moves = jax.nn.softmax(moves.reshape(B, T, N, WAYS, 2, self.shifts) + still, axis=-1)
        first = jnp.zeros(WAYS + 1).at[0].set(init.MOTION_FIRST)
        choice = jax.nn.softmax(choice.reshape(B, T, N, -1, WAYS + 1) + first, axis=-1)
        pictures = moved_patches(source_BTHWC, moves, self.patch_size)
        pictures = jnp.concatenate([pictures, (own_BTNP + 0.5)[:, :, None]], axis=2)
        pictures = pictures.reshape(B, T, WAYS + 1, N, self.patch_size**2, -1)
        patches = jnp.einsum("btvnpc,btnpv->btnpc", pictures, choice, precision=jax.lax.Precision.HIGHEST)
        return unpatchify(patches.reshape(B, T, N, -1), self.patch_size, self.frame_shape)


def moved_patches(source_BTHWC: jax.Array, moves_BTNX: jax.Array, patch_size: int) -> jax.Array:
    """Patches (B, T, ways, N, P) of pictures that each patch moves in its own ways.

    First all rows are moved in x, then all columns of the result in y, so that a patch needs the strip beside and the
    strip above and below it, and no window of its own. Beyond the picture its edge goes on.

    Args:
      moves_BTNX: X is (ways, 2, shifts): weights of shifts by -reach ... reach pixels, in x and in y. A pixel shows
        what stood as many pixels to the right of it, or below it.
    """
    B, T, H, W, C = source_BTHWC.shape
    p = patch_size
    rows, cols = -(-H // p), -(-W // p)
    ways, shifts = moves_BTNX.shape[3], moves_BTNX.shape[5]
    reach = shifts // 2
    beside = -(-reach // p)  # patches that a shift can reach on either side
    # As a product: pixel i of a patch takes from pixel i + shift of its strip.
    place = np.arange(p)[:, None] + beside * p + np.arange(-reach, reach + 1)  # (p, shifts)
    onto = np.zeros((shifts, p, (2 * beside + 1) * p), np.float32)
    for shift in range(shifts):
        onto[shift, np.arange(p), place[:, shift]] = 1.0
    # Float32 in full: what is moved again and again must not lose its colours.
    product = lambda subscripts, a, b: jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
    by_axis = product("btnvad,dps->abtvnps", moves_BTNX, onto).reshape(2, B, T, ways, rows, cols, p, -1)

    def strips(lines_X: jax.Array, axis: int, count: int) -> jax.Array:
        """Cuts the last axis into patches, puts these at `axis`, and joins each with those beside it."""
        edge = [(0, 0)] * (lines_X.ndim - 1) + [(beside * p, beside * p)]
        cut = jnp.pad(lines_X, edge, mode="edge").reshape(*lines_X.shape[:-1], count + 2 * beside, p)
        cut = jnp.moveaxis(cut, -2, axis)
        parts = [jax.lax.slice_in_dim(cut, i, i + count, axis=axis) for i in range(2 * beside + 1)]
        return jnp.concatenate(parts, axis=-1)

    full = jnp.pad(source_BTHWC, ((0, 0), (0, 0), (0, -H % p), (0, -W % p), (0, 0)), mode="edge")
    lines = full.reshape(B, T, rows, p, cols * p, C).transpose(0, 1, 2, 3, 5, 4).reshape(B, T, rows, p * C, cols * p)
    x = product("btyxqs,btvyxps->btvyxpq", strips(lines, 3, cols), by_axis[0])  # q: pixels of a column, and channels
    x = x.reshape(B, T, ways, rows, cols, p, p, C).transpose(0, 1, 2, 4, 5, 7, 3, 6)
    lines = x.reshape(B, T, ways, cols, p * C, rows * p)
    y = product("btvyxqs,btvyxps->btvyxpq", strips(lines, 3, rows), by_axis[1])
    return y.reshape(B, T, ways, rows * cols, p * p * C)
