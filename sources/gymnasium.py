"""Environments that Gymnasium knows, by their ID: Atari, MinAtar, CarRacing, and those of any other package."""

import ast
import contextlib
import importlib
import importlib.metadata
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from models.errors import InputError
from sources.environment import EPISODE_STEPS, GYMNASIUM_OPTIONS, Environment, Recording, RecordingOptions
from sources.once import Stepped
from sources.spaces import choose, handed_over, space_of

# Seeds of a reset, so far apart that no split of any dataset shares one with another split of any other.
FIRST_SEED = {"train": 0, "val": 2**29, "test": 2**30}
MAX_SEEDS = 2**29
DEFAULT_FPS = 15.0  # of environments that do not tell
ATARI_FPS = 60.0  # of the screen; one time step is a few of its frames

# Packages to import before an ID of theirs is known, and what makes their actions come as they are chosen: where an
# environment replaces some unseen, no world can learn what an action does. `sticky_actions` records what was done.
PACKAGES = {"ALE/": "ale_py", "MinAtar/": "minatar.gym"}
NOT_STICKY = {"ALE/": {"repeat_action_probability": 0.0}, "MinAtar/": {"sticky_action_prob": 0.0}}


class Gymnasium(Environment):
    """An environment of Gymnasium; its seeds are the levels.

    What is shown is the observation where that is a picture, else what `render` draws.

    Raises:
      InputError: There is no such environment, a package is missing, or it cannot be recorded.
    """

    options = GYMNASIUM_OPTIONS
    at_once = 16

    def __init__(self, id: str, options: RecordingOptions):
        self.id, self.name = id, f"gymnasium:{id}"
        self._known_as = id.rpartition(":")[2]  # without its package
        self.frame_shape = (options.height, options.width, 3)
        options.expect("height", options.height >= 1, "at least 1 pixel")
        options.expect("width", options.width >= 1, "at least 1 pixel")
        options.expect("frame_skip", options.frame_skip is None or options.frame_skip >= 1, "at least 1")
        options.expect("sticky_actions", 0 <= options.sticky_actions < 1, "0 or more and less than 1")
        options.expect("num_levels", 1 <= options.num_levels <= MAX_SEEDS, f"1 to {MAX_SEEDS}")
        env = self._make(options)
        try:
            space = space_of(id, env)
            self.action_names, self.action_columns = space.names or (), space.columns
            self.fps = self._rate(env, options)
            self._frame(env, env.reset(seed=0)[0])
            self._versions = _versions(env)
        finally:
            env.close()
        self.idle_action = "NOOP" if "NOOP" in self.action_names else None

    def provenance(self, options: RecordingOptions) -> dict[str, Any]:
        seeds = {split: [first, first + options.num_levels] for split, first in FIRST_SEED.items()}
        return {"level_seeds": seeds, "versions": self._versions}

    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        B, T = num_envs, EPISODE_STEPS
        env = self._make(options)
        actions_BT = choose(env.action_space, options.policy, rng, B, T)
        repeated_BT = rng.random((B, T)) < options.sticky_actions
        frames_BTHWC = np.empty((B, T, *self.frame_shape), np.uint8)
        rewards_BT = np.zeros((B, T), np.float32)
        first_BT, terminated_BT, truncated_BT = (np.zeros((B, T), bool) for _ in range(3))
        levels_BT = np.empty((B, T), np.int32)
        steps = self.steps(options)
        for b in range(B):
            over = True
            for t in range(T):
                if over:
                    level = FIRST_SEED[split] + int(rng.integers(options.num_levels))
                    observation, _ = env.reset(seed=level)
                elif repeated_BT[b, t]:
                    actions_BT[b, t] = actions_BT[b, t - 1]
                first_BT[b, t], levels_BT[b, t] = over, level
                frames_BTHWC[b, t] = self._frame(env, observation)
                action = handed_over(env.action_space, actions_BT[b, t])
                for _ in range(steps):
                    observation, reward, terminated, truncated, _ = env.step(action)
                    rewards_BT[b, t] += reward
                    over = bool(terminated or truncated)
                    if over:
                        break
                terminated_BT[b, t], truncated_BT[b, t] = terminated, truncated
        env.close()
        return Recording(frames_BTHWC, actions_BT, rewards_BT, first_BT, levels_BT, terminated_BT, truncated_BT)

    def levels(self, options: RecordingOptions, split: str, num: int, seed: int) -> "GymnasiumLevels":
        """Of all seeds of the split, be there fewer in a dataset: hardly one comes twice."""
        seeds_N = FIRST_SEED[split] + np.random.default_rng(seed).integers(MAX_SEEDS, size=num)
        return GymnasiumLevels(self, options, seeds_N)

    def _make(self, options: RecordingOptions) -> Any:
        """The environment.

        Raises:
          InputError: It cannot be made.
        """
        gymnasium = import_gymnasium(self.id)
        kwargs: dict[str, Any] = {}
        for prefix, values in NOT_STICKY.items():
            kwargs |= values if self._known_as.startswith(prefix) else {}
        if self._known_as.startswith("ALE/") and options.frame_skip:
            kwargs["frameskip"] = options.frame_skip
        kwargs |= {"render_mode": "rgb_array", "disable_env_checker": True} | read_kwargs(options.env_kwargs)
        try:
            return gymnasium.make(self.id, **kwargs)
        except (gymnasium.error.Error, ImportError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"`env` {self.name}: cannot be made ({reason})") from error

    def steps(self, options: RecordingOptions) -> int:
        """The environment's steps in a time step."""
        return 1 if self._known_as.startswith("ALE/") else options.frame_skip or 1  # Atari's skips by itself, faster

    def _rate(self, env: Any, options: RecordingOptions) -> float:
        """Frames per second."""
        if self._known_as.startswith("ALE/"):
            skipped = env.spec.kwargs.get("frameskip", 4)
            return ATARI_FPS / (skipped if isinstance(skipped, int) else sum(skipped) / 2)
        return float(env.metadata.get("render_fps") or DEFAULT_FPS) / (options.frame_skip or 1)

    def _frame(self, env: Any, observation: Any) -> np.ndarray:
        """What is to be seen: uint8 (H, W, 3) of the dataset's size."""
        frame = observation if is_picture(env.observation_space) else env.render()
        if not (isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3):
            raise InputError(f"`env` {self.name}: shows no pictures, neither as observations nor by `render`")
        if frame.dtype != np.uint8:  # MinAtar's are from 0 to 1
            frame = (255 * frame).round().astype(np.uint8)
        return resize(frame, *self.frame_shape[:2])


