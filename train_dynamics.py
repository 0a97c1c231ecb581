"""Trains the dynamics model on the tokens of a trained tokenizer and the actions of a trained LAM (Genie, §2.1).

    python train_dynamics.py --tokenizer_checkpoint runs/tokenizer --lam_checkpoint runs/lam
    python train_dynamics.py --preset flow --lam_checkpoint runs/lam      # on pixels, without a tokenizer

Without --lam_checkpoint a LAM is trained along with it; with --use_gt_actions the dataset's own actions take its place.
The checkpoint is a whole world: it holds the tokenizer and the LAM too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import flops
from models.actions import random_actions
from models.dynamics import DynamicsConfig, Seen
from models.genie import DYNAMICS, World, WorldConfig, fingerprint, load_lam, load_tokenizer
from models.lam import LAMConfig
from models.padding import after_first, even
from models.sampling import SamplingConfig, roll
from utils.action_source import ActionSource, InferredActions
from utils.cli import run
from utils.data import Batch
from utils.judge import head_names, judge
from utils.metrics import rollout_quality, usage
from utils.mixture import open_splits
from utils.parts import choose_actions, world_config
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Trains the dynamics model. Defaults: Genie, Appendix F."""

    model: DynamicsConfig = DynamicsConfig()  # noqa: RUF009 (frozen)
    lam: LAMConfig = LAMConfig()  # noqa: RUF009 (frozen)
    """Of the LAM that is trained along, when there is no --lam_checkpoint."""
    tokenizer_checkpoint: str = "runs/tokenizer"
    """--ckpt_dir of the tokenizer's training; of no account to a flow in pixels."""
    lam_checkpoint: str = ""
    """--ckpt_dir of the LAM's training; empty trains a LAM along with the dynamics model."""
    joint_lam: bool = False
    """Train the LAM's encoder along by a flow's own loss, without a decoder of its own."""
    use_gt_actions: bool = False
    """Take the dataset's true actions instead of latent ones."""
    heads: str = ""
    """Also learn what actions earn and whether they end a level: reward, end, or both as reward,end."""
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
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
    """How the world is sampled by default, as in the rollouts of a validation."""


SIZE: dict[str, Any] = {"width": 128, "num_heads": 4, "rotary_space": True}
TINY = Config(
    model=DynamicsConfig(
        **SIZE, num_blocks=2, action_token="add", sees_picture=True, picture_noise=0.05, picture_blur=0.5
    ),
    lam=LAMConfig(**SIZE, num_blocks=1, patch_size=8, num_codes=8, unquantized_steps=250, motion_reach=6),
    sampling=SamplingConfig(steps=2, temperature=0.0),
    batch_size=2,
    num_steps=1200,
    optimizer="muon",
    learning_rate=4e-3,
    final_learning_rate=0.0,
    warmup_steps=20,
    decay_steps=600,
    beta2=0.95,
    val_batches=8,
    log_interval=50,
    val_interval=600,
    checkpoint_interval=600,
)
FLOW = dataclasses.replace(
    TINY,
    model=DynamicsConfig(**SIZE, kind="flow", num_blocks=2, patch_size=8, motion_reach=6, edge_weight=0.3),
    sampling=SamplingConfig(steps=1),
    num_steps=2000,
    decay_steps=1000,
)
PRESETS = {
    "coinrun": Config(),
    "moving": Config(
        model=DynamicsConfig(
            rotary_space=True, action_token="add", sees_picture=True, picture_noise=0.05, picture_blur=0.5
        ),
        lam=LAMConfig(rotary_space=True, num_codes=8, motion_reach=6),
        sampling=SamplingConfig(steps=2, temperature=0.0),
    ),
    "tiny": TINY,
    "flow": FLOW,
    "latents": dataclasses.replace(
        FLOW,
        model=DynamicsConfig(**SIZE, kind="flow", space="latents", num_blocks=2),
        num_steps=600,
        decay_steps=350,
    ),
    "small": dataclasses.replace(
        FLOW,
        model=dataclasses.replace(FLOW.model, action_dropout=0.15),
        sampling=SamplingConfig(steps=2, temperature=0.6, guidance=2.5),
        batch_size=4,
        learning_rate=3e-3,
        ema_decay=0.999,
        num_steps=18_000,
        decay_steps=3000,
        val_interval=1000,
        checkpoint_interval=500,
    ),
    "bench": Config(
        model=DynamicsConfig(width=128, num_heads=4, num_blocks=6),
        lam=LAMConfig(width=128, num_heads=4, num_blocks=4),
        batch_size=4,
    ),
}
"""coinrun: the paper's, Appendix F; moving: ours, of the same size, with decoders that move the last frame. Both were
timed on a GPU and not trained on one. tiny: ours on two cores of a CPU. flow: of its size, on pixels; latents: on those
of train_tokenizer.py's preset, what `make demo` runs. small: flow for longer, as worlds/coinrun-small was trained.
bench: for benchmarks/."""


