"""Trains the latent action model: which of a few actions led from each frame to the next (Genie, §2.1).

python train_lam.py --ckpt_dir runs/lam
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import flops
from models.errors import InputError
from models.lam import LAM, LAMConfig
from models.padding import after_first, even, mean_of_true
from utils.cli import run
from utils.data import Batch
from utils.metrics import perplexity, psnr, usage
from utils.mixture import open_splits
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Trains the latent action model. Defaults: Genie, Appendix F."""

    model: LAMConfig = LAMConfig()  # noqa: RUF009 (frozen)
    ckpt_dir: str = "runs/lam"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    num_steps: int = 200_000
    """Steps to train in all; a finished training goes on if this grows."""
    commitment: float = 0.0
    """Weight of the loss that holds latents near their codes; it soon draws all of them to one or two codes."""
    action_dropout: float = 0.0
    """Share of the actions that the decoder has to do without, so that they tell what it cannot know by itself."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.action_dropout < 1:
            raise InputError(f"`action_dropout` {self.action_dropout}: must be 0 or more and less than 1")


TINY = Config(
    model=LAMConfig(
        width=128,
        num_heads=4,
        num_blocks=1,
        rotary_space=True,
        patch_size=8,
        num_codes=8,
        codebook_decay=0.95,
        unquantized_steps=200,
        motion_reach=6,
    ),
    batch_size=8,
    seq_len=4,
    num_steps=600,
    optimizer="muon",
    learning_rate=4e-3,
    warmup_steps=20,
    decay_steps=300,
    beta2=0.95,
    val_batches=8,
    log_interval=50,
    val_interval=300,
    checkpoint_interval=300,
)
PRESETS = {
    "coinrun": Config(),
    "moving": Config(model=LAMConfig(rotary_space=True, num_codes=8, motion_reach=6)),
    "tiny": TINY,
    "flow": TINY,
    "latents": TINY,
    "small": dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, unquantized_steps=400),
        batch_size=16,
        seq_len=2,
        learning_rate=3e-3,
        num_steps=2000,
        decay_steps=1200,
        val_interval=1000,
        checkpoint_interval=500,
    ),
    "bench": Config(
        model=LAMConfig(width=128, num_heads=4, num_blocks=4),
        batch_size=4,
    ),
}
"""coinrun: the paper's, Appendix F.
moving: ours, of the same size, with decoders that move the last frame; judged at tiny's size until a GPU trains it.

tiny: what `make demo` runs, `python train_lam.py --preset tiny`; its decoder moves the last frame.
flow, latents: the same.
small: the same model trained for longer, as for worlds/coinrun-small, on pairs of frames: all that there is to tell of
them is a velocity, and so a code is one.
bench: for benchmarks/ only.
"""


def loss_fn(model: LAM, inputs: tuple[Batch, jax.Array | None], cfg: Config) -> tuple[jax.Array, tuple]:
    """Mean squared error of each next frame, predicted from the past and the action, and commitment."""
    batch, told_BTm1 = inputs
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    out = model(frames, train=True, weight_BT=batch.weight_BT, told_BTm1=told_BTm1)
    mse = mean_of_true(jnp.square(out.next_frames_BTm1HWC - frames[:, 1:]), after_first(batch.weight_BT))
    metrics = {"mse": mse, "commitment": out.commitment}
    return mse + cfg.commitment * out.commitment, (metrics, (out.latents_BTm1L, out.actions_BTm1))


def train_step(state: TrainState, batch: Batch, key: jax.Array, cfg: Config) -> tuple[TrainState, dict]:
    """One update of the parameters by gradient, and of the codebook by moving average."""
    batch = batch._replace(weight_BT=even(batch.weight_BT, first=1))
    told_BTm1 = None
    if cfg.action_dropout:
        key, drawn = jax.random.split(key)
        B, T = batch.frames_BTHWC.shape[:2]
        told_BTm1 = jax.random.bernoulli(drawn, 1.0 - cfg.action_dropout, (B, T - 1))
    inputs = batch, told_BTm1
    grads, metrics, latents_and_actions = gradients(lambda m, x: loss_fn(m, x, cfg), state, inputs, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    model = state.model()
    weight_BTm1 = after_first(batch.weight_BT)
    model.vq.update(*latents_and_actions, key, weight_BTm1)
    metrics["usage"] = usage(latents_and_actions[1], cfg.model.num_codes, weight_BTm1)
    return state.with_rest_of(model), metrics | norms


def evaluate(model: LAM, batch: Batch, key: jax.Array) -> tuple[dict, jax.Array]:
    """Quality of predicted next frames, with the inferred actions and with random ones; shows truth over prediction."""
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    truth = frames[:, 1:]
    out = model(frames)
    predicted = jnp.clip(out.next_frames_BTm1HWC, 0, 1)
    actions = jax.random.randint(key, out.actions_BTm1.shape, 0, model.cfg.num_codes)
    misled = jnp.clip(model.predict(frames[:, :-1], model.vq.lookup(actions)), 0, 1)
    metrics = {
        "loss": jnp.mean(jnp.square(predicted - truth)),
        "psnr": jnp.mean(psnr(predicted, truth)),
        "psnr_random_action": jnp.mean(psnr(misled, truth)),
        "psnr_copy": jnp.mean(psnr(frames[:, :-1], truth)),
        "usage": usage(out.actions_BTm1, model.cfg.num_codes),
        "perplexity": perplexity(out.actions_BTm1, model.cfg.num_codes),
    }
    return metrics, jnp.stack([truth[0], predicted[0]])


def clip_flops(cfg: Config, model_cfg: LAMConfig) -> int:
    """Floating-point operations of a training step for one clip."""
    return flops.lam_step(model_cfg, cfg.seq_len)


def main(cfg: Config) -> None:
    cfg = start(cfg)
    train, val = open_splits(cfg.data_dir, cfg.seq_len, shortest=2 if cfg.pad_short else cfg.seq_len)
    model_cfg = dataclasses.replace(cfg.model, frame_shape=train.metadata.frame_shape)
    fit(
        cfg,
        "lam",
        model_cfg,
        build=lambda rngs, compute: LAM(model_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg),
        evaluate=evaluate,
        train=train,
        val=val,
        clip_flops=clip_flops(cfg, model_cfg),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
