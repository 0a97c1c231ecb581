"""The ST-transformer: attention over space, causal attention over time, feed-forward (Genie, §2 and Figure 4).

Names carry shapes as suffixes, in one alphabet for the whole project:

    B batch          T frames in a clip      S frames in a window or cache, or places along any axis
    H, W, C pixels   N patches per frame     P values per patch (patch² · C)
    M model width    F feed-forward width    Q attention heads    D width per head
    L code width     K codes of a codebook   A latent actions     R rows that attend apart, U slots of a past
    Tm1 = T - 1, Np1 = N + 1, 1 an axis of length one, X any number of axes
"""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import init
from models.errors import InputError
from models.kernels import KV, Linear, RMSNorm, attention, by_clip, remat, rotate, rotate_space, squared_relu

Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed. Nothing here changes the parameters, so it may differ from run to run."""

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of matrix products and activations; parameters, norms, softmax, logits and losses stay float32. auto takes
    bfloat16 on an accelerator."""
    remat: Literal["auto", "none", "dots", "outputs", "block", "offload"] = "none"
    """Activation checkpointing: keep everything, keep matrix products only, keep attention's outputs and the
    feed-forward layer's inner ones, recompute each block from its input, or keep that in pinned host memory. auto takes
    the first of them that fits an accelerator's memory."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """Attention kernel; auto takes cuDNN's flash attention on a GPU over long axes, where dtype and shape allow it."""
    platform: Annotated[Literal["", "cpu", "gpu", "tpu"], tyro.conf.Suppress] = ""
    """For what kind of device; default: the one that JAX computes on."""
    quant: Literal["none", "int8"] = "none"
    """Take the products of the blocks' dense layers in int8, forward and backward; all else stays as it is."""

    def settled(self) -> Self:
        """With a dtype in the place of auto, and no checkpointing in the place of auto."""
        on_cpu = self.target == "cpu"
        dtype = self.dtype if self.dtype != "auto" else "float32" if on_cpu else "bfloat16"
        return dataclasses.replace(self, dtype=dtype, remat="none" if self.remat == "auto" else self.remat)

    @property
    def target(self) -> str:
        """The kind of device: "cpu", "gpu" or "tpu"."""
        return self.platform or jax.default_backend()


