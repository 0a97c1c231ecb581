"""What a training tells of itself while it runs: its metrics one step late, its speed, its waits, a trace."""

import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.errors import DivergenceError
from utils.logging import Writers

PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "V100": 125e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
}
"""Dense 16-bit peak of a device by its vendor's datasheet, for the model FLOPs utilisation."""


class Waiting:
    """Seconds spent inside `with` blocks, since they were last taken."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.entered = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.seconds += time.monotonic() - self.entered

    def take(self) -> float:
        """The seconds so far; counting begins anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Speed:
    """Speed of the steps since it was last asked for, and the share of time spent waiting for data.

    Args:
      step_flops: Floating-point operations of a step on all devices.
      dtype: Of the products; the utilisation is told for 16-bit ones on a device whose peak is known.
    """

    def __init__(self, batch_size: int, step_flops: float, dtype: str, waiting: Waiting):
        self.batch_size, self.step_flops, self.waiting = batch_size, step_flops, waiting
        kind = jax.devices()[0].device_kind
        peaks = [peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\bG?{name}\b", kind)]
        self.peak = peaks[0] * jax.device_count() if peaks and dtype != "float32" else None
        self.since: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Counts from here, as after a validation, whose time is no step's."""
        self.since = step, time.monotonic()
        self.waiting.take()

    def rates(self, step: int) -> dict[str, float]:
        """Rates since the last call or restart; none at the first call, before which a step compiled."""
        values = {}
        if self.since and step > self.since[0]:
            seconds = time.monotonic() - self.since[1]
            speed = (step - self.since[0]) / seconds
            values = {
                "steps_per_s": speed,
                "clips_per_s": speed * self.batch_size,
                "data_wait": self.waiting.take() / seconds,
                "tflops_per_s": speed * self.step_flops / 1e12,
            }
            if self.peak:
                values["mfu"] = speed * self.step_flops / self.peak
        self.restart(step)
        return values


class Profiler:
    """Traces steps 10 to 15 of a run into `<folder>/profile`, if asked to."""

    def __init__(self, wanted: bool, folder: Path):
        self.wanted, self.folder, self.tracing = wanted, folder, False

    def after(self, steps_done: int) -> None:
        """Starts or stops the trace after the run's so many steps."""
        if self.wanted and steps_done == 10:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True
        elif self.tracing and steps_done >= 15:
            self._stop()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()  # of a run that ends before the fifteenth step

    def _stop(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False


MUST_BE_FINITE = ("loss", "grad_norm", "param_norm")


def checked(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A step's metrics with `finite`: whether those that must be finite are; for use inside of the compiled step."""
    told = [jnp.isfinite(metrics[name]) for name in MUST_BE_FINITE if name in metrics]
    return metrics | {"finite": jnp.all(jnp.array(told, bool))}


class Reporter:
    """Looks at a step's metrics when the next step is already under way, so that the device never waits.

    Between its lines it fetches a single value, whether the others are finite: each costs a copy from the device.

    Args:
      interval: Steps between lines of metrics.
    """

    def __init__(self, writers: Writers, speed: Speed, interval: int, last_step: int):
        self.writers, self.speed, self.interval, self.last_step = writers, speed, interval, last_step
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def take(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes in what a step that has just been dispatched gives, `checked`, and reports on the one before."""
        earlier, self.pending = self.pending, (step, metrics)
        if earlier:
            self._report(*earlier)

    def flush(self) -> None:
        """Waits for the last step and reports on it.

        Raises:
          DivergenceError: Its loss, its gradient or what it made of the parameters is not finite.
        """
        earlier, self.pending = self.pending, None
        if earlier:
            self._report(*earlier)

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        finite = bool(metrics["finite"])
        if finite and step % self.interval and step != self.last_step:
            return
        numbers = {name: float(value) for name, value in metrics.items() if name != "finite"}
        if not finite:
            name = next(name for name in MUST_BE_FINITE if not math.isfinite(numbers.get(name, 0.0)))
            raise DivergenceError(f"step {step}: {name} is {numbers[name]}", step, name, numbers[name])
        self.writers.scalars(step, numbers | self.speed.rates(step))
