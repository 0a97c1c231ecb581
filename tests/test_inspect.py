"""Inspection of a dataset: what is counted, what is found twice, what is damaged, and the dataset without either."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import inspect_dataset
from evaluation.duplicates import find_duplicates, perceptual_hashes, seen_elsewhere
from evaluation.fixes import with_val
from evaluation.inspection import remarks, summarise
from evaluation.inspection_page import film, sections
from evaluation.page import html
from evaluation.scan import Place, gather, parts_of, scan_part, thumbnails, unchanged_pixels
from inspect_dataset import Config
from models.errors import InputError
from tests.conftest import FRAME, make_clip, make_dataset, script
from utils.actions import ActionColumn
from utils.data import ClipSource
from utils.records import Clip, Metadata, encode_clip, read_metadata, write_metadata, write_shard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def scanned(folder):
    metadata = read_metadata(folder)
    return metadata, gather(map(scan_part, parts_of(folder, metadata)))


def inspected(folder):
    metadata, scan = scanned(folder)
    return summarise(metadata, scan, find_duplicates(scan))


def renamed(clip: Clip, name: str, **changes) -> Clip:
    return dataclasses.replace(clip, clip_id=name, **changes)


def noisy(clip: Clip, most: int = 2) -> np.ndarray:
    """Frames as another encoding might have them."""
    noise = np.random.default_rng(0).integers(-most, most + 1, clip.frames_THWC.shape)
    return (clip.frames_THWC + noise).clip(0, 255).astype(np.uint8)


def write(folder, names=("LEFT", "RIGHT"), **splits):
    shards = {
        split: tuple(write_shard(folder, f"{split}/{i}.array_record", clips) for i, clips in enumerate(files))
        for split, files in splits.items()
    }
    write_metadata(folder, Metadata("squares", FRAME, 10.0, names, shards, {}))
    return folder


@pytest.fixture
def flawed(tmp_path):
    """Eight train clips, of which one repeats another, one nearly does, and one of each kind is in val too."""
    clips = [make_clip(i, 9) for i in range(5)]
    other_actions = renamed(clips[1], "acts otherwise", actions_T=1 - clips[1].actions_T)
    train = [
        [*clips[:3], renamed(clips[0], "again")],
        [renamed(clips[1], "nearly", frames_THWC=noisy(clips[1])), clips[3], clips[4], other_actions],
    ]
    val = [
        renamed(clips[3], "leaked"),
        renamed(clips[4], "nearly leaked", frames_THWC=noisy(clips[4])),
        make_clip(9, 7),
    ]
    return write(tmp_path / "flawed", train=train, val=[val])


def test_clips_that_repeat_others_are_found_and_held_out_ones_kept(flawed):
    metadata, scan = scanned(flawed)
    found = find_duplicates(scan)
    named = lambda chosen: {scan.clip_ids[i] for i in np.flatnonzero(chosen)}
    assert named(found.repeats(near=False)) == {"again", "clip-3"}
    assert named(found.repeats()) == {"again", "clip-3", "nearly", "clip-4"}
    first = {scan.clip_ids[i]: scan.clip_ids[j] for i, j in enumerate(found.near_N)}
    assert (first["again"], first["nearly"], first["clip-3"]) == ("clip-0", "clip-1", "leaked")
    summary = summarise(metadata, scan, found)["duplicates"]
    assert summary["within"] == {"train": {"exact": 1, "near": 1}, "val": {"exact": 0, "near": 0}}
    across = summary["across"]["train, val"]
    assert (across["exact"], across["near"]) == (1, 1)
    assert across["frames_of_the_second_seen_in_the_first"] == pytest.approx(9 / 25)
    assert 9 / 25 <= seen_elsewhere(scan, "val", "train")[1] <= 18 / 25


def test_clips_that_differ_by_a_small_figure_are_not_the_same(tmp_path):
    clip = make_clip(0, 9, (64, 64, 3))
    frames = clip.frames_THWC.copy()
    frames[4, 10:13, 20:23] = 255  # a ninth of a cell, in one frame
    metadata = Metadata("squares", (64, 64, 3), 10.0, None, {}, {})
    shard = write_shard(tmp_path, "train/0.array_record", [clip, renamed(clip, "b", frames_THWC=frames)])
    write_metadata(tmp_path, dataclasses.replace(metadata, splits={"train": (shard,)}))
    assert not find_duplicates(scanned(tmp_path)[1]).repeats().any()


def test_what_resembles_a_repeat_alone_is_kept(tmp_path):
    """Of clips that become brighter, step by step, the first is like the second, and not like the third."""
    clip = make_clip(0, 9)
    dark = clip.frames_THWC // 2
    lit = lambda by: renamed(clip, f"lit {by}", frames_THWC=dark + np.uint8(by))
    scan = scanned(write(tmp_path, train=[[lit(by) for by in (0, 4, 8, 12)]]))[1]
    repeats = find_duplicates(scan).repeats()
    assert {scan.clip_ids[i] for i in np.flatnonzero(repeats)} == {"lit 4", "lit 12"}


def test_of_many_that_are_alike_few_are_kept(tmp_path):
    """More than are compared with each other at once."""
    clip, rng = make_clip(0, 9), np.random.default_rng(0)
    lit = lambda: clip.frames_THWC + rng.integers(0, 2, clip.frames_THWC.shape, np.uint8)
    clips = [renamed(clip, f"{i:03d}", frames_THWC=lit()) for i in range(80)]
    repeats = find_duplicates(scanned(write(tmp_path, train=[clips]))[1]).repeats()
    assert len(clips) - repeats.sum() <= 4


def test_among_many_that_share_a_picture_repeats_are_found(tmp_path):
    """All begin alike, as from a title screen; most clips' own frames tell them apart."""
    title = make_clip(99, 2).frames_THWC
    clips = [make_clip(i, 9) for i in range(60)]
    clips = [dataclasses.replace(c, frames_THWC=np.concatenate([title, c.frames_THWC[2:]])) for c in clips]
    again = [renamed(clips[i], f"again {i}", frames_THWC=noisy(clips[i])) for i in (3, 40)]
    scan = scanned(write(tmp_path, train=[clips, again]))[1]
    repeats = find_duplicates(scan).repeats()
    assert {scan.clip_ids[i] for i in np.flatnonzero(repeats)} == {"again 3", "again 40"}


