"""Corrections: what is recorded was done, up to each mistake by the learner, and from there on by the walker."""

import dataclasses
import itertools

import numpy as np
import pytest

from sources import corrections, procgen
from sources.corrections import PASSED, SHOWN, Corrections
from sources.environment import RecordingOptions
from sources.levels import levels_of
from sources.procgen import ACTION_NAMES, Procgen
from sources.walker import FORGIVEN, STILL, Plan, Walker, futures

WAIT, BACK, RIGHT, JUMP = (ACTION_NAMES.index(name) for name in ("NONE", "LEFT", "RIGHT", "RIGHT+UP"))
OPTIONS = RecordingOptions(policy="walker", planner_explore=0.0, use_backgrounds=False, restrict_themes=True)
GAME = Procgen("coinrun")
STAY, STEP, DIE = 0, 1, 2
LENGTH = 10  # steps to the end of a row


class Row:
    """A game of rows to walk along: the frame is the place. Its state is all there is to it."""

    def __init__(self):
        self.state, self.done = (0, 0, True, False), []

    def act(self, actions_1):
        self.done.append(int(actions_1[0]))
        row, place, _, _ = self.state
        place += self.done[-1] == STEP
        over = self.done[-1] == DIE or place == LENGTH
        self.state = (row + 1, 0, True, place == LENGTH) if over else (row, place, False, False)

    def observe(self):
        _, place, first, solved = self.state
        return np.array([10.0 * solved], np.float32), np.full((1, 1, 1, 3), place, np.uint8), np.array([first])

    def get_info(self):
        return [{"level_seed": self.state[0], "prev_level_complete": int(self.state[3])}]

    def get_state(self):
        return [self.state]

    def set_state(self, states):
        [self.state] = states


class Steady:
    """A walker that knows no other way than on."""

    def mend(self, state, action):
        return [] if action == STEP else [STEP, STEP]

    def go_on(self, state, rest):
        return rest or [STEP]


class Scripted:
    """Does something else at one place; remembers what it was told."""

    def __init__(self, place, action):
        self.place, self.action, self.seen = place, action, []

    def act(self, frames_1HWC, playing_1, first_1):
        self.see(frames_1HWC, first_1)
        return np.array([self.action if frames_1HWC[0, 0, 0, 0] == self.place else STEP], np.int32)

    def see(self, frames_1HWC, first_1=(False,)):
        self.seen.append((int(frames_1HWC[0, 0, 0, 0]), bool(first_1[0])))


class Dice:
    """Falls below a half, or not."""

    def __init__(self, follows):
        self.follows = follows

    def random(self):
        return 0.49 if self.follows else 0.51


def recorded(learner, follows, num=60, walker=None):
    game, shown = Row(), Row()
    pictures = lambda env, observation: observation
    steps = Corrections(game, shown, walker or Steady(), learner, pictures, Dice(follows)).record(num)
    assert len(steps) == num
    for before, after in itertools.pairwise(steps):  # what was recorded was done
        if not after.first:
            assert after.level == before.level
            assert after.frame[0, 0, 0] == before.frame[0, 0, 0] + (before.action == STEP)
        assert after.first or not before.terminated
        assert before.terminated == before.success == (before.reward == 10)
    return game, shown, steps


def places(steps):
    return [(int(step.frame[0, 0, 0]), step.first) for step in steps]


def test_a_mistake_is_recorded_as_what_the_walker_shows_and_then_made():
    learner = Scripted(3, DIE)
    game, shown, steps = recorded(learner, follows=False)
    assert {step.action for step in steps} == {STEP}
    assert [int(step.frame[0, 0, 0]) for step in steps[:LENGTH]] == list(range(LENGTH))
    assert [step.first for step in steps[: LENGTH + 1]] == [True, *[False] * (LENGTH - 1), True]
    assert steps[LENGTH - 1].success
    assert game.done[:5] == [STEP, STEP, STEP, DIE, STEP]  # the learner meets what its mistake leads to
    assert shown.done[: LENGTH - 3] == [STEP] * (LENGTH - 3)
    assert learner.seen[:5] == [(0, True), (1, False), (2, False), (3, False), (0, True)]


def test_what_a_mistake_leads_to_is_not_recorded_at_first():
    learner = Scripted(3, STAY)
    game, _, steps = recorded(learner, follows=False)
    assert {step.action for step in steps if not step.first} == {STEP}
    assert game.done[: 3 + 2 * (1 + PASSED)] == [STEP] * 3 + [STAY] * 2 * (1 + PASSED)
    # Shown again, from where it stayed, with the step that led there, as else no motion would be seen.
    assert [step.level for step in steps[LENGTH : LENGTH + 3]] == [0, 0, 0]
    assert places(steps[LENGTH : LENGTH + 3]) == [(3, True), (3, False), (4, False)]


def test_what_nothing_mends_is_not_recorded():
    """What is done there leads to a death as much as anything else, and should not be imitated."""
    steady = Steady()
    steady.mend = lambda state, action: None if 3 <= state[1] < 6 else []
    _, _, steps = recorded(Scripted(-1, STEP), follows=False, walker=steady)
    assert places(steps[:3]) == [(0, True), (1, False), (2, False)]
    assert places(steps[3:9]) == [(5, True), (6, False), (7, False), (8, False), (9, False), (0, True)]


