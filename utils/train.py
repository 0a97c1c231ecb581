"""The clockwork of a training: restore, step, log, evaluate, save."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.errors import InputError
from models.nn import Compute
from utils.checkpoint import CheckpointConfig, Checkpoints, write_config
from utils.data import Batch, ClipSource, batches, to_device
from utils.logging import Console, Files, TensorBoard, Wandb, Writer
from utils.optim import OptimConfig, make_optimizer, phases
from utils.sharding import batch_sharding, make_mesh, start_distributed, state_sharding
from utils.state import TrainState
from utils.video import strip

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L4": 121e12, "V100": 125e12}
"""Dense 16-bit peak of a device by its vendor's datasheet, for the model FLOPs utilisation."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(CheckpointConfig, OptimConfig, Compute):
    """Flags that every training script shares."""

    data_dir: str = "data/coinrun"
    """Dataset folder, made by generate_dataset.py or preprocess_dataset.py."""
    num_steps: int = 300_000
    """Steps to train in all; a finished training goes on if this grows."""
    batch_size: int = 48
    """Clips in a global batch."""
    seq_len: int = 16
    """Frames in a clip."""
    grad_accum: int = 1
    """Parts into which a batch is cut to save memory; the result is the same to rounding, but for a LAM, which centres
    its latents on each part."""
    seed: int = 0
    """Of parameters, data order and everything random."""
    num_workers: int = 0
    """Processes that read ahead on each host; 0 reads in threads."""
    log_interval: int = 50
    """Steps between lines of metrics."""
    val_interval: int = 1000
    """Steps between validations."""
    val_batches: int = 8
    """Batches of a validation, the same each time."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded; 1 is plain data parallelism."""
    coordinator: str = ""
    """host:port of the first process, for a multi-host run outside Slurm, MPI or a cloud."""
    num_processes: int = 0
    """With --coordinator: number of processes."""
    process_id: int = -1
    """With --coordinator: which of them this is."""
    log: bool = False
    """Log to Weights & Biases."""
    entity: str = ""
    """wandb entity."""
    project: str = "jafar"
    """wandb project."""
    run_name: str = ""
    """wandb run name."""
    tensorboard: bool = False
    """Log to <ckpt_dir>/tensorboard."""
    log_gradients: bool = False
    """Also log the gradient's norm of each component."""
    profile: bool = False
    """Write a trace of steps 10 to 15 of this run to <ckpt_dir>/profile."""
    debug_nans: bool = False
    """Stop at the operation that makes a NaN (slow)."""
    deterministic: bool = False
    """Only deterministic kernels on a GPU; there, bit-exact resume needs it."""
    compile_cache: str = "~/.cache/jafar"
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "grad_accum", "log_interval", "val_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.seq_len < 2:
            raise InputError(f"--seq_len {self.seq_len}: must be at least 2 frames")
        if self.batch_size % self.grad_accum:
            raise InputError(f"--grad_accum {self.grad_accum}: must divide --batch_size {self.batch_size}")

    @property
    def compute(self) -> Compute:
        """How the model is computed."""
        return Compute(self.dtype, self.remat, self.attention)


def start(cfg: TrainConfig) -> None:
    """Sets up JAX as the flags say; before anything else touches a device."""
    if cfg.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if cfg.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cfg.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_debug_nans", cfg.debug_nans)
    start_distributed(cfg.coordinator, cfg.num_processes, cfg.process_id)


