"""Trains the dynamics model on the tokens of a trained tokenizer and the actions of a trained LAM (Genie, §2.1).

    python train_dynamics.py --tokenizer_checkpoint runs/tokenizer --lam_checkpoint runs/lam

Without --lam_checkpoint a LAM is trained along with it; with --use_gt_actions the dataset's own actions take its place.
The checkpoint is a whole world: it holds the tokenizer and the LAM too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.dynamics import DynamicsConfig, forward_flops, hide_tokens, masked_cross_entropy
from models.errors import InputError
from models.genie import World, WorldConfig, fingerprint, load_lam, load_tokenizer, model_config, read_config
from models.lam import LAMConfig, infer_flops, step_flops
from models.tokenizer import encode_flops
from utils.cli import run
from utils.data import Batch, ClipSource
from utils.metrics import psnr, usage
from utils.records import TokenInfo
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Trains the dynamics model. Defaults: Genie, Appendix F."""

    model: DynamicsConfig = DynamicsConfig()  # noqa: RUF009 (frozen)
    lam: LAMConfig = LAMConfig()  # noqa: RUF009 (frozen)
    """Of the LAM that is trained along, when there is no --lam_checkpoint."""
    tokenizer_checkpoint: str = "runs/tokenizer"
    """--ckpt_dir of the tokenizer's training."""
    lam_checkpoint: str = ""
    """--ckpt_dir of the LAM's training; empty trains a LAM along with the dynamics model."""
    use_gt_actions: bool = False
    """Take the dataset's true actions instead of latent ones."""
    ckpt_dir: str = "runs/dynamics"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    num_steps: int = 200_000
    """Steps to train in all; a finished training goes on if this grows."""
    batch_size: int = 36
    """Clips in a global batch."""
    learning_rate: float = 3e-5
    """Peak learning rate."""
    final_learning_rate: float = 3e-6
    """Learning rate at the last step."""
    warmup_steps: int = 5000
    """Steps of linear warm-up from zero; at most a tenth of a run too short for the recipe."""
    commitment: float = 0.0
    """For a LAM that is trained along: weight of the loss that holds latents near their codes."""


PRESETS = {
    "coinrun": Config(),
    "tiny": Config(
        model=DynamicsConfig(width=128, num_heads=4, num_blocks=2, action_token="add"),
        lam=LAMConfig(width=128, num_heads=4, num_blocks=1, patch_size=8, unquantized_steps=250),
        batch_size=2,
        num_steps=1000,
        learning_rate=2e-3,
        final_learning_rate=0.0,
        warmup_steps=20,
        decay_steps=500,
        beta2=0.95,
        val_batches=8,
        log_interval=50,
        val_interval=500,
        checkpoint_interval=500,
    ),
    "bench": Config(
        model=DynamicsConfig(width=128, num_heads=4, num_blocks=6),
        lam=LAMConfig(width=128, num_heads=4, num_blocks=4),
        batch_size=4,
    ),
}


class Inputs(NamedTuple):
    """A batch with what is drawn for it as a whole, so that gradient accumulation changes nothing.

    hidden_BTN: Which tokens the model must predict.
    weight_B: 1 over the mean share of hidden tokens in the batch.
    """

    batch: Batch
    hidden_BTN: jax.Array
    weight_B: jax.Array


def loss_fn(world: World, inputs: Inputs, cfg: Config, train: bool = True) -> tuple[jax.Array, tuple]:
    """Cross-entropy of the hidden tokens; for a LAM trained along, its own loss is added, which shares no parameter."""
    tokens_BTN, frames = tokens_of(world, inputs.batch)
    lam_loss, lam_arrays = jnp.float32(0), None
    if cfg.use_gt_actions or cfg.lam_checkpoint:
        actions_BTm1 = actions_of(world, inputs.batch, cfg)
    else:
        assert world.lam
        out = world.lam(frames, train)
        actions_BTm1 = out.actions_BTm1
        lam_loss = jnp.mean(jnp.square(out.next_frames_BTm1HWC - frames[:, 1:])) + cfg.commitment * out.commitment
        lam_arrays = (out.latents_BTm1L, out.actions_BTm1)
    logits_BTNK = world.dynamics(tokens_BTN, inputs.hidden_BTN, actions_to(actions_BTm1))
    nll_BTN, hits_BTN = masked_cross_entropy(logits_BTNK, tokens_BTN, inputs.hidden_BTN)
    weight = inputs.weight_B[:, None, None]
    loss = jnp.mean(nll_BTN * weight)
    metrics = {"cross_entropy": loss, "accuracy": jnp.mean(hits_BTN * weight)}
    if lam_arrays:
        metrics["lam_loss"] = lam_loss
    return loss + lam_loss, (metrics, lam_arrays)


