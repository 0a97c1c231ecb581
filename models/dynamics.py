"""The dynamics model: fills in the tokens of a frame, given the past and an action (Genie, §2.1).

It is a MaskGIT, which fills hidden tokens in any order, or a causal model, which predicts token after token.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from models.nn import KV, Compute, Past, STConfig, STTransformer, linear_flops, position_table, transformer_flops


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(STConfig):
    """Size of the dynamics model. Defaults: Appendix F, CoinRun."""

    num_blocks: int = 12
    """ST blocks of the dynamics model."""
    kind: Literal["maskgit", "causal"] = "maskgit"
    """maskgit fills hidden tokens in any order; causal predicts token after token, row by row."""
    action_token: Literal["prepend", "add"] = "prepend"
    """The action stands before the frame's tokens, or is added to each of them (the paper's way)."""
    mask_rates: Literal["frame", "clip"] = "frame"
    """In training of a MaskGIT, how much is hidden is drawn for each frame by itself, or for the clip as a whole (the
    paper's way)."""
    num_codes: Annotated[int, tyro.conf.Suppress] = 1024
    """Codes of the tokenizer, set from its checkpoint."""
    num_patches: Annotated[int, tyro.conf.Suppress] = 256
    """Tokens per frame, set from the tokenizer's checkpoint."""
    num_actions: Annotated[int, tyro.conf.Suppress] = 6
    """Actions, latent or true, set from the LAM's checkpoint or the dataset."""

    @property
    def extra_places(self) -> int:
        """Places beside a frame's tokens: the action's, in a MaskGIT. In a causal model it takes the first place."""
        return int(self.kind == "maskgit" and self.action_token == "prepend")


def forward_flops(cfg: DynamicsConfig, num_frames: int, past: int = 0) -> int:
    """Of a forward pass over one clip, after a cache of `past` frames; see `models.nn.transformer_flops`."""
    places = cfg.num_patches + cfg.extra_places
    logits = linear_flops(cfg.num_patches * num_frames, cfg.width, cfg.num_codes)
    return transformer_flops(cfg, places, num_frames, past) + logits


class Dynamics(nnx.Module):
    """Predicts hidden tokens of each frame from its visible ones, earlier frames, and the action that led to it.

    A causal model predicts each token from those before it in its frame, whatever is hidden.

    Tokens are (B, T, N) int32 from 0 to K - 1; `hidden` is a boolean mask of the same shape. `actions_BT[:, t]` leads
    *to* frame t; -1 means none, as for the first frame of a clip.
    """

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        self.compute = compute
        # The last row stands for a hidden token, and for no action.
        self.token_embedding = nnx.Param(_normal(rngs, cfg.num_codes + 1, cfg.width))
        self.action_embedding = nnx.Param(_normal(rngs, cfg.num_actions + 1, cfg.width))
        self.position_NM = position_table(cfg.num_patches + cfg.extra_places, cfg.width, rngs)
        self.transformer = STTransformer(cfg, compute, rngs, causal_space=cfg.kind == "causal")

    def start_from(self, codebook_KL: np.ndarray) -> None:
        """Before training, makes the embeddings of codes alike where the tokenizer's unit codes are.

        What a shift of the picture does to one code then also holds for codes that look like it. Part of each embedding
        stays its own, so that the logits can tell such codes apart.
        """
        L, M = codebook_KL.shape[1], self.cfg.width
        directions_LM = np.asarray(jax.random.orthogonal(jax.random.key(0), max(L, M)))[:L, :M]
        alike_KM = 0.4 * M**0.5 * codebook_KL @ directions_LM
        table = self.token_embedding[...]
        self.token_embedding[...] = table.at[:-1].set(alike_KM + 0.6 * table[:-1])

    def __call__(self, tokens_BTN: jax.Array, hidden_BTN: jax.Array, actions_BT: jax.Array) -> jax.Array:
        """Logits (B, T, N, K), float32, of every token of a clip."""
        return self._logits(self.transformer(self._embed(tokens_BTN, hidden_BTN, actions_BT)))

    def run(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        past: Past | None,
        start: jax.Array | int,
        previous_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """As `__call__`, for a clip or for one frame after a cache; also gives the keys and values to keep.

        See `STTransformer.run`; `previous_BN` are the tokens of the frame before the first given one, if there is one.
        """
        x, kvs = self.transformer.run(self._embed(tokens_BTN, hidden_BTN, actions_BT, previous_BN), past, start)
        assert kvs is not None
        return self._logits(x), kvs

    def run_token(
        self,
        token_B: jax.Array,
        place: jax.Array,
        action_B: jax.Array,
        frame: KV,
        past: Past,
        start: jax.Array,
        previous_BN: jax.Array,
    ) -> tuple[jax.Array, KV, KV]:
        """Of a causal model: logits (B, K) of the token at `place`, in a frame after a cache.

        Args:
          token_B: The token before it in the frame; of no account at place 0.
          frame, past, start: See `STTransformer.run_patch`, whose other results are returned too.
          previous_BN: Tokens of the frame before.
        """
        x_BM = self._causal(token_B, action_B, previous_BN[:, place], place == 0) + self.position_NM[place]
        x, frame, kvs = self.transformer.run_patch(x_BM[:, None, None], frame, place, past, start)
        return self._logits(x)[:, 0, 0], frame, kvs

    def _causal(self, before: jax.Array, action: jax.Array, previous: jax.Array, first: jax.Array) -> jax.Array:
        """Embeds places: the token before each in its frame, or at the first the action, and the token a frame ago."""
        table, actions = self.token_embedding[...], self.action_embedding[...][action]
        if self.cfg.action_token == "add":
            x = jnp.where(first[..., None], table[-1], table[before]) + actions
        else:
            x = jnp.where(first[..., None], actions, table[before])
        return x + table[previous]

    def _embed(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        previous_BN: jax.Array | None = None,
    ) -> jax.Array:
        causal = self.cfg.kind == "causal"
        known_BTN = tokens_BTN if causal else jnp.where(hidden_BTN, self.cfg.num_codes, tokens_BTN)
        if previous_BN is None:
            previous_BN = jnp.full_like(tokens_BTN[:, 0], self.cfg.num_codes)
        previous_BTN = jnp.concatenate([previous_BN[:, None], known_BTN[:, :-1]], axis=1)
        if causal:
            before_BTN = jnp.roll(tokens_BTN, 1, axis=2)
            first_N = jnp.arange(self.cfg.num_patches) == 0
            return self._causal(before_BTN, actions_BT[..., None], previous_BTN, first_N) + self.position_NM[...]
        # A hidden place knows which token stood there a frame ago. The logits are products with the same embeddings, so
        # that what stays as it is, which is most of a video, need not be learned code by code.
        table = self.token_embedding[...]
        x = table[known_BTN] + jnp.where(hidden_BTN[..., None], table[previous_BTN], 0.0)
        actions_BT1M = self.action_embedding[...][actions_BT][:, :, None]  # -1 is the last row
        if self.cfg.action_token == "prepend":
            x = jnp.concatenate([actions_BT1M, x], axis=2)
        else:
            x += actions_BT1M
        return x + self.position_NM[...]

    def _logits(self, x_BTNM: jax.Array) -> jax.Array:
        x_BTNM = x_BTNM[:, :, self.cfg.extra_places :]
        table = self.token_embedding[: self.cfg.num_codes].astype(x_BTNM.dtype)
        logits = jnp.einsum("btnm,km->btnk", x_BTNM, table, preferred_element_type=jnp.float32)
        return logits * (2.0 * self.cfg.width**-0.5)


def _normal(rngs: nnx.Rngs, rows: int, width: int) -> jax.Array:
    return 0.5 * jax.random.normal(rngs.params(), (rows, width))


def hide_tokens(cfg: DynamicsConfig, key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Draws which tokens (B, T, N) training hides; none of the first frame, which is always a prompt.

    All others are to be predicted by a causal model. For a MaskGIT the share hidden is uniform in [0.5, 1) for the clip
    as a whole (Genie, §2.1); drawn for each frame by itself, it is uniform in [0, 1), so that nearly whole pasts occur
    as often as in sampling, where the past is whole.
    """
    B, T, _ = shape
    if cfg.kind == "causal":
        return jnp.ones(shape, bool).at[:, 0].set(False)
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
