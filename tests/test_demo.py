"""The demo's way with one's own data, up to where the trainings begin; these are tested elsewhere."""

import dataclasses
import json

import numpy as np
import pytest

import demo
from evaluation.verdict import verdict
from models.errors import InputError
from tests.conftest import make_clip, make_dataset
from utils.records import Metadata, read_metadata, write_metadata


@pytest.fixture
def commands(monkeypatch):
    """What would be run, but for what reads and inspects, which is run."""
    told = []
    together = demo.together

    def run_or_tell(*of):
        told.extend(of)
        if of[0][0] in ("preprocess_dataset.py", "inspect_dataset.py"):
            together(*of)
        if any(command[0] == "evaluate.py" for command in of):
            [output] = [command[command.index("--output_dir") + 1] for command in of if command[0] == "evaluate.py"]
            with open(f"{output}/metrics.json", "w") as file:
                json.dump({"rollout_psnr": 20.0, "copy_last_frame_psnr": 18.5, "delta_psnr_t4": 2.04}, file)

    monkeypatch.setattr(demo, "together", run_or_tell)
    return told


def test_of_a_single_video_a_world_is_made(commands, tmp_path, capfd):
    videos = tmp_path / "my_videos"
    videos.mkdir()
    clip = make_clip(0, 700, (20, 24, 3))
    np.savez(videos / "game.npz", frames=clip.frames_THWC, actions=clip.actions_T)
    config = demo.Config(data_dir=str(videos), output_dir=str(tmp_path / "run"), height=16, width=16)
    demo.main(config)
    trained = [command for command in commands if command[0].startswith("train_")]
    assert [command[0] for command in trained] == ["train_tokenizer.py", "train_lam.py", "train_dynamics.py"]
    [data] = {command[command.index("--data_dir") + 1] for command in trained}
    metadata = read_metadata(data)
    assert metadata.frame_shape == (16, 16, 3)
    clips = {split: sum(shard.count() for shard in shards) for split, shards in metadata.splits.items()}
    assert (clips["train"], clips["val"], clips["test"]) == (20, 2, 0)
    said = capfd.readouterr()
    assert "Little data" in said.err
    assert "trainings and their measurement follow" in said.out
    assert "its rollouts are +1.5 dB against a still picture, its actions worth 2.0 dB at frame 4\nplay it" in said.out
    assert f"play it: make play WORLD={tmp_path}/run/dynamics" in said.out

    done = len(commands)
    demo.main(config)  # goes on where it stopped: nothing is read again
    assert {command[0] for command in commands[done:]}.isdisjoint({"preprocess_dataset.py", "inspect_dataset.py"})
    with pytest.raises(InputError, match="has clips of another `height`"):
        demo.main(dataclasses.replace(config, height=32))


def test_a_dataset_is_taken_as_it_is_and_a_world_to_begin_with_is_passed_on(commands, dataset, tmp_path):
    demo.main(demo.Config(data_dir=str(dataset), output_dir=str(tmp_path), init_from="worlds/coinrun-small"))
    trained = [command for command in commands if command[0].startswith("train_")]
    assert all(command[command.index("--data_dir") + 1] == str(dataset) for command in trained)
    assert all(command[command.index("--init_from") + 1] == "worlds/coinrun-small" for command in trained)
    assert (tmp_path / "inspection" / "report.html").exists()


def test_with_true_actions_no_lam_is_trained(commands, dataset, tmp_path):
    demo.main(demo.Config(data_dir=str(dataset), output_dir=str(tmp_path / "run"), use_gt_actions=True))
    trained = [command for command in commands if command[0].startswith("train_")]
    assert [command[0] for command in trained] == ["train_tokenizer.py", "train_dynamics.py"]
    assert "--use_gt_actions" in trained[1]
    assert "--lam_checkpoint" not in trained[1]


def test_a_flow_needs_no_tokenizer(commands, dataset, tmp_path):
    config = demo.Config(data_dir=str(dataset), output_dir=str(tmp_path / "run"), preset="flow")
    demo.main(config)
    lam, dynamics = (command for command in commands if command[0].startswith("train_"))
    assert lam[0] == "train_lam.py"
    assert "--tokenizer_checkpoint" not in dynamics
    assert dynamics[dynamics.index("--lam_checkpoint") + 1] == lam[lam.index("--ckpt_dir") + 1]
    commands.clear()
    demo.main(dataclasses.replace(config, use_gt_actions=True))
    [dynamics] = (command for command in commands if command[0].startswith("train_"))
    assert dynamics[0] == "train_dynamics.py"
    without = make_dataset(tmp_path / "without", clips=2, actions=False)
    with pytest.raises(InputError, match=r"`use_gt_actions`: .*without has no actions"):
        demo.main(demo.Config(data_dir=str(without), output_dir=str(tmp_path / "run2"), use_gt_actions=True))


def test_a_single_clip_is_too_little(commands, tmp_path):
    videos = tmp_path / "short"
    videos.mkdir()
    np.savez(videos / "game.npz", frames=make_clip(0, 40).frames_THWC)
    with pytest.raises(InputError, match=r"1 clip\(s\) to train on, 0 to measure on"):
        demo.main(demo.Config(data_dir=str(videos), output_dir=str(tmp_path / "run"), height=16, width=16))


def test_an_agent_is_made_of_the_files_of_a_demo(commands, tmp_path):
    """Once the world is there, who solves its game is recorded as it looks there, cloned twice and played."""
    data = tmp_path / "data"
    config = {"use_backgrounds": False, "restrict_themes": True}
    data.mkdir()
    made_by = {"command": "generate_dataset.py", "config": config}
    write_metadata(data, Metadata("coinrun", (64, 64, 3), 15.0, ("LEFT", "RIGHT"), {}, made_by))
    (tmp_path / "metrics.json").write_text("{}")
    demo.main(demo.Config(output_dir=str(tmp_path), agent=True, seed=3))
    assert [command[0] for command in commands] == [
        *("generate_dataset.py", "train_policy.py", "train_policy.py", "evaluate_policy.py")
    ]
    record, latent, oracle, play = commands
    assert {"--no-use_backgrounds", "--restrict_themes", "--only_solved"} <= set(record)
    assert latent[latent.index("--lam_checkpoint") + 1] == str(tmp_path / "lam")
    assert oracle[oracle.index("--targets") + 1] == "true"
    assert play[play.index("--oracle_checkpoint") + 1] == oracle[oracle.index("--ckpt_dir") + 1]
    assert all(command[command.index("--seed") + 1] == "3" for command in commands)
    write_metadata(data, Metadata("film", (64, 64, 3), 15.0, None, {}, {}))
    with pytest.raises(InputError, match="was not recorded from CoinRun"):
        demo.main(demo.Config(output_dir=str(tmp_path), data_dir=str(data), agent=True))


def test_a_world_that_learned_nothing_is_said_to_be_one():
    told = verdict({"rollout_psnr": 28.0, "copy_last_frame_psnr": 35.8, "delta_psnr_t4": 0.07})
    assert told.splitlines()[0].startswith("its rollouts are -7.8 dB against a still picture")
    assert "a still picture is better" in told
    assert "buttons do next to nothing" in told
