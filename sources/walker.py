"""An agent for CoinRun that walks to the right, not too fast, and jumps where it must, as late as it safely may.

What it does is nearly a function of what there is to be seen about it, so whoever imitates it need not guess a plan.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sources.policies import choose_actions

PACE = "RIGHT", "RIGHT", "NONE"  # how it walks: a jump at two thirds of the full speed ends within CoinRun's view
SEE = 20, 17, 14  # time steps that it looks ahead: as far as its view reaches, and less where nothing leads so far
KEPT = len(PACE)  # time steps for which it does what it has decided, and then looks again
NEAR = 9  # time steps within which it looks for the moment of a jump
HOLD = 10  # time steps for which it means to hold a jump; it may think otherwise where it sees what it lands on
AFTER = 4  # time steps after those of a plan within which something must move
STILL = 0.03  # of the pixels: fewer change from one time step to the next where it is stuck
EXPLORE = (2, 8)  # time steps for which it acts at random: at least, and less than
FORGIVEN = 5  # time steps for which another's action may be done, if it moves and walking or a jump then leads on


class Futures(NamedTuple):
    """How N lines of actions go from a state.

    lived_N: Time steps until the level ends; T if it does not.
    solved_N: Whether it is solved.
    changed_NT: Share of the pixels that change with each.
    """

    lived_N: np.ndarray
    solved_N: np.ndarray
    changed_NT: np.ndarray


class Tried(NamedTuple):
    """How N plans end.

    lived_N: Time steps until the level ends, of those that were looked at.
    moves_N: Whether it gets anywhere by walking afterwards.
    solved_N: Whether the level is solved.
    """

    lived_N: np.ndarray
    moves_N: np.ndarray
    solved_N: np.ndarray

    def good(self, see_N: int | np.ndarray) -> np.ndarray:
        """Which solve the level, or lead on and are survived for as many time steps."""
        return self.solved_N | ((self.lived_N >= see_N) & self.moves_N)


class Plan(NamedTuple):
    """What to do from a state on, up to where there is something to decide.

    easy: Whether walking or a jump leads on; else it takes a detour.
    hopeless: Whether nothing does.
    """

    actions: list[int]
    easy: bool = True
    hopeless: bool = False


class Walker:
    """Acts in environments side by side.

    It walks as long as that leads on, at a pace at which it sees what a jump from there lands on. Before a death, or
    where it would get stuck, it jumps: of all time steps to jump at it takes one shortly before the last, if there is a
    choice; if none is good, it takes a run-up. Where that does not help either, it goes back first, in the air too,
    where it sees that it would land badly. It never waits, since no picture tells how long one has. The game is
    restored with its random numbers, so what it looks at comes as it was.

    Args:
      make: Makes so many environments side by side, of the kind that is played.
      num_envs: Environments that are played.
      explore: Share of the decisions, of which there is one wherever it has done what it meant to, at which it acts at
        random for a few time steps, so that whoever imitates it also sees how to get out of trouble.
      weights_A: How often it then chooses each action, by comparison.
      names: The actions, among them those of `PACE`, LEFT, RIGHT and RIGHT+UP.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        num_envs: int,
        explore: float,
        weights_A: Sequence[float],
        names: Sequence[str],
        rng: np.random.Generator,
    ):
        self._explore, self._weights_A, self._rng = explore, weights_A, rng
        self._back, self._walk, self._jump = (names.index(name) for name in ("LEFT", "RIGHT", "RIGHT+UP"))
        self._pace = ([names.index(name) for name in PACE] * SEE[0])[: SEE[0]]
        self._ways_on = {*self._pace, self._jump}
        self._jumps = [
            [run_up[:steps] + [self._jump] * HOLD for steps in range(NEAR)]
            for run_up in (self._pace, [self._walk] * NEAR)
        ]
        self._detours = [
            [self._back] * away + way
            for away in (2, 5, 8, 12)
            for way in ([], *([self._walk] * steps + [self._jump] * HOLD for steps in (0, 4)))
        ]
        self._ahead, self._tries, self._others = (make(num) for num in (1, NEAR, len(self._detours)))
        self._plans = [np.zeros(0, np.int32) for _ in range(num_envs)]  # of each environment, from the present step on

    def act(self, env: Any, first_B: np.ndarray, playing_B: np.ndarray | None = None) -> np.ndarray:
        """Actions (B,) int32; see `sources.planner.Planner.act`."""
        for b in np.flatnonzero(first_B):
            self._plans[b] = self._plans[b][:0]
        looks_B = np.array([self._looks(plan) for plan in self._plans])
        looking = np.flatnonzero(looks_B if playing_B is None else looks_B & playing_B)
        states = env.get_state() if len(looking) else []
        for b in looking:
            explores = not len(self._plans[b]) and self._rng.random() < self._explore
            plan = self._random() if explores else self.go_on(states[b], self._plans[b].tolist())
            self._plans[b] = np.array(plan, np.int32)
        actions_B = np.array([plan[0] if len(plan) else self._walk for plan in self._plans], np.int32)
        self._plans = [plan[1:] for plan in self._plans]
        return actions_B

    def plan(self, state: bytes) -> Plan:
        """What it does from a state on."""
        walking = futures(self._ahead, state, [self._pace], self._walk)
        lived = int(walking.lived_N[0])
        if walking.solved_N[0]:
            return Plan(self._pace[:lived])
        # Whoever begins to walk needs two time steps to move.
        stuck = np.flatnonzero(walking.changed_NT[0, 2:lived] < STILL)
        if lived == SEE[0] and not len(stuck):
            return Plan(self._pace[:KEPT])
        trouble = min(lived, int(stuck[0]) + 2 if len(stuck) else SEE[0])
        tried: list[Tried] = []
        for see, way in itertools.product(SEE, range(len(self._jumps))):
            if way == len(tried):
                tried.append(self._try(self._tries, state, self._jumps[way]))
            good_N = tried[way].good(see)
            good_N[trouble + 1 :] = False
            if good_N.any():
                steps, jumps = self._best(good_N), self._jumps[way]
                return Plan(jumps[steps] if steps < KEPT else jumps[-1][:KEPT])
        detours = self._try(self._others, state, self._detours)
        # Who goes back sees so much longer what comes.
        good_N = detours.good(np.array([SEE[-1] + plan.count(self._back) for plan in self._detours]))
        if good_N.any():
            return Plan(self._detours[int(good_N.argmax())][:KEPT], easy=False)
        # It will die, unless things look otherwise a step later.
        return Plan(self._detours[int(detours.lived_N.argmax())][:1], easy=False, hopeless=True)

    def go_on(self, state: bytes, rest: list[int]) -> list[int]:
        """What it does from a state on where so much of what it meant to do is left: that, or something else.

        In the air keys do nothing but steer, so it may hold a jump while walking would lead on as well: then all of a
        rise looks and is called the same. Where it sees that it would land badly, it thinks otherwise.
        """
        if not self._looks(rest):
            return rest
        plan = self.plan(state)
        return rest if rest and plan.easy and plan.actions[0] == self._walk else plan.actions

    def mend(self, state: bytes, action: int) -> list[int] | None:
        """What to do from a state on in the place of another one's action: nothing, but for mistakes to be mended.

        Else an imitator would learn of many differences that make none, as keys do nothing in the air. None where
        nothing helps: nobody should imitate what is done there.
        """
        if self.forgives(state, action):
            return []
        plan = self.plan(state)
        if plan.hopeless:
            return None
        # Who stands before a wall would always be a step away from what helps.
        return [] if plan.actions[0] == action and not self._stands(self._gone_on(state, action)) else plan.actions

    def forgives(self, state: bytes, action: int) -> bool:
        """Whether it would still get on without a detour had another one, who walks or jumps, done so for a while."""
        if action not in self._ways_on:
            return False
        found = self._gone_on(state, action)
        if self._ahead.observe()[2][0]:  # the level has ended
            return bool(found.solved_N[0])
        return not self._stands(found) and self.plan(self._ahead.get_state()[0]).easy

    def _gone_on(self, state: bytes, action: int) -> Futures:
        return futures(self._ahead, state, [[action] * FORGIVEN], self._walk)

    @staticmethod
    def _stands(found: Futures) -> bool:
        return bool(found.changed_NT.max() < STILL)

    def close(self) -> None:
        """Frees the environments in which it looks ahead."""
        for env in (self._ahead, self._tries, self._others):
            env.close()

    def _try(self, env: Any, state: bytes, plans: list[list[int]]) -> Tried:
        length_N = np.array([len(plan) for plan in plans])
        after = max(AFTER, SEE[0] + 1 - int(length_N.max()))
        lived_N, solved_N, changed_NT = futures(env, state, plans, self._walk, after)
        moves_N = np.array(
            [rows_T[n : n + AFTER].max() >= STILL for rows_T, n in zip(changed_NT, length_N, strict=True)]
        )
        return Tried(lived_N, moves_N, solved_N)

    def _looks(self, rest: Sequence[int] | np.ndarray) -> bool:
        """Whether it looks anew: where nothing is left to be done, and now and then in a jump."""
        return len(rest) == 0 or (len(rest) % KEPT == 0 and all(action == self._jump for action in rest))

    def _random(self) -> np.ndarray:
        steps = int(self._rng.integers(*EXPLORE))
        return choose_actions("sticky", self._weights_A, self._rng, 1, steps)[0]

    @staticmethod
    def _best(good_N: np.ndarray) -> int:
        """Of the runs of good numbers the last long one: its third from the end, if it has three, else its first."""
        edges = np.flatnonzero(np.diff(np.pad(good_N.astype(int), 1)))
        first, end = max(zip(edges[::2], edges[1::2], strict=True), key=lambda run: (min(run[1] - run[0], 5), run[0]))
        return int(end - 3 if end - first >= 3 else first)