def test_counts_are_those_of_the_clips(dataset):
    summary, sources = inspected(dataset), {s: ClipSource(dataset, s, 1) for s in ("train", "val", "test")}
    for split, source in sources.items():
        clips = source.clips(range(len(source)))
        of = summary["splits"][split]
        assert (of["clips"], of["frames"]) == (len(clips), sum(map(len, clips)))
        assert of["lengths"] == {"least": 6, "median": 8, "most": 12}
        taken = np.concatenate([clip.actions_T[:-1] for clip in clips])
        assert summary["actions"]["counts"][split] == np.bincount(taken, minlength=2).tolist()
        same = [(a == b).all(-1).mean() for clip in clips for a, b in [(clip.frames_THWC[1:], clip.frames_THWC[:-1])]]
        assert of["unchanged"] == pytest.approx(np.mean(same))
    assert summary["levels"]["count"] == {"train": 24, "val": 24, "test": 24}
    assert set(summary["levels"]["shared"].values()) == {0}
    assert summary["rewards"]["not_zero"] == 0
    assert summary["damaged"] == []


def test_workers_and_the_cut_into_parts_change_nothing(dataset, monkeypatch):
    whole = inspected(dataset)
    monkeypatch.setattr("evaluation.scan.PART_BYTES", 1)
    monkeypatch.setattr("evaluation.scan.READ_BYTES", 1)
    assert len(parts_of(dataset, read_metadata(dataset))) == 72
    assert inspected(dataset) == whole


def test_pictures_that_stand_still_and_odd_actions_stand_out(tmp_path):
    still = np.broadcast_to(make_clip(0, 1).frames_THWC, (20, *FRAME))
    clips = [Clip(still + np.uint8(i), f"{i}", np.where(np.arange(20) == 3, 7, 0), level_seed=5) for i in range(3)]
    folder = write(tmp_path, names=("A", "B"), train=[clips[:2]], val=[clips[2:]])
    summary = inspected(folder)
    assert summary["splits"]["train"]["still_transitions"] == 1
    assert summary["actions"]["wrong"] == 3
    assert summary["levels"]["shared"] == {"train, val": 1}
    said = "\n".join(remarks(summary))
    for text in (
        "Little data: 40 frames",
        "Nearly still pictures: in 100% of the transitions",
        "3 actions are not among the 2",
        "100% of the actions are A",
        "never taken: B",
        "1 level of 1 in val occur in train too",
    ):
        assert text in said, said


def test_a_good_dataset_is_said_to_be_one(dataset, monkeypatch):
    monkeypatch.setattr("evaluation.inspection.FEW_FRAMES", 10)
    monkeypatch.setattr("evaluation.inspection.WINDOW", 6)
    assert remarks(inspected(dataset)) == []


