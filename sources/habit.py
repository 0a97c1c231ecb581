"""An agent for Procgen of one habit: it does one thing, and steps aside where that would end in a death.

What it does is a function of what there is to be seen, or nearly: whoever imitates it need not guess a plan.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sources.policies import choose_actions

SIGHT = 16  # time steps before a death at which it steps aside; CoinRun's view reaches about as far
ASIDE = 20  # time steps for which it may step aside
AFTER = 20  # time steps that it has to live after that
EXPLORE = (2, 8)  # time steps for which it acts at random: at least, and less than


class Habit:
    """Acts in environments side by side: by its habit, the likeliest action, else by the one that is next likely.

    It steps aside for the shortest time after which its habit leads on, and would if it took a step more or less. At
    some decisions, of which there is one wherever it has done what it meant to, it acts at random, so that whoever
    imitates it also sees how to get out of trouble. The game is restored with its random numbers, so what it looks at
    comes as it was.

    Args:
      make: Makes so many environments side by side, of the kind that is played.
      num_envs: Environments that are played.
      explore: Share of the decisions at which it acts at random.
      weights_A: How often random acting chooses each action, by comparison; the largest two are those above.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        num_envs: int,
        explore: float,
        weights_A: Sequence[float],
        rng: np.random.Generator,
    ):
        self._ahead, self._tries = make(1), make(ASIDE)
        self._explore, self._weights_A, self._rng = explore, weights_A, rng
        aside, self._habit = np.argsort(weights_A, kind="stable")[-2:]
        self._plans = [np.zeros(0, np.int32) for _ in range(num_envs)]  # of each environment, from the present step on
        steps_T = np.arange(ASIDE + AFTER)
        self._aside_MT = np.where(steps_T < np.arange(1, ASIDE + 1)[:, None], aside, self._habit).astype(np.int32)

    def act(self, env: Any, first_B: np.ndarray, playing_B: np.ndarray | None = None) -> np.ndarray:
        """Actions (B,) int32; see `sources.planner.Planner.act`."""
        for b in np.flatnonzero(first_B):
            self._plans[b] = self._plans[b][:0]
        idle_B = np.array([len(plan) == 0 for plan in self._plans])
        deciding = np.flatnonzero(idle_B if playing_B is None else idle_B & playing_B)
        states = env.get_state() if len(deciding) else []
        for b in deciding:
            self._plans[b] = self._random() if self._rng.random() < self._explore else self.plan(states[b])
        actions_B = np.array([plan[0] if len(plan) else self._habit for plan in self._plans], np.int32)
        self._plans = [plan[1:] for plan in self._plans]
        return actions_B

    def plan(self, state: bytes) -> np.ndarray:
        """Actions from a state on, up to where there is something to decide."""
        habit_T = np.full(3 * SIGHT, self._habit, np.int32)
        (lived,), (solved,) = futures(self._ahead, state, habit_T[None])
        if solved:
            return habit_T[:lived]
        if lived > SIGHT:
            return habit_T[: lived - SIGHT]
        lived_M, solved_M = futures(self._tries, state, self._aside_MT)
        times_M = np.arange(1, ASIDE + 1)
        good_M = solved_M | (lived_M >= times_M + AFTER)
        sure = np.flatnonzero(good_M[:-2] & good_M[1:-1] & good_M[2:]) + 1
        if good_M.any():
            chosen = sure[0] if len(sure) else good_M.argmax()
            return self._aside_MT[chosen, : times_M[chosen]]
        return self._aside_MT[lived_M.argmax(), :1]  # it will die, unless things look otherwise a step later

    def close(self) -> None:
        """Frees the environments in which it looks ahead."""
        self._ahead.close()
        self._tries.close()

    def _random(self) -> np.ndarray:
        steps = int(self._rng.integers(*EXPLORE))
        return choose_actions("sticky", self._weights_A, self._rng, 1, steps)[0]


def futures(env: Any, state: bytes, actions_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How N lines of actions go from a state: time steps until the level ends (N,), T if it does not, and whether it is
    solved (N,)."""
    N, T = actions_NT.shape
    lived_N, solved_N, alive_N = np.full(N, T), np.zeros(N, bool), np.ones(N, bool)
    env.set_state([state] * N)
    for t in range(T):
        env.act(actions_NT[:, t])
        _, _, first_N = env.observe()
        if (ended_N := first_N & alive_N).any():
            infos = env.get_info()
            solved_N |= ended_N & np.array([bool(info["prev_level_complete"]) for info in infos])
            lived_N[ended_N] = t + 1
            alive_N &= ~first_N
        if not alive_N.any():
            break
    return lived_N, solved_N
