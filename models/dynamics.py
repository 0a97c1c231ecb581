"""Dynamics models: the next frame, given the past and an action (Genie, §2.1).

A *kind* of dynamics is a subclass of `Dynamics`, looked up by name in `models.genie.DYNAMICS`. Three kinds work on the
tokenizer's tokens and share what is here: a MaskGIT (`models.maskgit`), which fills hidden tokens in any order, one cut
in backbone and head (`models.maskgit_head`), and a causal model (`models.causal`), which predicts token after token. A
flow (`models.flow`) makes frames of pixels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import flops, init
from models.actions import ColumnEmbedding, actions_to
from models.dynamics_config import DynamicsConfig
from models.errors import InputError
from models.kernels import KV, masked_cross_entropy, products, whole
from models.motion import Damage, draw_damage, frames_before
from models.nn import Compute, Past, Places, STTransformer, linear, patchify
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer


class Seen(NamedTuple):
    """A batch of clips as a dynamics model is trained on it; what a kind does not look at is never computed.

    coded: What the tokenizer makes of them, tokens (B, T, N) or latents (B, T, N, L); None without one.
    frames_BTHWC: In [0, 1]; from a token dataset without, the frames that the tokens make.
    last_BTHWC: For each frame the picture before it as the model is shown it; see `Dynamics.pictures_before`.
    actions_BTm1: int32, or rows (see `models.actions`); entry t leads from frame t to frame t + 1.
    codes_BTm1L: Of a LAM that learns along with the model, with their gradient.
    """

    coded: jax.Array | None
    frames_BTHWC: jax.Array
    last_BTHWC: jax.Array
    actions_BTm1: jax.Array
    codes_BTm1L: jax.Array | None = None


class Dynamics(nnx.Module):
    """What every kind of dynamics model answers to.

    A kind whose worlds have no tokenizer (`needs_tokenizer`) is given None in its place.

    keeps_hidden: Whether the state of a rollout holds the last frame's hidden states (see `hidden`), for heads; as
      `hidden_BNM`, else None.
    """

    keeps_hidden = False
    action_embedding: Any
    action_columns: Any

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg

    def embed_actions(self, actions_X: jax.Array) -> jax.Array:
        """Embeddings (..., M) of actions; none is the last row."""
        table_AM = whole(self.action_embedding[...])
        if not self.cfg.action_values:
            return table_AM[actions_X]
        return jnp.where(jnp.isnan(actions_X[..., :1]), table_AM[-1], self.action_columns(actions_X))

    @staticmethod
    def needs_tokenizer(cfg: DynamicsConfig) -> bool:
        """Whether a world of this configuration has a tokenizer."""
        return True

    @staticmethod
    def flops(cfg: DynamicsConfig, num_frames: int) -> int:
        """Floating-point operations of a forward pass over one clip; see `models.flops`."""
        raise NotImplementedError

    @staticmethod
    def frame_flops(cfg: DynamicsConfig, window: int, sampling: SamplingConfig) -> int:
        """Floating-point operations of drawing one frame after `window` others, without decoding it."""
        raise NotImplementedError

    @staticmethod
    def draw(
        cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int, weight_BT: jax.Array | None = None
    ) -> Any:
        """What training draws for a batch as a whole: a tree of batch-first arrays, so that it can be cut in parts.

        Args:
          weight_BT: What the frames count (see `models.padding`); of those that count nothing nothing is learned.
        """
        raise NotImplementedError

    def pictures_before(self, frames_BTHWC: jax.Array, drawn: Any) -> jax.Array:
        """For each frame in [0, 1] the one before it, as training shows it to the model."""
        return frames_before(frames_BTHWC)

    def loss(self, seen: Seen, drawn: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of clips, a mean over them, and metrics; `drawn` is theirs of what `draw` gave."""
        raise NotImplementedError

    def hidden(self, seen: Seen) -> jax.Array:
        """Hidden states (B, T, N, M) of clips that are seen whole; those of frame t know all up to it.

        Raises:
          InputError: This kind has none to judge by.
        """
        raise InputError(f"`heads`: a {self.cfg.kind} dynamics model has no hidden states to judge by; leave them out")

    def start(self, tokenizer: Any, frames_BTHWC: jax.Array, actions_BTm1: jax.Array, window: int) -> Any:
        """Reads prompt frames, at most `window`: a state, a NamedTuple whose `frame` is the index of the next frame.

        All else that it holds has the batch first, but for caches, which have the blocks first and the batch next.
        """
        raise NotImplementedError

    def next_frame(
        self, tokenizer: Any, state: Any, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig
    ) -> tuple[jax.Array, Any]:
        """Draws the frame (B, H, W, C), about [0, 1], that an action leads to; also the state after it."""
        raise NotImplementedError

    def start_from(self, tokenizer: Any) -> None:
        """Before training, takes over what the tokenizer knows already."""


