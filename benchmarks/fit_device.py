"""Whether a training fits a device that is not here: XLA compiles for it on this CPU (`make fit-deps`, `make fit`).

python -m benchmarks.fit_device --device h100 --preset coinrun
python -m benchmarks.fit_device --device v5e --devices 16 --fsdp 4 --model dynamics --json
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import sample, train_step
from benchmarks.devices import DEVICES, USABLE, absent_devices, prepare
from benchmarks.hlo import collectives, int8_products, kernels, product_flops
from models.errors import InputError
from models.genie import World
from models.nn import Compute
from models.sampling import SamplingConfig, next_frame, start_rollout
from utils.cli import run
from utils.sharding import batch_sharding, make_mesh, state_sharding
from utils.step import CHEAPEST_FIRST, jitted_step, memory
from utils.train import TrainConfig

GIB = 2**30
ATTENTION = ("fmha", "flash", "attention")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles training steps and a sampled frame for a device, and says what they need of it."""

    device: Literal["h100", "h200", "a100", "l40s", "rtx4090", "v5e", "v5p", "v6e", "cpu"] = "h100"
    """For what; cpu is this machine, as so many devices as XLA_FLAGS says."""
    devices: int = 1
    """How many of them, on all hosts."""
    hosts: int = 1
    """Over how many hosts GPUs are spread."""
    model: tuple[Literal["tokenizer", "lam", "dynamics", "sample"], ...] = ("tokenizer", "lam", "dynamics", "sample")
    """Trainings, and the sampling of one frame."""
    preset: Literal["bench", "tiny", "flow", "latents", "small", "coinrun", "moving", "mae"] = "coinrun"
    """Their size; mae is of the tokenizer alone."""
    batch_size: int = 0
    """Clips in a global batch, or videos sampled together; 0: the preset's, and one video."""
    grad_accum: int = 1
    """Parts into which a batch is cut."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products and activations."""
    remat: tuple[Literal["auto", "none", "dots", "outputs", "block", "offload"], ...] = ("auto",)
    """Ways of activation checkpointing to try; auto takes the cheapest that fits."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """Attention kernel."""
    quant: Literal["none", "int8"] = "none"
    """Products of the blocks' dense layers."""
    from_tokens: bool = False
    """For the dynamics model: from stored tokens and latent actions instead of from frames."""
    steps: int = 25
    """Steps of a sampled frame, of a MaskGIT or a flow."""
    json: bool = False
    """Also print the figures as one line of JSON."""

    def __post_init__(self):
        if self.preset == "mae" and self.model != ("tokenizer",):
            raise InputError("`preset` mae: is of the tokenizer alone; give `model` tokenizer")


def platform(cfg: Config) -> Any:
    """The kind of device that is compiled for."""
    return "cpu" if cfg.device == "cpu" else DEVICES[cfg.device].platform


def options(cfg: Config) -> Any:
    """What the compiler is told beside the program: no Triton products, whose tiles it finds by trial on a device."""
    return {"xla_gpu_enable_triton_gemm": False} if platform(cfg) == "gpu" else None


def training(cfg: Config, model: Any, how: Any, devices: Sequence[Any]) -> dict[str, Any]:
    """What one training step needs."""
    step_cfg, train_cfg, flops_of_step, lowered = lower_training(cfg, model, how, devices)
    values: dict[str, Any] = {"model": model, "remat": step_cfg.remat, "dtype": step_cfg.dtype}
    values |= {"batch_size": train_cfg.batch_size, "devices": len(devices)}
    values |= {"flops": flops_of_step, "recomputed": recomputed(step_cfg)}
    began = time.monotonic()
    try:
        compiled = lowered.compile(options(cfg))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return values | {"fits": False, "why": " ".join(str(error).split())[:200]}
    values["compile_s"] = time.monotonic() - began
    return (
        values
        | needs(cfg, compiled, train_cfg.batch_size)
        | program(compiled.as_text())
        | roofline(cfg, values, compiled)
    )


