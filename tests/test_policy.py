"""Policies: they predict the action that leads on, maps know what they were shown, and levels go as they are played."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evaluate_policy
import generate_dataset
import train_policy
from agents import clones
from agents.labels import CodeMap, ContextMap, Labelled, PairMap, Steps, label, others
from agents.policy import Chooser, PolicyPlayer, draw, shares, sharpened
from evaluation.measured import Measured
from evaluation.playing import best_sticky, compared, measured_play, sections
from models.errors import InputError
from models.genie import load_agent, load_lam
from models.nn import Compute
from models.policy import Agent, AgentConfig, Policy, PolicyConfig
from sources import procgen, recording
from sources.environment import RecordingOptions, options_of
from sources.levels import clips_of
from sources.once import Played, Scripted, play, scripted
from sources.procgen import PlanningPlayer, Procgen
from sources.recording import record
from sources.registry import open_game
from tests.conftest import CACHE, make_dataset
from utils.data import Batch, ClipSource
from utils.records import read_metadata

SMALL = PolicyConfig(width=8, num_heads=2, num_blocks=1, patch_size=4, context=3, num_actions=5, frame_shape=(8, 8, 3))
WORLD = "worlds/coinrun-small"
GAME = Procgen("coinrun")
OPTIONS = RecordingOptions(
    *(3, 0, "sticky"), use_backgrounds=False, restrict_themes=True, action_weights=("RIGHT=1", "RIGHT+UP=3")
)


@pytest.fixture(scope="module")
def coinrun(tmp_path_factory):
    """Three episodes of CoinRun, one in each split."""
    folder = tmp_path_factory.mktemp("coinrun")
    record(GAME, OPTIONS, folder, 0)
    return folder


def config(kind: str, data, ckpt_dir, **changes) -> train_policy.Config:
    paths = {"lam_checkpoint": WORLD, "data_dir": str(data), "ckpt_dir": str(ckpt_dir), "compile_cache": str(CACHE)}
    few = {"batch_size": 2, "seq_len": 4, "decisions": 0, "val_batches": 1}
    short = {"num_steps": 4, "warmup_steps": 0, "decay_steps": 1}
    often = {"checkpoint_interval": 2, "val_interval": 4, "log_interval": 1}
    model = PolicyConfig(width=8, num_heads=2, num_blocks=1, patch_size=16, context=2)
    given = paths | few | short | often | changes
    return dataclasses.replace(train_policy.PRESETS["tiny"], model=model, targets=kind, **given)


@pytest.fixture(scope="module")
def latent(coinrun, tmp_path_factory):
    """A policy of latent actions, hardly trained."""
    folder = tmp_path_factory.mktemp("latent")
    train_policy.main(config("latent", coinrun, folder, decisions=2))
    return folder


def test_a_choice_sees_its_frames_and_no_other():
    policy, s = Policy(SMALL, Compute(), nnx.Rngs(0)), 2
    frames = jax.random.uniform(jax.random.key(0), (1, 7, 8, 8, 3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(policy(x).hidden_BTM[:, s] ** 3)))(frames)
    seen = np.flatnonzero(np.abs(gradient).sum(axis=(0, 2, 3, 4)))
    assert seen.tolist() == [s, s + 1, s + 2]
    hidden = lambda x: jax.jit(lambda x: policy(x).hidden_BTM)(x)
    np.testing.assert_allclose(hidden(frames[:, s : s + 3])[:, 0], hidden(frames)[:, s], atol=1e-5)


def test_what_is_predicted_after_a_frame_leads_on_from_it():
    """Each frame shows the action that is done then: the last frame of a choice's window has its target's colour."""
    actions_BT = np.random.default_rng(0).integers(5, size=(2, 9)).astype(np.int32)
    frames = np.broadcast_to(20 * actions_BT[..., None, None, None], (2, 9, 8, 8, 3)).astype(np.uint8)
    agent = Agent(AgentConfig(SMALL, None), Compute(), nnx.Rngs(0))
    agent.policy.action_out.kernel[...] = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)), jnp.float32)
    logits_BSA, targets_BS = jax.jit(lambda batch: train_policy.predict(agent, batch))(Batch(frames, actions_BT))
    assert logits_BSA.shape[:2] == targets_BS.shape
    np.testing.assert_array_equal(targets_BS, frames[:, :-1, 0, 0, 0] // 20)
    # As in play, where what was before a level's first frame counts as that frame.
    for s in range(8):
        seen = frames[:, np.maximum(np.arange(s - SMALL.context + 1, s + 1), 0)].astype(np.float32) / 255
        np.testing.assert_allclose(logits_BSA[:, s], agent.policy(seen).logits_BTA[:, 0], atol=1e-5)
    assert np.abs(np.diff(logits_BSA, axis=1)).max() > 0.1


def test_time_steps_at_which_the_action_changes_are_drawn_more_often():
    actions_BT = np.array([[1, 1, 1, 1, 3, 3, 3, 3, 3]] * 300, np.int32)
    frames = np.random.default_rng(0).integers(256, size=(1, 9, 8, 8, 3), dtype=np.uint8).repeat(300, axis=0)
    agent = Agent(AgentConfig(SMALL, None), Compute(), nnx.Rngs(0))
    agent.policy.action_out.kernel[...] = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5)), jnp.float32)
    batch, chance_BS = Batch(frames, actions_BT), jax.random.gumbel(jax.random.key(0), (300, 8))
    some = jax.jit(train_policy.predict_some, static_argnums=(0, 3))
    all_BSA, _ = train_policy.predict(agent, Batch(frames[:1], actions_BT[:1]))
    logits_BKA, targets_BK, weights_BK = some(agent, batch, chance_BS, 1)
    # By its logits a time step is known again.
    times_B = np.abs(logits_BKA - all_BSA).max(axis=-1).argmin(axis=1)
    np.testing.assert_allclose(logits_BKA[:, 0], all_BSA[0, times_B], atol=1e-5)
    np.testing.assert_array_equal(targets_BK[:, 0], actions_BT[0, times_B])
    np.testing.assert_array_equal(weights_BK[:, 0] < 1, times_B == 4)
    np.testing.assert_allclose(
        np.bincount(times_B, minlength=8) / 300, np.array([0.1, 1, 1, 1, 5, 1, 1, 1]) / 11.1, atol=0.06
    )
    logits_BKA, targets_BK, _ = some(agent, batch, chance_BS, 8)  # all of them, each once
    assert (np.sort(targets_BK, axis=1) == actions_BT[:, :8]).all()
    np.testing.assert_allclose(np.sort(logits_BKA, axis=1)[:2], np.sort(all_BSA, axis=1).repeat(2, axis=0), atol=1e-5)


def test_latent_targets_are_what_leads_to_the_next_frame(coinrun, latent):
    agent = load_agent(latent)
    batch = ClipSource(coinrun, "val", 5).windows([0, 5], [0.0, 0.5])
    nothing = Batch(batch.frames_BTHWC)  # the dataset's actions are not there to be read
    targets_BS = jax.jit(lambda batch: train_policy.predict(agent, batch)[1])(nothing)
    s = 1
    until = batch.frames_BTHWC[:, : s + 2].astype(np.float32) / 255  # and the next frame
    np.testing.assert_array_equal(jax.jit(agent.lam.infer)(until)[:, -1], targets_BS[:, s])
    assert targets_BS.shape[1] == 4
    assert len(np.unique(targets_BS)) > 1


def test_a_resumed_policy_equals_an_uninterrupted_one_and_its_lam_stays(coinrun, latent, tmp_path, capsys):
    resumed = tmp_path / "resumed"
    shutil.copytree(latent, resumed)
    shutil.rmtree(resumed / "4")
    train_policy.main(config("latent", coinrun, resumed, decisions=2))
    assert "at step 2" in capsys.readouterr().out
    variables = [nnx.to_pure_dict(nnx.state(load_agent(path))) for path in (resumed, latent)]
    jax.tree.map(np.testing.assert_array_equal, *variables)
    jax.tree.map(np.testing.assert_array_equal, variables[0]["lam"], nnx.to_pure_dict(nnx.state(load_lam(WORLD))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decisions": 4}, "`decisions` 4: must be 0, or 1 or more and less than `seq_len` 4"),
        ({"seq_len": 2}, "`seq_len` 2: must be longer than the `context` of 2 frames"),
        ({"data": "squares"}, "`lam_checkpoint`: made for frames of .64, 64, 3., but .* has .16, 16, 3."),
        ({"data": "film", "kind": "true"}, "`targets` true: .* has no discrete actions"),
    ],
)
def test_what_cannot_be_cloned_is_refused(changes, message, coinrun, dataset, tmp_path):
    film = make_dataset(tmp_path / "film", actions=False)
    changes = dict(changes)
    data = {"squares": dataset, "film": film}.get(changes.pop("data", ""), coinrun)
    with pytest.raises(InputError, match=message):
        train_policy.main(config(changes.pop("kind", "latent"), data, tmp_path / "policy", **changes))


LABELLED = Labelled(
    Steps(
        codes_N=np.array([0, 0, 0, 1, 1, 1]),
        before_N=np.array([0, 0, 1, 1, 1, 0]),
        hidden_NM=np.zeros((6, 2)),
        around_NF=np.array([[1.0, 0], [1, 0], [-1, 0], [1, 0], [-1, 0], [-1, 0]]),
    ),
    actions_N=np.array([3, 3, 1, 3, 1, 1]),
)


def test_maps_know_what_they_were_shown():
    codes, before, hidden = np.array([0, 1, 2]), np.array([1, 0, -1]), np.array([[9.0, 0], [-9, 0], [9, 0]])
    by_code = CodeMap(LABELLED, num_codes=3, num_actions=4).shares(codes, before, hidden)
    np.testing.assert_allclose(by_code, [[0, 1 / 3, 0, 2 / 3], [0, 2 / 3, 0, 1 / 3], [0, 0.5, 0, 0.5]])
    by_pair = PairMap(LABELLED, num_codes=3, num_actions=4).shares(codes, before, hidden)
    np.testing.assert_allclose(by_pair, [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0.5, 0, 0.5]])  # the last pair is unknown


def test_what_the_policy_sees_is_told_by_what_the_lam_sees_around_steps_without_labels():
    """Labels say what the latents around a step mean; other steps, which hidden states come with such latents."""
    rng, N = np.random.default_rng(0), 400
    codes, right = rng.integers(3, size=N), rng.random(N) < 0.5
    sides = np.where(right, 1.0, -1.0)
    more = Steps(codes, codes, np.stack([9 * sides, rng.normal(size=N)], axis=1), sides[:, None] * [1.0, 0.0])
    shares_NA = ContextMap(LABELLED, more, 3, 4).shares(
        np.arange(3), np.zeros(3), np.array([[9.0, 0], [-9, 0], [9, 0]])
    )
    assert shares_NA.argmax(axis=1).tolist() == [3, 1, 3]
    turned = more._replace(hidden_NM=-more.hidden_NM)
    turned_NA = ContextMap(LABELLED, turned, 3, 4).shares(np.arange(3), np.zeros(3), np.array([[9.0, 0]] * 3))
    assert turned_NA.argmax(axis=1).tolist() == [1, 1, 1]


def test_without_labels_each_code_stands_for_one_action():
    maps = [CodeMap(LABELLED.first(0), 50, 4, seed).table_KA for seed in (0, 0, 1)]
    assert set(maps[0].ravel()) == {0, 1}
    assert (maps[0].sum(axis=1) == 1).all()
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[0] != maps[2]).any()


def test_choices_follow_their_probabilities():
    known = shares(np.log(np.array([[1.0, 2.0, 7.0]])))
    np.testing.assert_allclose(known, [[0.1, 0.2, 0.7]])
    np.testing.assert_allclose(sharpened(known, 1.0), known)
    np.testing.assert_allclose(sharpened(known, 0.5), np.array([[0.01, 0.04, 0.49]]) / 0.54)
    np.testing.assert_array_equal(sharpened(known, 0.0), [[0, 0, 1]])
    assert draw(np.repeat(known, 4, axis=0), np.array([0.05, 0.15, 0.35, 0.999])).tolist() == [0, 1, 2, 2]


def test_an_action_is_as_likely_as_the_latent_ones_that_stand_for_it():
    """Of codes with shares .6, .3, .1 the first stands for action 0, the others together for action 1."""

    class Constant:
        context = 1

        def __call__(self, frames_NSHWC):
            return np.log(np.tile([0.6, 0.3, 0.1], (len(frames_NSHWC), 1))), np.zeros((len(frames_NSHWC), 2))

    none = np.zeros((3, 0))
    known = Labelled(Steps(np.array([0, 1, 2]), np.zeros(3, int), none, none), np.array([0, 1, 1]))
    frames, playing = np.zeros((4000, 1, 1, 3), np.uint8), np.ones(4000, bool)
    for temperature, expected in ((1.0, 0.4), (0.5, 0.16 / 0.52), (0.0, 0.0)):
        player = PolicyPlayer(Constant(), temperature, CodeMap(known, 3, 2), 0)  # type: ignore[arg-type]
        assert player.act(frames, playing).mean() == pytest.approx(expected, abs=0.03)
        assert set(player._before_N) <= {0, 1}  # what most likely stood behind each action


def test_labels_are_of_the_last_step_but_one_and_others_of_all_between(coinrun, latent):
    agent, source = load_agent(latent), ClipSource(coinrun, "train", 6)
    ten, three = label(agent, source, 10, seed=0), label(agent, source, 3, seed=0)
    for a, b in zip(ten.first(3).steps, three.steps, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    assert len(label(agent, source, 0, seed=0).actions_N) == 0
    rng = np.random.default_rng(0)
    clips, positions = rng.permutation(len(source)), rng.random(len(source))
    batch = source.windows(clips[:10].tolist(), positions[:10].tolist())
    np.testing.assert_array_equal(ten.actions_N, batch.actions_BT[:, 3])  # leads from frame 3 to frame 4, of 0 to 5
    frames = batch.frames_BTHWC.astype(np.float32) / 255
    acted = jax.jit(agent.lam.act)(frames)
    np.testing.assert_array_equal(np.stack([ten.steps.before_N, ten.steps.codes_N], axis=1), acted.codes_X[:, 2:4])
    around = acted.latents_XL[:, 2:5].reshape(10, -1)
    np.testing.assert_allclose(ten.steps.around_NF, around, rtol=1e-4, atol=1e-3)
    chosen = jax.jit(lambda frames: agent.policy(frames))(frames[:, 2:4])
    np.testing.assert_allclose(ten.steps.hidden_NM, chosen.hidden_BTM[:, 0], atol=1e-5)

    more = others(agent, source, 0)
    assert len(more.codes_N) == 3 * min(len(source), 400)  # steps 1, 2 and 3 of each window
    np.testing.assert_array_equal(more.codes_N.reshape(-1, 3)[:, :2], more.before_N.reshape(-1, 3)[:, 1:])
    with pytest.raises(InputError, match=r"`labels` 100000: .* takes one label from each"):
        label(agent, source, 100_000, seed=0)
    with pytest.raises(InputError, match=r"`seq_len` 3: windows of 4 frames or more"):
        label(agent, ClipSource(coinrun, "train", 3), 1, seed=0)


class Telling:
    """Notes what another player does."""

    def __init__(self, player):
        self.player, self.done = player, []

    def act(self, frames_NHWC, playing_N):
        self.done.append(self.player.act(frames_NHWC, playing_N))
        return self.done[-1]


def test_levels_go_as_they_are_played():
    """A plan that solves levels solves them again when it is played without looking; who stands still solves none."""
    N, T, options = 3, 200, dataclasses.replace(OPTIONS, planner_rollouts=16, planner_explore=0.0)
    make = lambda: GAME.levels(options, "test", N, seed=0)
    planner = GAME.planner(options, "test", N, np.random.default_rng(0))
    levels = make()
    telling = Telling(PlanningPlayer(planner, levels))
    planned = play(levels, telling, T, 15)
    assert planned.solved_N.all()
    assert (planned.returns_N == 10).all()
    assert (planned.steps_N < T).all()
    again = play(make(), Scripted(np.stack(telling.done, axis=1)), T, 15)
    for a, b in zip(planned, again, strict=True):
        np.testing.assert_array_equal(a, b)
    short = play(make(), Scripted(np.stack(telling.done, axis=1)), int(planned.steps_N.min()) - 1, 15)
    assert not short.solved_N.any()
    assert not short.returns_N.any()
    still = play(make(), Scripted(np.full((N, 30), 4, np.int32)), 30, 15, num=2)
    assert (still.solved_N.tolist(), still.steps_N.tolist(), still.actions_A[4]) == ([0, 0], [30, 30], 60)
    assert len({*make().levels_N}) == N


def test_a_policy_sees_the_last_frames_and_acts_for_those_who_play(latent):
    player, frames = (
        PolicyPlayer(Chooser(load_agent(latent)), 1.0, None, 0),
        np.random.default_rng(0).integers(256, size=(3, 2, 64, 64, 3)),
    )
    for frame in frames.astype(np.uint8):
        actions = player.act(frame, np.array([True, False]))
    np.testing.assert_array_equal(player._seen_NSHWC, frames[1:].swapaxes(0, 1))
    assert actions[1] == 0


def test_a_level_that_begins_is_seen_without_what_was_before_it(latent):
    player, frames = PolicyPlayer(Chooser(load_agent(latent)), 1.0, None, 0), np.zeros((2, 2, 64, 64, 3), np.uint8)
    frames[1] = 200
    for frame, first in zip(frames, ([True, True], [False, True]), strict=True):
        player.act(frame, np.ones(2, bool), np.array(first))
    assert player._seen_NSHWC.max(axis=(2, 3, 4)).tolist() == [[0, 200], [200, 200]]


def test_a_policy_plays_and_is_corrected_while_clips_are_recorded(latent, tmp_path, monkeypatch):
    monkeypatch.setattr(procgen, "EPISODE_STEPS", 60)
    monkeypatch.setattr(recording, "EPISODE_STEPS", 60)
    monkeypatch.setattr(clones, "LEARNER_LABELS", 10)
    options = dataclasses.replace(
        OPTIONS, policy="walker", planner_explore=0.0, action_weights=(), learner=str(latent), min_clip_length=4
    )
    game = Procgen("coinrun")
    with pytest.raises(InputError, match="nobody can load it"):
        game.play(options, "train", 2, np.random.default_rng(5))
    game.load_learner = clones.learner
    play = lambda: game.play(options, "train", 2, np.random.default_rng(5))
    for one, other in zip(played := play(), play(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.array_equal(played.first_BT[:, 1:][played.terminated_BT[:, :-1]], [True] * played.terminated_BT.sum())
    assert played.first_BT.sum() > played.terminated_BT.sum() + 2  # what is shown breaks off in the middle of levels
    assert not played.truncated_BT.any()

    metadata, _ = record(game, options, tmp_path / "corrected", 0)
    assert metadata.levels["ended"] < sum(shard.count() for shards in metadata.splits.values() for shard in shards)
    assert open_game(tmp_path / "corrected")[1].learner == str(latent)  # the game can be opened, to be played
    with pytest.raises(InputError, match="only_solved"):
        dataclasses.replace(options, only_solved=True).check()
    with pytest.raises(InputError, match=r"nowhere: no checkpoint here"):
        generate_dataset.main(
            generate_dataset.Config(policy="walker", learner="nowhere", output_dir=str(tmp_path / "none"))
        )


def test_players_are_compared_on_the_same_levels():
    played = lambda *solved: Played(np.array(solved, float), np.zeros(4), np.ones(4), np.ones(2, int))
    found = {"sticky, a": played(0, 0, 1, 1), "sticky, b": played(0, 1, 1, 1), "policy": played(1, 1, 1, 1)}
    metrics = (measured_play(found, np.arange(4)) | Measured()).to_json()
    assert metrics["policy: solved"] == 1
    assert best_sticky(metrics) == "sticky, b"
    for name in scripted(np.ones(3), 1, 1, 0):  # of all who do not look, but for who acts at random
        assert (best_sticky({"players": [name], f"{name}: solved": 0.5}) == name) == (name != "random")
    assert compared(metrics, "policy", "sticky, b")["mean"] == pytest.approx(25)
    before = measured_play(found | {"clone": played(0, 1, 0, 1)}, np.arange(4)).to_json()
    setting = {"game": "", "num_levels": 4, "split": "test", "max_steps": 9, "temperature": 1.0, "labels": ()}
    [section] = sections(before | setting | {"main_labels": 0})
    assert [row[0] for row in section.blocks[1].rows] == ["policy − sticky, b", "policy − clone"]
    twice = (measured_play(found, np.array([0, 0, 1, 1])) | Measured()).to_json()
    assert twice["intervals"]["sticky, a: solved"]["high"] > metrics["intervals"]["sticky, a: solved"]["high"]


def test_a_report_of_few_levels(latent, tmp_path, capsys):
    cfg = evaluate_policy.Config(
        checkpoint=str(latent), output_dir=str(tmp_path), num_levels=4, planner_levels=1, curve_levels=2, max_steps=6
    )
    cfg = dataclasses.replace(cfg, labels=(0, 5), main_labels=5, compile_cache=str(CACHE))
    evaluate_policy.main(cfg)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["random: solved"] == 0
    assert metrics["random: steps"] == 6
    assert metrics["intervals"]["planner: solved"]["n"] == 1
    sizes = {
        name: metrics["intervals"][f"latent, {name}: solved"]["n"] for name in ("5 labels, context", "0 labels, code")
    }
    assert sizes == {"5 labels, context": 4, "0 labels, code": 2}
    report = (tmp_path / "report.md").read_text()
    assert "Levels solved by the number of labels" in report
    assert "| most frequent action |" in report
    assert "random: 0.0% of 4 levels solved" in capsys.readouterr().out


def test_a_game_is_played_with_the_options_of_its_dataset(coinrun, dataset):
    assert options_of(read_metadata(coinrun).made_by) == OPTIONS
    assert options_of(read_metadata(f"{WORLD}/data").made_by).restrict_themes
    with pytest.raises(InputError, match=r"not recorded by generate_dataset.py"):
        open_game(dataset)


def test_only_levels_that_were_solved_are_kept():
    options = dataclasses.replace(OPTIONS, only_solved=True, clip_length=16, min_clip_length=1)
    everything = GAME.play(options, "train", 2, np.random.default_rng(0))
    kept, all_clips = ([*clips_of(everything, 0, "a", 16, 1, only)] for only in (True, False))
    assert 0 < len(kept) < len(all_clips)
    assert [clip.clip_id for clip in all_clips if clip.success] == [clip.clip_id for clip in kept]
    assert set(np.unique(everything.actions_BT)) == {7, 8}  # RIGHT and RIGHT+UP, the only ones that have a weight
    with pytest.raises(InputError, match=r"`action_weights` .*: expected NAME=WEIGHT"):
        GAME.check(dataclasses.replace(OPTIONS, action_weights=("FORWARD=1",)))