def test_what_cannot_be_read_is_told_and_left_out(tmp_path, capsys):
    folder = make_dataset(tmp_path / "damaged")
    foreign = folder / "train/00000.array_record"
    source = ClipSource(folder, "train", 1)
    records = [encode_clip(clip) for clip in source.clips(range(12))]
    writer = ArrayRecordWriter(str(foreign), "group_size:1")
    for i, record in enumerate(records):
        writer.write(b"something else" if i == 3 else record)
    writer.close()
    torn = folder / "train/00001.array_record"
    content = bytearray(torn.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    torn.write_bytes(content)
    (folder / "val/00001.array_record").write_bytes(b"hello" * 50)
    (folder / "test/00000.array_record").unlink()
    inspect_dataset.main(Config(str(folder), str(tmp_path / "out"), "duplicates", num_workers=0))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    by_file = {}
    for damage in summary["damaged"]:
        by_file.setdefault(damage["file"], []).append(damage)
    assert [d["record"] for d in by_file["train/00000.array_record"]] == [3]
    assert 1 <= len(by_file["train/00001.array_record"]) < 12
    assert by_file["val/00001.array_record"][0]["clips"] == 12
    assert by_file["test/00000.array_record"][0]["why"] == "is missing"
    assert "cannot be read" in capsys.readouterr().err
    kept = sum(of["clips"] for of in summary["splits"].values())
    fixed = read_metadata(tmp_path / "out" / "dataset")
    assert sum(shard.count() for shards in fixed.splits.values() for shard in shards) == kept
    for split in ("train", "val", "test"):
        source = ClipSource(tmp_path / "out" / "dataset", split, 1)
        source.windows(range(len(source)), [0.0] * len(source))


def test_the_script_writes_a_page_a_sheet_and_a_dataset_without_duplicates(flawed, tmp_path, capsys):
    out = tmp_path / "out"
    done = script("inspect_dataset", flawed, "--output_dir", out, "--fix", "duplicates", "--num_workers", 2)
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "report.md", "summary.json", "contact_sheet.png", "pictures", "dataset")
    }
    assert "7 clips, without 4 duplicates" in done.stdout
    assert "2 train clips also in val" in done.stderr
    page = (out / "report.html").read_text()
    assert page.count('class="film"') == 11
    assert 'src="http' not in page
    scan = scanned(out / "dataset")[1]
    assert sorted(scan.clip_ids) == [
        "acts otherwise",
        "clip-0",
        "clip-1",
        "clip-2",
        "clip-9",
        "leaked",
        "nearly leaked",
    ]
    assert not find_duplicates(scan).repeats().any()
    inspect_dataset.main(Config(str(out / "dataset"), str(tmp_path / "again"), "duplicates", num_workers=0))
    assert "there is nothing to fix" in capsys.readouterr().out
    with pytest.raises(InputError, match="dataset: is not empty"):
        inspect_dataset.main(Config(str(flawed), str(out), "duplicates", num_workers=0))


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_films_play_in_a_browser(flawed, tmp_path):
    inspect_dataset.main(Config(str(flawed), str(tmp_path / "out"), num_workers=0))
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=450", "--dump-dom",
         f"file://{tmp_path / 'out' / 'report.html'}"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert "translateY(-" in dom  # by now no film stands at its first frame
    assert "<b>LEFT</b>" in dom or "<b>RIGHT</b>" in dom


def test_thumbnails_are_means_of_cells_at_any_size():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 40, 24, 3), dtype=np.uint8)
    expected = frames.reshape(3, 8, 5, 8, 3, 3).mean(axis=(2, 4, 5)).reshape(3, 64)
    np.testing.assert_allclose(thumbnails(frames), expected, atol=0.51)
    assert thumbnails(np.full((2, 5, 7, 1), 9, np.uint8)).tolist() == [[9] * 64] * 2
    assert thumbnails(rng.integers(0, 256, (1, 67, 83, 3), dtype=np.uint8)).shape == (1, 64)


