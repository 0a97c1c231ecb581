"""A MaskGIT in two: a backbone reads whole frames, and a small head fills the hidden tokens of the next one.

Of a plain MaskGIT training sees hidden tokens in the past too, which sampling never does, and each sampling step runs
all its blocks. Here every frame is guessed from a whole past, at no more cost, and a sampling step runs the head alone.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models import flops, init
from models.dynamics import Predicted, TokenState
from models.dynamics_config import DynamicsConfig, head_config
from models.kernels import KV, whole
from models.maskgit import MaskGIT, fill_tokens
from models.nn import Compute, Past, Places, STTransformer, Transformed
from models.sampling import SamplingConfig


class MaskGITHead(MaskGIT):
    """Predicts hidden tokens of each frame from its visible ones, whole earlier frames, and the action that led to it.

    Actions are added to each place, whatever `action_token`.
    """

    keeps_hidden = True  # what the head reads of the past

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(cfg, compute, rngs)
        self.head_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        places = Places(-(-cfg.frame_shape[1] // cfg.patch_size))
        self.head = STTransformer(head_config(cfg), compute, rngs, places, sees_time=False)

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
        """Predicts every token of a clip; `hidden_BTN` are those that are not seen for their own frame's sake.

        A frame after a past is read and guessed one by one, by `read` and `guess`.
        """
        assert past is None
        assert previous_BN is None
        read = self.read(tokens_BTN, actions_BT, last_BTHWC, keep=keep)
        nothing = jnp.full_like(tokens_BTN[:, :1], self.cfg.num_codes)
        before_BTN = jnp.concatenate([nothing, tokens_BTN[:, :-1]], axis=1)
        before_BTNM = jnp.pad(read.x_BTNM[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        logits_BTNK = self.guess(tokens_BTN, hidden_BTN, actions_BT, before_BTN, before_BTNM, last_BTHWC)
        return Predicted(logits_BTNK, read.x_BTNM, read.time, None)

    def read(
        self,
        tokens_BTN: jax.Array,
        actions_BT: jax.Array,
        last_BTHWC: jax.Array | None,
        past: Past | None = None,
        keep: bool = False,
    ) -> Transformed:
        """Runs the backbone over the frames of a clip, or over one after a past; all tokens are seen."""
        x_BTNM = whole(self.token_embedding[...])[tokens_BTN] + self.embed_actions(actions_BT)[:, :, None]
        return self.transformer(x_BTNM + self._picture(last_BTHWC) + self.position_NM[...], past, keep)

    def guess(
        self,
        tokens_BTN: jax.Array,
        hidden_BTN: jax.Array,
        actions_BT: jax.Array,
        before_BTN: jax.Array,
        before_BTNM: jax.Array,
        last_BTHWC: jax.Array | None,
    ) -> jax.Array:
        """Runs the head: logits (B, T, N, K), float32, of the tokens of each frame by itself.

        Args:
          before_BTN, before_BTNM: Of the frame before each, the tokens and what the backbone made of them.
        """
        table_KM = whole(self.token_embedding[...])
        # As in `MaskGIT.embed`.
        x_BTNM = table_KM[jnp.where(hidden_BTN, self.cfg.num_codes, tokens_BTN)]
        x_BTNM += jnp.where(hidden_BTN[..., None], table_KM[before_BTN], 0.0)
        x_BTNM += before_BTNM + self.embed_actions(actions_BT)[:, :, None] + self._picture(last_BTHWC)
        return self.logits(self.head(x_BTNM + self.head_position_NM[...]).x_BTNM)

    def fill(
        self, state: TokenState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig, columns: int
    ) -> tuple[jax.Array, KV, jax.Array]:
        assert state.hidden_BNM is not None
        actions_B1, last_B1HWC = action_B[:, None], state.picture_BHWC[:, None]
        before = state.tokens_BN[:, None], state.hidden_BNM[:, None]

        def logits(tokens_BN: jax.Array, hidden_BN: jax.Array) -> jax.Array:
            return self.guess(tokens_BN[:, None], hidden_BN[:, None], actions_B1, *before, last_B1HWC)[:, 0]

        tokens_BN = fill_tokens(logits, (len(action_B), self.cfg.num_patches), key, sampling, columns)
        read = self.read(tokens_BN[:, None], actions_B1, last_B1HWC, Past(state.dynamics, state.frame), keep=True)
        assert read.time
        return tokens_BN, read.time, read.x_BTNM[:, 0]

    def _picture(self, last_BTHWC: jax.Array | None) -> jax.Array | float:
        if not self.cfg.sees_picture:
            return 0.0
        assert last_BTHWC is not None
        return self.embed_picture(last_BTHWC)

    @staticmethod
    def extra_places(cfg: DynamicsConfig) -> int:
        """None."""
        return 0

    @classmethod
    def flops(cls, cfg: DynamicsConfig, num_frames: int) -> int:
        return flops.maskgit_read(cfg, num_frames) + flops.maskgit_head(cfg, num_frames)

    @staticmethod
    def frame_flops(cfg: DynamicsConfig, window: int, sampling: SamplingConfig) -> int:
        return flops.maskgit_read(cfg, 1, window) + sampling.steps * flops.maskgit_head(cfg, 1)
