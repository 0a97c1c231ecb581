"""Trains a policy to do what is done in a dataset: behavioural cloning from videos without actions (Genie, §3.3).

    python train_policy.py --lam_checkpoint runs/lam --data_dir data/expert     # of latent actions
    python train_policy.py --targets true --data_dir data/expert                # of the dataset's own: the oracle

What a LAM infers from the frames alone takes the place of the actions, which are not read. evaluate_policy.py learns
from a few labels which true action a latent one stands for, and plays.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import flops
from models.errors import InputError
from models.genie import fingerprint, load_lam, stored_model_config
from models.policy import Agent, AgentConfig, PolicyConfig
from utils.cli import run
from utils.data import Batch
from utils.metrics import perplexity
from utils.mixture import open_split
from utils.records import Metadata
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Trains a policy by behavioural cloning."""

    model: PolicyConfig = PolicyConfig()  # noqa: RUF009 (frozen)
    targets: Literal["latent", "true"] = "latent"
    """What to predict: the actions that a LAM infers from the frames, or those that the dataset holds."""
    lam_checkpoint: str = "runs/lam"
    """--ckpt_dir of the training of the LAM, or of a world that holds one; for latent targets."""
    ckpt_dir: str = "runs/policy"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    num_steps: int = 50_000
    """Steps to train in all; a finished training goes on if this grows."""
    warmup_steps: int = 1000
    """Steps of linear warm-up from zero; at most a tenth of a run too short for the recipe."""


PRESETS = {
    "coinrun": Config(),
    "tiny": Config(
        model=PolicyConfig(width=64, num_heads=4, num_blocks=2, context=2),
        batch_size=16,
        seq_len=16,
        num_steps=800,
        optimizer="muon",
        learning_rate=4e-3,
        warmup_steps=20,
        decay_steps=400,
        beta2=0.95,
        val_batches=16,
        log_interval=50,
        val_interval=400,
        checkpoint_interval=400,
    ),
}
"""coinrun: for the data of Appendix F; not run on a GPU yet. tiny: what `make agent` runs."""


def targets(agent: Agent, batch: Batch, frames_BTHWC: jax.Array) -> jax.Array:
    """Actions (B, Tm1), int32, of which entry t leads from frame t to frame t + 1."""
    if agent.lam:
        return agent.lam.infer(frames_BTHWC)
    return batch.actions_BT[:, :-1]


def predict(agent: Agent, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, A) of a policy that sees frames up to t alone, and the actions (B, S) that then lead to t + 1.

    What was before a window's first frame counts as that frame, as before a level's first one in play. Else it would
    see still pictures where an expert stands, and nowhere else, and would stand as well.
    """
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    before = jnp.repeat(frames[:, :1], agent.cfg.policy.context - 1, axis=1)
    logits_BSA = agent.policy(jnp.concatenate([before, frames[:, :-1]], axis=1)).logits_BTA
    return logits_BSA, targets(agent, batch, frames)


def loss_fn(agent: Agent, batch: Batch) -> tuple[jax.Array, tuple]:
    """Cross-entropy of the actions."""
    logits_BSA, targets_BS = predict(agent, batch)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BSA, targets_BS))
    return loss, ({"accuracy": jnp.mean(jnp.argmax(logits_BSA, axis=-1) == targets_BS)}, ())


def train_step(state: TrainState, batch: Batch, key: jax.Array, cfg: Config) -> tuple[TrainState, dict]:
    """One update of the policy; the LAM stays as it is."""
    grads, metrics, _ = gradients(loss_fn, state, batch, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    return state, metrics | norms


def evaluate(agent: Agent, batch: Batch, key: jax.Array) -> tuple[dict, jax.Array]:
    """The loss beside that of one who knows the actions' shares alone; shows the first clip."""
    logits_BSA, targets_BS = predict(agent, batch)
    loss, (metrics, _) = loss_fn(agent, batch)
    num_actions = agent.cfg.policy.num_actions
    metrics |= {
        "loss": loss,
        "loss_of_shares": jnp.log(perplexity(targets_BS, num_actions)),
        "accuracy_majority": jnp.max(jnp.bincount(targets_BS.reshape(-1), length=num_actions)) / targets_BS.size,
        "perplexity": jnp.exp(jnp.mean(-jnp.sum(jax.nn.softmax(logits_BSA) * jax.nn.log_softmax(logits_BSA), axis=-1))),
    }
    return metrics, batch.frames_BTHWC[:1].astype(jnp.float32) / 255


def agent_config(cfg: Config, metadata: Metadata) -> AgentConfig:
    """What the dataset and the LAM make of the configuration.

    Raises:
      InputError: They do not fit, or a clip is too short for a choice.
    """
    if cfg.pad_short:
        raise InputError("`pad_short`: a policy learns from whole windows; leave it out, or take a smaller `seq_len`")
    if cfg.seq_len <= cfg.model.context:
        raise InputError(f"`seq_len` {cfg.seq_len}: must be longer than the `context` of {cfg.model.context} frames")
    shape = metadata.frame_shape
    if cfg.targets == "true":
        if not metadata.num_actions:
            raise InputError(f"`targets` true: {cfg.data_dir} has no discrete actions; clone latent ones")
        return AgentConfig(dataclasses.replace(cfg.model, num_actions=metadata.num_actions, frame_shape=shape), None)
    lam = stored_model_config(cfg.lam_checkpoint, "lam")
    if lam.frame_shape != shape:
        raise InputError(
            f"`lam_checkpoint`: made for frames of {lam.frame_shape}, but {cfg.data_dir} has {shape}; use a dataset "
            "like the one that it was trained on"
        )
    return AgentConfig(dataclasses.replace(cfg.model, num_actions=lam.num_codes, frame_shape=shape), lam)


def clip_flops(cfg: Config, agent: AgentConfig) -> int:
    """Floating-point operations of a training step for one clip; the LAM only runs forward."""
    infer = flops.lam_infer(agent.lam, cfg.seq_len) if agent.lam else 0
    return 3 * flops.policy(agent.policy, cfg.seq_len - 1) + infer


def main(cfg: Config) -> None:
    cfg = start(cfg)
    train, val = (open_split(cfg.data_dir, split, cfg.seq_len) for split in ("train", "val"))
    agent_cfg = agent_config(cfg, train.metadata)
    lam = load_lam(cfg.lam_checkpoint) if agent_cfg.lam else None

    def initialise(agent: Agent) -> None:
        if lam:
            nnx.update(agent.lam, nnx.state(lam))

    fit(
        cfg,
        "agent",
        agent_cfg,
        build=lambda rngs, compute: Agent(agent_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg),
        evaluate=evaluate,
        train=train,
        val=val,
        trainable=nnx.All(nnx.Param, nnx.PathContains("policy")),
        initialise=initialise,
        parts={"lam": fingerprint(lam)} if lam else {},
        clip_flops=clip_flops(cfg, agent_cfg),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