def test_who_is_led_on_sees_the_way():
    learner = Scripted(3, STAY)
    _, _, steps = recorded(learner, follows=True)
    assert [step.first for step in steps[: LENGTH + 1]] == [True, *[False] * (LENGTH - 1), True]
    assert [step.level for step in steps] == [number // LENGTH for number in range(len(steps))]
    assert learner.seen[: LENGTH + 1] == [(0, True), *((place, False) for place in range(1, LENGTH)), (0, True)]


def test_what_is_shown_may_end_in_the_middle_of_a_level(monkeypatch):
    monkeypatch.setattr("tests.test_corrections.LENGTH", 40)
    learner = Scripted(3, DIE)
    _, _, steps = recorded(learner, follows=False)
    assert [step.first for step in steps[: 3 + SHOWN + 1]] == [True, *[False] * (2 + SHOWN), True]
    assert not any(step.terminated for step in steps)


def make(num):
    return GAME.make(OPTIONS, "train", num, rand_seed=3)


@pytest.fixture
def walker():
    walker = Walker(make, 2, 0.0, GAME.weights_A, ACTION_NAMES, np.random.default_rng(0))
    yield walker
    walker.close()


class Always:
    """Does the same whatever it sees."""

    def __init__(self, action):
        self.action = action

    def act(self, frames_1HWC, playing_1, first_1):
        return np.array([self.action], np.int32)

    def see(self, frames_1HWC):
        pass


def in_coinrun(walker, action, num=150):
    game, shown = make(1), make(1)
    steps = Corrections(game, shown, walker, Always(action), GAME.pictures, np.random.default_rng(0)).record(num)
    game.close()
    shown.close()
    return steps


def test_who_walks_blindly_through_coinrun_is_shown_how_to_get_on(walker):
    """It would else stand before the first wall."""
    steps = in_coinrun(walker, RIGHT, 500)
    assert sum(step.success for step in steps) == sum(step.terminated for step in steps)
    assert len({step.level for step in steps}) > 1
    assert {RIGHT, JUMP} < {step.action for step in steps}
    moves = [np.any(one.frame != other.frame) for one, other in itertools.pairwise(steps) if not other.first]
    assert np.mean(moves) > 0.9


def test_who_does_as_the_walker_would_is_left_alone(walker, monkeypatch):
    state = make(1).get_state()[0]
    detour = Plan([BACK, BACK, JUMP], easy=False)
    for plan, action, stands, mended in (
        (detour, BACK, False, []),
        (detour, JUMP, False, detour.actions),
        (Plan([RIGHT, JUMP]), RIGHT, False, []),
        (Plan([RIGHT, JUMP]), RIGHT, True, [RIGHT, JUMP]),
        (Plan([RIGHT, JUMP]), JUMP, False, [RIGHT, JUMP]),
        (Plan([BACK], easy=False, hopeless=True), RIGHT, True, None),
    ):
        monkeypatch.setattr(walker, "forgives", lambda state, action: False)
        monkeypatch.setattr(walker, "plan", lambda state, plan=plan: plan)
        monkeypatch.setattr(walker, "_stands", lambda found, stands=stands: stands)
        assert walker.mend(state, action) == mended


def test_what_is_shown_to_who_stands_still_is_long_enough_for_a_clip(monkeypatch):
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 100)
    monkeypatch.setattr(corrections, "FOLLOWED", 0.0)
    game = Procgen("coinrun")
    game.load_learner = lambda *_: lambda seed: Always(WAIT)
    options = dataclasses.replace(OPTIONS, learner="who waits", clip_length=24, min_clip_length=24)
    played = game.play(options, "train", 1, np.random.default_rng(0))
    levels = [level for level in levels_of(played, 0) if level.end < 100]
    whole = [level.end - level.begin for level in levels if not level.ended]
    assert len(whole) > 1
    assert whole == [24, *[1 + 24] * (len(whole) - 1)]


def test_who_jumps_blindly_is_left_alone_but_where_it_would_die(walker):
    steps = in_coinrun(walker, JUMP)
    assert np.mean([step.action == JUMP for step in steps]) > 0.6
    ends = [step.success for step in steps if step.terminated]
    assert sum(ends) >= len(ends) - 1
    assert len(ends) > 1


def test_what_leads_on_is_forgiven_and_what_does_not_is_mended(walker):
    env, seen, may_brake = make(2), {True: 0, False: 0}, 0
    assert not walker.forgives(env.get_state()[0], WAIT)  # who stands
    for _ in range(70):
        state = env.get_state()[0]
        forgiven, plan = walker.forgives(state, RIGHT), walker.plan(state)
        mended = walker.mend(state, RIGHT)
        gone_on = futures(walker._ahead, state, [[RIGHT] * FORGIVEN], RIGHT)
        [lived], moves = gone_on.lived_N, gone_on.changed_NT.max() >= STILL
        if forgiven:
            assert not mended
            assert lived == FORGIVEN or plan.actions == walker._pace[:lived]
        else:
            assert mended == (None if plan.hopeless else [] if moves and plan.actions[0] == RIGHT else plan.actions)
        seen[forgiven] += 1
        assert not walker.forgives(state, BACK)
        may_brake += walker.forgives(state, WAIT)
        env.act(walker.act(env, env.observe()[2]))
    assert min(seen.values()) > 3
    assert 3 < may_brake < 70
    env.close()
