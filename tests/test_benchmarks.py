"""The benchmarks run and print what they promise; their figures are not judged here."""

import dataclasses
import json

import jax
import pytest

from benchmarks import attention, checkpoint, dataloader, generate, inverse_dynamics, sample, train_step
from models.errors import InputError


def figures(capsys, main, cfg):
    main(cfg)
    table, line = capsys.readouterr().out.strip().rsplit("\n", 1)
    values = json.loads(line)
    assert all(name in table for name in values.keys() - {"title", "device", "cores", "jax"})
    return values


@pytest.mark.parametrize(("model", "from_tokens"), [("tokenizer", False), ("lam", False), ("dynamics", True)])
def test_train_step(capsys, model, from_tokens):
    cfg = train_step.Config(json=True, model=model, from_tokens=from_tokens, preset="tiny", batch_size=1, steps=2)
    values = figures(capsys, train_step.main, cfg)
    share = values["flops_per_step"] / (values["step_ms"] / 1e3) / values["peak_flops"]
    assert values["mfu"] == pytest.approx(share)
    assert 0 < values["floor_flops_ms"] < values["step_ms"]
    assert values["bound_by"] in ("FLOPs", "bytes")
    assert values["peak_memory_mib"] > 1


@pytest.mark.parametrize(
    ("model", "attention"), [("tokenizer", "xla"), ("tokenizer", "cudnn"), ("lam", "cudnn"), ("dynamics", "cudnn")]
)
def test_a_training_step_lowers_for_a_gpu(model, attention, monkeypatch):
    """In bfloat16 and with activations on the host: as far as one can see without a GPU."""
    if attention == "cudnn":
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    # At the bench shape an action token makes the number of places odd.
    compute = {"dtype": "bfloat16", "remat": "offload", "attention": attention, "platform": "gpu"}
    cfg = train_step.Config(model=model, preset="bench", **compute)
    train_cfg, create, step, _ = train_step.setting(cfg)
    batch = train_step.batch_of(cfg, train_cfg)
    traced = jax.jit(step).trace(jax.eval_shape(create), batch, jax.random.key(0))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in program
    assert "pinned_host" in program
    # Forward and backward.
    assert {f"__cudnn$fmhaSoftmax{way}" in program for way in ("", "Backward")} == {attention == "cudnn"}


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("tiny", "maskgit"), ("tiny", "maskgit_head"), ("tiny", "causal"), ("flow", ""), ("latents", "")],
)
def test_sample(capsys, preset, kind):
    values = figures(capsys, sample.main, sample.Config(json=True, preset=preset, kind=kind, steps=2, repeats=1))
    assert values["frames_per_s"] == pytest.approx(1e3 / values["frame_ms"])
    assert ("speedup" in values) == (kind == "maskgit")


def test_inverse_dynamics(capsys, dataset):
    values = figures(
        capsys, inverse_dynamics.main, inverse_dynamics.Config(True, str(dataset), num_steps=2, num_clips=8)
    )
    assert values["transitions"] == 8 * 3
    assert values["accuracy low"] <= values["accuracy"] <= values["accuracy high"]


def test_dataloader(capsys, dataset):
    cfg = dataloader.Config(True, str(dataset), batch_size=4, seq_len=6, num_workers=(0,), seconds=0.3)
    values = figures(capsys, dataloader.main, cfg)
    assert values["frames_per_s_0_workers_1_windows"] > 0
    assert values["frames_per_s_floor"] > 0


def test_checkpoint(capsys, tmp_path):
    cfg = checkpoint.Config(json=True, preset="tiny", batch_size=1, saves=2, steps=2, folder=str(tmp_path))
    values = figures(capsys, checkpoint.main, cfg)
    assert values["size_mib"] > 1
    assert values["call_ms"] > 0


def test_a_preset_without_a_tokenizer_has_frames_to_train_on_and_no_tokens(capsys):
    cfg = train_step.Config(json=True, model="dynamics", preset="flow", batch_size=1, steps=2)
    assert figures(capsys, train_step.main, cfg)["step_ms"] > 0
    with pytest.raises(InputError, match="`from_tokens`: `preset` flow has no tokenizer"):
        train_step.batch_of(dataclasses.replace(cfg, from_tokens=True), train_step.setting(cfg)[0])


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-6), ("bfloat16", 1e-4, 0.03)])
def test_attention(capsys, dtype, least, most):
    cfg = attention.Config(json=True, dtype=dtype, batch_size=1, num_frames=3, num_patches=5, num_heads=2, head_width=8)
    values = figures(capsys, attention.main, cfg)
    assert min(values["space_ms"], values["time_ms"]) > 0
    assert least <= min(values["space_error"], values["time_error"])
    assert max(values["space_error"], values["time_error"]) <= most


def test_generate(capsys):
    pytest.importorskip("procgen")
    values = figures(capsys, generate.main, generate.Config(json=True, num_episodes=3))
    assert values["frames_kept"] > 1000
    assert values["frames_per_s_floor"] > values["frames_per_s"] > 0
