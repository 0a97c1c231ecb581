"""Playing worlds over WebSockets: what all players share, and what one of them does."""

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from aiohttp import ClientError, WSCloseCode, WSMsgType, web

from models.errors import InputError
from models.sampling import SamplingConfig
from player.acting import Acting, Actors
from player.pictures import decode_picture, fit_picture
from player.real import RealGame
from player.recording import Moment, encode_recording
from player.screen import Prompts, Request, Screen
from utils.data import ClipSource

NUM_PROMPTS = 12
MAX_TEXT = 2_000  # characters in a message
MAX_UPLOAD = 4_000_000  # bytes; the page shrinks pictures before it sends them
MAX_STEPS = 64
MAX_RECORDING = 600, 50_000_000  # frames, bytes
SEND_TIMEOUT_S = 20  # after which a browser that takes nothing in is cut off
IDLE_TIMEOUT_S = 15 * 60  # after which a player who asks for nothing makes room
CLOSED = (ConnectionError, ClientError)


@dataclasses.dataclass
class Game:
    """What the players share.

    names, engines: Of the screens: how they are called, what draws them.
    acting: What their actions do, and who may choose them.
    sampling: How each screen is sampled. The page starts with the steps and the temperature of the first; these are
      then each player's own.
    source: Clips to take the first frames from, or None; `message` then says what to do.
    real: The real game, where it is among the screens: its levels then give the first frames.
    fps: Frames per second that the page aims at.
    """

    names: tuple[str, ...]
    engines: Sequence[Screen]
    acting: Acting
    sampling: Sequence[SamplingConfig]
    source: ClipSource | None
    real: RealGame | None = None
    message: str = ""
    fps: float = 10.0
    seed: int = 0
    max_players: int = 4

    def __post_init__(self):
        self.shapes = [engine.frame_shape for engine in self.engines]
        self.max_recording = min(MAX_RECORDING[0], MAX_RECORDING[1] // sum(math.prod(shape) for shape in self.shapes))
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.players: set[Player] = set()

    def prompts(self, seed: int) -> Prompts:
        """Frames to start from, drawn with `seed`: of the real game's levels, else of clips spread over the dataset."""
        if self.real:
            return self.real.prompts(seed, NUM_PROMPTS)
        if self.source is None:
            return Prompts(np.zeros((0, *self.shapes[0]), np.uint8))
        rng = np.random.default_rng(seed)
        count = min(NUM_PROMPTS, len(self.source))
        indices = rng.choice(len(self.source), count, replace=False)
        return Prompts(self.source.windows([int(i) for i in indices], list(rng.random(count))).frames_BTHWC[:, 0])

    async def welcome(self, request: web.Request) -> web.WebSocketResponse:
        """Handles a WebSocket: lets a player play, or says that there is no room."""
        socket = web.WebSocketResponse(max_msg_size=MAX_UPLOAD, heartbeat=15, timeout=2, compress=False)
        await socket.prepare(request)
        player = Player(self, socket, request)
        full = len(self.players) >= self.max_players
        if not full:
            self.players.add(player)
        try:
            if full:
                message = f"All {self.max_players} places are taken. Close another page, or try again later."
                await player.send({"type": "refused", "message": message})
                await socket.close(code=WSCloseCode.TRY_AGAIN_LATER)
            else:
                await player.stay()
        except CLOSED:
            pass
        finally:
            self.players.discard(player)
        return socket


class Player:
    """One page. Messages either way are JSON texts with a `type`; those with pictures are binary (see `send`).

    hello: Screens (`worlds`), actions and settings; with the frames to start from.
    start (prompt, seed) → started: prompt is an index, -1 the uploaded picture, -2 what the last game started from;
      with the first frame of each screen.
    step (action, steps, temperature) → frame: With the next frame of each screen, and how each game ended, in `ends`.
      Where there is a policy, `by` lists for each screen the one whose policy acts there, -1 for the player. Where
      actions have columns, `held` lists other buttons that are down, and `mouse` says how far it moved, from -1 to 1
      across and down.
    a binary message, a picture file → uploaded: With the picture, in the first world's shape.
    prompts (seed) → prompts: With other frames to start from.
    record (on) → recording; save (format: gif or mp4) → file: With the video.
    What cannot be done is answered by `error`; a page that may not stay gets `refused`. Either has a `message`.
    """

    def __init__(self, game: Game, socket: web.WebSocketResponse, request: web.Request):
        self.game, self.socket, self.transport = game, socket, request.transport
        self.inbox: dict[str, Any] = {}  # at most one message of each type: the latest
        self.changed = asyncio.Event()
        self.states: list[Any] = []
        self.frames: list[np.ndarray] = []  # that are shown
        self.actors = Actors(game.acting, game.seed)
        self.prompts = Prompts(np.zeros((0, 1, 1, 3), np.uint8))
        self.picture: np.ndarray | None = None  # uploaded
        self.first: tuple[np.ndarray, int | None] | None = None  # what the game started from, and its level
        self.seed = self.frame = 0
        self.recording: list[Moment] = []
        self.records = False

    async def stay(self) -> None:
        """Plays until the page closes."""
        playing = asyncio.create_task(self.play())
        try:
            async for message in self.socket:
                if message.type is not WSMsgType.ERROR:  # as when one is too large; the socket is closed then
                    await self.read(message)
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    async def send(self, header: dict[str, Any], *pictures: np.ndarray | bytes) -> None:
        """Sends a JSON text; with pictures, bytes: the length of the JSON (4 bytes, little-endian), it, raw RGB."""
        text = json.dumps(header)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                if not pictures:
                    await self.socket.send_str(text)
                else:
                    parts = [p if isinstance(p, bytes) else p.tobytes() for p in pictures]
                    await self.socket.send_bytes(
                        len(text.encode()).to_bytes(4, "little") + text.encode() + b"".join(parts)
                    )
        except TimeoutError:
            if self.transport:
                self.transport.abort()
            raise ConnectionResetError("the browser takes nothing in") from None

    async def read(self, message: Any) -> None:
        """Puts a message into the inbox, in place of an older one that still waits."""
        try:
            if message.type == WSMsgType.BINARY:
                kind, fields = "upload", message.data
            else:
                kind, fields = self.parse(message.data)
        except (InputError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, InputError) else "not a JSON object"
            await self.send({"type": "error", "message": f"Message not understood: {reason}."})
            return
        if kind == "start":
            self.inbox.pop("step", None)  # meant for the game before
        self.inbox[kind] = fields
        self.changed.set()

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        """Type and checked fields of a message.

        Raises:
          InputError, ValueError: It is malformed; the former says how.
        """
        if len(text) > MAX_TEXT:
            raise InputError(f"longer than {MAX_TEXT} characters")
        message = json.loads(text)
        if not isinstance(message, dict):
            raise ValueError
        seed = ("seed", int, 0, 2**31 - 1)
        kinds: dict[str, list[tuple]] = {
            "start": [("prompt", int, -2, NUM_PROMPTS - 1), seed],
            "step": [
                ("action", int, 0, self.game.acting.num_actions - 1),
                ("steps", int, 1, MAX_STEPS),
                ("temperature", float, 0.0, 10.0),
            ],
            "record": [("on", bool, False, True)],
            "prompts": [seed],
            "save": [("format", str, "gif", "mp4")],
        }
        kind = message.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise InputError(f"type must be one of {', '.join(kinds)}")
        fields = {}
        for name, of, low, high in kinds[kind]:
            value = message.get(name)
            if of is float and type(value) is int:
                value = min(float(value), 1e9) if abs(value) < 1e9 else 1e9
            if type(value) is not of or (of is str and value not in (low, high)) or not low <= value <= high:
                raise InputError(f"{kind} needs {name}, {of.__name__}, from {low} to {high}")
            fields[name] = value
        if kind == "step":
            fields |= self.game.acting.parse(message)
        return kind, fields

    async def play(self) -> None:
        """Answers what is in the inbox, one by one."""
        answers: dict[str, Callable] = {
            "start": self.start,
            "step": self.step,
            "upload": self.upload,
            "prompts": self.show_prompts,
            "record": self.record,
            "save": self.save,
        }
        try:
            await self.hello()
            while True:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    await self.changed.wait()
                self.changed.clear()
                while self.inbox:
                    kind = next(iter(self.inbox))
                    try:
                        await answers[kind](self.inbox.pop(kind))
                    except InputError as error:
                        await self.send({"type": "error", "message": str(error)})
        except CLOSED:
            pass
        except TimeoutError:
            minutes = IDLE_TIMEOUT_S // 60
            message = f"Nothing happened for {minutes} minutes, so this place was given up. Reload the page to play on."
            await self.send({"type": "refused", "message": message})
        except Exception:
            logging.exception("a player's game failed")
            await self.send({"type": "error", "message": "The server failed; its terminal says why."})
        finally:
            await self.socket.close()  # ends `stay`

    async def hello(self) -> None:
        game, acting = self.game, self.game.acting
        self.prompts = await asyncio.to_thread(game.prompts, game.seed)
        worlds = [
            {"name": name, "shape": shape, "actions": [dataclasses.asdict(action) for action in side.actions]}
            for name, shape, side in zip(game.names, game.shapes, acting.sides, strict=True)
        ]
        header = {
            "type": "hello",
            "worlds": worlds,
            "idle": acting.idle_action,
            "steps": game.sampling[0].steps,
            "temperature": game.sampling[0].temperature,
            "seed": game.seed,
            "fps": game.fps,
            "message": game.message,
            "max_recording": game.max_recording,
            "combines": acting.controls is not None,
            "mouse": acting.mouse,
            "policy": bool(acting.policies),
            "levels": game.real is not None,
            "prompts": self.prompts.frames_PHWC.shape,
        }
        await self.send(header, self.prompts.frames_PHWC)

    async def show_prompts(self, message: dict[str, Any]) -> None:
        self.prompts = await asyncio.to_thread(self.game.prompts, message["seed"])
        frames_PHWC = self.prompts.frames_PHWC
        await self.send({"type": "prompts", "prompts": frames_PHWC.shape}, frames_PHWC)

    async def upload(self, data: bytes) -> None:
        picture = await asyncio.to_thread(decode_picture, data)
        # Kept no larger than the worlds need.
        sides = [max(shape[i] for shape in self.game.shapes) for i in range(2)]
        self.picture = await asyncio.to_thread(fit_picture, picture, *sides)
        await self.send({"type": "uploaded"}, fit_picture(self.picture, *self.game.shapes[0][:2]))

    async def start(self, message: dict[str, Any]) -> None:
        index, (frames_PHWC, levels_P) = message["prompt"], self.prompts
        if 0 <= index < len(frames_PHWC):
            first = frames_PHWC[index], levels_P[index] if levels_P else None
        elif index == -1 and self.picture is not None:
            first = self.picture, None
        elif index == -2 and self.first is not None:
            first = self.first
        else:
            raise InputError("There is no such frame to start from.")
        frames = [fit_picture(first[0], *shape[:2]) for shape in self.game.shapes]
        pairs = zip(self.game.engines, frames, strict=True)
        self.states = list(await asyncio.gather(*(engine.start(frame, first[1]) for engine, frame in pairs)))
        self.first, self.frames, self.seed, self.frame = first, frames, message["seed"], 0
        self.actors = Actors(self.game.acting, self.seed)
        self.remember(frames, ["start"] * len(frames))
        await self.send({"type": "started", "frame": 0} | message, *frames)

    async def step(self, message: dict[str, Any]) -> None:
        if not self.states:
            raise InputError("Choose a frame to start from first.")
        game = self.game
        asked = {name: message[name] for name in ("steps", "temperature")}
        ways = [dataclasses.replace(sampling, **asked) for sampling in game.sampling]
        began = time.perf_counter()
        acted = await asyncio.to_thread(self.actors.act, message, self.frames)
        of_each = zip(game.engines, self.states, acted.taken, ways, strict=True)
        drawn = await asyncio.gather(*(e.step(Request(state, a, self.seed, way)) for e, state, a, way in of_each))
        self.frames, self.states = [frame for frame, _ in drawn], [state for _, state in drawn]
        self.frame += 1
        self.remember(self.frames, acted.labels)
        header = {
            "type": "frame",
            "frame": self.frame,
            "actions": acted.actions,
            "labels": acted.labels,
            "ends": [engine.end(state) for engine, state in zip(game.engines, self.states, strict=True)],
            "ms": round(1000 * (time.perf_counter() - began), 1),
            "players": len(game.players),
            "recorded": len(self.recording),
            "recording": self.records,
        }
        await self.send(header, *self.frames)

    def remember(self, frames: list[np.ndarray], labels: list[str]) -> None:
        """Adds to the recording, if there is one and it is not full."""
        if self.records:
            self.recording.append(Moment(time.monotonic(), [frame.copy() for frame in frames], labels))
            self.records = len(self.recording) < self.game.max_recording

    async def record(self, message: dict[str, Any]) -> None:
        if message["on"] and not self.records:
            self.recording = []
        self.records = message["on"]
        await self.send({"type": "recording", "on": self.records, "recorded": len(self.recording)})

    async def save(self, message: dict[str, Any]) -> None:
        if not self.recording:
            raise InputError("Nothing is recorded yet.")
        loop, recording = asyncio.get_running_loop(), list(self.recording)
        data = await loop.run_in_executor(self.game.encoder, encode_recording, recording, message["format"])
        await self.send({"type": "file", "format": message["format"]}, data)
