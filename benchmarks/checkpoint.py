"""What a checkpoint costs the training loop.

python -m benchmarks.checkpoint --model tokenizer --preset bench
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.common import show
from benchmarks.train_step import Config as StepConfig
from benchmarks.train_step import batch_of, setting
from utils.checkpoint import CheckpointConfig, Checkpoints
from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config(StepConfig):
    """Measures the steps around asynchronous saves against steps without one."""

    saves: int = 4
    """Saves to measure."""
    steps: int = 12
    """Steps from save to save."""
    folder: str = ""
    """Where to save; empty: the system's temporary folder."""


def main(cfg: Config) -> None:
    train_cfg, create, train_step, _ = setting(cfg)
    state = jax.jit(create)()
    batch = jax.device_put(batch_of(cfg, train_cfg))
    key = jax.random.key(0)
    step = jax.jit(train_step, donate_argnums=0)
    calls, extra = [], []
    with tempfile.TemporaryDirectory(dir=cfg.folder or None) as folder:
        checkpoints = Checkpoints(Path(folder) / "ckpt", CheckpointConfig(keep_latest=cfg.saves))
        (Path(folder) / "ckpt" / "config.json").write_text("{}")  # marks the folder as a training's
        for _ in range(3):  # compiles; the first donated state settles
            state, _ = jax.block_until_ready(step(state, batch, key))
        checkpoints.save(state, {"step": 0}, {})
        checkpoints.manager.wait_until_finished()
        for save in range(1, cfg.saves + 1):
            times = []
            for i in range(cfg.steps):
                began = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, batch, key))
                if i == 0:
                    before_save = time.perf_counter()
                    checkpoints.save(state, {"step": save}, {})
                    calls.append(time.perf_counter() - before_save)
                times.append(time.perf_counter() - began)
            checkpoints.manager.wait_until_finished()
            # The write goes on while the next steps run: all that they take beyond an undisturbed step counts.
            usual = statistics.median(times[cfg.steps // 2 :])
            extra.append(sum(times) - usual * cfg.steps)
        checkpoints.close()
        size = sum(f.stat().st_size for f in (Path(folder) / "ckpt" / "1").rglob("*") if f.is_file())
    stall = statistics.median(extra)
    interval = train_cfg.checkpoint_interval
    values = {
        "call_ms": 1e3 * statistics.median(calls),
        "stall_ms": 1e3 * stall,
        "step_ms": 1e3 * usual,
        "size_mib": size / 2**20,
        "save_interval": interval,
        "stall_per_step": stall / interval / usual,
    }
    title = f"checkpoint {cfg.model}, {cfg.preset} preset (stall_per_step: share of a step's time, amortised)"
    show(title, values, cfg.json)


if __name__ == "__main__":
    run(main, Config)