def fit(
    cfg: TrainConfig,
    kind: str,
    model_cfg: Any,
    build: Callable[[nnx.Rngs], nnx.Module],
    train_step: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    evaluate: Callable[[Any, Batch, jax.Array], tuple[dict[str, jax.Array], jax.Array]],
    *,
    train: ClipSource,
    val: ClipSource,
    trainable: Any = nnx.Param,
    prepare: Callable[[Any], None] = lambda model: None,
    parts: dict[str, str] | None = None,
    clip_flops: float = 0.0,
) -> None:
    """Trains until `num_steps`, from wherever `ckpt_dir` stands.

    Batches and keys are functions of the step, so a resumed run repeats an uninterrupted one exactly.

    Args:
      kind: "tokenizer", "lam" or "world"; with `model_cfg`, what `config.json` says.
      build: Makes the model.
      train_step: (state, batch, key) to (state, metrics); its metrics include `loss` and `grad_norm`.
      evaluate: (model, batch, key) to (metrics, videos (R, T, H, W, C) in [0, 1] to show above each other).
      trainable: nnx filter of the parameters that gradients train.
      prepare: Changes the model of a new training in place; puts trained parts into it.
      parts: Fingerprints of these parts.
      clip_flops: Of a training step, for one clip.
    """
    folder = Path(cfg.ckpt_dir)
    mesh = make_mesh(cfg.fsdp)
    if cfg.batch_size % (mesh.size * cfg.grad_accum):
        raise InputError(
            f"--batch_size {cfg.batch_size}: must be a multiple of the {mesh.size} devices times --grad_accum "
            f"{cfg.grad_accum}"
        )
    write_config(folder, kind, model_cfg, cfg, parts)

    # The state: abstract, then restored onto the mesh, or made there.
    optimizer = make_optimizer(cfg, cfg.num_steps)
    create = lambda: TrainState.create(build(nnx.Rngs(cfg.seed)), trainable, optimizer, cfg.ema_decay > 0)
    abstract = jax.eval_shape(create)
    shardings = state_sharding(mesh, abstract)
    checkpoints = Checkpoints(folder, cfg)
    restored = checkpoints.restore(abstract, mesh)
    if restored:
        state, meta = restored
        first_step = meta["step"]
    else:
        state = _prepared(jax.jit(create, out_shardings=shardings)(), prepare, shardings)
        first_step = 0
    is_main = jax.process_index() == 0
    if is_main:
        print(_describe(cfg, state, first_step), flush=True)
    if first_step >= cfg.num_steps:
        checkpoints.close()
        return

    # The step, compiled once for shapes and shardings that never change.
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    read = lambda source, seed, first, workers: to_device(
        batches(source, cfg.batch_size, seed, start=first, num_workers=workers, **processes), batch_sharding(mesh)
    )
    stream = read(train, cfg.seed, first_step, cfg.num_workers)
    root = jax.random.key(cfg.seed)
    step_fn = jax.jit(
        lambda state, batch, step: train_step(state, batch, jax.random.fold_in(root, step)),
        donate_argnums=() if cfg.debug_nans else 0,
        out_shardings=(shardings, None),
    )
    eval_fn = jax.jit(
        lambda state, batch, i: evaluate(state.model(state.ema), batch, jax.random.fold_in(root, i)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),  # whole in every process, to be looked at
    )
    batch = next(stream)
    began = time.monotonic()
    compiled: Any = step_fn.lower(state, batch, np.int32(0)).compile()
    if is_main:
        print(_memory(compiled, time.monotonic() - began), flush=True)
    if cfg.debug_nans:
        # As a jitted function it is run again after a NaN, operation by operation; the flag set above may be lost in
        # this thread, for JAX forgets its check when a library turns it off for a while.
        compiled = jax.debug_nans(True)(step_fn)

    writers: list[Writer] = _writers(cfg, kind, folder, first_step, model_cfg) if is_main else []
    schedule = _Rate(cfg, clip_flops, mesh.size)
    stop = _StopOnSignal()
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report(step: int, values: dict[str, jax.Array]) -> None:
        """Looks at a step's metrics when the next step is already under way, so that the device never waits."""
        numbers = {name: float(value) for name, value in values.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers[name]):
                raise InputError(
                    f"step {step}: {name} is {numbers[name]}; stopped without saving. Checkpoints up to step "
                    f"{checkpoints.latest()} are good. Lower --learning_rate, or find the cause with --debug_nans"
                )
        if step % cfg.log_interval == 0 or step == cfg.num_steps:
            numbers |= schedule.rates(step)
            for writer in writers:
                writer.scalars(step, numbers)

    def validate(step: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        with_data = read(val, cfg.seed + 1, 0, 0)
        for i in range(cfg.val_batches):
            metrics, videos = eval_fn(state, next(with_data), np.int32(i))
            for name, value in metrics.items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / cfg.val_batches
            if i == 0 and writers:
                picture = strip(np.asarray(jax.device_get(videos) * 255 + 0.5).clip(0, 255).astype(np.uint8))
                for writer in writers:
                    writer.image(step, kind, picture)
        for writer in writers:
            writer.scalars(step, sums)
        if cfg.keep_best and cfg.keep_best not in sums:
            raise InputError(f"--keep_best {cfg.keep_best}: a validation gives {', '.join(sums)}")
        return sums

    try:
        for step in range(first_step + 1, cfg.num_steps + 1):
            state, metrics = compiled(state, batch, np.int32(step - 1))
            if pending:
                report(*pending)
            pending = (step, metrics)
            with schedule.waiting():
                batch = next(stream)
            schedule.trace(step - first_step, folder)
            stopping = stop.requested(step, cfg.log_interval)
            last = step == cfg.num_steps
            val_metrics: dict[str, float] | None = None
            if step % cfg.val_interval == 0 or last:
                report(*pending)
                pending = None
                val_metrics = validate(step)
                schedule.restart(step)
            if step % cfg.checkpoint_interval == 0 or last or stopping:
                if pending:
                    report(*pending)
                    pending = None
                checkpoints.save(state, {"step": step, "batch": step, "seed": cfg.seed}, val_metrics)
            if stopping:
                break
    finally:
        stop.restore()
        for writer in writers:
            writer.close()
        checkpoints.close()  # without this the last save, which goes on in the background, would be lost
    if stopping and is_main:
        print(f"stopped by a signal after step {step}, which is saved; run again to resume", flush=True)


def _prepared(state: TrainState, prepare: Callable[[Any], None], shardings: Any) -> TrainState:
    """The state with its model changed by `prepare`; nothing has been trained yet, so a moving average starts there."""
    model = state.model()
    prepare(model)
    params, rest = state.split(nnx.state(model))
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return jax.device_put(dataclasses.replace(state, params=params, rest=rest, ema=ema), shardings)


def _describe(cfg: TrainConfig, state: TrainState, first_step: int) -> str:
    counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in state.params.items()}
    frozen = sum(x.size for x in jax.tree.leaves(state.rest))
    parts = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    warmup, decay = phases(cfg, cfg.num_steps)
    where = f"resuming {cfg.ckpt_dir} at step {first_step}" if first_step else f"training into {cfg.ckpt_dir}"
    if first_step >= cfg.num_steps:
        return f"{cfg.ckpt_dir}: already at step {first_step} of --num_steps {cfg.num_steps}; nothing to do"
    return (
        f"{where}: {sum(counts.values()):,} trained parameters ({parts}), {frozen:,} other values; "
        f"{jax.device_count()} {jax.devices()[0].device_kind} in {jax.process_count()} process(es); "
        f"{cfg.schedule} schedule, warm-up {warmup} and decay {decay} of {cfg.num_steps} steps"
    )


