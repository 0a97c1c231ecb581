"""The latent action model: what happened between two frames, in one of a few codes (Genie, §2.1)."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models import init
from models.errors import InputError, check_patch_size
from models.fsq import check_levels, quantizer
from models.motion import MotionHead
from models.nn import Compute, Places, STConfig, STTransformer, in_float32, linear, num_patches, patchify, unpatchify
from models.padding import after_first
from models.vq import Quantized


@dataclasses.dataclass(frozen=True)
class LAMConfig(STConfig):
    """Size of the latent action model. Defaults: Appendix F, CoinRun."""

    patch_size: int = 16
    """Side of a patch in pixels; frames that it does not divide are padded."""
    num_codes: int = 6
    """Latent actions A."""
    code_width: int = 32
    """Width of a latent action."""
    codebook_decay: float = 0.9
    """Of the moving average by which codes follow the encoder."""
    reset_after: int = 15
    """Steps without use after which a code is moved to a latent of the batch; 0 never."""
    unquantized_steps: int = 2000
    """Steps at the start in which actions stay unquantised, so that the decoder learns to heed them."""
    levels: tuple[int, ...] = ()
    """Of a finite scalar quantiser in the place of the codebook: values for each number of a code, whose product is
    num_codes and whose count code_width; none for a learned codebook."""
    motion_reach: int = 0
    """Pixels by which the decoder can move the last frame, patch by patch; 0: it makes each anew, as in the paper."""
    decoder_sees_change: bool = False
    """Show the decoder each patch beside its change, so that it knows the velocity, and an action need not tell it."""
    own_decoder: Annotated[bool, tyro.conf.Suppress] = True
    """Whether it predicts frames itself; else its encoder learns by the loss of a dynamics model."""
    frame_shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (64, 64, 3)
    """(H, W, C), set from the dataset."""

    def __post_init__(self):
        super().__post_init__()
        check_patch_size(self.patch_size, self.frame_shape, type(self))
        check_levels(self)
        if self.motion_reach < 0:
            raise InputError(f"`motion_reach` {self.motion_reach}: must be 0 or more pixels", of=type(self))


class ActionReconstruction(NamedTuple):
    """What the LAM makes of a clip.

    next_frames_BTm1HWC: float32, about [0, 1]; entry t is the prediction of frame t + 1.
    actions_BTm1: int32; entry t leads from frame t to frame t + 1.
    latents_BTm1L, commitment: See `models.vq.Quantized`.
    hidden_BTm1NM: The decoder's hidden states.
    """

    next_frames_BTm1HWC: jax.Array
    actions_BTm1: jax.Array
    latents_BTm1L: jax.Array
    commitment: jax.Array
    hidden_BTm1NM: jax.Array


class LAM(nnx.Module):
    """Infers the action from all frames up to the next; predicts the next from the past and the action alone."""

    def __init__(self, cfg: LAMConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        channels = cfg.patch_size**2 * cfg.frame_shape[2]
        N = num_patches(cfg.frame_shape, cfg.patch_size)
        columns = -(-cfg.frame_shape[1] // cfg.patch_size)
        self.patch_in = linear(2 * channels, cfg.width, compute, rngs, bias=True)
        # Place 0 is the action token's, which stands beside the patches of every frame.
        self.encoder_position_Np1M = init.positions(rngs, N + 1, cfg.width)
        self.encoder = STTransformer(cfg, compute, rngs, Places(columns, extra=1))
        self.code_in = linear(cfg.width, cfg.code_width, compute, rngs)
        self.vq = quantizer(cfg, rngs, centred=True)
        if not cfg.own_decoder:
            return
        self.code_out = linear(cfg.code_width, cfg.width, compute, rngs, bias=True)
        self.past_in = linear((2 if cfg.decoder_sees_change else 1) * channels, cfg.width, compute, rngs, bias=True)
        self.decoder_position_NM = init.positions(rngs, N, cfg.width)
        self.decoder = STTransformer(cfg, compute, rngs, Places(columns))
        if cfg.motion_reach:
            self.move = MotionHead(cfg.width, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, compute, rngs)
        else:
            self.patch_out = linear(cfg.width, channels, compute, rngs, scale=0.0, bias=True)

    def __call__(
        self,
        frames_BTHWC: jax.Array,
        train: bool = False,
        weight_BT: jax.Array | None = None,
        told_BTm1: jax.Array | None = None,
    ) -> ActionReconstruction:
        """Infers the actions of a clip in [0, 1] and predicts each next frame from them.

        Args:
          weight_BT: In training, what the frames count (see `models.padding`).
          told_BTm1: Which actions the decoder is told; by default all.
        """
        quantized = self.act(frames_BTHWC, train, weight_BT)
        vectors_BTm1L = quantized.vectors_XL
        if told_BTm1 is not None:
            vectors_BTm1L = vectors_BTm1L * told_BTm1[..., None]
        next_frames, hidden = self._predict(frames_BTHWC[:, :-1], vectors_BTm1L)
        return ActionReconstruction(next_frames, quantized.codes_X, quantized.latents_XL, quantized.commitment, hidden)

    def act(self, frames_BTHWC: jax.Array, train: bool = False, weight_BT: jax.Array | None = None) -> Quantized:
        """The actions of a clip in [0, 1] as codes, which pass their gradient on to the encoder; see `__call__`."""
        if train:
            return self.vq(self.latents(frames_BTHWC), train, after_first(weight_BT))
        return self._encode(frames_BTHWC)

    def infer(self, frames_BTHWC: jax.Array) -> jax.Array:
        """The latent actions (B, Tm1) of a clip in [0, 1], in float32 whatever the dtype."""
        return self._encode(frames_BTHWC).codes_X

    def _encode(self, frames_BTHWC: jax.Array) -> Quantized:
        exact = in_float32(self)  # for the reason of `Tokenizer._encode`
        return exact.vq(exact.latents(frames_BTHWC))

    def predict(self, past_BTm1HWC: jax.Array, actions_BTm1L: jax.Array) -> jax.Array:
        """Frames 1 ... T - 1 from frames 0 ... T - 2 and the vectors of the actions between them."""
        return self._predict(past_BTm1HWC, actions_BTm1L)[0]

    def _predict(self, past_BTm1HWC: jax.Array, actions_BTm1L: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The frames, and the hidden states (B, Tm1, N, M) that say how they differ from those before."""
        patches_BTm1NP = patchify(past_BTm1HWC, self.cfg.patch_size)
        actions_BTm1L = actions_BTm1L * self.cfg.code_width**0.5
        # Added to every patch, as the paper does: as one token among many it would go unheard for thousands of steps.
        seen = _with_changes(patches_BTm1NP) if self.cfg.decoder_sees_change else 2.0 * patches_BTm1NP - 1.0
        x_BTm1NM = self.past_in(seen) + self.code_out(actions_BTm1L)[:, :, None]
        hidden_BTm1NM = self.decoder(x_BTm1NM + self.decoder_position_NM[...]).x_BTNM
        if self.cfg.motion_reach:
            return self.move(hidden_BTm1NM, past_BTm1HWC), hidden_BTm1NM
        # The decoder says what changes, at first nothing: learning starts from a copy of the last frame.
        next_BTm1NP = patches_BTm1NP.astype(jnp.float32) + self.patch_out(hidden_BTm1NM).astype(jnp.float32)
        return unpatchify(next_BTm1NP, self.cfg.patch_size, self.cfg.frame_shape), hidden_BTm1NM

    def latents(self, frames_BTHWC: jax.Array) -> jax.Array:
        """What the codebook makes actions of, (B, Tm1, L)."""
        x_BTNM = self.patch_in(_with_changes(patchify(frames_BTHWC, self.cfg.patch_size)))
        x_BTNp1M = jnp.pad(x_BTNM, ((0, 0), (0, 0), (1, 0), (0, 0))) + self.encoder_position_Np1M[...]
        return self.code_in(self.encoder(x_BTNp1M).x_BTNM[:, 1:, 0])


def _with_changes(patches_BTNP: jax.Array) -> jax.Array:
    """Each patch beside its change since the last frame, so that motion can be seen before any attention."""
    changes_BTNP = jnp.diff(patches_BTNP, axis=1, prepend=patches_BTNP[:, :1])
    return jnp.concatenate([2.0 * patches_BTNP - 1.0, 4.0 * changes_BTNP], axis=-1)