def test_hashes_heed_the_picture_and_not_its_brightness():
    clip = make_clip(0, 9, (64, 64, 3))
    hashes = perceptual_hashes(thumbnails(clip.frames_THWC))
    brighter = perceptual_hashes(thumbnails(clip.frames_THWC // 4 * 4 + 5))
    assert np.bitwise_count(hashes ^ brighter).max() <= 2
    assert len(np.unique(hashes)) > 1


def test_unchanged_pixels_count_all_channels():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1:, 0, 0, 2] = 1
    frames[2, :, :, 0] = 1
    np.testing.assert_allclose(unchanged_pixels(frames), [0.75, 0.0])
    assert unchanged_pixels(frames[:1]).tolist() == []


def test_a_place_names_a_record(flawed):
    _, scan = scanned(flawed)
    assert scan.places[5] == Place("train", "train/1.array_record", 1)


def test_of_a_single_video_the_end_is_held_out(tmp_path, capsys):
    clips = [renamed(make_clip(i, 9), f"video/{160 * i:06d}") for i in range(12)]
    folder = write(tmp_path / "one", train=[clips])
    inspect_dataset.main(Config(str(folder), str(tmp_path / "out"), "val", num_workers=0))
    said = capsys.readouterr()
    assert "12 clips, 1 of them held out" in said.out
    assert "The val split is empty" in said.err
    val = ClipSource(tmp_path / "out" / "dataset", "val", 9)
    assert [clip.clip_id for clip in val.clips(range(len(val)))] == [f"video/{160 * 11:06d}"]
    assert len(ClipSource(tmp_path / "out" / "dataset", "train", 9)) == 11
    assert not (tmp_path / "out" / "dataset.partial").exists()
    with pytest.raises(InputError, match="dataset: is not empty"):
        inspect_dataset.main(Config(str(folder), str(tmp_path / "out"), "val", num_workers=0))


def test_what_is_held_out_shares_no_frame_with_a_clip_that_reaches_back(tmp_path):
    """A level of 33 frames makes clips of 9 from frames 0, 9, 18 and 24 on."""
    whole = make_clip(0, 33).frames_THWC
    clips = [renamed(make_clip(0, 9), f"level/{t:03d}", frames_THWC=whole[t : t + 9]) for t in (0, 9, 18, 24)]
    scan = scanned(write(tmp_path, train=[clips]))[1]
    assert [place.record for place, split in with_val(scan).items() if split == "val"] == [3]
    assert [place.record for place, split in with_val(scan).items() if split == "train"] == [0, 1]


def test_columns_of_actions_are_counted_and_shown(tmp_path):
    columns = (
        ActionColumn("jump", ("off", "on")),
        ActionColumn("run", ("off", "on")),
        ActionColumn("x", None, 1.0, 2.0),
    )
    actions = np.zeros((9, 3), np.float32)
    actions[2:5, 0], actions[:, 2] = 1, 1
    actions[3, 2] = 7.5
    clip = dataclasses.replace(make_clip(0, 9), actions_T=actions)
    shard = write_shard(tmp_path, "train/0.array_record", [clip])
    write_metadata(tmp_path, Metadata("c", FRAME, 10.0, None, {"train": (shard,)}, {}, action_columns=columns))
    metadata, scan = scanned(tmp_path)
    summary = summarise(metadata, scan, find_duplicates(scan))
    assert [column["counts"] for column in summary["columns"]] == [[6, 3], [9, 0], [0, 0, 8, 0, 1]]
    assert any("never change: run" in remark for remark in remarks(summary))
    shown = film(tmp_path, metadata, scan.places[0], "clip")
    assert shown.texts_T[:4] == ["x 1", "x 1", "jump x 1", "jump x 7.5"]
    page = html("c", sections(summary, [], [shown], []))
    assert "off 66.7%, on 33.3%" in page


def test_ends_and_the_share_of_successes_are_counted_by_episode(tmp_path):
    """Each clip of an episode says how that went; it counts once, where it ends. What was cut off counts nowhere."""
    ending, going_on = np.arange(9) == 8, np.zeros(9, bool)

    def clip(i, terminated, truncated, success):
        return renamed(make_clip(i, 9), str(i), terminated_T=terminated, truncated_T=truncated, success=success)

    solved, lost, timed_out = ((ending, going_on, True), (ending, going_on, False), (going_on, ending, False))
    train = [clip(0, going_on, going_on, True), clip(1, *solved), clip(2, *lost), clip(3, *timed_out)]
    train += [clip(4, going_on, going_on, None), make_clip(5, 9)]
    summary = inspected(write(tmp_path / "a", train=[train], val=[[clip(6, ending, going_on, None)]]))
    of_train = {"terminated": 2, "truncated": 1, "success_told": 3, "successful": 1, "success": 1 / 3}
    of_val = {"terminated": 1, "truncated": 0, "success_told": 0, "successful": 0, "success": None}
    assert summary["ends"] == {"train": of_train, "val": of_val}
    [section] = [section for section in sections(summary, [], [], []) if section.title == "Ends"]
    assert section.blocks[0].rows == [["train", "2", "1", "1 of 3, 33.3%"], ["val", "1", "0", ""]]
    assert inspected(write(tmp_path / "b", train=[[make_clip(5, 9)]]))["ends"] is None
