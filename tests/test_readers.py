"""Datasets of other projects: in a world whose pictures say what was done, actions stay with the frames they lead from.

Files are written as the projects themselves write them, never by anything of ours.
"""

import importlib.util
import io
import itertools
import json
import os
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from models.errors import InputError
from preprocess_dataset import Config, main
from sources import convert as conversion
from sources.jasmine import read_pickle
from sources.kind import Told
from sources.registry import KINDS
from tests.test_preprocess import by_id, read_all
from tests.test_sources import encode, number, picture
from utils.data import ClipSource, batches
from utils.records import read_metadata

NUM_ACTIONS = 5
LOSSLESS = {"crf": "0", "preset": "ultrafast"}


def play(num_frames, seed):
    """Numbers that frames show, and the actions between them: an action decides which number comes next."""
    actions = np.random.default_rng(seed).integers(0, NUM_ACTIONS, num_frames - 1)
    numbers = [seed % 256]
    for action in actions:
        numbers.append((numbers[-1] + 1 + 7 * int(action)) % 256)
    return numbers, actions


def follow(clip, action_of=int):
    """Checks that each frame is the one that the action before leads to; gives the numbers."""
    numbers = [number(frame) for frame in clip.frames_THWC]
    for t in range(len(numbers) - 1):
        assert numbers[t + 1] == (numbers[t] + 1 + 7 * action_of(clip.actions_T[t])) % 256, t
    return numbers


def followed(clips, name, action_of=int):
    """Numbers of an episode's frames, checked clip by clip."""
    own = sorted(clip_id for clip_id in clips if clip_id.rpartition("/")[0] == name)
    return [n for clip_id in own for n in follow(clips[clip_id], action_of)]


@pytest.fixture
def config(source, tmp_path):
    """Makes configurations of a small conversion in this process."""
    defaults = {"input_dir": str(source), "output_dir": str(tmp_path / "out"), "num_workers": 0, "clip_length": 16}
    defaults |= {"min_clip_length": 4, "val_fraction": 0, "test_fraction": 0}
    return lambda **changes: Config(**(defaults | changes))


def convert(config, **changes):
    """Converts, and gives the metadata and the clips by id."""
    made = config(**changes)
    main(made)
    return read_metadata(made.output_dir), by_id(made.output_dir)


# Jasmine.


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else pickle.dumps(record))
    writer.close()


def jasmine_record(num_frames, seed, dtype=np.int32):
    numbers, actions = play(num_frames + 1, seed)
    frames = np.stack([picture(n, 32, 48) for n in numbers[:-1]])
    return {"raw_video": frames.tobytes(), "sequence_length": num_frames, "actions": actions.astype(dtype)}


SIZE = {"height": 32, "width": 48}


def test_jasmine(source, config):
    for split, seeds in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        records = [jasmine_record(20, seed, np.int8 if seed % 2 else np.int32) for seed in seeds]
        write_records(source / split / "data_0000.array_record", records)
    (source / "metadata.json").write_text(json.dumps({"env": "coinrun", "num_actions": 7}))
    metadata, clips = convert(config, **SIZE, val_fraction=0.05, test_fraction=0.05)
    assert metadata.action_names == tuple("0123456")
    assert metadata.frame_shape == (32, 48, 3)
    numbers = {clip_id: follow(clip) for clip_id, clip in clips.items()}
    first = [play(20, seed)[0] for seed in (1, 2)]
    assert numbers["train/data_0000.array_record/000000"] == first[0][:16]
    assert numbers["train/data_0000.array_record/000020"] == first[1][:16]  # no clip has frames of two records
    splits = {split: {clip.clip_id.split("/")[0] for clip in of} for split, of in read_all(config().output_dir).items()}
    assert splits == {"train": {"train"}, "val": {"val"}, "test": {"test"}}


def test_jasmines_videos_have_no_actions_and_the_size_must_be_said(source, config):
    record = {name: value for name, value in jasmine_record(20, 1).items() if name != "actions"}
    write_records(source / "chunked_videos_0000_0000.array_record", [record | {"video_file_name": "a.mp4"}])
    with pytest.raises(InputError, match="`height` and `width`: Jasmine's records do not say"):
        main(config())
    with pytest.raises(InputError, match="none of its 1 sources"):
        main(config(height=48, width=64))
    metadata, clips = convert(config, **SIZE)
    assert metadata.action_names is None
    assert len(clips) == 2


