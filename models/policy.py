"""A policy: from the last few frames to the action that leads to the next one (Genie, §3.3)."""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from models import init
from models.errors import InputError, check_patch_size
from models.kernels import RMSNorm
from models.lam import LAM, LAMConfig
from models.nn import Compute, Places, STConfig, STTransformer, linear, num_patches, patchify


@dataclasses.dataclass(frozen=True)
class PolicyConfig(STConfig):
    """Size of a policy."""

    width: int = 256
    """Model width M; the feed-forward layer is four times as wide."""
    num_blocks: int = 4
    """ST blocks."""
    rotary_space: bool = True
    """Rotate queries and keys of spatial attention by a place's row and column, beside the learned positions."""
    patch_size: int = 8
    """Side of a patch in pixels; frames that it does not divide are padded."""
    context: int = 4
    """Frames that an action is chosen by. One shows no motion; with many, it learns to go on with what it did."""
    num_actions: Annotated[int, tyro.conf.Suppress] = 0
    """Actions to choose from, set from the dataset or from the LAM."""
    frame_shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (64, 64, 3)
    """(H, W, C), set from the dataset."""

    def __post_init__(self):
        super().__post_init__()
        check_patch_size(self.patch_size, self.frame_shape, type(self))
        if self.context < 1:
            raise InputError(f"`context` {self.context}: must be at least 1 frame", of=type(self))

    @property
    def num_patches(self) -> int:
        """Patches per frame, N."""
        return num_patches(self.frame_shape, self.patch_size)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """What makes up an agent.

    lam: None where the policy's actions are the game's own.
    """

    policy: PolicyConfig
    lam: LAMConfig | None

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what it sees."""
        return self.policy.frame_shape


class Chosen(NamedTuple):
    """What a policy makes of the frames up to a time step, for each time step at which it has enough of them.

    logits_BTA: float32, of the actions that may lead to the next frame.
    hidden_BTM: float32, what they are made of.
    """

    logits_BTA: jax.Array
    hidden_BTM: jax.Array


class Policy(nnx.Module):
    """Chooses actions, each by the last `context` frames.

    These go in as one frame of many channels, so that a choice costs one frame, whatever the context.
    """

    def __init__(self, cfg: PolicyConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        channels = cfg.patch_size**2 * cfg.frame_shape[2]
        columns = -(-cfg.frame_shape[1] // cfg.patch_size)
        self.patch_in = linear(cfg.context * channels, cfg.width, compute, rngs, bias=True)
        self.position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.blocks = STTransformer(cfg, compute, rngs, Places(columns), sees_time=False)  # it is given one frame
        # What to do depends on where things are: no mean over the places, but a weight of its own for each; and what
        # several places mean together is for two layers beside.
        everywhere, wide = cfg.num_patches * cfg.width, 4 * cfg.width
        self.gather = linear(everywhere, cfg.width, compute, rngs)
        self.wide_norm = RMSNorm(everywhere)
        self.wide_in = linear(everywhere, wide, compute, rngs, bias=True)
        self.wide_mid = linear(wide, wide, compute, rngs, bias=True)
        self.wide_out = linear(wide, cfg.width, compute, rngs, scale=0.0)
        self.norm = RMSNorm(cfg.width)
        self.action_out = linear(cfg.width, cfg.num_actions, compute, rngs, scale=0.0, bias=True)

    def __call__(self, frames_BSHWC: jax.Array) -> Chosen:
        """Chooses after each of the frames, in [0, 1], but for the first `context` - 1: T is S - `context` + 1."""
        B, S = frames_BSHWC.shape[:2]
        T, N, M = S - self.cfg.context + 1, self.cfg.num_patches, self.cfg.width
        patches_BSNP = patchify(frames_BSHWC, self.cfg.patch_size)
        now_BTNP = patches_BSNP[:, -T:]
        # As in the LAM, each patch comes with its changes, so that motion can be seen before any attention.
        changes = [4.0 * (now_BTNP - patches_BSNP[:, -T - k : -k]) for k in range(1, self.cfg.context)]
        x_BTNM = self.patch_in(jnp.concatenate([2.0 * now_BTNP - 1.0, *changes], axis=-1)) + self.position_NM[...]
        x_BTNM = self.blocks(x_BTNM.reshape(B * T, 1, N, M)).x_BTNM
        everywhere_BTX = x_BTNM.reshape(B, T, N * M)
        wide_BTF = jax.nn.silu(self.wide_in(self.wide_norm(everywhere_BTX)))
        wide_BTF += jax.nn.silu(self.wide_mid(wide_BTF))
        hidden_BTM = self.norm(self.gather(everywhere_BTX) + self.wide_out(wide_BTF))
        return Chosen(self.action_out(hidden_BTM).astype(jnp.float32), hidden_BTM.astype(jnp.float32))


class Agent(nnx.Module):
    """A policy, and where it chooses latent actions the LAM that tells what they are."""

    def __init__(self, cfg: AgentConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        self.policy = Policy(cfg.policy, compute, rngs)
        self.lam = LAM(cfg.lam, compute, rngs) if cfg.lam else None
