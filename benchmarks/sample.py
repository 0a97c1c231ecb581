"""Speed of sampling: cached rollouts against the window computed anew in each step.

python -m benchmarks.sample
"""

import dataclasses
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common import Output, floor, random_frames, seconds, show, world_config
from models import flops
from models.genie import DYNAMICS, World
from models.maskgit import fill_tokens
from models.nn import Compute
from models.sampling import SamplingConfig, _rollout, start_rollout
from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures a rollout from one prompt frame to the end of the window, of a world with random parameters."""

    preset: Literal["bench", "tiny", "flow", "latents", "small", "coinrun", "moving"] = "bench"
    """Size of the three models."""
    kind: Literal["", "maskgit", "maskgit_head", "causal"] = ""
    """Kind of the dynamics model, one over tokens; default: the preset's."""
    batch_size: int = 1
    """Videos sampled together."""
    steps: int = 25
    """Steps per frame, of a MaskGIT or a flow."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 on a GPU."""
    repeats: int = 5
    """Rollouts to time."""


def make_world(cfg: Config, compute: Compute) -> World:
    """A world of the preset's size."""
    world_cfg = world_config(cfg.preset)
    if cfg.kind:
        world_cfg = dataclasses.replace(world_cfg, dynamics=dataclasses.replace(world_cfg.dynamics, kind=cfg.kind))
    return World(world_cfg, compute, nnx.Rngs(0))


def frame_flops(world: World, sampling: SamplingConfig) -> int:
    """Floating-point operations of one frame of a full window, with its decoding."""
    cfg, past = world.cfg, world.cfg.window - 1
    decoding = flops.tokenizer_decode(cfg.tokenizer, 1, past) if cfg.tokenizer else 0
    return DYNAMICS[cfg.dynamics.kind].frame_flops(cfg.dynamics, past, sampling) + decoding


def uncached_frame_s(world: World, B: int, steps: int) -> float:
    """Seconds for the last frame of the window where each step computes all of it."""
    T, N = world.cfg.window, world.cfg.dynamics.num_patches
    graphdef, variables = nnx.split(world)
    pictures = jnp.zeros((B, T, *world.cfg.frame_shape))  # for models that see or move them

    @jax.jit
    def frame(variables, past_BTN, actions_BT, key):
        world = nnx.merge(graphdef, variables)

        def logits(tokens_BN, hidden_BN):
            clip = jnp.concatenate([past_BTN, tokens_BN[:, None]], axis=1)
            hidden = jnp.concatenate([jnp.zeros_like(past_BTN, bool), hidden_BN[:, None]], axis=1)
            return world.dynamics(clip, hidden, actions_BT, last_BTHWC=pictures).logits_BTNK[:, -1]

        tokens = fill_tokens(logits, (B, N), key, SamplingConfig(steps=steps))
        clip = jnp.concatenate([past_BTN, tokens[:, None]], axis=1)
        return world.tokenizer.decode_after(clip, pictures).frames_BTHWC[:, -1]

    past, actions = jnp.zeros((B, T - 1, N), jnp.int32), jnp.zeros((B, T), jnp.int32)
    return statistics.median(seconds(lambda: frame(variables, past, actions, jax.random.key(0)), repeats=3))


def main(cfg: Config) -> None:
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if jax.default_backend() == "gpu" else "float32"
    world = make_world(cfg, Compute(dtype=dtype))
    B, S = cfg.batch_size, world.cfg.window - 1
    prompt = jnp.asarray(random_frames((B, 1, 64, 64, 3)), jnp.float32) / 255
    actions = jnp.zeros((B, S), jnp.int32)
    sampling = SamplingConfig(steps=cfg.steps)
    graphdef, variables = nnx.split(world)

    began = time.perf_counter()
    play = _rollout.lower(graphdef, variables, prompt, actions, jax.random.key(0), sampling).compile()
    compile_s = time.perf_counter() - began
    times = seconds(lambda: play(variables, prompt, actions, jax.random.key(0), sampling), cfg.repeats)
    rollout_s = statistics.median(times)

    # Work of one frame: its making in each step and once more to be kept, and its decoding.
    dynamics = world.cfg.dynamics
    state = jax.eval_shape(lambda: start_rollout(world, prompt, actions[:, :0]))
    caches = [getattr(state, name, None) for name in ("dynamics", "backbone", "decoder")]
    # What of a state is read in each step; the heads of the other kinds see no frame but the last.
    again = caches[:1] if dynamics.kind in ("maskgit", "causal") else []
    parameters = _bytes(nnx.state(world.dynamics))
    reads = dynamics.num_patches if dynamics.kind == "causal" else cfg.steps + 1
    work = B * frame_flops(world, sampling)
    limits = floor(work, reads * (parameters + _bytes(again)) + _bytes(caches), dtype)
    values: dict[str, Any] = {
        "rollout_s": rollout_s,
        "frame_ms": 1e3 * rollout_s / S,
        "frames_per_s": B * S / rollout_s,
        "compile_s": compile_s,
        **limits,
    }
    if dynamics.kind == "maskgit":
        values["uncached_frame_ms"] = 1e3 * uncached_frame_s(world, B, cfg.steps)
        values["speedup"] = values["uncached_frame_ms"] / values["frame_ms"]
    what = f"{dynamics.kind}, {S} frames from 1, batch {B}, {cfg.steps} steps"
    show(f"sample {cfg.preset} preset, {what}, {dtype}", values, cfg.json)


def _bytes(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    run(main, Config)
