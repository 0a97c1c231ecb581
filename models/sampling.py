"""Rollouts: from prompt frames to a state, and from a state and an action to the next frame.

Keys and values of past frames are cached, in the dynamics model and in the tokenizer's decoder, so that each MaskGIT
step computes one frame and not the window. The caches are rings of `window - 1` frames: a rollout of any length needs
constant memory and constant time per frame.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError
from models.genie import World
from models.nn import KV, Past


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("steps", "temperature"),
    meta_fields=("order", "top_k", "top_p"),
)
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of a frame are drawn (Chang et al. 2022). Defaults: Genie, Appendix F.

    A causal model draws token after token, so steps and order are of no account there. A pytree: `steps` and
    `temperature` may be traced, so that a change of them compiles nothing anew.
    """

    steps: int = 25
    """MaskGIT steps per frame."""
    temperature: float = 1.0
    """Of the tokens' distribution; 0 takes the likeliest."""
    order: Literal["confidence", "random", "halton"] = "confidence"
    """Which tokens a step settles: the likeliest (with noise that fades over the steps), random ones, or such as lie
    evenly spread over the frame (Besnier et al. 2025)."""
    top_k: int = 0
    """Draw among this many of a token's likeliest codes only; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest codes whose probability, at temperature 1, adds up to this; 1 for all."""

    def __post_init__(self):
        # What is traced cannot be looked at.
        if isinstance(self.steps, int) and self.steps < 1:
            raise InputError(f"--steps {self.steps}: must be at least 1")
        if isinstance(self.temperature, int | float) and not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: must be finite and not negative")
        if self.top_k < 0:
            raise InputError(f"--top_k {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: must be above 0 and at most 1")


class RolloutState(NamedTuple):
    """All that the next frame depends on, besides the action.

    dynamics, decoder: Caches stacked over blocks, of S = window - 1 frames; frame t lies in slot t % S.
    tokens_BN: Of the last frame, int32.
    frame: Index of the next frame, int32.
    """

    dynamics: Past
    decoder: Past
    tokens_BN: jax.Array
    frame: jax.Array


def start_rollout(world: World, frames_BTHWC: jax.Array, actions_BTm1: jax.Array) -> RolloutState:
    """Reads prompt frames.

    Args:
      frames_BTHWC: At least one frame, in [0, 1]; of more than `window - 1`, the last ones count.
      actions_BTm1: int32, the actions between them; empty for a single frame.
    """
    S = world.cfg.window - 1
    frames_BTHWC, actions_BTm1 = frames_BTHWC[:, -S:], actions_BTm1[:, -S + 1 :] if S > 1 else actions_BTm1[:, :0]
    tokens_BTN = world.tokenizer.encode(frames_BTHWC)
    T = tokens_BTN.shape[1]
    actions_BT = jnp.pad(actions_BTm1[:, : T - 1], ((0, 0), (1, 0)), constant_values=-1)
    _, dynamics = world.dynamics.run(tokens_BTN, jnp.zeros_like(tokens_BTN, bool), actions_BT, None, 0)
    _, decoder = world.tokenizer.decode_frames(tokens_BTN, None, 0)
    return RolloutState(Past.of(dynamics, S), Past.of(decoder, S), tokens_BTN[:, -1], jnp.int32(T))


