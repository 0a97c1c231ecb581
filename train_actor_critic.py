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
from agents.imagination import Imagined, Targets, imagine_by, targets
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
from models.policy import Agent, Policy
from models.sampling import SamplingConfig
from utils.cli import run
from utils.data import Batch
from utils.mixture import open_split
from utils.records import Metadata
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
    entropy_weight: float = 3e-4
    """Of the entropy of the policy's choices, which keeps it trying."""
    kl_weight: float = 0.05
    """Of its divergence, in nats, from the policy that it began with: no world is right about everything."""
    ckpt_dir: str = "runs/actor_critic"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    num_steps: int = 10_000
    """Steps to train in all; a finished training goes on if this grows."""
    seq_len: int = 5
    """Frames of a prompt, more than a choice sees."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero; at most a tenth of a run too short for the recipe."""

    def __post_init__(self):
        super().__post_init__()
        if self.horizon < 1:
            raise InputError(f"`horizon` {self.horizon}: must be at least 1")
        for name in ("entropy_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` {getattr(self, name)}: must not be negative")
        if self.pad_short or self.init_from:
            raise InputError("`pad_short`, `init_from`: of no use here, where `policy_checkpoint` is what begins")


PRESETS = {
    "coinrun": Config(),
    "tiny": Config(
        batch_size=16,
        num_steps=300,
        learning_rate=5e-4,
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

TRAINABLE = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("policy"), nnx.PathContains("critic")))
"""Policy and critic; the agent's LAM, the clone and the world stay as they are."""


def imagine(
    policy: Policy, world: World, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig
) -> Imagined:
    """Rollouts of a policy from a batch's frames."""
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    actions_BTm1 = batch.actions_BT[:, :-1] if world.lam is None else world.infer_actions(frames)
    return imagine_by(policy, world, frames, actions_BTm1, cfg.horizon, key, sampling)


def loss_fn(model: ActorCritic, given: tuple[Imagined, Targets], cfg: Config) -> tuple[jax.Array, tuple]:
    """The actor's loss, REINFORCE with the critic's advantages, and the critic's cross-entropy."""
    (frames_BTHWC, actions_BS, _), (returns_BS, advantages_BS, reached_BS) = given
    before = frames_BTHWC[:, :-1]  # the last action comes before the last frame
    log_p_BSA, log_q_BSA = (
        jax.nn.log_softmax(policy(before).logits_BTA) for policy in (model.agent.policy, model.clone)
    )
    p_BSA = jnp.exp(log_p_BSA)
    taken_BS = jnp.take_along_axis(log_p_BSA, actions_BS[..., None], axis=-1)[..., 0]
    entropy_BS = -jnp.sum(p_BSA * log_p_BSA, axis=-1)
    divergence_BS = jnp.sum(p_BSA * (log_p_BSA - log_q_BSA), axis=-1)
    actor_BS = cfg.kl_weight * divergence_BS - cfg.entropy_weight * entropy_BS - advantages_BS * taken_BS
    critic_BS = optax.softmax_cross_entropy(model.critic(before).logits_BTA, two_hot(returns_BS))
    mean = lambda x_BS: jnp.mean(reached_BS * x_BS)
    told = {"actor_loss": actor_BS, "critic_loss": critic_BS, "entropy": entropy_BS, "divergence": divergence_BS}
    return mean(actor_BS + critic_BS), ({name: mean(x_BS) for name, x_BS in told.items()}, ())


