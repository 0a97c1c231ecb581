"""A world as an environment of Gymnasium, from its training by the script on; and plans made in it."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import agents
import evaluate_planning
from agents.planning import WorldPlanner
from agents.worlds import real_actions, world_labels
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import CONFIG_VERSION, World, WorldConfig, load_world, write_parameters
from models.heads import HeadsConfig
from models.lam import LAMConfig
from models.nn import Compute
from models.tokenizer import TokenizerConfig
from tests.conftest import CACHE, ROOT, SMALL, here, make_clip
from utils.records import Metadata, write_metadata, write_shard

SIZE = {"width": 16, "num_heads": 2, "num_blocks": 1}
FRAME = (8, 8, 3)
PARTS = {"num_patches": 4, "patch_size": 4, "num_codes": 16, "frame_shape": FRAME}
CONFIG = WorldConfig(
    TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=FRAME),
    LAMConfig(**SIZE, patch_size=4, num_codes=3, code_width=4, frame_shape=FRAME),
    DynamicsConfig(**SIZE, **PARTS, num_actions=3),
    window=6,
    heads=HeadsConfig(("reward", "end"), sees_action=False),
)
LABELS = [{"name": "", "true": name, "share": s, "count": 5} for name, s in (("ON", 0.5), ("BACK", 0.4), ("ON", 0.9))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of an exported world with heads, of squares that end: in every second clip the last action is rewarded
    and ends the level."""
    folder, splits = tmp_path_factory.mktemp("world"), {}
    for k, split in enumerate(("train", "val")):
        clips = []
        for i in range(16):
            clip, last = make_clip(1000 * k + i, 8, FRAME), np.arange(8) == (7 if i % 2 else 99)
            fields = {"rewards_T": last.astype(np.float32), "terminated_T": last, "success": True}
            clips.append(dataclasses.replace(clip, **fields))
        splits[split] = (write_shard(folder / "data", f"{split}/0", clips),)
    write_metadata(folder / "data", Metadata("squares", FRAME, 10.0, ("LEFT", "RIGHT"), splits, {}))
    model = World(CONFIG, Compute(), nnx.Rngs(0))
    for i, head in enumerate((model.heads.reward, model.heads.end)):
        head.out.kernel[...] = jax.random.normal(jax.random.key(i), head.out.kernel.shape) / 10
    model.heads.end.out.bias[...] = jnp.array([4.0, 0.0, 0.0])  # most steps go on
    write_parameters(folder, model)
    stored = {"kind": "world", "model": dataclasses.asdict(CONFIG), "config_version": CONFIG_VERSION}
    stored["train"] = {"seq_len": 6, "sampling": {"steps": 1}, "data_dir": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "action_labels.json").write_text(json.dumps(LABELS))
    return folder


def test_heads_are_trained_stored_and_scored(world, tmp_path):
    flags = ["--num_steps", 2, "--val_interval", 2, "--compile_cache", CACHE, "--heads", "reward,end"]
    parts = ["--tokenizer_checkpoint", world, "--lam_checkpoint", world, "--data_dir", world / "data"]
    here("train_dynamics", *SMALL, *flags, *parts, "--ckpt_dir", tmp_path / "world")
    rows = [json.loads(line) for line in (tmp_path / "world" / "metrics.jsonl").read_text().splitlines()]
    val = next(row for row in rows if "val_loss" in row)
    assert 0 < val["val_end_ap_base"] < 0.2
    assert 0 <= val["val_end_ap"] <= 1
    assert val["val_loss"] > val["val_cross_entropy"]  # the heads' are in it
    before, after = load_world(world), load_world(tmp_path / "world")
    assert after.cfg.heads == before.cfg.heads  # no latent action for them to see
    assert np.any(after.heads.end.out.kernel[...])  # which begins at zero


def test_labels_name_real_actions(world, tmp_path):
    assert real_actions(world, 3) == {"BACK": 1, "ON": 2}  # the surest
    with pytest.raises(InputError, match="3 labels for 4 actions"):
        world_labels(world, 4)
    with pytest.raises(InputError, match=r"has no action_labels\.json"):
        world_labels(tmp_path, 3)


def test_a_code_that_never_occurs_stands_for_no_action_in_plans(tmp_path):
    game = SimpleNamespace(action_names=("LEFT", "NONE", "RIGHT"), idle_action="NONE")
    rows = [{"name": "right", "true": "RIGHT", "share": 0.5, "count": 3}]
    rows.append({"name": "stay", "true": "", "share": None, "count": 0})
    given = evaluate_planning.Config(checkpoint=str(tmp_path)), SimpleNamespace(lam=True, num_actions=2), game
    (tmp_path / "action_labels.json").write_text(json.dumps(rows))
    true_A, weights_A = evaluate_planning.world_actions(*given)
    np.testing.assert_array_equal(true_A, [2, 1])
    assert weights_A == [4, 1]
    assert real_actions(str(tmp_path), 2) == {"RIGHT": 0}
    (tmp_path / "action_labels.json").write_text(json.dumps([rows[1]] * 2))
    with pytest.raises(InputError, match="knows no true actions"):
        real_actions(str(tmp_path), 2)


class Scores:
    """Stands before the shooter: the plan whose first action is largest is best."""

    def __call__(self, frames, between, plans):
        self.given = frames, between
        return plans[..., 0]


