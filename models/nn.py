"""The ST-transformer: attention over space, causal attention over time, feed-forward (Genie, §2 and Figure 4).

Names carry shapes as suffixes, in one alphabet for the whole project:

    B batch          T frames in a clip      S frames in a window or cache
    H, W, C pixels   N patches per frame     P values per patch (patch² · C)
    M model width    F feed-forward width    Q attention heads    D width per head
    L code width     K codes of a codebook   A latent actions     Tm1 = T - 1, Np1 = N + 1
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed. Nothing here changes the parameters, so it may differ from run to run."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and activations; parameters, norms, softmax, logits and losses stay float32."""
    remat: Literal["none", "block", "dots", "offload"] = "none"
    """Activation checkpointing: keep everything, recompute each block, keep matrix products only, or keep each
    block's input in pinned host memory."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """Attention kernel; auto takes cuDNN's flash attention on a GPU where dtype and shape allow it, else XLA."""


@dataclasses.dataclass(frozen=True)
class STConfig:
    """Size of an ST-transformer; what the three models have in common. Defaults: Appendix F."""

    width: int = 512
    """Model width M; the feed-forward layer is four times as wide."""
    num_heads: int = 8
    """Attention heads; must divide the width."""
    num_blocks: int = 8
    """ST blocks (in the encoder, and again in the decoder, where there are both)."""

    def __post_init__(self):
        if self.num_heads < 1 or self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise InputError(
                f"--model.width {self.width}: must be an even multiple of --model.num_heads {self.num_heads}"
            )
        if self.num_blocks < 1:
            raise InputError(f"--model.num_blocks {self.num_blocks}: must be at least 1")


class KV(NamedTuple):
    """Keys and values of one temporal attention layer, or stacked over layers.

    k_BSNQD, v_BSNQD: Of S frames; keys are already rotated by their frame's index.
    """

    k_BSNQD: jax.Array
    v_BSNQD: jax.Array


class Past(NamedTuple):
    """A cache of S earlier frames for one temporal attention layer, or stacked over layers.

    k_BNQDS, v_BNQSD: Laid out for one new query per place, which then multiplies them as they lie.
    """

    k_BNQDS: jax.Array
    v_BNQSD: jax.Array

    @classmethod
    def of(cls, kv: KV, size: int) -> "Past":
        """A cache of `size` frames whose first ones are given, stacked over layers."""
        k, v = jnp.einsum("lbsnqd->lbnqds", kv.k_BSNQD), jnp.einsum("lbsnqd->lbnqsd", kv.v_BSNQD)
        empty = (0, size - k.shape[-1])
        return cls(jnp.pad(k, [(0, 0)] * 5 + [empty]), jnp.pad(v, [(0, 0)] * 4 + [empty, (0, 0)]))

    def write(self, kv: KV, slot: jax.Array) -> "Past":
        """The cache with one frame's keys and values in a slot, all stacked over layers."""
        new = Past.of(kv, 1)
        k = jax.lax.dynamic_update_slice_in_dim(self.k_BNQDS, new.k_BNQDS.astype(self.k_BNQDS.dtype), slot, axis=5)
        v = jax.lax.dynamic_update_slice_in_dim(self.v_BNQSD, new.v_BNQSD.astype(self.v_BNQSD.dtype), slot, axis=4)
        return Past(k, v)

    def at(self, place: jax.Array) -> "Past":
        """The cache of one place (N = 1), stacked over layers."""
        return Past(*(jax.lax.dynamic_slice_in_dim(x, place, 1, axis=2) for x in self))


def patchify(frames_BTHWC: jax.Array, patch_size: int) -> jax.Array:
    """Cuts frames into patches (B, T, N, P), row by row; edges are repeated where the patch size does not divide."""
    B, T, H, W, C = frames_BTHWC.shape
    p = patch_size
    frames_BTHWC = jnp.pad(frames_BTHWC, ((0, 0), (0, 0), (0, -H % p), (0, -W % p), (0, 0)), mode="edge")
    rows, cols = -(-H // p), -(-W // p)
    x = frames_BTHWC.reshape(B, T, rows, p, cols, p, C)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, rows * cols, p * p * C)


