"""Playing worlds over WebSockets: what all players share, and what one of them does."""

import asyncio
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from aiohttp import ClientError, WSCloseCode, WSMsgType, web

from models.errors import InputError
from models.sampling import SamplingConfig
from player.actions import Action, idle_action, matching_actions, spoken
from player.controls import Controls, parse_hands
from player.engine import Engine, Request
from player.pictures import decode_picture, fit_picture
from player.recording import Moment, encode_recording
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

    names, engines, actions: Of the worlds: how they are called, what computes them, what their actions do.
    sampling: What the page starts with; `steps` and `temperature` are then each player's own.
    source: Clips to take the first frames from, or None; `message` then says what to do.
    fps: Frames per second that the page aims at.
    idle: Name of the action that does nothing, by the dataset's word; None if it has none.
    controls: Where actions have columns, for each world what its buttons do to them; else None.
    """

    names: tuple[str, ...]
    engines: list[Engine]
    actions: list[list[Action]]
    sampling: SamplingConfig
    source: ClipSource | None
    message: str = ""
    fps: float = 10.0
    seed: int = 0
    max_players: int = 4
    idle: str | None = None
    controls: list[Controls] | None = None

    def __post_init__(self):
        self.shapes = [engine.cfg.frame_shape for engine in self.engines]
        self.matching = [matching_actions(self.actions[0], actions, self.idle) for actions in self.actions]
        self.max_recording = min(MAX_RECORDING[0], MAX_RECORDING[1] // sum(math.prod(shape) for shape in self.shapes))
        self.encoder = ThreadPoolExecutor(1, "encoder")
        self.players: set[Player] = set()

    def prompts(self, seed: int) -> np.ndarray:
        """Frames to start from, (P, H, W, 3) uint8; of clips spread over the dataset, drawn with `seed`."""
        if self.source is None:
            return np.zeros((0, *self.shapes[0]), np.uint8)
        rng = np.random.default_rng(seed)
        count = min(NUM_PROMPTS, len(self.source))
        indices = rng.choice(len(self.source), count, replace=False)
        return self.source.windows([int(i) for i in indices], list(rng.random(count))).frames_BTHWC[:, 0]

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

    hello: Worlds, actions and settings; with the frames to start from.
    start (prompt, seed) → started: prompt is an index, -1 the uploaded picture, -2 what the last game started from;
      with the first frame of each world.
    step (action, steps, temperature) → frame: With the next frame of each world. Where actions have columns, `held`
      lists other buttons that are down, and `mouse` says how far it moved, from -1 to 1 across and down.
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
        self.prompts = np.zeros((0, 1, 1, 3), np.uint8)
        self.picture: np.ndarray | None = None  # uploaded
        self.first: np.ndarray | None = None  # what the game started from
        self.seed = self.frame = 0
        self.recording: list[Moment] = []
        self.records = False

    async def stay(self) -> None:
        """Plays until the page closes."""
        playing = asyncio.create_task(self.play())
        try:
            async for message in self.socket:
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
                ("action", int, 0, len(self.game.actions[0]) - 1),
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
        if kind == "step" and self.game.controls:
            fields |= parse_hands(message, len(self.game.actions[0]))
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
        game = self.game
        self.prompts = await asyncio.to_thread(game.prompts, game.seed)
        worlds = [
            {"name": name, "shape": shape, "actions": [dataclasses.asdict(a) for a in actions], "matching": matching}
            for name, shape, actions, matching in zip(game.names, game.shapes, game.actions, game.matching, strict=True)
        ]
        header = {
            "type": "hello",
            "worlds": worlds,
            "idle": idle_action(game.actions[0], game.idle),
            "steps": game.sampling.steps,
            "temperature": game.sampling.temperature,
            "seed": game.seed,
            "fps": game.fps,
            "message": game.message,
            "max_recording": game.max_recording,
            "combines": game.controls is not None,
            "mouse": [c.columns[i].name for c in (game.controls or [])[:1] for i in c.mouse],
            "prompts": self.prompts.shape,
        }
        await self.send(header, self.prompts)

    async def show_prompts(self, message: dict[str, Any]) -> None:
        self.prompts = await asyncio.to_thread(self.game.prompts, message["seed"])
        await self.send({"type": "prompts", "prompts": self.prompts.shape}, self.prompts)

    async def upload(self, data: bytes) -> None:
        picture = await asyncio.to_thread(decode_picture, data)
        # Kept no larger than the worlds need.
        sides = [max(shape[i] for shape in self.game.shapes) for i in range(2)]
        self.picture = await asyncio.to_thread(fit_picture, picture, *sides)
        await self.send({"type": "uploaded"}, fit_picture(self.picture, *self.game.shapes[0][:2]))

    async def start(self, message: dict[str, Any]) -> None:
        index = message["prompt"]
        if 0 <= index < len(self.prompts):
            first = self.prompts[index]
        else:
            first = {-1: self.picture, -2: self.first}.get(index)
        if first is None:
            raise InputError("There is no such frame to start from.")
        self.first = first
        frames = [fit_picture(first, *shape[:2]) for shape in self.game.shapes]
        pairs = zip(self.game.engines, frames, strict=True)
        self.states = list(await asyncio.gather(*(engine.start(frame) for engine, frame in pairs)))
        self.seed, self.frame = message["seed"], 0
        self.remember(frames, ["start"] * len(frames))
        await self.send({"type": "started", "frame": 0} | message, *frames)

    async def step(self, message: dict[str, Any]) -> None:
        if not self.states:
            raise InputError("Choose a frame to start from first.")
        game, action = self.game, message["action"]
        sampling = dataclasses.replace(game.sampling, steps=message["steps"], temperature=message["temperature"])
        actions = [matching[action] for matching in game.matching]
        taken: list[Any] = actions
        labels = [known[a].name or f"action {a}" for known, a in zip(game.actions, actions, strict=True)]
        if game.controls:
            pressed = [[matching[button] for button in (action, *message["held"])] for matching in game.matching]
            taken = [c.row(held, message["mouse"]) for c, held in zip(game.controls, pressed, strict=True)]
            labels = [spoken(row, c.columns) for c, row in zip(game.controls, taken, strict=True)]
        began = time.perf_counter()
        asked = zip(game.engines, self.states, taken, strict=True)
        drawn = await asyncio.gather(*(e.step(Request(state, a, self.seed, sampling)) for e, state, a in asked))
        frames, self.states = [frame for frame, _ in drawn], [state for _, state in drawn]
        self.frame += 1
        self.remember(frames, labels)
        header = {
            "type": "frame",
            "frame": self.frame,
            "actions": actions,
            "labels": labels,
            "ms": round(1000 * (time.perf_counter() - began), 1),
            "players": len(game.players),
            "recorded": len(self.recording),
            "recording": self.records,
        }
        await self.send(header, *frames)

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
