"""The video tokenizer: an ST-ViViT VQ-VAE, causal in time (Genie, §2.1 and Appendix F).

Or, of the same encoder and decoder, a masked autoencoder (He et al. 2022) whose latents are real numbers.
"""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models import init
from models.errors import InputError, check_patch_size
from models.fsq import check_levels, quantizer
from models.kernels import KV
from models.latents import Bottleneck, Squashed
from models.motion import Damage, MotionHead, frames_before
from models.nn import (
    Compute,
    Past,
    Places,
    STConfig,
    STTransformer,
    in_float32,
    linear,
    num_patches,
    patchify,
    unpatchify,
)
from models.padding import each_token
from models.vq import Quantized


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(STConfig):
    """Size of the video tokenizer. Defaults: Appendix F, CoinRun."""

    kind: Literal["vq", "mae"] = "vq"
    """vq makes tokens, by a codebook; mae latents of real numbers, for dynamics of continuous frames: an autoencoder
    from which patches are hidden in training. What speaks of codes is then of no account."""
    patch_size: int = 4
    """Side of a patch in pixels; frames that it does not divide are padded."""
    num_codes: int = 1024
    """Codes in the codebook."""
    code_width: int = 32
    """Width of a code, or numbers in a latent."""
    codebook_decay: float = 0.9
    """Of the moving average by which codes follow the encoder."""
    reset_after: int = 15
    """Steps without use after which a code is moved to a latent of the batch; 0 never."""
    unquantized_steps: int = 0
    """Steps at the start in which latents pass as they are, so that codes follow an encoder that learns already."""
    levels: tuple[int, ...] = ()
    """Of a finite scalar quantiser in the place of the codebook: values for each number of a code, whose product is
    num_codes and whose count code_width; none for a learned codebook."""
    max_hidden: float = 0.75
    """Of a mae: in training up to this share of a clip's patches is hidden from the encoder, drawn evenly; a quarter of
    the clips is seen whole."""
    motion_reach: int = 0
    """Pixels by which the decoder can move the last frame, patch by patch; 0: it makes each anew, as in the paper."""
    closed_loop: bool = False
    """Of a decoder that moves the last frame: tokens say how a frame differs from the picture that was really shown
    before it, the decoder's own, and not from the true one; so they also mend it, and nothing drifts."""
    picture_blur: float = 0.0
    """With a closed loop: in training, the decoder's own pictures are blurred by up to this; 1 is about a pixel."""
    picture_noise: float = 0.0
    """… and get noise of up to this standard deviation, where white is 1."""
    frame_shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (64, 64, 3)
    """(H, W, C), set from the dataset."""

    def __post_init__(self):
        super().__post_init__()
        check_patch_size(self.patch_size, self.frame_shape, type(self))
        check_levels(self)
        if not 0 <= self.max_hidden < 1:
            raise InputError(f"`max_hidden` {self.max_hidden}: must be 0 or more, and less than 1", of=type(self))
        if self.levels and self.kind == "mae":
            raise InputError(
                "`levels`: are of tokens, of which `kind` mae has none; leave one of them out", of=type(self)
            )
        if self.motion_reach < 0:
            raise InputError(f"`motion_reach` {self.motion_reach}: must be 0 or more pixels", of=type(self))
        if self.closed_loop and not self.motion_reach:
            raise InputError(
                "`closed_loop`: needs a `motion_reach`; other decoders do not see the last picture", of=type(self)
            )

    @property
    def num_patches(self) -> int:
        """Tokens per frame, N."""
        return num_patches(self.frame_shape, self.patch_size)

    @property
    def columns(self) -> int:
        """Tokens in a row of a frame."""
        return -(-self.frame_shape[1] // self.patch_size)


class Encoded(NamedTuple):
    """What the encoder makes of frames.

    latents_BTNL: Not yet quantised.
    time: Keys and values along time, stacked over blocks; None unless asked for.
    """

    latents_BTNL: jax.Array
    time: KV | None


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
    tokens_BTN: int32; None of kind mae.
    latents_BTNL, commitment: See `models.vq.Quantized`.
    hidden_BTNM: The decoder's hidden states.
    """

    frames_BTHWC: jax.Array
    tokens_BTN: jax.Array | None
    latents_BTNL: jax.Array
    commitment: jax.Array
    hidden_BTNM: jax.Array


class Tokenizer(nnx.Module):
    """Frames to tokens and back; frame t depends on frames up to t only."""

    def __init__(self, cfg: TokenizerConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        channels = cfg.patch_size**2 * cfg.frame_shape[2]
        places = Places(cfg.columns)
        # Of a decoder that moves the last frame, the encoder sees each patch beside its change.
        self.patch_in = linear(channels * (2 if cfg.motion_reach else 1), cfg.width, compute, rngs, bias=True)
        self.encoder_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.encoder = STTransformer(cfg, compute, rngs, places)
        self.code_in = linear(cfg.width, cfg.code_width, compute, rngs)
        self.vq: Any = Bottleneck(cfg.code_width) if cfg.kind == "mae" else quantizer(cfg, rngs)
        if cfg.kind == "mae":
            self.hidden_1M = init.positions(rngs, 1, cfg.width)  # what the encoder sees of a hidden patch
        self.code_out = linear(cfg.code_width, cfg.width, compute, rngs, bias=True)
        self.decoder_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.decoder = STTransformer(cfg, compute, rngs, places)
        if cfg.motion_reach:
            self.last_in = linear(channels, cfg.width, compute, rngs, bias=True)
            self.move = MotionHead(cfg.width, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, compute, rngs)
        else:
            self.patch_out = linear(cfg.width, channels, compute, rngs, bias=True)

    def __call__(
        self,
        frames_BTHWC: jax.Array,
        train: bool = False,
        damage: Damage | None = None,
        hidden_BTN: jax.Array | None = None,
        weight_BT: jax.Array | None = None,
    ) -> Reconstruction:
        """Encodes, quantises and decodes frames in [0, 1]; in training, a moving decoder from its own last pictures.

        Args:
          damage: In training with a closed loop, of these pictures.
          hidden_BTN: In training of kind mae, true for patches that the encoder does not see.
          weight_BT: In training with a codebook, what the frames count (see `models.padding`).
        """
        if not train and self.cfg.closed_loop:
            return self._follow(frames_BTHWC)
        if not train:
            quantized = self._encode(frames_BTHWC, None)
            return _reconstruction(quantized, self._decode_alone(quantized.vectors_XL))
        last_BTHWC = frames_before(frames_BTHWC)
        given = {} if weight_BT is None else {"weight_X": each_token(weight_BT, self.cfg.num_patches)}
        against = lambda last_BTHWC: self._latents(frames_BTHWC, last_BTHWC, hidden_BTN=hidden_BTN).latents_BTNL
        quantized = self.vq(against(last_BTHWC), train, **given)
        if self.cfg.motion_reach:
            # As in a rollout: what the decoder moves is what it has made itself. Nothing follows the last frame.
            own_BTm1HWC = self._decode(quantized.vectors_XL[:, :-1], last_BTHWC[:, :-1]).frames_BTHWC
            own_BTm1HWC = jnp.clip(jax.lax.stop_gradient(own_BTm1HWC), 0.0, 1.0)
            last_BTHWC = jnp.concatenate([last_BTHWC[:, :1], own_BTm1HWC], axis=1)
        if self.cfg.closed_loop:
            if damage:
                last_BTHWC = damage(last_BTHWC)
            quantized = self.vq(against(last_BTHWC), train, **given)
        return _reconstruction(quantized, self._decode(quantized.vectors_XL, last_BTHWC))

    def encode(self, frames_BTHWC: jax.Array, last_BTHWC: jax.Array | None = None) -> jax.Array:
        """Frames in [0, 1] to tokens (B, T, N), in float32 whatever the dtype.

        Args:
          last_BTHWC: For each frame the picture that will be shown before it, if that is not the true one; of no
            account unless the loop is closed.
        """
        codes_BTN = self._encode(frames_BTHWC, last_BTHWC).codes_X
        assert codes_BTN is not None, "kind mae has latents, and no tokens"
        return codes_BTN

    def encode_latents(self, frames_BTHWC: jax.Array, last_BTHWC: jax.Array | None = None) -> jax.Array:
        """Of kind mae, as `encode`: frames in [0, 1] to latents (B, T, N, L) with mean 0 and variance 1, nearly."""
        return self.vq.normalised(self._encode(frames_BTHWC, last_BTHWC).vectors_XL)

    def code(self, frames_BTHWC: jax.Array, last_BTHWC: jax.Array | None = None) -> jax.Array:
        """What dynamics models learn to predict: tokens, or latents where there are none."""
        return (self.encode_latents if self.cfg.kind == "mae" else self.encode)(frames_BTHWC, last_BTHWC)

    def uncode(self, coded_BTNX: jax.Array) -> Decoded:
        """Frames from these alone: `decode` or `decode_latents`."""
        return (self.decode_latents if self.cfg.kind == "mae" else self.decode)(coded_BTNX)

    def _encode(self, frames_BTHWC: jax.Array, last_BTHWC: jax.Array | None) -> Quantized | Squashed:
        if last_BTHWC is None or not self.cfg.closed_loop:
            last_BTHWC = frames_before(frames_BTHWC)
        # In float32 whatever the dtype: bfloat16 flips tokens that are nearly tied, some 3 %, and whoever encodes a
        # frame, a training, a sampler or the maker of a token dataset, must find the same ones.
        exact = in_float32(self)
        return exact.vq(exact._latents(frames_BTHWC, last_BTHWC).latents_BTNL)

    def decode(self, tokens_BTN: jax.Array) -> Decoded:
        """Tokens of a clip to frames, from these alone: a moving decoder begins with grey, then moves its own."""
        return self._decode_alone(self.vq.lookup(tokens_BTN))

    def decode_latents(self, latents_BTNL: jax.Array) -> Decoded:
        """Of kind mae, as `decode`: latents as `encode_latents` gives them to frames."""
        return self._decode_alone(self.vq.restored(latents_BTNL))

    def _decode_alone(self, codes_BTNL: jax.Array) -> Decoded:
        return self._unroll(codes_BTNL) if self.cfg.motion_reach else self._decode(codes_BTNL, None)

    def decode_after(
        self, tokens_BTN: jax.Array, last_BTHWC: jax.Array, past: Past | None = None, keep: bool = False
    ) -> Decoded:
        """Tokens to frames, where for each frame the one before it is given; of a clip, or of one frame after a past.

        Args:
          last_BTHWC: In [0, 1]; of no account where the decoder moves nothing.
          past, keep: See `STTransformer`.
        """
        return self._decode(self.vq.lookup(tokens_BTN), last_BTHWC, past, keep)

    def decode_latents_after(
        self, latents_BTNL: jax.Array, last_BTHWC: jax.Array, past: Past | None = None, keep: bool = False
    ) -> Decoded:
        """Of kind mae, as `decode_after`, from latents."""
        return self._decode(self.vq.restored(latents_BTNL), last_BTHWC, past, keep)

    def _latents(
        self,
        frames_BTHWC: jax.Array,
        last_BTHWC: jax.Array,
        past: Past | None = None,
        keep: bool = False,
        hidden_BTN: jax.Array | None = None,
    ) -> Encoded:
        patches_BTNP = patchify(frames_BTHWC, self.cfg.patch_size)
        seen = 2.0 * patches_BTNP - 1.0
        if self.cfg.motion_reach:
            change_BTNP = patches_BTNP - patchify(last_BTHWC, self.cfg.patch_size)
            seen = jnp.concatenate([seen, 4.0 * change_BTNP], axis=-1)
        x_BTNM = self.patch_in(seen)
        if hidden_BTN is not None:
            x_BTNM = jnp.where(hidden_BTN[..., None], self.hidden_1M[...].astype(x_BTNM.dtype), x_BTNM)
        x_BTNM, time, _ = self.encoder(x_BTNM + self.encoder_position_NM[...], past, keep)
        return Encoded(self.code_in(x_BTNM), time)

    def _decode(
        self, codes_BTNL: jax.Array, last_BTHWC: jax.Array | None, past: Past | None = None, keep: bool = False
    ) -> Decoded:
        # Unit vectors scaled to unit variance, which is what the layer's initialisation expects; others nearly have it.
        scale = 1.0 if self.cfg.kind == "mae" else self.cfg.code_width**0.5
        x_BTNM = self.code_out(codes_BTNL * scale) + self.decoder_position_NM[...]
        if not self.cfg.motion_reach:
            last_BTHWC = None  # which the paper's decoder does not see
        if last_BTHWC is not None:
            x_BTNM += self.last_in(2.0 * patchify(last_BTHWC, self.cfg.patch_size) - 1.0)
        hidden_BTNM, time, _ = self.decoder(x_BTNM, past, keep)
        if last_BTHWC is not None:
            frames_BTHWC = self.move(hidden_BTNM, last_BTHWC)
        else:
            patches_BTNP = self.patch_out(hidden_BTNM).astype(jnp.float32) + 0.5
            frames_BTHWC = unpatchify(patches_BTNP, self.cfg.patch_size, self.cfg.frame_shape)
        return Decoded(frames_BTHWC, hidden_BTNM, time)

    def _follow(self, frames_BTHWC: jax.Array) -> Reconstruction:
        """Encodes and decodes frame by frame, each against the picture that was made of the ones before."""
        B, T = frames_BTHWC.shape[:2]
        N = self.cfg.num_patches
        grey_B1HWC = jnp.full((B, 1, *self.cfg.frame_shape), 0.5)
        exact = in_float32(self)  # as in `_encode`
        caches = exact.encoder.empty_cache(B, N, T), self.decoder.empty_cache(B, N, T)

        def one(carry: tuple[KV, KV, jax.Array], step: tuple[jax.Array, jax.Array]) -> tuple[tuple, Reconstruction]:
            (encoded, decoded, last_B1HWC), (frame, now_BHWC) = carry, step
            latents_B1NL, time = exact._latents(now_BHWC[:, None], last_B1HWC, Past(encoded, frame), keep=True)
            quantized = exact.vq(latents_B1NL)
            out = self._decode(quantized.vectors_XL, last_B1HWC, Past(decoded, frame), keep=True)
            assert time
            assert out.time
            shown_B1HWC = jnp.clip(out.frames_BTHWC, 0.0, 1.0)
            carry = encoded.write(time, frame), decoded.write(out.time, frame), shown_B1HWC
            return carry, _reconstruction(quantized, out)

        _, made = jax.lax.scan(one, (*caches, grey_B1HWC), (jnp.arange(T), frames_BTHWC.swapaxes(0, 1)))
        whole = jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1) if x.ndim > 1 else x, made)
        return whole._replace(commitment=jnp.mean(made.commitment))

    def _unroll(self, codes_BTNL: jax.Array) -> Decoded:
        """Decodes frame by frame, each after the ones before it."""
        B, T, N, _ = codes_BTNL.shape
        grey_B1HWC = jnp.full((B, 1, *self.cfg.frame_shape), 0.5)
        cache = self.decoder.empty_cache(B, N, T)

        def one(carry: tuple[KV, jax.Array], step: tuple[jax.Array, jax.Array]) -> tuple[tuple, tuple]:
            (cache, last_B1HWC), (frame, codes_BNL) = carry, step
            out = self._decode(codes_BNL[:, None], last_B1HWC, Past(cache, frame), keep=True)
            assert out.time
            shown_B1HWC = jnp.clip(out.frames_BTHWC, 0.0, 1.0)
            return (cache.write(out.time, frame), shown_B1HWC), (out.frames_BTHWC[:, 0], out.hidden_BTNM[:, 0])

        steps = jnp.arange(T), codes_BTNL.swapaxes(0, 1)
        (cache, _), (frames, hidden) = jax.lax.scan(one, (cache, grey_B1HWC), steps)
        return Decoded(frames.swapaxes(0, 1), hidden.swapaxes(0, 1), cache)


def _reconstruction(quantized: Quantized | Squashed, out: Decoded) -> Reconstruction:
    return Reconstruction(
        out.frames_BTHWC, quantized.codes_X, quantized.latents_XL, quantized.commitment, out.hidden_BTNM
    )