class Payload:
    """What a hostile record holds: a pickle of it would write a file when it is read."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (f"touch {self.path}",)


def test_a_payload_does_not_run(source, config, tmp_path, capsys):
    good = jasmine_record(20, 1)
    for name, record in {
        "instead": Payload(tmp_path / "ran"),
        "within": good | {"more": Payload(tmp_path / "ran")},
        "eval": good | {"more": Payload(tmp_path / "ran", eval)},
        "objects": good | {"actions": np.array([Payload(tmp_path / "ran")] * 20)},
        "list": good | {"more": [1, 2]},
        "lambda": good | {"more": Fraction(1, 2)},
    }.items():
        write_records(source / f"{name}.array_record", [record])
    write_records(source / "good.array_record", [good])
    _, clips = convert(config, **SIZE, allow_skips=True)
    assert {clip_id.split(".")[0] for clip_id in clips} == {"good"}
    assert not (tmp_path / "ran").exists()
    said = capsys.readouterr().err
    assert "within.array_record: record 0: holds the name posix.system; only bytes, strings" in said
    assert "objects.array_record: record 0: holds an array of 'O8'" in said
    assert "list.array_record: record 0: holds list; only" in said


def test_what_numpy_would_take_for_pointers_is_refused():
    """An array of objects whose type says that it holds plain bytes: NumPy's own unpickling follows them."""

    class Type:
        def __reduce__(self):
            return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), Type(), False, b"\x41" * 8)

    with pytest.raises(InputError, match="here: holds an array of 'O'"):
        read_pickle("here", pickle.dumps({"a": Array()}))
    arrays = {"a": np.arange(6, dtype=">i2").reshape(2, 3).T, "b": np.array([True, False]), "c": np.float32([0.5])}
    for protocol in range(3, 5):
        for name, array in read_pickle("here", pickle.dumps(arrays, protocol)).items():
            np.testing.assert_array_equal(array, arrays[name])


