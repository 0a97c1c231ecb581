"""The clockwork of a training: restore, step, log, evaluate, save."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.errors import DivergenceError, InputError
from models.nn import Compute
from models.stored import checkpoint_steps
from utils.checkpoint import CheckpointConfig, Checkpoints, take_folder, write_config
from utils.cli import DEFAULT_CACHE, set_up_jax
from utils.data import Source
from utils.init_from import begin_with
from utils.logging import Console, Files, TensorBoard, Wandb, Writer, Writers, check_wandb
from utils.optim import OptimConfig, make_optimizer, phases, raised_rate
from utils.progress import Profiler, Reporter, Speed, Waiting
from utils.settle import settled
from utils.sharding import (
    make_mesh,
    spread,
    start_distributed,
    state_sharding,
    whole_here,
)
from utils.signals import StopOnSignal
from utils.state import TrainState
from utils.step import Build, TrainStep, fitting_step
from utils.validation import Evaluate, Validation, read

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class TrainConfig(CheckpointConfig, OptimConfig, Compute):
    """Flags that every training script shares."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and activations; parameters, norms, softmax, logits and losses stay float32. auto takes
    bfloat16 on an accelerator, and in a resumed training what it began with."""
    remat: Literal["auto", "none", "dots", "outputs", "block", "offload"] = "auto"
    """Activation checkpointing: keep everything, keep matrix products only, keep attention's outputs and the
    feed-forward layer's inner ones, recompute each block from its input, or keep that in pinned host memory. auto takes
    the first of them that fits an accelerator's memory, and none on a CPU."""
    data_dir: str = "data/coinrun"
    """Dataset folder, made by generate_dataset.py or preprocess_dataset.py; or several with their weights, as
    data/mine:0.7,data/coinrun:0.3."""
    num_steps: int = 300_000
    """Steps to train in all; a finished training goes on if this grows."""
    init_from: str = ""
    """Checkpoint whose parameters a new training begins with: of the same model, or a world that holds it. A resumed
    one does not look at it."""
    batch_size: int = 48
    """Clips in a global batch."""
    batch_per_device: int = 0
    """Clips for each device, in the place of --batch_size; a resumed training keeps the batches that it began with."""
    seq_len: int = 16
    """Frames in a clip."""
    pad_short: bool = False
    """Let clips shorter than --seq_len join, filled up with frames that count nothing; a tokenizer takes single
    pictures too. Validations take whole clips."""
    windows_per_clip: int = 1
    """Windows of --seq_len frames that are cut from each clip that is read, for the same batch: reading costs as much
    less. With 2, both halves of a clip of twice as many frames are used."""
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
    distributed: Literal["auto", "off"] = "auto"
    """auto joins the other tasks of a Slurm step, an mpirun or a TPU slice; off trains alone, as in a sweep."""
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
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        counts = "num_steps", "batch_size", "windows_per_clip", "grad_accum"
        for name in (*counts, "log_interval", "val_interval", "val_batches", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")
        if self.keep_best and not self.keep_best.startswith("val_"):
            raise InputError(f"`keep_best` {self.keep_best}: must be a metric of validations, such as val_loss")
        if self.seq_len < 2:
            raise InputError(f"`seq_len` {self.seq_len}: must be at least 2 frames")
        if self.batch_per_device < 0:
            raise InputError(f"`batch_per_device` {self.batch_per_device}: must not be negative")
        name = "batch_per_device" if self.batch_per_device else "batch_size"
        for part in ("grad_accum", "windows_per_clip"):
            if getattr(self, name) % getattr(self, part):
                raise InputError(f"`{part}` {getattr(self, part)}: must divide `{name}` {getattr(self, name)}")

    @property
    def compute(self) -> Compute:
        """How the model is computed."""
        return Compute(self.dtype, self.remat, self.attention, self.platform, self.quant).settled()


def start(cfg: Config) -> Config:
    """Sets up JAX as the flags say, before anything else touches a device; settles what they leave to the machine."""
    given: Any = cfg
    set_up_jax(given.compile_cache, given.deterministic)
    jax.config.update("jax_debug_nans", given.debug_nans)
    start_distributed(given.coordinator, given.num_processes, given.process_id, given.distributed)
    return settled(cfg)


def fit(
    cfg: TrainConfig,
    kind: str,
    model_cfg: Any,
    build: Build,
    train_step: TrainStep,
    evaluate: Evaluate,
    *,
    train: Source,
    val: Source,
    trainable: Any = nnx.Param,
    initialise: Callable[[Any], None] = lambda model: None,
    parts: dict[str, str] | None = None,
    clip_flops: float = 0.0,
) -> None:
    """Trains until `num_steps`, from wherever `ckpt_dir` stands.

    Batches and keys are functions of the step, so a resumed run repeats an uninterrupted one exactly.

    Args:
      kind: One of `models.genie.KINDS`; with `model_cfg`, what `config.json` says.
      build: Makes the model, to be computed in a way that is given.
      train_step: (state, batch, key) to (state, metrics); its metrics include `loss`, `grad_norm`, `param_norm`.
      evaluate: (model, batch, key) to (metrics, videos (R, T, H, W, C) in [0, 1] to show above each other).
      trainable: nnx filter of the parameters that gradients train.
      initialise: Changes the model of a new training in place; puts trained parts into it.
      parts: Fingerprints of these parts.
      clip_flops: Of a training step, for one clip.
    Raises:
      DivergenceError: Loss, gradient or parameters are no longer finite; nothing was saved since.
    """
    folder, is_main, mesh = Path(cfg.ckpt_dir), jax.process_index() == 0, make_mesh(cfg.fsdp)
    _check_batch(cfg, mesh)
    if cfg.log and is_main:
        check_wandb()
    with ExitStack() as stack:
        stack.enter_context(take_folder(folder))
        stored = write_config(folder, kind, model_cfg, cfg, parts)
        checkpoints = stack.enter_context(closing(Checkpoints(folder, cfg)))  # waits for the last save
        stack.enter_context(_explaining(checkpoints))
        state, first_step = restore_or_make(cfg, mesh, checkpoints, build, trainable, initialise)
        if is_main:
            raised = raised_rate(cfg, stored.get("num_steps"), cfg.num_steps, first_step, checkpoint_steps(folder))
            print(_describe(cfg, state, first_step) + raised, flush=True)
        if first_step >= cfg.num_steps:
            return

        stream = stack.enter_context(closing(read(cfg, mesh, train, first_step)))
        batch = next(stream)
        state, step_fn, compiled_in = fitting_step(cfg, mesh, train_step, state, batch, build)
        if is_main:
            print(compiled_in, flush=True)
        validate = Validation(cfg, mesh, evaluate, val)
        writers = _writers(cfg, kind, folder, first_step, model_cfg) if is_main else Writers()
        stack.callback(writers.close)
        waiting, stop, profiler = Waiting(), StopOnSignal(), stack.enter_context(Profiler(cfg.profile, folder))
        stack.callback(stop.restore)
        speed = Speed(cfg.batch_size, clip_flops * cfg.batch_size, cfg.dtype, waiting)
        reporter = Reporter(writers, speed, cfg.log_interval, cfg.num_steps)
        for step in range(first_step + 1, cfg.num_steps + 1):
            state, metrics = step_fn(state, batch, np.int32(step - 1))
            reporter.take(step, metrics)
            with waiting:
                batch = next(stream)
            profiler.after(step - first_step)
            last, stopping = step == cfg.num_steps, stop.requested(step, cfg.log_interval)
            val_metrics = None
            if last or step % cfg.val_interval == 0:
                reporter.flush()
                val_metrics, picture = validate(state)
                writers.image(step, kind, picture)
                writers.scalars(step, val_metrics)
                speed.restart(step)
            if last or stopping or step % cfg.checkpoint_interval == 0:
                reporter.flush()
                checkpoints.save(state, {"step": step, "batch": step, "seed": cfg.seed}, val_metrics)
            if stopping:
                break
    if stopping and is_main:
        print(f"stopped by a signal after step {step}, which is saved; run again to resume", flush=True)


def restore_or_make(
    cfg: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    build: Build,
    trainable: Any,
    initialise: Callable[[Any], None],
) -> tuple[TrainState, int]:
    """The state of the latest checkpoint, or a new one, on the mesh; and the number of steps that it has behind it."""
    optimizer = make_optimizer(cfg, cfg.num_steps)
    create = lambda: TrainState.create(build(nnx.Rngs(cfg.seed), cfg.compute), trainable, optimizer, cfg.ema_decay > 0)
    abstract = jax.eval_shape(create)
    restored = checkpoints.restore(abstract, mesh)
    if restored:
        state, meta = restored
        return state, meta["step"]
    shardings = state_sharding(mesh, abstract)
    state = jax.jit(create, out_shardings=shardings)()
    model = nnx.merge(state.graphdef, *whole_here((state.params, state.rest)))
    initialise(model)
    if cfg.init_from:
        told = begin_with(cfg.init_from, model, state.params.keys())
        if jax.process_index() == 0:
            print(told, flush=True)
    params, rest = state.split(nnx.state(model))
    # Nothing has been trained yet: a moving average starts from what is there.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, state.averaged(params, rest))
    return spread(dataclasses.replace(state, params=params, rest=rest, ema=ema), shardings), 0


@contextmanager
def _explaining(checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to a DivergenceError what is left and what to do."""
    try:
        yield
    except DivergenceError as error:
        left = f"stopped without saving. Checkpoints up to step {checkpoints.latest()} are good"
        message = f"{error}; {left}. Lower `learning_rate`, or find the cause with `debug_nans`"
        raise DivergenceError(message, error.step, error.name, error.value) from None


def _check_batch(cfg: TrainConfig, mesh: Mesh) -> None:
    if cfg.batch_size % (mesh.size * cfg.grad_accum):
        raise InputError(
            f"`batch_size` {cfg.batch_size}: must be a multiple of the {mesh.size} devices times `grad_accum` "
            f"{cfg.grad_accum}"
        )


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


def _writers(cfg: TrainConfig, kind: str, folder: Path, first_step: int, model_cfg: Any) -> Writers:
    writers: list[Writer] = [Console(kind, first_step, cfg.num_steps), Files(folder, first_step)]
    if cfg.tensorboard:
        writers.append(TensorBoard(folder, first_step))
    if cfg.log:
        config = {"model": dataclasses.asdict(model_cfg)} | dataclasses.asdict(cfg)
        writers.append(Wandb(folder, cfg.entity, cfg.project, cfg.run_name, config))
    return Writers(*writers)
