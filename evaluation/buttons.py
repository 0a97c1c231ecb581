"""Buttons: what each action does in a world, by measured shifts, and a name that says so.

From held-out prompts each action is held for a few frames. What counts is how the picture shifts, and what is at its
centre, in comparison to the idle action from the same prompt. A camera that follows the player shows its steps as
shifts of the picture the other way; where the picture stands, what is at the centre moves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.measured import Measured
from evaluation.rollouts import Play

PROMPTS, PROMPT_FRAMES, HELD_FRAMES = 20, 4, 4
STILL = 0.5  # pixels per frame: who moves less stays
BETTER = 0.98  # of the best error so far: a longer shift must reach it, so that flat pictures do not shift


class Button(NamedTuple):
    """What an action does.

    right, up: Pixels per frame by which the player moves more than under the idle action, mean over prompts.
    agree: In so many of the prompts the named direction is the larger one and has its sign.
    """

    name: str
    right: float
    up: float
    agree: int


def measure_buttons(play: Play, frames: np.ndarray, actions: np.ndarray, num_actions: int) -> Measured:
    """Holds each action, and names it.

    Args:
      frames: (B, T, H, W, C), of which the first `PROMPT_FRAMES` prompt; actions: (B, Tm1), those between them.
    Returns:
      `buttons` and `button_prompts` in the details; no two names are alike.
    """
    n = min(PROMPTS, len(frames))
    prompts, between = frames[:n, :PROMPT_FRAMES], actions[:n, : PROMPT_FRAMES - 1]
    picture, centre = np.empty((2, num_actions, n, 2))
    for a in range(num_actions):
        held = np.concatenate([between, np.full((n, HELD_FRAMES), a)], axis=1)
        video = np.concatenate([prompts[:, -1:], play(prompts, held)], axis=1)
        picture[a], centre[a] = _per_frame(video)
    buttons = [button._asdict() for button in name_buttons(picture, centre)]
    return Measured(details={"button_prompts": n, "buttons": buttons})


def _per_frame(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean shift per frame, (B, 2), of the picture and of what is at its centre."""
    grey = video.mean(axis=-1, dtype=np.float32)
    B, T, H, W = grey.shape
    before, after = grey[:, :-1].reshape(-1, H, W), grey[:, 1:].reshape(-1, H, W)
    reach = max(min(H, W) // 8, 1)
    whole = (slice(reach, H - reach), slice(reach, W - reach))
    middle = tuple(slice(size // 2 - max(size // 8, 1), size // 2 + max(size // 8, 1)) for size in (H, W))
    of = lambda box: shifts(before, after, reach, box).reshape(B, T - 1, 2).mean(axis=1)
    return of(whole), of(middle)


def shifts(before_NHW: np.ndarray, after_NHW: np.ndarray, reach: int, box: tuple[slice, slice]) -> np.ndarray:
    """How far what is in a box of a picture has moved in the next, (N, 2): pixels to the right and down."""
    rows, columns = box
    steps = [(x, y) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    best, found = np.full(len(before_NHW), np.inf), np.zeros((len(before_NHW), 2))
    seen = before_NHW[:, rows, columns]
    for x, y in sorted(steps, key=lambda step: (step[0] ** 2 + step[1] ** 2, step)):
        there = after_NHW[:, rows.start + y : rows.stop + y, columns.start + x : columns.stop + x]
        error = np.abs(there - seen).mean(axis=(1, 2))
        closer = error < BETTER * best
        best[closer], found[closer] = error[closer], (x, y)
    return found


def name_buttons(picture_ABx: np.ndarray, centre_ABx: np.ndarray) -> list[Button]:
    """The buttons, from shifts (A, B, 2) per frame, to the right and down, of the picture and of its centre."""
    length = lambda shifts_ABx: np.linalg.norm(shifts_ABx, axis=-1).mean(axis=1)
    # Of those that leave the picture standing, as all do under a fixed camera, the one that moves its centre least.
    standing = length(picture_ABx) < length(picture_ABx).min() + STILL
    idle = np.where(standing, length(centre_ABx), np.inf).argmin()
    # To the right and up, of the player: against the picture's motion, and with the centre's.
    by_picture = (picture_ABx - picture_ABx[idle]) * (-1, 1)
    by_centre = (centre_ABx - centre_ABx[idle]) * (1, -1)
    moves, agrees = [], []
    for of_picture, of_centre in zip(by_picture, by_centre, strict=True):
        scrolls = np.linalg.norm(of_picture.mean(axis=0)) >= STILL
        motion_Bx = of_picture if scrolls else of_centre
        mean = motion_Bx.mean(axis=0)
        main = np.abs(mean).argmax()
        if np.linalg.norm(mean) < STILL:
            agree = np.linalg.norm(motion_Bx, axis=1) < 2 * STILL
        else:
            agree = (np.abs(motion_Bx).argmax(axis=1) == main) & (motion_Bx[:, main] * mean[main] > 0)
        moves.append(mean)
        agrees.append(int(agree.sum()))
    names = distinct([direction(*move) for move in moves], [float(np.linalg.norm(move)) for move in moves])
    return [
        Button(name, float(right), float(up), agree)
        for name, (right, up), agree in zip(names, moves, agrees, strict=True)
    ]


def direction(right: float, up: float) -> str:
    """In words, the larger component first, for instance "up, right"; "stay" for less than `STILL`."""
    if np.hypot(right, up) < STILL:
        return "stay"
    parts = [(abs(right), "right" if right > 0 else "left"), (abs(up), "up" if up > 0 else "down")]
    first, second = sorted(parts, reverse=True)
    return f"{first[1]}, {second[1]}" if second[0] >= STILL else first[1]


def distinct(names: Sequence[str], speeds: Sequence[float]) -> list[str]:
    """Tells equal names apart by speed: slow and fast, with what lies between unmarked; of more than three, by number.

    Who stays is told apart by number, the stillest without one.
    """
    out = list(names)
    for name in dict.fromkeys(names):
        alike = sorted((i for i, other in enumerate(names) if other == name), key=lambda i: speeds[i])
        if name == "stay" or len(alike) > 3:
            marks = ["", *(f" {k}" for k in range(2, len(alike) + 1))]
        else:
            marks = {1: [""], 2: [", slow", ", fast"], 3: [", slow", "", ", fast"]}[len(alike)]
        for i, mark in zip(alike, marks, strict=True):
            out[i] = name + mark
    return out