def test_damaged_records_end_a_file(source, config, capsys):
    data = pickle.dumps(jasmine_record(20, 2))
    write_records(source / "a.array_record", [jasmine_record(20, 1), data[: len(data) // 2], jasmine_record(20, 3)])
    (source / "b.array_record").write_bytes(b"nothing")
    _, clips = convert(config, **SIZE)
    assert set(clips) == {"a.array_record/000000", "a.array_record/000016"}
    said = capsys.readouterr().err
    assert "a.array_record: record 1: cannot be read" in said
    assert "b.array_record: not a readable ArrayRecord file" in said


# VPT.


def tick(**changes):
    """A line as the contractors' recorder writes it."""
    mouse = {"x": 640.0, "y": 360.0, "dx": 0.0, "dy": 0.0, "scaledX": 0.0, "scaledY": 0.0, "dwheel": 0.0}
    return {
        "mouse": mouse | {"buttons": [], "newButtons": []} | changes.pop("mouse", {}),
        "keyboard": {"keys": [], "newKeys": [], "chars": ""} | changes.pop("keyboard", {}),
        "isGuiOpen": False,
        "isGuiInventory": False,
        "hotbar": 0,
        "yaw": 0.0,
        "pitch": 0.0,
        "tick": 0,
        "inventory": [],
        "stats": {},
    } | changes


def write_vpt(path, numbers, ticks):
    encode(path, [picture(n) for n in numbers], 20)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in ticks))
    path.with_name(path.stem + "-options.json").write_text("{}")


KEYS = ("key.keyboard.w", "key.keyboard.space", "key.keyboard.left.shift", "key.keyboard.9")
NAMES = ("forward", "jump", "sneak", "hotbar.9")


def test_vpt(source, config):
    numbers, actions = play(24, 3)
    ticks = [tick(keyboard={"keys": [KEYS[a - 1]] if a else []}, mouse={"dx": 20.0 * a, "dy": -4.0}) for a in actions]
    write_vpt(source / "a.mp4", numbers, [*ticks, tick()])
    metadata, clips = convert(config)
    assert metadata.fps == 20
    columns = {column.name: i for i, column in enumerate(metadata.action_columns)}
    assert len(columns) == 20 + 3 + 2
    assert set(clips) == {"a.mp4/000000", "a.mp4/000016"}

    def pressed(row):
        keys = [a for a, name in enumerate(NAMES, 1) if row[columns[name]]]
        assert row[columns["camera_x"]] == pytest.approx(20 * sum(keys) * 360 / 2400)
        return sum(keys)

    assert followed(clips, "a.mp4", pressed) == numbers
    rows = np.concatenate([clips[clip_id].actions_T for clip_id in sorted(clips)])
    assert rows.dtype == np.float32
    camera = metadata.action_columns[columns["camera_x"]]
    assert (camera.mean, camera.scale) == pytest.approx((rows[:, -1].mean(), rows[:, -1].std()), rel=1e-5)
    batch = next(batches(ClipSource(config().output_dir, "train", 4), 2, 0))
    assert (batch.actions_BT.shape, batch.actions_BT.dtype) == ((2, 4, 25), np.float32)
    with pytest.raises(InputError, match=r"`fps` 10: .*a\.mp4: each of its 20 frames per second has an action"):
        main(config(output_dir=config().output_dir + "2", fps=10))


def test_what_vpts_recorder_gets_wrong_is_mended(source, config):
    """Attack is stuck until it is pressed, the hotbar turns without a key, and the mouse is missing from menus."""
    stuck = {"buttons": [0], "newButtons": [0]}
    ticks = [tick(mouse=stuck), tick(mouse={"buttons": [0]}), tick(mouse=stuck, hotbar=4), tick(hotbar=4)]
    ticks += [tick(isGuiOpen=True, mouse={"x": 640.0, "y": 600.0}), tick()]
    write_vpt(source / "a.mp4", [0] * 6, ticks)
    metadata, clips = convert(config)
    (clip,) = clips.values()
    columns = {column.name: i for i, column in enumerate(metadata.action_columns)}
    assert clip.actions_T[:, columns["attack"]].tolist() == [0, 0, 1, 0, 0, 0]
    assert clip.actions_T[:, columns["hotbar.5"]].tolist() == [0, 0, 1, 0, 0, 0]
    changed = np.abs(clip.frames_THWC[4].astype(int) - clip.frames_THWC[3]).max(axis=-1) > 40
    rows, places = np.nonzero(changed)
    assert (rows.min(), places.min()) == (600 * 64 // 720, 640 * 64 // 720)
    assert changed.sum() > 20


def test_damaged_ticks_end_an_episode(source, config, capsys):
    numbers, _ = play(24, 3)
    write_vpt(source / "a.mp4", numbers, [tick()] * 24)
    lines = (source / "a.jsonl").read_text().splitlines()
    (source / "a.jsonl").write_text("\n".join([*lines[:10], lines[10][:30], *lines[11:]]))
    write_vpt(source / "b.mp4", numbers, [tick()] * 20)
    (source / "c.mp4").write_bytes(b"no video")
    (source / "c.jsonl").write_text(json.dumps(tick()))
    _, clips = convert(config)
    assert {clip_id: len(clip) for clip_id, clip in clips.items()} == {
        "a.mp4/000000": 10,
        "b.mp4/000000": 16,
        "b.mp4/000016": 4,
    }
    said = capsys.readouterr().err
    assert "a.mp4: a.jsonl: line 11 is no tick" in said
    assert "b.mp4: has actions for 20 of its pictures only" in said
    assert "c.mp4: cannot be decoded" in said


# GenieRedux.


def write_session(folder, numbers, actions, as_video):
    """As its generator does: an entry for each frame, with the action that led there."""
    folder.mkdir(parents=True)
    if as_video:
        encode(folder / "frames.mp4", [picture(n) for n in numbers], 1, options=LOSSLESS | {"g": "1"})
    else:
        (folder / "frames").mkdir()
        for t, n in enumerate(numbers):
            Image.fromarray(picture(n)).save(folder / "frames" / f"{t:06d}.jpg", quality=95)
    led = [0, *actions.tolist()]
    entries = [{"src_id": t - 1, "tgt_id": t, "action": led[t], "extras": {}} for t in range(len(numbers))]
    (folder / "actions.json").write_text(json.dumps({"actions": entries}))


def test_genieredux(source, config):
    root = source / "coinrun_v1" / "coinrun_v1"
    sessions = {f"{i:06d}/000000": play(20, i) for i in range(3)}
    for i, (name, (numbers, actions)) in enumerate(sessions.items()):
        write_session(root / name, numbers, actions, as_video=i % 2 == 0)
    (root / "info.json").write_text("{}")
    metadata, clips = convert(config)
    assert metadata.action_names == tuple(map(str, range(NUM_ACTIONS)))
    assert metadata.fps == 15  # its videos say 1, which means nothing
    for name, (numbers, _) in sessions.items():
        assert followed(clips, f"coinrun_v1/coinrun_v1/{name}") == numbers
    with pytest.raises(InputError, match=r"`actions_lead_to`: GenieRedux sessions say which frame"):
        main(config(output_dir=config().output_dir + "2", actions_lead_to=True))


def test_damaged_sessions(source, config, capsys):
    numbers, actions = play(20, 1)
    for name in "abcd":
        write_session(source / name, numbers, actions, as_video=False)
    (source / "a" / "frames" / "000012.jpg").unlink()
    (source / "b" / "actions.json").write_text('{"actions": [')
    entries = json.loads((source / "c" / "actions.json").read_text())["actions"]
    (source / "c" / "actions.json").write_text(json.dumps({"actions": [*entries[:5], *entries[6:]]}))
    _, clips = convert(config)
    assert {clip_id: len(clip) for clip_id, clip in clips.items()} == {
        "a/000000": 12,
        "d/000000": 16,
        "d/000016": 4,
    }
    said = capsys.readouterr().err
    assert "frames: 000013.jpg stands in the place of frame 12" in said
    assert "actions.json: cannot be read" in said
    assert "actions.json: has no action from frame 4 to 5" in said


# Videos with an array of actions.


@pytest.mark.parametrize("lead_to", [False, True])
def test_videos_with_arrays_of_actions(source, config, lead_to):
    numbers, actions = play(20, 3)
    for name in "ab":
        encode(source / f"{name}.mp4", [picture(n) for n in numbers], 25, options={"crf": "8", "bf": "2"})
    np.save(source / "a.action.npy", np.append(0, actions) if lead_to else np.append(actions, 0))
    np.save(source / "b.action.npy", actions)  # between the frames, in either convention
    metadata, clips = convert(config, actions_lead_to=lead_to)
    assert metadata.action_names == tuple(map(str, range(NUM_ACTIONS)))
    for name in "ab":
        assert followed(clips, f"{name}.mp4") == numbers


def test_arrays_of_several_and_of_real_actions(source, config, tmp_path, capsys):
    numbers, actions = play(20, 3)
    several = np.stack([actions % 2, actions // 2, np.zeros_like(actions)], axis=1)
    for name in "abc":
        encode(source / f"{name}.mp4", [picture(n) for n in numbers])
        np.save(source / f"{name}.action.npy", several)
    np.save(source / "c.action.npy", several / 10)
    metadata, clips = convert(config)
    assert [column.values for column in metadata.action_columns] == [("0", "1"), ("0", "1", "2"), ("0",)]
    for clip in clips.values():
        assert clip.actions_T.dtype == np.int32
        follow(clip, lambda row: row[0] + 2 * row[1])
    said = capsys.readouterr().err
    assert "c.mp4: its actions are 3 columns: 0 (real), 1 (real), 2 (real); those of most sources 3 columns" in said
    for name in "ab":
        (source / f"{name}.action.npy").unlink()
        (source / f"{name}.mp4").unlink()
    metadata, clips = convert(config, output_dir=str(tmp_path / "real"))
    assert [column.values for column in metadata.action_columns] == [None] * 3
    assert metadata.action_columns[2].scale == 1  # it never changes
    for clip in clips.values():
        follow(clip, lambda row: round(10 * row[0] + 20 * row[1]))


def test_damaged_arrays_of_actions(source, config, capsys):
    numbers, actions = play(20, 3)
    for name in "abcd":
        encode(source / f"{name}.mp4", [picture(n) for n in numbers])
        np.save(source / f"{name}.action.npy", actions)
    np.save(source / "a.action.npy", actions[:10])
    np.save(source / "b.action.npy", np.array([{}]), allow_pickle=True)
    content = (source / "c.action.npy").read_bytes()
    (source / "c.action.npy").write_bytes(content[:-20])
    _, clips = convert(config, allow_skips=True)
    assert {clip_id.split("/")[0] for clip_id in clips} == {"d.mp4"}
    said = capsys.readouterr().err
    assert "a.action.npy: actions have shape (10,); expected 20 or 19 values" in said
    assert "b.action.npy: cannot be read" in said
    assert "c.action.npy: cannot be read" in said


# LeRobot.


FEATURES = {
    "observation.images.top": {
        "dtype": "video",
        "shape": [64, 96, 3],
        "names": ["height", "width", "channels"],
        "info": {"video.fps": 10, "video.codec": "h264"},
    },
    "action": {"dtype": "float32", "shape": [2], "names": ["gripper", "wrist"]},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
}


def robot_rows(episode, num_frames):
    """Rows of a data table: the first joint says what was done. Also the numbers that the frames show."""
    numbers, actions = play(num_frames + 1, episode)
    rows = [
        {
            "action": [a / 4 - 0.5, 0.25],
            "next.reward": float(t),
            "timestamp": t / 10,
            "frame_index": t,
            "episode_index": episode,
        }
        for t, a in enumerate(actions)
    ]
    return rows, numbers[:-1]


def robot_did(row):
    assert row[1] == np.float32(0.25)
    return round(4 * (row[0] + 0.5))


def write_table(path, rows):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (make reader-deps)")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(rows)
    if "action" in table.column_names:
        place = table.column_names.index("action")
        table = table.set_column(place, "action", table["action"].cast(arrow.list_(arrow.float32(), 2)))
    parquet.write_table(table, path)


def write_info(root, version, features=FEATURES, **more):
    info = {"codebase_version": version, "robot_type": "so100", "fps": 10, "chunks_size": 1000, "features": features}
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info | more))


LENGTHS = (20, 13, 24)


def write_lerobot_2(root):
    truth = {}
    for episode, length in enumerate(LENGTHS):
        rows, truth[episode] = robot_rows(episode, length)
        write_table(root / f"data/chunk-000/episode_{episode:06d}.parquet", rows)
        video = root / f"videos/chunk-000/observation.images.top/episode_{episode:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        encode(video, [picture(n) for n in truth[episode]], 10, options={"crf": "8", "g": "2"})
    write_info(root, "v2.1", total_episodes=3, total_frames=sum(LENGTHS))
    lines = [{"episode_index": i, "tasks": ["push"], "length": n} for i, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return truth


def write_lerobot_3(root, group_of_pictures="2"):
    """The first two episodes share their files, the third has others."""
    truth, bounds = {}, []
    for file, episodes in enumerate(((0, 1), (2,))):
        table, shown = [], []
        for episode in episodes:
            rows, truth[episode] = robot_rows(episode, LENGTHS[episode])
            bounds.append(
                {
                    "episode_index": episode,
                    "length": len(rows),
                    "tasks": ["push"],
                    "data/chunk_index": 0,
                    "data/file_index": file,
                    "videos/observation.images.top/chunk_index": 0,
                    "videos/observation.images.top/file_index": file,
                    "videos/observation.images.top/from_timestamp": len(shown) / 10,
                    "videos/observation.images.top/to_timestamp": (len(shown) + len(rows)) / 10,
                }
            )
            table += rows
            shown += truth[episode]
        write_table(root / f"data/chunk-000/file-{file:03d}.parquet", table)
        video = root / f"videos/observation.images.top/chunk-000/file-{file:03d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        encode(video, [picture(n) for n in shown], 10, options={"crf": "8", "g": group_of_pictures, "bf": "2"})
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", bounds)
    write_info(root, "v3.0", total_episodes=3, total_frames=sum(LENGTHS))
    return truth


@pytest.mark.parametrize("write", [write_lerobot_2, write_lerobot_3])
def test_lerobot(source, config, write):
    truth = write(source / "pusht")
    metadata, clips = convert(config)
    assert metadata.fps == 10
    assert [(column.name, column.values) for column in metadata.action_columns] == [("gripper", None), ("wrist", None)]
    for episode, numbers in truth.items():
        assert followed(clips, f"pusht/episode_{episode:06d}", robot_did) == numbers
    rewards = clips["pusht/episode_000002/000016"].rewards_T
    assert rewards.tolist() == list(range(16, 24))


def test_lerobot_is_sought_between_pictures_that_stand_by_themselves(source, config):
    truth = write_lerobot_3(source / "pusht", group_of_pictures="15")
    _, clips = convert(config)
    for episode, numbers in truth.items():
        assert followed(clips, f"pusht/episode_{episode:06d}", robot_did) == numbers


def test_lerobots_cameras(source, config):
    truth = write_lerobot_2(source)
    wrist = FEATURES | {"observation.images.wrist": FEATURES["observation.images.top"]}
    write_info(source, "v2.1", wrist, total_episodes=3)
    with pytest.raises(InputError, match=r"it has observation\.images\.top, observation\.images\.wrist; choose"):
        main(config())
    _, clips = convert(config, camera="top")
    assert followed(clips, "episode_000001", robot_did) == truth[1]


def test_lerobots_pictures_in_the_table(source, config):
    rows, numbers = robot_rows(0, 20)
    for row, n in zip(rows, numbers, strict=True):
        file = io.BytesIO()
        Image.fromarray(picture(n)).save(file, "png")
        row["observation.images.top"] = {"bytes": file.getvalue(), "path": f"{n}.png"}
    write_table(source / "data/chunk-000/episode_000000.parquet", rows)
    (source / "meta").mkdir()
    (source / "meta/episodes.jsonl").write_text('{"episode_index": 0, "tasks": [], "length": 20}')
    stored = FEATURES | {"observation.images.top": FEATURES["observation.images.top"] | {"dtype": "image"}}
    write_info(source, "v2.0", stored, total_episodes=1)
    _, clips = convert(config)
    assert followed(clips, "episode_000000", robot_did) == numbers


def test_damaged_lerobot(source, config, capsys):
    write_lerobot_3(source / "a")
    (source / "a/data/chunk-000/file-001.parquet").write_bytes(b"PAR1 and nothing else")
    write_lerobot_2(source / "b")
    video = source / "b/videos/chunk-000/observation.images.top/episode_000001.mp4"
    encode(video, [picture(0)] * 9, 10)
    write_info(source / "c", "v3.0")
    write_info(source / "d", "v1.6", total_episodes=1)
    _, clips = convert(config)
    lengths = {}
    for clip_id, clip in clips.items():
        lengths[clip_id.rpartition("/")[0]] = lengths.get(clip_id.rpartition("/")[0], 0) + len(clip)
    assert lengths == {
        "a/episode_000000": 20,
        "a/episode_000001": 13,
        "b/episode_000000": 20,
        "b/episode_000001": 9,
        "b/episode_000002": 24,
    }
    said = capsys.readouterr().err
    assert "a/episode_000002: cannot be read" in said
    assert "b/episode_000001: episode_000001.mp4 has 9 pictures of it; expected 13" in said
    assert "c/meta/info.json: cannot be read (KeyError: 'total_episodes')" in said
    assert "d/meta/info.json: LeRobot version v1.6; expected 2 or 3" in said


# HDF5.


def h5(path, mode="w"):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (make reader-deps)")
    path.parent.mkdir(parents=True, exist_ok=True)
    return h5py.File(path, mode)


def test_tinyworlds(source, config, monkeypatch):
    monkeypatch.setattr("sources.tinyworlds.PART", 100)
    with h5(source / "zelda_frames.h5") as file:
        frames = np.stack([picture(n % 256) for n in range(320)])
        file.create_dataset("frames", data=frames, compression="lzf", chunks=(1, *frames.shape[1:]))
    metadata, clips = convert(config, clip_length=200)
    assert (metadata.fps, metadata.action_names, metadata.action_columns) == (60, None, ())
    shown = {clip_id: [number(frame) for frame in clip.frames_THWC] for clip_id, clip in clips.items()}
    bounds = (0, 106, 213, 320)  # three parts, so that each split can have one
    expected = {
        f"zelda_frames.h5/{a:07d}/000000": [n % 256 for n in range(a, b)] for a, b in itertools.pairwise(bounds)
    }
    assert shown == expected
    (source / "zelda_frames.h5.episodes.json").write_text("[0, 40]")
    _, clips = convert(config, output_dir=config().output_dir + "2", clip_length=200, fps=15)
    shown = [[number(frame) for frame in clip.frames_THWC] for _, clip in sorted(clips.items())]
    assert shown[0] == list(range(0, 40, 4))
    assert sum(map(len, shown)) == 80


def counter_strike_values(action):
    """51 values; which key is pressed, and where the mouse goes, say what was done."""
    values = np.zeros(51, np.float32)
    values[:5] = [action == key + 1 for key in range(5)]
    values[13 + 11 - action], values[13 + 23 + 7] = 1, 1
    return values


def test_counter_strike(source, config):
    numbers, actions = play(20, 3)
    with h5(source / "hdf5_dm_july2021_1.hdf5") as file:
        for t, n in enumerate(numbers):
            file.create_dataset(f"frame_{t}_x", data=picture(n)[..., ::-1])
            file.create_dataset(f"frame_{t}_y", data=counter_strike_values(actions[t] if t < len(actions) else 0))
            file.create_dataset(f"frame_{t}_xaux", data=np.zeros(54))
            file.create_dataset(f"frame_{t}_helperarr", data=np.zeros(2))
    metadata, clips = convert(config)
    assert metadata.fps == 16
    by_name = {column.name: column.values for column in metadata.action_columns}
    assert len(by_name) == 11 + 2 + 2
    assert by_name["w"] == ("up", "down")
    assert [len(by_name[name]) for name in ("mouse_x", "mouse_y")] == [23, 15]
    columns = list(by_name)

    def pressed(row):
        action = int(sum(row[i] * (i + 1) for i in range(5)))
        assert by_name["mouse_x"][row[columns.index("mouse_x")]] == ("0", "-2", "-4", "-10", "-20")[action]
        assert by_name["mouse_y"][row[columns.index("mouse_y")]] == "0"
        return action

    assert followed(clips, "hdf5_dm_july2021_1.hdf5", pressed) == numbers
    first = clips["hdf5_dm_july2021_1.hdf5/000000"]
    np.testing.assert_array_equal(first.frames_THWC[0], picture(numbers[0]))  # red is red
    assert first.actions_T.dtype == np.int32


def write_minari(root, name, episodes, monkeypatch, observe=None, space=None, **more):
    """A dataset by the library itself."""
    minari = pytest.importorskip("minari", reason="minari is not installed (make reader-deps)")
    pytest.importorskip("h5py", reason="h5py is not installed (make reader-deps)")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    shown = spaces.Box(0, 255, (64, 96, 3), np.uint8)
    buffers = [
        EpisodeBuffer(
            id=i,
            observations=(observe or np.stack)([picture(n) for n in numbers]),
            actions=actions,
            rewards=np.arange(len(actions), dtype=float),
            terminations=np.arange(len(actions)) == len(actions) - 1,
            truncations=np.zeros(len(actions), bool),
        )
        for i, (numbers, actions) in enumerate(episodes)
    ]
    warnings.simplefilter("ignore")  # of all that a dataset should say of itself
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=spaces.Dict({"top": shown, "wrist": shown}) if observe else shown,
        action_space=space or spaces.Discrete(6),
        data_format="hdf5",
        **more,
    )


@pytest.mark.parametrize("jpeg_encoding", [False, True])
def test_minari(source, config, monkeypatch, jpeg_encoding):
    episodes = [play(20, seed) for seed in range(12)]
    write_minari(source, "pong/random-v0", episodes, monkeypatch, jpeg_encoding=jpeg_encoding)
    metadata, clips = convert(config)
    assert metadata.action_names == tuple("012345")
    for i, (numbers, _) in enumerate(episodes):
        name = f"pong/random-v0/data/main_data.hdf5/episode_{i}"
        assert followed(clips, name) == numbers
        np.testing.assert_array_equal(clips[f"{name}/000016"].rewards_T, [16, 17, 18, 0])


def test_minaris_pictures_of_one_size_and_its_cameras(source, config, monkeypatch):
    """Equally long files are stored as rows, not as files."""
    episodes = [([3] * 20, np.zeros((19, 2), np.float32))]
    observe = lambda pictures: {"top": np.stack(pictures), "wrist": np.stack(pictures) // 2}
    spaces = pytest.importorskip("gymnasium").spaces
    write_minari(source, "a-v0", episodes, monkeypatch, observe, spaces.Box(-1, 1, (2,), np.float32))
    with pytest.raises(InputError, match=r"main_data\.hdf5: it has top, wrist; choose one with `camera`"):
        main(config())
    metadata, clips = convert(config, camera="top")
    assert [column.values for column in metadata.action_columns] == [None, None]
    assert [number(frame) for frame in clips["a-v0/data/main_data.hdf5/episode_0/000000"].frames_THWC] == [3] * 16


def test_minaris_several_actions_have_the_values_of_their_space(source, config, monkeypatch):
    numbers, actions = play(20, 3)
    spaces = pytest.importorskip("gymnasium").spaces
    several = np.stack([actions % 2, actions // 2], axis=1)
    write_minari(source, "a-v0", [(numbers, several)], monkeypatch, space=spaces.MultiDiscrete([4, 9]))
    metadata, clips = convert(config)
    assert [len(column.values) for column in metadata.action_columns] == [4, 9]
    assert followed(clips, "a-v0/data/main_data.hdf5/episode_0", lambda row: row[0] + 2 * row[1]) == numbers


def test_damaged_hdf5(source, config, capsys, monkeypatch):
    episodes = [play(20, seed) for seed in range(3)]
    write_minari(source, "pong/random-v0", episodes, monkeypatch)
    with h5(source / "pong/random-v0/data/main_data.hdf5", "r+") as file:
        del file["episode_0/actions"]
        file["episode_1/observations"][7] = np.frombuffer(b"no jpeg", np.uint8)
    (source / "b.h5").write_bytes(b"no hdf5")
    with h5(source / "c.h5") as file:
        file.create_dataset("depth", data=np.zeros(3))
    with h5(source / "e.h5") as file:
        file.create_dataset("frames", data=np.zeros((8, 64, 96, 3)))
    with h5(source / "d.hdf5") as file:
        for t in range(8):
            file.create_dataset(f"frame_{t}_x", data=picture(t))
            file.create_dataset(f"frame_{t}_y", data=np.zeros(51))
    _, clips = convert(config, allow_skips=True)
    assert {
        clip_id.removeprefix("pong/random-v0/data/main_data.hdf5/"): len(clip) for clip_id, clip in clips.items()
    } == {
        "episode_1/000000": 7,
        "episode_2/000000": 16,
        "episode_2/000016": 4,
    }
    said = capsys.readouterr().err
    assert "main_data.hdf5/episode_0: cannot be read (KeyError" in said
    assert "main_data.hdf5: episode_1: frame 7: cannot be read as a picture" in said
    assert "b.h5: not a readable HDF5 file" in said
    assert "c.h5: holds depth; expected what tinyworlds, Minari or the Counter-Strike set have there" in said
    assert "d.hdf5: its actions are" in said
    assert "e.h5: frames are float64 (8, 64, 96, 3); expected uint8 (N, H, W, 3)" in said


@pytest.mark.parametrize(("package", "make"), [("h5py", "a.h5"), ("pyarrow", "meta/info.json")])
def test_a_package_that_lacks_is_named(source, config, monkeypatch, package, make):
    (source / make).parent.mkdir(exist_ok=True)
    (source / make).write_text('{"codebase_version": "v3.0", "fps": 10, "total_episodes": 9, "features": {}}')
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    if package == "pyarrow":
        write_info(source, "v3.0", total_episodes=3)
    with pytest.raises(InputError, match=f"with the package {package}, which is not installed; run make reader-deps"):
        main(config())


# All of them.


def test_what_belongs_to_a_reader_is_not_offered_to_others(source, config):
    """Videos with actions are not taken for videos, nor the pictures of a session for folders of pictures."""
    numbers, actions = play(20, 1)
    write_session(source / "000000/000000", numbers, actions, as_video=False)
    _, clips = convert(config)
    assert set(clips) == {"000000/000000/000000", "000000/000000/000016"}
    assert all(clip.actions_T is not None for clip in clips.values())
    _, clips = convert(config, output_dir=config().output_dir + "2", source="images")
    assert set(clips) == {"000000/000000/frames/000000", "000000/000000/frames/000016"}
    assert all(clip.actions_T is None for clip in clips.values())
    encode(source / "alone.mp4", [picture(n) for n in numbers])
    with pytest.raises(InputError, match=r"several kinds of sources \(1 genieredux, 1 video\)"):
        main(config(output_dir=config().output_dir + "3"))


def test_a_dataset_is_not_converted_again(source, config):
    encode(source / "a.mp4", [picture(n) for n in range(20)])
    main(config())
    with pytest.raises(InputError, match="out: is a dataset already, ready to train on"):
        main(config(input_dir=config().output_dir, output_dir=config().output_dir + "2"))


def test_what_a_reader_was_told_reaches_the_workers():
    for kind in KINDS.values():
        told = kind.told(Told(64, 48, "top"))
        sent = pickle.loads(pickle.dumps(told))
        assert (type(sent), vars(sent)) == (type(told), vars(told))
    assert (sent := pickle.loads(pickle.dumps(KINDS["jasmine"].told(Told(64, 48))))).height == 64
    assert sent.width == 48


def test_a_shared_conversion_has_the_same_bytes(source, config, tmp_path, monkeypatch):
    for i in range(3):
        write_records(source / f"data_{i:04d}.array_record", [jasmine_record(20, i)])
    monkeypatch.setattr(conversion, "TASK_BYTES", 1)
    made = [config(**SIZE, output_dir=str(tmp_path / str(n)), num_workers=n) for n in (0, 2)]
    for each in made:
        main(each)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n / "train").iterdir()} for n in "02"]
    assert files[0] == files[1]
    assert len(files[0]) == 3
