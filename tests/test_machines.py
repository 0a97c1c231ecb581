"""Machines that are not here: what the compilers make of a step for many devices, and what fits."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import train_dynamics
import train_lam
import train_tokenizer
from benchmarks.hlo import collectives, kernels
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.maskgit import MaskGIT
from models.nn import Compute
from tests.conftest import ROOT, TOKENIZER, on_devices, script
from tests.test_train import flags, losses
from utils import sharding, step
from utils.cli import parse
from utils.settle import settled
from utils.state import TrainState, apply_gradients
from utils.train import TrainConfig, _check_batch

COMPILED = """if True:
    import json
    import jax
    from benchmarks.fit_device import Config, lower_training
    from benchmarks.hlo import collectives

    cfg = Config(device="cpu", devices=8, preset="bench", batch_size=16, fsdp={fsdp}, dtype="float32")
    step_cfg, train_cfg, _, lowered = lower_training(cfg, "{model}", "none", jax.devices())
    state = jax.tree.leaves(lowered.args_info[0][0])
    told = [each._asdict() for each in collectives(lowered.compile().as_text())]
    print(json.dumps({{"state": [x.shape for x in state], "told": told}}))
"""


def compiled_for_eight(model, fsdp):
    """What eight fake devices tell each other in a training step: shapes of the state, and the collectives."""
    command = [sys.executable, "-c", COMPILED.format(model=model, fsdp=fsdp)]
    env = os.environ | on_devices(8)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["state"], found["told"]


@pytest.mark.parametrize(("model", "fsdp"), [("tokenizer", 8), ("dynamics", 8), ("dynamics", 4)])
def test_fsdp_gathers_weights_and_no_activations(model, fsdp):
    state, told = compiled_for_eight(model, fsdp)
    bare = lambda shape: tuple(n for n in shape if n > 1)
    # Of each array that is trained, of one block of it, and of a table without its last row, that of no code.
    weights = {bare(cut) for whole in state for cut in (whole, whole[1:])}
    weights |= {(whole[0] - 1, *whole[1:]) for whole in state if len(whole) == 2}
    assert any(each["kind"] == "all-gather" and bare(each["shapes"][0]) in weights for each in told)
    places = 16 * 16 * 64  # of a batch; one number for each is no activation
    for each in told:
        assert each["kind"] != "all-to-all", each
        for shape in each["shapes"]:
            small = np.prod(shape, dtype=int) <= places
            assert each["kind"] != "all-gather" or small or bare(shape) in weights, each


PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %g = f32[64,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %f = f32[8,4]{1,0} fusion(%g), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %f)
}

ENTRY %main (a: f32[8,4]) -> f32[1,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %y = f32[8,4]{1,0} get-tuple-element(%w), index=1
  %c = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%y), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %r = f32[1,4]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}
"""


def test_collectives_and_kernels_are_read_from_a_compiled_text():
    gather, scatter = collectives(PROGRAM)
    assert (gather.kind, gather.shapes, gather.size, gather.devices, gather.times) == (
        "all-gather", ((64, 4),), 64 * 4 * 4, 8, 5
    )  # fmt: skip
    assert gather.moved == 5 * 64 * 4 * 4 * 7 / 8
    assert (scatter.kind, scatter.size, scatter.times) == ("reduce-scatter", 8 * 4 * 4, 1)
    assert kernels(PROGRAM) == {"all-gather": 5, "fusion": 5, "__cudnn$fmhaSoftmax": 1, "reduce-scatter": 1}


@pytest.mark.parametrize("script_", [train_tokenizer, train_lam, train_dynamics])
@pytest.mark.parametrize("devices", [1, 8, 16, 32])
def test_batch_scripts_start_on_so_many_devices(script_, devices, monkeypatch, tmp_path):
    text = (ROOT / "slurm" / f"{script_.__name__}.sbatch").read_text().replace("\\\n", "")
    command = next(line for line in text.splitlines() if line.startswith("srun"))
    words = shlex.split(os.path.expandvars(command.replace('"$@" &', f"--ckpt_dir {tmp_path}")))
    assert f"{script_.__name__}.py" in words
    cfg = parse(script_.Config, script_.PRESETS, words[words.index(f"{script_.__name__}.py") + 1 :])
    monkeypatch.setattr("jax.device_count", lambda: devices)
    cfg = settled(cfg)
    assert cfg.batch_size == cfg.batch_per_device * devices
    axes = jax.sharding.AbstractMesh((devices, 1), ("data", "fsdp"))
    _check_batch(cfg, axes)


