"""The recipe of docs/architecture.md, followed to the letter."""

import re

from models.genie import DYNAMICS
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
