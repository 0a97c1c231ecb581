"""What a world is put together from: its actions, its tokenizer, its dynamics model."""

import dataclasses
from typing import Any

from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import DYNAMICS, WorldConfig, sized, stored_model_config
from utils.action_source import ActionSource, InferredActions, JointActions, LearnedActions, StoredActions, TrueActions
from utils.judge import heads_config
from utils.records import Metadata


def choose_actions(cfg: Any, metadata: Metadata) -> ActionSource:
    """Where the actions come from: the dataset, a trained LAM (or what it has left there), or one trained along.

    Args:
      cfg: That of `train_dynamics.py`.
    """
    if cfg.use_gt_actions:
        return TrueActions()
    lam = dataclasses.replace(cfg.lam, frame_shape=metadata.frame_shape, own_decoder=not cfg.joint_lam)
    if cfg.joint_lam:
        if cfg.model.kind != "flow" or cfg.lam_checkpoint:
            raise InputError("`joint_lam`: needs `kind` flow, and no `lam_checkpoint`", of=DynamicsConfig)
        return JointActions(lam, cfg.commitment)
    if not cfg.lam_checkpoint:
        return LearnedActions(lam, cfg.commitment)
    lam = stored_model_config(cfg.lam_checkpoint, "lam")
    return StoredActions(lam) if metadata.tokens else InferredActions(lam)


def world_config(cfg: Any, metadata: Metadata, source: ActionSource) -> WorldConfig:
    """Puts the world together from the checkpoints and the dataset; `cfg` is that of `train_dynamics.py`.

    Raises:
      InputError: The parts do not fit together, or not the dataset.
    """
    cfg.sampling.expect(cfg.model)
    tokenizer = None
    if DYNAMICS[cfg.model.kind].needs_tokenizer(cfg.model):
        tokenizer = stored_model_config(cfg.tokenizer_checkpoint, "tokenizer")
        if cfg.model.kind == "flow" and tokenizer.kind != "mae":
            raise InputError(
                f"`tokenizer_checkpoint` {cfg.tokenizer_checkpoint}: has tokens, but `space` latents needs a "
                "tokenizer of kind mae; train one, or take pixels",
                of=DynamicsConfig,
            )
    elif metadata.tokens:
        raise InputError(f"`data_dir` {cfg.data_dir}: holds tokens, but a flow in pixels learns from frames")
    for name, part in (("tokenizer", tokenizer), ("lam", source.lam)):
        if part and part.frame_shape != metadata.frame_shape:
            raise InputError(
                f"`{name}_checkpoint`: made for frames of {part.frame_shape}, but {cfg.data_dir} has "
                f"{metadata.frame_shape}; use the dataset that it was trained on"
            )
    dynamics = sized(dataclasses.replace(cfg.model, **source.actions_of(metadata)), tokenizer, metadata.frame_shape)
    return WorldConfig(tokenizer, source.lam, dynamics, cfg.seq_len, heads_config(cfg.heads, cfg.use_gt_actions))
