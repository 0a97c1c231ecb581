"""What goes wrong around a training, on disks, clusters and other people's machines: told in a line, and no worse."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.errors import DamagedCheckpointError, InputError
from models.genie import load_tokenizer
from models.nn import Compute
from models.stored import checkpoint_steps
from models.tokenizer import Tokenizer, TokenizerConfig
from tests.conftest import FRAME, ROOT, TOKENIZER, here, make_clip, script
from tests.test_train import flags, losses, refused, stored
from utils import cli, data, lock
from utils.data import ClipSource, check_shared_memory
from utils.lock import FolderLock
from utils.logging import Wandb, check_wandb
from utils.optim import raised_rate
from utils.records import Metadata, write_metadata, write_shard
from utils.state import TrainState
from utils.train import TrainConfig

# A damaged newest checkpoint.


def newest(folder: Path) -> Path:
    return folder / "6"


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(_largest(folder / "model"), _largest(folder / "model").stat().st_size // 2)


def zero(folder: Path) -> None:
    _largest(folder / "model").write_bytes(bytes(_largest(folder / "model").stat().st_size))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "truncated": truncate,
    "zeros": zero,
    "empty": empty,
    "half copied": lambda folder: shutil.rmtree(folder / "optimizer"),
    "no list of items": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "a lost file": lambda folder: _largest(folder / "model").unlink(),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_the_newest_whole_checkpoint_is_loaded_and_nothing_renamed(trained, tmp_path, capfd, how):
    shutil.copytree(trained["tokenizer"], tmp_path / "t")
    DAMAGES[how](newest(tmp_path / "t"))
    before = sorted(path.name for path in (tmp_path / "t").iterdir())
    loaded = load_tokenizer(tmp_path / "t")
    np.testing.assert_array_equal(
        loaded.patch_in.kernel[...], load_tokenizer(trained["tokenizer"], step=3).patch_in.kernel[...]
    )
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith(f"warning: {newest(tmp_path / 't')}: damaged (")
    assert "step 3 is taken in its place" in said
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == before
    with pytest.raises(DamagedCheckpointError, match="6: damaged"):
        load_tokenizer(tmp_path / "t", step=6)


@pytest.mark.parametrize("how", ["zeros", "empty"])
def test_a_training_sets_a_damaged_checkpoint_aside_and_goes_on(trained, dataset, tmp_path, how):
    folder = tmp_path / "t"
    shutil.copytree(trained["tokenizer"], folder)
    DAMAGES[how](newest(folder))
    done = script("train_tokenizer", *TOKENIZER, *flags(dataset, folder))
    assert f"set aside as {folder}/damaged-6" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"resuming {folder} at step 3" in done.stdout
    assert (folder / "damaged-6").is_dir()
    assert checkpoint_steps(folder) == [3, 6]
    again, before = stored(folder, 6), stored(trained["tokenizer"], 6)
    for name in before:
        np.testing.assert_array_equal(again[name], before[name], err_msg=name)
    assert losses(folder) == losses(trained["tokenizer"])


def test_if_none_is_whole_nothing_is_touched(trained, dataset, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(trained["tokenizer"], folder)
    empty(folder / "3")
    zero(folder / "6")
    message = refused(script("train_tokenizer", *TOKENIZER, *flags(dataset, folder), check=False))
    assert "6: damaged" in message
    assert "there is no other that is whole" in message
    with pytest.raises(DamagedCheckpointError, match="there is no other that is whole"):
        load_tokenizer(folder)


# One training in a folder.

HOLD = """
    import sys, time
    from pathlib import Path
    from utils.lock import FolderLock
    FolderLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has a folder."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "t")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_and_a_dead_one_forgotten(holder, tmp_path):
    with pytest.raises(InputError, match=rf"process {holder.pid} on .* is training here"):
        FolderLock(tmp_path / "t")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "t"):
        assert json.loads((tmp_path / "t" / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "t" / ".lock").read_text() == ""


def test_the_script_says_so_in_a_line(holder, dataset, tmp_path):
    message = refused(here("train_tokenizer", *TOKENIZER, *flags(dataset, tmp_path / "t"), check=False))
    assert f"--ckpt_dir {tmp_path / 't'}: process {holder.pid} on" in message
    assert not (tmp_path / "t" / "config.json").exists()


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_host_is_known_by_its_beat(tmp_path, monkeypatch, lives):
    """Where the file system's locks end at the host, as if `lockf` let everybody in."""
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "PATIENCE_S", 2.0)
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node1")
    first = FolderLock(tmp_path)
    if not lives:
        first.released.set()  # its beat ends, and the file stays as it is
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node2")
    if lives:
        with pytest.raises(InputError, match=rf"process {os.getpid()} on node1 is training here"):
            FolderLock(tmp_path)
    else:
        FolderLock(tmp_path).release()
    first.released.set()


