"""Exported worlds: what is in the folder, and that it serves as a training's does."""

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import evaluate
import export
import play
import sample
from models.errors import InputError
from models.genie import PARAMETERS, load_world, model_config, read_config, write_parameters
from player.actions import read_actions
from tests.conftest import ROOT
from utils.actions import ActionLabel
from utils.checkpoint import data_of, output_of, take_folder
from utils.data import ClipSource
from utils.records import read_metadata

LABELS = [{"name": "LEFT", "true": "L", "share": 0.5, "count": 4}] * 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained):
    out = tmp_path_factory.mktemp("worlds") / "squares"
    run = tmp_path_factory.mktemp("labelled") / "world"
    shutil.copytree(trained["world"], run)
    (run / "action_labels.json").write_text(json.dumps(LABELS))
    export.main(export.Config(run=str(run), out=str(out), num_clips=5, num_frames=8, temperature=0.25))
    return out


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_labels_that_are_found_of_an_exported_world_are_its_own(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = lambda folder: [label.name for label in read_actions(str(folder), 3, None)]
    assert names(exported) == ["LEFT"] * 3  # with which it came
    evaluate.write_labels(str(exported), [ActionLabel("up")] * 3)
    assert names(exported) == ["up"] * 3
    other = tmp_path / exported.name
    shutil.copytree(exported, other)
    with (other / PARAMETERS).open("ab") as file:
        file.write(b"of another training")
    assert names(other) == ["LEFT"] * 3


def test_variables_are_those_of_the_training_in_half_precision(exported, trained):
    flat = lambda path: dict(nnx.to_flat_state(nnx.state(load_world(path))))
    ours, theirs = flat(exported), flat(trained["world"])
    assert ours.keys() == theirs.keys()
    rounded = 0
    for name, value in theirs.items():
        expected = np.asarray(value[...])
        found = np.asarray(ours[name][...])
        assert found.dtype == expected.dtype
        if isinstance(value, nnx.Param) and expected.dtype == np.float32:
            rounded += int((found != expected).sum())
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, expected)
    assert rounded  # else the file would be no smaller


def test_folder_holds_clips_labels_config_and_card(exported, trained):
    source = ClipSource(data_of(exported), "val", 8)
    clips = source.clips(range(len(source)))
    assert len(clips) == 5
    assert all(len(clip) == len(clip.actions_T) == 8 for clip in clips)
    assert len({clip.level_seed for clip in clips}) == 5
    whole = ClipSource(data_of(trained["world"]), "val", 8)
    by_id = {clip.clip_id: clip for clip in whole.clips(range(len(whole)))}
    for clip in clips:
        there, T = by_id[clip.clip_id], len(clip)
        found = [
            at
            for at in range(len(there) - T + 1)
            if (there.frames_THWC[at : at + T] == clip.frames_THWC).all()
            and (there.actions_T[at : at + T] == clip.actions_T).all()
        ]
        assert found, clip.clip_id
    config = read_config(exported)
    assert config["train"]["sampling"]["temperature"] == 0.25
    where = Path(read_config(trained["world"])["train"]["ckpt_dir"]).parent  # what the fixture gives is a copy
    assert str(where) not in (exported / "config.json").read_text()
    assert json.loads((exported / "action_labels.json").read_text()) == LABELS
    text = (exported / "README.md").read_text()
    assert "python train_tokenizer.py --preset tiny" in text
    assert "python train_dynamics.py" in text


