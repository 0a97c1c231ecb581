"""The walker's advice: what leads on is left as it is, and what would be the end is mended."""

import numpy as np
import pytest

from sources.environment import RecordingOptions
from sources.procgen import ACTION_NAMES, Procgen
from sources.walker import FORGIVEN, Walker, futures

WAIT, RIGHT, JUMP = (ACTION_NAMES.index(name) for name in ("NONE", "RIGHT", "RIGHT+UP"))
OPTIONS = RecordingOptions(policy="walker", planner_explore=0.0, use_backgrounds=False, restrict_themes=True)
GAME = Procgen("coinrun")


def make(num):
    return GAME.make(OPTIONS, "train", num, rand_seed=3)


@pytest.fixture
def walker():
    walker = Walker(make, 2, 0.0, GAME.weights_A, ACTION_NAMES, np.random.default_rng(0))
    yield walker
    walker.close()


def played(act, steps=160):
    """Levels that were solved, levels that ended, and what was done (T, B)."""
    env, solved, ended, actions = make(2), 0, 0, []
    for _ in range(steps):
        actions.append(act(env))
        env.act(actions[-1])
        first_B = env.observe()[2]
        infos = env.get_info()
        solved += sum(bool(infos[b]["prev_level_complete"]) for b in np.flatnonzero(first_B))
        ended += int(first_B.sum())
    env.close()
    return solved, ended, np.array(actions)


def test_who_walks_blindly_gets_on_by_advice(walker):
    """It would else stand before the first wall."""
    always = np.full(2, RIGHT, np.int32)
    solved, ended, actions = played(lambda env: walker.advise(env, always))
    assert solved == ended > 1
    assert (actions == RIGHT).mean() > 0.4
    assert played(lambda env: always)[1] == 0


def test_who_jumps_blindly_is_left_alone_but_where_it_would_die(walker):
    always = np.full(2, JUMP, np.int32)
    solved, ended, actions = played(lambda env: walker.advise(env, always))
    assert (actions == JUMP).mean() > 0.6
    blindly, deaths, _ = played(lambda env: always)
    assert solved / ended > blindly / deaths


def test_what_leads_on_is_forgiven_and_what_does_not_is_mended(walker):
    env, seen = make(2), {True: 0, False: 0}
    for _ in range(70):
        state = env.get_state()[0]
        forgiven, plan = walker.forgives(state, RIGHT), walker.plan(state)
        advice = walker.advise(env, np.full(2, RIGHT, np.int32))[0]
        [lived] = futures(walker._ahead, state, [[RIGHT] * FORGIVEN], RIGHT).lived_N
        if forgiven:
            assert advice == RIGHT
            assert lived == FORGIVEN or plan.actions == [RIGHT] * lived
        else:
            assert advice == (RIGHT if plan.hopeless else plan.actions[0])
        seen[forgiven] += 1
        assert not walker.forgives(state, WAIT)
        env.act(walker.act(env, env.observe()[2]))
    assert min(seen.values()) > 3
    env.close()
