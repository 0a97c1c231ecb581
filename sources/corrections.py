"""A learner plays, and wherever it makes a mistake the walker shows what to do there: videos to be imitated.

Kin: Ross et al. 2011. All that is recorded was done, and so whoever learns from frames alone can learn from it too.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from sources.walker import Walker

SHOWN = 16  # time steps that the walker shows at least
PASSED = 4  # time steps after a mistake that are not recorded, while the learner sees what it leads to
FOLLOWED = 0.5  # share of the mistakes after which it goes on from where the walker has led to


class Learner(Protocol):
    """Who plays one environment (`agents.policy.PolicyPlayer`)."""

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray, first_N: np.ndarray | None = None) -> np.ndarray:
        """Actions (1,) by what is seen now."""

    def see(self, frames_NHWC: np.ndarray, first_N: np.ndarray | None = None) -> np.ndarray:
        """Takes note of what is seen where another one acts."""


class Seen(NamedTuple):
    """What one environment shows.

    first: Whether a level begins here.
    reward: Of the action before.
    solved: Whether that one solved the level before.
    """

    frame_HWC: np.ndarray
    level: int
    first: bool
    reward: float
    solved: bool


class Step(NamedTuple):
    """A time step that is recorded: fields of `sources.environment.Recording`."""

    frame: np.ndarray
    action: int
    reward: float
    first: bool
    level: int
    terminated: bool
    success: bool


class Corrections:
    """Records a learner up to each of its mistakes, and from there on the walker.

    Then, half of the time, the learner goes on with its mistake, and is recorded again a few time steps later, so that
    it meets what its mistakes lead to; else from where the walker has led to, as who makes the same one again and
    again would never see the rest of the level. Where nothing helps any more, nothing is recorded. What is not
    recorded from a level's beginning on begins with the step before, so that all that is shown is seen in motion.

    Args:
      game: The environment, and `shown` another one of its kind, in which the walker shows what to do.
      pictures: From the environment and what it observes to its frames (1, H, W, C).
      rng: Of the choice between the two.
      shortest: Frames of the shortest clip that is kept: the walker shows no less, since what is shown may be one.
    """

    def __init__(
        self,
        game: Any,
        shown: Any,
        walker: Walker,
        learner: Learner,
        pictures: Any,
        rng: np.random.Generator,
        shortest: int = SHOWN,
    ):
        self._game, self._shown, self._walker, self._learner = game, shown, walker, learner
        self._pictures, self._rng, self._least = pictures, rng, max(SHOWN, shortest)

    def record(self, num: int) -> list[Step]:
        """So many time steps. Whatever follows what it does not follow in the game has `first` set."""
        steps: list[Step] = []
        passed = 0
        before: Step | None = None  # what led here, in the same level
        joined = False  # whether it is the last one that is recorded
        seen = self._look(self._game)
        while len(steps) < num:
            if seen.first:
                passed, before = 0, None
            action = int(self._learner.act(seen.frame_HWC[None], np.ones(1, bool), np.array([seen.first]))[0])
            plan = None if passed else self._walker.mend(self._game.get_state()[0], action)
            if plan is not None and before and not joined:
                steps.append(before._replace(first=True))
            if plan:
                shown = self._show(plan, before is None)
                steps += shown
                if self._rng.random() < FOLLOWED:
                    seen, before, joined = self._follow(shown), shown[-1], True
                    continue
                passed, plan = 1 + PASSED, None
            step, seen = self._act(self._game, seen, action, before is None)
            before, joined = step, plan is not None
            if joined:
                steps.append(step)
            passed = max(passed - 1, 0)
        return steps[:num]

    def _show(self, plan: list[int], begins: bool) -> list[Step]:
        """What the walker does from where the learner is, to the level's end at most."""
        steps: list[Step] = []
        num = max(self._least, len(plan))
        self._shown.set_state(self._game.get_state())
        seen = self._look(self._shown)
        while len(steps) < num and not (steps and steps[-1].terminated):
            plan = self._walker.go_on(self._shown.get_state()[0], plan)
            step, seen = self._act(self._shown, seen, plan[0], begins and not steps)
            steps.append(step)
            plan = plan[1:]
        return steps

    def _follow(self, steps: list[Step]) -> Seen:
        """Takes the learner to where these steps have led, and shows it what was seen on the way."""
        for step in steps[1:]:
            self._learner.see(step.frame[None])
        self._game.set_state(self._shown.get_state())
        return self._look(self._game)

    def _act(self, env: Any, seen: Seen, action: int, begins: bool) -> tuple[Step, Seen]:
        env.act(np.array([action], np.int32))
        after = self._look(env)
        return Step(seen.frame_HWC, action, after.reward, begins, seen.level, after.first, after.solved), after

    def _look(self, env: Any) -> Seen:
        reward_1, observation, first_1 = env.observe()
        [info] = env.get_info()
        frame_HWC = self._pictures(env, observation)[0]
        solved = bool(first_1[0]) and bool(info["prev_level_complete"])
        return Seen(frame_HWC, info["level_seed"], bool(first_1[0]), float(reward_1[0]), solved)
