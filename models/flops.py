"""Floating-point operations, all in one place.

Counted are matrix products, where a product of a and b is 2 (one to multiply, one to add), and attention over all N²
pairs in space and all T² in time, causal or not, as is the custom. A backward pass is twice the forward one: one
product for the inputs' gradient, one for the weights'. Norms, activations and softmax are left out: below 2 %.

One block, for each place of each frame:

    qkv and out of two attentions     2 · 4 M² each
    feed-forward, 4 M wide            2 · 8 M²
    scores and their sum, in space    2 · 2 N M
    … in time, with a cache           2 · 2 (T + past) M

A head that moves the last frame (`models.motion`): its dense layer; for each pixel and channel, each way and either
axis, a product with the strip that a shift can reach; and the choice among the pictures.
"""

import itertools
from typing import TYPE_CHECKING

from models.motion import WAYS
from models.nn import STConfig, num_patches

if TYPE_CHECKING:
    from models.dynamics import DynamicsConfig
    from models.lam import LAMConfig
    from models.policy import PolicyConfig
    from models.tokenizer import TokenizerConfig


def transformer(cfg: STConfig, num_patches: int, num_frames: int, past: int = 0) -> int:
    """Of an ST-transformer's forward pass over one clip, after a cache of `past` frames."""
    M, N, T = cfg.width, num_patches, num_frames
    return 2 * (16 * M * M + 2 * N * M + 2 * (T + past) * M) * T * N * cfg.num_blocks


def frames_alone(width: int, num_blocks: int, num_patches: int, num_frames: int) -> int:
    """Of a transformer without attention over time, once for each frame, forward."""
    return 2 * (12 * width * width + 2 * num_patches * width) * num_patches * num_frames * num_blocks


def dense(rows: int, *widths: int) -> int:
    """Of dense layers one after another, forward: rows × widths[0] to widths[1] and so on."""
    return 2 * rows * sum(a * b for a, b in itertools.pairwise(widths))