def loss_fn(world: World, inputs: tuple[Batch, Any], source: ActionSource, train: bool = True) -> tuple:
    """The dynamics model's loss on a batch and what `Dynamics.draw` drew for it; that of a LAM trained along, which
    shares no parameter with it, is added."""
    batch, drawn = inputs
    coded, frames, last = see(world, batch, drawn)
    acted = source.actions(world, batch, frames, train)
    actions = acted.actions_BTm1, acted.vectors_BTm1L
    loss, metrics = world.dynamics.loss(seen := Seen(coded, frames, last, *actions), drawn)
    judged, told = judge(world, seen, batch, train)
    if acted.codes:
        metrics["lam_loss"] = jnp.asarray(acted.loss)
    return loss + acted.loss + judged, (metrics | told, acted.codes)


def see(world: World, batch: Batch, drawn: Any) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Tokens (B, T, N) or latents of frames, these in [0, 1], and the pictures shown before them; what is stored in
    their place makes frames that are not."""
    tokenizer, stored = world.tokenizer, batch.coded()
    if batch.frames_BTHWC is None:
        frames = jnp.clip(tokenizer.uncode(stored).frames_BTHWC, 0, 1)
    else:
        frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    last = world.dynamics.pictures_before(frames, drawn)
    if tokenizer is None:
        return None, frames, last
    if stored is not None and not tokenizer.cfg.closed_loop:  # else they depend on what is shown
        return stored, frames, last
    return jax.lax.stop_gradient(tokenizer.code(frames, last)), frames, last


def draw(world: World, batch: Batch, key: jax.Array) -> tuple[Batch, Any]:
    """A batch with what is drawn for it as a whole, so that gradient accumulation changes nothing."""
    B, T = jax.tree.leaves(batch)[0].shape[:2]
    batch = batch._replace(weight_BT=even(batch.weight_BT, first=1))
    return batch, world.dynamics.draw(world.cfg.dynamics, key, B, T, batch.weight_BT)


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, cfg: Config, source: ActionSource
) -> tuple[TrainState, dict]:
    """One update of the dynamics model, and of the LAM if that is trained along."""
    draw_key, code_key = jax.random.split(key)
    inputs = draw(state.model(), batch, draw_key)
    grads, metrics, codes = gradients(lambda m, b: loss_fn(m, b, source), state, inputs, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    if codes:
        model = state.model()
        weight_BTm1 = after_first(batch.weight_BT)
        model.lam.vq.update(*codes, code_key, weight_BTm1)
        if cfg.joint_lam:
            model.dynamics.follow(model.lam)
        state = state.with_rest_of(model)
        metrics["lam_usage"] = usage(codes[1], cfg.lam.num_codes, weight_BTm1)
    return state, metrics | norms


def evaluate(world: World, batch: Batch, key: jax.Array, cfg: Config, source: ActionSource) -> tuple[dict, jax.Array]:
    """The loss, and how rollouts from the first frame go (`utils.metrics.rollout_quality`); shows truth over one."""
    inputs = draw(world, batch, key)
    loss, (metrics, _) = loss_fn(world, inputs, source, train=False)
    frames = see(world, *inputs)[1]
    actions_BTm1 = source.actions(world, batch, frames, train=False).actions_BTm1
    random_BTm1 = random_actions(world.cfg.dynamics, key, actions_BTm1.shape[:2])
    predicted, misled = (roll(world, frames[:, :1], a, key, cfg.sampling) for a in (actions_BTm1, random_BTm1))
    videos = jnp.stack([frames[0], jnp.concatenate([frames[0, :1], predicted[0]])])
    return {"loss": loss} | metrics | rollout_quality(predicted, misled, frames), videos


def clip_flops(world_cfg: WorldConfig, source: ActionSource, from_tokens: bool = False) -> int:
    """Floating-point operations of a training step for one clip; frozen parts only run forward."""
    tokenizer, encode = world_cfg.tokenizer, 0
    if tokenizer and (tokenizer.closed_loop or not from_tokens):
        encode = flops.tokenizer_encode(tokenizer, world_cfg.window)
    dynamics = DYNAMICS[world_cfg.dynamics.kind].flops(world_cfg.dynamics, world_cfg.window)
    return (4 if world_cfg.heads else 3) * dynamics + encode + source.flops(world_cfg.window)


def main(cfg: Config) -> None:
    cfg = start(cfg)
    shortest = 2 if cfg.pad_short else cfg.seq_len
    train, val = open_splits(cfg.data_dir, cfg.seq_len, shortest, tokens_too=True, outcomes=head_names(cfg.heads))
    source = choose_actions(cfg, train.metadata)
    world_cfg = world_config(cfg, train.metadata, source)
    trained: dict[str, Any] = {"tokenizer": load_tokenizer(cfg.tokenizer_checkpoint)} if world_cfg.tokenizer else {}
    if isinstance(source, InferredActions):
        trained["lam"] = load_lam(cfg.lam_checkpoint)
    parts = {name: fingerprint(model) for name, model in trained.items()}
    if train.metadata.tokens:
        train.metadata.tokens.expect(parts)

    def initialise(world: World) -> None:
        for name, model in trained.items():
            nnx.update(getattr(world, name), nnx.state(model))
        world.dynamics.start_from(world.tokenizer)

    fit(
        cfg,
        "world",
        world_cfg,
        build=lambda rngs, compute: World(world_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg, source),
        evaluate=lambda world, batch, key: evaluate(world, batch, key, cfg, source),
        train=train,
        val=val,
        trainable=source.trainable,
        initialise=initialise,
        parts=parts,
        clip_flops=clip_flops(world_cfg, source, from_tokens=train.metadata.tokens is not None),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
