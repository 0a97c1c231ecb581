"""The video tokenizer: an ST-ViViT VQ-VAE, causal in time (Genie, §2.1 and Appendix F)."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models import init
from models.errors import InputError
from models.kernels import KV
from models.nn import Compute, Past, STConfig, STTransformer, linear, num_patches, patchify, unpatchify
from models.vq import VectorQuantizer


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(STConfig):
    """Size of the video tokenizer. Defaults: Appendix F, CoinRun."""

    patch_size: int = 4
    """Side of a patch in pixels; frames that it does not divide are padded."""
    num_codes: int = 1024
    """Codes in the codebook."""
    code_width: int = 32
    """Width of a code."""
    codebook_decay: float = 0.9
    """Of the moving average by which codes follow the encoder."""
    reset_after: int = 15
    """Steps without use after which a code is moved to a latent of the batch; 0 never."""
    unquantized_steps: int = 0
    """Steps at the start in which latents pass as they are, so that codes follow an encoder that learns already."""
    frame_shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (64, 64, 3)
    """(H, W, C), set from the dataset."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.patch_size <= min(self.frame_shape[:2]):
            side = min(self.frame_shape[:2])
            message = f"`patch_size` {self.patch_size}: must be from 1 to the frames' shorter side, {side}"
            raise InputError(message, of=type(self))

    @property
    def num_patches(self) -> int:
        """Tokens per frame, N."""
        return num_patches(self.frame_shape, self.patch_size)

    @property
    def columns(self) -> int:
        """Tokens in a row of a frame."""
        return -(-self.frame_shape[1] // self.patch_size)


class Decoded(NamedTuple):
    """What the decoder makes of tokens.

    frames_BTHWC: float32, about [0, 1].
    hidden_BTNM: Hidden states that the frames were made from.
    time: Keys and values along time, stacked over blocks; None unless asked for.
    """

    frames_BTHWC: jax.Array
    hidden_BTNM: jax.Array
    time: KV | None


class Reconstruction(NamedTuple):
    """What the tokenizer makes of frames.

    frames_BTHWC: float32, about [0, 1].
    tokens_BTN: int32.
    latents_BTNL, commitment: See `models.vq.Quantized`.
    hidden_BTNM: The decoder's hidden states.
    """

    frames_BTHWC: jax.Array
    tokens_BTN: jax.Array
    latents_BTNL: jax.Array
    commitment: jax.Array
    hidden_BTNM: jax.Array


class Tokenizer(nnx.Module):
    """Frames to tokens and back; frame t depends on frames up to t only."""

    def __init__(self, cfg: TokenizerConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        channels = cfg.patch_size**2 * cfg.frame_shape[2]
        self.patch_in = linear(channels, cfg.width, compute, rngs, bias=True)
        self.encoder_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.encoder = STTransformer(cfg, compute, rngs)
        self.code_in = linear(cfg.width, cfg.code_width, compute, rngs)
        self.vq = VectorQuantizer(
            cfg.num_codes,
            cfg.code_width,
            cfg.codebook_decay,
            cfg.reset_after,
            rngs,
            unquantized_steps=cfg.unquantized_steps,
        )
        self.code_out = linear(cfg.code_width, cfg.width, compute, rngs, bias=True)
        self.decoder_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.decoder = STTransformer(cfg, compute, rngs)
        self.patch_out = linear(cfg.width, channels, compute, rngs, bias=True)

    def __call__(self, frames_BTHWC: jax.Array, train: bool = False) -> Reconstruction:
        """Encodes, quantises and decodes frames in [0, 1]."""
        quantized = self.vq(self._latents(frames_BTHWC), train)
        out = self._decode(quantized.vectors_XL, None, keep=False)
        return Reconstruction(
            out.frames_BTHWC, quantized.codes_X, quantized.latents_XL, quantized.commitment, out.hidden_BTNM
        )

    def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
        """Frames in [0, 1] to tokens (B, T, N)."""
        return self.vq(self._latents(frames_BTHWC)).codes_X

    def decode(self, tokens_BTN: jax.Array, past: Past | None = None, keep: bool = False) -> Decoded:
        """Tokens of a clip, or of one frame after a past, to frames; see `STTransformer`."""
        return self._decode(self.vq.lookup(tokens_BTN), past, keep)

    def _latents(self, frames_BTHWC: jax.Array) -> jax.Array:
        patches_BTNP = patchify(frames_BTHWC, self.cfg.patch_size)
        x_BTNM = self.patch_in(2.0 * patches_BTNP - 1.0) + self.encoder_position_NM[...]
        return self.code_in(self.encoder(x_BTNM).x_BTNM)

    def _decode(self, codes_BTNL: jax.Array, past: Past | None, keep: bool) -> Decoded:
        # Unit vectors scaled to unit variance, which is what the layer's initialisation expects.
        x_BTNM = self.code_out(codes_BTNL * self.cfg.code_width**0.5) + self.decoder_position_NM[...]
        hidden_BTNM, time, _ = self.decoder(x_BTNM, past, keep)
        patches_BTNP = self.patch_out(hidden_BTNM).astype(jnp.float32) + 0.5
        return Decoded(unpatchify(patches_BTNP, self.cfg.patch_size, self.cfg.frame_shape), hidden_BTNM, time)
