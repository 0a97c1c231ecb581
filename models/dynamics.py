"""The dynamics model: a MaskGIT that fills in the tokens of a frame, given the past and an action (Genie, §2.1)."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models.nn import KV, Compute, STConfig, STTransformer, position_table


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(STConfig):
    """Size of the dynamics model. Defaults: Appendix F, CoinRun."""

    num_blocks: int = 12
    """ST blocks."""
    action_token: Literal["prepend", "add"] = "prepend"
    """The action stands beside the frame's tokens, or is added to each of them (the paper's way)."""
    mask_rates: Literal["frame", "clip"] = "frame"
    """In training, how much is hidden is drawn for each frame by itself, or for the clip as a whole (the paper's way).
    """
    num_codes: Annotated[int, tyro.conf.Suppress] = 1024
    """Codes of the tokenizer, set from its checkpoint."""
    num_patches: Annotated[int, tyro.conf.Suppress] = 256
    """Tokens per frame, set from the tokenizer's checkpoint."""
    num_actions: Annotated[int, tyro.conf.Suppress] = 6
    """Actions, latent or true, set from the LAM's checkpoint or the dataset."""


class Dynamics(nnx.Module):
    """Predicts hidden tokens of each frame from its visible ones, earlier frames, and the action that led to it.

    Tokens are (B, T, N) int32 from 0 to K - 1; `hidden` is a boolean mask of the same shape. `actions_BT[:, t]` leads
    *to* frame t; -1 means none, as for the first frame of a clip.
    """

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        self.compute = compute
        # The last row stands for a hidden token, and for no action.
        self.token_embedding = nnx.Param(_normal(rngs, cfg.num_codes + 1, cfg.width))
        self.action_embedding = nnx.Param(_normal(rngs, cfg.num_actions + 1, cfg.width))
        places = cfg.num_patches + (cfg.action_token == "prepend")
        self.position_NM = position_table(places, cfg.width, rngs)
        self.transformer = STTransformer(cfg, compute, rngs)

    def __call__(self, tokens_BTN: jax.Array, hidden_BTN: jax.Array, actions_BT: jax.Array) -> jax.Array:
        """Logits (B, T, N, K), float32, of every token of a clip."""
        return self._logits(self.transformer(self._embed(tokens_BTN, hidden_BTN, actions_BT)))

    def run(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        past: KV | None,
        start: jax.Array | int,
        previous_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """As `__call__`, for a clip or for one frame after a cache; also gives the keys and values to keep.

        See `STTransformer.run`; `previous_BN` are the tokens of the frame before the first given one, if there is one.
        """
        x, kvs = self.transformer.run(self._embed(tokens_BTN, hidden_BTN, actions_BT, previous_BN), past, start)
        assert kvs is not None
        return self._logits(x), kvs

    def _embed(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        previous_BN: jax.Array | None = None,
    ) -> jax.Array:
        known_BTN = jnp.where(hidden_BTN, self.cfg.num_codes, tokens_BTN)
        if previous_BN is None:
            previous_BN = jnp.full_like(tokens_BTN[:, 0], self.cfg.num_codes)
        # A hidden place knows which token stood there a frame ago. The logits are products with the same embeddings, so
        # that what stays as it is, which is most of a video, need not be learned code by code.
        previous_BTN = jnp.concatenate([previous_BN[:, None], known_BTN[:, :-1]], axis=1)
        table = self.token_embedding[...]
        x = table[known_BTN] + jnp.where(hidden_BTN[..., None], table[previous_BTN], 0.0)
        actions_BT1M = self.action_embedding[...][actions_BT][:, :, None]  # -1 is the last row
        if self.cfg.action_token == "prepend":
            x = jnp.concatenate([actions_BT1M, x], axis=2)
        else:
            x += actions_BT1M
        return x + self.position_NM[...]

    def _logits(self, x_BTNM: jax.Array) -> jax.Array:
        x_BTNM = x_BTNM[:, :, -self.cfg.num_patches :]
        table = self.token_embedding[: self.cfg.num_codes].astype(x_BTNM.dtype)
        logits = jnp.einsum("btnm,km->btnk", x_BTNM, table, preferred_element_type=jnp.float32)
        return logits * (2.0 * self.cfg.width**-0.5)


def _normal(rngs: nnx.Rngs, rows: int, width: int) -> jax.Array:
    return 0.5 * jax.random.normal(rngs.params(), (rows, width))


def hide_tokens(cfg: DynamicsConfig, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Draws which tokens (B, T, N) training hides; none of the first frame, which is always a prompt.

    The share hidden is uniform in [0.5, 1) for the clip as a whole (Genie, §2.1); drawn for each frame by itself, it
    is uniform in [0, 1), so that nearly whole pasts occur as often as in sampling, where the past is whole.
    """
    B, T, _ = shape
    rate_key, token_key = jax.random.split(key)
    if cfg.mask_rates == "clip":
        rates = jax.random.uniform(rate_key, (B, 1, 1), minval=0.5, maxval=1.0)
    else:
        rates = jax.random.uniform(rate_key, (B, T, 1))
    hidden_BTN = jax.random.uniform(token_key, shape) < rates
    return hidden_BTN.at[:, 0].set(False)


def masked_cross_entropy(
    logits_BTNK: jax.Array, tokens_BTN: jax.Array, hidden_BTN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats and 1 for a right guess, each (B, T, N) float32 and 0 for tokens that were not hidden."""
    log_p_BTNK = jax.nn.log_softmax(logits_BTNK.astype(jnp.float32), axis=-1)
    nll_BTN = -jnp.take_along_axis(log_p_BTNK, tokens_BTN[..., None], axis=-1)[..., 0]
    hits_BTN = (jnp.argmax(logits_BTNK, axis=-1) == tokens_BTN).astype(jnp.float32)
    return jnp.where(hidden_BTN, nll_BTN, 0.0), jnp.where(hidden_BTN, hits_BTN, 0.0)