@pytest.mark.parametrize("lives", [True, False])
def test_without_locks_the_beat_tells(tmp_path, monkeypatch, lives):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "PATIENCE_S", 2.0)
    monkeypatch.setattr(lock, "SETTLED_S", 0.1)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    first = FolderLock(tmp_path)
    if not lives:
        first.released.set()
    with pytest.raises(InputError, match="is training here") if lives else contextlib.nullcontext():
        FolderLock(tmp_path).release()
    first.released.set()


def test_without_locks_the_last_of_two_has_the_folder(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / ".lock").write_text('{"host": "b", "pid": 7}'))
    with pytest.raises(InputError, match="process 7 on b is training here"):
        FolderLock(tmp_path)


# Many files, little shared memory.


def test_only_so_many_files_stay_open(tmp_path, monkeypatch):
    shards = tuple(write_shard(tmp_path, f"train/{i:05}.array_record", [make_clip(i, 6)]) for i in range(12))
    write_metadata(tmp_path, Metadata("squares", FRAME, 10.0, ("LEFT", "RIGHT"), {"train": shards}, {}))
    monkeypatch.setattr(data, "MAX_OPEN_SHARDS", 3)
    source = ClipSource(tmp_path, "train", 6)

    def still_open():
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(link.startswith(str(tmp_path)) for link in links)

    counts = []
    for i in [*range(12), *range(12)]:
        (clip,) = source.clips([i])
        np.testing.assert_array_equal(clip.frames_THWC, make_clip(i, 6).frames_THWC)
        counts.append(still_open())
    assert 1 <= max(counts) <= 4
    assert [clip.clip_id for clip in source.clips(range(12))] == [f"clip-{i}" for i in range(12)]


def test_the_limit_of_open_files_is_raised(monkeypatch):
    told = []
    monkeypatch.setattr(cli.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(cli.resource, "setrlimit", lambda _, limits: told.append(limits))
    cli.raise_file_limit()
    assert told == [(4096, 4096)]


def test_workers_need_shared_memory(dataset, monkeypatch):
    source = ClipSource(dataset, "train", 6)
    needed = 8 * 6 * (16 * 16 * 3 + 4) * 2 * 3  # clips, frames, bytes of each and its action, workers, batches of each
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_shared_memory(source, 8, 2)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"`num_workers` 2: .* of shared memory, /dev/shm has .*--shm-size"):
        check_shared_memory(source, 8, 2)


def test_workers_leave_nothing_behind(dataset, tmp_path):
    done = script("train_tokenizer", *TOKENIZER, *flags(dataset, tmp_path), "--num_workers", 2)
    assert "leaked" not in done.stderr
    assert "resource_tracker" not in done.stderr


WORKER = """
import multiprocessing, os, time
from utils import worker

def work():
    worker.begin_reading(0, 1)
    print(os.getpid(), flush=True)
    time.sleep(60)

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
"""


