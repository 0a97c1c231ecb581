"""The game server: its protocol, what it withstands, and its page in a real browser."""

import asyncio
import base64
import contextlib
import dataclasses
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from flax import nnx
from PIL import Image

import player.game
from models.errors import InputError
from models.genie import World, load_world
from models.nn import Compute
from models.sampling import SamplingConfig, rollout
from play import Config, load_game, open_dataset
from player.actions import idle_action, matching_actions, read_actions
from player.engine import Engine, Request
from player.game import MAX_UPLOAD, Game, Player
from player.pictures import decode_picture, fit_picture
from player.recording import Moment, encode_recording
from player.server import build_app, check_address
from sources.video import read_video
from tests.conftest import CACHE, ROOT
from tests.test_sampling import CONFIG
from utils.actions import ActionLabel as Action
from utils.cli import with_flags
from utils.records import read_metadata, write_metadata

A_MINUTE = 60  # no test should come near it, however busy the machine


@pytest.fixture(scope="module")
def game(trained) -> Game:
    return load_game(Config(checkpoint=(str(trained["world"]),), open=False, steps=3, compile_cache=""))


class Client:
    """A page without a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket = socket

    async def send(self, **message) -> None:
        await self.socket.send_str(json.dumps(message))

    async def receive(self, kind: str) -> tuple[dict, np.ndarray]:
        """The next message, which must be of this type: its header and the bytes after it."""
        message = await self.socket.receive(timeout=A_MINUTE)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        if message.type == aiohttp.WSMsgType.TEXT:
            header, body = json.loads(message.data), b""
        else:
            length = int.from_bytes(message.data[:4], "little")
            header, body = json.loads(message.data[4 : 4 + length]), message.data[4 + length :]
        assert header["type"] == kind, header
        return header, np.frombuffer(body, np.uint8)

    async def start(self, prompt: int = 0, seed: int = 0) -> np.ndarray:
        await self.send(type="start", prompt=prompt, seed=seed)
        return (await self.receive("started"))[1]

    async def step(self, action: int, steps: int = 2, temperature: float = 1.0) -> np.ndarray:
        await self.send(type="step", action=action, steps=steps, temperature=temperature)
        return (await self.receive("frame"))[1]


@contextlib.asynccontextmanager
async def serving(game: Game):
    """A server of the game, and a function that connects a client."""
    async with TestServer(build_app(game)) as server, aiohttp.ClientSession() as session:

        async def connect() -> Client:
            return Client(await session.ws_connect(server.make_url("/socket")))

        yield server, session, connect


async def left(game: Game) -> None:
    """Waits until nobody plays."""
    async with asyncio.timeout(A_MINUTE):
        while game.players:
            await asyncio.sleep(0.01)


def test_frames_are_those_of_a_rollout(game, trained):
    """The prompt chosen, the seed and the actions say everything; other settings compile nothing anew."""
    world = load_world(trained["world"])
    actions = [0, 2, 1, 1, 0, 2, 2]

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            header, prompts = await client.receive("hello")
            prompts = prompts.reshape(header["prompts"])
            for steps, temperature, seed in ((3, 1.0, 5), (5, 0.0, 6)):
                first = (await client.start(2, seed)).reshape(prompts.shape[1:])
                np.testing.assert_array_equal(first, prompts[2])
                played = [await client.step(a, steps, temperature) for a in actions]
                await client.start(-2, seed)
                again = [await client.step(a, steps, temperature) for a in actions]
                np.testing.assert_array_equal(played, again)
                prompt = jnp.asarray(prompts[2][None, None], jnp.float32) / 255
                cfg = SamplingConfig(steps, temperature)
                expected = rollout(world, prompt, jnp.array([actions]), jax.random.key(seed), cfg)[0] * 255 + 0.5
                expected = np.asarray(expected).astype(np.uint8).astype(int)
                assert np.abs(expected - np.reshape(played, expected.shape)).max() <= 1  # by rounding

    asyncio.run(play())
    assert game.engines[0]._step._cache_size() == 1


def test_a_batch_of_players_draws_what_each_would_alone(game, trained):
    """Two requests of three places, with different steps, temperatures, seeds and frames."""
    engine = Engine(load_world(trained["world"]), 3, ThreadPoolExecutor(1))
    alone = game.engines[0]
    prompts = game.prompts(0).frames_PHWC

    async def play():
        tasks = [asyncio.create_task(e.serve()) for e in (engine, alone)]
        await asyncio.sleep(0)
        requests = []
        for i, cfg in enumerate((SamplingConfig(2), SamplingConfig(4, 0.5))):
            state = await engine.start(prompts[i])
            if i:
                _, state = await alone.step(Request(state, 0, 3, cfg))  # one frame further than the other
            requests.append(Request(state, i, 7 + i, cfg))
        together = await asyncio.gather(*(engine.step(request) for request in requests))
        apart = [await alone.step(request) for request in requests]
        for (frame, state), (expected, expected_state) in zip(together, apart, strict=True):
            assert np.abs(frame.astype(int) - expected).max() <= 1
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state, expected_state)
        for task in tasks:
            task.cancel()

    asyncio.run(play())


@pytest.mark.parametrize("kind", ["maskgit_head", "causal", "flow"])
def test_another_kind_of_world_plays_what_it_samples(kind):
    tokenizer = None if kind == "flow" else CONFIG.tokenizer
    dynamics = dataclasses.replace(CONFIG.dynamics, kind=kind, frame_shape=CONFIG.frame_shape, motion_reach=2)
    cfg = dataclasses.replace(CONFIG, dynamics=dynamics, tokenizer=tokenizer)
    world = World(cfg, Compute(), nnx.Rngs(0))
    engine = Engine(world, 1, ThreadPoolExecutor(1))
    prompt = np.random.default_rng(0).integers(0, 256, cfg.frame_shape, np.uint8)
    actions, sampling = [0, 2, 1], SamplingConfig(steps=4)

    async def play() -> list[np.ndarray]:
        serving = asyncio.create_task(engine.serve())
        await asyncio.sleep(0)
        state, frames = await engine.start(prompt), []
        for action in actions:
            frame, state = await engine.step(Request(state, action, 5, sampling))
            frames.append(frame)
        serving.cancel()
        return frames

    prompt_BTHWC = jnp.asarray(prompt[None, None], jnp.float32) / 255
    expected = rollout(world, prompt_BTHWC, jnp.array([actions]), jax.random.key(5), sampling)[0] * 255 + 0.5
    played = np.stack(asyncio.run(play())).astype(int)
    assert np.abs(np.asarray(expected).astype(np.uint8) - played).max() <= 1  # by rounding


def test_four_play_and_a_fifth_is_refused(game):
    async def play():
        async with serving(game) as (server, session, connect):
            clients = [await connect() for _ in range(4)]
            for client in clients:
                await client.receive("hello")
            fifth = await connect()
            header, _ = await fifth.receive("refused")
            assert "4 places are taken" in header["message"]
            assert (await fifth.socket.receive(timeout=A_MINUTE)).type == aiohttp.WSMsgType.CLOSE

            async def game_of(i: int, client: Client) -> list[np.ndarray]:
                await client.start(i, seed=i)
                return [await client.step(i % 3) for _ in range(5)]

            frames = await asyncio.gather(*(game_of(i, client) for i, client in enumerate(clients)))
            async with session.get(server.make_url("/status")) as response:
                assert await response.json() == {"players": 4, "max_players": 4}
            await clients[0].socket.close()
            async with asyncio.timeout(A_MINUTE):
                while len(game.players) == 4:
                    await asyncio.sleep(0.01)
            late = await connect()  # a place is free again
            await late.receive("hello")
            np.testing.assert_array_equal(await game_of(2, late), frames[2])
        await left(game)

    asyncio.run(play())


GARBAGE = [
    "",
    "hello",
    "{",
    '{"type": "step", "action": 1, "st',
    "[" * 1900,
    "null",
    "7",
    "[]",
    '{"type": "fly"}',
    '{"type": ["step"]}',
    '{"type": "start", "prompt": 0}',
    '{"type": "start", "prompt": 99, "seed": 0}',
    '{"type": "start", "prompt": -1, "seed": 0}',
    '{"type": "start", "prompt": true, "seed": 0}',
    '{"type": "start", "prompt": 0, "seed": 4294967296}',
    '{"type": "start", "prompt": 0, "seed": 0.5}',
    '{"type": "step", "action": 3, "steps": 1, "temperature": 1}',
    '{"type": "step", "action": -1, "steps": 1, "temperature": 1}',
    '{"type": "step", "action": 0, "steps": 1000000, "temperature": 1}',
    '{"type": "step", "action": 0, "steps": 1, "temperature": NaN}',
    '{"type": "step", "action": 0, "steps": 1, "temperature": -Infinity}',
    '{"type": "step", "action": 0, "steps": 1, "temperature": 1' + "0" * 400 + "}",
    '{"type": "step", "action": 0, "steps": 1, "temperature": 1' + "0" * 1900 + "}",
    '{"type": "step", "action": "0", "steps": 1, "temperature": 1}',
    '{"type": "record", "on": 1}',
    '{"type": "save", "format": "../../x"}',
    '{"type": "save", "format": "gif"}',  # nothing is recorded
    json.dumps({"type": "start", "prompt": 0, "seed": 0, "more": "x" * 2000}),
    '{"type": "step", "action": 0, "steps": 1, "temperature": 1}',  # no game has started
]


def test_malformed_messages_are_answered_and_do_no_harm(game, caplog):
    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            for text in GARBAGE:
                await client.socket.send_str(text)
                header, _ = await client.receive("error")
                assert header["message"], text
            for data in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100), os.urandom(5000)):
                await client.socket.send_bytes(data)
                await client.receive("error")
            await client.start()
            await client.step(1)

            oversized = await connect()
            await oversized.receive("hello")
            with contextlib.suppress(ConnectionError):  # the server may hang up while we still write
                await oversized.socket.send_bytes(bytes(MAX_UPLOAD + 1))
                await oversized.socket.receive(timeout=A_MINUTE)
            async with asyncio.timeout(A_MINUTE):
                while len(game.players) > 1:
                    await asyncio.sleep(0.01)
            await client.step(1)
        await left(game)

    asyncio.run(play())
    assert not [record for record in caplog.records if record.exc_info]


HANDSHAKE = (
    "GET /socket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def masked(text: bytes) -> bytes:
    """A WebSocket frame of a text shorter than 126 bytes, with the mask 0."""
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text


def test_cut_connections_leave_nothing_behind(game):
    """Connections end in the middle of the handshake, of a message and of a frame that is being drawn."""
    start = masked(b'{"type": "start", "prompt": 0, "seed": 0}')
    step = masked(b'{"type": "step", "action": 0, "steps": 64, "temperature": 1}')
    endings = [
        HANDSHAKE.encode()[:60],
        HANDSHAKE.encode(),
        HANDSHAKE.encode() + start[:20],
        HANDSHAKE.encode() + start + step,
        HANDSHAKE.encode() + start + step * 50,
        HANDSHAKE.encode() + b"\xff\xff\xff\xff\xff",  # no frame at all
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    ]

    async def play():
        async with serving(game) as (server, _, connect):

            async def cut(data: bytes, wait: float) -> None:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(wait)
                writer.transport.abort()

            client = await connect()  # plays on all the while
            await client.receive("hello")
            await client.start()

            async def everything() -> None:
                for i in range(3):
                    await asyncio.gather(*(cut(data, 0.03 * i) for data in endings[::2]))
                    await asyncio.gather(*(cut(data, 0.03 * i) for data in endings[1::2]))
                    await client.step(i)
                async with asyncio.timeout(A_MINUTE):
                    while len(game.players) > 1:
                        await asyncio.sleep(0.01)
                await client.step(0)  # behind all that the device still had to do
                await asyncio.sleep(0.1)  # its thread lets go of its arguments a little later

            def held() -> tuple[int, int]:
                gc.collect()
                return len(jax.live_arrays()), len(asyncio.all_tasks())

            await everything()
            before = held()
            await everything()
            async with asyncio.timeout(A_MINUTE):
                while held() != before:
                    await asyncio.sleep(0.1)
        await left(game)

    asyncio.run(play())


def test_of_requests_that_come_too_fast_the_latest_counts(game):
    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            await client.start()
            for _ in range(300):
                await client.send(type="step", action=0, steps=8, temperature=1.0)
            await client.send(type="step", action=2, steps=8, temperature=1.0)
            count, action = 0, None
            while action != 2:
                header, _ = await client.receive("frame")
                count, action = count + 1, header["actions"][0]
            assert count < 150
            assert header["frame"] == count

    asyncio.run(play())


def test_a_browser_that_takes_nothing_in_is_cut_off(game, monkeypatch):
    monkeypatch.setattr(player.game, "SEND_TIMEOUT_S", 0.01)
    cut = []

    class Stuck:
        async def send_str(self, text):
            await asyncio.Event().wait()

    class Connection:
        class transport:  # noqa: N801
            abort = staticmethod(lambda: cut.append(True))

    with pytest.raises(ConnectionResetError):
        asyncio.run(Player(game, Stuck(), Connection()).send({}))
    assert cut


def test_who_asks_for_nothing_makes_room(game, monkeypatch):
    monkeypatch.setattr(player.game, "IDLE_TIMEOUT_S", 0.05)

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            await client.receive("refused")
            await left(game)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "http://{here}"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://{here}.evil.example"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://[::1"}, False),
        ({"Host": "localhost"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, False),
        ({"Host": ""}, False),
    ],
)
def test_other_origins_are_refused(game, headers, allowed):
    async def play():
        async with serving(game) as (server, session, _):
            sent = {name: value.format(here=f"127.0.0.1:{server.port}") for name, value in headers.items()}
            async with session.get(server.make_url("/status"), headers=sent) as response:
                assert (response.status == 200) == allowed
            if allowed:
                await (await session.ws_connect(server.make_url("/socket"), headers=sent)).close()
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await session.ws_connect(server.make_url("/socket"), headers=sent)

    asyncio.run(play())


def test_on_a_network_any_name_will_do_but_no_other_origin(game):
    async def play():
        async with TestServer(build_app(game, loopback=False)) as server, aiohttp.ClientSession() as session:
            for headers, status in (
                ({"Host": "lab.example"}, 200),
                ({"Host": "lab.example", "Origin": "http://lab.example"}, 200),
                ({"Host": "lab.example", "Origin": "http://evil.example"}, 403),
            ):
                async with session.get(server.make_url("/status"), headers=headers) as response:
                    assert response.status == status, headers

    asyncio.run(play())


def test_the_page_may_load_nothing_from_elsewhere(game):
    async def play():
        async with serving(game) as (server, session, _), session.get(server.make_url("/")) as response:
            assert await response.text() == (ROOT / "player" / "page.html").read_text()
            policy = response.headers["Content-Security-Policy"].split("; ")
            assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
            assert response.headers["X-Content-Type-Options"] == "nosniff"

    asyncio.run(play())


class Message:
    """A text that a browser sent."""

    type = aiohttp.WSMsgType.TEXT

    def __init__(self, **fields):
        self.data = json.dumps(fields)


def test_a_start_takes_back_the_step_that_was_meant_for_the_game_before(game):
    class Connection:
        transport = None

    async def read() -> None:
        player = Player(game, None, Connection())
        await player.read(Message(type="step", action=1, steps=1, temperature=1))
        await player.read(Message(type="step", action=2, steps=1, temperature=1))
        assert player.inbox["step"]["action"] == 2
        await player.read(Message(type="start", prompt=0, seed=0))
        assert list(player.inbox) == ["start"]

    asyncio.run(read())


def test_a_seed_chooses_the_frames_to_start_from(game):
    np.testing.assert_array_equal(game.prompts(1).frames_PHWC, game.prompts(1).frames_PHWC)
    assert np.any(game.prompts(1).frames_PHWC != game.prompts(2).frames_PHWC)


def test_a_full_recording_ends_and_the_next_one_begins_anew(game, monkeypatch):
    monkeypatch.setattr(game, "max_recording", 2)

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            await client.start()
            for _ in range(2):
                await client.send(type="record", on=True)
                assert (await client.receive("recording"))[0]["recorded"] == 0
                told = []
                for _ in range(3):
                    await client.send(type="step", action=0, steps=1, temperature=1)
                    header, _ = await client.receive("frame")
                    told.append((header["recorded"], header["recording"]))
                assert told == [(1, True), (2, False), (2, False)]
        await left(game)

    asyncio.run(play())


def test_a_recording_plays_at_the_rate_of_most_of_its_frames(tmp_path):
    frame = np.zeros((16, 16, 3), np.uint8)
    recording = [Moment(second, [frame], ["UP"]) for second in (0.0, 0.1, 0.2, 0.3, 9.0)]  # with a pause
    (tmp_path / "a.mp4").write_bytes(encode_recording(recording, "mp4"))
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(10)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def test_a_game_starts_from_an_uploaded_picture_and_is_recorded(game, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 20, 3), np.uint8)

    async def play():
        async with serving(game) as (_, _, connect):
            client = await connect()
            await client.receive("hello")
            await client.socket.send_bytes(png(picture))
            _, shown = await client.receive("uploaded")
            np.testing.assert_array_equal(await client.start(-1), shown)
            np.testing.assert_array_equal(shown.reshape(16, 16, 3), fit_picture(picture, 16, 16))
            await client.send(type="record", on=True)
            await client.receive("recording")
            frames = [await client.step(i % 3) for i in range(6)]
            assert np.ptp(frames) > 0
            await client.send(type="record", on=False)
            header, _ = await client.receive("recording")
            assert header == {"type": "recording", "on": False, "recorded": 6}
            for suffix in ("gif", "mp4"):
                await client.send(type="save", format=suffix)
                _, data = await client.receive("file")
                (tmp_path / f"game.{suffix}").write_bytes(data.tobytes())
                video, fps = read_video(tmp_path / f"game.{suffix}")
                assert fps > 0
                assert len(video) == 6
                enlarged = frames[-1].reshape(16, 16, 3).repeat(12, 0).repeat(12, 1)
                assert np.abs(video[-1][-192:, :192].astype(int) - enlarged).mean() < 25

    asyncio.run(play())


def test_pictures_are_cut_to_the_right_shape():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    np.testing.assert_array_equal(fit_picture(wide, 5, 5), 200)
    assert fit_picture(wide, 20, 40).shape == (20, 40, 3)
    np.testing.assert_array_equal(decode_picture(png(wide)), wide)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the orientation of a camera held upright
    Image.fromarray(wide).save(turned, format="png", exif=exif)
    np.testing.assert_array_equal(decode_picture(turned.getvalue()), np.rot90(wide, -1))
    bomb = io.BytesIO()
    Image.new("1", (6000, 6000)).save(bomb, format="png")
    with pytest.raises(InputError, match="6000×6000"):
        decode_picture(bomb.getvalue())


def test_labels_say_what_actions_do(tmp_path, capsys):
    assert read_actions(str(tmp_path), 2, None) == [Action(), Action()]
    assert [a.name for a in read_actions(str(tmp_path), 2, ("LEFT", "NONE"))] == ["LEFT", "NONE"]
    rows = [{"name": "RIGHT", "share": 0.5, "count": 9}, {"name": "NONE", "share": 0.9, "count": 3}]
    (tmp_path / "action_labels.json").write_text(json.dumps(rows))
    actions = read_actions(str(tmp_path), 2, None)
    assert actions == [Action("RIGHT", 0.5, 9, "RIGHT"), Action("NONE", 0.9, 3, "NONE")]
    assert idle_action(actions) == 1
    assert idle_action(actions, "right") == 0
    assert idle_action([Action("UP", 0.2, 4), Action("RIGHT", 0.9, 7)]) == 1
    # What was measured to do nothing is idle, whatever the dataset calls that and however rarely it occurs.
    measured = [Action("right, fast", 0.5, 90, "RIGHT"), Action("stay 2", 0.4, 9, "NONE"), Action("stay", 0.4, 3, "UP")]
    assert idle_action(measured, "NONE") == 2
    keys, ways = [Action("RIGHT+UP"), Action("NONE"), Action("LEFT+DOWN")], [Action("stay"), Action("down, left, fast")]
    assert matching_actions(keys, [*ways, Action("up, right")]) == [2, 0, 1]
    assert matching_actions([*ways, Action("up, right")], keys) == [1, 2, 0]
    assert matching_actions(ways, [Action()] * 2) == [0, 1]  # where nothing is known the index decides
    assert matching_actions(ways[::-1], [Action()] * 2) == [0, 1]
    speeds = [Action("left"), Action("right, slow", count=3), Action("right", count=2), Action("stay")]
    assert matching_actions([Action("RIGHT"), *measured, Action("left, fast")], speeds) == [2, 1, 3, 3, 0]
    # A label file that does not fit is said to be so, and left aside.
    assert read_actions(str(tmp_path), 3, None) == [Action()] * 3
    assert "2 labels for 3 actions" in capsys.readouterr().err
    theirs = [Action("NONE", 1, 5), Action("LEFT", 1, 5), Action("RIGHT", 1, 2), Action("RIGHT", 1, 3)]
    ours = [*actions, Action("UP"), Action("X"), Action("Y")]
    assert matching_actions(ours, theirs) == [3, 0, 2, 3, 0]
    assert matching_actions(ours, theirs, "LEFT") == [3, 0, 2, 3, 1]  # there LEFT is what does nothing


def test_a_missing_dataset_is_told(tmp_path, capsys):
    gone = {"config_version": 1, "train": {"data_dir": str(tmp_path / "gone")}}
    (tmp_path / "config.json").write_text(json.dumps(gone))
    source, message = open_dataset(Config(), str(tmp_path))
    assert source is None
    assert str(tmp_path) in message
    assert f"warning: no frames to start from: --data_dir {tmp_path}/gone: no dataset here" in capsys.readouterr().err
    with pytest.raises(InputError, match="no dataset here"):
        open_dataset(Config(data_dir=str(tmp_path)), str(tmp_path))


def test_each_world_is_sampled_in_its_own_way(trained, dataset, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(trained["world"], other)
    stored = json.loads((other / "config.json").read_text())
    stored["train"]["sampling"] = {"order": "halton", "steps": 7, "top_k": 2}
    (other / "config.json").write_text(json.dumps(stored))
    asked = []

    async def step(engine, request):
        asked.append(request.cfg)
        return np.zeros(engine.frame_shape, np.uint8), request.state

    monkeypatch.setattr(Engine, "warm_up", lambda *_: None)
    monkeypatch.setattr(Engine, "step", step)

    async def play():
        worlds = (str(trained["world"]), str(other))
        async with serving(load_game(Config(checkpoint=worlds, data_dir=str(dataset), compile_cache=""))) as serves:
            client = await serves[2]()
            await client.receive("hello")
            await client.start()
            await client.step(1, steps=3, temperature=0.5)

    asyncio.run(play())
    assert asked[1] == SamplingConfig(3, 0.5, "halton", top_k=2)
    assert asked[0].order == "confidence"
    assert asked[0].top_k == 0


def test_the_dataset_says_which_action_is_idle(trained, dataset, tmp_path, monkeypatch):
    world, data = tmp_path / "world", tmp_path / "data"
    shutil.copytree(trained["world"], world)
    rows = [{"name": name, "share": 0.5, "count": 9 - i} for i, name in enumerate(("LEFT", "NONE", "RIGHT"))]
    (world / "action_labels.json").write_text(json.dumps(rows))
    shutil.copytree(dataset, data)
    write_metadata(data, dataclasses.replace(read_metadata(dataset), idle_action="RIGHT"))
    monkeypatch.setattr(Engine, "warm_up", lambda *_: None)

    async def idle(data_dir: Path) -> int:
        game = load_game(Config(checkpoint=(str(world),), data_dir=str(data_dir), compile_cache=""))
        async with serving(game) as (_, _, connect):
            return (await (await connect()).receive("hello"))[0]["idle"]

    assert asyncio.run(idle(data)) == 2
    assert asyncio.run(idle(dataset)) == 1  # which says nothing: the usual names


def test_an_address_that_is_taken_and_too_many_worlds_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as error:
            check_address("127.0.0.1", port)
        assert with_flags(error.value, Config).startswith(f"--host 127.0.0.1 --port {port}: cannot be listened on (")
    check_address("127.0.0.1", port)
    with pytest.raises(InputError) as error:
        Config(checkpoint=("a", "b", "c"))
    assert with_flags(error.value, Config) == "--checkpoint: 3 worlds given; at most two can be compared"


# ---- the page, in a browser


class Browser:
    """A page in headless Chromium, driven over its DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.count, self.errors = socket, 0, []

    async def call(self, method: str, **params) -> dict:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=A_MINUTE)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"])
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str):
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = A_MINUTE):
        """Waits for the expression to become true."""
        end = time.monotonic() + seconds
        while not (value := await self.value(expression)):
            said = await self.value("document.querySelector('#status')?.textContent")
            assert time.monotonic() < end, f"{expression} is still {value}; the page says: {said}"
            await asyncio.sleep(0.05)
        return value

    async def key(self, key: str, down: bool = True, up: bool = True) -> None:
        code = f"Digit{key}" if key.isdigit() else f"Key{key.upper()}" if key.isalpha() and len(key) == 1 else key
        params = {"key": key, "code": code} | ({"text": key} if len(key) == 1 else {})
        if down:
            await self.call("Input.dispatchKeyEvent", type="keyDown", **params)
        if up:
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    async def screenshot(self, file: Path, width: int, height: int) -> None:
        mobile = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        shot = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.asynccontextmanager
