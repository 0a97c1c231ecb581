"""Checkpoints in process: which ones stay, what is refused, what a failure tells, and where a new training begins."""

import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from models.errors import InputError
from models.stored import checkpoint_steps
from models.tokenizer import TokenizerConfig
from utils.checkpoint import CheckpointConfig, Checkpoints, write_config
from utils.sharding import make_mesh
from utils.state import TrainState
from utils.train import TrainConfig, restore_or_make


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=rngs)


@pytest.fixture
def state() -> TrainState:
    return TrainState.create(linear(nnx.Rngs(0)), nnx.Param, optax.sgd(0.1), False)


def open_checkpoints(folder, **cfg) -> Checkpoints:
    write_config(folder, "tokenizer", TokenizerConfig(), TrainConfig())
    return Checkpoints(folder, CheckpointConfig(**cfg))


@pytest.mark.parametrize(("metric", "best"), [("val_psnr", 2), ("val_loss", 4)])
def test_the_best_is_the_highest_or_the_lowest_as_the_metric_goes(metric, best, state, tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_latest=1, keep_best=metric)
    for step, value in enumerate([3.0, 9.0, 5.0, 1.0, 7.0, None], 1):
        checkpoints.save(state, {"step": step}, None if value is None else {metric: value})
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [best, 6]


def test_a_folder_in_which_nothing_was_saved_takes_another_configuration(state, tmp_path):
    write_config(tmp_path, "tokenizer", TokenizerConfig(), TrainConfig(seed=1))
    checkpoints = open_checkpoints(tmp_path)  # with seed 0
    checkpoints.save(state, {"step": 1}, None)
    checkpoints.close()
    with pytest.raises(InputError, match=r"train\.seed: stored 0, given 1"):
        write_config(tmp_path, "tokenizer", TokenizerConfig(), TrainConfig(seed=1))


def test_a_failure_names_the_latest_checkpoint(state, tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state, {"step": step}, None)
        checkpoints.manager.wait_until_finished()

    def no_room(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(checkpoints.manager, "save", no_room)
    with pytest.raises(OSError, match=rf"no room.*the last good checkpoint is {tmp_path}/2\."):
        checkpoints.save(state, {"step": 3}, None)
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match="vanished while this training ran"):
        checkpoints.save(state, {"step": 3}, None)


def test_the_seed_says_where_a_training_begins(tmp_path):
    def kernel(seed: int) -> np.ndarray:
        cfg = TrainConfig(seed=seed)
        checkpoints = Checkpoints(tmp_path / str(seed), cfg)
        state, step = restore_or_make(
            cfg, make_mesh(), checkpoints, lambda rngs, compute: linear(rngs), nnx.Param, lambda model: None
        )
        assert step == 0
        return np.asarray(jax.tree.leaves(state.params)[-1])

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert np.any(kernel(1) != kernel(2))
