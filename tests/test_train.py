"""The training scripts as users run them: what they leave behind, resume, what stays frozen, and clear refusals. At the
end, the parts of the clockwork one by one.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import sample
from models.errors import DivergenceError, InputError
from models.genie import KINDS, World, load_lam, load_tokenizer, load_world
from models.lam import LAMConfig
from models.nn import Compute
from models.stored import checkpoint_steps
from models.tokenizer import Tokenizer, TokenizerConfig
from sample import choose_actions, known_actions
from sources.images import read_image
from tests.conftest import (
    CACHE,
    FRAME,
    LAM,
    ROOT,
    SMALL,
    TOKENIZER,
    here,
    make_clip,
    make_dataset,
    on_devices,
    script,
)
from utils import progress
from utils.checkpoint import HARMLESS, SPOKEN_OF, CheckpointConfig, Checkpoints, write_config
from utils.cli import with_flags
from utils.data import ClipSource, batches
from utils.init_from import begin_with
from utils.logging import Files, Writers
from utils.metrics import perplexity, pooled_psnr, psnr, ssim, usage
from utils.progress import Profiler, Reporter, Speed, Waiting, checked
from utils.records import Metadata, write_metadata, write_shard
from utils.sharding import make_mesh
from utils.state import TrainState, apply_gradients
from utils.step import compile_step
from utils.train import TrainConfig
from utils.validation import Validation, read
from utils.video import label


def stored(path, step, item="model"):
    """An item of a checkpoint as {path: array}."""
    folder = path.absolute() / str(step) / item
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(folder, ocp.args.PyTreeRestore(shapes, restore_args=as_numpy))
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path):
    return {line["step"]: line["loss"] for line in lines(path) if "loss" in line}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def flags(dataset, folder, *more):
    shared = ["--data_dir", dataset, "--ckpt_dir", folder, "--num_steps", 6, "--log_interval", 1, "--val_interval", 3]
    return [*shared, "--checkpoint_interval", 3, "--compile_cache", CACHE, *more]


def test_each_training_leaves_what_the_readme_says(trained):
    for kind, metric in (("tokenizer", "val_psnr"), ("lam", "val_psnr_random_action"), ("world", "val_accuracy")):
        folder = trained[kind]
        assert checkpoint_steps(folder) == [3, 6]
        assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in lines(folder) if metric in line] == [3, 6]
        assert len(list((folder / "images").glob("*.png"))) == 2
        config = json.loads((folder / "config.json").read_text())
        assert config["kind"] == kind
        assert config["versions"]["jax"] == jax.__version__
        assert not list(folder.rglob("*tmp*"))


def test_checkpoints_load_by_path_alone(trained):
    tokenizer, lam, world = (
        load_tokenizer(trained["tokenizer"]),
        load_lam(trained["lam"]),
        load_world(trained["world"]),
    )
    frames = jax.random.uniform(jax.random.key(0), (1, 4, 16, 16, 3))
    np.testing.assert_array_equal(world.tokenizer.encode(frames), tokenizer.encode(frames))
    np.testing.assert_array_equal(world.infer_actions(frames), lam.infer(frames))


def test_frozen_parts_stay_bit_identical_and_are_in_no_optimizer(trained):
    world = stored(trained["world"], 6)
    for part in ("tokenizer", "lam"):
        before = {f"['{part}']{name}": value for name, value in stored(trained[part], 6).items()}
        assert_same(before, {name: value for name, value in world.items() if name.startswith(f"['{part}']")})
    moved = stored(trained["world"], 3)
    assert any(np.any(moved[n] != world[n]) for n in world if n.startswith("['dynamics']"))
    in_optimizer = stored(trained["world"], 6, "optimizer")
    assert any("dynamics" in name for name in in_optimizer)
    assert not any("tokenizer" in name or "lam" in name for name in in_optimizer)


@pytest.mark.parametrize("kind", ["tokenizer", "lam", "world"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, trained, dataset, tmp_path):
    """Bit for bit: losses, parameters, optimizer, codebooks and their counters."""
    folder = tmp_path / kind
    shutil.copytree(trained[kind], folder)
    shutil.rmtree(folder / "6")  # as if stopped after step 3, with two more steps already logged
    if kind == "world":
        name, model = "train_dynamics", [*SMALL, "--lam_checkpoint", trained["lam"]]
        model += ["--tokenizer_checkpoint", trained["tokenizer"]]
    else:
        name, model = f"train_{kind}", TOKENIZER if kind == "tokenizer" else LAM
    done = script(name, *model, *flags(dataset, folder))  # in another process
    assert "at step 3" in done.stdout
    assert losses(folder) == losses(trained[kind])
    assert [line["step"] for line in lines(folder)] == [line["step"] for line in lines(trained[kind])]
    for item in ("model", "optimizer"):
        assert_same(stored(folder, 6, item), stored(trained[kind], 6, item))


def test_a_world_with_a_lam_trained_along_and_one_with_true_actions(trained, dataset, tmp_path):
    parts = ["--tokenizer_checkpoint", trained["tokenizer"], "--num_steps", 3]
    lam = ["--lam.width", 16, "--lam.num_heads", 2, "--lam.num_blocks", 1, "--lam.patch_size", 8, "--lam.num_codes", 3]
    here("train_dynamics", *SMALL, *flags(dataset, tmp_path / "co"), *parts, *lam)
    before, after = stored(tmp_path / "co", 3), load_world(tmp_path / "co")
    assert after.num_actions == 3
    assert any("lam" in name for name in stored(tmp_path / "co", 3, "optimizer"))
    tokenizer = {f"['tokenizer']{n}": v for n, v in stored(trained["tokenizer"], 6).items()}
    assert_same(tokenizer, {n: v for n, v in before.items() if n.startswith("['tokenizer']")})
    assert "lam_loss" in lines(tmp_path / "co")[0]

    here("train_dynamics", *SMALL, *flags(dataset, tmp_path / "gt"), *parts, "--use_gt_actions")
    world = load_world(tmp_path / "gt")
    assert world.lam is None
    assert world.num_actions == 2
    here("sample", "--checkpoint", tmp_path / "gt", "--actions", "true", "--steps", 2, "--num_clips", 2)


@pytest.mark.parametrize("kind", ["causal", "maskgit_head"])
def test_another_kind_of_world_trains_resumes_and_plays(trained, dataset, tmp_path, kind):
    parts = ["--tokenizer_checkpoint", trained["tokenizer"], "--lam_checkpoint", trained["lam"]]
    other = [*SMALL, *parts, "--model.kind", kind]
    here("train_dynamics", *other, *flags(dataset, tmp_path / "world"))
    whole = stored(tmp_path / "world", 6)
    shutil.rmtree(tmp_path / "world" / "6")
    script("train_dynamics", *other, *flags(dataset, tmp_path / "world"))  # in another process
    assert_same(stored(tmp_path / "world", 6), whole)
    done = here("sample", "--checkpoint", tmp_path / "world", "--num_frames", 9, "--num_clips", 2)
    assert len(done.stdout.splitlines()) == 12


def test_stored_tokens_give_the_loss_of_the_frames(trained, tmp_path):
    """With clips of exactly seq_len frames both ways see the same windows in the same order."""
    frames = tmp_path / "frames"
    splits = {
        split: tuple(
            write_shard(frames, f"{split}/{i}.array_record", [make_clip(100 * k + 10 * i + j, 6) for j in range(9)])
            for i in range(2)
        )
        for k, split in enumerate(("train", "val"))
    }
    write_metadata(frames, Metadata("squares", FRAME, 10.0, ("LEFT", "RIGHT"), splits, {}))
    parts = ["--tokenizer_checkpoint", trained["tokenizer"], "--lam_checkpoint", trained["lam"]]
    tokens = tmp_path / "tokens"
    making = ["preprocess_dataset", "tokens", *parts, "--data_dir", frames, "--output_dir", tokens]
    done = script(*making, "--seq_len", 6, "--batch_size", 8)
    assert "36 clips of 6 frames as tokens" in done.stdout
    for name, data in (("plain", frames), ("stored", tokens)):
        here("train_dynamics", *SMALL, *parts, *flags(data, tmp_path / name))
    # Such a world is sampled from the frames behind its tokens.
    here("sample", "--checkpoint", tmp_path / "stored", "--steps", 1, "--num_clips", 2)
    assert (tmp_path / "stored" / "samples" / "rollout.gif").exists()
    plain, stored_ = losses(tmp_path / "plain"), losses(tmp_path / "stored")
    assert plain.keys() == stored_.keys()
    np.testing.assert_allclose(list(stored_.values()), list(plain.values()), rtol=1e-4)
    for name in stored(tmp_path / "plain", 6):
        if name.startswith("['dynamics']"):
            a, b = (stored(tmp_path / run, 6)[name] for run in ("plain", "stored"))
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=name)

    refused = {
        "made with another tokenizer": ["train_dynamics", *SMALL, *flags(tokens, tmp_path / "other"), *parts[2:],
                                        "--tokenizer_checkpoint", another_tokenizer(trained, tmp_path)],
        "no LAM can be trained along": ["train_dynamics", *SMALL, *flags(tokens, tmp_path / "other"), *parts[:2]],
        "have 6 frames": ["train_dynamics", *SMALL, *flags(tokens, tmp_path / "other"), *parts, "--seq_len", 5],
        "tokens without frames": ["train_tokenizer", *TOKENIZER, *flags(tokens, tmp_path / "other")],
        "holds a dataset already": making,
    }  # fmt: skip
    for message, command in refused.items():
        run = script if command is making else here
        done = run(*command, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def another_tokenizer(trained, tmp_path):
    """The same training, one checkpoint earlier: other weights."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained["tokenizer"], folder)
    shutil.rmtree(folder / "6")
    return folder


