"""Trains the video tokenizer, a VQ-VAE of space-time transformers (Genie, §2.1).

python train_tokenizer.py --ckpt_dir runs/tokenizer
"""

import dataclasses

import jax
import jax.numpy as jnp

from models import flops
from models.motion import Damage, draw_damage
from models.padding import each_token, even, mean_of_true
from models.tokenizer import Tokenizer, TokenizerConfig
from utils.cli import run
from utils.data import Batch
from utils.metrics import psnr, ssim, usage
from utils.mixture import open_splits
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig, fit, start


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Trains the video tokenizer. Defaults: Genie, Appendix F."""

    model: TokenizerConfig = TokenizerConfig()  # noqa: RUF009 (frozen)
    ckpt_dir: str = "runs/tokenizer"
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes."""
    commitment: float = 0.25
    """Weight of the loss that holds latents near their codes."""


# Short clips and one block each way: on a CPU many cheap steps teach more than few dear ones.
TINY = Config(
    model=TokenizerConfig(
        width=128,
        num_heads=4,
        num_blocks=1,
        rotary_space=True,
        patch_size=8,
        codebook_decay=0.95,
        unquantized_steps=150,
        motion_reach=6,
        closed_loop=True,
        picture_blur=1.0,
        picture_noise=0.05,
    ),
    batch_size=8,
    seq_len=4,
    num_steps=550,
    optimizer="muon",
    learning_rate=4e-3,
    warmup_steps=20,
    decay_steps=350,
    beta2=0.95,
    commitment=0.05,
    val_batches=8,
    log_interval=50,
    val_interval=275,
    checkpoint_interval=275,
)
PRESETS = {
    "coinrun": Config(),
    "moving": Config(
        model=TokenizerConfig(rotary_space=True, motion_reach=6, closed_loop=True, picture_blur=1.0, picture_noise=0.05)
    ),
    "tiny": TINY,
    "small": dataclasses.replace(
        TINY,
        model=dataclasses.replace(
            TINY.model, unquantized_steps=400, closed_loop=False, picture_blur=0.0, picture_noise=0.0
        ),
        optimizer="adamw",
        learning_rate=1.5e-3,
        num_steps=6000,
        decay_steps=4000,
        val_interval=1000,
        checkpoint_interval=500,
    ),
    "bench": Config(
        model=TokenizerConfig(width=128, num_heads=4, num_blocks=4, patch_size=8),
        batch_size=4,
    ),
}
"""coinrun: the paper's, Appendix F; not run on a GPU yet.
moving: ours, of the same size, with decoders that move the last frame; judged at tiny's size until a GPU has run it.

tiny: what `make demo` runs, `python train_tokenizer.py --preset tiny`; its decoder moves the last frame.
small: the same model trained for longer, as for worlds/coinrun-small.
bench: for benchmarks/ only.
"""


def loss_fn(model: Tokenizer, inputs: tuple[Batch, Damage | None], cfg: Config) -> tuple[jax.Array, tuple]:
    """Mean squared error of the reconstruction, and commitment."""
    batch, damage = inputs
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    out = model(frames, train=True, damage=damage, weight_BT=batch.weight_BT)
    mse = mean_of_true(jnp.square(out.frames_BTHWC - frames), batch.weight_BT)
    metrics = {"mse": mse, "commitment": out.commitment}
    return mse + cfg.commitment * out.commitment, (metrics, (out.latents_BTNL, out.tokens_BTN))


def draw(batch: Batch, key: jax.Array, cfg: TokenizerConfig) -> tuple[Batch, Damage | None]:
    """A batch with what is drawn for it as a whole, so that gradient accumulation changes nothing."""
    batch = batch._replace(weight_BT=even(batch.weight_BT))
    if not cfg.closed_loop:
        return batch, None
    B, *frames_THWC = batch.frames_BTHWC.shape
    return batch, draw_damage(key, B, tuple(frames_THWC), cfg.picture_blur, cfg.picture_noise)


def train_step(state: TrainState, batch: Batch, key: jax.Array, cfg: Config) -> tuple[TrainState, dict]:
    """One update of the parameters by gradient, and of the codebook by moving average."""
    inputs = draw(batch, key, cfg.model)
    grads, metrics, latents_and_tokens = gradients(lambda m, b: loss_fn(m, b, cfg), state, inputs, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    model = state.model()
    weight_BTN = each_token(batch.weight_BT, latents_and_tokens[1].shape[2])
    model.vq.update(*latents_and_tokens, key, weight_BTN)
    metrics["usage"] = usage(latents_and_tokens[1], cfg.model.num_codes, weight_BTN)
    return state.with_rest_of(model), metrics | norms


def evaluate(model: Tokenizer, batch: Batch, key: jax.Array) -> tuple[dict, jax.Array]:
    """Quality of reconstructions; shows truth over reconstruction."""
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    out = model(frames)
    recon = jnp.clip(out.frames_BTHWC, 0, 1)
    metrics = {
        "loss": jnp.mean(jnp.square(recon - frames)),
        "psnr": jnp.mean(psnr(recon, frames)),
        "ssim": jnp.mean(ssim(recon, frames)),
        "usage": usage(out.tokens_BTN, model.cfg.num_codes),
    }
    return metrics, jnp.stack([frames[0], recon[0]])


def clip_flops(cfg: Config, model_cfg: TokenizerConfig) -> int:
    """Floating-point operations of a training step for one clip."""
    return flops.tokenizer_step(model_cfg, cfg.seq_len)


def main(cfg: Config) -> None:
    cfg = start(cfg)
    train, val = open_splits(cfg.data_dir, cfg.seq_len, shortest=1 if cfg.pad_short else cfg.seq_len)
    model_cfg = dataclasses.replace(cfg.model, frame_shape=train.metadata.frame_shape)
    fit(
        cfg,
        "tokenizer",
        model_cfg,
        build=lambda rngs, compute: Tokenizer(model_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg),
        evaluate=evaluate,
        train=train,
        val=val,
        clip_flops=clip_flops(cfg, model_cfg),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
