"""The recipe of docs/architecture.md, followed to the letter."""

import dataclasses
import re

import jax
import numpy as np
from flax import nnx

from models.genie import DYNAMICS, World
from models.nn import Compute
from models.sampling import SamplingConfig, rollout
from tests import test_sampling
from tests.conftest import ROOT


def test_the_recipe_for_a_kind_of_dynamics_works(monkeypatch):
    recipe = (ROOT / "docs" / "architecture.md").read_text().split("## Add a kind of dynamics model")[1]
    kind, test = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    names = {"__name__": "models.onestep"}
    exec(kind, names)
    monkeypatch.setitem(DYNAMICS, "onestep", names["OneStep"])
    tests = dict(vars(test_sampling))
    exec(test, tests)
    tests["test_a_onestep_rollout_equals_one_without_caches"]()

    # The recipe's commands train it with a preset whose model sees the last picture.
    sees = dataclasses.replace(test_sampling.CONFIG.dynamics, kind="onestep", sees_picture=True)
    world = World(dataclasses.replace(test_sampling.CONFIG, dynamics=sees), Compute(), nnx.Rngs(0))
    played = rollout(world, test_sampling.FRAMES[:, :2], test_sampling.ACTIONS, jax.random.key(0), SamplingConfig())
    assert np.isfinite(played).all()