def test_rerunning_a_finished_training_does_nothing_and_more_steps_continue_it(trained, dataset, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(trained["tokenizer"], folder)
    done = here("train_tokenizer", *TOKENIZER, *flags(dataset, folder))
    assert "already at step 6" in done.stdout
    assert losses(folder) == losses(trained["tokenizer"])
    here("train_tokenizer", *TOKENIZER, *flags(dataset, folder), "--num_steps", 8)
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(stop, trained, dataset, tmp_path):
    command = [sys.executable, "train_tokenizer.py", *TOKENIZER, *flags(dataset, tmp_path)]
    command += ["--num_steps", "100000", "--val_interval", "100000", "--checkpoint_interval", "100000"]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists() or len(lines(tmp_path)) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped by a signal after step" in output
    assert checkpoint_steps(tmp_path) == [max(losses(tmp_path))]


def refused(done):
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert errors[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    return errors[-1]


def test_a_nan_loss_stops_before_anything_is_overwritten(dataset, tmp_path):
    wild = ["--learning_rate", 1e30, "--warmup_steps", 0, "--checkpoint_interval", 1, "--grad_clip", 0]
    message = refused(here("train_tokenizer", *TOKENIZER, *flags(dataset, tmp_path), *wild, check=False))
    assert any(name in message for name in ("loss is", "grad_norm is", "param_norm is"))
    steps = checkpoint_steps(tmp_path)
    assert steps
    assert f"Checkpoints up to step {steps[-1]} are good" in message
    for step in steps:
        for name, value in stored(tmp_path, step).items():
            assert np.all(np.isfinite(value)), (step, name)
    again = flags(dataset, tmp_path / "again")
    found = script("train_tokenizer", *TOKENIZER, *again, *wild, "--debug_nans", check=False)
    assert "FloatingPointError: invalid value (nan) encountered in" in found.stderr


def test_bad_input_is_refused_in_one_line(trained, dataset, tmp_path):
    small = make_dataset(tmp_path / "small", shape=(8, 8, 3), clips=4)
    cases = [
        ("train_tokenizer", [*TOKENIZER, "--data_dir", tmp_path / "none"], "none: no dataset here"),
        ("train_tokenizer", ["--preset", "huge"], "--preset huge"),
        ("train_tokenizer", [*TOKENIZER, *flags(dataset, trained["tokenizer"]), "--model.num_codes", 64], "num_codes"),
        ("train_lam", [*LAM, *flags(dataset, trained["tokenizer"])], "holds a tokenizer, not a lam"),
        ("train_tokenizer", [*TOKENIZER, *flags(dataset, tmp_path / "a"), "--fsdp", 2], "--fsdp 2"),
        ("train_dynamics", [*SMALL, *flags(dataset, tmp_path / "b"), "--tokenizer_checkpoint", trained["lam"]],
         "holds a lam, but a tokenizer is needed"),
        ("train_dynamics", [*SMALL, *flags(dataset, tmp_path / "c"), "--tokenizer_checkpoint", tmp_path / "no"],
         "no checkpoint here"),
        ("train_dynamics", [*SMALL, *flags(small, tmp_path / "d"), "--tokenizer_checkpoint", trained["tokenizer"]],
         "made for frames of (16, 16, 3)"),
        ("sample", ["--checkpoint", trained["lam"]], "holds a lam, but a world is needed"),
        ("sample", ["--checkpoint", trained["world"], "--actions", "0,9"], "this world has the actions 0 to 2"),
        ("sample", ["--checkpoint", trained["world"], "--prompt_frames", 6], "--prompt_frames 6: must be from 1 to 5"),
        ("sample", ["--checkpoint", trained["world"], "--num_frames", 90], "--num_frames 90: the longest clip"),
    ]  # fmt: skip
    for name, given, message in cases:
        assert message in refused(here(name, *given, check=False)), given
    assert checkpoint_steps(trained["tokenizer"]) == [3, 6]


def test_a_world_resumes_with_the_parts_that_it_began_with(trained, dataset, tmp_path):
    tokenizer, world = tmp_path / "tokenizer", tmp_path / "world"
    for name in ("tokenizer", "world"):
        shutil.copytree(trained[name], tmp_path / name)
        shutil.rmtree(tmp_path / name / "6")
    resume = ["train_dynamics", *SMALL, *flags(dataset, world)]
    other = here(*resume, "--tokenizer_checkpoint", tokenizer, "--lam_checkpoint", trained["lam"], check=False)
    assert "parts.tokenizer: stored" in refused(other)
    lam = ["--lam.width", 16, "--lam.num_heads", 2, "--lam.num_blocks", 1, "--lam.patch_size", 8, "--lam.num_codes", 3]
    none = here(*resume, "--tokenizer_checkpoint", trained["tokenizer"], *lam, check=False)
    assert "parts.lam: stored" in refused(none)
    assert checkpoint_steps(world) == [3]


def test_a_batch_that_the_devices_do_not_divide_is_refused(dataset, tmp_path):
    done = script("train_tokenizer", *TOKENIZER, *flags(dataset, tmp_path), devices=3, check=False)
    assert "--batch_size 8: must be a multiple of the 3 devices" in refused(done)


def test_sample_writes_videos_a_strip_and_a_table(trained, tmp_path):
    for actions in ("inferred", "random", "0,1"):
        out = tmp_path / actions
        done = here("sample", "--checkpoint", trained["world"], "--actions", actions, "--steps", 2, "--output_dir", out)
        assert {p.name for p in out.iterdir()} >= {"rollout.gif", "rollout.mp4", "rollout.png"}
        assert (out / "rollout.json").exists() == (actions == "inferred")
    table = json.loads((tmp_path / "inferred" / "rollout.json").read_text())
    assert len(table["psnr"]) == 5
    assert "wrote" in done.stdout
    here("sample", "--checkpoint", trained["world"], "--actions", "sweep", "--steps", 2, "--output_dir", tmp_path)
    H, W, _ = label(np.zeros((32, 32, 3), np.uint8), "").shape  # a frame, doubled
    assert read_image(tmp_path / "sweep.png").shape == (3 * H + 2 * 2, 6 * W + 5 * 2, 3)  # three actions, six frames
    here("sample", "--checkpoint", trained["world"], "--actions", "1", "--num_frames", 20, "--output_dir", tmp_path,
         "--num_clips", 2)  # fmt: skip


def test_given_actions_begin_after_the_prompt(trained, dataset):
    world = load_world(trained["world"])
    clips = next(batches(ClipSource(str(dataset), "val", 6), 2, 0))
    inferred = np.asarray(world.infer_actions(jnp.asarray(clips.frames_BTHWC, jnp.float32) / 255))
    np.testing.assert_array_equal(known_actions(world, clips, 2), inferred[:, :2])
    given = sample.Config(actions="0,2", prompt_frames=3)
    np.testing.assert_array_equal(choose_actions(given, world, clips, (), 3), [[0, 2, 0]] * 2)
    as_inferred = sample.Config(prompt_frames=3)
    np.testing.assert_array_equal(choose_actions(as_inferred, world, clips, (), 3), inferred[:, 2:5])


SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
HELP = """if True:
    import runpy
    import sys

    for name in sys.argv[1:]:
        sys.argv = [f"{name}.py", "--help"]
        print(f"\\f{name}", flush=True)
        try:
            runpy.run_path(f"{name}.py", run_name="__main__")
        except SystemExit as stopped:
            print(f"\\f{stopped.code or 0}", flush=True)
"""


@pytest.fixture(scope="module")
def helped():
    """What each script answers to --help, with its exit status; by one process, since imports take most of the time."""
    command = [sys.executable, "-c", HELP, *SCRIPTS]
    env = os.environ | on_devices(1)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.split("\f")[1:]  # in turns what a script says after its name, and its status
    answers = [text.partition("\n") for text in told[::2]]
    return {name: (text, status.strip()) for (name, _, text), status in zip(answers, told[1::2], strict=True)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(name, helped):
    text, status = helped[name]
    assert status == "0"
    # At the left, behind a box's side where one is drawn; explanations are indented.
    flags_ = re.split(r"\n\W{0,2}(?=--[a-z])", text.partition("-h, --help")[2])[1:]
    assert len(flags_) >= 2
    for flag in flags_:
        # After the flag's name and type there are words, and not its default alone.
        explained = re.sub(r"^\S+( \{.*?\}| \[.*?\]| [A-Z|]+)*|\(default:.*?\)", "", flag, flags=re.DOTALL)
        assert len(re.findall(r"[A-Za-z]{2,}", explained)) >= 2, flag


def linear_state(seed=0, ema=True):
    return TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)), nnx.Param, optax.adam(0.1), ema)


