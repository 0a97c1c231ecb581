"""Levels of a game side by side, each of which is played once: on these a policy is measured."""

from typing import NamedTuple, Protocol

import numpy as np

from sources.policies import choose_actions


class Stepped(NamedTuple):
    """What an action each in N levels led to.

    frames_NHWC: uint8, what is seen now; of a level that is over, anything.
    rewards_N: float32.
    over_N: Whether the action ended the level.
    solved_N: Whether it solved it.
    """

    frames_NHWC: np.ndarray
    rewards_N: np.ndarray
    over_N: np.ndarray
    solved_N: np.ndarray


class Levels(Protocol):
    """N levels side by side.

    levels_N: Their seeds.
    tells_solved: Whether the game says when a level is solved.
    """

    levels_N: np.ndarray
    tells_solved: bool

    def frames(self) -> np.ndarray:
        """What is seen at the beginning, uint8 (N, H, W, C)."""

    def step(self, actions_N: np.ndarray) -> Stepped:
        """Acts in all of them, also in those that are over."""

    def close(self) -> None:
        """Frees them."""


class Played(NamedTuple):
    """How N levels went.

    solved_N: Whether each was solved within the steps that it had; NaN where the game does not tell.
    returns_N: What was earned.
    steps_N: Steps until it ended, or until the steps were up.
    actions_A: How often each action was done.
    """

    solved_N: np.ndarray
    returns_N: np.ndarray
    steps_N: np.ndarray
    actions_A: np.ndarray


class Player(Protocol):
    """Who plays."""

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray) -> np.ndarray:
        """Actions (N,) int32 by what is seen now; of levels that are over, any.

        It is called once for every step, and with the first frames at first.
        """


def play(levels: Levels, player: Player, max_steps: int, num_actions: int, num: int | None = None) -> Played:
    """Plays each of the levels once, for at most `max_steps` steps; of the first `num` levels alone, if given."""
    N = len(levels.levels_N)
    num = N if num is None else min(num, N)
    playing_N, solved_N = np.arange(N) < num, np.zeros(N)
    returns_N, steps_N, actions_A = np.zeros(N), np.zeros(N, int), np.zeros(num_actions, int)
    frames_NHWC = levels.frames()
    for _ in range(max_steps):
        actions_N = player.act(frames_NHWC, playing_N)
        actions_A += np.bincount(actions_N[playing_N], minlength=num_actions)
        frames_NHWC, rewards_N, over_N, reached_N = levels.step(actions_N)
        returns_N += np.where(playing_N, rewards_N, 0)
        steps_N += playing_N
        solved_N[playing_N & over_N & reached_N] = 1
        playing_N &= ~over_N
        if not playing_N.any():
            break
    solved_N = solved_N if levels.tells_solved else np.full(N, np.nan)
    return Played(solved_N[:num], returns_N[:num], steps_N[:num], actions_A)


class Scripted:
    """A player who does not look: (N, T) actions, one after the other."""

    def __init__(self, actions_NT: np.ndarray):
        self._steps = iter(actions_NT.T)

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray) -> np.ndarray:
        return next(self._steps)


POWERS = (1, 2, 4)  # of the shares of actions, by which sticky players choose
FREQUENT = ("most frequent action", "next most frequent action")


def scripted(shares_A: np.ndarray, num_levels: int, num_steps: int, seed: int) -> dict[str, Scripted]:
    """Players who do not look, by name: random, sticky ones of several biases, and each of two frequent actions alone.

    Args:
      shares_A: How often each action is done by whom they are compared with; the sticky ones choose by powers of it.
    """
    shape = num_levels, num_steps
    rng = lambda: np.random.default_rng(seed)
    players = {"random": Scripted(choose_actions("uniform", shares_A.tolist(), rng(), *shape))}
    for power in POWERS:
        weights_A = (shares_A**power).tolist()
        players[f"sticky, shares^{power}"] = Scripted(choose_actions("sticky", weights_A, rng(), *shape))
    for name, action in zip(FREQUENT, np.argsort(-shares_A, kind="stable"), strict=False):
        players[name] = Scripted(np.full(shape, action, np.int32))
    return players