def test_a_player_does_what_it_planned_and_remembers_it():
    scores, turn = Scores(), iter(range(100))
    propose = lambda rng, num, steps: (np.arange(num)[:, None] % 3 + 10 * next(turn) + np.zeros((1, steps))).astype(int)
    true = np.arange(1000) + 1000
    player = WorldPlanner(scores, propose, length=4, held=2, num_plans=3, true_A=true, idle=7, seed=0)
    frame = lambda t: np.full((2, 4, 4, 3), t, np.uint8)
    playing = np.array([True, True])
    done = [player.act(frame(t), playing).tolist() for t in range(3)]
    assert done == [[1002, 1002], [1002, 1002], [1012, 1012]]
    frames, between = scores.given
    np.testing.assert_array_equal(frames[0, :, 0, 0, 0], [0, 0, 1, 2])
    np.testing.assert_array_equal(between[0], [7, 1002, 1002])  # each led to the frame after it


def gymnasium():
    return pytest.importorskip("gymnasium", reason="needs gymnasium (make env-deps)")


def make(world, **how):
    return gymnasium().make("agents:jafar/World-v0", checkpoint=str(world), **how)


@pytest.fixture(scope="module")
def envs(world):
    """Three rollouts, limited to two steps."""
    how = {"checkpoint": str(world), "num_envs": 3, "max_episode_steps": 2}
    return gymnasium().make_vec("agents:jafar/World-v0", **how)


def test_gymnasium_finds_nothing_wrong(world):
    gymnasium()
    from gymnasium.utils.env_checker import check_env

    env = make(world, render_mode="rgb_array")
    check_env(env.unwrapped)
    frame, _ = env.reset(seed=1)
    np.testing.assert_array_equal(env.render(), frame)
    env.close()


def test_the_same_seed_and_actions_give_the_same(envs):
    env = envs
    frames, _ = env.reset(seed=0)
    assert frames.dtype == np.uint8
    assert frames in env.observation_space
    first = [env.step(np.array([0, 1, 2])) for _ in range(2)]
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(again, frames)
    second = [env.step(np.array([0, 1, 1])) for _ in range(2)]
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x[:2], y[:2])
    assert first[0][1].dtype == np.float64
    np.testing.assert_allclose(first[0][1][2], second[0][1][2])  # heads see no latent action, but what it led to
    assert (first[1][1][2], *first[1][0][2].flat) != (second[1][1][2], *second[1][0][2].flat)


def test_episodes_end_and_begin_anew(envs):
    env = envs
    env.reset(seed=5)
    over, seen = np.zeros(3, bool), 0
    prompts = np.asarray(env.played.worlds._given[1].frames_PTHWC)[:, -1]
    for t in range(8):
        frames, rewards, terminated, truncated, info = env.step(env.action_space.sample())
        for i in np.flatnonzero(over):
            assert any(np.array_equal(frames[i], prompt) for prompt in prompts)
            assert (rewards[i], terminated[i], truncated[i], info["end"][i]) == (0, False, False, 0)
            seen += 1
        assert not (terminated & truncated).any()
        over = terminated | truncated
        assert t != 1 or over.all() or seen
    assert seen >= 6
    kept = frames[1:]
    frames, _ = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert any(np.array_equal(frames[0], prompt) for prompt in prompts)
    np.testing.assert_array_equal(frames[1:], kept)


def test_real_actions_are_done_by_latent_ones(world):
    gymnasium()
    from agents.world_env import open_world

    real, latent = open_world(str(world), actions="real"), open_world(str(world), prompt_frames=2)
    assert (real.action_names, real.action_space.n, latent.action_space.n) == (("BACK", "ON"), 2, 3)
    np.testing.assert_array_equal(real.own_actions(np.array([0, 1, 1])), [1, 2, 2])
    np.testing.assert_array_equal(latent.own_actions(np.array([0, 2])), [0, 2])
    with pytest.raises(InputError, match='must be "latent" or "real"'):
        open_world(str(world), actions="any")
    with pytest.raises(InputError, match="`prompt_frames` 6: must be from 1 to 5"):
        open_world(str(world), prompt_frames=6)


def test_the_readmes_lines_run_an_agent(world):
    """A random agent by README's own lines; and a small one that is taught by a step of policy gradient."""
    gymnasium()
    [code] = [block for block in (ROOT / "README.md").read_text().split("```python\n")[1:] if "make_vec" in block]
    code = code.split("```")[0].replace("1000", "3").replace("num_envs=16", "num_envs=3")
    names: dict = {}
    exec(code.replace('checkpoint="runs/dynamics"', f"checkpoint={str(world)!r}"), names)
    envs = names["envs"]
    frames, _ = envs.reset(seed=0)
    table = jnp.zeros((8 * 8 * 3, int(envs.single_action_space.n)))
    log_p = lambda table, frames: jax.nn.log_softmax(frames.reshape(len(frames), -1) / 255 @ table)
    actions = np.asarray(jax.random.categorical(jax.random.key(0), log_p(table, jnp.asarray(frames))))
    _, rewards, *_ = envs.step(actions)
    chosen = lambda table: log_p(table, jnp.asarray(frames))[np.arange(len(actions)), actions]
    step = jax.grad(lambda table: jnp.mean(chosen(table) * rewards))(table)
    assert float(jnp.mean((chosen(table + 1e-3 * step / jnp.abs(step).max()) - chosen(table)) * rewards)) > 0


def test_agents_do_without_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # as where it is not installed
    agents.register_worlds()
