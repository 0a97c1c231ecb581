"""`Recorder`: a loop of one's own becomes a dataset."""

import numpy as np
import pytest

from models.errors import InputError
from sources import Recorder, recorder
from tests.conftest import ROOT
from utils.data import ClipSource
from utils.records import Clip, read_metadata


def play(target: Recorder, lengths: list[int], actions: bool = True) -> None:
    """Episodes of so many steps whose frames tell the episode and the step."""
    frame = np.empty((6, 8, 3), np.uint8)  # one buffer for all, as games have it
    for episode, length in enumerate(lengths):
        for t in range(length):
            frame[...] = episode, t % 256, 7
            action = {"action": (episode + t) % 3} if actions else {}
            target.step(frame, reward=t, done=t == length - 1, **action)


def clips_of(folder, split: str) -> list[Clip]:
    source = ClipSource(folder, split, seq_len=1)
    return sorted(source.clips(range(len(source))), key=lambda clip: clip.clip_id)


def test_episodes_become_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SHARD_BYTES", 3_000)
    mine = Recorder(tmp_path / "mine", ("A", "B", "C"), fps=20, idle_action="C", clip_length=8, min_clip_length=4)
    play(mine, [20, 9, 8, 3, 6])
    mine.close()
    mine.close()  # twice does no harm
    metadata = read_metadata(tmp_path / "mine")
    assert (metadata.environment, metadata.fps, metadata.frame_shape) == ("mine", 20, (6, 8, 3))
    assert (metadata.action_names, metadata.idle_action) == (("A", "B", "C"), "C")
    assert metadata.levels == {"ended": 5, "solved": None, "rewards": (190 + 36 + 28 + 3 + 15) / 5}
    found = {
        split: [(int(clip.frames_THWC[0, 0, 0, 0]), int(clip.frames_THWC[0, 0, 0, 1]), len(clip)) for clip in clips]
        for split in metadata.splits
        for clips in [clips_of(tmp_path / "mine", split)]
    }
    assert found == {
        "train": [(0, 0, 8), (0, 8, 8), (0, 12, 8), (4, 0, 6)],
        "val": [(1, 0, 8), (1, 1, 8)],
        "test": [(2, 0, 8)],
    }
    assert len(metadata.splits["train"]) == 2
    for split in found:
        for clip in clips_of(tmp_path / "mine", split):
            episode, t, _ = clip.frames_THWC[:, 2, 3].T.astype(int)
            np.testing.assert_array_equal(clip.actions_T, (episode + t) % 3)
            np.testing.assert_array_equal(clip.rewards_T, t)
            assert not clip.truncated_T.any()
            np.testing.assert_array_equal(clip.terminated_T, t == [19, 8, 7, 2, 5][episode[0]])


def test_without_actions_and_with_ends_of_all_kinds(tmp_path):
    with Recorder(tmp_path / "mine", clip_length=4, min_clip_length=2) as mine:
        frame = np.zeros((4, 4, 3), np.uint8)
        for t in range(6):
            mine.step(frame, done=t == 5, success=True if t == 5 else None)
        for t in range(6):
            mine.step(frame, truncated=t == 5)
        for _ in range(3):
            mine.step(frame)
        mine.end_episode()
        mine.end_episode()  # there is none
        for _ in range(3):
            mine.step(frame)
    train, val, test = (clips_of(tmp_path / "mine", split) for split in ("train", "val", "test"))
    assert [clip.success for clip in train] == [True, True, None]
    assert train[1].terminated_T.tolist() == [False, False, False, True]
    assert [len(clip) for clip in (*val, *test)] == [4, 4, 3]
    assert val[1].truncated_T.tolist() == [False, False, False, True]
    assert not np.any([*val[1].terminated_T, *test[0].terminated_T, *test[0].truncated_T])
    assert train[0].actions_T is None
    assert read_metadata(tmp_path / "mine").levels["solved"] == 1


def test_an_endless_episode_is_written_as_it_goes_and_kept_when_something_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "SHARD_BYTES", 5_000)

    def crash() -> None:
        with Recorder(tmp_path / "mine", clip_length=8, min_clip_length=8) as mine:
            for t in range(100):
                mine.step(np.full((6, 8, 3), t, np.uint8))
                assert len(list((tmp_path / "mine").rglob("*.array_record"))) == (t + 1) // 40  # 5 clips fill a file
            raise KeyError("the game")

    with pytest.raises(KeyError, match="the game"):
        crash()
    clips = clips_of(tmp_path / "mine", "train")
    assert [int(clip.frames_THWC[0, 0, 0, 0]) for clip in clips] == [*range(0, 96, 8), 92]
    with pytest.raises(KeyError, match="at once"), Recorder(tmp_path / "nothing"):
        raise KeyError("at once")