class TokenState(NamedTuple):
    """All that the next frame depends on, besides the action.

    dynamics, decoder: Caches along time, stacked over blocks, of `window` frames; frame t lies in slot t % S.
    tokens_BN: Of the last frame, int32.
    picture_BHWC: The last frame, in [0, 1].
    frame: Index of the next frame, int32.
    hidden_BNM: Hidden states of the last frame; None unless they are kept.
    """

    dynamics: KV
    decoder: KV
    tokens_BN: jax.Array
    picture_BHWC: jax.Array
    frame: jax.Array
    hidden_BNM: jax.Array | None


class Predicted(NamedTuple):
    """What a model of tokens says of each place.

    logits_BTNK: float32.
    hidden_BTNM: Hidden states that the logits are products of.
    time, space: Keys and values, stacked over blocks; None unless asked for.
    """

    logits_BTNK: jax.Array
    hidden_BTNM: jax.Array
    time: KV | None
    space: KV | None


class Hidden(NamedTuple):
    """What training draws for a model of tokens.

    hidden_BTN: Which tokens are to be predicted; none of the first frame, which is always a prompt.
    weight_B: 1 over their share in the whole batch.
    damage: Of the last pictures; None where the model does not see them.
    """

    hidden_BTN: jax.Array
    weight_B: jax.Array
    damage: Damage | None