async def browsing(folder: Path, url: str):
    """Chromium with the page open; it is gone afterwards."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1000", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "profile" / "DevToolsActivePort"
        async with asyncio.timeout(A_MINUTE), aiohttp.ClientSession() as session:
            while not (port_file.exists() and port_file.read_text().strip()):
                await asyncio.sleep(0.05)
            port, pages = port_file.read_text().split()[0], []
            while not pages:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    pages = [page for page in await response.json() if page["url"].startswith(url)]
                await asyncio.sleep(0.05)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            browser = Browser(socket)
            await browser.call("Runtime.enable")
            await browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
            yield browser
            assert not browser.errors
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def server_process(*flags: object):
    """`python play.py`, as a user runs it; gives its address."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "play.py", "--port", "0", "--no-open", "--compile_cache", CACHE, *flags]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if match := re.search(r"http://\S+/", line):
                break
        else:
            raise AssertionError("the server ended without telling its address")
        yield match[0]
        assert process.poll() is None, "the server died"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait(20)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")
def test_two_worlds_are_played_in_a_browser(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained["world"], other)
    for folder, names in ((tmp_path / "labelled", ("NONE", "RIGHT", "LEFT")), (other, ("RIGHT", "LEFT", "NONE"))):
        if not folder.exists():
            shutil.copytree(trained["world"], folder)
        rows = [{"name": name, "share": 0.5 + i / 10, "count": 10 - i} for i, name in enumerate(names)]
        (folder / "action_labels.json").write_text(json.dumps(rows))
    worlds = ["--checkpoint", tmp_path / "labelled", "--checkpoint", other]
    frame = "frame"
    picture = "document.querySelectorAll('.screen canvas')[{}].toDataURL()"

    async def play(url: str):
        async with browsing(tmp_path, url) as browser:
            await browser.until("typeof mode === 'string' && mode === 'ready'")
            assert await browser.value("document.querySelectorAll('.screen canvas').length") == 2
            before = [await browser.value(picture.format(w)) for w in range(2)]
            assert before[0] == before[1], "both start from one frame"

            # A held arrow key repeats; the worlds play the codes of the same name.
            await browser.key("ArrowRight", up=False)
            await browser.until(f"{frame} >= 3 && lastActions.join() === '1,0'")
            assert await browser.value("document.querySelector('#actions .down').dataset.action") == "1"
            await browser.key("ArrowRight", down=False)
            await browser.until("lastActions.join() === '0,2'")  # idle
            await browser.key("2")  # a short press counts too
            await browser.until("[...document.querySelectorAll('#strip li')].some(li => li.title.endsWith('LEFT'))")
            assert [await browser.value(picture.format(w)) for w in range(2)] != before

            # So does a button that is held down with the mouse.
            place = "(r => [r.x + r.width / 2, r.y + r.height / 2])($('actions').children[1].getBoundingClientRect())"
            x, y = await browser.value(place)
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await browser.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
            await browser.until("[...$('strip').children].slice(-3).every(li => li.title.endsWith('RIGHT'))")
            await browser.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
            await browser.until("lastActions[0] === 0")

            # Record, pause, step, save.
            await browser.key("v")
            await browser.until("recorded >= 4")
            await browser.key("v")
            await browser.until("!recording")
            await browser.key(" ")
            await browser.until("mode === 'paused' && !waiting")
            paused = await browser.value(frame)
            await browser.key(".")
            await browser.until(f"{frame} === {paused + 1} && !waiting")
            await browser.value("document.querySelector('#gif').click()")
            await browser.until("document.querySelector('#status').textContent.startsWith('Saved')")
            file = tmp_path / "downloads" / "jafar.gif"
            async with asyncio.timeout(A_MINUTE):
                while not file.exists():
                    await asyncio.sleep(0.05)
            recorded = await browser.value("recorded")
            video, _ = read_video(file)
            assert len(video) == recorded
            assert video.shape[2] == 2 * 192

            # Same seed, same actions, same frames.
            async def replay() -> list[str]:
                await browser.key("r")
                await browser.until("frame === 0 && mode === 'ready'")
                await browser.value("setMode('paused')")
                for i, key in enumerate("1201"):
                    await browser.key(key)
                    await browser.until(f"frame === {i + 1} && !waiting")
                return [await browser.value(picture.format(w)) for w in range(2)]

            assert await replay() == await replay()
            # A picture of one's own.
            (tmp_path / "own.png").write_bytes(png(np.full((30, 40, 3), 200, np.uint8)))
            document = await browser.call("DOM.getDocument")
            node = {"nodeId": document["root"]["nodeId"], "selector": "#upload"}
            node = await browser.call("DOM.querySelector", **node)
            await browser.call("DOM.setFileInputFiles", files=[str(tmp_path / "own.png")], **node)
            await browser.until("prompt === -1 && frame === 0 && mode === 'ready'")
            pixel = "[...$('screens').querySelector('canvas').getContext('2d').getImageData(3, 3, 1, 1).data]"
            assert await browser.value(pixel) == [200, 200, 200, 255]

            # Everything that can be operated has a name, and no page is wider than a phone.
            nameless = "[...document.querySelectorAll('button, input, select, canvas[role=img]')].filter(e => "
            nameless += "!(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"
            assert await browser.value(nameless) == 0
            for name, width, height in (("desktop", 1280, 1000), ("phone", 390, 844)):
                await browser.screenshot(tmp_path / f"{name}.png", width, height)
                assert await browser.value(f"document.documentElement.scrollWidth <= {width}"), name

    with server_process(*worlds) as url:
        asyncio.run(play(url))
        asyncio.run(nobody_left(url))