class GymnasiumLevels:
    """An episode from each of some seeds, in environments of their own (`sources.once.Levels`)."""

    tells_solved = False

    def __init__(self, game: Gymnasium, options: RecordingOptions, seeds_N: np.ndarray):
        self.levels_N, self._game, self._steps = seeds_N, game, game.steps(options)
        self._envs = [game._make(options) for _ in seeds_N]
        self._shown = [
            game._frame(env, env.reset(seed=int(seed))[0]) for env, seed in zip(self._envs, seeds_N, strict=True)
        ]
        self._over_N = np.zeros(len(seeds_N), bool)

    def frames(self) -> np.ndarray:
        return np.stack(self._shown)

    def step(self, actions_N: np.ndarray) -> Stepped:
        rewards_N = np.zeros(len(self._envs), np.float32)
        for i in np.flatnonzero(~self._over_N):
            env = self._envs[i]
            action = handed_over(env.action_space, actions_N[i])
            for _ in range(self._steps):
                observation, reward, terminated, truncated, _ = env.step(action)
                rewards_N[i] += reward
                self._over_N[i] = terminated or truncated
                if self._over_N[i]:
                    break
            self._shown[i] = self._game._frame(env, observation)
        return Stepped(self.frames(), rewards_N, self._over_N.copy(), np.zeros(len(self._envs), bool))

    def close(self) -> None:
        for env in self._envs:
            env.close()


def is_picture(space: Any) -> bool:
    """Whether observations of a space are RGB pictures."""
    return type(space).__name__ == "Box" and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def resize(frame_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture in another size: areas are averaged where it shrinks, pixels repeated where it grows."""
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    grows = height >= frame_HWC.shape[0] and width >= frame_HWC.shape[1]
    method = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    return np.asarray(Image.fromarray(frame_HWC).resize((width, height), method))


def read_kwargs(words: tuple[str, ...]) -> dict[str, Any]:
    """Arguments from words such as `continuous=False`; a value that Python does not read is a string.

    Raises:
      InputError: A word has no name or no value.
    """
    kwargs: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name.isidentifier() and equals):
            raise InputError(f"`env_kwargs` {word}: expected NAME=VALUE, for instance continuous=False")
        try:
            kwargs[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[name] = text
    return kwargs


def import_gymnasium(id: str) -> Any:
    """The package, which is imported when it is needed, and knows the ID's environments then.

    Raises:
      InputError: A package is not installed.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen to draw on
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import gymnasium

        for prefix, package in PACKAGES.items():
            if not id.startswith(prefix) or any(known.startswith(prefix) for known in gymnasium.registry):
                continue
            with contextlib.redirect_stderr(io.StringIO()):
                module = importlib.import_module(package)
            if package == "ale_py":  # it registers itself, and greets in every worker unless told not to
                module.ALEInterface.setLoggerMode(module.LoggerMode.Error)
            else:
                module.register_envs()
    except ImportError as error:
        raise InputError(
            f"`env` gymnasium:{id} needs a package that is not installed ({error}); install the pinned ones with "
            "`make env-deps`"
        ) from error
    return gymnasium


def _versions(env: Any) -> dict[str, str]:
    """Versions of what decides the bytes: of the environment's package, and of those that play and resize."""
    package = type(env.unwrapped).__module__.split(".")[0]
    named = importlib.metadata.packages_distributions().get(package, [])
    versions = {name: importlib.metadata.version(name) for name in {"gymnasium", "numpy", "pillow", *named}}
    return dict(sorted(versions.items()))
