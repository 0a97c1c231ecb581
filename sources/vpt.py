"""Minecraft as OpenAI's contractors played it (VPT), and what MineRL records alike: a video, and a line for each tick.

    <name>.mp4       640×360, 20 pictures per second
    <name>.jsonl     a line for each: mouse, keyboard, isGuiOpen, hotbar, ...

A tick's keys and mouse are what was done at its picture, so they lead on from it, as here. Two things that the files
do not say as they should are mended: `attack` that is stuck from the first tick on, and the hotbar's wheel. Where a
menu is open the mouse is drawn, which the videos do not show. Ticks in which nothing is done are kept.
"""

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from sources.kind import DamageError, Episode, Header, Kind, files_ending
from sources.video import Video, iterate_pictures
from utils.actions import ActionColumn

KEYS = {
    "escape": "ESC",
    "s": "back",
    "q": "drop",
    "w": "forward",
    **{str(i): f"hotbar.{i}" for i in range(1, 10)},
    "e": "inventory",
    "space": "jump",
    "a": "left",
    "d": "right",
    "left.shift": "sneak",
    "left.control": "sprint",
    "f": "swapHands",
}
BUTTONS = ("attack", "use", "pickItem")  # of the mouse: 0, 1, 2
CAMERA = ("camera_y", "camera_x")  # degrees down and right
COLUMNS = tuple(ActionColumn(name, ("up", "down")) for name in (*KEYS.values(), *BUTTONS)) + tuple(
    map(ActionColumn, CAMERA)
)
DEGREES = 360 / 2400  # of the camera for each unit of the mouse
WINDOW_HEIGHT = 720  # pixels of the game's window, in which the mouse is told
_PLACES = {column.name: i for i, column in enumerate(COLUMNS)}
_OF_KEY = {f"key.keyboard.{key}": _PLACES[name] for key, name in KEYS.items()}
# The mouse pointer, drawn at any size: 2 white, 1 its black edge.
_POINTER = np.array([[int(c) for c in row] for row in (
    "1000000", "1100000", "1210000", "1221000", "1222100", "1222210", "1222111", "1212100", "1101210", "0000110",
)])  # fmt: skip


class VPT(Kind):
    """A video with a .jsonl of ticks beside it."""

    name = "vpt"
    plural = "videos with VPT's actions"
    suffixes = (".jsonl", ".json", ".zip")
    knows_steps = True

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        beside = set(names)
        paths = [path for path in files_ending((".mp4",), folder, names) if f"{path.stem}.jsonl" in beside]
        return paths if any(_looks_like_ticks(path.with_suffix(".jsonl")) for path in paths) else []

    def header(self, path: Path) -> Header:
        return Video().header(path)._replace(has_actions=True, columns=COLUMNS)

    def open(self, path: Path, fps: Fraction) -> Episode:
        ticks = _read_ticks(path.with_suffix(".jsonl"))
        return Episode(_frames(path, ticks), ticks.actions_TA)


class Ticks(NamedTuple):
    """What the lines of a file say, up to the first that cannot be read.

    actions_TA: float32, as `COLUMNS` has it.
    pointers: Where the mouse stands, (x, y) in the game's window; None while no menu is open.
    damage: Why the next line cannot be read; empty at the end of the file.
    """

    actions_TA: np.ndarray
    pointers: list[tuple[float, float] | None]
    damage: str


def _looks_like_ticks(path: Path) -> bool:
    """Whether the first line of a file is a tick."""
    with open(path, "rb") as file:
        line = file.readline(10**6)
    try:
        tick = json.loads(line)
    except ValueError:
        return False
    return isinstance(tick, dict) and {"mouse", "keyboard"} <= tick.keys()


def _read_ticks(path: Path) -> Ticks:
    rows, pointers, damage = [], [], ""
    sticks, hotbar = False, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                tick = json.loads(line)
                mouse, pressed = tick["mouse"], [*tick["mouse"]["newButtons"]]
                sticks = pressed == [0] if number == 0 else sticks and 0 not in pressed
                row = _row(tick)
                if sticks:
                    row[_PLACES["attack"]] = 0
                if tick["hotbar"] != hotbar:
                    hotbar = tick["hotbar"]
                    row[_PLACES[f"hotbar.{hotbar + 1}"]] = 1
                pointer = (float(mouse["x"]), float(mouse["y"])) if tick["isGuiOpen"] else None
            except (ValueError, KeyError, TypeError) as error:
                damage = f"{path.name}: line {number + 1} is no tick ({type(error).__name__}: {error})"
                break
            rows.append(row)
            pointers.append(pointer)
    if not rows:
        raise InputError(f"{path}: {damage or 'is empty'}")
    return Ticks(np.stack(rows), pointers, damage)


def _row(tick: dict[str, Any]) -> np.ndarray:
    """What was done in a tick, as `COLUMNS` has it; keys that are not among them do nothing."""
    row, mouse = np.zeros(len(COLUMNS), np.float32), tick["mouse"]
    row[[_OF_KEY[key] for key in tick["keyboard"]["keys"] if key in _OF_KEY]] = 1
    row[[_PLACES[BUTTONS[button]] for button in mouse["buttons"] if button in (0, 1, 2)]] = 1
    row[[_PLACES[name] for name in CAMERA]] = mouse["dy"] * DEGREES, mouse["dx"] * DEGREES
    if not np.isfinite(row).all():
        raise ValueError("a mouse that moves without bounds")
    return row


def _frames(path: Path, ticks: Ticks) -> Iterator[np.ndarray]:
    """The pictures that have a tick, with the mouse where a menu is open."""
    count = 0
    for count, frame in enumerate(iterate_pictures(path), 1):
        if count > len(ticks.pointers):
            reason = ticks.damage or f"has actions for {count - 1} of its pictures only"
            raise DamageError(f"{path}: {reason}; the rest is left out")
        pointer = ticks.pointers[count - 1]
        yield frame if pointer is None else _with_pointer(frame, *pointer)
    if count < len(ticks.pointers):
        raise DamageError(f"{path}: has {count} pictures, but actions for {len(ticks.pointers)}, which are left out")


def _with_pointer(frame_HWC: np.ndarray, x: float, y: float) -> np.ndarray:
    """The frame with the mouse at a place of the game's window, as large as there."""
    scale = frame_HWC.shape[0] / WINDOW_HEIGHT
    size = max(1, round(2 * scale))  # two of the window's pixels for each of the picture's
    shape = _POINTER.repeat(size, axis=0).repeat(size, axis=1)
    top, left = int(y * scale), int(x * scale)
    if top < 0 or left < 0:
        return frame_HWC
    frame = frame_HWC.copy()
    area = frame[top : top + shape.shape[0], left : left + shape.shape[1]]
    shape = shape[: area.shape[0], : area.shape[1]]
    area[shape == 1], area[shape == 2] = 0, 255
    return frame