def test_sample_evaluate_and_play_take_it_and_write_beside_it(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(exported)
    sample.main(sample.Config(checkpoint=str(exported), num_clips=2))
    assert (tmp_path / "runs" / "worlds" / "squares" / "samples" / "rollout.gif").is_file()
    flags = {"num_clips": 4, "rollout_clips": 2, "long_frames": 3, "compile_cache": ""}
    evaluate.main(evaluate.Config(checkpoint=(str(exported),), **flags))
    assert (tmp_path / "runs" / "worlds" / "squares" / "evaluation" / "metrics.json").is_file()
    source, message = play.open_dataset(play.Config(checkpoint=(str(exported),)), str(exported))
    assert source is not None
    assert not message
    assert files(exported) == before
    assert output_of("runs/demo", "samples").as_posix() == "runs/demo/samples"


def test_what_is_there_is_not_overwritten(exported, trained):
    with pytest.raises(InputError, match="is there already"):
        export.main(export.Config(run=str(trained["world"]), out=str(exported)))
    with pytest.raises(InputError, match="exported world already"):
        export.main(export.Config(run=str(exported), out=str(exported) + "-2"))
    assert not list(exported.parent.glob(".*"))


def broken(exported, folder, change):
    """A copy of the world whose parameters are changed."""
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    with np.load(exported / PARAMETERS) as stored:
        np.savez(folder / PARAMETERS, **change(dict(stored)))
    return folder


def test_damaged_parameters_are_refused_in_one_line(exported, tmp_path):
    name = next(iter(np.load(exported / PARAMETERS)))
    cases = {
        "less": lambda arrays: {k: v for k, v in arrays.items() if k != name},
        "other": lambda arrays: arrays | {name: np.zeros(3)},
        "pickle": lambda arrays: arrays | {name: np.array([{}], dtype=object)},
    }
    for case, change in cases.items():
        with pytest.raises(InputError, match=PARAMETERS) as error:
            load_world(broken(exported, tmp_path / case, change))
        assert "\n" not in str(error.value)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((exported / "config.json").read_bytes())
    (cut / PARAMETERS).write_bytes((exported / PARAMETERS).read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_world(cut)
    (cut / PARAMETERS).write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        load_world(cut)
    assert zipfile.is_zipfile(exported / PARAMETERS)
    with pytest.raises(InputError, match="no checkpoint of step 3"):
        load_world(exported, step=3)


def test_the_world_that_comes_along_is_whole_and_small():
    world = ROOT / "worlds" / "coinrun-small"
    assert sum(file.stat().st_size for file in world.rglob("*") if file.is_file()) < 8e6
    source = ClipSource(data_of(world), "val", 32)
    assert len(source) == 16
    loaded = load_world(world)
    names = [action.name for action in read_actions(str(world), loaded.num_actions, None)]
    assert {"left", "up", "down", "stay"} <= set(names)
    assert any(name.startswith("right") for name in names)
    assert len(set(names)) == loaded.num_actions
    assert source.metadata.frame_shape == loaded.cfg.frame_shape


def test_a_configuration_of_another_version_is_refused():
    with pytest.raises(InputError, match="LAMConfig has no still_past, until"):
        model_config("lam", {"width": 8, "until": 3, "still_past": 0.5})


def test_an_exported_world_is_not_trained_on(exported):
    with pytest.raises(InputError, match="exported world"):
        take_folder(exported)
    assert not (exported / ".lock").exists()


def test_guidance_is_for_worlds_that_were_trained_for_it(trained, tmp_path):
    with pytest.raises(InputError, match="`guidance` 2: needs a world trained with `action_dropout`"):
        export.main(export.Config(run=str(trained["world"]), out=str(tmp_path / "w"), guidance=2.0))
    assert not (tmp_path / "w").exists()


def test_figures_measured_otherwise_are_not_put_on_the_card(trained, tmp_path):
    metrics = {"intervals": {}, "sampling": {"steps": 9}, "rollout_clips": 2, "split": "val"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    flags = {"run": str(trained["world"]), "out": str(tmp_path / "w"), "num_clips": 2}
    with pytest.raises(InputError, match="other sampling"):
        export.main(export.Config(**flags, metrics=str(tmp_path / "metrics.json")))
    assert not (tmp_path / "w").exists()


def test_a_card_says_how_its_data_were_made_and_leaves_out_what_was_not_given(trained):
    cfg, metadata = export.Config(run=str(trained["world"]), out="w"), read_metadata(data_of(trained["world"]))
    config = {
        "seed": 0,
        "learner": "",
        "action_weights": [],
        "names": ["UP=1", "LEFT=2"],
        "looks": True,
        "only_solved": False,
    }
    made_by = {"command": "generate_dataset.py", "config": config}
    first = export.commands(cfg, dataclasses.replace(metadata, made_by=made_by))[0]
    there = data_of(trained["world"])
    assert (
        first
        == f"python generate_dataset.py --seed 0 --names UP=1 LEFT=2 --looks --no-only_solved --output_dir {there}"
    )


def test_values_beyond_half_precision_are_refused(trained, tmp_path):
    world = load_world(trained["world"])
    world.dynamics = jax.tree.map(lambda x: x * 1e6 if x.dtype == np.float32 else x, world.dynamics)
    with pytest.raises(InputError, match="beyond half precision"):
        write_parameters(tmp_path, world)
