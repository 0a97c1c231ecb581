"""What a training tells: the console's line, a wandb run that goes on, and numbers that stop it."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import DivergenceError
from utils import logging
from utils.logging import Console, Wandb, Writers
from utils.progress import Reporter, Speed, Waiting, checked


def test_the_console_tells_the_step_what_matters_and_the_time_left(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    console = Console("lam", 100, 400)
    now[0] += 30
    console.scalars(150, {"loss": 0.25, "val_psnr": 21.5, "grad_norm": 3.0})
    console.close()
    # 50 steps took 30 s, so 250 more take 150 s.
    assert capsys.readouterr().out == "lam step 150/400  loss 0.25  val_psnr 21.5  0:02:30 left\n"


def test_a_resumed_training_continues_its_wandb_run(monkeypatch, tmp_path):
    begun, ids = [], iter(["first", "second"])
    wandb = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: next(ids)), init=lambda **given: begun.append(given)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        Wandb(tmp_path, "", "worlds", "", {})
    assert [(given["id"], given["resume"]) for given in begun] == [("first", "allow")] * 2


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_and_a_gradient_must_be_finite(name, value):
    reporter = Reporter(Writers(), Speed(4, 0.0, "float32", Waiting()), 1, 9)
    metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    reporter.take(1, checked(metrics))
    reporter.take(2, checked(metrics | {name: jnp.float32(value)}))
    with pytest.raises(DivergenceError) as raised:
        reporter.flush()
    assert (raised.value.step, raised.value.name) == (2, name)