def tokens_of(world: World, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, T, N) and frames in [0, 1]; from a token dataset, which has none, the frames that the tokens make."""
    if batch.tokens_BTN is not None:
        tokens_BTN = batch.tokens_BTN.astype(jnp.int32)
        return tokens_BTN, jnp.clip(world.tokenizer.decode(tokens_BTN), 0, 1)
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    return jax.lax.stop_gradient(world.tokenizer.encode(frames)), frames


def actions_of(world: World, batch: Batch, cfg: Config) -> jax.Array:
    """The actions (B, Tm1) that the dynamics model is given: true ones, stored latent ones or inferred ones."""
    if cfg.use_gt_actions:
        return batch.actions_BT[:, :-1]
    if batch.latent_actions_BT is not None:
        return batch.latent_actions_BT[:, :-1].astype(jnp.int32)
    return world.infer_actions(batch.frames_BTHWC.astype(jnp.float32) / 255)


def actions_to(actions_BTm1: jax.Array) -> jax.Array:
    """From actions between frames to the action that led to each frame (none, -1, to the first)."""
    return jnp.pad(actions_BTm1, ((0, 0), (1, 0)), constant_values=-1)


def prepare(batch: Batch, key: jax.Array, cfg: DynamicsConfig) -> Inputs:
    """Draws which tokens are hidden."""
    B, T = (batch.frames_BTHWC if batch.tokens_BTN is None else batch.tokens_BTN).shape[:2]
    hidden_BTN = hide_tokens(cfg, key, (B, T, cfg.num_patches))
    return Inputs(batch, hidden_BTN, jnp.full(B, 1.0 / jnp.maximum(jnp.mean(hidden_BTN), 1e-6)))


def train_step(state: TrainState, batch: Batch, key: jax.Array, cfg: Config) -> tuple[TrainState, dict]:
    """One update of the dynamics model, and of the LAM if that is trained along."""
    mask_key, code_key = jax.random.split(key)
    inputs = prepare(batch, mask_key, state.model().cfg.dynamics)
    grads, metrics, lam_arrays = gradients(lambda m, b: loss_fn(m, b, cfg), state, inputs, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    if lam_arrays:
        model = state.model()
        model.lam.vq.update(*lam_arrays, code_key)
        state = state.with_rest_of(model)
        metrics["lam_usage"] = usage(lam_arrays[1], cfg.lam.num_codes)
    return state, metrics | norms


def evaluate(world: World, batch: Batch, key: jax.Array, cfg: Config) -> tuple[dict, jax.Array]:
    """Loss on hidden tokens, and quality of each next frame when all of it is hidden and its past is whole.

    A causal model sees the true tokens before each one, also of that frame. Shows truth over such predictions.
    """
    inputs = prepare(batch, key, world.cfg.dynamics)
    loss, (metrics, _) = loss_fn(world, inputs, cfg, train=False)
    first = jax.tree.map(lambda x: x[:1], batch)
    tokens_1TN, frames = tokens_of(world, first)
    actions_BTm1 = actions_of(world, first, cfg)
    T = tokens_1TN.shape[1]

    def guess(t: jax.Array) -> jax.Array:
        """Frame t's likeliest tokens, in one step, after the true past."""
        hidden = jnp.broadcast_to((jnp.arange(T) >= t)[None, :, None], tokens_1TN.shape)
        return jnp.argmax(world.dynamics(tokens_1TN, hidden, actions_to(actions_BTm1)), axis=-1)[0, t]

    if world.cfg.dynamics.kind == "causal":
        nothing = jnp.zeros_like(tokens_1TN, bool)
        guessed_TN = jnp.argmax(world.dynamics(tokens_1TN, nothing, actions_to(actions_BTm1)), axis=-1)[0]
    else:
        guessed_TN = jax.lax.map(guess, jnp.arange(T))
    guessed_TN = guessed_TN.at[0].set(tokens_1TN[0, 0])
    predicted = jnp.clip(world.tokenizer.decode(guessed_TN[None]), 0, 1)
    psnr_ = jnp.mean(psnr(predicted[:, 1:], frames[:, 1:]))
    return {"loss": loss} | metrics | {"psnr": psnr_}, jnp.stack([frames[0], predicted[0]])