@dataclasses.dataclass(frozen=True)
class STConfig:
    """Size of an ST-transformer; what the three models have in common. Defaults: Appendix F."""

    width: int = 512
    """Model width M; the feed-forward layer is four times as wide."""
    num_heads: int = 8
    """Attention heads; must divide the width."""
    num_blocks: int = 8
    """ST blocks (in the encoder, and again in the decoder, where there are both)."""
    rotary_space: bool = False
    """Rotate queries and keys of spatial attention by a place's row and column, beside the learned positions."""

    def __post_init__(self):
        if self.num_heads < 1 or self.width % self.num_heads or (self.width // self.num_heads) % 2:
            message = f"`width` {self.width}: must be an even multiple of `num_heads` {self.num_heads}"
            raise InputError(message, of=type(self))
        if self.num_blocks < 1:
            raise InputError(f"`num_blocks` {self.num_blocks}: must be at least 1", of=type(self))
        if self.rotary_space and (self.width // self.num_heads) % 4:
            message = (
                f"`width` {self.width}: with `rotary_space`, must be a multiple of 4 · `num_heads` {self.num_heads}"
            )
            raise InputError(message, of=type(self))


class Places(NamedTuple):
    """How the places of a frame lie: in rows of so many columns, after some extra ones that have no place in it."""

    columns: int
    extra: int = 0


class Past(NamedTuple):
    """What came before the places that a transformer is given.

    time: Keys and values of S earlier frames, stacked over blocks (R = N); frame t lies in slot t % S.
    frame: int32, index of the first given frame in the whole video; the first `min(frame, S)` slots are filled.
    space: Where a frame is made place by place, those of its earlier places, stacked over blocks (R = T = 1).
    place: int32, index of the given place.
    """

    time: KV
    frame: jax.Array | int
    space: KV | None = None
    place: jax.Array | int = 0


class Transformed(NamedTuple):
    """What a transformer makes of its input.

    x_BTNM: The hidden states after the last norm.
    time, space: Keys and values of the given places along either axis, stacked over blocks; None unless asked for.
    """

    x_BTNM: jax.Array
    time: KV | None = None
    space: KV | None = None


class Attention(nnx.Module):
    """Multi-head self-attention with fused projections and normalised queries and keys (Dehghani et al. 2023).

    Along time each place attends to itself in its own and earlier frames; along space to the places of its frame, if
    causal to itself and those before it.
    """

    def __init__(
        self,
        cfg: STConfig,
        compute: Compute,
        rngs: nnx.Rngs,
        axis: Literal["time", "space"],
        causal: bool,
        places: Places | None = None,
    ):
        head_width = cfg.width // cfg.num_heads
        self.num_heads = cfg.num_heads
        self.compute = compute
        self.axis = axis
        self.causal = causal
        self.places = places if cfg.rotary_space else None
        self.qkv = dense(cfg.width, 3 * cfg.width, compute, rngs)
        self.out = dense(cfg.width, cfg.width, compute, rngs, scale=init.output_scale(cfg.num_blocks))
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)

    def __call__(self, x_BTNM: jax.Array, past: KV | None = None, start: jax.Array | int = 0) -> tuple[jax.Array, KV]:
        """Lets the given places attend to each other and to those of the past.

        Args:
          past, start: See `kernels.attention`; `start` is the index of the first given place along the axis.
        Returns:
          The output, and the keys and values of the given places.
        """
        q_BTNQD, k_BTNQD, v_BTNQD = self._heads(x_BTNM)
        q_BTNQD, k_BTNQD = (
            norm(x_BTNQD, lambda y_BTNQD: self._turn(y_BTNQD, start))
            for norm, x_BTNQD in ((self.q_norm, q_BTNQD), (self.k_norm, k_BTNQD))
        )
        # Rows attend apart: frames along space, places along time.
        q_BRSQD, k_BRSQD, v_BRSQD = (self._swap(x_BTNQD) for x_BTNQD in (q_BTNQD, k_BTNQD, v_BTNQD))
        B, R, S, Q, D = q_BRSQD.shape
        if past is not None:
            past = KV(*(x.reshape(B * R, 1, *x.shape[2:]) for x in past))
        y_BSQD = attention(
            *(x_BRSQD.reshape(B * R, S, Q, D) for x_BRSQD in (q_BRSQD, k_BRSQD, v_BRSQD)),
            causal=self.causal,
            implementation=self.compute.attention,
            platform=self.compute.platform,
            past=past,
            start=start,
        )
        y_BTNQD = self._swap(y_BSQD.reshape(B, R, S, Q, D))
        own = KV(jnp.einsum("brsqd->brqds", k_BRSQD), jnp.einsum("brsqd->brqsd", v_BRSQD))
        return checkpoint_name(self.out(y_BTNQD.reshape(x_BTNM.shape)), "attended"), own

    def _heads(self, x_BTNM: jax.Array) -> list[jax.Array]:
        """Queries and keys, which are to be normalised, and values, each (B, T, N, Q, D)."""
        B, T, N, M = x_BTNM.shape
        # Split while the other axes are still folded, as in `Linear`.
        qkv_X3M = self.qkv(x_BTNM.reshape(-1, M))
        return [y_XM.reshape(B, T, N, self.num_heads, -1) for y_XM in jnp.split(qkv_X3M, 3, axis=-1)]

    def _turn(self, y_BTNQD: jax.Array, start: jax.Array | int) -> jax.Array:
        """Normalised queries or keys, rotated by where they stand."""
        if self.axis == "time":
            return rotate(y_BTNQD, start)
        return rotate_space(y_BTNQD, start, *self.places) if self.places else y_BTNQD

    def _swap(self, x_BTNQD: jax.Array) -> jax.Array:
        """Between (B, T, N, Q, D) and (B, R, S, Q, D), either way."""
        return x_BTNQD.swapaxes(1, 2) if self.axis == "time" else x_BTNQD


class STBlock(nnx.Module):
    """Pre-norm residual block: attention over space, attention over time (unless frames stand alone), feed-forward."""

    def __init__(
        self,
        cfg: STConfig,
        compute: Compute,
        rngs: nnx.Rngs,
        places: Places,
        causal_space: bool = False,
        sees_time: bool = True,
    ):
        self.sees_time = sees_time
        self.spatial_norm = RMSNorm(cfg.width)
        self.spatial = Attention(cfg, compute, rngs, "space", causal_space, places)
        if sees_time:
            self.temporal_norm = RMSNorm(cfg.width)
            self.temporal = Attention(cfg, compute, rngs, "time", causal=True)
        self.ffn_norm = RMSNorm(cfg.width)
        self.ffn_in = dense(cfg.width, 4 * cfg.width, compute, rngs)
        self.ffn_out = dense(4 * cfg.width, cfg.width, compute, rngs, scale=init.output_scale(cfg.num_blocks))

    def __call__(self, x_BTNM: jax.Array, past: Past | None = None) -> Transformed:
        """Transforms a clip, a frame or a place; `past` is this block's own, without the axis of blocks."""
        frame, place = (0, 0) if past is None else (past.frame, past.place)
        y_BTNM, space = self.spatial(self.spatial_norm(x_BTNM), past and past.space, place)
        x_BTNM += y_BTNM
        time = None
        if self.sees_time:
            y_BTNM, time = self.temporal(self.temporal_norm(x_BTNM), past and past.time, frame)
            x_BTNM += y_BTNM
        # It learns as well as GELU here and takes half the time on a CPU.
        wide_BTNF = checkpoint_name(self.ffn_in(self.ffn_norm(x_BTNM)), "widened")
        x_BTNM += self.ffn_out(squared_relu(wide_BTNF))
        return Transformed(x_BTNM, time, space)


class STTransformer(nnx.Module):
    """A stack of ST blocks, with a norm at the end. Blocks are stacked parameters, scanned: they compile once.

    With `causal_space` a patch sees those before it in its frame only; without `sees_time`, its own frame only.
    """

    def __init__(
        self,
        cfg: STConfig,
        compute: Compute,
        rngs: nnx.Rngs,
        places: Places,
        causal_space: bool = False,
        sees_time: bool = True,
    ):
        self.compute = compute
        self.heads = cfg.num_blocks, cfg.num_heads, cfg.width // cfg.num_heads

        @nnx.split_rngs(splits=cfg.num_blocks)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> STBlock:
            return STBlock(cfg, compute, rngs, places, causal_space, sees_time)

        self.blocks = stack(rngs)
        self.norm = RMSNorm(cfg.width)

    def __call__(self, x_BTNM: jax.Array, past: Past | None = None, keep: bool = False) -> Transformed:
        """Transforms a whole clip, or what comes after a past: one frame, or one place of a frame.

        Args:
          keep: Return the given places' keys and values.
        """
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_BTNM: jax.Array, layer: tuple[Any, Any, Any]) -> tuple[jax.Array, Any]:
            params, time, space = layer
            x_BTNM = checkpoint_name(by_clip(x_BTNM), "block_input")
            mine = past and past._replace(time=time, space=space)
            x_BTNM, *own = nnx.merge(graphdef, params)(x_BTNM, mine)
            return by_clip(x_BTNM), own if keep else (None, None)

        # On a CPU the scan's copying of what the backward pass needs takes a sixth of a step; with activation
        # checkpointing there is little to copy, and unrolled blocks would be merged with their recomputation. Sampling,
        # which keeps keys and values, has no backward pass, and compiles sooner if scanned; on a GPU a scan in the loop
        # of its steps cuts each block's weights out and casts them anew, a launch each.
        unroll = self.compute.target == "gpu" if keep else self.compute.remat == "none" and self.compute.target == "cpu"
        layers = (stacked, past and past.time, past and past.space)
        x_BTNM = x_BTNM.astype(jnp.dtype(self.compute.dtype))
        x_BTNM, (time, space) = jax.lax.scan(remat(body, self.compute.remat), x_BTNM, layers, unroll=unroll)
        return Transformed(self.norm(x_BTNM), time, space)

    def empty_cache(self, num_clips: int, rows: int, size: int) -> KV:
        """Keys and values, stacked over blocks, of `size` places along an axis that are still to come."""
        num_blocks, num_heads, width = self.heads
        return KV.empty((num_blocks, num_clips, rows, num_heads), width, size, jnp.dtype(self.compute.dtype))


