"""The real game beside a world on the page, and a policy in the place of the player."""

import asyncio
import dataclasses
import functools
import gc
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from agents.clones import Clone, same_lam
from agents.labels import ContextMap, label, others
from agents.policy import Chooser, PolicyPlayer
from agents.worlds import surest_actions
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import CONFIG_VERSION, World, WorldConfig, load_agent, load_world, write_parameters
from models.lam import LAM, LAMConfig
from models.nn import Compute
from models.policy import Agent, AgentConfig, PolicyConfig
from models.sampling import SamplingConfig
from models.tokenizer import TokenizerConfig
from play import Config, load_game
from player.acting import HAND, Side, table
from player.game import Game
from player.real import MAX_LEVEL, RealGame
from player.screen import Request
from sources.recording import record
from tests.conftest import CACHE
from tests.test_play import A_MINUTE, CHROMIUM, Client, browsing, left, serving
from tests.test_policy import GAME, OPTIONS
from utils.actions import ActionLabel as Action
from utils.cli import with_flags
from utils.data import ClipSource
from utils.records import read_metadata

SIZE = {"width": 8, "num_heads": 2, "num_blocks": 1}
FRAME = (64, 64, 3)
PARTS = {"num_patches": 16, "patch_size": 16, "num_codes": 16, "frame_shape": FRAME}
WORLD = WorldConfig(
    TokenizerConfig(**SIZE, patch_size=16, num_codes=16, code_width=4, frame_shape=FRAME),
    LAMConfig(**SIZE, patch_size=16, num_codes=4, code_width=4, frame_shape=FRAME),
    DynamicsConfig(**SIZE, **PARTS, num_actions=4),
    window=4,
)
LABELS = [("left, fast", "LEFT", 0.5), ("right", "RIGHT", 0.4), ("right, slow", "RIGHT", 0.9), ("stay", "UP", 0.3)]
NONE, UP, LEFT, RIGHT, JUMP = (GAME.action_names.index(name) for name in ("NONE", "UP", "LEFT", "RIGHT", "RIGHT+UP"))


