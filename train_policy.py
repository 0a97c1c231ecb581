"""Trains a policy to do what is done in a dataset: behavioural cloning from videos without actions (Genie, §3.3).

    python train_policy.py --lam_checkpoint runs/lam --data_dir data/expert     # of latent actions
    python train_policy.py --targets true --data_dir data/expert                # of the dataset's own: the oracle

What a LAM infers from the frames alone takes the place of the actions, which are not read. evaluate_policy.py learns
from a few labels which true action a latent one stands for, and plays.
"""

import dataclasses
from functools import partial
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
    decisions: int = 0
    """Time steps of each window that are learned, drawn anew each time, where the action changes with five times the
    chance: as much work then sees more windows. 0: all."""
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
        decisions=8,
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


OFTEN, SELDOM = 5.0, 0.1
"""How many times as likely as another one a time step is drawn at which the action changes, and a window's first one,
which looks as if nothing had moved. A change then counts 2 / OFTEN, so twice in all."""


def targets(agent: Agent, batch: Batch, frames_BTHWC: jax.Array) -> jax.Array:
    """Actions (B, Tm1), int32, of which entry t leads from frame t to frame t + 1."""
    if agent.lam:
        return agent.lam.infer(frames_BTHWC)
    return batch.actions_BT[:, :-1]


def predict(agent: Agent, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, A) of a policy that sees frames up to t alone, and the actions (B, S) that then lead to t + 1."""
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    return agent.policy(seen(agent, frames)).logits_BTA, targets(agent, batch, frames)


def seen(agent: Agent, frames_BTHWC: jax.Array) -> jax.Array:
    """All frames by which something is chosen, from `context` - 1 before a window's first one on.

    What was before that counts as that frame, as before a level's first one in play. Else a policy would see still
    pictures where an expert stands, and nowhere else, and would stand as well.
    """
    before = jnp.repeat(frames_BTHWC[:, :1], agent.cfg.policy.context - 1, axis=1)
    return jnp.concatenate([before, frames_BTHWC[:, :-1]], axis=1)


def predict_some(agent: Agent, batch: Batch, chance_BS: jax.Array, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `predict`, of `num` time steps of each window, (B, K), with what each counts.

    Args:
      chance_BS: Gumbel's noise, by which they are drawn.
    """
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    targets_BS = targets(agent, batch, frames)
    changes_BS = jnp.pad(targets_BS[:, 1:] != targets_BS[:, :-1], ((0, 0), (1, 0)))
    often_BS = jnp.where(changes_BS, OFTEN, 1.0).at[:, 0].set(SELDOM)
    _, times_BK = jax.lax.top_k(chance_BS + jnp.log(often_BS), num)  # without repetition (Kool et al. 2019)
    at_times = lambda x_BS: jnp.take_along_axis(x_BS, times_BK, axis=1)
    weights_BK = jnp.where(at_times(changes_BS), 2 / OFTEN, 1.0)
    context = agent.cfg.policy.context
    windows = jax.vmap(lambda x, index: x[index])(seen(agent, frames), times_BK[..., None] + jnp.arange(context))
    logits_XA = agent.policy(windows.reshape(-1, *windows.shape[2:])).logits_BTA[:, 0]
    logits_BKA = logits_XA.reshape(*times_BK.shape, -1)
    return logits_BKA, at_times(targets_BS), weights_BK


def loss_fn(agent: Agent, given: tuple[Batch, jax.Array | None], decisions: int = 0) -> tuple[jax.Array, tuple]:
    """Cross-entropy of the actions: of a batch, and the noise by which `decisions` of its time steps are drawn."""
    batch, chance_BS = given
    if chance_BS is None:
        logits_BKA, targets_BK = predict(agent, batch)
        weights_BK = jnp.ones(targets_BK.shape)
    else:
        logits_BKA, targets_BK, weights_BK = predict_some(agent, batch, chance_BS, decisions)
    loss = jnp.mean(weights_BK * optax.softmax_cross_entropy_with_integer_labels(logits_BKA, targets_BK))
    return loss, ({"accuracy": jnp.mean(jnp.argmax(logits_BKA, axis=-1) == targets_BK)}, ())


def train_step(state: TrainState, batch: Batch, key: jax.Array, cfg: Config) -> tuple[TrainState, dict]:
    """One update of the policy; the LAM stays as it is."""
    B, T = batch.frames_BTHWC.shape[:2]
    chance_BS = jax.random.gumbel(key, (B, T - 1)) if cfg.decisions else None
    loss = partial(loss_fn, decisions=cfg.decisions)
    grads, metrics, _ = gradients(loss, state, (batch, chance_BS), cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    return state, metrics | norms


def evaluate(agent: Agent, batch: Batch, key: jax.Array) -> tuple[dict, jax.Array]:
    """The loss beside that of one who knows the actions' shares alone; shows the first clip."""
    logits_BSA, targets_BS = predict(agent, batch)
    loss, (metrics, _) = loss_fn(agent, (batch, None))
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
    if not 0 <= cfg.decisions < cfg.seq_len:
        raise InputError(f"`decisions` {cfg.decisions}: must be 0, or 1 or more and less than `seq_len` {cfg.seq_len}")
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
    return 3 * flops.policy(agent.policy, cfg.decisions or cfg.seq_len - 1) + infer


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
