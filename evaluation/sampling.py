"""Sampling: how good rollouts are, over steps, order and temperature."""

import dataclasses
from typing import Any

import jax
import numpy as np

from evaluation.clips import in_batches, jitted, to_float, to_uint8
from evaluation.fidelity import Compare, pooled_psnr
from evaluation.measured import Measured
from evaluation.rollouts import as_played
from evaluation.stability import sharpness, unchanged
from evaluation.statistics import figure
from models.genie import World
from models.sampling import SamplingConfig, roll

STEPS = (1, 2, 3, 4, 8, 25)
TEMPERATURES = (0.0, 0.5, 1.0)
ORDERS = ("confidence", "random", "halton")


def measure_sampling(
    compare: Compare,
    world: World,
    truth: np.ndarray,
    actions: np.ndarray,
    batch_size: int,
    seed: int,
    sampling: SamplingConfig,
) -> Measured:
    """Rolls the same clips out from their first frame in every way; a causal world knows temperatures only, and a
    flow steps and temperatures.

    Args:
      actions: (B, Tm1).
      sampling: What else a way has.
    Returns:
      `sampling_sweep` in the details: a row for each way. Its PSNRs are of all frames, pooled and by mean of the
      clips' PSNRs; `unchanged` and `sharpness` are the rollouts' less, or over, those of the truth.
    """
    cfg = world.cfg.dynamics
    steps, orders = (STEPS, ORDERS) if cfg.kind in ("maskgit", "maskgit_head") else (STEPS[:1], ORDERS[:1])
    if cfg.kind == "flow":
        steps = tuple(2**i for i in range(cfg.flow_steps.bit_length()))
    rows, real = [], (unchanged(truth).mean(), sharpness(truth)[:, 1:].mean())
    play, numbers = jitted(world, _played), np.arange(len(truth), dtype=np.int32)
    for order in orders:
        for temperature in TEMPERATURES:
            for count in steps:
                row: dict[str, Any] = {"order": order, "temperature": temperature, "steps": count}
                way = dataclasses.replace(sampling, **row)
                in_this_way = lambda *given, way=way: play(*given, np.int32(seed), way)
                played = in_batches(in_this_way, batch_size, truth[:, :1], as_played(actions), numbers)
                video = np.concatenate([truth[:, :1], played], axis=1)
                rows.append(row | _quality(compare, video, truth, *real))
    return Measured(details={"sampling_sweep": rows})


def _played(world: World, prompt: Any, actions: Any, numbers: Any, seed: Any, way: SamplingConfig) -> jax.Array:
    """What follows prompts; one program for all steps and temperatures. The noise goes by the clip's number."""

    def one(prompt_THWC: jax.Array, actions_S: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        return to_uint8(roll(world, to_float(prompt_THWC)[None], actions_S[None], key, way)[0])

    return jax.vmap(one)(prompt, actions, numbers)


def _quality(
    compare: Compare, video: np.ndarray, truth: np.ndarray, real_unchanged: float, real_sharpness: float
) -> dict[str, float]:
    scores = compare(video[:, 1:], truth[:, 1:])
    return {
        "psnr": pooled_psnr(scores.mse.mean(axis=1)).mean,
        "psnr_mean": figure(scores.psnr.mean(axis=1)).mean,
        "unchanged": float(unchanged(video).mean() - real_unchanged),
        "sharpness": float(sharpness(video)[:, 1:].mean() / real_sharpness),
    }
