"""Actions beyond one integer: stored as they are, told in the metadata, and read as batches."""

import dataclasses
import json

import msgpack
import numpy as np
import pytest

from models.errors import InputError
from preprocess_dataset import Config, main
from sources.actions import Seen, Space, described, seen
from tests.conftest import make_clip
from tests.test_preprocess import episode
from utils.actions import ActionColumn
from utils.data import ClipSource, batches
from utils.records import (
    Metadata,
    decode_clip,
    encode_clip,
    read_metadata,
    write_metadata,
    write_shard,
)

COLUMNS = (ActionColumn("jump", ("up", "down")), ActionColumn("turn", mean=0.25, scale=2.0))


def with_actions(clip, dtype):
    rng = np.random.default_rng(len(clip))
    return dataclasses.replace(clip, actions_T=rng.integers(0, 2, (len(clip), len(COLUMNS))).astype(dtype))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_rows_round_trip_as_they_are(dtype):
    clip = with_actions(make_clip(3, 7), dtype)
    back = decode_clip(encode_clip(clip))
    assert back.actions_T.dtype == dtype
    np.testing.assert_array_equal(back.actions_T, clip.actions_T)


def test_one_integer_is_stored_as_ever():
    """The same bytes as before there were others, and nothing in them that an older reader does not know."""
    fields = msgpack.unpackb(encode_clip(make_clip(3, 7)))
    assert fields.keys() == {"version", "clip_id", "level_seed", "shape", "dtype", "frames", "actions", "rewards"}
    assert decode_clip(msgpack.packb(fields)).actions_T.shape == (7,)


@pytest.mark.parametrize("change", [{"action_dtype": "O"}, {"action_columns": 3}])
def test_damaged_rows_are_named(change):
    fields = msgpack.unpackb(encode_clip(with_actions(make_clip(3, 7), np.float32)))
    with pytest.raises(InputError, match=r"clip 5.*damaged or foreign"):
        decode_clip(msgpack.packb(fields | change), "clip 5")


@pytest.fixture
def dataset(tmp_path):
    clips = [with_actions(make_clip(seed, 6 + seed), np.float32) for seed in range(4)]
    splits = {"train": (write_shard(tmp_path, "train/0.array_record", clips),)}
    write_metadata(tmp_path, Metadata("mine", (16, 16, 3), 10.0, None, splits, {}, action_columns=COLUMNS))
    return tmp_path


def test_batches_hold_rows(dataset):
    metadata = read_metadata(dataset)
    assert metadata.action_columns == COLUMNS
    assert (metadata.has_actions, metadata.num_actions, metadata.action_names) == (True, 0, None)
    source = ClipSource(dataset, "train", 6)
    batch = next(batches(source, 3, seed=0))
    assert (batch.actions_BT.shape, batch.actions_BT.dtype) == ((3, 6, 2), np.float32)
    whole = source.windows(range(4), [0.0] * 4)
    for clip, actions in zip(source.clips(range(4)), whole.actions_BT, strict=True):
        np.testing.assert_array_equal(actions, clip.actions_T[:6])


def test_clips_unlike_the_metadata_are_named(dataset):
    text = json.loads((dataset / "metadata.json").read_text())
    text["action_columns"] = text["action_columns"][:1]
    (dataset / "metadata.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"has actions unlike those of the metadata; generate again"):
        ClipSource(dataset, "train", 6).windows([0], [0.0])


def test_metadata_from_before_there_were_columns(dataset):
    text = json.loads((dataset / "metadata.json").read_text())
    del text["action_columns"]
    (dataset / "metadata.json").write_text(json.dumps(text | {"action_names": ["A", "B"]}))
    metadata = read_metadata(dataset)
    assert (metadata.action_columns, metadata.num_actions) == ((), 2)


def test_mean_and_scale_are_those_of_the_training_split():
    rows = np.random.default_rng(0).normal(3, 2, (50, 2)).astype(np.float32)
    rows[:, 1] = 7
    parts = seen(rows[:20]).plus(seen(rows[20:]))
    space = Space((ActionColumn("a"), ActionColumn("b"), ActionColumn("c", ())))
    counts = np.concatenate([rows, np.arange(50, dtype=np.float32)[:, None] % 3], axis=1)
    everywhere = seen(np.concatenate([counts, [[100, 100, 9]]]))
    trained_on = seen(counts[:20]).plus(seen(counts[20:]))
    a, b, c = described(space, everywhere, trained_on).columns
    assert (a.mean, a.scale) == pytest.approx((rows[:, 0].mean(), rows[:, 0].std()), rel=1e-6)
    assert (b.mean, b.scale) == (7, 1)  # it never changes
    assert c.values == tuple(map(str, range(10)))
    assert parts.count == 50
    assert described(Space(), Seen(), Seen()).names == ()


def test_rows_in_arrays(tmp_path):
    (tmp_path / "in").mkdir()
    rows = np.random.default_rng(0).normal(0, 1, (20, 3)).astype(np.float32)
    for number in range(3):
        np.savez(tmp_path / "in" / f"{number}.npz", frames=episode(number, 20), actions=rows[: 20 - number % 2])
    config = Config(str(tmp_path / "in"), output_dir=str(tmp_path / "out"), clip_length=16, num_workers=0)
    main(dataclasses.replace(config, min_clip_length=4))
    source = ClipSource(tmp_path / "out", "train", 4)
    assert [column.name for column in source.metadata.action_columns] == ["0", "1", "2"]
    for clip in source.clips(range(len(source))):
        number, first = clip.frames_THWC[0, 0, 0, :2]
        expected = np.concatenate([rows[: 20 - number % 2], np.zeros((number % 2, 3), np.float32)])
        np.testing.assert_array_equal(clip.actions_T, expected[first : first + len(clip)])