def test_a_worker_outlives_sigterm_and_not_its_training():
    training = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(training.stdout.readline())
    os.kill(worker, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(worker, 0)  # is there
    training.kill()
    training.wait(10)
    assert select.select([training.stdout], [], [], 10)[0]  # at its end, which the worker held open
    assert training.stdout.read() == ""


# Paths and caches.


def test_paths_know_the_home_folder_and_no_stores(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    found = cli.with_paths(TrainConfig(ckpt_dir="~/runs/a", data_dir="data", run_name="~/kept"))
    assert (found.ckpt_dir, found.data_dir, found.run_name) == ("/home/someone/runs/a", "data", "~/kept")
    assert found.compile_cache == "/home/someone/.cache/jafar"
    for address in ("gs://bucket/run", "s3://bucket/run"):
        with pytest.raises(InputError, match=rf"`ckpt_dir` {address}: must be a folder"):
            cli.with_paths(TrainConfig(ckpt_dir=address))


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("{tmp}/a", None, "{tmp}/a"),
        ("{tmp}/a", "{tmp}/other", "{tmp}/a"),
        ("~/.cache/jafar", "{tmp}/other", None),
        ("~/.cache/jafar", None, "{temporary}"),
        ("/proc/none/a", None, "{temporary}"),
    ],
)
def test_compiled_programs_go_where_they_can(tmp_path, monkeypatch, given, environment, expected):
    places = {"tmp": tmp_path, "temporary": Path(cli.tempfile.gettempdir()) / f"jafar-{os.getuid()}"}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if environment:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment.format(**places))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    cli.set_up_jax(given.format(**places))
    assert told.get("jax_compilation_cache_dir") == (expected and expected.format(**places))


def test_a_device_that_is_not_there_is_named(dataset, tmp_path):
    command = [sys.executable, "train_tokenizer.py", *TOKENIZER, *flags(dataset, tmp_path)]
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "JAX_PLATFORMS=cuda: there is no such device here" in refused(done)


# Logs.


def test_a_copied_folder_begins_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    ids = iter(["first", "second"])
    began = []
    wandb = SimpleNamespace(
        util=SimpleNamespace(generate_id=lambda: next(ids)),
        init=lambda **given: began.append(given["id"]) or SimpleNamespace(finish=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def run(folder):
        Wandb(folder, "", "", "", {}).close()
        return began[-1]

    (tmp_path / "a").mkdir()
    assert run(tmp_path / "a") == "first"
    assert run(tmp_path / "a") == "first"
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert run(tmp_path / "copy") == "second"
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run(tmp_path / "moved") == "first"


def test_wandb_without_a_key_is_refused_before_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(InputError, match="`log`: wandb has no API key"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()


# Longer trainings and averages.


def test_a_longer_training_says_that_its_rate_rises_again():
    cfg = TrainConfig(learning_rate=1e-3, warmup_steps=5, decay_steps=50)
    said = raised_rate(cfg, 100, 200, 99, [40, 80, 99])
    assert "--num_steps 200 instead of 100 raises the learning rate from 2e-05 to 0.001" in said
    assert "had begun to fall at step 50" in said
    assert "--schedule wsd" in said
    assert "take the checkpoints after 40 away" in said
    assert "keep some with --keep_every" in raised_rate(cfg, 100, 200, 99, [80, 99])
    assert raised_rate(cfg, 100, 200, 40, []) == ""  # the rate had not begun to fall
    assert raised_rate(cfg, 200, 200, 99, []) == ""
    assert raised_rate(cfg, 100, 200, 0, []) == ""


def test_the_codebook_is_averaged_with_the_encoder_that_it_follows():
    cfg = TokenizerConfig(
        frame_shape=FRAME, width=16, num_heads=2, num_blocks=1, patch_size=8, num_codes=8, code_width=4
    )
    state = TrainState.create(Tokenizer(cfg, Compute(), nnx.Rngs(0)), nnx.Param, optax.sgd(0.1), True)
    model = state.model()
    first = np.asarray(model.vq.sums_KL[...])
    model.vq.sums_KL[...] += 1.0
    model.vq.updates[...] += 7
    model.patch_in.kernel[...] += 1.0
    params, rest = state.split(nnx.state(model))
    state = dataclasses.replace(state, params=params, rest=rest).move_average(0.75)
    best = state.best_model()
    np.testing.assert_allclose(best.vq.sums_KL[...], first + 0.25, rtol=1e-6)
    assert best.vq.updates[...] == 7
    assert jnp.allclose(best.patch_in.kernel[...], model.patch_in.kernel[...] - 0.75)
    np.testing.assert_array_equal(state.model().vq.sums_KL[...], model.vq.sums_KL[...])
