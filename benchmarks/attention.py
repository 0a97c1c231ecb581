"""Which attention kernel for which axis: cuDNN's flash attention or XLA's products, forward and backward.

python -m benchmarks.attention --implementation xla
"""

import dataclasses
import statistics
from typing import Literal

import jax
import jax.numpy as jnp

from benchmarks.common import Output, seconds, show
from models.nn import attention
from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures one attention over space and one over time, at the shapes of a preset of 8 heads of width 64."""

    implementation: Literal["cudnn", "xla"] = "xla"
    """Kernel."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of queries, keys and values."""
    batch_size: int = 36
    """Clips."""
    num_frames: int = 16
    """Frames, attended to causally."""
    num_patches: int = 256
    """Tokens in a frame, attended to without a mask."""
    num_heads: int = 8
    """Heads."""
    head_width: int = 64
    """Width of each."""


def axis(cfg: Config, name: str, rows: int, length: int, causal: bool) -> dict[str, float]:
    """Time of a forward and a backward pass; distance of their gradients from those of XLA in float32."""
    shape = (rows, length, cfg.num_heads, cfg.head_width)
    inputs = [jax.random.normal(jax.random.key(i), shape, cfg.dtype) for i in range(3)]

    def gradients(implementation: str):
        def loss(q, k, v):
            y = attention(q, k, v, causal=causal, implementation=implementation)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    step = gradients(cfg.implementation)
    times = seconds(lambda: step(*inputs), repeats=20, warm_up=3)
    few = [x[:4] for x in inputs]
    pairs = zip(step(*few), gradients("xla")(*(x.astype(jnp.float32) for x in few)), strict=True)
    errors = [jnp.max(jnp.abs(x.astype(jnp.float32) - exact)) / jnp.max(jnp.abs(exact)) for x, exact in pairs]
    return {f"{name}_ms": 1e3 * statistics.median(times), f"{name}_error": float(max(errors))}


def main(cfg: Config) -> None:
    space = axis(cfg, "space", cfg.batch_size * cfg.num_frames, cfg.num_patches, causal=False)
    time = axis(cfg, "time", cfg.batch_size * cfg.num_patches, cfg.num_frames, causal=True)
    title = f"attention {cfg.implementation}, {cfg.dtype} (error: of gradients, by the largest one in float32)"
    show(title, space | time, cfg.json)


if __name__ == "__main__":
    run(main, Config)
