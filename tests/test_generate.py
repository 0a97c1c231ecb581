"""The data is checked against the game itself: each level is played again from its seed and the recorded actions."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from generate_dataset import Config, main
from models.errors import InputError
from sources import recording
from sources.environment import Environment, Recording, RecordingOptions, options_of
from sources.levels import cut
from sources.policies import choose_actions
from sources.procgen import ACTION_NAMES, COINRUN_WEIGHTS, FIRST_LEVEL, Procgen
from sources.recording import Task, plan, record
from sources.registry import folder_name
from utils.cli import run
from utils.data import ClipSource
from utils.records import SPLITS, Clip, read_metadata

with contextlib.redirect_stderr(io.StringIO()):
    from procgen import ProcgenGym3Env

ROOT = Path(__file__).parents[1]
RIGHT = [i for i, name in enumerate(ACTION_NAMES) if name.startswith("RIGHT")]
SMALL = Config(num_episodes=10, seed=3, policy="sticky")  # 10 shards of one episode: 8 for training, val, test


def make_clips(config: Config, task: Task) -> list[Clip]:
    return recording.make_clips(Procgen("coinrun"), config, task)[0]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place_of(clip: Clip) -> tuple[str, int]:
    """The episode that a clip is from, and its first time step there."""
    episode, step = clip.clip_id.split("/step")
    return episode, int(step)


@pytest.fixture(scope="module")
def whole_clips() -> list[Clip]:
    """Six episodes of which no piece is dropped."""
    return make_clips(dataclasses.replace(SMALL, min_clip_length=1), Task("train", 0, 6))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "coinrun"
    main(dataclasses.replace(SMALL, output_dir=str(folder), num_workers=2))
    return folder


# What is in the clips


def replayed_levels(clips: list[Clip], clip_length: int, game: str, **options) -> int:
    """Plays every level again, from its seed and its actions, and compares; returns the number of levels."""
    levels = 0
    for _, clips_of_episode in itertools.groupby(sorted(clips, key=place_of), lambda clip: place_of(clip)[0]):
        step = 0
        for level_seed, clips_of_level in itertools.groupby(clips_of_episode, lambda clip: clip.level_seed):
            levels += 1
            env = ProcgenGym3Env(
                num=1, env_name=game, start_level=level_seed, num_levels=1, rand_seed=9, num_threads=0, **options
            )
            begin, frames, known = step, [], list(clips_of_level)
            for clip in known:
                back = step - place_of(clip)[1]  # frames of the clip before, only in a level's last clip
                assert back == 0 or (clip is known[-1] and len(clip) == clip_length)
                assert len(clip) == min(clip_length, step + len(clip) - back - begin)
                assert all(map(np.array_equal, clip.frames_THWC[:back], frames[len(frames) - back :]))
                for t in range(back, len(clip)):
                    _, observation, first = env.observe()
                    assert first[0] == (step == begin), f"{clip.clip_id}: a level ends within the clip"
                    np.testing.assert_array_equal(clip.frames_THWC[t], observation["rgb"][0])
                    frames.append(clip.frames_THWC[t])
                    env.act(clip.actions_T[t : t + 1])
                    reward, _, first = env.observe()
                    assert reward[0] == clip.rewards_T[t]
                    assert first[0] == (clip.terminated_T[t] or clip.truncated_T[t])
                    step += 1
            solved = bool(env.get_info()[0]["prev_level_complete"]) if first[0] else None
            assert {clip.success for clip in known} == {solved}
            assert first[0] or step == 1000, f"{clip.clip_id}: the level goes on after its last clip"
        assert step == 1000
    return levels


def test_every_level_replays_from_its_seed_and_ends_where_its_last_clip_ends(whole_clips):
    assert replayed_levels(whole_clips, SMALL.clip_length, "coinrun") > 20


def test_only_levels_that_are_too_short_are_left_out(whole_clips):
    kept = make_clips(SMALL, Task("train", 0, 6))
    long_enough = [clip for clip in whole_clips if len(clip) >= SMALL.min_clip_length]
    assert 0 < len(long_enough) < len(whole_clips)
    assert [clip.clip_id for clip in kept] == [clip.clip_id for clip in long_enough]
    for clip, expected in zip(kept, long_enough, strict=True):
        np.testing.assert_array_equal(clip.frames_THWC, expected.frames_THWC)
        np.testing.assert_array_equal(clip.actions_T, expected.actions_T)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ((0, 64), [(0, 32), (32, 64)]),
        ((10, 75), [(10, 42), (42, 74), (43, 75)]),
        ((10, 73), [(10, 42), (41, 73)]),
        ((5, 25), [(5, 25)]),
        ((5, 20), []),
    ],
)
def test_the_last_clip_of_a_level_reaches_back(level, expected):
    assert list(cut(*level, clip_length=32, min_clip_length=16)) == expected


def test_coins_are_rewarded_at_the_last_action_of_their_clip(whole_clips):
    rewarded = [clip for clip in whole_clips if clip.rewards_T.any()]
    assert len(rewarded) >= 5
    for clip in rewarded:
        assert clip.rewards_T[-1] == 10
        assert not clip.rewards_T[:-1].any()
        assert clip.success
        assert clip.terminated_T[-1]
        assert not clip.truncated_T.any()


def test_sticky_policy_gets_further_than_uniform(whole_clips):
    rng = np.random.default_rng(0)
    actions = {policy: choose_actions(policy, COINRUN_WEIGHTS, rng, 20, 1000) for policy in ("uniform", "sticky")}
    right = {policy: np.isin(a, RIGHT).mean() for policy, a in actions.items()}
    held = {policy: (a[:, 1:] == a[:, :-1]).mean() for policy, a in actions.items()}
    assert abs(right["uniform"] - 3 / 15) < 0.02
    assert right["sticky"] > 0.42
    assert held["uniform"] < 0.1 < 0.8 < held["sticky"] < 0.95
    for a in actions.values():
        assert set(np.unique(a)) == set(range(15))
    uniform = make_clips(dataclasses.replace(SMALL, policy="uniform", min_clip_length=1), Task("train", 0, 6))
    coins = [sum(int(clip.rewards_T.any()) for clip in clips) for clips in (uniform, whole_clips)]
    assert coins[1] > 2 * coins[0]


# Seeds and levels


def test_splits_play_their_own_levels_and_all_of_them():
    config = dataclasses.replace(SMALL, num_levels=3, min_clip_length=1)
    levels = {split: {clip.level_seed for clip in make_clips(config, Task(split, 0, 2))} for split in SPLITS}
    assert levels == {split: {first, first + 1, first + 2} for split, first in FIRST_LEVEL.items()}
    assert not levels["train"] & levels["val"]
    assert not levels["train"] & levels["test"]
    assert not levels["val"] & levels["test"]


def test_seed_split_and_shard_each_change_what_is_played():
    def first_levels(config: Config, task: Task) -> list[int]:
        return [clip.level_seed - FIRST_LEVEL[task.split] for clip in make_clips(config, task)][:1]

    base = first_levels(SMALL, Task("train", 0, 1))
    assert base == first_levels(SMALL, Task("train", 0, 1))
    assert base != first_levels(dataclasses.replace(SMALL, seed=4), Task("train", 0, 1))
    assert base != first_levels(SMALL, Task("train", 1, 1))
    assert base != first_levels(SMALL, Task("val", 0, 1))


@pytest.mark.parametrize("num_episodes", [1, 2, 3, 4, 24, 64, 1000, 10_000])
def test_plan(num_episodes):
    tasks = plan(Config(num_episodes=num_episodes), 64 * 64 * 3)
    in_split = {split: sum(task.num_episodes for task in tasks if task.split == split) for split in SPLITS}
    assert sum(in_split.values()) == num_episodes
    assert all(1 <= task.num_episodes <= 16 for task in tasks)
    assert len({task.file for task in tasks}) == len(tasks)
    if num_episodes >= 3:
        assert all(in_split.values())
        assert in_split["train"] >= num_episodes / 3
    if num_episodes >= 24:
        assert in_split["train"] >= 0.9 * num_episodes
        assert max(task.num_episodes for task in tasks) <= num_episodes / 8
    for side, most in ((128, 4), (256, 1), (1024, 1)):  # of larger frames fewer fit the same memory
        sizes = [task.num_episodes for task in plan(Config(num_episodes=num_episodes), side * side * 3)]
        assert sum(sizes) == num_episodes
        assert max(sizes) <= most


# The dataset on disk


def test_dataset_holds_what_its_metadata_says(dataset):
    metadata = read_metadata(dataset)
    assert (metadata.environment, metadata.num_actions, metadata.fps) == ("coinrun", 15, 15)
    assert metadata.action_names == ACTION_NAMES
    assert metadata.levels["ended"] > metadata.levels["solved"] > 10
    assert metadata.levels["rewards"] == pytest.approx(
        10 * metadata.levels["solved"] / metadata.levels["ended"], abs=1e-3
    )
    assert sorted(path.name for path in dataset.iterdir()) == ["metadata.json", "test", "train", "val"]
    ids = []
    for split in SPLITS:
        source = ClipSource(dataset, split, seq_len=1)
        clips = source.clips(range(len(source)))
        first, stop = metadata.made_by["level_seeds"][split]
        assert all(first <= clip.level_seed < stop for clip in clips)
        assert all(SMALL.min_clip_length <= len(clip.frames_THWC) <= SMALL.clip_length for clip in clips)
        ids += [clip.clip_id for clip in clips]
    assert len(set(ids)) == len(ids) > 300


def test_datasets_without_facts_about_actions_get_those_of_coinrun(dataset, tmp_path):
    fields = json.loads((dataset / "metadata.json").read_text())
    old = {name: value for name, value in fields.items() if name not in ("same_actions", "idle_action")}
    (tmp_path / "metadata.json").write_text(json.dumps(old))
    assert read_metadata(tmp_path) == read_metadata(dataset)
    (tmp_path / "metadata.json").write_text(json.dumps(old | {"environment": "another"}))
    assert (read_metadata(tmp_path).same_actions, read_metadata(tmp_path).idle_action) == ({}, None)
    (tmp_path / "metadata.json").write_text(json.dumps(fields | {"same_actions": {"UP": "NONE"}, "idle_action": "Q"}))
    assert (read_metadata(tmp_path).same_actions, read_metadata(tmp_path).idle_action) == ({"UP": "NONE"}, "Q")


def test_number_of_workers_changes_no_byte(dataset, tmp_path):
    main(dataclasses.replace(SMALL, output_dir=str(tmp_path / "coinrun"), num_workers=1))
    assert files_of(tmp_path / "coinrun") == files_of(dataset)


def test_interrupted_runs_leave_no_dataset_and_the_same_command_completes_it(dataset, tmp_path):
    folder = tmp_path / "coinrun"
    command = [sys.executable, "generate_dataset.py", "--num_workers", "2", "--output_dir", str(folder)]
    command += ["--num_episodes", "10", "--seed", "3", "--policy", "sticky"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def num_finished() -> int:
        return len(list((folder / "unfinished").glob("train-*.json")))

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(process: subprocess.Popen) -> tuple[int, str]:
        # The pipes close when the last worker is gone, so this also shows that none outlives its parent.
        _, stderr = process.communicate(timeout=60)
        with pytest.raises(InputError, match="no dataset here"):
            read_metadata(folder)
        whole = files_of(dataset)
        for path in folder.glob("*/*.array_record"):
            assert path.read_bytes() == whole[str(path.relative_to(folder))]
        return process.returncode, stderr

    interrupted = start()
    wait_until(lambda: num_finished() > 0)
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    status, stderr = end(interrupted)
    assert status == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr

    killed = start()
    time.sleep(2)  # while it starts its workers: waiting for a shard would race with the end of so short a run
    killed.send_signal(signal.SIGKILL)
    assert end(killed)[0] == -signal.SIGKILL
    finished = num_finished()

    stdout, stderr = (last := start()).communicate(timeout=60)
    assert last.returncode == 0, stderr
    assert f"continuing {folder}: {finished} of 10 episodes are done" in stderr
    assert "gym" not in stderr.lower()
    assert str(folder) in stdout
    assert files_of(folder) == files_of(dataset)


def test_full_disk_is_one_error_and_leaves_no_file_under_its_name(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # workers inherit it
    try:
        with pytest.raises(OSError, match=r"train/00000\.array_record: .*too large"):
            main(Config(num_episodes=1, output_dir=str(tmp_path / "coinrun")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(files_of(tmp_path)) == ["coinrun/unfinished/made_by.json"]


# Other environments


class Counting(Environment):
    """Frames, actions and rewards tell the time step; every 300 steps a level begins."""

    name = "counting"
    frame_shape = (8, 12, 3)
    fps = 4
    action_names = ("A", "B")
    idle_action = "B"

    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        t = np.broadcast_to(np.arange(1000), (num_envs, 1000))
        frames = np.broadcast_to((t % 256).astype(np.uint8)[..., None, None, None], (num_envs, 1000, *self.frame_shape))
        return Recording(frames, (t % 2).astype(np.int32), t.astype(np.float32), t % 300 == 0)


def test_any_environment_can_be_recorded(tmp_path):
    record(Counting(), RecordingOptions(num_episodes=5), tmp_path / "new", num_workers=1)
    metadata = read_metadata(tmp_path / "new")
    assert (metadata.environment, metadata.frame_shape, metadata.fps) == ("counting", (8, 12, 3), 4)
    assert (metadata.action_names, metadata.same_actions, metadata.idle_action) == (("A", "B"), {}, "B")
    clips = ClipSource(tmp_path / "new", "train", seq_len=1)
    assert len(clips) == 3 * (3 * 10 + 4)
    assert metadata.levels == {"ended": 5 * 3, "solved": None, "rewards": pytest.approx(np.arange(900).sum() / 3)}
    for clip in clips.clips(range(len(clips))):
        t = place_of(clip)[1] + np.arange(32)
        assert t[0] // 300 == t[-1] // 300
        assert (clip.level_seed, clip.terminated_T, clip.truncated_T, clip.success) == (None,) * 4
        np.testing.assert_array_equal(clip.frames_THWC[:, 3, 4, 1], t % 256)
        np.testing.assert_array_equal(clip.actions_T, t % 2)
        np.testing.assert_array_equal(clip.rewards_T, t)


def test_the_recipe_for_an_environment_works(tmp_path):
    recipe = (ROOT / "docs" / "data.md").read_text().split("## Add an environment")[1]
    code: dict = {"__name__": "grid"}
    exec(recipe.split("```python")[1].split("```")[0], code)
    record(code["Grid"](), RecordingOptions(num_episodes=3, num_levels=50), tmp_path / "grid", num_workers=0)
    metadata = read_metadata(tmp_path / "grid")
    assert (metadata.same_actions, metadata.idle_action) == ({"WAIT": "STAY"}, "STAY")
    levels, dots = {}, 0
    for split in SPLITS:
        clips = ClipSource(tmp_path / "grid", split, seq_len=1)
        levels[split] = {clip.level_seed for clip in clips.clips(range(len(clips)))}
        for clip in clips.clips(range(len(clips))):
            cells_T = (clip.frames_THWC[:, ::4, ::4, 2] == 250).reshape(len(clip), -1).argmax(axis=1)
            agents_T2 = np.stack([cells_T // 8, cells_T % 8], axis=1)
            moved = np.clip(agents_T2 + code["MOVES"][clip.actions_T], 0, 7)
            np.testing.assert_array_equal(moved[:-1], agents_T2[1:])
            assert not clip.rewards_T[:-1].any()
            dots += int(clip.rewards_T[-1])
    assert dots > 3
    assert not levels["train"] & levels["val"]
    assert not levels["train"] & levels["test"]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("frames_BTHWC", lambda frames: frames[:, :, :-1], r"frames_BTHWC has shape \(1, 1000, 7, 12, 3\); expected"),
        ("actions_BT", lambda actions: actions + 1, "actions beyond the 2 that have names"),
        ("first_BT", lambda first: first & False, "true at t = 0"),
    ],
)
def test_an_environment_that_breaks_its_promise_is_named(monkeypatch, field, change, message):
    play = Counting.play
    monkeypatch.setattr(
        Counting, "play", lambda *args: (lambda r: r._replace(**{field: change(getattr(r, field))}))(play(*args))
    )
    with pytest.raises(ValueError, match=f"counting: .*{message}"):
        recording.make_clips(Counting(), RecordingOptions(), Task("train", 0, 1))


# Refusals


def test_never_overwrites(dataset, tmp_path):
    before = files_of(dataset)
    with pytest.raises(InputError, match=f"{dataset}: already holds a dataset; choose another"):
        main(dataclasses.replace(SMALL, output_dir=str(dataset)))
    assert files_of(dataset) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=f"{tmp_path}: is not empty"):
        main(dataclasses.replace(SMALL, output_dir=str(tmp_path)))
    assert files_of(tmp_path) == {"thesis.txt": b"mine"}


def test_does_not_continue_another_configuration(dataset, tmp_path):
    made_by = json.loads((dataset / "metadata.json").read_text())["made_by"]
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "made_by.json").write_text(json.dumps(made_by | {"format_version": 1}))
    with pytest.raises(InputError, match="unfinished dataset with num_episodes 10, not 13, seed 3, not 5;"):
        main(dataclasses.replace(SMALL, num_episodes=13, seed=5, output_dir=str(tmp_path)))
    assert list(files_of(tmp_path)) == ["unfinished/made_by.json"]


def test_continues_notes_that_name_no_environment_and_no_other_one(dataset, tmp_path):
    made_by = json.loads((dataset / "metadata.json").read_text())["made_by"] | {"format_version": 1}
    note = tmp_path / "unfinished" / "made_by.json"
    note.parent.mkdir()
    note.write_text(json.dumps(made_by | {"environment": "another"}))
    with pytest.raises(InputError, match="unfinished dataset with environment another, not coinrun;"):
        main(dataclasses.replace(SMALL, output_dir=str(tmp_path)))
    note.write_text(json.dumps(made_by))
    main(dataclasses.replace(SMALL, output_dir=str(tmp_path)))
    assert files_of(tmp_path) == files_of(dataset)


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--num_episodes 0", 1),
        ("--seed -1", 1),
        ("--num_workers 0", 1),
        ("--clip_length 1001", 1),
        ("--min_clip_length 0", 1),
        ("--min_clip_length 33", 1),
        ("--num_levels 0", 1),
        ("--val_fraction 0.3", 1),
        ("--test_fraction nan", 1),
        ("--policy clever", 2),
        ("--env chess", 1),
        ("--env gymnasium", 1),
        ("--frame_skip 2", 1),
        ("--distribution_mode extreme", 1),
        ("--planner_rollouts 0", 1),
        ("--planner_explore 1.0", 1),
        ("--learner runs/policy", 1),
        ("--num_episodes many", 2),
    ],
)
def test_bad_flags_are_refused_by_name_and_value(flags, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate_dataset.py", "--output_dir", str(tmp_path / "new"), *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        run(main, Config)
    assert stopped.value.code == status
    stderr = capsys.readouterr().err
    name, value = flags.split()
    assert name.replace("_", "-") in stderr.replace("_", "-")
    assert value in stderr
    if status == 1:
        assert len(stderr.splitlines()) == 1
        assert stderr.startswith(f"error: {flags}: expected ")
    assert not (tmp_path / "new").exists()


def test_an_environment_refuses_options_and_policies_that_it_has_not(tmp_path):
    for changes, message in (
        ({"center_agent": False}, "`center_agent` False: expected nothing: counting has no such option"),
        ({"policy": "planner"}, "`policy` planner: expected uniform or sticky for counting"),
        ({"only_solved": True}, "`only_solved` True: expected nothing: counting has no such option"),
    ):
        with pytest.raises(InputError, match=message):
            record(Counting(), RecordingOptions(num_episodes=3, **changes), tmp_path / "new", num_workers=0)
    assert not (tmp_path / "new").exists()
    for changes, message in (
        ({"planner_explore": 0.3}, "`planner_explore` 0.3: expected nothing but with --policy planner or walker"),
        ({"policy": "sticky", "planner_rollouts": 9}, "`planner_rollouts` 9: expected nothing but with"),
        ({"action_weights": ("UP=1",)}, r"`action_weights` .*: expected none with --policy uniform"),
    ):
        with pytest.raises(InputError, match=message):
            Procgen("coinrun").options_of(RecordingOptions(**changes))


def test_a_recording_without_clips_is_no_dataset(tmp_path):
    options = RecordingOptions(num_episodes=3, clip_length=1000, min_clip_length=1000)
    with pytest.raises(InputError, match="no level of counting was as long"):
        record(Counting(), options, tmp_path / "new", num_workers=0)
    assert not (tmp_path / "new" / "metadata.json").exists()


def test_what_a_dataset_of_a_dataset_was_recorded_with():
    made_by = {"command": "generate_dataset.py", "config": {"seed": 7}}
    assert options_of({"of": {"of": made_by}}).seed == options_of(made_by).seed == 7
    assert options_of({"of": {"command": "sources.Recorder"}}) is None


def test_the_folder_is_named_after_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(Config(num_episodes=1, env="maze"))
    assert read_metadata("data/maze").environment == "maze"
    said = capsys.readouterr().out
    assert "data/maze\n" in said
    assert "% solved" in said
    assert folder_name("gymnasium:ALE/Breakout-v5") == "ALE-Breakout-v5"


def test_missing_procgen_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", None)
    with pytest.raises(InputError, match=r"procgen-mirror.*pip install --no-deps -r requirements-procgen\.txt"):
        main(Config(output_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_a_system_without_opengl_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(InputError, match=r"OpenGL.*libGL\.so\.1.*apt-get install libgl1"):
        main(Config(output_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
