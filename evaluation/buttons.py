"""Buttons: what each action does in a world, by measured shifts, and a name that says so.

Each action is held for a few frames, from held-out prompts after which the LAM saw that very action begin and
something moved in truth, those first in which the player is nearest to rest: who stands at a wall could not show what
a step to it does, and who flies goes on flying whatever is pressed. What counts is how the picture shifts, and what
is at its centre, in comparison to the idle action from the same prompt. A camera that follows the player shows its
steps as shifts of the picture the other way; where the picture stands, what is at the centre moves.
`benchmarks/keys.py` measures a game's own keys so.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evaluation.measured import Measured
from evaluation.rollouts import Play

PROMPTS, PROMPT_FRAMES, HELD_FRAMES = 20, 4, 4
CLIPS = 480  # of which the prompts are chosen, or all that there are: few are at rest
CANDIDATES = 600  # of their prompts, drawn at random
IDLE_PAIRS = 60  # steps of each action by which the idle one is found
STILL = 0.5  # pixels per frame: who moves less stays
BETTER = 0.98  # of the best error so far: a longer shift must reach it, so that flat pictures do not shift


class Button(NamedTuple):
    """What an action does.

    right, up: Pixels per frame by which the player moves more than under the idle action, mean over prompts.
    agree: In so many of the `prompts` the player moves farther the named way than across it.
    """

    name: str
    right: float
    up: float
    agree: int
    prompts: int


def measure_buttons(
    play: Play, frames: np.ndarray, actions: np.ndarray, num_actions: int, seed: int = 0, idle: int | None = None
) -> Measured:
    """Holds each action, and names it.

    Args:
      frames: (B, T, H, W, C); actions: (B, Tm1), those between them.
      seed: Of the choice of prompts.
      idle: The idle action; None: the one after which least moves.
    Returns:
      `buttons` in the details; no two names are alike.
    """
    pairs = (np.stack([clip[:-1], clip[1:]], axis=1) for clip in frames)
    motion_2BTm1 = np.stack([np.linalg.norm(_per_frame(pair), axis=-1) for pair in pairs], axis=1)
    idle = _idle(motion_2BTm1, actions, num_actions) if idle is None else idle
    moves = []
    for a in range(num_actions):
        prompts, between = _prompts(frames, actions, motion_2BTm1, a, seed)
        (picture, centre), still = (
            _per_frame(np.concatenate([prompts[:, -1:], play(prompts, held)], axis=1))
            for held in (np.pad(between, ((0, 0), (0, HELD_FRAMES)), constant_values=x) for x in (a, idle))
        )
        # To the right and up, of the player: against the picture's motion, and with the centre's.
        by_picture, by_centre = (picture - still[0]) * (-1, 1), (centre - still[1]) * (1, -1)
        scrolls = np.linalg.norm(by_picture.mean(axis=0)) >= STILL
        moves.append(by_picture if scrolls else by_centre)
    return Measured(details={"buttons": [button._asdict() for button in name_buttons(moves)]})


def _prompts(
    frames: np.ndarray, actions: np.ndarray, motion_2BTm1: np.ndarray, action: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts after which an action followed, and the actions within them.

    First come those after which it begins, where the one before was another; then those after which something
    moves: the picture, or, where it never does, what is at its centre; then those in which least moves; then
    those of different clips.

    Args:
      motion_2BTm1: By how many pixels the picture moves in each step, and what is at its centre.
    """
    length = min(PROMPT_FRAMES, frames.shape[1] - 1)
    rng = np.random.default_rng(seed)
    clips, times = rng.permutation(np.argwhere(actions[:, length - 1 :] == action)).reshape(-1, 2).T
    if not len(clips):  # it never occurs: any prompt will do
        clips, times = np.arange(len(frames)), np.zeros(len(frames), int)
    goes_on = actions[clips, times + length - 2] == action if length > 1 else np.zeros(len(clips), bool)
    first = np.argsort(goes_on, kind="stable")[:CANDIDATES]
    clips, times, goes_on = clips[first], times[first], goes_on[first]
    motion_2NT = motion_2BTm1[:, clips[:, None], times[:, None] + np.arange(length)]
    picture, centre = motion_2NT[:, :, :-1].max(axis=2, initial=0.0)
    after = motion_2NT[:, :, -1]
    shows_nothing = (after[0] if (after[0] >= STILL).any() else after[1]) < STILL
    turns = np.array([(clips[:i] == clip).sum() for i, clip in enumerate(clips)])
    chosen = np.lexsort((turns, centre, picture, shows_nothing, goes_on))[:PROMPTS]
    cut = lambda of, n: np.stack([of[clips[i], times[i] : times[i] + n] for i in chosen])
    return cut(frames, length), cut(actions, length - 1)


def _idle(motion_2BTm1: np.ndarray, actions: np.ndarray, num_actions: int) -> int:
    """The action after which least moves in truth: the picture, or, where a camera stands, what is at its centre."""
    lengths = np.full((2, num_actions), np.inf)
    for a in range(num_actions):
        found_2N = motion_2BTm1[:, actions == a][:, :IDLE_PAIRS]
        if found_2N.size:
            lengths[:, a] = found_2N.mean(axis=1)
    picture, centre = lengths
    return int(np.where(picture < picture.min() + STILL / 2, centre, np.inf).argmin())


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


def name_buttons(moves: Sequence[np.ndarray]) -> list[Button]:
    """The buttons, from the motion (prompts, 2) of the player under each, to the right and up, per frame."""
    means, agrees = [], []
    for motion_Bx in moves:
        mean = motion_Bx.mean(axis=0)
        if np.linalg.norm(mean) < STILL:
            agree = np.linalg.norm(motion_Bx, axis=1) < 2 * STILL
        else:
            named = named_part(mean) / np.linalg.norm(named_part(mean))
            along, across = motion_Bx @ named, motion_Bx @ (-named[1], named[0])
            agree = along > np.abs(across)
        means.append(mean)
        agrees.append(int(agree.sum()))
    names = distinct([direction(*mean) for mean in means], [float(np.linalg.norm(mean)) for mean in means])
    return [
        Button(name, float(right), float(up), agree, len(motion_Bx))
        for name, (right, up), agree, motion_Bx in zip(names, means, agrees, moves, strict=True)
    ]


def named_part(mean: np.ndarray) -> np.ndarray:
    """A motion without its smaller component, if that is less than `STILL`."""
    larger = np.abs(mean) == np.abs(mean).max()
    return np.where(larger | (np.abs(mean) >= STILL), mean, 0.0)


def direction(right: float, up: float) -> str:
    """In words, the larger component first, for instance "up, right"; "stay" for less than `STILL`."""
    if np.hypot(right, up) < STILL:
        return "stay"
    x, y = named_part(np.array([right, up]))
    parts = [(abs(x), "right" if x > 0 else "left"), (abs(y), "up" if y > 0 else "down")]
    return ", ".join(word for size, word in sorted(parts, reverse=True) if size)


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