def futures(env: Any, state: bytes, plans: list[list[int]], then: int, after: int = 0) -> Futures:
    """Plays plans from a state on, and after each an action until all have had it for `after` time steps."""
    N, T = len(plans), max(len(plan) for plan in plans) + after
    actions_NT = np.full((N, T), then, np.int32)
    for n, plan in enumerate(plans):
        actions_NT[n, : len(plan)] = plan
    lived_N, solved_N, alive_N = np.full(N, T), np.zeros(N, bool), np.ones(N, bool)
    changed_NT, last_NHWC = np.zeros((N, T)), None
    env.set_state([state] * N)
    for t in range(T):
        env.act(actions_NT[:, t])
        _, observation, first_N = env.observe()
        if (ended_N := first_N & alive_N).any():
            infos = env.get_info()
            solved_N |= ended_N & np.array([bool(info["prev_level_complete"]) for info in infos])
            lived_N[ended_N] = t + 1
            alive_N &= ~first_N
        frames_NHWC = observation["rgb"][:, ::2, ::2].astype(np.int16)
        if last_NHWC is not None:
            r_NHW, g_NHW, b_NHW = np.moveaxis(np.abs(frames_NHWC - last_NHWC), -1, 0)
            # Ten times as fast as the largest along so short an axis.
            changed_NT[:, t] = (np.maximum(np.maximum(r_NHW, g_NHW), b_NHW) > 8).mean(axis=(1, 2))
        last_NHWC = frames_NHWC
        if not alive_N.any():
            break
    return Futures(lived_N, solved_N, changed_NT)