def lower_training(
    cfg: Config, model: Any, how: Any, devices: Sequence[Any]
) -> tuple[train_step.Config, TrainConfig, float, Any]:
    """One training step for devices, to be compiled; before it its configurations and floating-point operations."""
    compute = Compute(cfg.dtype, how, cfg.attention, platform(cfg), cfg.quant).settled()
    given: dict[str, Any] = dataclasses.asdict(compute) | {"model": model, "preset": cfg.preset}
    given |= {"batch_size": cfg.batch_size, "grad_accum": cfg.grad_accum, "from_tokens": cfg.from_tokens}
    step_cfg = train_step.Config(**given)
    train_cfg, create, step, clip_flops = train_step.setting(step_cfg)
    mesh = make_mesh(cfg.fsdp, devices)
    if train_cfg.batch_size % (mesh.size * cfg.grad_accum):
        raise InputError(
            f"`batch_size` {train_cfg.batch_size} of the {model}: must be a multiple of {mesh.size} devices times "
            f"`grad_accum` {cfg.grad_accum}"
        )
    abstract = jax.eval_shape(create)
    state = placed(abstract, state_sharding(mesh, abstract))
    batch = train_step.batch_of(step_cfg, train_cfg)
    batch = placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = jitted_step(train_cfg, mesh, step, state).lower(state, batch, number)
    return step_cfg, train_cfg, float(clip_flops * train_cfg.batch_size), lowered


