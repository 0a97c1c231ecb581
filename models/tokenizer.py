"""The video tokenizer: an ST-ViViT VQ-VAE, causal in time (Genie, §2.1 and Appendix F)."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models.errors import InputError
from models.nn import (
    KV,
    Compute,
    Past,
    STConfig,
    STTransformer,
    linear,
    linear_flops,
    num_patches,
    patchify,
    position_table,
    transformer_flops,
    unpatchify,
)
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
            raise InputError(
                f"--model.patch_size {self.patch_size}: must be from 1 to the frames' shorter side, "
                f"{min(self.frame_shape[:2])}"
            )

    @property
    def num_patches(self) -> int:
        """Tokens per frame, N."""
        return num_patches(self.frame_shape, self.patch_size)


class Reconstruction(NamedTuple):
    """frames_BTHWC: float32, about [0, 1]. tokens_BTN: int32. The rest: see `models.vq.Quantized`."""

    frames_BTHWC: jax.Array
    tokens_BTN: jax.Array
    latents_BTNL: jax.Array
    commitment: jax.Array


def encode_flops(cfg: TokenizerConfig, num_frames: int) -> int:
    """Of tokenizing one clip; see `models.nn.transformer_flops`."""
    N, channels = cfg.num_patches, cfg.patch_size**2 * cfg.frame_shape[2]
    layers = linear_flops(N * num_frames, channels, cfg.width, cfg.code_width, cfg.num_codes)
    return transformer_flops(cfg, N, num_frames) + layers


def decode_flops(cfg: TokenizerConfig, num_frames: int, past: int = 0) -> int:
    """Of decoding the tokens of one clip, after a cache of `past` frames."""
    N, channels = cfg.num_patches, cfg.patch_size**2 * cfg.frame_shape[2]
    layers = linear_flops(N * num_frames, cfg.code_width, cfg.width, channels)
    return transformer_flops(cfg, N, num_frames, past) + layers


def step_flops(cfg: TokenizerConfig, num_frames: int) -> int:
    """Of a training step for one clip, forward and backward; the search for the nearest code has no backward pass."""
    search = linear_flops(cfg.num_patches * num_frames, cfg.code_width, cfg.num_codes)
    return 3 * (encode_flops(cfg, num_frames) + decode_flops(cfg, num_frames)) - 2 * search


class Tokenizer(nnx.Module):
    """Frames to tokens and back; frame t depends on frames up to t only."""

    def __init__(self, cfg: TokenizerConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        channels = cfg.patch_size**2 * cfg.frame_shape[2]
        self.patch_in = linear(channels, cfg.width, compute, rngs, bias=True)
        self.encoder_position_NM = position_table(cfg.num_patches, cfg.width, rngs)
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
        self.decoder_position_NM = position_table(cfg.num_patches, cfg.width, rngs)
        self.decoder = STTransformer(cfg, compute, rngs)
        self.patch_out = linear(cfg.width, channels, compute, rngs, bias=True)

    def __call__(self, frames_BTHWC: jax.Array, train: bool = False) -> Reconstruction:
        """Encodes, quantises and decodes frames in [0, 1]."""
        quantized = self.vq(self._latents(frames_BTHWC), train)
        frames, _ = self._frames(quantized.vectors, None, 0)
        return Reconstruction(frames, quantized.codes, quantized.latents, quantized.commitment)

    def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
        """Frames in [0, 1] to tokens (B, T, N)."""
        return self.vq(self._latents(frames_BTHWC)).codes

    def decode(self, tokens_BTN: jax.Array) -> jax.Array:
        """Tokens to frames, float32, about [0, 1]."""
        return self._frames(self.vq.lookup(tokens_BTN), None, 0)[0]

    def decode_frames(self, tokens_BTN: jax.Array, past: Past | None, start: jax.Array | int) -> tuple[jax.Array, KV]:
        """Decodes a clip, or one frame after a cache; also gives their keys and values (see `STTransformer.run`)."""
        frames, kvs = self._frames(self.vq.lookup(tokens_BTN), past, start, keep=True)
        assert kvs is not None
        return frames, kvs

    def _latents(self, frames_BTHWC: jax.Array) -> jax.Array:
        patches_BTNP = patchify(frames_BTHWC, self.cfg.patch_size)
        x_BTNM = self.patch_in(2.0 * patches_BTNP - 1.0) + self.encoder_position_NM[...]
        return self.code_in(self.encoder(x_BTNM))

    def _frames(
        self, codes_BTNL: jax.Array, past: Past | None, start: jax.Array | int, keep: bool = False
    ) -> tuple[jax.Array, KV | None]:
        # Unit vectors scaled to unit variance, which is what the layer's initialisation expects.
        x_BTNM = self.code_out(codes_BTNL * self.cfg.code_width**0.5) + self.decoder_position_NM[...]
        x_BTNM, kvs = self.decoder.run(x_BTNM, past, start, keep)
        patches_BTNP = self.patch_out(x_BTNM).astype(jnp.float32) + 0.5
        return unpatchify(patches_BTNP, self.cfg.patch_size, self.cfg.frame_shape), kvs
