"""What an environment is that clips are recorded from. `sources/registry.py` has the table of all of them."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from models.errors import InputError

EPISODE_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class RecordingOptions:
    """All that decides the bytes of a recorded dataset, but for the environment."""

    num_episodes: int = 10_000
    """Episodes of 1,000 time steps, over all splits: N episodes give N * 1,000 transitions."""
    seed: int = 0
    """Decides the levels and the actions. The same seed gives the same files."""
    distribution_mode: Literal["hard", "easy"] = "hard"
    """Procgen's difficulty of the levels."""
    use_backgrounds: bool = True
    """Procgen draws a picture behind the levels; without, black."""
    restrict_themes: bool = False
    """Procgen draws all levels in one theme."""
    use_monochrome_assets: bool = False
    """Procgen draws plain rectangles in the place of pictures."""
    center_agent: bool = True
    """Procgen's view follows the agent; without, it shows the whole level."""
    policy: Literal["uniform", "sticky"] = "uniform"
    """How to act: uniformly at random as in the paper, or "sticky": hold an action for a while, mostly one that moves
    right, which gets much further into the levels."""
    clip_length: int = 32
    """Frames in a clip; the last clip of a level is shorter."""
    min_clip_length: int = 16
    """Clips shorter than this are dropped."""
    num_levels: int = 10_000
    """Levels of each split. The splits share none."""
    val_fraction: float = 0.02
    """Share of the episodes for validation: at least one where there are 3 episodes or more, none if 0."""
    test_fraction: float = 0.02
    """Share of the episodes for testing, as above."""

    def check(self) -> None:
        """Raises an InputError for a value that cannot work."""
        self.expect("num_episodes", self.num_episodes >= 1, "at least 1")
        self.expect("seed", self.seed >= 0, "0 or more")
        self.expect("clip_length", 1 <= self.clip_length <= EPISODE_STEPS, f"1 to {EPISODE_STEPS} frames")
        self.expect(
            "min_clip_length",
            1 <= self.min_clip_length <= self.clip_length,
            f"1 to {self.clip_length} frames, the `clip_length`",
        )
        for name in ("val_fraction", "test_fraction"):
            self.expect(name, 0 <= getattr(self, name) <= 0.25, "0 to 0.25, so that most episodes are for training")

    def expect(self, name: str, ok: bool, expected: str) -> None:
        """Raises an InputError with the value of the field `name` unless it is `ok`."""
        if not ok:
            raise InputError(f"`{name}` {getattr(self, name)}: expected {expected}")


class Recording(NamedTuple):
    """What a batch of B environments did in T = EPISODE_STEPS time steps.

    frames_BTHWC: uint8, the frame before each action.
    actions_BT: int32; `actions_BT[:, t]` leads from frame t to frame t + 1.
    rewards_BT: float32, earned by the action.
    first_BT: bool, whether the frame is the first of a level; true at t = 0. Clips are cut there.
    levels_BT: int32, the seed of the level that the frame shows; None where there is no such thing.
    """

    frames_BTHWC: np.ndarray
    actions_BT: np.ndarray
    rewards_BT: np.ndarray
    first_BT: np.ndarray
    levels_BT: np.ndarray | None = None


class Environment(ABC):
    """Something to be played, with discrete actions.

    name: What --env and metadata.json call it.
    frame_shape: (height, width, 3) of its frames.
    fps: Frames per second at which it plays naturally.
    action_names: Names of the actions 0, 1, ...
    same_actions: Names of actions that always do what another one does, each with the other one's name.
    idle_action: Name of the action that does nothing, if there is one.
    """

    name: ClassVar[str]
    frame_shape: ClassVar[tuple[int, int, int]]
    fps: ClassVar[float]
    action_names: ClassVar[tuple[str, ...]]
    same_actions: ClassVar[Mapping[str, str]] = {}
    idle_action: ClassVar[str | None] = None

    @abstractmethod
    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        """Plays `num_envs` episodes side by side: a function of the arguments alone.

        Args:
          split: "train", "val" or "test". Splits must not share what is to be held out, for instance levels.
          rng: The only source of randomness. It is different for each split and each call.
        """

    def check(self, options: RecordingOptions) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuses what cannot be played.

        Raises:
          InputError: A value of the options does not work here, or a package is missing.
        """

    def provenance(self, options: RecordingOptions) -> dict[str, Any]:
        """What metadata.json and a continued run should know beside the options: versions, seeds of levels."""
        return {"versions": {"numpy": np.__version__}}