def export(folder: Path, kind: str, model: nnx.Module, cfg) -> Path:
    """A checkpoint in half precision that says no more than that."""
    folder.mkdir(exist_ok=True)
    write_parameters(folder, model)
    stored = {"kind": kind, "model": dataclasses.asdict(cfg), "config_version": CONFIG_VERSION}
    stored["train"] = {"seq_len": 4, "sampling": {"steps": 1}, "data_dir": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


@functools.cache
def made_world() -> World:
    return World(WORLD, Compute(), nnx.Rngs(0))


@functools.cache
def other_lam() -> LAM:
    return LAM(WORLD.lam, Compute(), nnx.Rngs(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An untrained world of CoinRun, with the game's clips and labels."""
    folder = tmp_path_factory.mktemp("world")
    record(GAME, OPTIONS, folder / "data", 0)
    rows = [
        {"name": name, "true": true, "share": share, "count": 5 - i} for i, (name, true, share) in enumerate(LABELS)
    ]
    (folder / "action_labels.json").write_text(json.dumps(rows))
    return export(folder, "world", made_world(), WORLD)


def make_agent(folder: Path, world: Path, lam: LAM | None, seed: int = 1) -> Path:
    """A policy that has learned nothing, but whose choices depend on what it sees."""
    num_actions = lam.cfg.num_codes if lam else len(GAME.action_names)
    policy = PolicyConfig(**SIZE, patch_size=16, context=2, num_actions=num_actions, frame_shape=FRAME)
    cfg = AgentConfig(policy, lam.cfg if lam else None)
    agent = Agent(cfg, Compute(), nnx.Rngs(seed))
    kernel = agent.policy.action_out.kernel
    kernel[...] = 0.4 * jax.random.normal(jax.random.key(seed), kernel.shape)  # so that it chooses now this, now that
    agent.lam = lam
    export(folder, "agent", agent, cfg)
    (folder / "data").symlink_to(world / "data")
    return folder


@pytest.fixture(scope="module")
def policies(world, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("policies")
    lam = load_world(world).lam
    return {kind: make_agent(folder / kind, world, lam if kind == "latent" else None) for kind in ("latent", "true")}


def config(world: Path, **how) -> Config:
    how = {"checkpoint": (str(world),), "compile_cache": str(CACHE), "real": True, "labels": 8} | how
    return Config(**{name: str(value) if isinstance(value, Path) else value for name, value in how.items()})


@pytest.fixture(scope="module")
def game(world, policies) -> Game:
    """The real game on the left, the world on the right, and a policy of true actions."""
    return load_game(config(world, policy_checkpoint=policies["true"]))


async def begin(client: Client, prompt: int = 0, seed: int = 0) -> np.ndarray:
    """The first frames (2, H, W, C)."""
    return (await client.start(prompt, seed)).reshape(2, *FRAME)


async def act(client: Client, action: int, **more) -> tuple[dict, np.ndarray]:
    """What the page is told, and the next frames (2, H, W, C)."""
    await client.send(type="step", action=action, steps=1, temperature=0.0, **more)
    header, body = await client.receive("frame")
    return header, body.reshape(2, *FRAME)


def level_of(seed: int, prompt: int) -> int:
    """The number of one of the levels that the page shows."""
    return int(np.random.default_rng(seed).integers(MAX_LEVEL, size=12)[prompt])


def test_the_real_game_goes_as_its_environment_does_and_the_world_begins_with_it(game):
    actions = [RIGHT, JUMP, JUMP, RIGHT, LEFT, NONE, RIGHT, JUMP]
    levels = GAME.levels(OPTIONS, "val", 1, level_of(0, 3))
    expected = [
        levels.frames()[0].copy(),
        *(levels.step(np.array([a], np.int32)).frames_NHWC[0].copy() for a in actions),
    ]
    assert np.any(expected[0] != expected[-1])

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            header, prompts = await client.receive("hello")
            assert header["worlds"][0]["name"] == "the real coinrun"
            assert (header["levels"], header["idle"]) == (True, NONE)
            prompts = prompts.reshape(header["prompts"])
            np.testing.assert_array_equal(prompts[3], expected[0])
            runs = []
            for _ in range(2):  # the same level each time
                first = await begin(client, 3)
                np.testing.assert_array_equal(first, [expected[0]] * 2)
                runs.append([first, *[(await act(client, a))[1] for a in actions]])
                np.testing.assert_array_equal([frames[0] for frames in runs[-1]], expected)
            np.testing.assert_array_equal(*runs)
            header, _ = await act(client, LEFT)
            assert header["actions"] == [LEFT, 0]
            assert header["labels"] == ["LEFT", "left, fast"]
            await client.socket.send_bytes(b"")
            await client.receive("error")
            await client.send(type="start", prompt=-2, seed=0)
            np.testing.assert_array_equal((await client.receive("started"))[1][: expected[0].size], expected[0].ravel())
        await left(game)

    asyncio.run(play())


def length_of(level: int, steps: int) -> int:
    """After how many jumps to the right a level is over; 0 if it is not by then."""
    levels = GAME.levels(OPTIONS, "val", 1, level)
    return next((t for t in range(1, steps + 1) if levels.step(np.array([JUMP], np.int32)).over_N[0]), 0)


def test_the_end_of_a_level_is_told_and_it_is_closed():
    number, length = next((n, t) for n in range(200) if (t := length_of(n, 100)))
    opened = []

    def open_level(number: int):
        opened.append(GAME.levels(OPTIONS, "val", 1, number))
        return opened[-1]

    real = RealGame("game", open_level, FRAME)

    async def play():
        state = await real.start(np.zeros(FRAME, np.uint8), number)
        frames, ends = [], []
        for _ in range(length + 2):
            frame, state = await real.step(Request(state, JUMP, 0, SamplingConfig()))
            frames.append(frame)
            ends.append(real.end(state))
        assert ends == [""] * (length - 1) + [ends[-1]] * 3
        assert ends[-1] in ("solved", "lost")
        for after in frames[-3:]:  # not of the level that the environment begins next
            np.testing.assert_array_equal(after, frames[-4])
        with pytest.raises(InputError, match="No level of the real game begins with this picture"):
            await real.start(np.zeros(FRAME, np.uint8))
        assert not opened[0].env.closed
        del state
        async with asyncio.timeout(A_MINUTE):
            while not opened[0].env.closed:  # the game's thread lets go of it a little later
                gc.collect()
                await asyncio.sleep(0.01)

    asyncio.run(play())


class Fixed:
    """A map that says one thing of each action."""

    def __init__(self, actions: list[int], num: int):
        self.table = np.eye(num)[actions]

    def shares(self, codes_N, before_N, hidden_NM):
        return self.table[codes_N]


@pytest.mark.parametrize("kind", ["true", "latent"])
def test_a_policy_acts_by_the_screen_that_it_sees(kind, game, world, policies):
    """Who acts where changes from step to step; each policy has seen all frames of its screen, whoever acted."""
    agent, cfg = load_agent(policies[kind]), config(world, policy_checkpoint=policies[kind])
    surest = surest_actions(str(world), load_world(world), read_metadata(world / "data"))
    assert surest == {"LEFT": 0, "RIGHT": 2, "UP": 3}
    codes = [surest.get(name, 3) for name in GAME.action_names]  # code 3, which stays, stands for all others
    true = [LEFT, RIGHT, RIGHT, UP]
    if kind == "latent":
        game = load_game(cfg)
        source = ClipSource(world / "data", "train", 4)
        maps = [ContextMap(label(agent, source, 8, 0), others(agent, source, 0), 4, len(GAME.action_names)), None]
    else:
        maps = [None, Fixed(codes, 4)]
    players = [PolicyPlayer(Chooser(agent, 1), cfg.policy_temperature, each, 5) for each in maps]
    alone, both = [HAND, HAND], [0, 1]

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            frames, done = await begin(client, 1, 5), []
            for by in (alone, both, [0, 0], alone, [1, 1], [0, HAND], [HAND, 1], *[both] * 40):
                chosen = {HAND: JUMP}
                for w, (player, frame) in enumerate(zip(players, frames, strict=True)):
                    if w in by:
                        chosen[w] = player.act(frame[None], np.array([True]))[0]
                    else:
                        player.see(frame[None])
                real = chosen[by[0]] if by[0] != 1 else true[chosen[1]]
                imagined = chosen[by[1]] if by[1] == 1 else codes[chosen[by[1]]]
                header, frames = await act(client, JUMP, by=by)
                assert header["actions"] == [real, imagined]
                assert [said.startswith("policy: ") for said in header["labels"]] == [who != HAND for who in by]
                done.append(header["actions"])
            assert min(len({*chosen}) for chosen in zip(*done, strict=True)) > 1
            for by in ([0], [0, 2], [0, -2], [0, True], "01", None):
                await client.send(type="step", action=0, steps=1, temperature=0.0, by=by)
                assert "step takes by" in (await client.receive("error"))[0]["message"]
        await left(game)

    asyncio.run(play())


def test_actions_of_the_game_and_of_worlds_stand_for_each_other():
    codes = [
        Action("left, fast", true="LEFT", count=3),
        Action("up", true="RIGHT"),
        Action("stay", true="UP", count=9),
    ]
    names = ("UP", "LEFT", "NONE", "RIGHT")
    real = Side([Action(name) for name in names], names)
    ours = Side(codes, surest={"RIGHT": 1})
    # The surest, else what moves as the name says, else what does nothing.
    assert table(real, ours, "NONE") == [1, 0, 2, 1]
    assert table(ours, real, "NONE") == [1, 3, 0]
    assert table(Side([*codes, Action("?", true="")], surest={"RIGHT": 1}), real, "NONE")[3] == 2
    assert table(real, real) == [0, 1, 2, 3]


def test_latent_actions_are_told_by_their_model(world):
    lam = load_world(world).lam
    assert same_lam(lam, made_world().lam)  # the world is stored in half precision
    assert not same_lam(lam, other_lam())
    assert not same_lam(lam, LAM(dataclasses.replace(WORLD.lam, num_codes=5), Compute(), nnx.Rngs(0)))


def test_what_cannot_stand_beside_a_world_is_told_in_one_line(world, policies, dataset, tmp_path, monkeypatch):
    def refused(**how) -> str:
        with pytest.raises(InputError) as error:
            load_game(config(world, **how))
        return with_flags(error.value, Config)

    said = f"--data_dir {dataset}: not recorded by generate_dataset.py, so there is no real game to be played"
    assert refused(data_dir=dataset) == said
    stranger = make_agent(tmp_path / "stranger", world, other_lam())
    said = f"--policy_checkpoint {stranger}: its latent actions are not those of {world}; train the policy with "
    assert refused(policy_checkpoint=stranger, real=False).startswith(said)
    for value, message in (
        ({"policy_temperature": -1.0}, "--policy_temperature -1.0: must not be negative"),
        ({"labels": 0}, "--labels 0: must be at least 1"),
    ):
        with pytest.raises(InputError) as error:
            config(world, **value)
        assert with_flags(error.value, Config) == message
    clone = Clone(str(policies["true"]), 0.5, 8, 0)
    with pytest.raises(InputError, match=r"learned a game with 15 actions; here are 4 actions"):
        clone.in_game(FRAME, 4)
    with pytest.raises(InputError, match=r"with frames of \(64, 64, 3\); here are frames of \(8, 8, 3\)"):
        clone.in_game((8, 8, 3), 15)
    unlabelled = export(tmp_path / "unlabelled", "world", made_world(), WORLD)
    (unlabelled / "data").symlink_to(world / "data")
    with pytest.raises(InputError, match=r"has no action_labels.json, .* run evaluate.py first"):
        load_game(config(unlabelled))
    monkeypatch.setitem(sys.modules, "procgen", None)
    assert "Procgen's games need the package procgen-mirror" in refused()


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_levels_follow_each_other_on_the_page_and_the_policy_plays_on(game, tmp_path):
    """Who jumps to the right ends the first level soon; after that the policy plays."""
    seed, length = next((s, t) for s in range(1000) if (t := length_of(level_of(s, 0), 60)))

    async def play():
        served = serving(dataclasses.replace(game, seed=seed, fps=100.0))
        async with served as (server, _, _), browsing(tmp_path, str(server.make_url("/"))) as browser:
            await browser.until("typeof mode === 'string' && mode === 'ready'")
            assert await browser.value("$('own').offsetParent === null && !$('policy').hidden")
            shown = "[...$('actions').children].filter(b => b.offsetParent).map(b => b.firstChild.textContent)"
            assert await browser.value(shown) == [name for name in GAME.action_names if name not in GAME.same_actions]
            await browser.key("8", up=False)
            await browser.until("frame > 2 && lastActions.join() === '8,3'")
            await browser.until("mode === 'over'")
            said = await browser.value("$('status').textContent")
            assert re.fullmatch(f"The real coinrun: level (lost|solved) at frame {length}. The next one begins…", said)
            hints = "[...document.querySelectorAll('.screen span')].map(s => s.textContent).join('|')"
            assert (await browser.value(hints)).removesuffix("|") in ("Level lost", "Level solved")
            await browser.key("8", down=False)
            await browser.until("prompt === 1 && mode === 'ready' && frame === 0")
            await browser.key("p")
            await browser.until("frame > 5 && $('policy').ariaPressed === 'true'")
            taken = "document.querySelectorAll('figcaption b')[{}].textContent.includes('policy: ')"
            assert await browser.value(taken.format(0))
            assert await browser.value(taken.format(1))
            await browser.value("$('by').selectedIndex = 3, null")  # sees the real game; you play beside it
            await browser.until(f"{taken.format(0)} && !{taken.format(1)}")
            await browser.key("p")
            await browser.until(f"!{taken.format(0)}")
            # After the last level come others, and a policy goes on by itself.
            await browser.key("p")
            await browser.value("prompt = 11, endLevel(['lost', '']), null")
            await browser.until("prompt === 0 && mode === 'playing' && frame > 2")
        await left(game)

    asyncio.run(play())
