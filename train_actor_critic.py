"""Improves a policy on what it imagines in a world: an actor–critic that never sees the game (kin: Hafner et al. 2023).

    python train_actor_critic.py --policy_checkpoint runs/policy --world_checkpoint runs/dynamics --data_dir data/expert

The world needs heads (train_dynamics.py --heads reward,end), and the policy's actions have to be its own: latent ones
of the same LAM, or true ones. evaluate_policy.py says whether the real game agrees.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from agents.clones import same_lam
from agents.imagination import Imagined, Lesson, imagine_by, lesson
from agents.planning import reached, worth
from models import flops
from models.errors import InputError
from models.genie import (
    DYNAMICS,
    ActorCritic,
    ActorCriticConfig,
    World,
    fingerprint,
    load_agent,
    load_world,
    stored_sampling,
)
from models.heads import two_hot
from models.policy import Agent
from models.sampling import SamplingConfig
from utils.cli import run
from utils.data import Batch
from utils.mixture import open_split
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Improves a policy in a world."""

    policy_checkpoint: str = "runs/policy"
    """--ckpt_dir of the policy's training, with which it begins, and from which it is not to go far."""
    world_checkpoint: str = "runs/dynamics"
    """--ckpt_dir of the training of a world with heads, or an exported one."""
    horizon: int = 15
    """Actions to imagine from each prompt, which is a window of --seq_len frames."""
    entropy: float = 3e-4
    """Weight of the entropy of the policy's choices, which keeps it trying."""
    stay: float = 0.1
    """Weight of its divergence, in nats, from the policy that it began with: no world is right about everything."""
    ckpt_dir: str = "runs/actor_critic"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    num_steps: int = 10_000
    """Steps to train in all; a finished training goes on if this grows."""
    seq_len: int = 4
    """Frames of a prompt."""
    learning_rate: float = 3e-5
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero; at most a tenth of a run too short for the recipe."""

    def __post_init__(self):
        super().__post_init__()
        if self.horizon < 1:
            raise InputError(f"`horizon` {self.horizon}: must be at least 1")
        for name in ("entropy", "stay"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` {getattr(self, name)}: must not be negative")
        if self.pad_short or self.init_from:
            raise InputError("`pad_short`, `init_from`: of no use here, where `policy_checkpoint` is what begins")


PRESETS = {
    "coinrun": Config(),
    "tiny": Config(
        batch_size=16,
        num_steps=300,
        warmup_steps=20,
        decay_steps=100,
        beta2=0.95,
        val_batches=8,
        log_interval=25,
        val_interval=100,
        checkpoint_interval=100,
    ),
}
"""coinrun: for a policy of that preset; not run on a GPU yet. tiny: for those of `make agent`, on a CPU."""


def imagine(model: ActorCritic, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig) -> Imagined:
    """Rollouts of the policy from a batch's frames."""
    frames, world = batch.frames_BTHWC.astype(jnp.float32) / 255, model.world
    actions_BTm1 = batch.actions_BT[:, :-1] if world.lam is None else world.infer_actions(frames)
    return imagine_by(model.agent.policy, world, frames, actions_BTm1, cfg.horizon, key, sampling)


def loss_fn(model: ActorCritic, given: tuple[Imagined, Lesson], cfg: Config) -> tuple[jax.Array, tuple]:
    """The actor's loss, REINFORCE with the critic's advantages, and the critic's cross-entropy."""
    (frames, actions_BH, _), (returns_BH, advantages_BH, reached_BH) = given
    before = frames[:, :-1]  # the last action comes before the last frame
    log_p_BHA, log_q_BHA = (
        jax.nn.log_softmax(policy(before).logits_BTA) for policy in (model.agent.policy, model.clone)
    )
    p_BHA = jnp.exp(log_p_BHA)
    taken_BH = jnp.take_along_axis(log_p_BHA, actions_BH[..., None], axis=-1)[..., 0]
    entropy_BH = -jnp.sum(p_BHA * log_p_BHA, axis=-1)
    divergence_BH = jnp.sum(p_BHA * (log_p_BHA - jax.lax.stop_gradient(log_q_BHA)), axis=-1)
    actor_BH = cfg.stay * divergence_BH - cfg.entropy * entropy_BH - advantages_BH * taken_BH
    critic_BH = optax.softmax_cross_entropy(model.critic(before).logits_BTA, two_hot(returns_BH))
    mean = lambda x_BH: jnp.mean(reached_BH * x_BH)
    metrics = {"actor_loss": mean(actor_BH), "critic_loss": mean(critic_BH), "entropy": jnp.mean(entropy_BH)}
    return mean(actor_BH + critic_BH), (metrics | {"divergence": jnp.mean(divergence_BH)}, ())


