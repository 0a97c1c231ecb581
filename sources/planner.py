"""An agent for Procgen that gets on: it tries many futures of the game and plays the best one, but for its mistakes."""

import zlib
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from sources.policies import choose_actions

DECISION_STEPS = 16  # time steps from one decision to the next
HORIZON = 128  # time steps of a future that does not end before
DISCOUNT = 0.99  # of a reward, for each time step that it is away
NEW_PICTURE = 0.01  # of each picture that the level has not shown yet: it leads through mazes, where rewards are far
DEATH = 5.0  # what an end that is no solution takes from a future's score; a coin is worth 10


class Planner:
    """Acts in environments side by side, each by a plan of its own.

    At a decision, at the start of a level and every DECISION_STEPS time steps, it either acts at random until the next
    one or goes on with its plan; where there is none it makes one: the best of many random futures from the present
    state. The game is restored with its random numbers, so a future comes as it was tried.

    Args:
      make: Makes so many environments side by side, of the kind that is played.
      num_envs: Environments that are played.
      num_rollouts: Futures for a plan.
      explore: Share of the decisions at which it acts at random.
      weights_A: How often futures and random acting choose each action, by comparison.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        num_envs: int,
        num_rollouts: int,
        explore: float,
        weights_A: Sequence[float],
        rng: np.random.Generator,
    ):
        self._tries = make(num_rollouts)
        self._num_rollouts, self._explore, self._weights_A, self._rng = num_rollouts, explore, weights_A, rng
        self._plans = [np.zeros(0, np.int32) for _ in range(num_envs)]  # of each environment, from the present step on
        self._steps = np.zeros(num_envs, int)  # to each environment's next decision
        self._seen: list[set[int]] = [set() for _ in range(num_envs)]  # checksums of pictures that each level has shown

    def act(self, env: Any, first_B: np.ndarray, playing_B: np.ndarray | None = None) -> np.ndarray:
        """Actions (B,) int32.

        Args:
          env: The environments that are played.
          first_B: Whether a level begins.
          playing_B: Those that matter; in the others any action will do. By default all.
        """
        for b in np.flatnonzero(first_B):
            self._plans[b], self._steps[b], self._seen[b] = self._plans[b][:0], 0, set()
        for seen, frame_HWC in zip(self._seen, env.observe()[1]["rgb"], strict=True):
            seen.add(zlib.crc32(frame_HWC))
        deciding = np.flatnonzero(self._steps == 0 if playing_B is None else (self._steps == 0) & playing_B)
        states = env.get_state() if len(deciding) else []
        for b in deciding:
            self._steps[b] = DECISION_STEPS
            if self._rng.random() < self._explore:
                self._plans[b] = choose_actions("sticky", self._weights_A, self._rng, 1, DECISION_STEPS)[0]
            elif len(self._plans[b]) == 0:
                self._plans[b] = self.plan(states[b], self._seen[b])
        actions_B = np.array([plan[0] if len(plan) else 0 for plan in self._plans], np.int32)
        self._plans = [plan[1:] for plan in self._plans]
        self._steps -= 1
        return actions_B

    def plan(self, state: bytes, seen: Set[int] = frozenset()) -> np.ndarray:
        """Actions from a state on: of the first future that solves the level, all; else the first half of the best.

        A future is worth its discounted rewards and its new pictures, less what a death takes. A plan that solves
        nothing is a whole number of DECISION_STEPS long.

        Args:
          seen: Checksums of the pictures that are not new.
        """
        N = self._num_rollouts
        actions_NT = choose_actions("sticky", self._weights_A, self._rng, N, HORIZON)
        score_N, lived_N, alive = np.zeros(N), np.full(N, HORIZON), set(range(N))
        new_N: list[set[int]] = [set() for _ in range(N)]
        self._tries.set_state([state] * N)
        for t in range(HORIZON):
            self._tries.act(actions_NT[:, t])
            rewards_N, observation, first_N = self._tries.observe()
            ended = [n for n in alive if first_N[n]]
            for n in alive:
                score_N[n] += DISCOUNT**t * rewards_N[n]
            if ended:
                infos = self._tries.get_info()
                solved = [n for n in ended if infos[n]["prev_level_complete"]]
                if solved:
                    return actions_NT[max(solved, key=lambda n: score_N[n]), : t + 1]
                score_N[ended] -= DISCOUNT**t * DEATH
                lived_N[ended] = t
                alive.difference_update(ended)
            if not alive:
                break
            for n in alive:
                new_N[n].add(zlib.crc32(observation["rgb"][n]))
        best = (score_N + [NEW_PICTURE * len(new - seen) for new in new_N]).argmax()
        kept = max(1, lived_N[best] // 2 // DECISION_STEPS) * DECISION_STEPS
        return actions_NT[best, :kept]

    def close(self) -> None:
        """Frees the environments in which futures were tried."""
        self._tries.close()
