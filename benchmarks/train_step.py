"""Speed of a training step against the machine's limits.

python -m benchmarks.train_step --model tokenizer --preset bench
python -m benchmarks.train_step --model dynamics --from_tokens --preset bench --json
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

import train_dynamics
import train_lam
import train_tokenizer
from benchmarks.common import Output, floor, peak_memory, random_frames, seconds, show, world_config
from models.errors import InputError
from models.genie import World
from models.lam import LAM
from models.nn import Compute
from models.tokenizer import Tokenizer
from utils.action_source import InferredActions, StoredActions
from utils.cli import run
from utils.data import Batch
from utils.optim import make_optimizer
from utils.state import TrainState
from utils.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(Output, Compute):
    """Measures one training step: medians of many, with the batch on the device already."""

    model: Literal["tokenizer", "lam", "dynamics"] = "tokenizer"
    """Which training."""
    preset: Literal["bench", "tiny", "flow", "latents", "small", "coinrun", "moving", "mae"] = "bench"
    """Its size, batch included; mae is of the tokenizer alone."""
    from_tokens: bool = False
    """For the dynamics model: from stored tokens and latent actions instead of from frames."""
    batch_size: int = 0
    """Clips in a batch; 0: the preset's."""
    grad_accum: int = 1
    """Parts into which a batch is cut."""
    steps: int = 15
    """Steps to time, after three of warm-up."""


def setting(cfg: Config) -> tuple[TrainConfig, Callable[[], TrainState], Callable[..., Any], int]:
    """The training's config, what makes its first state, its step (state, batch, key), and the FLOPs of a clip."""
    cfg = cfg.settled()
    compute = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Compute)}
    script: Any = {"tokenizer": train_tokenizer, "lam": train_lam, "dynamics": train_dynamics}[cfg.model]
    if cfg.preset not in script.PRESETS:
        raise InputError(f"`preset` {cfg.preset}: the {cfg.model} has none of that name; {', '.join(script.PRESETS)}")
    train_cfg = dataclasses.replace(script.PRESETS[cfg.preset], grad_accum=cfg.grad_accum, **compute)
    if cfg.batch_size:
        train_cfg = dataclasses.replace(train_cfg, batch_size=cfg.batch_size)
    trainable: Any = nnx.Param
    if cfg.model == "dynamics":
        world_cfg = world_config(cfg.preset)
        build: Any = lambda: World(world_cfg, cfg, nnx.Rngs(0))
        # The LAM stands for a loaded one: it infers and is not trained.
        lam = world_cfg.lam
        assert lam
        source = StoredActions(lam) if cfg.from_tokens else InferredActions(lam)
        trainable, flops = source.trainable, script.clip_flops(world_cfg, source, cfg.from_tokens)
        train_step: Any = lambda state, batch, key: script.train_step(state, batch, key, train_cfg, source)
    else:
        model = {"tokenizer": Tokenizer, "lam": LAM}[cfg.model]
        build = lambda: model(train_cfg.model, cfg, nnx.Rngs(0))
        flops = script.clip_flops(train_cfg, train_cfg.model)
        train_step = lambda state, batch, key: script.train_step(state, batch, key, train_cfg)
    optimizer = make_optimizer(train_cfg, train_cfg.num_steps)
    return train_cfg, lambda: TrainState.create(build(), trainable, optimizer, False), train_step, flops


def batch_of(cfg: Config, train_cfg: Any) -> Batch:
    """Noise in the place of clips, or of their tokens.

    Raises:
      InputError: There are none of this preset.
    """
    B, T = train_cfg.batch_size, train_cfg.seq_len
    if not cfg.from_tokens:
        return Batch(random_frames((B, T, *train_cfg.model.frame_shape)))
    if cfg.preset not in train_tokenizer.PRESETS:
        raise InputError(f"`from_tokens`: `preset` {cfg.preset} has no tokenizer; leave it out")
    tokenizer = train_tokenizer.PRESETS[cfg.preset].model
    rng, lam = np.random.default_rng(0), train_lam.PRESETS[cfg.preset].model
    places = (B, T, tokenizer.num_patches)
    batch = Batch(latent_actions_BT=rng.integers(0, lam.num_codes, (B, T), np.uint8))
    if tokenizer.motion_reach:  # whose frames are stored too
        batch = batch._replace(frames_BTHWC=random_frames((B, T, *train_cfg.model.frame_shape)))
    if tokenizer.kind == "mae":
        return batch._replace(latents_BTNL=rng.normal(size=(*places, tokenizer.code_width)).astype(np.float16))
    return batch._replace(tokens_BTN=rng.integers(0, tokenizer.num_codes, places, np.uint16))


def main(cfg: Config) -> None:
    cfg = cfg.settled()
    train_cfg, create, train_step, clip_flops = setting(cfg)
    state = jax.jit(create)()
    batch = jax.device_put(batch_of(cfg, train_cfg))
    key = jax.random.key(0)

    began = time.perf_counter()
    step = jax.jit(train_step, donate_argnums=0).lower(state, batch, key).compile()
    compile_s = time.perf_counter() - began

    def once() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics["loss"]

    times = seconds(once, cfg.steps, warm_up=3)
    memory: Any = step.memory_analysis()
    # At the least, the state is read and written once, and so is what the step keeps between its two passes.
    traffic = 2 * (memory.alias_size_in_bytes + memory.temp_size_in_bytes)
    flops = float(clip_flops * train_cfg.batch_size)
    limits = floor(flops, traffic, cfg.dtype)
    step_s = statistics.median(times)
    values = {
        "step_ms": 1e3 * step_s,
        "compile_s": compile_s,
        "flops_per_step": flops,
        "mfu": flops / step_s / float(limits["peak_flops"]),
        **limits,
        "peak_memory_mib": (peak_memory() or memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
    }
    source = " from tokens" if cfg.from_tokens else ""
    show(f"train_step {cfg.model}{source}, {cfg.preset} preset, {cfg.dtype}, remat {cfg.remat}", values, cfg.json)


if __name__ == "__main__":
    run(main, Config)