def motion_head(width: int, patch_size: int, frame_shape: tuple[int, int, int], reach: int, num_frames: int) -> int:
    """Of making the frames of one clip by moving those before them."""
    rows, values = num_patches(frame_shape, patch_size) * num_frames, patch_size**2 * frame_shape[2]
    strip = (2 * -(-reach // patch_size) + 1) * patch_size
    outputs = values + WAYS * 2 * (2 * reach + 1) + patch_size**2 * (WAYS + 1)
    return dense(rows, width, outputs) + 2 * rows * values * (2 * WAYS * strip + WAYS + 1)


def tokenizer_encode(cfg: "TokenizerConfig", num_frames: int) -> int:
    """Of tokenizing one clip."""
    N, channels = cfg.num_patches, cfg.patch_size**2 * cfg.frame_shape[2]
    seen = channels * (2 if cfg.motion_reach else 1)
    layers = dense(N * num_frames, seen, cfg.width, cfg.code_width)
    return transformer(cfg, N, num_frames) + layers + _search(cfg, num_frames)


def _search(cfg: "TokenizerConfig", num_frames: int) -> int:
    """Of finding the nearest codes, if there are any."""
    return 0 if cfg.kind == "mae" else dense(cfg.num_patches * num_frames, cfg.code_width, cfg.num_codes)


def tokenizer_decode(cfg: "TokenizerConfig", num_frames: int, past: int = 0) -> int:
    """Of decoding the tokens of one clip, after a cache of `past` frames."""
    N, channels = cfg.num_patches, cfg.patch_size**2 * cfg.frame_shape[2]
    rows, blocks = N * num_frames, transformer(cfg, N, num_frames, past)
    if not cfg.motion_reach:
        return blocks + dense(rows, cfg.code_width, cfg.width, channels)
    head = motion_head(cfg.width, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, num_frames)
    return blocks + dense(rows, cfg.code_width, cfg.width) + dense(rows, channels, cfg.width) + head


def tokenizer_step(cfg: "TokenizerConfig", num_frames: int) -> int:
    """Of a training step for one clip, forward and backward; the search for the nearest code has no backward pass.

    Nor has a moving decoder's first pass, over all frames but the last, whose pictures the second one moves; if the
    loop is closed, the encoder runs before both.
    """
    encode, decode = tokenizer_encode(cfg, num_frames), tokenizer_decode(cfg, num_frames)
    first = tokenizer_decode(cfg, num_frames - 1) if cfg.motion_reach else 0
    first += encode if cfg.closed_loop else 0
    return 3 * (encode + decode) - 2 * _search(cfg, num_frames) + first


def lam_infer(cfg: "LAMConfig", num_frames: int) -> int:
    """Of inferring the actions of one clip, with a token for the action beside the patches of every frame."""
    N, channels = num_patches(cfg.frame_shape, cfg.patch_size), cfg.patch_size**2 * cfg.frame_shape[2]
    return transformer(cfg, N + 1, num_frames) + dense(N * num_frames, 2 * channels, cfg.width)


def lam_step(cfg: "LAMConfig", num_frames: int) -> int:
    """Of a training step for one clip, forward and backward; the decoder sees all frames but the last."""
    N, channels = num_patches(cfg.frame_shape, cfg.patch_size), cfg.patch_size**2 * cfg.frame_shape[2]
    Tm1 = num_frames - 1
    seen = 2 * channels if cfg.decoder_sees_change else channels
    decoder = transformer(cfg, N, Tm1) + dense(N * Tm1, seen, cfg.width)
    if cfg.motion_reach:
        decoder += motion_head(cfg.width, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, Tm1)
    else:
        decoder += dense(N * Tm1, cfg.width, channels)
    return 3 * (lam_infer(cfg, num_frames) + decoder)


def flow_read(cfg: "DynamicsConfig", num_frames: int, past: int = 0) -> int:
    """Of a flow's backbone over one clip after a cache of `past` frames."""
    values = cfg.latent_width or cfg.patch_size**2 * cfg.frame_shape[2]
    rows = cfg.num_patches * num_frames
    return transformer(cfg, cfg.num_patches, num_frames, past) + dense(rows, 2 * values, cfg.width)


def head_blocks(cfg: "DynamicsConfig", num_frames: int) -> int:
    """Of a head's blocks, once for each frame."""
    return frames_alone(cfg.width, cfg.head_blocks, cfg.num_patches, num_frames)


def flow_head(cfg: "DynamicsConfig", num_frames: int) -> int:
    """Of a flow's head, once for each frame."""
    values, M = cfg.latent_width or cfg.patch_size**2 * cfg.frame_shape[2], cfg.width
    rows = cfg.num_patches * num_frames
    blocks = head_blocks(cfg, num_frames) + dense(rows, 2 * values, M)
    if cfg.motion_reach:
        return blocks + motion_head(M, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, num_frames)
    return blocks + dense(rows, M, values)


def maskgit_read(cfg: "DynamicsConfig", num_frames: int, past: int = 0) -> int:
    """Of a maskgit_head's backbone over one clip after a cache of `past` frames."""
    return picture_in(cfg, num_frames) + transformer(cfg, cfg.num_patches, num_frames, past)


def maskgit_head(cfg: "DynamicsConfig", num_frames: int) -> int:
    """Of a maskgit_head's head, once for each frame."""
    logits = dense(cfg.num_patches * num_frames, cfg.width, cfg.num_codes)
    return picture_in(cfg, num_frames) + head_blocks(cfg, num_frames) + logits


def picture_in(cfg: "DynamicsConfig", num_frames: int) -> int:
    """Of embedding the last picture, for a model of tokens that sees it."""
    rows = cfg.num_patches * num_frames
    return dense(rows, cfg.patch_size**2 * cfg.frame_shape[2], cfg.width) if cfg.sees_picture else 0


def dynamics_forward(cfg: "DynamicsConfig", num_frames: int, past: int = 0, extra_places: int = 0) -> int:
    """Of a forward pass of a dynamics model over tokens and extra places, one clip after a cache of `past` frames."""
    places = cfg.num_patches + extra_places
    return (
        picture_in(cfg, num_frames)
        + transformer(cfg, places, num_frames, past)
        + dense(cfg.num_patches * num_frames, cfg.width, cfg.num_codes)
    )


def policy(cfg: "PolicyConfig", num_choices: int) -> int:
    """Of so many choices of a policy, each by its last frames."""
    rows, channels = cfg.num_patches * num_choices, cfg.context * cfg.patch_size**2 * cfg.frame_shape[2]
    everywhere, wide = cfg.num_patches * cfg.width, 4 * cfg.width
    gathered = dense(num_choices, everywhere, cfg.width, cfg.num_actions)
    gathered += dense(num_choices, everywhere, wide, wide, cfg.width)
    blocks = frames_alone(cfg.width, cfg.num_blocks, cfg.num_patches, num_choices)
    return blocks + dense(rows, channels, cfg.width) + gathered
