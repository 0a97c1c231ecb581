"""How the blocks are computed: attention and its choice of kernel, dense layers, norms, activation checkpointing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.errors import InputError
from models.quant import int8_product

FLASH_LENGTH = 64
"""Places from which on cuDNN's attention is quicker than XLA's on an H100, see benchmarks/RESULTS.md."""


class KV(NamedTuple):
    """Keys and values of S places along an axis, in R rows that attend apart; or the same stacked over blocks.

    Along time, the rows are the places of a frame and S counts frames; along space it is the other way round.

    k_BRQDS, v_BRQSD: Laid out for one new query in a row, which then multiplies them as they lie.
    """

    k_BRQDS: jax.Array
    v_BRQSD: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], width: int, size: int, dtype: Any) -> "KV":
        """A cache of `size` empty slots; `shape` is that of all axes before, down to the heads."""
        return cls(jnp.zeros((*shape, width, size), dtype), jnp.zeros((*shape, size, width), dtype))

    def padded(self, size: int) -> "KV":
        """A cache of `size` slots whose first ones are these."""
        empty = (0, size - self.k_BRQDS.shape[-1])
        other = [(0, 0)] * (self.k_BRQDS.ndim - 2)
        return KV(jnp.pad(self.k_BRQDS, [*other, (0, 0), empty]), jnp.pad(self.v_BRQSD, [*other, empty, (0, 0)]))

    def write(self, new: "KV", slot: jax.Array) -> "KV":
        """This cache with one place's keys and values in a slot."""
        k_BRQDS = jax.lax.dynamic_update_slice_in_dim(
            self.k_BRQDS, new.k_BRQDS.astype(self.k_BRQDS.dtype), slot, axis=self.k_BRQDS.ndim - 1
        )
        v_BRQSD = jax.lax.dynamic_update_slice_in_dim(
            self.v_BRQSD, new.v_BRQSD.astype(self.v_BRQSD.dtype), slot, axis=self.v_BRQSD.ndim - 2
        )
        return KV(k_BRQDS, v_BRQSD)

    def row(self, index: jax.Array) -> "KV":
        """The cache of one row (R = 1), stacked over blocks."""
        return KV(*(jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2) for x in self))