def outcome(imagined: Imagined) -> dict[str, jax.Array]:
    """What rollouts come to, on average: `worth`, and the probabilities that they end, and that they end solved."""
    judged, reached_BS = imagined.judged, reached(imagined.judged)
    ends = {"ended": judged.end_X, "solved": judged.solved_X}
    sums = {name: jnp.sum(reached_BS * end_BS, axis=1) for name, end_BS in ends.items()}
    return {name: jnp.mean(value_B) for name, value_B in (sums | {"worth": worth(judged)}).items()}


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig
) -> tuple[TrainState, dict]:
    """One update of policy and critic on rollouts of the policy as it is; agent's LAM, clone and world stay."""
    model = state.model()
    imagined = imagine(model.agent.policy, model.world, batch, key, cfg, sampling)
    given = imagined, targets(model, imagined)
    grads, metrics, _ = gradients(lambda m, x: loss_fn(m, x, cfg), state, given, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    return state, metrics | outcome(imagined) | norms


def evaluate(
    model: ActorCritic, batch: Batch, key: jax.Array, cfg: Config, sampling: SamplingConfig
) -> tuple[dict, jax.Array]:
    """What the policy comes to, beside the clone from the same prompts with the same dice; shows one over the other."""
    of_policy, of_clone = (
        imagine(policy, model.world, batch, key, cfg, sampling) for policy in (model.agent.policy, model.clone)
    )
    loss, (metrics, _) = loss_fn(model, (of_policy, targets(model, of_policy)), cfg)
    known = {"loss": loss} | metrics | outcome(of_policy)
    known |= {f"{name}_of_clone": value for name, value in outcome(of_clone).items()}
    return known, jnp.stack([of_policy.frames_BTHWC[0], of_clone.frames_BTHWC[0]])


def load_parts(cfg: Config, metadata: Metadata) -> tuple[Agent, World]:
    """The policy and the world.

    Raises:
      InputError: They do not fit together, or not the prompts.
    """
    agent, world = load_agent(cfg.policy_checkpoint), load_world(cfg.world_checkpoint)
    if world.heads is None or "reward" not in world.heads.cfg.names:
        raise InputError(
            f"`world_checkpoint` {cfg.world_checkpoint}: has no head for rewards; train it with train_dynamics.py "
            "--heads reward,end"
        )
    here, there, shape = agent.cfg.policy.num_actions, world.num_actions, metadata.frame_shape
    fits = same_lam(agent.lam, world.lam) if agent.lam and world.lam else not agent.lam and not world.lam
    if not fits or here != there:
        raise InputError(
            f"`policy_checkpoint` {cfg.policy_checkpoint}: its {here} actions are not the {there} of "
            f"{cfg.world_checkpoint}; train it with that as its --lam_checkpoint, or both on true actions"
        )
    for name, part in (("policy", agent), ("world", world)):
        if (of := part.cfg.frame_shape) != shape:
            raise InputError(f"`{name}_checkpoint`: made for frames of {of}, but {cfg.data_dir} has {shape}")
    if world.lam is None and metadata.num_actions != there:
        raise InputError(f"`data_dir` {cfg.data_dir}: has {metadata.num_actions} actions, the world {there}")
    context, window = max(agent.cfg.policy.context, 2), world.cfg.window
    if not context < cfg.seq_len < window:
        raise InputError(
            f"`seq_len` {cfg.seq_len}: must be above {context}, of which a choice and its latent actions are made, and "
            f"below the {window} frames that the world sees"
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
    train, val = (open_split(cfg.data_dir, split, cfg.seq_len) for split in ("train", "val"))
    agent, world = load_parts(cfg, train.metadata)
    model_cfg, sampling = ActorCriticConfig(agent.cfg, world.cfg), stored_sampling(cfg.world_checkpoint)
    told = str(sampling).replace(", guidance=1.0", "")  # younger than runs that are to be resumed

    fit(
        cfg,
        "actor_critic",
        model_cfg,
        build=lambda rngs, compute: ActorCritic(model_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg, sampling),
        evaluate=lambda model, batch, key: evaluate(model, batch, key, cfg, sampling),
        train=train,
        val=val,
        trainable=TRAINABLE,
        initialise=lambda model: begin(model, agent, world),
        parts={"policy": fingerprint(agent), "world": fingerprint(world), "sampling": told},
        clip_flops=clip_flops(cfg, model_cfg, sampling),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
