"""Environments of Gymnasium: recorded, then played again from their seeds and actions."""

import dataclasses
import itertools
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest

from models.errors import InputError
from sources import gymnasium as recorded
from sources import recording
from sources.environment import RecordingOptions
from sources.gymnasium import Gymnasium, read_kwargs, resize
from sources.recording import Task, record
from sources.registry import find_environment
from sources.spaces import choose, handed_over, space_of
from tests.conftest import ROOT
from utils.data import ClipSource
from utils.records import SPLITS, read_metadata

gym = pytest.importorskip("gymnasium", reason="needs gymnasium (make env-deps)")
OPTIONS = RecordingOptions(num_episodes=3, policy="sticky")


class Encoded(gym.Env):
    """Its pictures tell the seed, the time, and the action that led to them."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(5, start=10)

    def __init__(self, render_mode=None, ends_at=50):
        self.render_mode, self.ends_at = render_mode, ends_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time, self.action = seed, 0, 255
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time, self.action = self.time + 1, int(action)
        terminated = self.time == self.ends_at and self.seed % 2 == 0
        return np.zeros(2, np.float32), float(action), terminated, self.time == self.ends_at, {}

    def render(self):
        picture = np.zeros((40, 60, 3), np.uint8)
        picture[...] = self.seed % 251, self.time, self.action
        return picture


@pytest.fixture(scope="module", autouse=True)
def registered():
    gym.register("Encoded-v0", entry_point=Encoded)
    yield
    gym.registry.pop("Encoded-v0")


@pytest.mark.parametrize("skip", [1, 3])
def test_actions_rewards_and_ends_stay_with_their_frames(skip):
    options = dataclasses.replace(OPTIONS, frame_skip=skip, height=20, width=30, min_clip_length=1)
    environment = Gymnasium("Encoded-v0", options)
    assert (environment.action_names, environment.fps) == (("0", "1", "2", "3", "4"), 30 / skip)
    clips, outcomes = recording.make_clips(environment, options, Task("test", 0, 2))
    length = -(-50 // skip)
    assert outcomes.ended == 2 * (1000 // length)
    for clip in clips:
        assert clip.frames_THWC.shape[1:] == (20, 30, 3)
        seed, time, led = clip.frames_THWC[:, 3, 4].T
        assert set(seed) == {clip.level_seed % 251}
        np.testing.assert_array_equal(np.diff(time), skip)
        np.testing.assert_array_equal(led[1:], clip.actions_T[:-1] + 10)
        steps = np.minimum(50 - time, skip)
        np.testing.assert_array_equal(clip.rewards_T, (clip.actions_T + 10) * steps)
        np.testing.assert_array_equal(clip.truncated_T, time + skip >= 50)
        np.testing.assert_array_equal(clip.terminated_T, clip.truncated_T & (clip.level_seed % 2 == 0))


def test_sticky_actions_are_recorded_as_they_were_done():
    plain, sticky = (
        Gymnasium("Encoded-v0", options).play(options, "train", 2, np.random.default_rng(0))
        for options in (OPTIONS, dataclasses.replace(OPTIONS, policy="uniform", sticky_actions=0.75))
    )
    led_BT = sticky.frames_BTHWC[:, :, 0, 0, 2]
    inside_BT = ~sticky.first_BT[:, 1:]
    np.testing.assert_array_equal(led_BT[:, 1:][inside_BT], sticky.actions_BT[:, :-1][inside_BT] + 10)
    held = (sticky.actions_BT[:, 1:] == sticky.actions_BT[:, :-1])[inside_BT].mean()
    assert 0.75 < held < 0.85
    assert 0.85 < (plain.actions_BT[:, 1:] == plain.actions_BT[:, :-1]).mean() < 0.95


def replay(environment: Gymnasium, options: RecordingOptions, num_clips: int) -> None:
    """Plays first clips of levels again from their seeds and actions."""
    clips, _ = recording.make_clips(environment, options, Task("val", 0, 1))
    env, firsts = environment._make(options), {}
    for clip in clips:
        firsts.setdefault(clip.level_seed, clip)
    for clip in itertools.islice(firsts.values(), num_clips):
        assert 2**29 <= clip.level_seed < 2**29 + options.num_levels
        observation, _ = env.reset(seed=clip.level_seed)
        for t in range(len(clip)):
            np.testing.assert_array_equal(environment._frame(env, observation), clip.frames_THWC[t])
            observation, reward, terminated, *_ = env.step(int(clip.actions_T[t]))
            assert (np.float32(reward), terminated) == (clip.rewards_T[t], clip.terminated_T[t])
    env.close()
    assert max(clip.frames_THWC.std(axis=0).max() for clip in clips) > 10


def test_atari(monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(recorded, "EPISODE_STEPS", 400)
    monkeypatch.setattr(recording, "EPISODE_STEPS", 400)
    environment = Gymnasium("ALE/Breakout-v5", OPTIONS)
    assert environment.action_names == ("NOOP", "FIRE", "RIGHT", "LEFT")
    assert (environment.fps, environment.idle_action) == (15, "NOOP")
    assert Gymnasium("ALE/Breakout-v5", dataclasses.replace(OPTIONS, frame_skip=2)).fps == 30
    replay(environment, OPTIONS, 3)
    assert {"ale-py", "gymnasium", "pillow"} <= environment.provenance(OPTIONS)["versions"].keys()


def test_minatar(monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr(recorded, "EPISODE_STEPS", 200)
    monkeypatch.setattr(recording, "EPISODE_STEPS", 200)
    options = dataclasses.replace(OPTIONS, height=20, width=20, min_clip_length=4)
    environment = Gymnasium("MinAtar/Breakout-v1", options)
    assert environment.action_names == ("NOOP", "LEFT", "RIGHT")
    replay(environment, options, 3)
    clips, _ = recording.make_clips(environment, options, Task("train", 0, 1))
    frames = np.concatenate([clip.frames_THWC for clip in clips])
    np.testing.assert_array_equal(frames, frames[:, ::2, ::2].repeat(2, 1).repeat(2, 2))  # no cell is blurred
    assert len(np.unique(frames.reshape(-1, 3), axis=0)) == 5  # black, and a colour for each channel


def test_car_racing(monkeypatch):
    pytest.importorskip("Box2D")
    monkeypatch.setattr(recorded, "EPISODE_STEPS", 60)
    monkeypatch.setattr(recording, "EPISODE_STEPS", 60)
    options = dataclasses.replace(OPTIONS, env_kwargs=("continuous=False",))
    environment = Gymnasium("CarRacing-v3", options)
    assert environment.action_names == ("NOOP", "RIGHT", "LEFT", "GAS", "BRAKE")
    replay(environment, options, 1)


def test_real_actions_and_rows_of_integers_are_recorded_as_they_are(monkeypatch, tmp_path):
    pytest.importorskip("Box2D")
    monkeypatch.setattr(recorded, "EPISODE_STEPS", 40)
    monkeypatch.setattr(recording, "EPISODE_STEPS", 40)
    options = dataclasses.replace(OPTIONS, height=24, width=24)
    environment = Gymnasium("CarRacing-v3", options)
    record(environment, options, tmp_path / "car", num_workers=0)
    metadata = read_metadata(tmp_path / "car")
    assert metadata.action_names is None
    assert [(column.name, column.values, column.mean) for column in metadata.action_columns] == [
        ("STEER", None, 0.0),
        ("GAS", None, 0.5),
        ("BRAKE", None, 0.5),
    ]
    (clip, *_) = (source := ClipSource(tmp_path / "car", "train", seq_len=32)).clips(range(len(source)))
    assert (clip.actions_T.shape, clip.actions_T.dtype) == ((32, 3), np.float32)
    env = environment._make(options)
    observation, _ = env.reset(seed=clip.level_seed)
    for frame, action in zip(clip.frames_THWC, clip.actions_T, strict=True):
        np.testing.assert_array_equal(environment._frame(env, observation), frame)
        observation, *_ = env.step(action)
    env.close()


@pytest.mark.parametrize(
    ("space", "dtype", "values"),
    [
        (gym.spaces.MultiDiscrete([2, 5], start=[3, 4]), np.int32, (("0", "1"), ("0", "1", "2", "3", "4"))),
        (gym.spaces.MultiBinary(3), np.int32, (("0", "1"),) * 3),
        (gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 20])), np.float32, (None, None)),
    ],
)
def test_rows_of_actions(monkeypatch, space, dtype, values):
    monkeypatch.setattr(Encoded, "action_space", space)
    env, rng = Encoded(), np.random.default_rng(0)
    columns = space_of("Encoded-v0", env).columns
    assert tuple(column.values for column in columns) == values
    for policy, least, most in (("uniform", 0, 0.6), ("sticky", 0.75, 1)):
        actions_BT = choose(space, policy, rng, 50, 200)
        assert (actions_BT.shape, actions_BT.dtype) == ((50, 200, len(values)), dtype)
        assert least <= (actions_BT[:, 1:] == actions_BT[:, :-1]).all(axis=2).mean() < most
        assert all(handed_over(space, action) in space for action in actions_BT[0])
        for i, column in enumerate(columns):
            if column.values is None:
                normal = (actions_BT[..., i] - column.mean) / column.scale
                assert (abs(normal.mean()) < 0.15, abs(normal.std() - 1) < 0.1) == (True, True)
            else:
                assert len(np.unique(actions_BT[..., i])) == len(column.values)


@pytest.mark.parametrize(
    "space", [gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Dict(), gym.spaces.Box(0, 1, (2, 2))]
)
def test_actions_without_room_or_bounds_are_refused(monkeypatch, space):
    monkeypatch.setattr(Encoded, "action_space", space)
    with pytest.raises(InputError, match=r"`env` gymnasium:Encoded-v0: its actions are .*; expected"):
        Gymnasium("Encoded-v0", OPTIONS)


def test_number_of_workers_changes_no_byte(tmp_path):
    pytest.importorskip("minatar")
    options = dataclasses.replace(OPTIONS, height=10, width=10)
    for name, workers in (("one", 0), ("two", 2)):
        record(find_environment("gymnasium:MinAtar/Asterix-v1", options), options, tmp_path / name, workers)
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    metadata = read_metadata(tmp_path / "one")
    assert metadata.environment == "gymnasium:MinAtar/Asterix-v1"
    assert metadata.made_by["config"]["height"] == 10
    assert "center_agent" not in metadata.made_by["config"]
    seeds = {}
    for split in SPLITS:
        source = ClipSource(tmp_path / "one", split, seq_len=16)
        seeds[split] = {clip.level_seed for clip in source.clips(range(len(source)))}
    assert len(set().union(*seeds.values())) == sum(map(len, seeds.values()))


def test_pictures_shrink_by_areas_and_grow_by_pixels():
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(resize(small, 4, 6), small.repeat(2, 0).repeat(3, 1))
    np.testing.assert_array_equal(resize(small.repeat(3, 0).repeat(5, 1), 2, 2), small)


def test_arguments_for_an_environment():
    words = ("continuous=False", "mode=2", "obs_type=rgb", "path=a=b")
    assert read_kwargs(words) == {"continuous": False, "mode": 2, "obs_type": "rgb", "path": "a=b"}


@pytest.mark.parametrize(
    ("id", "changes", "message"),
    [
        ("Nowhere-v0", {}, "`env` gymnasium:Nowhere-v0: cannot be made"),
        ("Encoded-v0", {"env_kwargs": ("speed=3",)}, "`env` gymnasium:Encoded-v0: cannot be made .*speed"),
        ("Encoded-v0", {"env_kwargs": ("speed",)}, "`env_kwargs` speed: expected NAME=VALUE"),
        ("Encoded-v0", {"frame_skip": 0}, "`frame_skip` 0: expected at least 1"),
        ("Encoded-v0", {"sticky_actions": 1.0}, "`sticky_actions` 1.0: expected 0 or more and less than 1"),
        ("Encoded-v0", {"height": 0}, "`height` 0: expected at least 1 pixel"),
        ("nowhere:Any-v0", {}, "`env` gymnasium:nowhere:Any-v0: cannot be made .*nowhere"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(id, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        find_environment(f"gymnasium:{id}", dataclasses.replace(OPTIONS, **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"needs a package that is not installed .*`make env-deps`"):
        find_environment("gymnasium:CartPole-v1", OPTIONS)


def test_procgen_does_without_gymnasium():
    code = "import sys; import generate_dataset; print([m for m in ('gymnasium', 'ale_py', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
