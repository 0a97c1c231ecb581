"""MaskGIT (Chang et al. 2022): fills the hidden tokens of a frame in a few steps, in any order (Genie, §2.1)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models import flops
from models.dynamics import DynamicsConfig, Predicted, TokenDynamics, TokenState
from models.kernels import KV, whole
from models.nn import Past
from models.sampling import SamplingConfig, draw_codes


class MaskGIT(TokenDynamics):
    """Predicts hidden tokens of each frame from its visible ones, earlier frames, and the action that led to it."""

    def embed(
        self, tokens_BTN: jax.Array, hidden_BTN: jax.Array, actions_BT: jax.Array, previous_BN: jax.Array
    ) -> jax.Array:
        known_BTN = jnp.where(hidden_BTN, self.cfg.num_codes, tokens_BTN)
        previous_BTN = jnp.concatenate([previous_BN[:, None], known_BTN[:, :-1]], axis=1)
        # A hidden place knows which token stood there a frame ago. The logits are products with the same embeddings, so
        # that what stays as it is, which is most of a video, need not be learned code by code.
        table_KM = whole(self.token_embedding[...])
        x_BTNM = table_KM[known_BTN] + jnp.where(hidden_BTN[..., None], table_KM[previous_BTN], 0.0)
        actions_BT1M = self.embed_actions(actions_BT)[:, :, None]
        if self.cfg.action_token == "prepend":
            return jnp.concatenate([actions_BT1M, x_BTNM], axis=2) + self.position_NM[...]
        return x_BTNM + actions_BT1M + self.position_NM[...]

    @staticmethod
    def extra_places(cfg: DynamicsConfig) -> int:
        """A prepended action's."""
        return int(cfg.action_token == "prepend")

    @staticmethod
    def frame_flops(cfg: DynamicsConfig, window: int, sampling: SamplingConfig) -> int:
        forward = flops.dynamics_forward(cfg, 1, window, MaskGIT.extra_places(cfg))
        return (sampling.steps + 1) * forward

    @staticmethod
    def hide(cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int) -> jax.Array:
        """The share hidden is uniform in [0.5, 1) for the clip as a whole (Genie, §2.1).

        Drawn for each frame by itself, it is uniform in [0, 1), so that nearly whole pasts occur as often as in
        sampling, where the past is whole.
        """
        rate_key, token_key = jax.random.split(key)
        if cfg.mask_rates == "clip":
            rates = jax.random.uniform(rate_key, (num_clips, 1, 1), minval=0.5, maxval=1.0)
        else:
            rates = jax.random.uniform(rate_key, (num_clips, num_frames, 1))
        return jax.random.uniform(token_key, (num_clips, num_frames, cfg.num_patches)) < rates

    def fill(
        self, state: TokenState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig, columns: int
    ) -> tuple[jax.Array, KV, jax.Array]:
        past = Past(state.dynamics, state.frame)

        def read(tokens_B1N: jax.Array, hidden_B1N: jax.Array) -> Predicted:
            last_B1HWC = state.picture_BHWC[:, None]
            return self(tokens_B1N, hidden_B1N, action_B[:, None], past, state.tokens_BN, last_B1HWC, keep=True)

        def logits(tokens_BN: jax.Array, hidden_BN: jax.Array) -> jax.Array:
            return read(tokens_BN[:, None], hidden_BN[:, None]).logits_BTNK[:, 0]

        tokens_BN = fill_tokens(logits, (len(action_B), self.cfg.num_patches), key, sampling, columns)
        # Once more with all tokens in view: these keys and values are what later frames see.
        tokens_B1N = tokens_BN[:, None]
        out = read(tokens_B1N, jnp.zeros_like(tokens_B1N, bool))
        assert out.time
        return tokens_BN, out.time, out.hidden_BTNM[:, 0]


def fill_tokens(
    logits_fn: Callable[[jax.Array, jax.Array], jax.Array],
    shape: tuple[int, int],
    key: jax.Array,
    cfg: SamplingConfig,
    columns: int | None = None,
) -> jax.Array:
    """Starts with all tokens hidden and settles some in each step, on a cosine schedule.

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
        log_p_BNK = jax.nn.log_softmax(logits_fn(tokens_BN, hidden_BN))
        tokens_BN = jnp.where(hidden_BN, draw_codes(log_p_BNK, token_key, cfg), tokens_BN)
        done = (i + 1) / cfg.steps
        if cfg.order == "halton":
            score_BN = -position_BN.astype(jnp.float32)
        elif cfg.order == "random":
            score_BN = jax.random.gumbel(order_key, shape)
        else:
            confidence_BN = jnp.take_along_axis(log_p_BNK, tokens_BN[..., None], axis=-1)[..., 0]
            score_BN = confidence_BN + cfg.temperature * (1 - done) * jax.random.gumbel(order_key, shape)
        score_BN = jnp.where(hidden_BN, score_BN, jnp.inf)
        # Settled tokens score infinity and stay; the lowest `still_hidden` are drawn again in the next step.
        still_hidden = jnp.floor(N * jnp.cos(jnp.pi / 2 * done)).astype(jnp.int32)
        rank_BN = jnp.argsort(jnp.argsort(score_BN, axis=-1), axis=-1)
        return tokens_BN, hidden_BN & (rank_BN < still_hidden)

    carry = (jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    # cos(pi / 2) is not quite zero in float32, but its product with N is far below one: the last step settles all.
    return jax.lax.fori_loop(0, cfg.steps, step, carry)[0]


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
