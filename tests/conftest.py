"""Fixtures that are dear to make, shared by the tests: a tiny dataset, tiny models, a compile cache."""

import contextlib
import fcntl
import importlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("JAFAR_TEST_CACHE", ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# A model that is called without jit compiles its scan anew at each call, in less than the second from which on JAX
# would cache that.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# A shell that starts tests in the background has them, and what they start, ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests compile much and compute little: with LLVM's optimizations off a training script takes two thirds of the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax  # noqa: E402 (the cache is set before)

from tests import shapes  # noqa: E402 (the cache is set before)
from utils import cli  # noqa: E402
from utils.records import Clip, Metadata, write_metadata, write_shard  # noqa: E402

# XLA's emitter of fused kernels for CPUs takes half of the time in which it compiles; jax 0.11 has no other.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"

shapes.install()
jax.config.update("jax_numpy_rank_promotion", "allow")

FRAME = (16, 16, 3)


def make_clip(seed: int, length: int, shape: tuple[int, int, int] = FRAME) -> Clip:
    """A bright square that moves left or right, as the action says, on a dim pattern."""
    rng = np.random.default_rng(seed)
    H, W, C = shape
    actions = rng.integers(0, 2, length).astype(np.int32)
    frames = np.empty((length, H, W, C), np.uint8)
    background = rng.integers(0, 60, (H, W, C))
    x = int(rng.integers(0, W))
    for t in range(length):
        frames[t] = background
        frames[t, H // 2 : H // 2 + 4, [(x + i) % W for i in range(4)]] = 250
        x += 2 if actions[t] else -2
    rewards = np.zeros(length, np.float32)
    return Clip(frames, f"clip-{seed}", actions, rewards, level_seed=seed)


def make_dataset(folder: Path, shape: tuple[int, int, int] = FRAME, clips: int = 24, actions: bool = True) -> Path:
    """A dataset of a few clips of 6 to 12 frames in each split."""
    splits = {}
    for i, split in enumerate(("train", "val", "test")):
        made = [make_clip(1000 * i + j, 6 + j % 7, shape) for j in range(clips)]
        if not actions:
            made = [Clip(clip.frames_THWC, clip.clip_id) for clip in made]
        splits[split] = (
            write_shard(folder, f"{split}/00000.array_record", made[::2]),
            write_shard(folder, f"{split}/00001.array_record", made[1::2]),
        )
    names = ("LEFT", "RIGHT") if actions else None
    write_metadata(folder, Metadata("squares", shape, 10.0, names, splits, {}))
    return folder


@pytest.fixture(autouse=True)
def same_flags(monkeypatch):
    """A measurement adds a flag for GPUs to XLA's. It goes with its test, for programs are cached by their flags."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


def once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of pytest-xdist's workers to ask for it makes, for all of them; nobody writes into it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers' folders
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that did not come to its end
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return once(tmp_path_factory, "dataset", make_dataset)


MODEL = ["--model.width", "16", "--model.num_heads", "2", "--model.num_blocks", "1"]
SMALL = ["--preset", "tiny", "--batch_size", "8", "--seq_len", "6", "--val_batches", "2", *MODEL]
CODES = ["--model.unquantized_steps", "2"]  # so that a few steps see both phases
TOKENIZER = [*SMALL, *CODES, "--model.patch_size", "4", "--model.num_codes", "32", "--model.code_width", "8"]
LAM = [*SMALL, *CODES, "--model.patch_size", "8", "--model.num_codes", "3", "--model.code_width", "4"]


def on_devices(devices: int) -> dict[str, str]:
    """What the environment of a process says that is to see so many fake CPU devices."""
    return {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}


def script(
    name: str, *flags: object, devices: int = 1, check: bool = True, largest_file: int = 0
) -> subprocess.CompletedProcess:
    """Runs one of the scripts as a user would, on `devices` fake CPU devices; writing more to one file may fail."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))) if largest_file else None
    done = subprocess.run(
        [sys.executable, f"{name}.py", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | on_devices(devices),
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=limit,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def here(name: str, *flags: object, check: bool = True) -> subprocess.CompletedProcess:
    """The same in this process, which has imported and compiled most of it already.

    A process of its own does it where this one would compute on another device than `script`.
    """
    if [device.platform for device in jax.devices()] != ["cpu"]:
        return script(name, *flags, check=check)
    module, argv = importlib.import_module(name), [f"{name}.py", *map(str, flags)]
    told, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(errors),
        contextlib.chdir(ROOT),
    ):
        try:
            cli.run(module.main, module.Config, getattr(module, "PRESETS", None))
            status = 0
        except SystemExit as stopped:
            status = stopped.code
    done = subprocess.CompletedProcess(argv, status, told.getvalue(), errors.getvalue())
    assert not check or status == 0, done.stdout + done.stderr
    return done


def train(root: Path, dataset: Path) -> None:
    """Trains a tokenizer, a LAM and a world for a few steps."""
    shared = ["--data_dir", dataset, "--num_steps", 6, "--log_interval", 1, "--val_interval", 3]
    shared += ["--checkpoint_interval", 3, "--compile_cache", CACHE]
    here("train_tokenizer", *TOKENIZER, "--ckpt_dir", root / "tokenizer", *shared)
    here("train_lam", *LAM, "--ckpt_dir", root / "lam", *shared)
    parts = ["--tokenizer_checkpoint", root / "tokenizer", "--lam_checkpoint", root / "lam"]
    here("train_dynamics", *SMALL, "--ckpt_dir", root / "world", *parts, *shared)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, dataset) -> dict[str, Path]:
    """Folders of a tokenizer, a LAM and a world, each trained for a few steps by its script.

    Each worker has copies of its own: evaluate.py writes labels of actions into them, and trainings lock them.
    """
    made = once(tmp_path_factory, "trained", lambda root: train(root, dataset))
    root = shutil.copytree(made, tmp_path_factory.mktemp("trained"), dirs_exist_ok=True)
    return {name: root / name for name in ("tokenizer", "lam", "world")}


@pytest.fixture
def source(tmp_path):
    """An empty folder for what preprocess_dataset.py is to read."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"
