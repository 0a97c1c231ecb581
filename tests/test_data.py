"""The dataset format, what is wrong with bad data, and the loader as a pure function."""

import dataclasses
import itertools
import json
import shutil

import jax
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from models.errors import InputError
from tests.conftest import make_clip, make_dataset
from utils.data import ClipSource, batches
from utils.records import Clip, Metadata, decode_clip, encode_clip, read_metadata, write_metadata, write_shard
from utils.sharding import batch_sharding, make_mesh, to_device


def take(iterator, n):
    return [jax.tree.map(np.asarray, batch) for batch in itertools.islice(iterator, n)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_a_record_round_trips():
    clip = make_clip(3, 7)
    back = decode_clip(encode_clip(clip))
    np.testing.assert_array_equal(back.frames_THWC, clip.frames_THWC)
    np.testing.assert_array_equal(back.actions_T, clip.actions_T)
    np.testing.assert_array_equal(back.rewards_T, clip.rewards_T)
    assert (back.clip_id, back.level_seed) == (clip.clip_id, clip.level_seed)
    bare = decode_clip(encode_clip(Clip(clip.frames_THWC, "x")))
    assert bare.actions_T is None
    assert bare.rewards_T is None


@pytest.mark.parametrize(
    "record",
    [b"", b"not msgpack", msgpack.packb({"a": 1}), msgpack.packb([1]), encode_clip(make_clip(0, 6))[:-50]],
)
def test_foreign_and_truncated_records_are_named(record):
    with pytest.raises(InputError, match=r"clip 5.*damaged or foreign"):
        decode_clip(record, "clip 5")


def test_a_record_of_another_version_is_named():
    fields = msgpack.unpackb(encode_clip(make_clip(0, 6))) | {"version": 99}
    with pytest.raises(InputError, match="format 99, expected 1"):
        decode_clip(msgpack.packb(fields))


def test_only_long_enough_clips_are_read(dataset):
    lengths = sorted(6 + j % 7 for j in range(24))
    for seq_len in (6, 9, 12):
        source = ClipSource(dataset, "train", seq_len)
        assert len(source) == sum(n >= seq_len for n in lengths)
        clips = source.clips(range(len(source)))
        assert min(len(clip.frames_THWC) for clip in clips) >= seq_len
        assert len({clip.clip_id for clip in clips}) == len(source)


def test_windows_are_cut_where_the_position_says(dataset):
    source = ClipSource(dataset, "train", 6)
    clip = source.clips([0])[0]
    assert len(clip.frames_THWC) == 12
    for position, begin in ((0.0, 0), (0.5, 3), (0.9999, 6)):
        window = source.windows([0], [position])
        np.testing.assert_array_equal(window.frames_BTHWC[0], clip.frames_THWC[begin : begin + 6])
        np.testing.assert_array_equal(window.actions_BT[0], clip.actions_T[begin : begin + 6])


def test_batches_depend_on_the_index_alone(dataset):
    source = ClipSource(dataset, "train", 6)
    straight = take(batches(source, 4, seed=5), 20)
    assert_same(take(batches(source, 4, seed=5, start=13), 7), straight[13:])
    other = take(batches(source, 4, seed=6), 1)
    assert np.any(other[0].frames_BTHWC != straight[0].frames_BTHWC)


def test_several_windows_of_a_clip_cost_one_reading(dataset, monkeypatch):
    source, asked = ClipSource(dataset, "train", 6), []
    clip_of = {clip.frames_THWC[t].tobytes(): i for i, clip in enumerate(source.clips(range(24))) for t in range(6)}
    take_in = source.records
    monkeypatch.setattr(source, "records", lambda indices: asked.append(len(indices)) or take_in(indices))
    stream = take(batches(source, 4, seed=5, windows_per_clip=2), 12)
    assert max(asked) == 2
    for batch in stream:
        clips = [clip_of.get(window[0].tobytes()) for window in batch.frames_BTHWC]
        assert None not in (clips[0], clips[2])  # of two windows the first begins in the earlier half of the places
        assert clips[0] != clips[2]
    assert_same(take(batches(source, 4, seed=5, start=7, windows_per_clip=2), 5), stream[7:])
    parts = [take(batches(source, 4, seed=5, rows=rows, windows_per_clip=2), 3) for rows in ([0, 1, 2], [3])]
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *both) for both in zip(*parts, strict=True)]
    assert_same(joined, stream[:3])