def next_frame(
    world: World, state: RolloutState, action_B: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> tuple[jax.Array, RolloutState]:
    """Draws the frame that an action leads to.

    Args:
      action_B: int32, one action for each rollout of the batch.
    Returns:
      The frame (B, H, W, C), float32 in [0, 1], and the state after it.
    """
    action_B1 = action_B[:, None]
    S = state.dynamics.k_BNQDS.shape[-1]
    past = state.dynamics, state.frame, state.tokens_BN

    def logits(tokens_BN: jax.Array, hidden_BN: jax.Array) -> jax.Array:
        out, _ = world.dynamics.run(tokens_BN[:, None], hidden_BN[:, None], action_B1, *past)
        return out[:, 0]

    if world.cfg.dynamics.kind == "causal":
        tokens_BN, dynamics = _token_by_token(world, state, action_B, key, cfg)
        tokens_B1N = tokens_BN[:, None]
    else:
        tokenizer = world.cfg.tokenizer
        columns = -(-tokenizer.frame_shape[1] // tokenizer.patch_size)
        tokens_BN = fill_tokens(logits, (len(action_B), world.cfg.dynamics.num_patches), key, cfg, columns)
        # Once more with all tokens in view: these keys and values are what later frames see.
        tokens_B1N = tokens_BN[:, None]
        _, dynamics = world.dynamics.run(tokens_B1N, jnp.zeros_like(tokens_B1N, bool), action_B1, *past)
    frames_B1HWC, decoder = world.tokenizer.decode_frames(tokens_B1N, state.decoder, state.frame)

    slot = state.frame % S
    caches = state.dynamics.write(dynamics, slot), state.decoder.write(decoder, slot)
    return jnp.clip(frames_B1HWC[:, 0], 0.0, 1.0), RolloutState(*caches, tokens_BN, state.frame + 1)


def rollout(
    world: World, frames_BTHWC: jax.Array, actions_BS: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> jax.Array:
    """Plays a sequence of actions from prompt frames; the batch is spread over all devices where they divide it.

    Args:
      frames_BTHWC: T prompt frames in [0, 1].
      actions_BS: int32; `actions_BS[:, t]` leads from frame t to frame t + 1, the first T - 1 between prompt frames.
    Returns:
      The S + 1 - T predicted frames that follow the prompt, (B, S + 1 - T, H, W, C), float32 in [0, 1].
    """
    graphdef, variables = nnx.split(world)
    devices = np.array(jax.local_devices())
    if len(devices) > 1 and len(actions_BS) % len(devices) == 0:
        mesh = jax.sharding.Mesh(devices, "data")
        split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p)) for p in (("data",), ()))
        frames_BTHWC, actions_BS = jax.device_put((frames_BTHWC, actions_BS), split)
        variables, key = jax.device_put((variables, key), whole)
    return _rollout(graphdef, variables, frames_BTHWC, actions_BS, key, cfg)


@functools.partial(jax.jit, static_argnames="graphdef")
def _rollout(graphdef, variables, frames_BTHWC, actions_BS, key, cfg):
    world = nnx.merge(graphdef, variables)
    T = frames_BTHWC.shape[1]
    state = start_rollout(world, frames_BTHWC, actions_BS[:, : T - 1])

    def play(state: RolloutState, action_B: jax.Array) -> tuple[RolloutState, jax.Array]:
        frame_BHWC, state = next_frame(world, state, action_B, jax.random.fold_in(key, state.frame), cfg)
        return state, frame_BHWC

    return jax.lax.scan(play, state, actions_BS[:, T - 1 :].swapaxes(0, 1))[1].swapaxes(0, 1)


def _token_by_token(
    world: World, state: RolloutState, action_B: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> tuple[jax.Array, KV]:
    """Draws a frame from a causal model: its tokens (B, N), and its temporal keys and values to keep."""

    def one_place(carry: tuple[jax.Array, KV], place: jax.Array) -> tuple[tuple[jax.Array, KV], tuple[jax.Array, KV]]:
        token_B, frame = carry
        logits_BK, frame, kvs = world.dynamics.run_token(
            token_B, place, action_B, frame, state.dynamics, state.frame, state.tokens_BN
        )
        token_B = draw(jax.nn.log_softmax(logits_BK), jax.random.fold_in(key, place), cfg)
        return (token_B, frame), (token_B, kvs)

    # The spatial cache begins anew in each frame.
    L, B, N, Q, _, D = state.dynamics.v_BNQSD.shape
    empty = KV(*[jnp.zeros((L, B, 1, N, Q, D), state.dynamics.v_BNQSD.dtype)] * 2)
    _, (tokens_NB, kvs) = jax.lax.scan(one_place, (jnp.zeros_like(action_B), empty), jnp.arange(N))
    # Stacked over places, the axes are (places, blocks, B, 1, 1, Q, D).
    return tokens_NB.T, jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, :, 0], 0, 3), kvs)


