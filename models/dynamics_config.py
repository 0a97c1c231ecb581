"""The configuration of a dynamics model of any kind."""

import dataclasses
from typing import Annotated, Literal

import tyro

from models.errors import InputError
from models.nn import STConfig


@dataclasses.dataclass(frozen=True)
class FlowConfig(STConfig):
    """Fields of the flow kind; but for `head_blocks` of no account to others."""

    space: Literal["pixels", "latents"] = "pixels"
    """What a flow makes frames of: patches of pixels, without a tokenizer, or the latents of a continuous one."""
    latent_width: Annotated[int, tyro.conf.Suppress] = 0
    """Numbers of a latent, set from the tokenizer's checkpoint."""
    head_blocks: int = 2
    """Blocks of the head of a flow or a maskgit_head, which alone runs at each sampling step; `num_blocks` are those of
    the backbone, which runs once a frame."""
    flow_steps: int = 4
    """Most sampling steps that a flow is trained for, a power of two; 1 leaves the plain prediction of the next frame.
    All up to it are there in sampling."""
    motion_reach: int = 0
    """Pixels by which a flow can move the last frame, patch by patch; 0: it says what changes in each."""
    context_noise: float = 0.05
    """What a flow reads of past frames gets noise of this standard deviation, where white is 1, in training and in
    sampling, so that it does not rely on what is too fine to be drawn."""
    own_frames: int = 1
    """In training, how often a flow's own frames, made in one step, take the place of some past ones before it learns:
    so many frames of a rollout it has seen by itself. 0 shows it true frames only."""
    action_dropout: float = 0.0
    """In training, for this share of the frames a flow's head is not told the action, so that sampling may have
    `guidance`."""
    action_width: Annotated[int, tyro.conf.Suppress] = 0
    """Width of a latent action's code, where a LAM learns along by a flow's own loss; 0: actions have a table."""
    edge_weight: float = 0.0
    """Weight of a loss on how strong the edges in each patch of a flow's frames are: squared error alone blurs them."""

    def __post_init__(self):
        super().__post_init__()
        if self.head_blocks < 1:
            raise InputError(f"`head_blocks` {self.head_blocks}: must be at least 1", of=type(self))
        if self.flow_steps < 1 or self.flow_steps & (self.flow_steps - 1):
            raise InputError(f"`flow_steps` {self.flow_steps}: must be a power of two", of=type(self))
        if not 0 <= self.action_dropout < 1:
            raise InputError(
                f"`action_dropout` {self.action_dropout}: must be 0 or more and less than 1", of=type(self)
            )
        for name in ("motion_reach", "context_noise", "own_frames", "edge_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` {getattr(self, name)}: must not be negative", of=type(self))
        for name in ("motion_reach", "edge_weight"):
            if self.space == "latents" and getattr(self, name):
                raise InputError(f"`{name}` {getattr(self, name)}: is for `space` pixels", of=type(self))


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(FlowConfig):
    """Size of the dynamics model. Defaults: Appendix F, CoinRun."""

    num_blocks: int = 12
    """ST blocks of the dynamics model."""
    kind: Literal["maskgit", "maskgit_head", "causal", "flow"] = "maskgit"
    """maskgit fills hidden tokens in any order; maskgit_head does it in a small head, while the other blocks read whole
    frames; causal predicts token after token, row by row; flow makes each frame of pixels, without a tokenizer, or of
    latents, in few steps."""
    action_token: Literal["prepend", "add"] = "prepend"
    """The action stands before the frame's tokens, or is added to each of them (the paper's way)."""
    mask_rates: Literal["frame", "clip"] = "frame"
    """In training of a MaskGIT, how much is hidden is drawn for each frame by itself, or for the clip as a whole (the
    paper's way)."""
    sees_picture: bool = False
    """Give the model the last picture beside the tokens: those of a moving decoder do not say what stands where."""
    picture_noise: float = 0.1
    """In training, those pictures get noise of up to this standard deviation, where white is 1: in sampling they are
    the decoder's own."""
    picture_blur: float = 0.0
    """In training, those pictures are blurred as well, by up to this; 1 is about a pixel. It helps only where the
    tokenizer's loop is closed, since its tokens then mend the picture."""
    num_codes: Annotated[int, tyro.conf.Suppress] = 1024
    """Codes of the tokenizer, set from its checkpoint."""
    num_patches: Annotated[int, tyro.conf.Suppress] = 256
    """Tokens per frame, set from the tokenizer's checkpoint."""
    patch_size: int = 4
    """Side of a patch in pixels, of a flow; of tokens it is their tokenizer's, set from its checkpoint."""
    frame_shape: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (64, 64, 3)
    """(H, W, C), set from the dataset."""
    num_actions: Annotated[int, tyro.conf.Suppress] = 6
    """Actions, latent or true, set from the LAM's checkpoint or the dataset. 0 where they have columns."""
    action_values: Annotated[tuple[int, ...], tyro.conf.Suppress] = ()
    """Of actions with columns, the values of each, 0 for real numbers; set from the dataset."""
    action_mean: Annotated[tuple[float, ...], tyro.conf.Suppress] = ()
    action_scale: Annotated[tuple[float, ...], tyro.conf.Suppress] = ()
    """Of each column, if it holds real numbers."""

    def __post_init__(self):
        super().__post_init__()
        if self.action_dropout and self.kind != "flow":
            raise InputError(f"`action_dropout` {self.action_dropout}: is for `kind` flow", of=type(self))


def head_config(cfg: DynamicsConfig) -> DynamicsConfig:
    """The size of the head of a kind that has one."""
    return dataclasses.replace(cfg, num_blocks=cfg.head_blocks)
