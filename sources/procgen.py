"""Procgen's sixteen games: playing them, how to act, and what there is to know about their actions."""

import contextlib
import ctypes
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from models.errors import InputError
from sources.corrections import Corrections
from sources.environment import EPISODE_STEPS, PROCGEN_OPTIONS, Environment, Recording, RecordingOptions
from sources.once import Stepped
from sources.planner import Planner
from sources.policies import choose_actions
from sources.walker import Walker
from utils.records import COINRUN_IDLE_ACTION, COINRUN_SAME_ACTIONS

# So far apart that no split of any dataset shares a level with another split of any other.
FIRST_LEVEL = {"train": 0, "val": 2**29, "test": 2**30}
MAX_LEVELS = 2**29
ACTION_NAMES = (
    *("LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NONE", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP"),
    *("D", "A", "W", "S", "Q", "E"),  # fire and the like; in many games they do what NONE does
)

# What does the same as what, by kinds of movement and of keys; `tests/test_procgen.py` plays them against each other.
EIGHT_WAYS: dict[str, str] = {}
JUMPS = {"LEFT+DOWN": "LEFT", "DOWN": "NONE", "RIGHT+DOWN": "RIGHT"}
FOUR_WAYS = {"LEFT+DOWN": "LEFT", "LEFT+UP": "LEFT", "RIGHT+DOWN": "RIGHT", "RIGHT+UP": "RIGHT"}
SIDEWAYS = FOUR_WAYS | {"DOWN": "NONE", "UP": "NONE"}
NO_KEYS = dict.fromkeys("DAWSQE", "NONE")
ONE_KEY = dict.fromkeys("AWSQE", "NONE")  # D fires
SAME_ACTIONS: dict[str, Mapping[str, str]] = {
    "bigfish": EIGHT_WAYS | NO_KEYS,
    "bossfight": EIGHT_WAYS | ONE_KEY,
    "caveflyer": EIGHT_WAYS | ONE_KEY,
    "chaser": EIGHT_WAYS | NO_KEYS,
    "climber": JUMPS | NO_KEYS,
    "coinrun": COINRUN_SAME_ACTIONS,
    "dodgeball": EIGHT_WAYS | ONE_KEY,
    "fruitbot": SIDEWAYS | ONE_KEY,
    "heist": EIGHT_WAYS | NO_KEYS,
    "jumper": JUMPS | NO_KEYS,
    "leaper": FOUR_WAYS | NO_KEYS,
    "maze": FOUR_WAYS | NO_KEYS,
    "miner": FOUR_WAYS | NO_KEYS,
    "ninja": JUMPS | {"Q": "D", "E": "D"},  # D, A, W and S throw in four directions
    "plunder": SIDEWAYS | ONE_KEY,
    "starpilot": EIGHT_WAYS | dict.fromkeys("WSQE", "D"),  # A fires backwards
}
GAMES = tuple(SAME_ACTIONS)
TIME_LIMITS = {"bigfish": 6000, "bossfight": 4000, "leaper": 500, "maze": 500, "plunder": 4000}
TIME_LIMIT = 1000  # of the other games' levels, in time steps
SIDE, SHOWN_SIDE = 64, 512  # pixels of what agents see, and of what people do
LARGER_SIDES = (128, 256)
MODES = {
    "extreme": ("chaser", "dodgeball", "leaper", "starpilot"),
    "memory": ("caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"),
}
# Of ACTION_NAMES. More go right than left, since a level begins at its left wall; half jump, since walls and chasms
# stop who walks. So one step in eight scrolls to the left, and a latent action for it can be learned.
COINRUN_WEIGHTS = (*(1, 5, 6, 1, 2, 3, 2, 6, 8), *[0.25] * 6)
DUPLICATE_WEIGHT = 0.25  # in other games, of an action that does what another one does; others have 1


class Procgen(Environment):
    """A game of Procgen (Cobbe et al. 2020). A level ends where it is solved or lost; the next one follows."""

    fps = 15
    action_names = ACTION_NAMES
    idle_action = COINRUN_IDLE_ACTION
    options = PROCGEN_OPTIONS
    load_learner: Callable[[str, int, tuple[int, int, int], int], Callable[[int], Any]] | None = None
    """Loads `RecordingOptions.learner` (`agents.clones.learner`). Whoever records sets it, as agents import this, not
    the other way round."""
    at_once = 4  # images of more no longer fit a core's cache: 16 are 40 % slower

    def __init__(self, name: str, side: int = SIDE):
        self.name, self.frame_shape = name, (side, side, 3)
        self.same_actions = SAME_ACTIONS[name]
        self.weights_A = COINRUN_WEIGHTS
        self.policies = ("uniform", "sticky", "planner", *(["walker"] if name == "coinrun" else []))
        if name not in ("coinrun", "ninja"):  # whose levels, too, lead to the right
            self.weights_A = tuple(DUPLICATE_WEIGHT if a in self.same_actions else 1 for a in ACTION_NAMES)

    def sized(self, options: RecordingOptions) -> "Procgen":
        if options.height == options.width == SIDE:
            return self
        fits = options.height == options.width and options.height in LARGER_SIDES
        options.expect("height", fits, f"64, 128 or 256 pixels for {self.name}, and as many of `width`")
        larger = Procgen(self.name, options.height)
        larger.options = (*self.options, "height", "width")
        return larger

    def check(self, options: RecordingOptions) -> None:
        options.expect("num_levels", 1 <= options.num_levels <= MAX_LEVELS, f"1 to {MAX_LEVELS}")
        mode = options.distribution_mode
        modes = ["easy", "hard", *(other for other, games in MODES.items() if self.name in games)]
        options.expect("distribution_mode", mode in modes, f"{', '.join(modes)} for {self.name}")
        self._weights(options)
        import_procgen()

    def provenance(self, options: RecordingOptions) -> dict[str, Any]:
        learner = {}
        if options.learner:
            from models.stored import all_steps  # brings JAX, which others who record do without

            learner = {"learner_steps": all_steps(options.learner)}  # a training that goes on is another player
        return learner | {
            "level_seeds": {split: [first, first + options.num_levels] for split, first in FIRST_LEVEL.items()},
            "versions": {"procgen-mirror": import_procgen().__version__.strip(), "numpy": np.__version__},
        }

    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        if options.learner:
            return self._corrected(options, split, num_envs, rng)
        B, T = num_envs, EPISODE_STEPS
        rand_seed = int(rng.integers(2**31 - 1))
        env = self.make(options, split, B, rand_seed)
        if options.policy in ("planner", "walker"):
            planner = self.planner(options, split, B, rng)
            actions_BT = np.empty((B, T), np.int32)
        else:
            planner = None
            actions_BT = choose_actions(options.policy, self._weights(options), rng, B, T)
        frames_BTHWC = np.empty((B, T, *self.frame_shape), np.uint8)
        rewards_BT = np.empty((B, T), np.float32)
        levels_BT = np.empty((B, T), np.int32)
        first_BT, ended_BT, success_BT = (np.zeros((B, T), bool) for _ in range(3))
        # At the end of a level the environment shows the next level's first frame at once, with `first` set, together
        # with the reward of the level that has ended: that of the action before.
        _, observation, first_B = env.observe()
        levels_B = [info["level_seed"] for info in env.get_info()]
        for t in range(T):
            frames_BTHWC[:, t] = self.pictures(env, observation)
            first_BT[:, t] = first_B
            levels_BT[:, t] = levels_B
            if planner:
                actions_BT[:, t] = planner.act(env, first_B)
            env.act(actions_BT[:, t])
            rewards_BT[:, t], observation, first_B = env.observe()
            if first_B.any():
                infos = env.get_info()
                levels_B = [info["level_seed"] for info in infos]
                ended_BT[:, t] = first_B
                success_BT[:, t] = first_B & np.array([bool(info["prev_level_complete"]) for info in infos])
        env.close()
        if planner:
            planner.close()
        truncated_BT = ended_BT & ~success_BT & (self._steps_in_level(first_BT) >= self.time_limit)
        terminated_BT = ended_BT & ~truncated_BT
        return Recording(
            frames_BTHWC, actions_BT, rewards_BT, first_BT, levels_BT, terminated_BT, truncated_BT, success_BT
        )

    def _corrected(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        """A policy that plays, and what the walker shows it (`sources.corrections`)."""
        if self.load_learner is None:
            raise InputError(f"`learner` {options.learner}: expected none where nobody can load it")
        make_learner = self.load_learner(options.learner, options.seed, self.frame_shape, len(ACTION_NAMES))
        walker, episodes = self.planner(options, split, 1, rng), []
        assert isinstance(walker, Walker)
        for seed in rng.integers(2**31 - 1, size=num_envs).tolist():
            game, shown = (self.make(options, split, 1, seed) for _ in range(2))
            learner, shortest = make_learner(seed), options.min_clip_length
            corrections = Corrections(game, shown, walker, learner, self.pictures, rng, shortest)
            steps = corrections.record(EPISODE_STEPS)
            episodes.append([np.array(column) for column in zip(*steps, strict=True)])
            game.close()
            shown.close()
        walker.close()
        frames, actions, rewards, first, levels, terminated, success = map(np.stack, zip(*episodes, strict=True))
        return Recording(
            *(frames, actions.astype(np.int32), rewards.astype(np.float32), first, levels.astype(np.int32)),
            *(terminated, np.zeros_like(terminated), success),
        )

    def levels(self, options: RecordingOptions, split: str, num: int, seed: int) -> "ProcgenLevels":
        """Of all levels of the split, be there fewer in a dataset: hardly one comes twice."""
        return ProcgenLevels(self, self.make(dataclasses.replace(options, num_levels=MAX_LEVELS), split, num, seed))

    def planner(
        self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator
    ) -> Planner | Walker:
        """Who plays so many environments by trying futures."""
        unseen = Procgen(self.name)  # futures are not looked at, and small frames are drawn faster
        make = lambda num: unseen.make(options, split, num, rand_seed=0)
        weights_A = self._weights(options)
        if options.policy == "walker":
            return Walker(make, num_envs, options.planner_explore, weights_A, ACTION_NAMES, rng)
        return Planner(make, num_envs, options.planner_rollouts, options.planner_explore, weights_A, rng)

    def _weights(self, options: RecordingOptions) -> tuple[float, ...]:
        """How often each action is chosen.

        Raises:
          InputError: An action's name or its weight cannot be read.
        """
        if not options.action_weights:
            return self.weights_A
        weights = dict.fromkeys(ACTION_NAMES, 0.0)
        for text in options.action_weights:
            name, _, number = text.partition("=")
            good = name in weights and re.fullmatch(r"\d+\.?\d*|\.\d+", number) and float(number) > 0
            options.expect("action_weights", bool(good), f"NAME=WEIGHT, of {', '.join(ACTION_NAMES)}, above 0")
            weights[name] = float(number)
        return tuple(weights.values())

    @property
    def _larger(self) -> bool:
        """Whether frames are larger than what agents are shown."""
        return self.frame_shape[0] > SIDE

    def pictures(self, env: Any, observation: Any) -> np.ndarray:
        """What environments show, uint8 (B, H, W, 3).

        Frames larger than what agents are shown are what people are, each pixel the mean of those that it covers.
        """
        if not self._larger:
            return observation["rgb"]
        times = SHOWN_SIDE // self.frame_shape[0]
        return np.stack([np.asarray(Image.fromarray(info["rgb"]).reduce(times)) for info in env.get_info()])

    @property
    def time_limit(self) -> int:
        """Time steps after which a level ends."""
        return TIME_LIMITS.get(self.name, TIME_LIMIT)

    @staticmethod
    def _steps_in_level(first_BT: np.ndarray) -> np.ndarray:
        """Time steps that each level has lasted with each action."""
        t_T = np.arange(first_BT.shape[1])
        return t_T + 1 - np.maximum.accumulate(np.where(first_BT, t_T, 0), axis=1)

    def make(self, options: RecordingOptions, split: str, num: int, rand_seed: int) -> Any:
        """So many environments side by side; the same `rand_seed` gives the same levels."""
        return import_procgen().ProcgenGym3Env(
            num=num,
            env_name=self.name,
            distribution_mode=options.distribution_mode,
            use_backgrounds=options.use_backgrounds,
            restrict_themes=options.restrict_themes,
            use_monochrome_assets=options.use_monochrome_assets,
            center_agent=options.center_agent,
            start_level=FIRST_LEVEL[split],  # Procgen ignores it where num_levels is 0
            num_levels=options.num_levels,
            rand_seed=rand_seed,
            num_threads=0,
            render_mode="rgb_array" if self._larger else None,
        )


class ProcgenLevels:
    """The first level of each of some environments side by side (`sources.once.Levels`)."""

    tells_solved = True

    def __init__(self, game: Procgen, env: Any):
        self.env, self._game = env, game
        self.levels_N = np.array([info["level_seed"] for info in env.get_info()])

    def frames(self) -> np.ndarray:
        return self._game.pictures(self.env, self.env.observe()[1])

    def step(self, actions_N: np.ndarray) -> Stepped:
        self.env.act(actions_N)
        rewards_N, observation, over_N = self.env.observe()
        solved_N = np.zeros(len(over_N), bool)
        if over_N.any():
            solved_N = over_N & np.array([bool(info["prev_level_complete"]) for info in self.env.get_info()])
        return Stepped(self._game.pictures(self.env, observation), rewards_N, over_N, solved_N)

    def close(self) -> None:
        self.env.close()


class PlanningPlayer:
    """Plays such levels by trying futures (`sources.once.Player`): it sees more than the frames."""

    def __init__(self, planner: Planner | Walker, levels: ProcgenLevels):
        self._planner, self._env, self._begins = planner, levels.env, True

    def act(self, frames_NHWC: np.ndarray, playing_N: np.ndarray) -> np.ndarray:
        first_N, self._begins = np.full(len(playing_N), self._begins), False
        return self._planner.act(self._env, first_N, playing_N)


def import_procgen() -> Any:
    """The package, which is imported when it is needed.

    Raises:
      InputError: It is not installed, or what it needs of the system.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym, which procgen imports, says there that it is outdated
            import procgen
    except ImportError as error:
        raise InputError(
            f"Procgen's games need the package procgen-mirror ({error}); install the pinned packages with "
            "`pip install --no-deps -r requirements-procgen.txt`"
        ) from error
    if sys.platform == "linux":  # bare GPU nodes lack it; without this each worker would end with the loader's words
        try:
            ctypes.CDLL("libGL.so.1")
        except OSError as error:
            raise InputError(
                f"Procgen needs the system's OpenGL library, though it draws without a GPU ({error}); install it, on "
                "Debian and Ubuntu by `apt-get install libgl1`"
            ) from error
    return procgen