def placed(abstract: Any, shardings: Any) -> Any:
    """Shapes with where their arrays are to lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def recomputed(step_cfg: train_step.Config) -> float:
    """Products that activation checkpointing takes again, as a share of those of a step without."""

    def products(how: Any) -> int:
        # On a CPU attention is products too, which a GPU's kernels hide.
        cfg = dataclasses.replace(step_cfg, remat=how, platform="cpu", attention="xla")
        train_cfg, create, step, _ = train_step.setting(cfg)
        return product_flops(
            jax.make_jaxpr(step)(jax.eval_shape(create), train_step.batch_of(cfg, train_cfg), jax.random.key(0))
        )

    return products(step_cfg.remat) / products("none") - 1


def needs(cfg: Config, compiled: Any, batch_size: int) -> dict[str, Any]:
    """Bytes on each device by kind, whether there are so many, and about how large a batch could be."""
    kinds = memory(compiled)
    if cfg.device == "cpu":
        return kinds
    room = USABLE * DEVICES[cfg.device].memory
    by_clip = (kinds["inputs"] + kinds["activations"]) / batch_size
    total = sum(kinds.values()) - kinds["offloaded"]
    return kinds | {
        "fits": total <= room,
        "memory": total,
        "largest_batch_estimate": int((room - kinds["state"]) / by_clip),
    }


def program(text: Any) -> dict[str, Any]:
    """What a compiled program tells other devices, and what it launches."""
    moved: Counter[str] = Counter()
    for told in collectives(text):
        moved[told.kind] += int(told.moved)
    launched = kernels(text)
    attention = {name: n for name, n in launched.items() if any(word in name.lower() for word in ATTENTION)}
    counts = {"kernels": launched.total(), "attention": attention, "collectives": dict(moved)}
    return counts | {"int8_products": int8_products(text)}


def roofline(cfg: Config, values: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """The least time that products, memory and links allow, each by itself; an estimate."""
    if cfg.device == "cpu":
        return {}
    device, sizes = DEVICES[cfg.device], memory(compiled)
    work = values["flops"] * (1 + values.get("recomputed", 0.0)) / values["devices"]
    told = sum(each.moved for each in collectives(compiled.as_text()))
    # At the least, the state is read and written once, and so is what is kept between the two passes.
    traffic = 2 * (sizes["state"] + sizes["activations"])
    times = work / device.flops, traffic / device.bandwidth, told / device.link
    return {"estimate_ms": 1e3 * max(times), "estimate_bound_by": ("FLOPs", "memory", "links")[int(np.argmax(times))]}


def frame(cfg: Config, devices: Sequence[Any]) -> dict[str, Any]:
    """What one sampled frame needs, on one device."""
    compute = Compute(cfg.dtype, "none", cfg.attention, platform(cfg), cfg.quant).settled()
    B, sampling = cfg.batch_size or 1, SamplingConfig(steps=cfg.steps)
    preset: Any = cfg.preset
    size = sample.Config(preset=preset, batch_size=B, steps=cfg.steps)
    world = nnx.eval_shape(lambda: sample.make_world(size, compute))
    graphdef, variables = nnx.split(world)
    prompt, actions = (
        jax.ShapeDtypeStruct((B, 1, *world.cfg.frame_shape), jnp.float32),
        jnp.zeros((B, 0), int),
    )
    state = jax.eval_shape(lambda v, p: start_rollout(nnx.merge(graphdef, v), p, actions), variables, prompt)
    mesh = make_mesh(1, devices[:1])
    here = NamedSharding(mesh, PartitionSpec())
    given = (variables, state, jax.ShapeDtypeStruct((B,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0)))
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), given)

    def one(variables: Any, state: Any, action_B: jax.Array, key: jax.Array) -> Any:
        world: World = nnx.merge(graphdef, variables)
        return next_frame(world, state, action_B, key, sampling)

    began = time.monotonic()
    compiled = jax.jit(one, donate_argnums=1).lower(*given).compile(options(cfg))
    work = B * sample.frame_flops(world, sampling)
    values = {"model": "sample", "dtype": compute.dtype, "batch_size": B, "devices": 1, "flops": float(work)}
    values["compile_s"] = time.monotonic() - began
    return values | needs(cfg, compiled, B) | program(compiled.as_text()) | roofline(cfg, values, compiled)


def show(values: dict[str, Any]) -> None:
    """Prints what one compiled program needs, in a few lines."""
    gib = lambda name: f"{name} {values[name] / GIB:.2f}"
    verdict = {True: "fits", False: "does not fit", None: "compiled"}[values.get("fits")]
    how = f", remat {values['remat']} (recomputes {values['recomputed']:.1%})" if "remat" in values else ""
    print(f"{values['model']}, batch {values['batch_size']}, {values['dtype']}{how}: {verdict}")
    if "state" not in values:
        print(f"  {values['why']}")
        return
    kinds = ", ".join(map(gib, ("state", "inputs", "activations", "offloaded")))
    print(f"  GiB on each device: {kinds}; about {values.get('largest_batch_estimate', '?')} clips would fit")
    int8 = f"; {values['int8_products']} products of int8" if values["int8_products"] else ""
    attention = values["attention"] or "of XLA"
    print(f"  {values['kernels']} kernels; attention: {attention}; {values['flops']:.3g} FLOPs{int8}")
    moved = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in values["collectives"].items())
    print(f"  sent by each device: {moved or 'nothing'}; compiled in {values['compile_s']:.0f} s")
    if "estimate_ms" in values:
        print(f"  at least {values['estimate_ms']:.2f} ms by {values['estimate_bound_by']} (an estimate, not measured)")


def main(cfg: Config) -> None:
    prepare()
    devices = absent_devices(cfg.device, cfg.devices, cfg.hosts)
    found: list[dict[str, Any]] = []
    for model in cfg.model:
        if model == "sample":
            found.append(frame(cfg, devices))
            show(found[-1])
            continue
        for how in cfg.remat:
            for tried in CHEAPEST_FIRST if how == "auto" else (how,):
                found.append(training(cfg, model, tried, devices))
                show(found[-1])
                if found[-1].get("fits", True):
                    break
    if cfg.json:
        print(
            json.dumps({"device": cfg.device, "jax": jax.__version__, "preset": cfg.preset, "found": found}), flush=True
        )


if __name__ == "__main__":
    run(main, Config)
