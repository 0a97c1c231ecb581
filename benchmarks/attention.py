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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
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


def axis_ms(cfg: Config, rows: int, length: int, causal: bool) -> float:
    """Milliseconds of a forward and a backward pass."""
    shape = (rows, length, cfg.num_heads, cfg.head_width)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, cfg.dtype) for i in range(3))

    def loss(q, k, v):
        y = attention(q, k, v, causal=causal, implementation=cfg.implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return 1e3 * statistics.median(seconds(lambda: step(q, k, v), repeats=20, warm_up=3))


def main(cfg: Config) -> None:
    values = {
        "space_ms": axis_ms(cfg, cfg.batch_size * cfg.num_frames, cfg.num_patches, causal=False),
        "time_ms": axis_ms(cfg, cfg.batch_size * cfg.num_patches, cfg.num_frames, causal=True),
    }
    show(f"attention {cfg.implementation}, {cfg.dtype}", values, cfg.json)


if __name__ == "__main__":
    run(main, Config)