def test_a_restored_state_is_the_saved_one(tmp_path):
    """The moving average too, which differs from the parameters."""
    cfg, state = TrainConfig(ema_decay=0.5), linear_state()
    for _ in range(2):
        state, _ = apply_gradients(state, jax.tree.map(jnp.ones_like, state.params), cfg)
        state = state.move_average(cfg.ema_decay)
    write_config(tmp_path, "tokenizer", TokenizerConfig(), cfg)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    meta = {"step": 2, "batch": 2, "seed": 0}
    checkpoints.save(state, meta, None)
    checkpoints.close()
    restored, told = Checkpoints(tmp_path, CheckpointConfig()).restore(linear_state(seed=1), make_mesh())
    assert told == meta
    for name in ("params", "rest", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(restored, name), getattr(state, name))
    assert np.any(restored.ema["kernel"][...] != restored.params["kernel"][...])


CURVE = {
    *("optimizer", "learning_rate", "schedule", "warmup_steps", "decay_steps", "final_learning_rate", "beta1", "beta2"),
    *("weight_decay", "grad_clip", "ema_decay", "batch_size", "seq_len", "grad_accum", "seed", "dtype", "quant"),
    *("pad_short", "windows_per_clip"),
}
"""Flags that change what is learned: no resumed run may change them."""