def unpatchify(patches_BTNP: jax.Array, patch_size: int, frame_shape: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify`: frames (B, T, H, W, C), with the repeated edges cut off."""
    B, T = patches_BTNP.shape[:2]
    H, W, C = frame_shape
    p = patch_size
    rows, cols = -(-H // p), -(-W // p)
    x = patches_BTNP.reshape(B, T, rows, cols, p, p, C)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, rows * p, cols * p, C)[:, :, :H, :W]


def transformer_flops(cfg: "STConfig", num_patches: int, num_frames: int, past: int = 0) -> int:
    """Floating-point operations of an ST-transformer's forward pass over one clip; the backward pass is twice that.

    Counted, here and in the models: matrix products and attention (all N² pairs in space, all T² in time, and with a
    cache all T · past). A product of a and b counts 2.
    """
    M, N, T = cfg.width, num_patches, num_frames
    return 2 * (16 * M * M + 2 * N * M + 2 * (T + past) * M) * T * N * cfg.num_blocks


def linear_flops(rows: int, *widths: int) -> int:
    """Of dense layers one after another, forward: rows × widths[0] to widths[1] and so on."""
    return 2 * rows * sum(a * b for a, b in itertools.pairwise(widths))


def num_patches(frame_shape: tuple[int, int, int], patch_size: int) -> int:
    """Patches per frame, N."""
    H, W, _ = frame_shape
    return -(-H // patch_size) * -(-W // patch_size)


def attention(
    q_BSQD: jax.Array, k_BSQD: jax.Array, v_BSQD: jax.Array, *, causal: bool, implementation: str = "auto"
) -> jax.Array:
    """Softmax attention along S; every attention over a whole axis goes through here.

    Args:
      implementation: See `Compute.attention`.
    Raises:
      InputError: cuDNN was asked for where it cannot run.
    """
    head_width = q_BSQD.shape[-1]
    fits = q_BSQD.dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128
    on_gpu = jax.default_backend() == "gpu" and flash_capable(jax.local_devices()[0])
    if implementation == "cudnn" and not (fits and on_gpu):
        raise InputError(
            f"--attention cudnn: needs an NVIDIA GPU (Ampere or later), --dtype bfloat16 and a head width that is a "
            f"multiple of 8; here the device is {jax.local_devices()[0].device_kind}, the dtype {q_BSQD.dtype}, "
            f"the head width {head_width}"
        )
    flash = implementation == "cudnn" or (implementation == "auto" and fits and on_gpu)
    S, lengths_B = q_BSQD.shape[1], None
    if flash and S % 2:
        # JAX refuses cuDNN's backward pass at odd lengths, such as that of a frame with an action token.
        q_BSQD, k_BSQD, v_BSQD = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BSQD, k_BSQD, v_BSQD))
        if not causal:  # else nobody sees what stands at the end
            lengths_B = jnp.full(len(q_BSQD), S, jnp.int32)
    y_BSQD = jax.nn.dot_product_attention(
        q_BSQD,
        k_BSQD,
        v_BSQD,
        is_causal=causal,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn" if flash else "xla",
    )
    return y_BSQD[:, :S]


def flash_capable(device: Any) -> bool:
    """Whether cuDNN's flash attention runs on a device: on NVIDIA's from Ampere on."""
    capability = str(getattr(device, "compute_capability", ""))  # of an AMD GPU, a name such as gfx942
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def rotate(x_BTNQD: jax.Array, start: jax.Array | int) -> jax.Array:
    """Rotary encoding of time (Su et al. 2021): frame t is rotated by its index `start + t`.

    Scores depend on distances alone, so a window may slide and cached keys stay valid. The slowest wave turns once in
    about 600 frames.
    """
    T, D = x_BTNQD.shape[1], x_BTNQD.shape[-1]
    frequencies = 100.0 ** (-jnp.arange(D // 2, dtype=jnp.float32) / (D // 2))
    angles = (start + jnp.arange(T, dtype=jnp.float32))[:, None, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x_BTNQD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BTNQD.dtype)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        # y * y and not jnp.square(y): XLA's CPU fusions then take a fifth off a whole block's time.
        return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6) * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with fused projections and normalised queries and keys (Dehghani et al. 2023)."""

    def __init__(self, cfg: STConfig, compute: Compute, rngs: nnx.Rngs):
        head_width = cfg.width // cfg.num_heads
        self.num_heads = cfg.num_heads
        self.compute = compute
        self.qkv = linear(cfg.width, 3 * cfg.width, compute, rngs)
        self.out = linear(cfg.width, cfg.width, compute, rngs, scale=0.5 / cfg.num_blocks)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)

    def heads(self, x_BTNM: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each (B, T, N, Q, D)."""
        B, T, N, M = x_BTNM.shape
        # Split while the other axes are still folded, as in `Linear`.
        q, k, v = jnp.split(self.qkv(x_BTNM.reshape(-1, M)), 3, axis=-1)
        q, k, v = (y.reshape(B, T, N, self.num_heads, -1) for y in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v


class SpatialAttention(Attention):
    """Each patch attends to the patches of its own frame; if causal, to itself and those before it."""

    def __init__(self, cfg: STConfig, compute: Compute, rngs: nnx.Rngs, causal: bool = False):
        super().__init__(cfg, compute, rngs)
        self.causal = causal

    def __call__(self, x_BTNM: jax.Array) -> jax.Array:
        B, T, N, M = x_BTNM.shape
        q, k, v = (x.reshape(B * T, N, self.num_heads, -1) for x in self.heads(x_BTNM))
        y = attention(q, k, v, causal=self.causal, implementation=self.compute.attention)
        return self.out(y.reshape(B, T, N, M))

    def one_patch(self, x_B11M: jax.Array, frame: KV, place: jax.Array) -> tuple[jax.Array, KV]:
        """Causal attention of patch `place` to itself and to those before it.

        Args:
          frame: Keys and values of the frame (S = 1), filled before `place`.
        Returns:
          The output, and `frame` with the patch's own keys and values.
        """
        q, *new = self.heads(x_B11M)
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), place, axis=2)
            for old, x in zip(frame, new, strict=True)
        )
        scores = jnp.einsum("btpqd,btnqd->btqn", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.arange(k.shape[2]) <= place, scores, -jnp.inf)
        y = jnp.einsum("btqn,btnqd->btqd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
        return self.out(y.reshape(x_B11M.shape)), KV(k, v)


class TemporalAttention(Attention):
    """Each patch attends to the same place in its own and earlier frames."""

    def __call__(self, x_BTNM: jax.Array, past: Past | None = None, start: jax.Array | int = 0) -> tuple[jax.Array, KV]:
        """Attends over the given frames, or, with a cache, lets one new frame attend to itself and to the cache.

        Args:
          x_BTNM: A clip; with `past`, a single frame (T = 1).
          past: Cache of S earlier frames, of which the first `min(start, S)` slots are filled.
          start: Index of the first given frame in the whole video.
        Returns:
          The output and the given frames' own keys and values.
        """
        B, T, N, M = x_BTNM.shape
        q, k, v = self.heads(x_BTNM)
        q, k = rotate(q, start), rotate(k, start)
        if past is None:
            q_, k_, v_ = (x.swapaxes(1, 2).reshape(B * N, T, self.num_heads, -1) for x in (q, k, v))
            y = attention(q_, k_, v_, causal=True, implementation=self.compute.attention)
            y = y.reshape(B, N, T, M).swapaxes(1, 2)
        else:
            y = self._attend_to_cache(q, k, v, past, start).reshape(B, T, N, M)
        return self.out(y), KV(k, v)

    def _attend_to_cache(
        self, q: jax.Array, k: jax.Array, v: jax.Array, past: Past, start: jax.Array | int
    ) -> jax.Array:
        # The cache and the frame itself are scored apart: joining them would copy the cache at every step.
        scale = q.shape[-1] ** -0.5
        past_BNQS = jnp.einsum("btnqd,bnqds->bnqs", q, past.k_BNQDS, preferred_element_type=jnp.float32) * scale
        self_BNQS = jnp.einsum("btnqd,bsnqd->bnqs", q, k, preferred_element_type=jnp.float32) * scale
        filled_S = jnp.arange(past_BNQS.shape[-1]) < start
        past_BNQS = jnp.where(filled_S, past_BNQS, -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate([past_BNQS, self_BNQS], axis=-1), axis=-1).astype(v.dtype)
        y = jnp.einsum("bnqs,bnqsd->bnqd", weights[..., :-1], past.v_BNQSD)
        return (y + weights[..., -1:] * v[:, 0])[:, None]


class STBlock(nnx.Module):
    """Pre-norm residual block: attention over space, attention over time, feed-forward."""

    def __init__(self, cfg: STConfig, compute: Compute, rngs: nnx.Rngs, causal_space: bool = False):
        self.spatial_norm = RMSNorm(cfg.width)
        self.spatial = SpatialAttention(cfg, compute, rngs, causal_space)
        self.temporal_norm = RMSNorm(cfg.width)
        self.temporal = TemporalAttention(cfg, compute, rngs)
        self.ffn_norm = RMSNorm(cfg.width)
        self.ffn_in = linear(cfg.width, 4 * cfg.width, compute, rngs)
        self.ffn_out = linear(4 * cfg.width, cfg.width, compute, rngs, scale=0.5 / cfg.num_blocks)

    def __call__(self, x_BTNM: jax.Array, past: Past | None, start: jax.Array | int) -> tuple[jax.Array, KV]:
        return self._after_space(x_BTNM + self.spatial(self.spatial_norm(x_BTNM)), past, start)

    def one_patch(
        self, x_B11M: jax.Array, frame: KV, place: jax.Array, past: Past, start: jax.Array | int
    ) -> tuple[jax.Array, KV, KV]:
        """The same for one patch of one frame; see `STTransformer.run_patch`."""
        y_B11M, frame = self.spatial.one_patch(self.spatial_norm(x_B11M), frame, place)
        x_B11M, kv = self._after_space(x_B11M + y_B11M, past, start)
        return x_B11M, frame, kv

    def _after_space(self, x_BTNM: jax.Array, past: Past | None, start: jax.Array | int) -> tuple[jax.Array, KV]:
        y_BTNM, kv = self.temporal(self.temporal_norm(x_BTNM), past, start)
        x_BTNM += y_BTNM
        # Squared ReLU (So et al. 2021) learns as well as GELU here and takes half the time on a CPU.
        x_BTNM += self.ffn_out(jnp.square(jax.nn.relu(self.ffn_in(self.ffn_norm(x_BTNM)))))
        return x_BTNM, kv


class STTransformer(nnx.Module):
    """A stack of ST blocks, with a norm at the end. Blocks are stacked parameters, scanned: they compile once.

    With `causal_space` a patch sees those before it in its frame only.
    """

    def __init__(self, cfg: STConfig, compute: Compute, rngs: nnx.Rngs, causal_space: bool = False):
        self.compute = compute

        @nnx.split_rngs(splits=cfg.num_blocks)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> STBlock:
            return STBlock(cfg, compute, rngs, causal_space)

        self.blocks = stack(rngs)
        self.norm = RMSNorm(cfg.width)

    def __call__(self, x_BTNM: jax.Array) -> jax.Array:
        """Transforms a whole clip."""
        return self.run(x_BTNM, None, 0, keep=False)[0]

    def run(
        self, x_BTNM: jax.Array, past: Past | None, start: jax.Array | int, keep: bool = True
    ) -> tuple[jax.Array, KV | None]:
        """Transforms a clip, or one frame after a cache (see `TemporalAttention`).

        Returns:
          The output and, if `keep`, the given frames' keys and values, stacked over the blocks.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_BTNM: jax.Array, layer: tuple[Any, Past | None]) -> tuple[jax.Array, KV | None]:
            params, past = layer
            x_BTNM = checkpoint_name(x_BTNM, "block_input")
            x_BTNM, kv = nnx.merge(graphdef, params)(x_BTNM, past, start)
            return x_BTNM, kv if keep else None

        dtype = jnp.dtype(self.compute.dtype)
        # On a CPU the scan's copying of what the backward pass needs takes a sixth of a step; with activation
        # checkpointing there is little to copy, and unrolled blocks would be merged with their recomputation. Sampling,
        # which keeps keys and values, has no backward pass, and compiles sooner if scanned.
        unroll = not keep and self.compute.remat == "none" and jax.default_backend() == "cpu"
        layers = (stacked, past)
        x_BTNM, kvs = jax.lax.scan(remat(body, self.compute.remat), x_BTNM.astype(dtype), layers, unroll=unroll)
        return self.norm(x_BTNM), kvs

    def run_patch(
        self, x_B11M: jax.Array, frame: KV, place: jax.Array, past: Past, start: jax.Array | int
    ) -> tuple[jax.Array, KV, KV]:
        """Transforms one patch of a frame, of a transformer that is causal in space too.

        Args:
          frame: Spatial keys and values of the patches before it, stacked over the blocks, S = 1.
          place: Index of the patch in its frame.
          past: Cache of earlier frames, stacked over the blocks.
          start: Index of the frame in the whole video.
        Returns:
          The output, `frame` with this patch, and this patch's temporal keys and values.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_B11M: jax.Array, layer: tuple[Any, KV, Past]) -> tuple[jax.Array, tuple[KV, KV]]:
            params, frame, past = layer
            x_B11M, frame, kv = nnx.merge(graphdef, params).one_patch(x_B11M, frame, place, past, start)
            return x_B11M, (frame, kv)

        dtype = jnp.dtype(self.compute.dtype)
        x_B11M, (frame, kvs) = jax.lax.scan(body, x_B11M.astype(dtype), (stacked, frame, past.at(place)))
        return self.norm(x_B11M), frame, kvs


def remat(body: Callable, how: str) -> Callable:
    """Wraps the body of a scan over blocks in activation checkpointing; see `Compute.remat`."""
    policies = jax.checkpoint_policies
    if how == "none":
        return body
    policy = {
        "block": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[how]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


class Linear(nnx.Linear):
    """A dense layer over the last axis. The others are folded into one: XLA's CPU products are twice as fast so."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def linear(
    inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs, *, scale: float = 1.0, bias: bool = False
) -> Linear:
    """A dense layer with float32 parameters and products in the compute dtype; `scale` is that of the variance."""
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal"),
        rngs=rngs,
    )


def position_table(num_patches: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """A learned encoding of space, (N, M)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_patches, width)))
