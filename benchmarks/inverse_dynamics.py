"""What could be had of latent actions: an inverse dynamics model of the LAM's size, trained on the true ones.

    python -m benchmarks.inverse_dynamics --data_dir runs/demo/data --preset tiny

The encoder is the LAM's, with a linear classifier of the dataset's actions in the place of its codebook. What it cannot
tell of an action, the frames do not show.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import train_lam
from benchmarks.common import Output, show
from evaluation.actions import merge_actions
from evaluation.clips import choose_clips, in_batches, jitted, to_float
from evaluation.statistics import adjusted_mutual_information, contingency, figure
from models.errors import InputError
from models.lam import LAM
from models.nn import Compute, linear
from utils.cli import run
from utils.data import Batch, ClipSource, batches
from utils.optim import make_optimizer
from utils.sharding import to_device
from utils.state import TrainState, apply_gradients, gradients


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Trains an inverse dynamics model on true actions and prints how many it tells on held-out clips."""

    data_dir: str = "runs/demo/data"
    """Dataset with actions."""
    preset: Literal["tiny", "small"] = "tiny"
    """Of train_lam.py: the size, the steps, the rest of the recipe."""
    num_steps: int = 0
    """Steps of training; 0: the preset's."""
    num_clips: int = 256
    """Held-out clips to measure on, or all if there are fewer."""
    seed: int = 0
    """Of parameters and of the order of the data."""


class InverseDynamics(nnx.Module):
    """Logits of the action between frames, from the frames up to the next."""

    def __init__(self, lam: LAM, num_actions: int, rngs: nnx.Rngs):
        self.lam = lam
        self.classify = linear(lam.cfg.code_width, num_actions, Compute(), rngs, bias=True)

    def __call__(self, frames_BTHWC: jax.Array) -> jax.Array:
        """(B, Tm1, actions)."""
        return self.classify(self.lam.latents(frames_BTHWC)).astype(jnp.float32)


def main(cfg: Config) -> None:
    preset = train_lam.PRESETS[cfg.preset]
    train, val = (ClipSource(cfg.data_dir, split, preset.seq_len) for split in ("train", "val"))
    if not train.metadata.action_names:
        raise InputError(f"`data_dir` {cfg.data_dir}: has no actions to learn")
    names, index_A = merge_actions(train.metadata.action_names, train.metadata.same_actions)
    model_cfg = dataclasses.replace(preset.model, frame_shape=train.metadata.frame_shape)
    rngs = nnx.Rngs(cfg.seed)
    model = InverseDynamics(LAM(model_cfg, Compute(), rngs), len(names), rngs)
    num_steps = cfg.num_steps or preset.num_steps
    state = TrainState.create(model, nnx.Param, make_optimizer(preset, num_steps), ema=False)

    def loss_fn(model: InverseDynamics, batch: Batch) -> tuple[jax.Array, tuple]:
        true = jnp.asarray(index_A)[batch.actions_BT[:, :-1]]
        losses = optax.softmax_cross_entropy_with_integer_labels(model(to_float(batch.frames_BTHWC)), true)
        return jnp.mean(losses), ({}, ())

    @jax.jit
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        grads, metrics, _ = gradients(loss_fn, state, batch, 1)
        state, _ = apply_gradients(state, grads, preset)
        return state, metrics

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stream = to_device(batches(train, preset.batch_size, cfg.seed), here)
    for number in range(num_steps):
        state, metrics = step(state, next(stream))
        if number % 100 == 99:
            print(f"step {number + 1}/{num_steps}  loss {float(metrics['loss']):.3f}", flush=True)

    clips = choose_clips(val, cfg.num_clips, cfg.seed)
    assert clips.actions_BT is not None
    guess = jitted(state.model(), lambda model, frames: jnp.argmax(model(to_float(frames)), axis=-1))
    guessed, true = in_batches(guess, preset.batch_size, clips.frames_BTHWC), index_A[clips.actions_BT[:, :-1]]
    accuracy = figure((guessed == true).mean(axis=1), clips.levels_B)
    most = np.bincount(true.reshape(-1)).argmax()
    table = contingency(guessed, true, len(names), len(names))
    rows = {
        "transitions": int(true.size),
        "accuracy": round(accuracy.mean, 3),
        "accuracy low": round(accuracy.low, 3),
        "accuracy high": round(accuracy.high, 3),
        "most frequent": round(float((true == most).mean()), 3),
        "mutual information, adjusted": round(adjusted_mutual_information(table), 3),
    }
    show("An inverse dynamics model on true actions", rows, cfg.json)


if __name__ == "__main__":
    run(main, Config)