def test_batches_of_one_clip_are_the_same_clips(dataset):
    source = ClipSource(dataset, "train", 6)
    singles, fours = take(batches(source, 1, seed=5), 8), take(batches(source, 4, seed=5), 2)
    expected = np.concatenate([batch.frames_BTHWC for batch in fours])
    np.testing.assert_array_equal(np.concatenate([batch.frames_BTHWC for batch in singles]), expected)


def test_workers_change_nothing(dataset):
    source = ClipSource(dataset, "train", 6)
    straight = take(batches(source, 4, seed=5, start=2), 5)
    assert_same(take(batches(source, 4, seed=5, start=2, num_workers=2), 5), straight)


def test_processes_share_the_same_global_batches(dataset):
    source = ClipSource(dataset, "train", 6)
    whole = take(batches(source, 4, seed=5), 6)
    shares = [take(batches(source, 4, seed=5, rows=rows), 6) for rows in ([0, 1], [2, 3])]
    for batch, first, second in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(batch.frames_BTHWC[:2], first.frames_BTHWC)
        np.testing.assert_array_equal(batch.frames_BTHWC[2:], second.frames_BTHWC)


def test_an_epoch_visits_every_clip_once_and_the_next_in_another_order(tmp_path):
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    clips = [Clip(frames + i, f"{i}") for i in range(20)]
    shard = write_shard(tmp_path, "train/0.array_record", clips)
    write_metadata(tmp_path, Metadata("x", (4, 4, 3), 1.0, None, {"train": (shard,)}, {}))
    stream = batches(ClipSource(tmp_path, "train", 2), 4, seed=0)
    seen = [int(frame) for batch in take(stream, 10) for frame in batch.frames_BTHWC[:, 0, 0, 0, 0]]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert seen[:20] != list(range(20))


def test_to_device_keeps_order_and_values(dataset):
    source = ClipSource(dataset, "train", 6)
    sharding = batch_sharding(make_mesh())
    moved = list(itertools.islice(to_device(batches(source, 4, seed=5), sharding), 4))
    assert all(isinstance(batch.frames_BTHWC, jax.Array) for batch in moved)
    assert_same(moved, take(batches(source, 4, seed=5), 4))


def test_datasets_without_actions(tmp_path):
    source = ClipSource(make_dataset(tmp_path, actions=False), "val", 6)
    assert next(batches(source, 2, 0)).actions_BT is None
    assert source.metadata.num_actions == 0


def test_metadata_round_trips(dataset, tmp_path):
    metadata = read_metadata(dataset)
    write_metadata(tmp_path, metadata)
    assert read_metadata(tmp_path) == metadata
    assert json.loads((tmp_path / "metadata.json").read_text())["num_actions"] == 2


def damaged(dataset, tmp_path, harm):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    harm(copy)
    return copy


def read_all(folder):
    source = ClipSource(folder, "train", 6)
    source.windows(range(len(source)), [0.0] * len(source))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-70000])