def fill_tokens(
    logits_fn, shape: tuple[int, int], key: jax.Array, cfg: SamplingConfig, columns: int | None = None
) -> jax.Array:
    """MaskGIT: starts with all tokens hidden and settles some in each step, on a cosine schedule.

    Args:
      logits_fn: From tokens (B, N) and a mask of the hidden ones to logits (B, N, K).
      columns: Tokens in a row of the frame, for the Halton order; without it the frame is taken for a single row.
    Returns:
      Tokens (B, N), int32, all settled.
    """
    B, N = shape
    if cfg.order == "halton":
        ranks_N = jnp.asarray(halton_ranks(N // (columns or N), columns or N))
        # Each frame enters the sequence elsewhere. The steps take the keys 0 to steps - 1; this one is free.
        start_B1 = jax.random.randint(jax.random.fold_in(key, cfg.steps), (B, 1), 0, N)
        position_BN = (ranks_N - start_B1) % N

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens_BN, hidden_BN = carry
        token_key, order_key = jax.random.split(jax.random.fold_in(key, i))
        log_p = jax.nn.log_softmax(logits_fn(tokens_BN, hidden_BN))
        tokens_BN = jnp.where(hidden_BN, draw(log_p, token_key, cfg), tokens_BN)
        done = (i + 1) / cfg.steps
        if cfg.order == "halton":
            score_BN = -position_BN.astype(jnp.float32)
        elif cfg.order == "random":
            score_BN = jax.random.gumbel(order_key, shape)
        else:
            confidence_BN = jnp.take_along_axis(log_p, tokens_BN[..., None], axis=-1)[..., 0]
            score_BN = confidence_BN + cfg.temperature * (1 - done) * jax.random.gumbel(order_key, shape)
        score_BN = jnp.where(hidden_BN, score_BN, jnp.inf)
        # Settled tokens score infinity and stay; the lowest `still_hidden` are drawn again in the next step.
        still_hidden = jnp.floor(N * jnp.cos(jnp.pi / 2 * done)).astype(jnp.int32)
        rank_BN = jnp.argsort(jnp.argsort(score_BN, axis=-1), axis=-1)
        return tokens_BN, hidden_BN & (rank_BN < still_hidden)

    carry = (jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    # cos(pi / 2) is not quite zero in float32, but its product with N is far below one: the last step settles all.
    return jax.lax.fori_loop(0, cfg.steps, step, carry)[0]


def draw(log_p: jax.Array, key: jax.Array, cfg: SamplingConfig) -> jax.Array:
    """Draws codes (...), int32, from log-probabilities (..., K) at a temperature; at 0 the likeliest.

    One random number per code drawn, looked up in the cumulative distribution: K of them, as for Gumbel noise, would
    take as long as a block of the model.
    """
    log_p = restrict(log_p, cfg)
    log_p -= jnp.max(log_p, axis=-1, keepdims=True)
    cumulative = jnp.cumsum(jnp.exp(log_p / jnp.maximum(cfg.temperature, 1e-6)), axis=-1)
    u = jax.random.uniform(key, (*log_p.shape[:-1], 1)) * cumulative[..., -1:]
    drawn = jnp.sum(cumulative <= u, axis=-1)
    return jnp.minimum(drawn, log_p.shape[-1] - 1).astype(jnp.int32)


def restrict(log_p_BNK: jax.Array, cfg: SamplingConfig) -> jax.Array:
    """Sets the log-probabilities of codes beyond `top_k` and `top_p` to -inf; the likeliest code always stays."""
    if cfg.top_k:
        least = jax.lax.top_k(log_p_BNK, min(cfg.top_k, log_p_BNK.shape[-1]))[0][..., -1:]
        log_p_BNK = jnp.where(log_p_BNK < least, -jnp.inf, log_p_BNK)
    if cfg.top_p < 1:
        sorted_BNK = jnp.sort(log_p_BNK, axis=-1, descending=True)
        p_BNK = jax.nn.softmax(sorted_BNK)
        likelier_BNK = jnp.cumsum(p_BNK, axis=-1) - p_BNK
        least = jnp.min(jnp.where(likelier_BNK < cfg.top_p, sorted_BNK, jnp.inf), axis=-1, keepdims=True)
        log_p_BNK = jnp.where(log_p_BNK < least, -jnp.inf, log_p_BNK)
    return log_p_BNK


@functools.cache
def halton_ranks(rows: int, columns: int) -> np.ndarray:
    """When each token of a frame settles in the Halton order: ranks from 0 to N - 1, (N,) int32, row by row.

    The sequence of bases 2 and 3 visits points of the unit square such that any stretch of it is evenly spread; the
    order is that in which it first meets each token.
    """
    order: dict[int, None] = {}  # of tokens, as they are met
    point = 1
    while len(order) < rows * columns:
        row, column = int(_radical_inverse(point, 2) * rows), int(_radical_inverse(point, 3) * columns)
        order.setdefault(row * columns + column)
        point += 1
    ranks_N = np.empty(rows * columns, np.int32)
    ranks_N[list(order)] = np.arange(rows * columns)
    return ranks_N


def _radical_inverse(i: int, base: int) -> float:
    """Digits of i mirrored at the point: a number in [0, 1)."""
    value, weight = 0.0, 1.0
    while i:
        weight /= base
        value += weight * (i % base)
        i //= base
    return value