def _memory(compiled: Any, seconds: float) -> str:
    sizes = compiled.memory_analysis()
    kinds = {
        "state": sizes.alias_size_in_bytes,
        "inputs": sizes.argument_size_in_bytes - sizes.alias_size_in_bytes,
        "activations": sizes.temp_size_in_bytes,
        "offloaded": sizes.host_temp_size_in_bytes,
    }
    text = ", ".join(f"{name} {size / 2**20:,.2f} MiB" for name, size in kinds.items())
    return f"step compiled in {seconds:.1f} s; memory per device: {text}"


def _writers(cfg: TrainConfig, kind: str, folder: Path, first_step: int, model_cfg: Any) -> list[Writer]:
    writers: list[Writer] = [Console(kind, first_step, cfg.num_steps), Files(folder, first_step)]
    if cfg.tensorboard:
        writers.append(TensorBoard(folder, first_step))
    if cfg.log:
        config = {"model": dataclasses.asdict(model_cfg)} | dataclasses.asdict(cfg)
        writers.append(Wandb(folder, cfg.entity, cfg.project, cfg.run_name, config))
    return writers


class _Rate:
    """Speed of the steps since the last report, share of time spent waiting for data, and the profiler's window."""

    def __init__(self, cfg: TrainConfig, clip_flops: float, devices: int):
        self.cfg = cfg
        self.step_flops = clip_flops * cfg.batch_size
        kind = jax.devices()[0].device_kind
        peaks = [peak for name, peak in PEAK_FLOPS.items() if name in kind]
        self.peak = peaks[0] * devices if peaks and cfg.dtype != "float32" else None
        self.since: tuple[int, float] | None = None
        self.waited = 0.0
        self.tracing = False

    def restart(self, step: int) -> None:
        self.since, self.waited = (step, time.monotonic()), 0.0

    def waiting(self) -> "_Rate":
        return self

    def __enter__(self) -> None:
        self.entered = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.waited += time.monotonic() - self.entered

    def rates(self, step: int) -> dict[str, float]:
        values = {}
        if self.since and step > self.since[0]:
            seconds = time.monotonic() - self.since[1]
            speed = (step - self.since[0]) / seconds
            values = {
                "steps_per_s": speed,
                "clips_per_s": speed * self.cfg.batch_size,
                "data_wait": self.waited / seconds,
                "tflops_per_s": speed * self.step_flops / 1e12,
            }
            if self.peak:
                values["mfu"] = speed * self.step_flops / self.peak
        self.restart(step)
        return values

    def trace(self, steps_done: int, folder: Path) -> None:
        if self.cfg.profile and steps_done == 10:
            jax.profiler.start_trace(str(folder / "profile"))
            self.tracing = True
        elif self.tracing and steps_done >= 15:
            jax.profiler.stop_trace()
            self.tracing = False


class _StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a request to save and stop; the second one stops at once."""

    def __init__(self) -> None:
        self.received = False
        self.old = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        print("stopping after this step; a second signal stops at once", flush=True)

    def requested(self, step: int, interval: int) -> bool:
        """Whether to stop now. Several processes agree on it every `interval` steps."""
        if jax.process_count() == 1:
            return self.received
        if step % interval:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.received)).any())

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