def test_a_batch_for_each_device_is_kept_on_other_devices(dataset, tmp_path):
    given = [*TOKENIZER, *flags(dataset, tmp_path), "--batch_per_device", 2, "--fsdp", 2]
    script("train_tokenizer", *given, "--num_steps", 3, devices=4)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["batch_size"] == 8
    done = script("train_tokenizer", *given, devices=2)
    assert f"batch_size 8, with which {tmp_path} began, and not 4" in done.stdout
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_the_mesh_keeps_fsdp_within_a_host(monkeypatch):
    """Of two hosts with four devices each, as a run of two processes sees them."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        platform: str = "gpu"
        device_kind: str = "H100"

    devices = [Device(i, i // 4) for i in range(8)]
    grids = {}
    monkeypatch.setattr(sharding, "Mesh", lambda grid, **axes: grid)
    for fsdp in (1, 2, 4, 8):
        grids[fsdp] = np.vectorize(lambda device: device.process_index)(sharding.make_mesh(fsdp, devices))
    assert [grids[n].shape for n in (1, 2, 4, 8)] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    for fsdp in (1, 2, 4):
        assert all(len(set(row)) == 1 for row in grids[fsdp].tolist()), grids[fsdp]
    assert grids[8].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


SIZE = DynamicsConfig(width=32, num_heads=2, num_blocks=3, num_codes=16, num_patches=16, num_actions=3)


def build(rngs, compute):
    return MaskGIT(SIZE, compute, rngs)


def once(function):
    """The function, called once with the same objects."""
    found = {}

    def call(*given):
        key = tuple(map(id, given))
        if key not in found:
            found[key] = given, function(*given)  # what was given is kept, so that no other object gets its id
        return found[key][1]

    return call


def test_remat_auto_takes_the_cheapest_that_fits(monkeypatch):
    cfg = TrainConfig(remat="auto", dtype="bfloat16", batch_size=8)
    mesh = sharding.make_mesh()
    model = build(nnx.Rngs(0), cfg.compute)
    state = TrainState.create(model, nnx.Param, optax.sgd(0.1), ema=False)
    tokens = jnp.zeros((8, 8, 16), jnp.int32)

    def train_step(state, tokens, key):
        def loss(params):
            return jnp.mean(state.model(params)(tokens, tokens > 0, tokens[:, :, 0]).logits_BTNK ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        state, norms = apply_gradients(state, grads, cfg)
        return state, {"loss": value} | norms

    for name in ("with_remat", "compile_step"):
        monkeypatch.setattr(step, name, once(getattr(step, name)))  # each way compiles once
    needed, varied = {}, state
    for how in step.CHEAPEST_FIRST:
        varied = step.with_remat(varied, cfg, build, how)
        needed[how] = step.compile_step(cfg, mesh, train_step, varied, tokens)[2]
    assert needed["none"] > needed["dots"] > needed["outputs"] > needed["block"]

    for how in ("none", "outputs", "block"):
        monkeypatch.setattr(step, "device_memory", lambda how=how: int(needed[how] / (1 - step.MARGIN)) + 1)
        varied, step_fn, told = step.fitting_step(cfg, mesh, train_step, state, tokens, build)
        assert f"--remat {how} is the first that fits" in told
        assert np.isfinite(step_fn(jax.tree.map(jnp.copy, varied), tokens, np.int32(0))[1]["loss"])
    monkeypatch.setattr(step, "device_memory", lambda: needed["block"])
    with pytest.raises(InputError, match=r"even with `remat` block.*`grad_accum`"):
        step.fitting_step(cfg, mesh, train_step, state, tokens, build)


def test_a_full_device_ends_in_one_line(monkeypatch, capsys):
    from utils import cli

    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py"])
    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda cfg: jnp.zeros((2**24, 2**24), jnp.int8).block_until_ready(), train_tokenizer.Config)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: out of memory on a device: no room for another ")
    assert "--remat block, a larger --grad_accum" in line


def test_the_kind_of_device_is_a_value():
    on = lambda platform: Compute(dtype="auto", remat="auto", platform=platform).settled()
    assert [(on(p).dtype, on(p).remat) for p in ("cpu", "gpu", "tpu")] == [
        ("float32", "none"), ("bfloat16", "none"), ("bfloat16", "none")
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model", "most"), [("tokenizer", 10.5), ("dynamics", 9.0)])
def test_full_size_fits_an_h100_with_each_block_recomputed(model, most):
    python = ROOT / ".venv-fit" / "bin" / "python"
    if not python.exists():
        pytest.skip("XLA's compiler for GPUs is not here: make fit-deps")
    command = [
        python,
        "-m",
        "benchmarks.fit_device",
        "--device",
        "h100",
        "--model",
        model,
        "--remat",
        "block",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (values,) = json.loads(done.stdout.splitlines()[-1])["found"]
    assert values["fits"]
    assert values["memory"] < most * 2**30
    assert set(values["attention"]) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