@pytest.mark.parametrize("real", [True, False])
def test_rows_of_actions(tmp_path, real):
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 2, (90, 2)).astype(np.float32) if real else rng.integers(0, (2, 5), (90, 2))
    with Recorder(tmp_path / "mine", action_columns=("X", "Y"), clip_length=30) as mine:
        for t, row in enumerate(rows):
            mine.step(np.full((4, 4, 3), t, np.uint8), row if real else list(map(int, row)), done=t % 30 == 29)
        with pytest.raises(InputError, match=r"action .*: expected 2 numbers, as there are action_columns"):
            mine.step(np.zeros((4, 4, 3), np.uint8), 3)
        with pytest.raises(InputError, match="expected real numbers always, or integers from 0 always"):
            mine.step(np.zeros((4, 4, 3), np.uint8), [1, 2] if real else [1.0, 2.0])
    metadata = read_metadata(tmp_path / "mine")
    assert [column.name for column in metadata.action_columns] == ["X", "Y"]
    if real:
        np.testing.assert_allclose(
            [column.mean for column in metadata.action_columns], rows[:30].mean(axis=0), rtol=1e-5
        )
        np.testing.assert_allclose(
            [column.scale for column in metadata.action_columns], rows[:30].std(axis=0), rtol=1e-5
        )
    else:
        assert [len(column.values) for column in metadata.action_columns] == [2, 5]
    (clip,) = clips_of(tmp_path / "mine", "val")
    np.testing.assert_array_equal(clip.actions_T, rows[30:60])
    assert metadata.action_names is None


def test_many_episodes_are_divided(tmp_path):
    with Recorder(tmp_path / "mine", ("A", "B", "C"), clip_length=4, min_clip_length=4, val_fraction=0.1) as mine:
        play(mine, [4] * 60)
    first = {
        split: [int(clip.frames_THWC[0, 0, 0, 0]) for clip in clips_of(tmp_path / "mine", split)]
        for split in ("val", "test")
    }
    assert first == {"val": [1, 11, 21, 31, 41, 51], "test": [2, 52]}
    with Recorder(tmp_path / "short", ("A", "B", "C"), clip_length=4, min_clip_length=4, val_fraction=0.1) as mine:
        play(mine, [4, 2, 3, 4, 4])  # of two episodes there is no clip: the next ones take their turns
    assert [len(clips_of(tmp_path / "short", split)) for split in ("train", "val", "test")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("frame", "action", "message"),
    [
        (np.zeros((4, 4, 3)), 0, r"frame of float64 \(4, 4, 3\): expected uint8 \(height, width, 3\)"),
        (np.zeros((4, 4), np.uint8), 0, r"frame of uint8 \(4, 4\): expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), 2, "action 2: expected 0 to 1"),
        (np.zeros((4, 4, 3), np.uint8), None, "action None: expected 0 to 1"),
        (np.zeros((4, 4, 3), np.uint8), 0.5, "action 0.5: expected 0 to 1"),
    ],
)
def test_what_is_no_frame_or_action_is_refused(tmp_path, frame, action, message):
    mine = Recorder(tmp_path / "mine", ("A", "B"))
    with pytest.raises(InputError, match=message):
        mine.step(frame, action)


def test_refusals(tmp_path):
    mine = Recorder(tmp_path / "mine")
    mine.step(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"frame of uint8 \(4, 5, 3\): expected uint8 \(4, 4, 3\)"):
        mine.step(np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(InputError, match="action 1: name the actions first"):
        mine.step(np.zeros((4, 4, 3), np.uint8), 1)
    with pytest.raises(InputError, match="nothing to write; no episode had 16 frames"):
        mine.close()
    with pytest.raises(InputError, match="the recorder is closed"):
        mine.step(np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="full: is not empty"):
        Recorder(tmp_path / "full")
    with pytest.raises(InputError, match="min_clip_length 40: expected 1 to 32"):
        Recorder(tmp_path / "other", min_clip_length=40)


def test_the_readme_shows_it(tmp_path, monkeypatch):
    code = next(
        block for block in (ROOT / "README.md").read_text().split("```python\n")[1:] if "import Recorder" in block
    ).split("```")[0]
    assert len(code.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)

    class Game:
        def reset(self) -> np.ndarray:
            self.time = 0
            return np.zeros((16, 16, 3), np.uint8)

        def step(self, action: int) -> tuple[np.ndarray, float, bool]:
            self.time += 1
            return np.full((16, 16, 3), self.time, np.uint8), 1.0, self.time == 100

    exec(code, {"game": Game(), "policy": lambda frame: 1})
    metadata = read_metadata("data/mine")
    assert all(metadata.splits.values())
    assert metadata.levels["rewards"] == 100


def test_the_gymnasium_wrapper(tmp_path):
    pytest.importorskip("gymnasium", reason="needs gymnasium (make env-deps)")
    from sources.wrapper import RecordClips
    from tests.test_gymnasium import Encoded

    env = RecordClips(Encoded("rgb_array", ends_at=40), tmp_path / "mine", action_names="01234", fps=10)
    for seed in range(4):
        env.reset(seed=seed)
        for t in range(20 if seed == 1 else 40):  # one is left in the middle
            env.step(t % 5)
    env.close()
    for split, seeds in {"train": [0, 0, 3, 3], "val": [1], "test": [2, 2]}.items():
        clips = clips_of(tmp_path / "mine", split)
        assert [int(clip.frames_THWC[0, 0, 0, 0]) for clip in clips] == seeds
        for clip in clips:
            _, time, led = clip.frames_THWC[:, 0, 0].T
            np.testing.assert_array_equal(clip.actions_T, time % 5)
            np.testing.assert_array_equal(led[1:], clip.actions_T[:-1])
            np.testing.assert_array_equal(clip.truncated_T, time == 39)
            assert not clip.terminated_T.any()  # both at once is time up