def test_flags_that_change_the_curve_are_refused_on_resume_and_others_are_not(tmp_path):
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= CURVE | HARMLESS | SPOKEN_OF
    cfg = TrainConfig()
    write_config(tmp_path, "tokenizer", TokenizerConfig(), cfg)
    (tmp_path / "1" / "model").mkdir(parents=True)  # what counts as a checkpoint
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        other = (
            {"wsd": "cosine", "float32": "bfloat16"}.get(value, "other") if isinstance(value, str) else 2 * value + 1
        )
        changed = TrainConfig()
        object.__setattr__(changed, field.name, other)  # without the checks of what is allowed
        if field.name in CURVE:
            with pytest.raises(InputError, match=rf"train\.{field.name}: stored .*, given {other}"):
                write_config(tmp_path, "tokenizer", TokenizerConfig(), changed)
        else:
            write_config(tmp_path, "tokenizer", TokenizerConfig(), changed)
            write_config(tmp_path, "tokenizer", TokenizerConfig(), cfg)
    with pytest.raises(InputError, match=r"model\.width: stored 512, given 64"):
        write_config(tmp_path, "tokenizer", TokenizerConfig(width=64), cfg)


def test_a_resumed_curve_has_no_doubles_and_no_torn_line(tmp_path):
    first = Files(tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1.0 / step})
    first.close()
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    again = Files(tmp_path, 3)
    for line in whole[3:]:
        again.scalars(line["step"], {"loss": line["loss"]})
    again.close()
    assert lines(tmp_path) == whole