def foreign(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(12):
        writer.write(b"something else")
    writer.close()


def edit_metadata(folder, **changes):
    file = folder / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no dataset here.*generate_dataset.py"),
        (lambda d: (d / "metadata.json").unlink(), "no dataset here"),
        (lambda d: (d / "metadata.json").write_text("{"), "damaged metadata"),
        (lambda d: edit_metadata(d, format_version=7), "format version 7, expected 1"),
        (lambda d: edit_metadata(d, splits={}), "no clips in its train split"),
        (lambda d: (d / "train/00001.array_record").unlink(), "00001.array_record: missing"),
        (lambda d: truncate(d / "train/00001.array_record"), "00001.array_record: not a readable ArrayRecord"),
        (lambda d: (d / "train/00001.array_record").write_bytes(b"hello" * 50), "not a readable ArrayRecord"),
        (lambda d: foreign(d / "train/00001.array_record"), "damaged or foreign"),
        (lambda d: edit_metadata(d, frame_shape=[8, 8, 3]), r"frames \(16, 16, 3\), the metadata says \(8, 8, 3\)"),
    ],
)
def test_damage_is_named_in_one_line(dataset, tmp_path, harm, message):
    copy = damaged(dataset, tmp_path, harm)
    with pytest.raises(InputError, match=message) as error:
        read_all(copy)
    assert "\n" not in str(error.value)


def test_too_long_sequences_are_named(dataset):
    with pytest.raises(InputError, match=r"`seq_len` 13: the longest clip.*12 frames"):
        ClipSource(dataset, "train", 13)


def test_shards_appear_whole(tmp_path):
    def clips():
        yield make_clip(0, 6)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, "train/0.array_record", clips())
    assert not list(tmp_path.rglob("*.array_record"))


def test_wrong_clips_are_refused():
    clip = make_clip(0, 6)
    with pytest.raises(ValueError, match="5 actions for 6 frames"):
        encode_clip(dataclasses.replace(clip, actions_T=clip.actions_T[:5]))
    with pytest.raises(ValueError, match="uint8"):
        encode_clip(dataclasses.replace(clip, frames_THWC=clip.frames_THWC.astype(np.float32)))


def test_each_reward_stays_with_its_frame():
    rewards = np.array([0, 0, 10, -0.5, 0, 1], np.float32)
    clip = dataclasses.replace(make_clip(0, 6), rewards_T=rewards)
    np.testing.assert_array_equal(decode_clip(encode_clip(clip)).rewards_T, rewards)
    with pytest.raises(ValueError, match="5 rewards for 6 frames"):
        encode_clip(dataclasses.replace(clip, rewards_T=rewards[:5]))


def test_batches_are_cut_at_random_places(tmp_path):
    frames = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 4, 4, 3))
    shard = write_shard(tmp_path, "train/0.array_record", [Clip(frames, f"{i}") for i in range(4)])
    write_metadata(tmp_path, Metadata("x", (4, 4, 3), 1.0, None, {"train": (shard,)}, {}))
    windows = np.concatenate([b.frames_BTHWC for b in take(batches(ClipSource(tmp_path, "train", 3), 4, seed=0), 30)])
    starts = windows[:, 0, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(windows[:, :, 0, 0, 0], starts[:, None] + np.arange(3))
    counts = np.bincount(starts)
    assert len(counts) == 6
    assert counts.min() > 8  # of 20 on average


def test_a_file_that_fails_halfway_leaves_nothing_behind(tmp_path):
    bad = dataclasses.replace(make_clip(1, 6), frames_THWC=np.zeros((6, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        write_shard(tmp_path, "train/0.array_record", [make_clip(0, 9), bad])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ends_and_success_are_kept_and_need_not_be_there():
    clip = make_clip(0, 6)
    ends = {"terminated_T": np.arange(6) == 5, "truncated_T": np.arange(6) == 2}
    for success in (True, False, None):
        back = decode_clip(encode_clip(dataclasses.replace(clip, success=success, **ends)))
        assert back.success is success
        for name, values in ends.items():
            np.testing.assert_array_equal(getattr(back, name), values)
            assert getattr(back, name).dtype == bool
    plain = encode_clip(clip)
    assert not {"terminated", "truncated", "success"} & msgpack.unpackb(plain).keys()  # as records of before
    back = decode_clip(plain)
    assert (back.terminated_T, back.truncated_T, back.success) == (None, None, None)
    with pytest.raises(ValueError, match="5 truncated for 6 frames"):
        encode_clip(dataclasses.replace(clip, truncated_T=np.zeros(5, bool)))