def attention(
    q_BSQD: jax.Array,
    k_BSQD: jax.Array,
    v_BSQD: jax.Array,
    *,
    causal: bool,
    implementation: str = "auto",
    platform: str = "",
    past: KV | None = None,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Softmax attention along S, (B, S, Q, D); every attention of the project goes through here.

    Args:
      causal: Each place attends to itself and to those before it; else to all that are given.
      implementation: See `models.nn.Compute.attention`; with a past it is always XLA's.
      platform: Compile for such a device, which need not be there; a GPU is then taken to be an NVIDIA one from Ampere.
      past: Rows (R = 1) of earlier places, all of which are attended to as well.
      start: Index of the first given place; the first `min(start, S)` slots of the past are filled.
    Raises:
      InputError: cuDNN was asked for where it cannot run.
    """
    if past is not None:
        return _attention_with_past(q_BSQD, k_BSQD, v_BSQD, past, start, causal)
    head_width = q_BSQD.shape[-1]
    fits = q_BSQD.dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128
    here = not platform and jax.default_backend() == "gpu" and flash_capable(jax.local_devices()[0])
    on_gpu = platform == "gpu" or here
    if implementation == "cudnn" and not (fits and on_gpu):
        raise InputError(
            "`attention` cudnn: needs an NVIDIA GPU (Ampere or later), `dtype` bfloat16 and a head width that is a "
            f"multiple of 8; here the device is {jax.local_devices()[0].device_kind}, the dtype {q_BSQD.dtype}, "
            f"the head width {head_width}"
        )
    S, lengths_B = q_BSQD.shape[1], None
    flash = implementation == "cudnn" or (implementation == "auto" and fits and on_gpu and S >= FLASH_LENGTH)
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


def _attention_with_past(
    q_BSQD: jax.Array, k_BSQD: jax.Array, v_BSQD: jax.Array, past: KV, start: jax.Array | int, causal: bool
) -> jax.Array:
    # The past and the given places are scored apart: joining them would copy the cache at every step.
    k_BQDU, v_BQUD = past.k_BRQDS[:, 0], past.v_BRQSD[:, 0]
    S, U = q_BSQD.shape[1], k_BQDU.shape[-1]
    scale = q_BSQD.shape[-1] ** -0.5
    past_BQSU = jnp.einsum("bsqd,bqdu->bqsu", q_BSQD, k_BQDU, preferred_element_type=jnp.float32) * scale
    own_BQSS = jnp.einsum("bsqd,btqd->bqst", q_BSQD, k_BSQD, preferred_element_type=jnp.float32) * scale
    past_BQSU = jnp.where(jnp.arange(U) < start, past_BQSU, -jnp.inf)
    if causal and S > 1:
        own_BQSS = jnp.where(jnp.tri(S, dtype=bool), own_BQSS, -jnp.inf)
    weights_BQSX = jax.nn.softmax(jnp.concatenate([past_BQSU, own_BQSS], axis=-1), axis=-1).astype(v_BSQD.dtype)
    y_BSQD = jnp.einsum("bqsu,bqud->bsqd", weights_BQSX[..., :U], v_BQUD)
    return y_BSQD + jnp.einsum("bqst,btqd->bsqd", weights_BQSX[..., U:], v_BSQD)


def flash_capable(device: Any) -> bool:
    """Whether cuDNN's flash attention runs on a device: on NVIDIA's from Ampere on."""
    capability = str(getattr(device, "compute_capability", ""))  # of an AMD GPU, a name such as gfx942
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def rotate(x_BTNQD: jax.Array, start: jax.Array | int) -> jax.Array:
    """Rotary encoding of time (Su et al. 2021): frame t is rotated by its index `start + t`.

    Scores depend on distances alone, so a window may slide and cached keys stay valid. The slowest of D / 2 waves turns
    once in 2π · 100^(1 - 2 / D) frames: in 544 at D = 64.
    """
    frames_T11 = (start + jnp.arange(x_BTNQD.shape[1], dtype=jnp.float32))[:, None, None]
    return _turn(x_BTNQD, frames_T11, 100.0)


def rotate_space(x_BTNQD: jax.Array, start: jax.Array | int, columns: int, extra: int) -> jax.Array:
    """Rotary encoding of space: one half of the width is rotated by a place's row, the other by its column.

    What a neighbour holds is then found in the same way from every place.

    Args:
      start: Index of the first given place.
      columns: Places in a row of the frame.
      extra: Places before the frame's first one, which are not rotated.
    """
    place_N = start + jnp.arange(x_BTNQD.shape[2]) - extra
    in_frame_N = place_N >= 0
    rows_N, columns_N = jnp.where(in_frame_N, place_N // columns, 0), jnp.where(in_frame_N, place_N % columns, 0)
    by_row, by_column = jnp.split(x_BTNQD, 2, axis=-1)
    turned = [_turn(by_row, rows_N[:, None], 30.0), _turn(by_column, columns_N[:, None], 30.0)]
    return jnp.concatenate(turned, axis=-1)


def _turn(x_XD: jax.Array, angle_X: jax.Array, base: float) -> jax.Array:
    """Rotates pairs of values by an angle, each pair slower than the one before, down to `base` times."""
    half = x_XD.shape[-1] // 2
    angles = angle_X[..., None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x_XD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_XD.dtype)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x_XM: jax.Array, turn: Callable[[jax.Array], jax.Array] = lambda y_XM: y_XM) -> jax.Array:
        """The norm, and after it `turn`, which is given here so that what lies between the two need not be kept."""

        def whole(x_XM: jax.Array, scale_M: jax.Array) -> jax.Array:
            y_XM = x_XM.astype(jnp.float32)
            # y * y and not jnp.square(y): XLA's CPU fusions then take a fifth off a whole block's time.
            root_X1 = checkpoint_name(jax.lax.rsqrt(jnp.mean(y_XM * y_XM, axis=-1, keepdims=True) + 1e-6), "root")
            return turn((y_XM * root_X1 * scale_M).astype(x_XM.dtype))

        return lean(whole, x_XM.dtype)(x_XM, self.scale[...])


def lean(function: Callable, dtype: Any) -> Callable:
    """A function whose backward pass, in 16 bits, keeps its arguments and what is named "root", and computes all else.

    Left to itself it would keep float32 copies, which take more than all else that a block keeps.
    """
    if dtype == jnp.float32:
        return function
    # Blocks are scanned where memory counts: their backward pass is another loop, which nothing can be merged with.
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("root"), prevent_cse=False)


def squared_relu(x_XF: jax.Array) -> jax.Array:
    """max(x, 0)² (So et al. 2021)."""
    return lean(lambda x_XF: jnp.square(jax.nn.relu(x_XF)), x_XF.dtype)(x_XF)


class Linear(nnx.Linear):
    """A dense layer over the last axis. The others are folded into one: XLA's CPU products are twice as fast so.

    int8: Its products are of int8; not for layers with a bias.
    """

    int8 = False

    def __call__(self, x_XM: jax.Array) -> jax.Array:  # type: ignore[override]
        folded_RM = x_XM.reshape(-1, x_XM.shape[-1])
        if self.int8:
            y_RM = int8_product(*(x.astype(self.dtype) for x in (folded_RM, self.kernel[...])))
        else:
            y_RM = super().__call__(folded_RM)
        return y_RM.reshape(*x_XM.shape[:-1], -1)


def remat(body: Callable, how: str) -> Callable:
    """Wraps the body of a scan over blocks in activation checkpointing; see `models.nn.Compute.remat`."""
    policies = jax.checkpoint_policies
    if how == "none":
        return body
    policy = {
        "block": policies.nothing_saveable,
        "outputs": policies.save_only_these_names("attended", "widened"),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[how]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def by_clip(x_BTNM: jax.Array) -> jax.Array:
    """The same, split by clips over all devices of the mesh that is set (`jax.sharding.use_abstract_mesh`), if any.

    At both ends of a block, for FSDP: else XLA brings the activations of all clips to a weight's parts, and not the
    weight to each device's clips.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or len(x_BTNM) % mesh.size:
        return x_BTNM
    return jax.lax.with_sharding_constraint(x_BTNM, jax.sharding.PartitionSpec(mesh.axis_names))


def whole(table_KM: jax.Array) -> jax.Array:
    """A table to look up in, whole on each device of the mesh that is set: else each would look up a part of all."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return table_KM
    return jax.lax.with_sharding_constraint(table_KM, jax.sharding.PartitionSpec())


@jax.custom_vjp
def products(x_XM: jax.Array, table_KM: jax.Array) -> jax.Array:
    """Products (..., K) of vectors with each row of a table, float32; as logits of tied embeddings.

    The table's gradient is taken such that the vectors are turned, and not the far larger gradient of the products:
    XLA's CPU backend would copy that element by element, in three times the time of all else here.
    """
    return jnp.einsum("...m,km->...k", x_XM, table_KM, preferred_element_type=jnp.float32)


def _products_backward(saved: tuple[jax.Array, jax.Array], grad_XK: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_XM, table_KM = saved
    grad_x_XM = jnp.einsum("...k,km->...m", grad_XK.astype(x_XM.dtype), table_KM)
    x_RM, grad_RK = x_XM.reshape(-1, x_XM.shape[-1]), grad_XK.reshape(-1, grad_XK.shape[-1])
    grad_MK = jnp.einsum("rm,rk->mk", x_RM, grad_RK.astype(x_XM.dtype), preferred_element_type=jnp.float32)
    grad_KM = jax.lax.optimization_barrier(grad_MK).T  # or XLA turns the product round again
    return grad_x_XM, grad_KM.astype(table_KM.dtype)


products.defvjp(lambda x_XM, table_KM: (products(x_XM, table_KM), (x_XM, table_KM)), _products_backward)


def masked_cross_entropy(
    logits_BTNK: jax.Array, tokens_BTN: jax.Array, hidden_BTN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and 1 for a right guess, each (B, T, N) float32 and 0 for tokens that were not hidden."""
    given_BTN = jnp.take_along_axis(logits_BTNK, tokens_BTN[..., None], axis=-1)[..., 0]
    nll_BTN = jax.nn.logsumexp(logits_BTNK, axis=-1) - given_BTN
    hits_BTN = (given_BTN == jnp.max(logits_BTNK, axis=-1)).astype(jnp.float32)
    return jnp.where(hidden_BTN, nll_BTN, 0.0), jnp.where(hidden_BTN, hits_BTN, 0.0)