def test_metrics_on_known_values():
    codes = jnp.array([[0, 0], [1, 2]])
    assert usage(codes, 6) == pytest.approx(3 / 6)
    assert perplexity(codes, 6) == pytest.approx(2**1.5)  # an entropy of 1.5 bits
    assert perplexity(jnp.arange(6), 6) == pytest.approx(6)
    # Two videos of three frames; in the second frame one is off by 0.1, in the third both are, by 0.1 and 0.2.
    truth = jnp.full((2, 3, 16, 16, 3), 0.5)
    seen = truth.at[0, 1].add(0.1).at[0, 2].add(0.1).at[1, 2].add(0.2)
    np.testing.assert_allclose(psnr(seen, truth), [[60, 20, 20], [60, 60, 20 * np.log10(5)]], rtol=1e-4)
    np.testing.assert_allclose(pooled_psnr(seen, truth), [60, -10 * np.log10(0.005), -10 * np.log10(0.025)], rtol=1e-4)
    # Of flat images structural similarity leaves the means' term alone.
    a, b, c1 = 0.5, np.array([[0.5, 0.6, 0.6], [0.5, 0.5, 0.7]]), 0.01**2
    np.testing.assert_allclose(ssim(seen, truth), (2 * a * b + c1) / (a**2 + b**2 + c1), rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class Nested:
    seed: int = 0
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    lam: LAMConfig = dataclasses.field(default_factory=LAMConfig)


def test_fields_in_messages_become_the_flags_that_set_them():
    message = "`width` 3 and `seed` 4: not `this`"
    assert with_flags(InputError(message), Nested) == "`width` 3 and --seed 4: not `this`"
    assert with_flags(InputError(message, of=LAMConfig), Nested) == "--lam.width 3 and --seed 4: not `this`"
    assert with_flags(InputError(message, of=TokenizerConfig), Nested) == "--tokenizer.width 3 and --seed 4: not `this`"


class Recorder(Writers):
    """Remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def scalars(self, step, values):
        self.told.append((step, values))


def reported(last_step, loss=lambda step: 1.0 / step):
    recorder = Recorder()
    reporter = Reporter(recorder, Speed(4, 1e12, "float32", Waiting()), 4, last_step)
    for step in range(1, last_step + 1):
        reporter.take(step, checked({"loss": jnp.float32(loss(step)), "grad_norm": jnp.float32(1)}))
        assert all(told < step for told, _ in recorder.told)  # one step late, so that nobody waits
    reporter.flush()
    return recorder.told


def test_metrics_are_told_at_intervals_and_at_the_last_step():
    told = reported(10)
    assert [(step, values["loss"]) for step, values in told] == [(s, pytest.approx(1 / s)) for s in (4, 8, 10)]
    assert "steps_per_s" not in told[0][1]
    assert "steps_per_s" in told[1][1]


@pytest.mark.parametrize("bad", [3, 4, 5])
def test_the_first_number_that_is_not_finite_stops_a_training(bad):
    with pytest.raises(DivergenceError, match=f"step {bad}: loss is nan") as raised:
        reported(5, lambda step: np.nan if step >= bad else 1.0)
    assert (raised.value.step, raised.value.name) == (bad, "loss")


def test_between_its_lines_one_value_is_fetched():
    class Fetched:
        def __init__(self, value):
            self.value, self.times = value, 0

        def __float__(self):
            self.times += 1
            return self.value

        __bool__ = lambda self: bool(float(self))

    reporter = Reporter(Recorder(), Speed(4, 1e12, "float32", Waiting()), 2, 9)
    steps = [{"loss": Fetched(1.0), "finite": Fetched(1.0)} for _ in range(3)]
    for step, metrics in enumerate(steps, start=1):
        reporter.take(step, metrics)
    reporter.flush()
    assert [metrics["finite"].times for metrics in steps] == [1, 1, 1]
    assert [metrics["loss"].times for metrics in steps] == [0, 1, 0]


def test_speed_and_the_share_of_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    waiting = Waiting()
    speed = Speed(8, 5e12, "float32", waiting)

    def spend(seconds, waits):
        with waiting:
            now[0] += waits
        now[0] += seconds - waits

    spend(50, 20)  # compiling
    assert speed.rates(1) == {}
    spend(3, 1)
    spend(5, 3)
    expected = {"steps_per_s": 0.5, "clips_per_s": 4.0, "data_wait": 0.5, "tflops_per_s": 2.5}
    assert speed.rates(5) == pytest.approx(expected)
    spend(100, 10)  # a validation
    speed.restart(5)
    spend(10, 1)
    assert speed.rates(15) == pytest.approx({"steps_per_s": 1, "clips_per_s": 8, "data_wait": 0.1, "tflops_per_s": 5})


def test_a_trace_holds_steps_ten_to_fifteen(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    for wanted in (False, True):
        profiler = Profiler(wanted, tmp_path)
        for step in range(1, 21):
            profiler.after(step)
            calls.append(step)
    assert calls[20:] == [*range(1, 10), ("start", str(tmp_path / "profile")), *range(10, 15), "stop", *range(15, 21)]
    assert calls[:20] == list(range(1, 21))


def test_each_step_has_its_own_key_and_the_same_one_after_a_restart():
    cfg, mesh = TrainConfig(seed=3), make_mesh()
    train_step = lambda state, batch, key: (state, {"drawn": jax.random.uniform(key)})

    def drawn(steps):
        state, batch, numbers = linear_state(), jnp.zeros(2), []
        step_fn, *_ = compile_step(cfg, mesh, train_step, state, batch)
        for step in steps:
            state, metrics = step_fn(state, batch, np.int32(step))
            numbers.append(float(metrics["drawn"]))
        return numbers

    first = drawn(range(4))
    assert len(set(first)) == 4
    assert drawn([2, 3]) == first[2:]


def test_a_validation_looks_at_the_moving_average_and_at_the_same_batches(dataset):
    cfg, mesh = TrainConfig(batch_size=4, seq_len=6, val_batches=3, seed=5), make_mesh()
    source = ClipSource(dataset, "val", 6)

    def evaluate(model, batch, key):
        frames = batch.frames_BTHWC.astype(jnp.float32) / 255
        return {"kernel": jnp.mean(model.kernel[...]), "frames": jnp.mean(frames)}, frames[:1]

    state = dataclasses.replace(linear_state(), ema=jax.tree.map(lambda x: x + 7, linear_state().params))
    validate = Validation(cfg, mesh, evaluate, source)
    metrics, picture = validate(state)
    assert metrics["val_kernel"] == pytest.approx(float(jnp.mean(state.params["kernel"][...])) + 7)
    stream = read(dataclasses.replace(cfg, seed=cfg.seed + 1), mesh, source, 0)
    clips = [np.asarray(next(stream).frames_BTHWC) for _ in range(3)]
    assert metrics["val_frames"] == pytest.approx(np.mean(clips) / 255, rel=1e-5)
    assert any(np.array_equal(picture[:16, :16], frame) for frame in clips[0][0])
    again, same = validate(state)
    assert again == metrics
    np.testing.assert_array_equal(same, picture)
    with_params, _ = validate(dataclasses.replace(state, ema=None))
    assert with_params["val_kernel"] == pytest.approx(metrics["val_kernel"] - 7, abs=1e-5)


def variables(model):
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("kind", ["tokenizer", "lam"])
def test_a_training_begins_with_the_part_of_a_world(kind, trained):
    """Codebook and counters too, so that what was learned is not thrown away again."""
    part = {"tokenizer": load_tokenizer, "lam": load_lam}[kind](trained["world"])
    of_its_own = {"tokenizer": load_tokenizer, "lam": load_lam}[kind](trained[kind])
    assert_same(variables(part), variables(of_its_own))
    new = KINDS[kind][0](part.cfg, Compute(), nnx.Rngs(7))
    told = begin_with(str(trained["world"]), new, variables(new).keys())
    assert_same(variables(new), variables(part))
    assert told.endswith("none is new")
    assert int(new.vq.updates[...]) == 6


def test_a_world_begins_with_another_and_new_embeddings_where_actions_differ(trained):
    other = load_world(trained["world"])
    cfg = dataclasses.replace(other.cfg, dynamics=dataclasses.replace(other.cfg.dynamics, num_actions=2), lam=None)
    world = World(cfg, Compute(), nnx.Rngs(7))
    nnx.update(world.tokenizer, nnx.state(other.tokenizer))
    before = variables(world)
    told = begin_with(str(trained["world"]), world, ["dynamics"])
    after, theirs = variables(world), variables(other)
    assert told.endswith("new: action_embedding 3×16, there 4×16")
    new = {name for name in after if name == "dynamics/action_embedding"}
    assert_same({n: after[n] for n in new}, {n: before[n] for n in new})
    taken = {n for n in after if n.startswith("dynamics/")} - new
    assert_same({n: after[n] for n in taken}, {n: theirs[n] for n in taken})


def test_what_is_frozen_is_not_taken_and_foreign_codes_keep_their_embeddings(trained):
    other = load_world(trained["world"])
    world = World(other.cfg, Compute(), nnx.Rngs(7))
    nnx.update(world.tokenizer, nnx.state(other.tokenizer))
    turned = world.tokenizer.vq.sums_KL[...]
    world.tokenizer.vq.sums_KL[...] = turned.at[:5].multiply(-1.0)  # five codes that say something else
    before = variables(world)
    told = begin_with(str(trained["world"]), world, ["dynamics"])
    after, theirs = variables(world), variables(other)
    frozen = {n for n in after if not n.startswith("dynamics/")}
    assert_same({n: after[n] for n in frozen}, {n: before[n] for n in frozen})
    assert told.endswith("the embeddings of 5 of 32 codes, which differ, are new")
    table = "dynamics/token_embedding"
    np.testing.assert_array_equal(after[table][:5], before[table][:5])
    np.testing.assert_array_equal(after[table][5:], theirs[table][5:])


def test_a_model_that_does_not_fit_is_refused(trained):
    other = load_tokenizer(trained["tokenizer"])
    for changes, message in (
        ({"frame_shape": (8, 8, 3)}, r"made for frames of \(16, 16, 3\), but the dataset has \(8, 8, 3\)"),
        ({"width": 32, "unquantized_steps": 9}, r"its tokenizer is built otherwise \(width: there 16, here 32\)"),
    ):
        model = Tokenizer(dataclasses.replace(other.cfg, **changes), Compute(), nnx.Rngs(0))
        with pytest.raises(InputError, match=message):
            begin_with(str(trained["tokenizer"]), model, [])
    with pytest.raises(InputError, match="holds a lam, but a tokenizer is needed"):
        begin_with(str(trained["lam"]), Tokenizer(other.cfg, Compute(), nnx.Rngs(0)), [])


def test_trainings_begin_with_a_checkpoint_and_resume_without_it(trained, dataset, tmp_path):
    """A LAM with one action more, from the world; then a world on this LAM, from the world."""
    copy = tmp_path / "world"
    shutil.copytree(trained["world"], copy)
    lam = [*LAM, *flags(dataset, tmp_path / "lam"), "--num_steps", 2, "--model.num_codes", 4]
    done = here("train_lam", *lam, "--init_from", copy)
    assert f"begins with {copy}: " in done.stdout
    assert "sums_KL 4×4, there 3×4" in done.stdout
    begun = {name: value for name, value in stored(tmp_path / "lam", 2).items() if "updates" in name}
    assert [int(value) for value in begun.values()] == [8]
    parts = ["--tokenizer_checkpoint", trained["tokenizer"], "--lam_checkpoint", tmp_path / "lam", "--num_steps", 2]
    world = [*SMALL, *flags(dataset, tmp_path / "new"), *parts]
    done = here("train_dynamics", *world, "--init_from", copy)
    assert "values of the dynamics taken, new: action_embedding 5×16, there 4×16" in done.stdout
    shutil.rmtree(copy)
    for name, command in (("new", ["train_dynamics", *world]), ("lam", ["train_lam", *lam])):
        done = script(*command, "--num_steps", 3)  # in another process
        assert "at step 2" in done.stdout
        assert "begins with" not in done.stdout
        assert json.loads((tmp_path / name / "config.json").read_text())["train"]["init_from"] == str(copy)