def outcome(imagined: Imagined) -> dict[str, jax.Array]:
    """What rollouts come to, on average: `worth`, and the probabilities that they end, and that they end solved."""
    judged, reached_BH = imagined.judged, reached(imagined.judged)
    ends = {"ended": judged.end_X, "solved": judged.solved_X}
    sums = {name: jnp.sum(reached_BH * end_BH, axis=1) for name, end_BH in ends.items()}
    return {name: jnp.mean(value_B) for name, value_B in (sums | {"worth": worth(judged)}).items()}


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig
) -> tuple[TrainState, dict]:
    """One update of policy and critic on rollouts of the policy as it is; agent's LAM, clone and world stay."""
    model = state.model()
    imagined = jax.lax.stop_gradient(imagine(model, batch, key, cfg, sampling))
    given = imagined, jax.lax.stop_gradient(lesson(model, imagined))
    grads, metrics, _ = gradients(lambda m, x: loss_fn(m, x, cfg), state, given, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    return state, metrics | outcome(imagined) | norms


def evaluate(
    model: ActorCritic, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig
) -> tuple[dict, jax.Array]:
    """What the policy comes to, beside the clone from the same prompts with the same dice; shows one over the other."""
    imagined = imagine(model, batch, key, cfg, sampling)
    loss, (metrics, _) = loss_fn(model, (imagined, lesson(model, imagined)), cfg)
    known = {"loss": loss} | metrics | outcome(imagined)
    model.agent.policy = model.clone
    by_clone = imagine(model, batch, key, cfg, sampling)
    known |= {f"{name}_of_clone": value for name, value in outcome(by_clone).items()}
    return known, jnp.stack([imagined.frames_BSHWC[0], by_clone.frames_BSHWC[0]])


def load_parts(cfg: Config) -> tuple[Agent, World]:
    """The policy and the world.

    Raises:
      InputError: They do not fit together, or not the prompts.
    """
    agent, world = load_agent(cfg.policy_checkpoint), load_world(cfg.world_checkpoint)
    if world.heads is None:
        raise InputError(
            f"`world_checkpoint` {cfg.world_checkpoint}: has no heads; train it with train_dynamics.py --heads "
            "reward,end"
        )
    fits = same_lam(agent.lam, world.lam) if agent.lam and world.lam else not agent.lam and not world.lam
    if not fits or agent.cfg.policy.num_actions != world.num_actions:
        raise InputError(
            f"`policy_checkpoint` {cfg.policy_checkpoint}: its actions are not those of {cfg.world_checkpoint}; train "
            "it with that as its --lam_checkpoint, or both on true actions"
        )
    context, window = agent.cfg.policy.context, world.cfg.window
    if not context <= cfg.seq_len < window:
        raise InputError(
            f"`seq_len` {cfg.seq_len}: must be at least the policy's {context} frames, and below the world's {window}"
        )
    return agent, world


def begin(model: ActorCritic, agent: Agent, world: World) -> None:
    """Puts the parts into a new model; the critic begins with what the policy sees, and a value of 0."""
    nnx.update(model.agent, nnx.state(agent))
    nnx.update(model.world, nnx.state(world))
    copied = lambda: jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(agent.policy)))  # each is a state of its own
    nnx.update(model.clone, copied())
    nnx.update(model.critic, {name: value for name, value in copied().items() if name != "action_out"})


def clip_flops(cfg: Config, model_cfg: ActorCriticConfig, sampling: SamplingConfig) -> int:
    """Floating-point operations of a training step for one prompt; of the world its dynamics model's."""
    world, policy = model_cfg.world, flops.policy(model_cfg.agent.policy, 1)
    frame = DYNAMICS[world.dynamics.kind].frame_flops(world.dynamics, world.window, sampling)
    return cfg.horizon * (frame + (1 + 1 + 3 + 3 + 1) * policy)  # acts; is judged; both learn; clone


def main(cfg: Config) -> None:
    cfg = start(cfg)
    agent, world = load_parts(cfg)
    train, val = (open_split(cfg.data_dir, split, cfg.seq_len) for split in ("train", "val"))
    if (found := train.metadata.frame_shape) != agent.cfg.frame_shape:
        raise InputError(f"`data_dir` {cfg.data_dir}: frames of {found}, the policy's are {agent.cfg.frame_shape}")
    if world.lam is None and not train.metadata.has_actions:
        raise InputError(f"`data_dir` {cfg.data_dir}: has no actions, which this world takes")
    model_cfg, sampling = ActorCriticConfig(agent.cfg, world.cfg), stored_sampling(cfg.world_checkpoint)

    fit(
        cfg,
        "actor_critic",
        model_cfg,
        build=lambda rngs, compute: ActorCritic(model_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg, sampling),
        evaluate=lambda model, batch, key: evaluate(model, batch, key, cfg, sampling),
        train=train,
        val=val,
        trainable=nnx.All(nnx.Param, nnx.Any(nnx.PathContains("policy"), nnx.PathContains("critic"))),
        initialise=lambda model: begin(model, agent, world),
        parts={"policy": fingerprint(agent), "world": fingerprint(world)},
        clip_flops=clip_flops(cfg, model_cfg, sampling),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
