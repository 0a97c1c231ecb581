"""A causal dynamics model: predicts a frame token after token, row by row."""

import jax
import jax.numpy as jnp

from models import flops
from models.dynamics import DynamicsConfig, Predicted, TokenDynamics, TokenState
from models.kernels import KV, whole
from models.nn import Past
from models.sampling import SamplingConfig, draw_codes


class Causal(TokenDynamics):
    """Predicts each token from those before it in its frame, whatever is hidden.

    A place takes in the token before it, at the first place the action, and the token that stood there a frame ago.
    """

    causal_space = True

    def embed(
        self, tokens_BTN: jax.Array, hidden_BTN: jax.Array, actions_BT: jax.Array, previous_BN: jax.Array
    ) -> jax.Array:
        del hidden_BTN  # what is to be predicted is never seen anyway
        previous_BTN = jnp.concatenate([previous_BN[:, None], tokens_BTN[:, :-1]], axis=1)
        before_BTN = jnp.roll(tokens_BTN, 1, axis=2)
        first_N = jnp.arange(self.cfg.num_patches) == 0
        return (
            self._places(before_BTN, self.embed_actions(actions_BT)[:, :, None], previous_BTN, first_N)
            + self.position_NM[...]
        )

    @staticmethod
    def frame_flops(cfg: DynamicsConfig, window: int, sampling: SamplingConfig) -> int:
        return flops.dynamics_forward(cfg, 1, window)  # place by place, each once

    @staticmethod
    def hide(cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int) -> jax.Array:
        """All tokens are to be predicted."""
        del key
        return jnp.ones((num_clips, num_frames, cfg.num_patches), bool)

    def next_token(
        self,
        token_B: jax.Array,
        action_B: jax.Array,
        previous_B: jax.Array,
        past: Past,
        picture_BM: jax.Array | None = None,
    ) -> Predicted:
        """Predicts the token at `past.place` of a frame after a past (T = N = 1).

        Args:
          token_B: The token before it in the frame; of no account at place 0.
          previous_B: The token that stood at this place a frame ago.
          picture_BM: What this place takes in of the last picture, of a model that sees it.
          past: Of all earlier frames, and of the earlier places of this frame.
        """
        place = jnp.asarray(past.place)
        x_BM = self._places(token_B, self.embed_actions(action_B), previous_B, place == 0) + self.position_NM[place]
        if picture_BM is not None:
            x_BM += picture_BM
        return self._predict(x_BM[:, None, None], past._replace(time=past.time.row(place)), keep=True)

    def fill(
        self, state: TokenState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig, columns: int
    ) -> tuple[jax.Array, KV, jax.Array]:
        del columns  # the order is fixed

        def one_place(carry: tuple[jax.Array, KV], place: jax.Array) -> tuple[tuple[jax.Array, KV], tuple]:
            token_B, space = carry
            past = Past(state.dynamics, state.frame, space, place)
            picture_BM = None if picture_BNM is None else picture_BNM[:, place]
            out = self.next_token(token_B, action_B, state.tokens_BN[:, place], past, picture_BM)
            assert out.space
            log_p_BK = jax.nn.log_softmax(out.logits_BTNK[:, 0, 0])
            token_B = draw_codes(log_p_BK, jax.random.fold_in(key, place), sampling)
            return (token_B, space.write(out.space, place)), (token_B, out.time, out.hidden_BTNM[:, 0, 0])

        picture_BNM = self.embed_picture(state.picture_BHWC[:, None])[:, 0] if self.cfg.sees_picture else None
        # The cache along space begins anew in each frame.
        N = self.cfg.num_patches
        space = self.transformer.empty_cache(len(action_B), 1, N)
        _, (tokens_NB, time, hidden_NBM) = jax.lax.scan(
            one_place, (jnp.zeros(len(action_B), jnp.int32), space), jnp.arange(N)
        )
        # Stacked over places, the axes are (N, blocks, B, 1, ...).
        time = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), time)
        return tokens_NB.T, time, hidden_NBM.swapaxes(0, 1)

    def _places(
        self, before_X: jax.Array, actions_XM: jax.Array, previous_X: jax.Array, first_X: jax.Array
    ) -> jax.Array:
        """Embeds places (..., M) by what each takes in; the arguments broadcast against each other."""
        table_KM, first_X1 = whole(self.token_embedding[...]), first_X[..., None]
        if self.cfg.action_token == "add":
            x_XM = jnp.where(first_X1, table_KM[-1], table_KM[before_X]) + actions_XM
        else:
            x_XM = jnp.where(first_X1, actions_XM, table_KM[before_X])
        return x_XM + table_KM[previous_X]