def world_config(cfg: Config, source: ClipSource) -> WorldConfig:
    """Puts the world together from the checkpoints and the dataset."""
    tokenizer = _stored_config(cfg.tokenizer_checkpoint, "tokenizer", "--tokenizer_checkpoint")
    frame_shape = source.metadata.frame_shape
    if cfg.use_gt_actions:
        if not source.metadata.action_names:
            raise InputError(f"--use_gt_actions: the dataset {cfg.data_dir} has no actions; train a LAM instead")
        lam, num_actions = None, source.metadata.num_actions
    else:
        if cfg.lam_checkpoint:
            lam = _stored_config(cfg.lam_checkpoint, "lam", "--lam_checkpoint")
        else:
            lam = dataclasses.replace(cfg.lam, frame_shape=frame_shape)
        num_actions = lam.num_codes
    for name, part in (("tokenizer", tokenizer), ("lam", lam)):
        if part and part.frame_shape != frame_shape:
            raise InputError(
                f"--{name}_checkpoint: made for frames of {part.frame_shape}, but {cfg.data_dir} has {frame_shape}; "
                "use the dataset that it was trained on"
            )
    dynamics = dataclasses.replace(
        cfg.model, num_codes=tokenizer.num_codes, num_patches=tokenizer.num_patches, num_actions=num_actions
    )
    return WorldConfig(tokenizer, lam, dynamics, window=cfg.seq_len)


def _stored_config(path: str, kind: str, flag: str) -> Any:
    config = read_config(path)
    if config["kind"] != kind:
        raise InputError(f"{flag} {path}: holds a {config['kind']}, but a {kind} is needed")
    return model_config(kind, config["model"])


def check_tokens(cfg: Config, made_by: TokenInfo, parts: dict[str, str]) -> None:
    """Refuses a token dataset that other checkpoints made than those with these fingerprints."""
    if not (cfg.use_gt_actions or cfg.lam_checkpoint):
        raise InputError(
            f"--data_dir {cfg.data_dir}: without frames no LAM can be trained along; give --lam_checkpoint"
        )
    for name, value in parts.items():
        stored = getattr(made_by, name)
        if stored != value:
            raise InputError(
                f"--{name}_checkpoint: the token dataset {cfg.data_dir} was made with another {name} ({stored}, given "
                f"{value}); give that one, or make the tokens anew with preprocess_dataset.py tokens"
            )


def trainable(cfg: Config) -> Any:
    """Filter of the parameters that gradients train: the dynamics model's, and those of a LAM trained along."""
    parts = ["dynamics"] if cfg.use_gt_actions or cfg.lam_checkpoint else ["dynamics", "lam"]
    return nnx.All(nnx.Param, nnx.Any(*map(nnx.PathContains, parts)))


def clip_flops(cfg: Config, world_cfg: WorldConfig, from_tokens: bool = False) -> int:
    """Floating-point operations of a training step for one clip; frozen parts only run forward."""
    flops = 3 * forward_flops(world_cfg.dynamics, cfg.seq_len)
    if from_tokens:
        return flops
    flops += encode_flops(world_cfg.tokenizer, cfg.seq_len)
    if world_cfg.lam:
        flops += (infer_flops if cfg.lam_checkpoint else step_flops)(world_cfg.lam, cfg.seq_len)
    return flops


def main(cfg: Config) -> None:
    start(cfg)
    train, val = (ClipSource(cfg.data_dir, split, cfg.seq_len, tokens_too=True) for split in ("train", "val"))
    world_cfg = world_config(cfg, train)
    trained: dict[str, Any] = {"tokenizer": load_tokenizer(cfg.tokenizer_checkpoint)}
    if cfg.lam_checkpoint and not cfg.use_gt_actions:
        trained["lam"] = load_lam(cfg.lam_checkpoint)
    parts = {name: fingerprint(model) for name, model in trained.items()}
    if train.metadata.tokens:
        check_tokens(cfg, train.metadata.tokens, parts)

    def prepare(world: World) -> None:
        for name, model in trained.items():
            nnx.update(getattr(world, name), nnx.state(model))
        world.dynamics.start_from(np.asarray(world.tokenizer.vq.codebook_KL))

    fit(
        cfg,
        "world",
        world_cfg,
        build=lambda rngs: World(world_cfg, cfg.compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg),
        evaluate=lambda world, batch, key: evaluate(world, batch, key, cfg),
        train=train,
        val=val,
        trainable=trainable(cfg),
        prepare=prepare,
        parts=parts,
        clip_flops=clip_flops(cfg, world_cfg, from_tokens=train.metadata.tokens is not None),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
