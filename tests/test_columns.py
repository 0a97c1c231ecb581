"""Worlds of true actions beyond one integer: each column is heard, none can be told from some, and the rest works."""

import asyncio
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sample
from models.actions import no_actions, random_actions
from models.dynamics import DynamicsConfig, actions_to
from models.genie import DYNAMICS, World, load_world
from models.nn import Compute
from models.sampling import SamplingConfig, rollout
from play import Config, load_game
from player.chosen import listed_actions, swept_actions
from player.controls import Controls
from sample import choose_actions
from tests.conftest import CACHE, FRAME, SMALL, here, make_clip
from tests.test_play import CHROMIUM, browsing, server_process, serving
from utils.actions import ActionColumn
from utils.data import ClipSource
from utils.records import Metadata, write_metadata, write_shard

COLUMNS = (
    ActionColumn("jump", ("up", "down")),
    ActionColumn("turn", None, mean=1.0, scale=4.0),
    ActionColumn("item", ("none", "bow", "axe")),
)
CFG = DynamicsConfig(
    width=32,
    num_heads=2,
    num_blocks=1,
    num_codes=8,
    num_patches=4,
    num_actions=0,
    action_values=(2, 0, 3),
    action_mean=(0.0, 1.0, 0.0),
    action_scale=(1.0, 4.0, 1.0),
)


@pytest.mark.parametrize("kind", ["maskgit", "maskgit_head", "causal"])
@pytest.mark.parametrize("action_token", ["prepend", "add"])
def test_every_column_is_heard_by_the_frame_that_it_leads_to(kind, action_token):
    model = DYNAMICS[kind](dataclasses.replace(CFG, action_token=action_token), Compute(), nnx.Rngs(0))
    tokens = jnp.zeros((1, 3, 4), jnp.int32)
    hidden = jnp.ones_like(tokens, bool)
    actions = jnp.zeros((1, 2, 3))

    @jax.jit
    def logits(actions_BTm1):
        return model(tokens, hidden, actions_to(actions_BTm1)).logits_BTNK

    before = logits(actions)
    for column, value in ((0, 1.0), (1, 2.5), (2, 2.0)):
        changed = np.abs(logits(actions.at[0, 1, column].set(value)) - before).max(axis=(0, 2, 3))
        assert changed[2] > 1e-4
        np.testing.assert_array_equal(changed[:2], 0)
    unknown = logits(jnp.full_like(actions, jnp.nan))
    assert np.isfinite(unknown).all()
    assert np.abs(unknown - before).max() > 1e-4
    gradient = jax.grad(lambda x: logits(x)[0, 2].std())(actions)
    assert np.abs(gradient[0, 1, 1]) > 0
    assert np.isfinite(gradient).all()


def test_unknown_and_random_actions_have_the_columns():
    assert np.isnan(no_actions(CFG, (2, 3))).all()
    assert no_actions(CFG, (2, 3)).shape == (2, 3, 3)
    assert no_actions(dataclasses.replace(CFG, num_actions=4, action_values=()), (2,)).tolist() == [-1, -1]
    rows = np.asarray(random_actions(CFG, jax.random.key(0), (50, 40))).reshape(-1, 3)
    assert set(np.unique(rows[:, 0])) == {0, 1}
    assert set(np.unique(rows[:, 2])) == {0, 1, 2}
    assert (rows[:, 1].mean(), rows[:, 1].std()) == pytest.approx((1, 4), abs=0.3)


@pytest.fixture(scope="module")
def rows_dataset(tmp_path_factory):
    """The squares, whose actions say more than where they go."""
    folder = tmp_path_factory.mktemp("rows")
    splits = {}
    for i, split in enumerate(("train", "val", "test")):
        clips = [make_clip(1000 * i + j, 6 + j % 7) for j in range(12)]
        rng = np.random.default_rng(i)
        rows = [
            np.stack([clip.actions_T, rng.normal(1, 4, len(clip)), rng.integers(0, 3, len(clip))], axis=1)
            for clip in clips
        ]
        made = [dataclasses.replace(c, actions_T=r.astype(np.float32)) for c, r in zip(clips, rows, strict=True)]
        splits[split] = (write_shard(folder, f"{split}/0.array_record", made),)
    write_metadata(folder, Metadata("squares", FRAME, 10.0, None, splits, {}, action_columns=COLUMNS))
    return folder