class TokenDynamics(Dynamics):
    """Predicts the tokens of each frame, int32 from 0 to K - 1, from earlier frames and the action that led to it.

    Actions are given by the frame that they lead to: `actions_BT[:, t]` leads to frame t; -1 or a row of NaN
    means none, as for the first frame of a clip.
    """

    causal_space = False

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(cfg, compute, rngs)
        # The last row stands for a hidden token, and for no action.
        self.token_embedding = init.embeddings(rngs, cfg.num_codes + 1, cfg.width)
        self.action_embedding = init.embeddings(rngs, cfg.num_actions + 1, cfg.width)
        self.position_NM = init.positions(rngs, cfg.num_patches + self.extra_places(cfg), cfg.width)
        if cfg.sees_picture:
            self.picture_in = linear(cfg.patch_size**2 * cfg.frame_shape[2], cfg.width, compute, rngs, bias=True)
        places = Places(-(-cfg.frame_shape[1] // cfg.patch_size), self.extra_places(cfg))
        self.transformer = STTransformer(cfg, compute, rngs, places, causal_space=self.causal_space)
        if cfg.action_values:
            self.action_columns = ColumnEmbedding(cfg, compute, rngs)

    def __call__(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        past: Past | None = None,
        previous_BN: jax.Array | None = None,
        last_BTHWC: jax.Array | None = None,
        keep: bool = False,
    ) -> Predicted:
        """Predicts every token of a clip, or of one frame after a past.

        Args:
          hidden_BTN: True for tokens that the model may not see.
          previous_BN: Tokens of the frame before the first given one, if there is one.
          last_BTHWC: For each frame the picture before it, in [0, 1]; of no account to a model that does not see it.
          past, keep: See `STTransformer`.
        """
        if previous_BN is None:
            previous_BN = jnp.full_like(tokens_BTN[:, 0], self.cfg.num_codes)
        x_BTNM = self.embed(tokens_BTN, hidden_BTN, actions_BT, previous_BN)
        if self.cfg.sees_picture:
            assert last_BTHWC is not None
            x_BTNM = x_BTNM.at[:, :, self.extra_places(self.cfg) :].add(self.embed_picture(last_BTHWC))
        return self._predict(x_BTNM, past, keep)

    def embed_picture(self, last_BTHWC: jax.Array) -> jax.Array:
        """What each place takes in of the picture before, (B, T, N, M)."""
        return self.picture_in(2.0 * patchify(last_BTHWC, self.cfg.patch_size) - 1.0)

    def embed(
        self, tokens_BTN: jax.Array, hidden_BTN: jax.Array, actions_BT: jax.Array, previous_BN: jax.Array
    ) -> jax.Array:
        """The transformer's input, (B, T, N + extra places, M); see `__call__`."""
        raise NotImplementedError

    def fill(
        self, state: TokenState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig, columns: int
    ) -> tuple[jax.Array, KV, jax.Array]:
        """Draws the tokens (B, N) of the next frame; also their keys and values along time, which later frames see, and
        their hidden states (B, N, M).

        Args:
          columns: Tokens in a row of the frame.
        """
        raise NotImplementedError

    @staticmethod
    def extra_places(cfg: DynamicsConfig) -> int:
        """Places before a frame's tokens, such as the action's; none, unless a kind says otherwise."""
        return 0

    @classmethod
    def flops(cls, cfg: DynamicsConfig, num_frames: int) -> int:
        return flops.dynamics_forward(cfg, num_frames, extra_places=cls.extra_places(cfg))

    @staticmethod
    def hide(cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int) -> jax.Array:
        """Draws which tokens (B, T, N) training hides, the first frame's aside."""
        raise NotImplementedError

    @classmethod
    def draw(
        cls, cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int, weight_BT: jax.Array | None = None
    ) -> Hidden:
        hidden_BTN = cls.hide(cfg, key, num_clips, num_frames).at[:, 0].set(False)
        if weight_BT is not None:
            hidden_BTN &= weight_BT[:, :, None] > 0  # what is not to be predicted is not in the loss
        weight = 1.0 / jnp.maximum(jnp.mean(hidden_BTN), 1e-6)
        damage = None
        if cfg.sees_picture:
            damage = draw_damage(key, num_clips, (num_frames, *cfg.frame_shape), cfg.picture_blur, cfg.picture_noise)
        return Hidden(hidden_BTN, jnp.full(num_clips, weight), damage)

    def pictures_before(self, frames_BTHWC: jax.Array, drawn: Hidden) -> jax.Array:
        last_BTHWC = frames_before(frames_BTHWC)
        return drawn.damage(last_BTHWC) if drawn.damage else last_BTHWC

    def loss(self, seen: Seen, drawn: Hidden) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of the hidden tokens, in nats, and the share that is guessed right."""
        assert seen.coded is not None
        actions_BT = actions_to(seen.actions_BTm1)
        out = self(seen.coded, drawn.hidden_BTN, actions_BT, last_BTHWC=seen.last_BTHWC)
        nll_BTN, hits_BTN = masked_cross_entropy(out.logits_BTNK, seen.coded, drawn.hidden_BTN)
        weight_B11 = drawn.weight_B[:, None, None]
        loss = jnp.mean(nll_BTN * weight_B11)
        return loss, {"cross_entropy": loss, "accuracy": jnp.mean(hits_BTN * weight_B11)}

    def hidden(self, seen: Seen) -> jax.Array:
        assert seen.coded is not None
        nothing_BTN, actions_BT = jnp.zeros_like(seen.coded, bool), actions_to(seen.actions_BTm1)
        return self(seen.coded, nothing_BTN, actions_BT, last_BTHWC=seen.last_BTHWC).hidden_BTNM

    def start(self, tokenizer: Tokenizer, frames_BTHWC: jax.Array, actions_BTm1: jax.Array, window: int) -> TokenState:
        tokens_BTN = tokenizer.encode(frames_BTHWC)
        nothing_BTN = jnp.zeros_like(tokens_BTN, bool)
        last_BTHWC = frames_before(frames_BTHWC)
        read = self(tokens_BTN, nothing_BTN, actions_to(actions_BTm1), last_BTHWC=last_BTHWC, keep=True)
        decoded = tokenizer.decode_after(tokens_BTN, last_BTHWC, keep=True)
        assert read.time
        assert decoded.time
        caches = read.time.padded(window), decoded.time.padded(window)
        picture_BHWC = frames_BTHWC[:, -1].astype(jnp.float32)
        hidden_BNM = read.hidden_BTNM[:, -1] if self.keeps_hidden else None
        return TokenState(*caches, tokens_BTN[:, -1], picture_BHWC, jnp.int32(tokens_BTN.shape[1]), hidden_BNM)

    def next_frame(
        self, tokenizer: Tokenizer, state: TokenState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig
    ) -> tuple[jax.Array, TokenState]:
        tokens_BN, time, hidden_BNM = self.fill(state, action_B, key, sampling, tokenizer.cfg.columns)
        past = Past(state.decoder, state.frame)
        decoded = tokenizer.decode_after(tokens_BN[:, None], state.picture_BHWC[:, None], past, keep=True)
        assert decoded.time
        slot = state.frame % state.dynamics.k_BRQDS.shape[-1]
        caches = state.dynamics.write(time, slot), state.decoder.write(decoded.time, slot)
        picture_BHWC = jnp.clip(decoded.frames_BTHWC[:, 0], 0.0, 1.0)
        hidden = hidden_BNM if self.keeps_hidden else None
        return picture_BHWC, TokenState(*caches, tokens_BN, picture_BHWC, state.frame + 1, hidden)

    def start_from(self, tokenizer: Tokenizer) -> None:
        """Makes the embeddings of codes alike where the tokenizer's are.

        What a shift of the picture does to one code then also holds for codes that look like it.
        """
        table_KM, codebook_KL = self.token_embedding[...], np.asarray(tokenizer.vq.codebook_KL)
        self.token_embedding[...] = table_KM.at[:-1].set(init.alike(table_KM[:-1], codebook_KL))

    def _predict(self, x_BTNM: jax.Array, past: Past | None, keep: bool) -> Predicted:
        hidden_BTNM, time, space = self.transformer(x_BTNM, past, keep)
        hidden_BTNM = hidden_BTNM[:, :, self.extra_places(self.cfg) :]
        return Predicted(self.logits(hidden_BTNM), hidden_BTNM, time, space)

    def logits(self, hidden_BTNM: jax.Array) -> jax.Array:
        """Logits (B, T, N, K), float32: products with the codes' embeddings."""
        table_KM = self.token_embedding[: self.cfg.num_codes].astype(hidden_BTNM.dtype)
        return products(hidden_BTNM * (2.0 * self.cfg.width**-0.5), table_KM)
