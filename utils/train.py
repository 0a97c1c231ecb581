"""The clockwork of a training: restore, step, log, evaluate, save."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.errors import DivergenceError, InputError
from models.nn import Compute
from models.stored import checkpoint_steps
from utils.checkpoint import CheckpointConfig, Checkpoints, take_folder, write_config
from utils.cli import DEFAULT_CACHE, set_up_jax
from utils.data import Batch, Source, batches, to_device
from utils.init_from import begin_with
from utils.logging import Console, Files, TensorBoard, Wandb, Writer, Writers, check_wandb
from utils.optim import OptimConfig, make_optimizer, phases, raised_rate
from utils.progress import Profiler, Reporter, Speed, Waiting
from utils.sharding import batch_sharding, make_mesh, start_distributed, state_sharding
from utils.signals import StopOnSignal
from utils.state import TrainState
from utils.video import strip

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
Evaluate = Callable[[Any, Batch, jax.Array], tuple[dict[str, jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True)
class TrainConfig(CheckpointConfig, OptimConfig, Compute):
    """Flags that every training script shares."""

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
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "grad_accum", "log_interval", "val_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")
        if self.seq_len < 2:
            raise InputError(f"`seq_len` {self.seq_len}: must be at least 2 frames")
        if self.batch_size % self.grad_accum:
            raise InputError(f"`grad_accum` {self.grad_accum}: must divide `batch_size` {self.batch_size}")

    @property
    def compute(self) -> Compute:
        """How the model is computed."""
        return Compute(self.dtype, self.remat, self.attention)


def start(cfg: TrainConfig) -> None:
    """Sets up JAX as the flags say; before anything else touches a device."""
    set_up_jax(cfg.compile_cache, cfg.deterministic)
    jax.config.update("jax_debug_nans", cfg.debug_nans)
    start_distributed(cfg.coordinator, cfg.num_processes, cfg.process_id)


def fit(
    cfg: TrainConfig,
    kind: str,
    model_cfg: Any,
    build: Callable[[nnx.Rngs], nnx.Module],
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
      kind: "tokenizer", "lam" or "world"; with `model_cfg`, what `config.json` says.
      build: Makes the model.
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

        stream = stack.enter_context(closing(read(cfg, mesh, train, cfg.seed, first_step, cfg.num_workers)))
        batch = next(stream)
        step_fn, compiled_in = compile_step(cfg, mesh, train_step, state, batch)
        if is_main:
            print(compiled_in, flush=True)
        validate = Validation(cfg, mesh, evaluate, val)
        writers = _writers(cfg, kind, folder, first_step, model_cfg) if is_main else Writers()
        stack.callback(writers.close)
        waiting, profiler, stop = Waiting(), Profiler(cfg.profile, folder), StopOnSignal()
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
    build: Callable[[nnx.Rngs], nnx.Module],
    trainable: Any,
    initialise: Callable[[Any], None],
) -> tuple[TrainState, int]:
    """The state of the latest checkpoint, or a new one, on the mesh; and the number of steps that it has behind it."""
    optimizer = make_optimizer(cfg, cfg.num_steps)
    create = lambda: TrainState.create(build(nnx.Rngs(cfg.seed)), trainable, optimizer, cfg.ema_decay > 0)
    abstract = jax.eval_shape(create)
    restored = checkpoints.restore(abstract, mesh)
    if restored:
        state, meta = restored
        return state, meta["step"]
    shardings = state_sharding(mesh, abstract)
    state = jax.jit(create, out_shardings=shardings)()
    model = state.model()
    initialise(model)
    if cfg.init_from:
        told = begin_with(cfg.init_from, model, state.params.keys())
        if jax.process_index() == 0:
            print(told, flush=True)
    params, rest = state.split(nnx.state(model))
    # Nothing has been trained yet: a moving average starts from what is there.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, state.averaged(params, rest))
    return jax.device_put(dataclasses.replace(state, params=params, rest=rest, ema=ema), shardings), 0


def read(
    cfg: TrainConfig, mesh: Mesh, source: Source, seed: int, first: int, num_workers: int
) -> Generator[Batch, None, None]:
    """Batches from number `first` on, on the devices of the mesh."""
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    stream = batches(source, cfg.batch_size, seed, start=first, num_workers=num_workers, **processes)
    return to_device(stream, batch_sharding(mesh))


def compile_step(
    cfg: TrainConfig, mesh: Mesh, train_step: TrainStep, state: TrainState, batch: Batch
) -> tuple[Callable[..., Any], str]:
    """Compiles the step once, for shapes and shardings that never change; also says how long it took and what it needs.

    The result takes (state, batch, number of the step, from 0), and gives up the state's memory to the next one.
    """
    root = jax.random.key(cfg.seed)

    def whole_step(state: TrainState, batch: Batch, step: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = train_step(state, batch, jax.random.fold_in(root, step))
        return state.move_average(cfg.ema_decay), metrics

    step_fn = jax.jit(
        whole_step,
        donate_argnums=() if cfg.debug_nans else 0,
        out_shardings=(state_sharding(mesh, state), None),
    )
    began = time.monotonic()
    compiled: Any = step_fn.lower(state, batch, np.int32(0)).compile()
    told = _memory(compiled, time.monotonic() - began)
    # With --debug_nans, the jitted function is run again after a NaN, operation by operation. The flag that `start` set
    # may be lost in this thread, for JAX forgets its check when a library turns it off for a while.
    return (jax.debug_nans(True)(step_fn) if cfg.debug_nans else compiled), told


class Validation:
    """Evaluates a state on the same batches each time."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh, evaluate: Evaluate, source: Source):
        self.cfg, self.mesh, self.source = cfg, mesh, source
        root = jax.random.key(cfg.seed)
        self.evaluate = jax.jit(
            lambda state, batch, i: evaluate(state.best_model(), batch, jax.random.fold_in(root, i)),
            out_shardings=NamedSharding(mesh, PartitionSpec()),  # whole in every process, to be looked at
        )

    def __call__(self, state: TrainState) -> tuple[dict[str, float], np.ndarray]:
        """Means of the metrics as `val_<name>`, and a picture of the first batch, uint8 (H, W, C)."""
        sums: dict[str, float] = {}
        stream = read(self.cfg, self.mesh, self.source, self.cfg.seed + 1, 0, 0)
        for i in range(self.cfg.val_batches):
            metrics, videos = self.evaluate(state, next(stream), np.int32(i))
            for name, value in metrics.items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / self.cfg.val_batches
            if i == 0:
                picture = strip(np.asarray(jax.device_get(videos) * 255 + 0.5).clip(0, 255).astype(np.uint8))
        best = self.cfg.keep_best
        if best and best not in sums:
            raise InputError(f"`keep_best` {best}: a validation gives {', '.join(sums)}")
        return sums, picture


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


def _writers(cfg: TrainConfig, kind: str, folder: Path, first_step: int, model_cfg: Any) -> Writers:
    writers: list[Writer] = [Console(kind, first_step, cfg.num_steps), Files(folder, first_step)]
    if cfg.tensorboard:
        writers.append(TensorBoard(folder, first_step))
    if cfg.log:
        config = {"model": dataclasses.asdict(model_cfg)} | dataclasses.asdict(cfg)
        writers.append(Wandb(folder, cfg.entity, cfg.project, cfg.run_name, config))
    return Writers(*writers)