def linear(
    inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs, *, scale: float = 1.0, bias: bool = False
) -> Linear:
    """A dense layer with float32 parameters and products in the compute dtype; for `scale` see `models.init`."""
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.float32,
        kernel_init=init.kernel(scale),
        rngs=rngs,
    )


def dense(inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs, *, scale: float = 1.0) -> Linear:
    """A dense layer of a block: as `linear`, but its products may be of int8, by `Compute.quant`."""
    layer = linear(inputs, outputs, compute, rngs, scale=scale)
    layer.int8 = compute.quant == "int8"
    return layer


def in_float32(model: Model) -> Model:
    """A model of the same parameters that takes its products in float32, whatever its `Compute` says."""
    copy = nnx.merge(*nnx.split(model))
    parts = [part for _, part in nnx.iter_graph(copy) if isinstance(part, nnx.Module)]
    computed: list[Any] = [part for part in parts if hasattr(part, "compute")]
    if all(part.compute.dtype == "float32" and part.compute.quant == "none" for part in computed):
        return model
    for part in computed:
        # cuDNN has no attention in float32.
        part.compute = dataclasses.replace(part.compute, dtype="float32", attention="auto", quant="none")
    for layer in parts:
        if isinstance(layer, Linear):
            layer.dtype, layer.int8 = jnp.float32, False
    return copy


def num_patches(frame_shape: tuple[int, int, int], patch_size: int) -> int:
    """Patches per frame, N."""
    H, W, _ = frame_shape
    return -(-H // patch_size) * -(-W // patch_size)


def patchify(frames_BTHWC: jax.Array, patch_size: int) -> jax.Array:
    """Cuts frames into patches (B, T, N, P), row by row; edges are repeated where the patch size does not divide."""
    B, T, H, W, C = frames_BTHWC.shape
    p = patch_size
    frames_BTHWC = jnp.pad(frames_BTHWC, ((0, 0), (0, 0), (0, -H % p), (0, -W % p), (0, 0)), mode="edge")
    rows, cols = -(-H // p), -(-W // p)
    cut = frames_BTHWC.reshape(B, T, rows, p, cols, p, C)
    return cut.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, rows * cols, p * p * C)


def unpatchify(patches_BTNP: jax.Array, patch_size: int, frame_shape: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify`: frames (B, T, H, W, C), with the repeated edges cut off."""
    B, T = patches_BTNP.shape[:2]
    H, W, C = frame_shape
    p = patch_size
    rows, cols = -(-H // p), -(-W // p)
    cut = patches_BTNP.reshape(B, T, rows, cols, p, p, C)
    return cut.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, rows * p, cols * p, C)[:, :, :H, :W]
