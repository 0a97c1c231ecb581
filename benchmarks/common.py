"""What the benchmarks share: the clock, the machine's limits, and how results are shown."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import train_dynamics
import train_lam
import train_tokenizer
from models.genie import DYNAMICS, WorldConfig, sized


@dataclasses.dataclass(frozen=True)
class Output:
    """Flags that every benchmark shares."""

    json: bool = False
    """Also print the figures as one line of JSON."""


def world_config(preset: str) -> WorldConfig:
    """That of a world of a preset's size, with latent actions; tokenizer and LAM of `tiny` where it has none itself."""
    training = train_dynamics.PRESETS[preset]
    parts = [script.PRESETS.get(preset, script.PRESETS["tiny"]).model for script in (train_tokenizer, train_lam)]
    tokenizer = parts[0] if DYNAMICS[training.model.kind].needs_tokenizer(training.model) else None
    dynamics = sized(dataclasses.replace(training.model, num_actions=parts[1].num_codes), tokenizer, (64, 64, 3))
    return WorldConfig(tokenizer, parts[1], dynamics, training.seq_len)


def seconds(call: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each call, until its arrays are ready on the device."""
    times = []
    for i in range(warm_up + repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if i >= warm_up:
            times.append(time.perf_counter() - began)
    return times


def peak_flops(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, the limit that a model can come near to."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * n**3 / statistics.median(seconds(lambda: product(a), repeats=9))


def bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    n = 2**26 if jax.default_backend() == "cpu" else 2**30
    a = jnp.zeros(n // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * n / statistics.median(seconds(lambda: copy(a), repeats=9))


def floor(flops: float, traffic: float, dtype: str) -> dict[str, float | str]:
    """The roofline: the time that the work must take at least, and which limit sets it.

    Args:
      flops: Operations of the work.
      traffic: Bytes that it must at least read and write.
    """
    peak, rate = peak_flops(dtype), bandwidth()
    by_flops, by_bytes = 1e3 * flops / peak, 1e3 * traffic / rate
    return {
        "peak_flops": peak,
        "bandwidth": rate,
        "floor_flops_ms": by_flops,
        "floor_bytes_ms": by_bytes,
        "bound_by": "FLOPs" if by_flops > by_bytes else "bytes",
    }


def peak_memory() -> int | None:
    """Most bytes of device memory that this process has held; None where the backend does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_frames(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 noise; the time of a step does not depend on what the frames show."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def show(title: str, values: dict[str, Any], as_json: bool) -> None:
    """Prints one figure a line, and on request all in one line of JSON."""
    print(title)
    width = max(map(len, values))
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:,.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    if as_json:
        machine = {
            "title": title,
            "device": jax.devices()[0].device_kind,
            "cores": len(os.sched_getaffinity(0)),
            "jax": jax.__version__,
        }
        print(json.dumps(machine | values), flush=True)
