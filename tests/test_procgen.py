"""All of Procgen's games: what is said of them is true of them, and the planner plays them."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from benchmarks import keys
from evaluation.buttons import HELD_FRAMES
from generate_dataset import Config
from models.errors import InputError
from sources import procgen, recording
from sources.environment import RecordingOptions
from sources.planner import DECISION_STEPS, Planner
from sources.policies import choose_actions
from sources.procgen import ACTION_NAMES, GAMES, Procgen
from sources.recording import Task, record
from tests.test_generate import ProcgenGym3Env, replayed_levels

NUM_ACTIONS = len(ACTION_NAMES)


def test_there_are_sixteen():
    from procgen.env import ENV_NAMES

    assert list(GAMES) == ENV_NAMES


CRATE = (75, [*["RIGHT"] * 4, *["RIGHT+UP"] * 10, "NONE"])  # a level of CoinRun, and the way onto a crate in it


def states(game, rng):
    """States in which actions may differ: many of a random game, and one that chance seldom brings about."""
    if game == "coinrun":
        level, way = CRATE
        env = ProcgenGym3Env(num=1, env_name=game, start_level=level, num_levels=1, rand_seed=1, num_threads=0)
        for action in way:
            env.act(np.array([ACTION_NAMES.index(action)]))
        yield from env.get_state()
    playing = ProcgenGym3Env(num=4, env_name=game, rand_seed=1, num_threads=0)
    held_B = rng.integers(NUM_ACTIONS, size=4)
    for _ in range(12):
        for _ in range(int(rng.integers(1, 25))):
            held_B = np.where(rng.random(4) < 0.2, rng.integers(NUM_ACTIONS, size=4), held_B)
            playing.act(held_B)
        yield from playing.get_state()


@pytest.mark.parametrize("game", GAMES)
def test_facts_about_actions_are_true_of_the_game(game):
    """From many states of a game, each action is done once, and then the same for all of them."""
    rng = np.random.default_rng(1)
    trying = ProcgenGym3Env(num=NUM_ACTIONS, env_name=game, rand_seed=1, num_threads=0)
    differs = np.zeros((NUM_ACTIONS, NUM_ACTIONS), bool)
    for state in states(game, rng):
        trying.set_state([state] * NUM_ACTIONS)
        actions, seen = np.arange(NUM_ACTIONS), []
        for _ in range(12):
            trying.act(actions)
            rewards, observation, first = trying.observe()
            rows = (observation["rgb"], rewards.view(np.uint8), first.view(np.uint8))
            seen.append(np.concatenate([row.reshape(NUM_ACTIONS, -1) for row in rows], axis=1))
            if rng.random() < 0.3 or actions[0] != actions[1]:
                actions = np.full(NUM_ACTIONS, rng.integers(NUM_ACTIONS))
        seen = np.concatenate(seen, axis=1)
        _, kind = np.unique([row.tobytes() for row in seen], return_inverse=True)
        differs |= kind[:, None] != kind
    same = {name: Procgen(game).same_actions.get(name, name) for name in ACTION_NAMES}
    for (i, a), (j, b) in itertools.combinations(enumerate(ACTION_NAMES), 2):
        assert differs[i, j] == (same[a] != same[b]), f"{a} and {b}"


@pytest.mark.parametrize(
    ("game", "options"),
    [
        ("maze", {"distribution_mode": "easy", "use_monochrome_assets": True}),
        ("heist", {"distribution_mode": "memory", "center_agent": False}),
        ("leaper", {"restrict_themes": True, "use_backgrounds": False}),
        ("starpilot", {"distribution_mode": "extreme"}),
    ],
)
def test_options_are_procgens_and_levels_replay(game, options):
    config = Config(num_episodes=3, policy="sticky", min_clip_length=1, **options)
    clips, outcomes = recording.make_clips(Procgen(game), config, Task("val", 0, 2))
    levels = replayed_levels(clips, config.clip_length, game, **options)
    assert levels - 2 <= outcomes.ended <= levels
    assert all(2**29 <= clip.level_seed < 2**29 + config.num_levels for clip in clips)


def test_time_up_is_no_death():
    clips, _ = recording.make_clips(Procgen("maze"), RecordingOptions(min_clip_length=1), Task("train", 0, 2))
    ends = [clip for clip in clips if clip.truncated_T.any()]
    assert len(ends) >= 2  # a random walk does not often find the cheese
    for clip in ends:
        assert clip.truncated_T[-1]
        assert not clip.terminated_T.any()
        assert clip.success is False


def test_the_planner_solves_more_than_sticky_and_makes_mistakes(monkeypatch):
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 500)

    def solved(**changes) -> tuple[int, int]:
        """Levels that were solved, and that came to their end."""
        options = RecordingOptions(**{"policy": "planner", "planner_rollouts": 16} | changes)
        played = Procgen("coinrun").play(options, "train", 4, np.random.default_rng(5))
        return int(played.success_BT.sum()), int((played.terminated_BT | played.truncated_BT).sum())

    perfect, planned, careless, sticky = (
        solved(**changes) for changes in ({"planner_explore": 0.0}, {}, {"planner_explore": 0.8}, {"policy": "sticky"})
    )
    shares = [found / ended for found, ended in (perfect, planned, careless, sticky)]
    assert shares[0] > 0.95
    assert shares[0] > shares[1] > max(shares[2:])
    assert planned[0] > 1.5 * sticky[0]


WALKER = RecordingOptions(policy="walker", action_weights=("UP=1",), planner_explore=0.0)


def test_the_walker_jumps_no_more_than_it_must_and_solves_nearly_all(monkeypatch):
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 500)
    game, rng = Procgen("coinrun"), np.random.default_rng
    played = game.play(WALKER, "train", 4, rng(5))
    shares = np.bincount(played.actions_BT.reshape(-1), minlength=NUM_ACTIONS) / played.actions_BT.size
    walk, brake, jump = (shares[ACTION_NAMES.index(name)] for name in ("RIGHT", "NONE", "RIGHT+UP"))
    assert walk + brake + jump > 0.9
    assert 0.2 < brake / walk < 0.5  # one in three time steps of those on the ground, but for run-ups
    assert 0.2 < jump < 0.7
    assert played.success_BT.sum() > 0.9 * (played.terminated_BT | played.truncated_BT).sum()
    solved = lambda played: played.success_BT.sum() / played.first_BT.sum()
    for always in ("RIGHT=1", "RIGHT+UP=1"):
        blind = dataclasses.replace(WALKER, policy="sticky", action_weights=(always,))
        assert solved(game.play(blind, "train", 4, rng(5))) < 0.75 * solved(played)
    careless = game.play(dataclasses.replace(WALKER, planner_explore=0.5), "train", 4, rng(5)).actions_BT
    assert (careless == ACTION_NAMES.index("UP")).mean() > 0.05
    with pytest.raises(InputError, match="`policy` walker: expected uniform or sticky or planner for maze"):
        Procgen("maze").options_of(WALKER)


@pytest.mark.parametrize(
    ("game", "options"),
    [
        ("leaper", RecordingOptions(policy="planner", planner_rollouts=4)),
        ("coinrun", RecordingOptions(policy="walker")),
    ],
)
def test_who_looks_ahead_is_a_function_of_the_seed(monkeypatch, game, options):
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 64)
    a, b, other = (
        Procgen(game).play(options, "train", 2, np.random.default_rng(seed)).actions_BT for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()


def test_a_plan_comes_true():
    """A plan that ends a level does so when it is played, at the step and with the reward that was tried."""
    env = ProcgenGym3Env(num=1, env_name="coinrun", distribution_mode="easy", rand_seed=4, num_threads=0)
    make = lambda num: ProcgenGym3Env(num=num, env_name="coinrun", distribution_mode="easy", rand_seed=0, num_threads=0)
    planner = Planner(make, 1, 32, 0.0, procgen.COINRUN_WEIGHTS, np.random.default_rng(0))
    plan = planner.plan(env.get_state()[0])
    while len(plan) % DECISION_STEPS == 0:  # it leads to no end yet
        for action in plan:
            env.act(np.array([action]))
        plan = planner.plan(env.get_state()[0])
    for i, action in enumerate(plan):
        env.act(np.array([action]))
        reward, _, first = env.observe()
        assert bool(first[0]) == (i == len(plan) - 1)
    assert reward[0] == 10


def test_keys_are_measured_in_the_real_game(tmp_path, capsys):
    options = RecordingOptions(num_episodes=3, clip_length=16, use_backgrounds=False, restrict_themes=True)
    record(Procgen("coinrun"), options, tmp_path / "data", num_workers=0)
    keys.main(keys.Config(json=True, data_dir=str(tmp_path / "data"), num_levels=60))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["NONE"].startswith("20 of 20  +0.00 +0.00")
    up = {name: float(told[name].split()[4]) for name in ("LEFT", "RIGHT+UP", "RIGHT")}
    assert up["RIGHT+UP"] > 1 > max(abs(up["LEFT"]), abs(up["RIGHT"]))


def test_the_real_game_goes_on_from_a_prompt_as_it_did():
    game = Procgen("coinrun")
    options = RecordingOptions(use_backgrounds=False, restrict_themes=True)
    env = game.make(options, "val", 12, rand_seed=1)
    played = keys.Game(game, env, np.arange(NUM_ACTIONS))
    acted = choose_actions("sticky", game.weights_A, np.random.default_rng(1), 12, 2 * keys.CLIP)
    frames, actions = played.record(acted)
    assert 4 < len(frames) <= 12
    for t in (3, 9):
        after = played.play(frames[:, : t + 1], actions[:, : t + 1])
        assert after.shape[1] == HELD_FRAMES
        np.testing.assert_array_equal(after[:, 0], frames[:, t + 1])
    env.close()


def test_modes_that_a_game_has_not_are_refused(tmp_path):
    options = RecordingOptions(num_episodes=3, distribution_mode="memory")
    with pytest.raises(InputError, match="`distribution_mode` memory: expected easy, hard, extreme for leaper"):
        record(Procgen("leaper"), options, tmp_path / "new", num_workers=0)


def test_larger_frames_show_the_same_game(tmp_path, monkeypatch):
    """The same levels and actions, and pictures that, made small again, are nearly those that agents are shown."""
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 40)
    plain = RecordingOptions(policy="sticky", use_backgrounds=False, restrict_themes=True)
    larger = dataclasses.replace(plain, height=128, width=128)
    games = [Procgen("coinrun").sized(options) for options in (plain, larger)]
    small, large = (
        game.play(o, "val", 2, np.random.default_rng(3)) for game, o in zip(games, (plain, larger), strict=True)
    )
    np.testing.assert_array_equal(small.actions_BT, large.actions_BT)
    np.testing.assert_array_equal(small.rewards_BT, large.rewards_BT)
    assert large.frames_BTHWC.shape == (2, 40, 128, 128, 3)
    halved = large.frames_BTHWC.reshape(2, 40, 64, 2, 64, 2, 3).mean(axis=(3, 5))
    same, other = (np.abs(halved[:, i:] - small.frames_BTHWC[:, : 40 - i]).mean() for i in (0, 10))
    assert same < 0.5 * other
    alone = [game.levels(o, "val", 1, 3) for game, o in zip(games, (plain, larger), strict=True)]
    small, large = ([levels.frames().copy(), levels.step(np.array([7], np.int32)).frames_NHWC] for levels in alone)
    for frame, larger_frame in zip(small, large, strict=True):
        apart = np.abs(larger_frame.reshape(1, 64, 2, 64, 2, 3).mean(axis=(2, 4)) - frame).mean()
        assert apart < 6  # of the same picture a patch further, 30
    assert {"height", "width"} <= games[1].options_of(larger).keys()
    assert not {"height", "width"} & games[0].options_of(plain).keys()
    for size in ({"height": 128}, {"height": 96, "width": 96}):
        with pytest.raises(InputError, match="64, 128 or 256 pixels for coinrun"):
            Procgen("coinrun").sized(dataclasses.replace(plain, **size))
