"""Several datasets as one: shares, exactness, actions by name, and what does not fit together."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from models.errors import InputError
from models.tokenizer import TokenizerConfig
from tests.conftest import FRAME
from tests.test_data import assert_same, take
from utils.actions import ActionColumn
from utils.checkpoint import write_config
from utils.data import ClipSource, batches
from utils.mixture import open_split, shares
from utils.records import Clip, Metadata, write_metadata, write_shard
from utils.train import TrainConfig


def coloured(folder, value: int, clips: int, names=("LEFT", "RIGHT"), shape=FRAME):
    """Clips of one colour, whose action t is t modulo the number of actions."""
    made = [
        Clip(np.full((8, *shape), value, np.uint8), f"{value}-{i}", np.arange(8, dtype=np.int32) % len(names or "-"))
        for i in range(clips)
    ]
    if not names:
        made = [dataclasses.replace(clip, actions_T=None) for clip in made]
    splits = {split: (write_shard(folder, f"{split}/0.array_record", made),) for split in ("train", "val")}
    write_metadata(folder, Metadata("colours", shape, 10.0, names, splits, {}))
    return folder


@pytest.fixture
def two(tmp_path):
    return [coloured(tmp_path / "a", 10, 7), coloured(tmp_path / "b", 20, 3)]


def mixed(two, *weights, seq_len=6):
    return open_split(
        ",".join(f"{folder}:{weight}" for folder, weight in zip(two, weights, strict=True)), "train", seq_len
    )


def test_each_dataset_has_its_share_of_the_clips_at_any_point(two):
    values = np.concatenate([b.frames_BTHWC[:, 0, 0, 0, 0] for b in take(batches(mixed(two, 0.7, 0.3), 4, seed=1), 50)])
    assert set(values.tolist()) == {10, 20}
    first = np.cumsum(values == 10)
    assert np.abs(first - 0.7 * np.arange(1, 201)).max() <= 1


def test_each_dataset_is_gone_through_whole_in_each_of_its_epochs(two):
    source = mixed(two, 1, 1)
    places = list(itertools.islice(source.order(seed=3), 2 * 21))
    of = collections.Counter(places)
    assert {of[i] for i in range(7)} == {3}  # 21 of 7 clips
    assert {of[i] for i in range(7, 10)} == {7}  # 21 of 3


def test_batches_of_a_mixture_depend_on_the_index_alone(two):
    source = mixed(two, 0.7, 0.3)
    straight = take(batches(source, 4, seed=5), 9)
    assert_same(take(batches(source, 4, seed=5, start=5), 4), straight[5:])
    assert_same(take(batches(source, 4, seed=5, start=5, num_workers=2), 4), straight[5:])
    halves = [take(batches(source, 4, seed=5, rows=rows), 9) for rows in ([0, 1], [2, 3])]
    for whole, first, second in zip(straight, *halves, strict=True):
        np.testing.assert_array_equal(whole.frames_BTHWC[:2], first.frames_BTHWC)
        np.testing.assert_array_equal(whole.actions_BT[2:], second.actions_BT)


def test_a_single_dataset_with_a_weight_is_that_dataset(dataset):
    alone = take(batches(ClipSource(dataset, "train", 6), 4, seed=5), 5)
    assert_same(take(batches(open_split(f"{dataset}:2", "train", 6), 4, seed=5), 5), alone)


def test_actions_go_by_their_names(tmp_path):
    a = coloured(tmp_path / "a", 10, 4, ("LEFT", "RIGHT"))
    b = coloured(tmp_path / "b", 20, 4, ("JUMP", "RIGHT", "LEFT"))
    source = mixed([a, b], 1, 1, seq_len=8)
    assert source.metadata.action_names == ("LEFT", "RIGHT", "JUMP")
    batch = next(batches(source, 4, seed=0))
    for frames, actions in zip(batch.frames_BTHWC, batch.actions_BT, strict=True):
        expected = [0, 1] * 4 if frames[0, 0, 0, 0] == 10 else [2, 1, 0, 2, 1, 0, 2, 1]
        assert actions.tolist() == expected
    without = coloured(tmp_path / "c", 30, 4, None)
    source = mixed([a, without], 1, 1)
    assert source.metadata.action_names is None
    assert next(batches(source, 4, seed=0)).actions_BT is None


def test_what_actions_mean_holds_where_the_datasets_agree(tmp_path):
    a, b = (coloured(tmp_path / name, 10, 4, names) for name, names in (("a", ("N", "L", "D")), ("b", ("N", "L"))))
    for folder, same, idle in ((a, {"D": "N", "L": "N"}, "N"), (b, {}, "N")):
        metadata = ClipSource(folder, "train", 6).metadata
        write_metadata(folder, dataclasses.replace(metadata, same_actions=same, idle_action=idle))
    metadata = mixed([a, b], 1, 1).metadata
    assert metadata.same_actions == {"D": "N"}  # in b, L does something of its own
    assert metadata.idle_action == "N"


@pytest.mark.parametrize(
    ("data_dir", "message"),
    [
        ("a:0.7,b", "b has no weight above 0"),
        ("a:0.7,b:-1", "b:-1 has no weight above 0"),
        ("a:0.7,b:nan", "b:nan has no weight above 0"),
        ("a:0.7,", "an empty part has no weight"),
        (":1", ":1 has no weight"),
    ],
)
def test_weights_that_cannot_work_are_named(data_dir, message):
    with pytest.raises(InputError, match=rf"`data_dir` {data_dir}: .*{message}"):
        shares(data_dir)


def test_folders_and_weights_are_parted_at_the_last_colon(tmp_path):
    assert [tuple(share) for share in shares("/x:1/a:3,b:1")] == [("/x:1/a", 0.75), ("b", 0.25)]
    folder = tmp_path / "run:2"
    folder.mkdir()
    assert shares(str(folder)) == [(str(folder), 1.0)]  # there is such a folder
    assert shares("data/coinrun") == [("data/coinrun", 1.0)]


def test_datasets_that_do_not_fit_together_are_refused(two, tmp_path):
    other = coloured(tmp_path / "c", 10, 4, shape=(8, 8, 3))
    with pytest.raises(InputError, match=r"frames of \(16, 16, 3\), .*/c of \(8, 8, 3\)"):
        mixed([two[0], other], 1, 1)


def test_a_resumed_training_keeps_its_weights(two, tmp_path):
    a, b = two
    run = lambda data_dir: write_config(
        tmp_path / "run", "tokenizer", TokenizerConfig(), TrainConfig(data_dir=data_dir)
    )
    run(f"{a}:0.7,{b}:0.3")
    (tmp_path / "run" / "1" / "model").mkdir(parents=True)  # what counts as a checkpoint
    run(f"{a}:7,{b}:3")
    with pytest.raises(InputError, match=r"weights: stored \[0.7, 0.3\], given \[0.5, 0.5\]"):
        run(f"{a}:1,{b}:1")


def test_a_missing_dataset_of_a_mixture_is_named(two, tmp_path):
    with pytest.raises(InputError, match="nowhere: no dataset here"):
        mixed([two[0], tmp_path / "nowhere"], 1, 1)


def test_columns_of_actions_stay_where_they_are_the_same(tmp_path):
    key, speed = ActionColumn("jump", ("off", "on")), ActionColumn("speed", None, 0.5, 2.0)
    folders = []
    for name, columns in (("a", (key, speed)), ("b", (key, speed)), ("c", (key,))):
        actions = np.arange(8 * len(columns), dtype=np.float32 if speed in columns else np.int32).reshape(8, -1)
        clips = [Clip(np.zeros((8, *FRAME), np.uint8), f"{name}-{i}", actions % 2) for i in range(3)]
        shard = write_shard(tmp_path / name, "train/0.array_record", clips)
        metadata = Metadata("columns", FRAME, 10.0, None, {"train": (shard,)}, {}, action_columns=columns)
        write_metadata(tmp_path / name, metadata)
        folders.append(tmp_path / name)
    same = mixed(folders[:2], 1, 1, seq_len=8)
    assert same.metadata.action_columns == (key, speed)
    np.testing.assert_array_equal(next(batches(same, 2, seed=0)).actions_BT[1], np.arange(16).reshape(8, 2) % 2)
    other = mixed(folders[::2], 1, 1, seq_len=8)
    assert not other.metadata.has_actions
    assert next(batches(other, 2, seed=0)).actions_BT is None
