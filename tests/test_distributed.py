"""Other hardware: devices and processes come and go, the curve stays. On fake CPU devices and real processes (gloo)."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from models.stored import checkpoint_steps
from tests.conftest import LAM, ROOT, SMALL, TOKENIZER, XLA_FLAGS, here, script
from tests.test_train import assert_same, flags, lines, losses, stored
from utils import sharding
from utils.sharding import batch_sharding, leave, sees_all_devices, start_distributed, state_sharding


def assert_close(a, b):
    """Losses agree to float tolerance."""
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-3)


def model_of(kind, trained):
    """Script and model flags of a training, as in the fixture `trained`."""
    if kind == "world":
        parts = ["--tokenizer_checkpoint", trained["tokenizer"], "--lam_checkpoint", trained["lam"]]
        return "train_dynamics", [*SMALL, *parts]
    return f"train_{kind}", TOKENIZER if kind == "tokenizer" else LAM


@pytest.fixture
def half(trained, tmp_path):
    """Copies of the trained folders that stand at step 3 of 6."""

    def copy(kind, name=""):
        folder = tmp_path / (name or kind)
        shutil.copytree(trained[kind], folder)
        shutil.rmtree(folder / "6")
        return folder

    return copy


@pytest.mark.parametrize("fsdp", [1, pytest.param(4, marks=pytest.mark.slow), 8])
def test_resume_on_eight_devices_and_back_on_one(fsdp, half, trained, dataset):
    name, model = model_of("tokenizer", trained)
    folder = half("tokenizer")
    script(name, *model, *flags(dataset, folder), "--num_steps", 5, "--fsdp", fsdp, devices=8)
    here(name, *model, *flags(dataset, folder), "--num_steps", 6)
    # The learning rate depends on num_steps: compare up to where both runs were meant for the same number.
    assert_close(
        {s: v for s, v in losses(folder).items() if s < 5}, {s: losses(trained["tokenizer"])[s] for s in range(1, 5)}
    )
    assert checkpoint_steps(folder)[-1] == 6


def test_fsdp_equals_ddp_and_shrinks_each_device(half, trained, dataset, tmp_path):
    name, model = model_of("tokenizer", trained)
    sizes, curves = {}, {}
    for fsdp in (1, 8):
        folder = tmp_path / f"fsdp{fsdp}"
        done = script(
            name, *model, *flags(dataset, folder), "--model.width", 64, "--num_steps", 3, "--fsdp", fsdp, devices=8
        )
        line = next(text for text in done.stdout.splitlines() if "memory per device" in text)
        sizes[fsdp] = float(line.split("state ")[1].split(" MiB")[0].replace(",", ""))
        curves[fsdp] = losses(folder)
    assert_close(curves[1], curves[8])
    assert sizes[8] < sizes[1] / 4


def test_a_world_resumes_sharded(half, trained, dataset):
    name, model = model_of("world", trained)
    folder = half("world")
    script(name, *model, *flags(dataset, folder), "--fsdp", 2, devices=4)
    assert_close(losses(folder), losses(trained["world"]))
    frozen = {n: v for n, v in stored(folder, 6).items() if not n.startswith("['dynamics']")}
    assert_same(frozen, {n: v for n, v in stored(trained["world"], 6).items() if not n.startswith("['dynamics']")})


@pytest.mark.parametrize("kind", ["tokenizer", "world"])
def test_gradient_accumulation_equals_the_large_batch(kind, trained, dataset, tmp_path):
    name, model = model_of(kind, trained)
    here(name, *model, *flags(dataset, tmp_path), "--grad_accum", 4)
    assert_close(losses(tmp_path), losses(trained[kind]))
    one, many = stored(trained[kind], 6), stored(tmp_path, 6)
    for path, value in one.items():
        if "kernel" in path:
            np.testing.assert_allclose(many[path], value, atol=2e-3, err_msg=path)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(count, name, *given):
    """Runs a script as so many processes that talk over gloo."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "XLA_FLAGS": XLA_FLAGS}
    meet = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(count), "--process_id"]
    commands = [[sys.executable, f"{name}.py", *map(str, given), *meet, str(i)] for i in range(count)]
    started = [
        subprocess.Popen(c, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert [p.returncode for p in started] == [0] * count, "\n".join(outputs)
    return outputs


MANY = [(kind, 2) for kind in ("tokenizer", "lam", "world")]
MANY += [pytest.param(kind, 4, marks=pytest.mark.slow) for kind, _ in MANY]


@pytest.mark.parametrize(("kind", "count"), MANY)
def test_many_processes_learn_what_one_does(kind, count, trained, dataset, tmp_path):
    """From nothing, and resumed by one; each holds a block of the batch, and what is drawn goes by a clip's place."""
    name, model = model_of(kind, trained)
    outputs = processes(count, name, *model, *flags(dataset, tmp_path))
    assert f"process 1 of {count}: waits for the others" in outputs[1]
    assert f"{count} cpu in {count} process(es)" in outputs[0]
    assert "step 4/6" not in outputs[1]  # the first process alone reports
    assert_close(losses(tmp_path), losses(trained[kind]))
    shutil.rmtree(tmp_path / "6")
    here(name, *model, *flags(dataset, tmp_path))
    assert_close(losses(tmp_path), losses(trained[kind]))
    assert checkpoint_steps(tmp_path)[-1] == 6


@pytest.mark.parametrize("kind", ["tokenizer", pytest.param("world", marks=pytest.mark.slow)])
def test_two_processes_resume_one(kind, half, trained, dataset):
    name, model = model_of(kind, trained)
    folder = half(kind)
    processes(2, name, *model, *flags(dataset, folder), "--fsdp", 2)
    assert_close(losses(folder), losses(trained[kind]))


def test_a_process_whose_others_do_not_come_gives_up_in_a_line():
    program = f"""if True:
        from utils import sharding
        from utils.cli import run
        from train_tokenizer import Config
        sharding.PATIENCE_S = 3
        run(lambda cfg: sharding.start_distributed("127.0.0.1:{free_port()}", 2, 1), Config)
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert "process 1 of 2: waits for the others, at most 3 s; --distributed off trains alone" in done.stdout
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: process 1 of 2: the others did not come in 3 s; start all with one srun or mpirun")


def kill_at_random_moments(command, folder, kills, most, rng):
    """Starts a training again and again, each time with SIGKILL at a random step, then lets it finish.

    Args:
      most: Steps after which it is killed at the latest, where that is not while it saves.
    """
    file = folder / "metrics.jsonl"
    names = lambda: {path.name for path in folder.iterdir()} if folder.exists() else set()
    logged = lambda: max(map(int, re.findall(r'"step": (\d+)', file.read_text())), default=0) if file.exists() else 0
    for _ in range(kills):
        before, on_save, until = names(), rng.random() < 0.5, logged() + rng.randint(1, most)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        # Just when a checkpoint is being written, or else anywhere.
        while time.monotonic() < deadline:
            if on_save and any("tmp" in name for name in names() - before):
                break
            if not on_save and logged() >= until:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("kills", "last"), [(3, 30), pytest.param(12, 60, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_unkilled_one(kills, last, trained, dataset, tmp_path):
    name, model = model_of("tokenizer", trained)
    steps = ["--num_steps", last, "--checkpoint_interval", 3, "--val_interval", last // 2]
    here(name, *model, *flags(dataset, tmp_path / "calm"), *steps)
    command = [sys.executable, f"{name}.py", *model, *flags(dataset, tmp_path / "killed"), *steps]
    most = last * 4 // 5 // kills  # so that it is killed for the last time before it ends
    kill_at_random_moments([str(word) for word in command], tmp_path / "killed", kills, most, random.Random(kills))
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    for item in ("model", "optimizer"):
        assert_same(stored(tmp_path / "killed", last, item), stored(tmp_path / "calm", last, item))


def test_rollouts_spread_over_devices_and_stay_the_same(trained, tmp_path):
    flags_ = ["--checkpoint", trained["world"], "--steps", 2, "--num_clips", 2, "--temperature", 0]
    here("sample", *flags_, "--output_dir", tmp_path / "one")
    script("sample", *flags_, "--output_dir", tmp_path / "two", devices=2)
    one, two = (json.loads((tmp_path / out / "rollout.json").read_text())["psnr"] for out in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-3)


def test_a_trace_and_the_gradients_of_each_component_are_written(dataset, tmp_path):
    watch = ["--num_steps", 16, "--profile", "--log_gradients", "--debug_nans"]
    watch += ["--val_interval", 16, "--checkpoint_interval", 16]
    script("train_tokenizer", *TOKENIZER, *flags(dataset, tmp_path), *watch)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    parts = {name.removeprefix("grad_norm/") for name in lines(tmp_path)[0] if name.startswith("grad_norm/")}
    assert {"encoder", "decoder", "patch_in"} <= parts


def test_a_save_that_finds_no_room_names_the_last_good_checkpoint(half, trained, dataset):
    """A limit on the size of files fails writes just as a full disk does: late, and in orbax's own threads."""
    name, model = model_of("tokenizer", trained)
    folder = half("tokenizer")
    done = script(name, *model, *flags(dataset, folder), check=False, largest_file=8192)
    assert done.returncode == 1
    assert f"the last good checkpoint is {folder}/3" in done.stderr
    assert checkpoint_steps(folder) == [3]
    here(name, *model, *flags(dataset, folder))  # once there is room again, the curve goes on
    assert losses(folder) == losses(trained["tokenizer"])
    assert_same(stored(folder, 6), stored(trained["tokenizer"], 6))


def test_a_folder_that_vanishes_stops_the_training(trained, dataset, tmp_path):
    name, model = model_of("tokenizer", trained)
    folder = tmp_path / "tokenizer"
    flags_ = [*flags(dataset, folder), "--num_steps", 100_000, "--checkpoint_interval", 20, "--log_interval", 20]
    command = [sys.executable, f"{name}.py", *model, *flags_, "--val_interval", 100_000]
    running = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not (folder.exists() and checkpoint_steps(folder)):
            assert running.poll() is None
            time.sleep(0.2)
        folder.rename(tmp_path / "elsewhere")
        _, errors = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 1
    assert "vanished while this training ran" in errors or "saving a checkpoint failed" in errors


def test_retention_keeps_latest_every_and_best(trained, dataset, tmp_path):
    name, model = model_of("tokenizer", trained)
    keep = ["--keep_latest", 1, "--keep_every", 5, "--val_interval", 2, "--checkpoint_interval", 1]
    wrong = here(name, *model, *flags(dataset, tmp_path), *keep, "--keep_best", "val_psrn", check=False)
    assert "--keep_best val_psrn: a validation gives val_loss" in wrong.stderr
    here(name, *model, *flags(dataset, tmp_path), *keep, "--keep_best", "val_psnr")
    scores = {line["step"]: line["val_psnr"] for line in lines(tmp_path) if "val_psnr" in line}
    assert checkpoint_steps(tmp_path) == sorted({5, 6, max(scores, key=scores.get)})


def test_a_moving_average_is_saved_and_sampled_from(trained, dataset, tmp_path):
    from models.genie import load_tokenizer

    name, model = model_of("tokenizer", trained)
    command = [name, *model, *flags(dataset, tmp_path), "--num_steps", 5, "--ema_decay", 0.5]
    here(*command)
    shutil.rmtree(tmp_path / "5")  # as if stopped after step 3
    average, last = stored(tmp_path, 3, "ema"), stored(tmp_path, 3)
    kernel = "['patch_in']['kernel']"
    assert np.any(average[kernel] != last[kernel])
    np.testing.assert_array_equal(load_tokenizer(tmp_path).patch_in.kernel[...], average[kernel])
    here(*command)
    assert checkpoint_steps(tmp_path) == [3, 5]  # the last step is saved, whatever the interval


def test_harmless_flags_may_change_on_resume(half, trained, dataset):
    name, model = model_of("lam", trained)
    folder = half("lam")
    given = ["--tensorboard", "--log_gradients", "--num_workers", 1, "--keep_latest", 3, "--remat", "block"]
    script(name, *model, *flags(dataset, folder), *given)
    assert_close(losses(folder), losses(trained["lam"]))
    assert list((folder / "tensorboard").glob("events*"))
    assert any(
        key.startswith("grad_norm/") for key in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    )


def test_wandb_gets_the_curve(trained, dataset, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    name, model = model_of("tokenizer", trained)
    script(name, *model, *flags(dataset, tmp_path), "--log", "--entity", "us", "--project", "worlds")
    runs = list(tmp_path.rglob("run-*.wandb"))
    assert len(runs) == 1
    assert b"val_psnr" in runs[0].read_bytes()


def test_the_compile_cache_is_where_the_flag_says(tmp_path):
    """In a process of its own, whose environment names another folder, as the tests' does."""
    program = """if True:
        import jax
        from train_tokenizer import Config
        from utils.train import start
        start(Config(compile_cache="~/programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(lambda x: x + 1)(1.0)
    """
    env = os.environ | {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, check=True)
    assert list((tmp_path / "programs").iterdir())
    assert not (tmp_path / "other").exists()


def test_the_largest_axis_that_fits_is_sharded_and_batches_are_split_over_all_devices():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    cases = {
        (64, 128): P(None, "fsdp"),
        (3, 128, 64): P(None, "fsdp"),
        (64, 126): P("fsdp"),
        (63, 127): P(),
        (8, 64): P(),  # too small to be worth it
    }
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in cases]
    assert [sharding.spec for sharding in state_sharding(mesh, arrays)] == list(cases.values())
    alone = AbstractMesh((8, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    assert all(sharding.is_fully_replicated for sharding in state_sharding(alone, arrays))
    assert batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)


VARIABLES = {
    *("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "TPU_WORKER_HOSTNAMES", "CUDA_VISIBLE_DEVICES"),
}


def test_the_first_process_leaves_the_others_before_their_server_ends(monkeypatch):
    done = []
    parts = ("preemption_sync_manager", "client", "service")
    for name in parts:
        part = SimpleNamespace(shutdown=lambda name=name: done.append(name))
        monkeypatch.setattr(sharding.distributed.global_state, name, part)
    monkeypatch.setattr(sharding.time, "sleep", lambda seconds: done.append(seconds))
    leave()
    assert done == ["preemption_sync_manager", "client", sharding.PAUSE_S]
    jax.distributed.shutdown()  # as JAX does at exit
    assert done[3:] == ["service"]
    leave()
    assert len(done) == 4  # nothing for a process that is alone, or has left


@pytest.fixture
def initialized(monkeypatch):
    """The calls of `jax.distributed.initialize`, in an environment without a cluster."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, initialization_timeout: calls.append(given))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        ({}, []),
        ({"SLURM_NTASKS": "4"}, []),  # a shell inside of salloc, or a notebook in a job
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, [()]),
        ({"OMPI_COMM_WORLD_SIZE": ""}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "one"}, []),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, [()]),
    ],
)
def test_processes_meet_where_there_are_several(environment, joined, initialized, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start_distributed()
    assert initialized == joined
    start_distributed(how="off")
    assert initialized == joined
    start_distributed("host:1234", 2, 1)
    assert initialized[-1] == ("host:1234", 2, 1)


@pytest.mark.parametrize(
    ("environment", "all_of_them"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ],
)
def test_a_task_alone_on_its_host_uses_every_device(environment, all_of_them, initialized, monkeypatch):
    """JAX would give each task of Slurm one GPU."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sees_all_devices() == all_of_them
