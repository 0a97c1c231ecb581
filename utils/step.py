"""The compiled training step: compiled once, for what fits the device's memory, and what it needs there."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, use_abstract_mesh

from models.errors import InputError
from models.nn import Compute
from utils.data import Batch
from utils.progress import checked
from utils.sharding import state_sharding
from utils.state import TrainState

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
Build = Callable[[nnx.Rngs, Compute], nnx.Module]
CHEAPEST_FIRST: tuple[Literal["none", "dots", "outputs", "block"], ...] = ("none", "dots", "outputs", "block")
"""Ways of activation checkpointing, from the one that recomputes nothing to the one that keeps least."""
MARGIN = 0.08
"""Share of a device's memory that a step is to leave free, for the next batch and for what lies in between."""


def fitting_step(
    cfg: Any, mesh: Mesh, train_step: TrainStep, state: TrainState, batch: Batch, build: Build
) -> tuple[TrainState, Callable[..., Any], str]:
    """As `compile_step`, and the state that it takes: with `remat` auto of the cheapest way that fits the devices.

    Args:
      build: Makes the model that the state is of.
    Raises:
      InputError: None of them fits.
    """
    there = device_memory()
    if cfg.remat != "auto" or there is None:
        return state, *compile_step(cfg, mesh, train_step, state, batch)[:2]
    for how in CHEAPEST_FIRST:
        state = with_remat(state, cfg, build, how)
        try:
            step_fn, told, needed = compile_step(cfg, mesh, train_step, state, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or how == CHEAPEST_FIRST[-1]:
                raise
            continue
        if needed <= (1 - MARGIN) * there:
            return state, step_fn, f"{told}; --remat {how} is the first that fits in {there / 2**30:.1f} GiB"
    raise InputError(
        f"`batch_size` {cfg.batch_size}: a step needs {needed / 2**30:.1f} GiB on each device even with `remat` "
        f"{CHEAPEST_FIRST[-1]}, of which {there / 2**30:.1f} are there; take a larger `grad_accum`, a smaller "
        "`batch_size`, or `fsdp` over more devices"
    )


def with_remat(state: TrainState, cfg: Any, build: Build, how: Any) -> TrainState:
    """The same state, of a model that is computed with another way of activation checkpointing."""
    compute = dataclasses.replace(cfg.compute, remat=how)
    model = nnx.eval_shape(lambda: build(nnx.Rngs(cfg.seed), compute))
    return dataclasses.replace(state, graphdef=nnx.split(model, state.trainable, ...)[0])


def device_memory() -> int | None:
    """Bytes of memory that JAX may use on each device, the least of all; None where it does not say, as on a CPU."""
    there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if jax.process_count() > 1:
        there = int(process_allgather(np.array(there)).min())
    return there or None


def compile_step(
    cfg: Any, mesh: Mesh, train_step: TrainStep, state: TrainState, batch: Batch
) -> tuple[Callable[..., Any], str, int]:
    """Compiles the step once, for shapes and shardings that never change.

    Args:
      cfg: The training's `TrainConfig`.
    Returns:
      The step, which takes (state, batch, its number, from 0) and gives up the state's memory to the next one; how long
      it took and what it needs, to be printed; and the bytes that it needs on each device.
    """
    step_fn = jitted_step(cfg, mesh, train_step, state)
    began = time.monotonic()
    compiled: Any = step_fn.lower(state, batch, np.int32(0)).compile()
    needs = memory(compiled)
    kinds = ", ".join(f"{name} {size / 2**20:,.2f} MiB" for name, size in needs.items())
    told = f"step compiled in {time.monotonic() - began:.1f} s; memory per device: {kinds}"
    # With --debug_nans, the jitted function is run again after a NaN, operation by operation. The flag that `start` set
    # may be lost in this thread, for JAX forgets its check when a library turns it off for a while.
    step: Any = jax.debug_nans(True)(step_fn) if cfg.debug_nans else compiled
    return step, told, sum(needs.values()) - needs["offloaded"]


def jitted_step(cfg: Any, mesh: Mesh, train_step: TrainStep, state: TrainState) -> Any:
    """The whole step, still to be lowered: the script's own, its key, and the moving average."""
    root = jax.random.key(cfg.seed)

    def whole_step(state: TrainState, batch: Batch, step: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        with use_abstract_mesh(mesh.abstract_mesh):  # over whose devices blocks split their activations
            state, metrics = train_step(state, batch, jax.random.fold_in(root, step))
        return state.move_average(cfg.ema_decay), checked(metrics)

    return jax.jit(
        whole_step,
        donate_argnums=() if cfg.debug_nans else 0,
        out_shardings=(state_sharding(mesh, state), None),
    )


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on each device that a compiled step needs, by kind."""
    sizes = compiled.memory_analysis()
    return {
        "state": sizes.alias_size_in_bytes,
        "inputs": sizes.argument_size_in_bytes - sizes.alias_size_in_bytes,
        "activations": sizes.temp_size_in_bytes,
        "offloaded": sizes.host_temp_size_in_bytes,
    }
