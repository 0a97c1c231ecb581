"""Other sources become datasets: same frames, same order, no leaks between splits, nothing executed."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import preprocess_dataset
from models.errors import InputError
from preprocess_dataset import Config, main
from sources import convert
from sources.clips import Source
from sources.kind import Episode, Header, Kind, files_ending
from sources.registry import KINDS
from utils import video
from utils.data import ClipSource, batches
from utils.records import SPLITS, read_metadata


def episode(number, num_frames, height=16, width=16):
    """Noise that is different in every episode and frame; its first pixel holds both numbers."""
    frames = np.random.default_rng(number).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = number, np.arange(num_frames)
    return frames


def flat(num_frames, step=4, side=32):
    """Frames whose brightness is their number times `step`."""
    return (
        np.full((num_frames, side, side, 3), step, np.uint8)
        * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    )


@pytest.fixture
def config(tmp_path):
    """Makes configurations of a small conversion in this process."""
    (tmp_path / "in").mkdir()
    defaults = {
        "input_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "clip_length": 8,
        "min_clip_length": 4,
        "num_workers": 0,
    }
    return lambda **changes: Config(**(defaults | changes))


@pytest.fixture
def source(tmp_path):
    return tmp_path / "in"


def read_all(folder):
    """Clips by split, in the order of the source."""
    splits = read_metadata(folder).splits
    return {
        split: (lambda clips: clips.clips(range(len(clips))))(ClipSource(folder, split, 1)) if splits[split] else []
        for split in SPLITS
    }


def by_id(folder):
    return {clip.clip_id: clip for clips in read_all(folder).values() for clip in clips}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_npy_frames_come_back_exactly(source, config, capsys):
    lengths = {0: 30, 1: 12, 2: 8, 10: 4}
    for number, length in lengths.items():
        np.save(source / f"episode_{number}.npy", episode(number, length))
    main(config())
    clips = by_id(config().output_dir)
    expected = {  # rests of 4 or more frames are kept: 30 = 8 + 8 + 8 + 6, 12 = 8 + 4
        f"episode_{number}.npy/{start:06d}": episode(number, length)[start : start + 8]
        for number, length in lengths.items()
        for start in range(0, length, 8)
    }
    assert clips.keys() == expected.keys()
    for clip_id, frames in expected.items():
        np.testing.assert_array_equal(clips[clip_id].frames_THWC, frames)
        assert clips[clip_id].actions_T is None
    metadata = read_metadata(config().output_dir)
    assert (metadata.environment, metadata.frame_shape, metadata.fps) == ("in", (16, 16, 3), 15)
    assert metadata.action_names is None
    assert "4 files read, 0 skipped; 8 clips" in capsys.readouterr().out


def test_short_rests_are_dropped(source, config):
    np.save(source / "a.npy", episode(0, 11))
    main(config())
    assert list(by_id(config().output_dir)) == ["a.npy/000000"]


def test_clips_follow_the_natural_order_of_files(source, config):
    for number in (10, 9, 100, 1):
        np.save(source / f"episode_{number}.npy", episode(number, 16))
    main(config(val_fraction=0, test_fraction=0))
    numbers = [
        (clip.frames_THWC[0, 0, 0, 0], clip.frames_THWC[0, 0, 0, 1]) for clip in read_all(config().output_dir)["train"]
    ]
    assert numbers == [(1, 0), (1, 8), (9, 0), (9, 8), (10, 0), (10, 8), (100, 0), (100, 8)]


@pytest.mark.parametrize("missing", [0, 1])
def test_actions_and_rewards_stay_with_their_frames(source, config, missing):
    actions, rewards = np.arange(20) % 7, np.arange(20, dtype=np.float64) / 4
    for number, key in enumerate(("frames", "observations", "video", "arr_0")):
        arrays = {key: episode(number, 20), "actions": actions[: 20 - missing], "rewards": rewards[: 20 - missing]}
        np.savez_compressed(source / f"{number}.npz", **arrays)
    main(config())
    metadata = read_metadata(config().output_dir)
    assert metadata.action_names == ("0", "1", "2", "3", "4", "5", "6")
    if missing:
        actions[-1] = rewards[-1] = 0
    clips = by_id(config().output_dir)
    assert len(clips) == 4 * 3
    for clip in clips.values():
        times = clip.frames_THWC[:, 0, 0, 1]
        np.testing.assert_array_equal(clip.frames_THWC, episode(clip.frames_THWC[0, 0, 0, 0], 20)[times])
        np.testing.assert_array_equal(clip.actions_T, actions[times])
        np.testing.assert_array_equal(clip.rewards_T, rewards[times])


def test_floats_and_gray_arrays(source, config):
    frames = episode(0, 8)
    np.save(source / "floats.npy", (frames / 255).astype(np.float32))
    np.save(source / "gray.npy", frames[..., :1])
    main(config())
    clips = by_id(config().output_dir)
    np.testing.assert_array_equal(clips["floats.npy/000000"].frames_THWC, frames)
    np.testing.assert_array_equal(clips["gray.npy/000000"].frames_THWC, np.repeat(frames[..., :1], 3, axis=-1))


def test_videos(source, config):
    video.write_video(source / "a.mp4", video.upscale(episode(0, 20, 8, 8), 8), 10)
    (source / "more").mkdir()
    video.write_video(source / "more" / "b.gif", flat(20, step=12, side=64), 10)
    main(config())
    clips = by_id(config().output_dir)
    assert sorted(clips) == [f"{name}/{start:06d}" for name in ("a.mp4", "more/b.gif") for start in (0, 8, 16)]
    for start in (0, 8, 16):
        expected = video.upscale(episode(0, 20, 8, 8), 8)[start : start + 8]
        error = clips[f"a.mp4/{start:06d}"].frames_THWC.astype(float) - expected
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 22  # noise, whose colour H.264 halves
        brightness = clips[f"more/b.gif/{start:06d}"].frames_THWC.mean((1, 2, 3)) / 12
        assert list(np.rint(brightness)) == list(range(start, min(start + 8, 20)))
    assert read_metadata(config().output_dir).fps == 10


def test_videos_are_resampled_to_one_rate(source, config):
    video.write_video(source / "a.mp4", flat(16), 10)
    video.write_video(source / "b.mp4", flat(32), 20)
    main(config())
    assert read_metadata(config().output_dir).fps == 10  # of the first video
    assert brightness(config().output_dir, "b.mp4") == list(range(0, 32, 2))
    main(config(output_dir=config().output_dir + "5", fps=5))
    assert read_metadata(config().output_dir + "5").fps == 5
    assert brightness(config().output_dir + "5", "a.mp4") == list(range(0, 16, 2))
    assert brightness(config().output_dir + "5", "b.mp4") == list(range(0, 32, 4))


def brightness(folder, name):
    """Numbers of the frames of one source, in time."""
    clips = [clip for clip_id, clip in sorted(by_id(folder).items()) if clip_id.startswith(name)]
    return [round(float(frame.mean()) / 4) for clip in clips for frame in clip.frames_THWC]


def test_folders_of_images(source, config):
    frames = episode(3, 12)
    (source / "walk").mkdir()
    (source / "gray").mkdir()
    for t in range(12):
        video.write_png(source / "walk" / f"{t}.png", frames[t])
        Image.fromarray(frames[t, :, :, 2]).save(source / "gray" / f"frame{t}.png")
    main(config(fps=7))
    clips = by_id(config().output_dir)
    walk = np.concatenate([clips[f"walk/{start:06d}"].frames_THWC for start in (0, 8)])
    np.testing.assert_array_equal(walk, frames)  # 2.png before 10.png
    gray = np.concatenate([clips[f"gray/{start:06d}"].frames_THWC for start in (0, 8)])
    np.testing.assert_array_equal(gray, np.repeat(frames[..., 2:], 3, axis=-1))
    assert read_metadata(config().output_dir).fps == 7


def test_resizing_averages_areas_and_unites_sizes(source, config):
    small, large = episode(0, 8), episode(1, 8, 32, 48)
    np.save(source / "a.npy", small)
    np.save(source / "b.npy", large)
    main(config(height=8, width=8))
    clips = by_id(config().output_dir)
    means = small.reshape(8, 8, 2, 8, 2, 3).mean((2, 4)), large.reshape(8, 8, 4, 8, 6, 3).mean((2, 4))
    np.testing.assert_allclose(clips["a.npy/000000"].frames_THWC, means[0], atol=1)
    np.testing.assert_allclose(clips["b.npy/000000"].frames_THWC, means[1], atol=1)
    assert read_metadata(config().output_dir).frame_shape == (8, 8, 3)


def test_no_file_is_in_two_splits(source, config):
    for number in range(20):
        np.save(source / f"{number}.npy", episode(number, 30))
    main(config(val_fraction=0.2, test_fraction=0.1))
    clips = read_all(config().output_dir)
    files = {split: {clip.clip_id.split("/")[0] for clip in clips[split]} for split in SPLITS}
    assert [len(files[split]) for split in SPLITS] == [14, 4, 2]
    assert len(set.union(*files.values())) == 20
    shown = {split: {clip.frames_THWC[0, 0, 0, 0] for clip in clips[split]} for split in SPLITS}
    assert {split: {int(name[:-4]) for name in files[split]} for split in SPLITS} == shown
    main(config(output_dir=config().output_dir + "1", val_fraction=0.2, test_fraction=0.1, seed=1))
    other = {clip.clip_id.split("/")[0] for clip in read_all(config().output_dir + "1")["val"]}
    assert other != files["val"]


@pytest.mark.parametrize(
    ("num_files", "expected", "said"),
    [(1, [1, 0, 0], "1 usable source"), (2, [1, 1, 0], "2 usable sources"), (3, [1, 1, 1], None)],
)
def test_splits_of_few_files(source, config, capsys, num_files, expected, said):
    for number in range(num_files):
        np.save(source / f"{number}.npy", episode(number, 8))
    main(config())
    assert [len(read_all(config().output_dir)[split]) for split in SPLITS] == expected
    captured = capsys.readouterr()
    assert (said or "file") in captured.out
    assert ("test split is empty" in captured.err) == (num_files < 3)


def test_any_fractions_leave_files_for_training():
    sources = [Source(str(i), Path(str(i)), KINDS["npy"]) for i in range(3)]
    for fractions in ((0.9, 0.05), (0.05, 0.9), (0.45, 0.45), (0, 0.99), (0, 0)):
        splits = convert.split_sources(sources, fractions[0], fractions[1], seed=0)
        counts = [len(splits[split]) for split in SPLITS]
        assert sum(counts) == 3
        assert counts[0] >= 1
        assert [count > 0 for count in counts[1:]] == [fraction > 0 for fraction in fractions]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_and_never_executed(source, config, capsys, tmp_path):
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(sprung)], dtype=object)
    np.save(source / "metadata.npy", trap)
    np.save(source / "object.npy", trap)
    np.savez(source / "frames.npz", frames=trap)
    np.savez(source / "actions.npz", frames=episode(0, 8), actions=trap)
    (source / "raw.npy").write_bytes(pickle.dumps(Trap(sprung)))
    (source / "raw.npz").write_bytes(pickle.dumps(Trap(sprung)))
    np.savez(source / "good.npz", frames=episode(1, 8), actions=np.zeros(8, int))
    main(config(allow_skips=True))
    assert not sprung.exists()
    assert list(by_id(config().output_dir)) == ["good.npz/000000"]
    captured = capsys.readouterr()
    assert "metadata.npy: not read" in captured.out
    for name in ("object.npy", "frames.npz", "actions.npz", "raw.npy", "raw.npz"):
        assert f"skipped {source / name}: " in captured.err
    assert "object.npy: holds Python objects, that is a pickle" in captured.err
    assert "1 files read, 5 skipped" in captured.out
    np.load(source / "object.npy", allow_pickle=True)
    assert sprung.exists()  # the trap works


def bad_files(folder):
    """Files that cannot be used, and what is said of them."""
    frames = episode(0, 8)
    np.save(folder / "channels_first.npy", frames.transpose(0, 3, 1, 2))
    np.save(folder / "int64.npy", frames.astype(np.int64))
    np.save(folder / "no_time.npy", frames[0])
    np.save(folder / "range.npy", (frames / 200).astype(np.float32))
    np.save(folder / "nan.npy", np.full(frames.shape, np.nan))
    np.save(folder / "short.npy", frames[:3])
    np.save(folder / "size.npy", episode(0, 8, 24, 16))
    np.savez(folder / "keys.npz", pixels=frames)
    np.savez(folder / "action_count.npz", frames=frames, actions=np.zeros(6, int))
    np.savez(folder / "action_type.npz", frames=frames, actions=np.full(8, 0.5))
    np.savez(folder / "action_sign.npz", frames=frames, actions=np.full(8, -1))
    np.savez(folder / "reward_type.npz", frames=frames, actions=np.zeros(8, int), rewards=np.array(["good"] * 8))
    np.save(folder / "cut.npy", frames)
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-100])
    (folder / "empty.npy").write_bytes(b"")
    return {
        "channels_first.npy": "transpose",
        "int64.npy": "int64",
        "no_time.npy": "(16, 16, 3)",
        "range.npy": "expected [0, 1]",
        "nan.npy": "nan",
        "short.npy": "3 frames, fewer than --min_clip_length 4",
        "size.npy": "24×16 (height × width), most sources 16×16",
        "keys.npz": "['pixels']",
        "action_count.npz": "(6,)",
        "action_type.npz": "its actions are 1 column: 0 (real); those of most sources one integer",
        "action_sign.npz": "from -1 to -1",
        "reward_type.npz": "rewards are <U4; expected numbers",
        "cut.npy": "cannot be read",
        "empty.npy": "not a NumPy array file",
    }


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_bad_files_are_named_skipped_and_counted(source, config, capsys, suffix):
    reasons = {name: reason for name, reason in bad_files(source).items() if name.endswith(suffix)}
    for path in source.iterdir():
        if path.suffix != suffix:
            path.unlink()
    for number, name in enumerate("az"):
        if suffix == ".npy":
            np.save(source / f"{name}.npy", episode(number, 8))
        else:
            np.savez(source / f"{name}.npz", frames=episode(number, 8), actions=np.zeros(8, int))
    main(config(allow_skips=True))
    assert sorted(by_id(config().output_dir)) == [f"a{suffix}/000000", f"z{suffix}/000000"]
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    assert len(lines) == len(reasons)
    for name, reason in reasons.items():
        (line,) = (line for line in lines if f"/{name}: " in line)
        assert reason in line
    assert f"2 files read, {len(reasons)} skipped" in captured.out
    made_by = read_metadata(config().output_dir).made_by
    assert (made_by["sources"], made_by["skipped"]) == (2 + len(reasons), len(reasons))


@pytest.mark.parametrize("name", ["int64.npy", "range.npy", "size.npy", "short.npy"])
def test_strict_stops_at_the_first_bad_file(source, config, tmp_path, name):
    bad_files(source)
    for path in source.iterdir():
        if path.name != name:
            path.unlink()
    np.save(source / "a.npy", episode(1, 8))
    with pytest.raises(InputError, match=rf"{name}.*`strict`"):
        main(config(strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_videos_and_images_are_skipped(source, config, capsys):
    video.write_video(source / "a.mp4", flat(16), 10)
    video.write_video(source / "cut.mp4", flat(40), 10)
    (source / "cut.mp4").write_bytes((source / "cut.mp4").read_bytes()[:-300])
    (source / "garbage.mp4").write_bytes(b"garbage")
    video.write_video(source / "short.mp4", flat(3), 10)
    main(config())
    assert {clip_id.split("/")[0] for clip_id in by_id(config().output_dir)} == {"a.mp4", "cut.mp4"}
    captured = capsys.readouterr()
    for name in ("cut.mp4", "garbage.mp4", "short.mp4"):
        assert f"{name}: " in captured.err
    assert "2 files read, 2 skipped" in captured.out


def test_a_file_that_fails_late_leaves_no_clips(source, config, monkeypatch):
    """Also when some of its clips had already been written."""
    monkeypatch.setattr(convert, "SHARD_BYTES", 2 * 8 * 16 * 16 * 3)
    frames = (episode(1, 60) / 255).astype(np.float32)
    frames[50] = 7
    np.save(source / "a.npy", episode(0, 24))
    np.save(source / "b.npy", frames)
    np.save(source / "c.npy", episode(2, 60))
    main(config(val_fraction=0, test_fraction=0))
    clips = read_all(config().output_dir)["train"]
    order = [(number, start) for number, length in ((0, 24), (2, 60)) for start in range(0, length, 8)]
    found = [(int(clip.frames_THWC[0, 0, 0, 0]), int(clip.frames_THWC[0, 0, 0, 1])) for clip in clips]
    assert sorted(found) == order
    shards = read_metadata(config().output_dir).splits["train"]
    assert max(shard.count() for shard in shards) == 2
    assert {shard.file for shard in shards} | {"metadata.json"} == contents(config().output_dir).keys()


def test_same_bytes_for_any_number_of_workers(source, config, monkeypatch):
    monkeypatch.setattr(convert, "TASK_BYTES", 1)  # one file a task, so that workers have something to share
    for number in range(6):
        np.save(source / f"{number}.npy", episode(number, 20))
    np.save(source / "bad.npy", (episode(0, 20) * 1.5).astype(np.float32))
    main(config())
    main(config(output_dir=config().output_dir + "2", num_workers=2))
    first, second = contents(config().output_dir), contents(config().output_dir + "2")
    assert len(first) == 7
    assert first == second


@pytest.mark.parametrize("make", [lambda source: source.rmdir(), lambda source: (source / "notes.txt").touch()])
def test_nothing_to_read_says_what_to_do(source, config, make):
    make(source)
    with pytest.raises(InputError, match=r"`input_dir` .*generate_dataset\.py") as caught:
        main(config())
    assert "\n" not in str(caught.value)


def test_only_bad_files(source, config, tmp_path):
    (source / "a.npy").write_bytes(b"")
    with pytest.raises(InputError, match="none of its 1 sources can be used"):
        main(config())
    np.save(source / "a.npy", np.full((8, 16, 16, 3), 7.0))  # bad in its frames, not in its header
    with pytest.raises(InputError, match="none of its 1 sources can be used"):
        main(config())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_several_kinds_need_a_choice(source, config):
    np.save(source / "a.npy", episode(0, 8))
    video.write_png(source / "plot.png", episode(1, 1)[0])
    with pytest.raises(InputError, match=r"1 npy, 1 images.*`source`"):
        main(config())
    main(config(source="npy"))
    assert list(by_id(config().output_dir)) == ["a.npy/000000"]


class Counts(Kind):
    """Text files that hold a number of frames; frames and actions tell the time."""

    name = "counts"
    plural = "counts"

    def detect(self, folder, names):
        return files_ending([".count"], folder, names)

    def header(self, path):
        return Header(int(path.read_text()), 4, 6, has_actions=True)

    def open(self, path, fps):
        count = int(path.read_text())
        return Episode((np.full((4, 6, 3), t, np.uint8) for t in range(count)), np.arange(count, dtype=np.int32) % 3)


def test_a_kind_of_source_is_a_line_in_the_table(source, config, monkeypatch, capsys):
    monkeypatch.setitem(KINDS, "counts", Counts())
    for number in range(3):
        (source / f"{number}.count").write_text("20")
    (source / "short.count").write_text("3")
    main(config())
    clips = by_id(config().output_dir)
    assert sorted(clips) == [f"{number}.count/{start:06d}" for number in range(3) for start in (0, 8, 16)]
    for clip_id, clip in clips.items():
        times = int(clip_id[-6:]) + np.arange(len(clip))
        np.testing.assert_array_equal(clip.frames_THWC[:, 2, 3, 1], times)
        np.testing.assert_array_equal(clip.actions_T, times % 3)
    assert read_metadata(config().output_dir).action_names == ("0", "1", "2")
    captured = capsys.readouterr()
    assert "4 counts" in captured.out
    assert "short.count: has 3 frames, fewer than --min_clip_length 4" in captured.err
    np.save(source / "a.npy", episode(0, 8))
    with pytest.raises(InputError, match=r"1 npy, 4 counts.*`source`"):
        main(config(output_dir=config().output_dir + "2"))


def test_episodes_of_unknown_length_are_read_to_their_end(source, config, monkeypatch):
    monkeypatch.setitem(KINDS, "counts", Counts())
    monkeypatch.setattr(Counts, "header", lambda self, path: Header(0, 4, 6, is_guess=True))
    (source / "a.count").write_text("20")
    (source / "short.count").write_text("3")
    main(config())
    assert sorted(by_id(config().output_dir)) == ["a.count/000000", "a.count/000008", "a.count/000016"]


def test_the_recipe_for_a_kind_of_source_works(source, config, monkeypatch, capsys):
    recipe = (
        (Path(preprocess_dataset.__file__).parent / "docs" / "data.md").read_text().split("## Add a kind of source")[1]
    )
    code = {"__name__": "tiff"}
    exec(recipe.split("```python")[1].split("```")[0], code)
    monkeypatch.setitem(KINDS, "tiff", code["Tiff"]())
    for number in range(3):
        first, *others = (Image.fromarray(frame) for frame in episode(number, 20))
        first.save(source / f"{number}.tif", save_all=True, append_images=others)
    (source / "bad.tif").write_bytes(b"no picture")
    main(config())
    clips = by_id(config().output_dir)
    assert len(clips) == 3 * 3
    for clip_id, clip in clips.items():
        start = int(clip_id[-6:])
        np.testing.assert_array_equal(clip.frames_THWC, episode(int(clip_id[0]), 20)[start : start + 8])
    assert "bad.tif: cannot be read as a TIFF file" in capsys.readouterr().err


def test_nothing_is_overwritten(source, config):
    np.save(source / "a.npy", episode(0, 8))
    main(config())
    before = contents(config().output_dir)
    with pytest.raises(InputError, match="already holds a dataset"):
        main(config())
    assert contents(config().output_dir) == before
    other = Path(config().output_dir + "2")
    other.mkdir()
    (other / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match="not an empty folder"):
        main(config(output_dir=str(other)))
    assert list(contents(other)) == ["thesis.tex"]


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(source, config, monkeypatch, tmp_path):
    for number in range(3):
        np.save(source / f"{number}.npy", episode(number, 20))
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "metadata.json").write_text("from a killed run")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_metadata", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(config())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    main(config())
    assert len(by_id(config().output_dir)) == 9
    assert not partial.exists()


def test_training_can_read_the_dataset(source, config):
    for number in range(6):
        actions = np.arange(20) % 5
        np.savez(source / f"{number}.npz", frames=episode(number, 20), actions=actions)
    main(config())
    clips = ClipSource(config().output_dir, "train", 6)
    assert len(clips) == 4 * 2  # the rests of 4 frames are too short
    stream = batches(clips, 4, seed=0)
    for _ in range(3):
        batch = next(stream)
        for frames, actions in zip(batch.frames_BTHWC, batch.actions_BT, strict=True):
            number, start = frames[0, 0, 0, 0], frames[0, 0, 0, 1]
            np.testing.assert_array_equal(frames, episode(number, 20)[start : start + 6])
            np.testing.assert_array_equal(actions, np.arange(start, start + 6) % 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "vhs"}, "`source` vhs: must be auto or one of .*npy, video, images"),
        ({"height": 64}, "give both"),
        ({"height": 0, "width": 64}, "`height` 0"),
        ({"fps": -1.0}, "`fps`"),
        ({"fps": float("nan")}, "`fps`"),
        ({"min_clip_length": 9}, "`min_clip_length` 9"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "training"),
        ({"num_workers": -1}, "`num_workers`"),
    ],
)
def test_flags_that_cannot_work(source, config, changes, message):
    np.save(source / "a.npy", episode(0, 8))
    with pytest.raises(InputError, match=message):
        main(config(**changes))


def test_the_command_as_written(tmp_path):
    """Jafar's folder becomes data/coinrun; after generate_dataset.py there is nothing to do; without either, help."""
    script = Path(preprocess_dataset.__file__).resolve()

    def command():
        environment = os.environ | {"PYTHONPATH": str(script.parent)}
        done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, _, error = command()
    assert status == 1
    assert error.startswith("error: --input_dir data/coinrun_episodes: no such folder")
    assert error.count("\n") == 1

    episodes = tmp_path / "data" / "coinrun_episodes"
    episodes.mkdir(parents=True)
    for number in range(3):
        np.save(episodes / f"episode_{number}.npy", episode(number, 50, 64, 64))
    np.save(episodes / "metadata.npy", np.array([{"path": "episode_0.npy", "length": 50}]))
    status, out, error = command()
    assert (status, error) == (0, "")
    assert "3 files read, 0 skipped; 6 clips" in out
    assert "coinrun_episodes" in json.loads((tmp_path / "data/coinrun/metadata.json").read_text())["environment"]

    episodes.rename(tmp_path / "elsewhere")
    status, out, error = command()
    assert (status, error) == (0, "")
    assert "data/coinrun is ready to train on (6 clips)" in out