@pytest.fixture(scope="module")
def rows_world(rows_dataset, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    flags = ["--data_dir", rows_dataset, "--tokenizer_checkpoint", trained["tokenizer"], "--ckpt_dir", out]
    flags += ["--num_steps", 4, "--val_interval", 2, "--checkpoint_interval", 2, "--compile_cache", CACHE]
    here("train_dynamics", *SMALL, *flags, "--use_gt_actions")
    return out


def test_a_world_is_trained_on_rows(rows_world):
    world: World = load_world(rows_world)
    assert world.cfg.dynamics.action_values == (2, 0, 3)
    assert world.cfg.dynamics.action_scale == (1.0, 4.0, 1.0)
    assert world.num_actions == 0
    lines = [json.loads(line) for line in (rows_world / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_the_world_is_sampled_with_the_datasets_rows(rows_world, rows_dataset, tmp_path):
    source = ClipSource(rows_dataset, "val", 6)
    clips, world, columns = source.windows([0, 1], [0.0, 0.0]), load_world(rows_world), source.metadata.action_columns
    chosen = choose_actions(sample.Config(actions="true", prompt_frames=2), world, clips, columns, 4)
    np.testing.assert_array_equal(chosen, clips.actions_BT[:, 1:5])
    listed = listed_actions(world, "jump+turn=-3.5,item=axe,none", columns)
    np.testing.assert_array_equal(listed, [[1, -3.5, 0], [0, columns[1].mean, 2], [0, columns[1].mean, 0]])
    flags = ["--checkpoint", rows_world, "--num_clips", 2, "--steps", 2]
    for actions in ("true", "random"):
        here("sample", *flags, "--actions", actions, "--output_dir", tmp_path / actions)
        assert (tmp_path / actions / "rollout.png").is_file()


def test_lists_and_sweeps_name_the_columns(rows_world, tmp_path):
    flags = ["--checkpoint", rows_world, "--num_clips", 2, "--steps", 2, "--output_dir", tmp_path]
    here("sample", *flags, "--actions", "jump+turn=-3.5,item=axe,none")
    assert (tmp_path / "rollout.png").is_file()
    here("sample", *flags, "--actions", "sweep")
    assert (tmp_path / "sweep.png").is_file()
    for actions, message in {
        "run": "no column run; there are jump, turn, item, and none",
        "item": "item is one of none, bow, axe, as in item=axe",
        "turn=left": "turn is a number, as in turn=1",
    }.items():
        failed = here("sample", *flags, "--actions", actions, check=False)
        assert failed.returncode == 1
        assert failed.stderr == f"error: --actions {actions}: {message}\n"


def test_swept_rows_do_one_thing_each():
    class Named:
        cfg = type("cfg", (), {"dynamics": CFG})

    rows, names = swept_actions(Named, COLUMNS)
    assert names == ["nothing", "jump", "turn -3.00", "turn 5.00", "item bow", "item axe"]
    assert rows.tolist() == [[0, 1, 0], [1, 1, 0], [0, -3, 0], [0, 5, 0], [0, 1, 1], [0, 1, 2]]


def test_the_world_is_measured(rows_world, tmp_path):
    flags = ["--num_clips", 4, "--rollout_clips", 4, "--long_frames", 8, "--steps", 2]
    here("evaluate", "--checkpoint", rows_world, "--output_dir", tmp_path, *flags)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert np.isfinite(
        metrics["delta_psnr_t4"]["mean"] if isinstance(metrics["delta_psnr_t4"], dict) else metrics["delta_psnr_t4"]
    )
    assert (tmp_path / "report.html").is_file()


def test_buttons_and_the_mouse_set_columns():
    keys = tuple(ActionColumn(name, ("up", "down")) for name in ("forward", "jump"))
    aim = ActionColumn("mouse_x", ("-100", "-10", "0", "+10", "+100"))
    controls = Controls([*keys, aim, *COLUMNS[1:]])
    assert controls.still.tolist() == [0, 0, 2, 1, 0]
    names = [action.name for action in controls.actions()]
    assert names == ["nothing", "forward", "jump", "mouse_x -", "mouse_x +", "turn -", "turn +", "item bow", "item axe"]
    assert controls.row([1, 2]).tolist() == [1, 1, 2, 1, 0]
    assert controls.row([0, 5, 8]).tolist() == [0, 0, 2, -3, 2]
    assert [controls.columns[i].name for i in controls.mouse] == ["mouse_x", "turn"]
    assert controls.row([1], (0.02, 0.5)).tolist() == [1, 0, 2, 7, 0]
    assert controls.row([], (-1, 0)).tolist() == [0, 0, 0, 1, 0]
    vpt = Controls([*keys, ActionColumn("camera_y"), ActionColumn("camera_x")])
    assert vpt.row([], (1, -1)).tolist() == [0, 0, -3, 3]


def test_the_page_plays_rows(rows_world):
    """Several buttons at once, and the mouse, lead to the frames that `rollout` draws for their row."""
    game = load_game(Config(checkpoint=(str(rows_world),), open=False, steps=2, compile_cache=""))
    world = load_world(rows_world)

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            hello, body = await client.receive("hello")
            prompt = body.reshape(hello["prompts"])[0]
            await client.start(0, seed=5)
            frames, labels = [], []
            for fields in (
                {"action": 0},
                {"action": 1, "held": [1, 5], "mouse": [0, 0]},
                {"action": 0, "mouse": [0.5, 0]},
            ):
                await client.send(type="step", steps=2, temperature=1.0, **fields)
                header, body = await client.receive("frame")
                frames.append(body.reshape(FRAME))
                labels += header["labels"]
            for bad in ({"held": [99]}, {"held": 1}, {"mouse": [2, 0]}, {"mouse": [0]}):
                await client.send(type="step", action=0, steps=2, temperature=1.0, **bad)
                assert "step takes" in (await client.receive("error"))[0]["message"]
            return hello, prompt, frames, labels

    hello, prompt, frames, labels = asyncio.run(play())
    assert hello["combines"]
    assert hello["mouse"] == ["turn"]
    assert labels == ["nothing", "jump, item axe", "turn 7.00"]
    rows = jnp.asarray([[[0, 1, 0], [1, 1, 2], [0, 7, 0]]], jnp.float32)
    start = jnp.asarray(prompt[None, None], jnp.float32) / 255
    expected = rollout(world, start, rows, jax.random.key(5), SamplingConfig(steps=2))
    np.testing.assert_array_equal(np.stack(frames), (np.asarray(expected[0]) * 255 + 0.5).astype(np.uint8))


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_keys_combine_and_the_mouse_turns_in_a_browser(rows_world, tmp_path):
    async def play(url: str):
        last = "$('strip').lastChild.title.replace(/^Frame \\d+: /, '')"
        async with browsing(tmp_path, url) as browser:
            await browser.until("typeof mode === 'string' && mode === 'ready'")
            await browser.key("1", up=False)
            await browser.key("5", up=False)
            await browser.until(f"{last} === 'jump, item axe'")
            assert await browser.value("document.querySelectorAll('#actions .down').length") == 2
            await browser.key("5", down=False)
            await browser.until(f"{last} === 'jump'")
            await browser.key("1", down=False)
            await browser.until(f"{last} === 'nothing'")
            assert await browser.value("$('mouse-text').textContent") == "over the picture: turn"
            place = (
                "(r => [r.x, r.y, r.width, r.height])(document.querySelector('.screen canvas').getBoundingClientRect())"
            )
            x, y, width, height = await browser.value(place)
            for part in range(2, 18):
                at = {"x": x + width * part / 20, "y": y + height / 2}
                await browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
            turned = "[...$('strip').children].some(li => li.title.includes('turn') && !li.title.includes('-'))"
            await browser.until(turned)
            await browser.until(f"{last} === 'nothing'")

    with server_process("--checkpoint", rows_world) as url:
        asyncio.run(play(url))


def test_other_columns_are_not_taken_for_the_worlds(rows_world, dataset):
    failed = here("sample", "--checkpoint", rows_world, "--data_dir", dataset, "--actions", "true", check=False)
    assert failed.stderr.startswith("error: --data_dir")
    assert "its actions are not those that the world was trained on" in failed.stderr
    failed = here("evaluate", "--checkpoint", rows_world, "--data_dir", dataset, check=False)
    assert failed.returncode == 1
    assert "this world was trained on true actions, which are missing here" in failed.stderr