async def nobody_left(url: str) -> None:
    async with asyncio.timeout(A_MINUTE), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}status") as response:
                if (await response.json())["players"] == 0:
                    return
            await asyncio.sleep(0.05)


def take_screenshot(checkpoint: str, file: str, prompt: int = 0) -> None:
    """Plays a world from one of its prompts and takes a picture of the page, for the documentation.

    python -c "from tests import test_play as t; t.take_screenshot('worlds/coinrun-small', 'docs/play.png', 8)"
    """

    async def play(url: str, folder: Path) -> None:
        async with browsing(folder, url) as browser:
            await browser.until("typeof mode === 'string' && mode === 'ready'")
            await browser.call("Emulation.setScrollbarsHidden", hidden=True)
            await browser.value(f"start({prompt}), mode = 'off', null")
            await browser.until("mode === 'ready'")
            labelled = await browser.value("actions.some(a => directions(a.name))")
            for frames, key in ((7, "ArrowRight" if labelled else "1"), (11, "ArrowUp" if labelled else "2")):
                await browser.key(key, up=False)
                await browser.until(f"frame >= {frames}")
                if frames == 7:
                    await browser.key(key, down=False)
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            await browser.screenshot(Path(file), 1240, 970)

    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as name, server_process("--checkpoint", checkpoint) as url:
        asyncio.run(play(url, Path(name)))
