"""What an environment is that clips are recorded from. `sources/registry.py` has the table of all of them."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from models.errors import InputError
from sources.once import Levels
from utils.actions import ActionColumn

EPISODE_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class RecordingOptions:
    """All that decides the bytes of a recorded dataset, but for the environment."""

    num_episodes: int = 10_000
    """Episodes of 1,000 time steps, over all splits: N episodes give N * 1,000 transitions."""
    seed: int = 0
    """Decides the levels and the actions. The same seed gives the same files."""
    policy: Literal["uniform", "sticky", "planner", "walker"] = "uniform"
    """How to act: uniformly at random as in the paper; "sticky": hold an action for a while (in CoinRun mostly one that
    moves right), which gets much further into the levels; "planner", for Procgen: try many futures and do the best;
    "walker", for CoinRun: walk to the right, and jump where that leads into trouble, which is easily imitated."""
    planner_rollouts: int = 32
    """Of the planner: futures that it tries where it needs a plan. Its time grows with them."""
    planner_explore: float = 0.2
    """Of planner and walker: share of their decisions, of the planner one in 16 time steps, at which they act at random
    until the next one, or for a few time steps, so that mistakes are in the data too."""
    learner: str = ""
    """Of the walker: --ckpt_dir of a policy's training (train_policy.py), which plays. Where it makes a mistake that
    can be mended, the walker shows how, and that is recorded in the place of what the mistake leads to."""
    action_weights: tuple[str, ...] = ()
    """Procgen: how often sticky, and the planner in its futures, choose an action, by comparison: RIGHT=1 RIGHT+UP=3;
    those that are not named are not chosen. Empty takes the game's own."""
    only_solved: bool = False
    """Keep no clips but those of levels that were solved in the end, to be imitated."""
    clip_length: int = 32
    """Frames in a clip. The last clip of a level reaches back over frames of the one before it to be as long; only a
    level that is shorter gives a shorter one."""
    min_clip_length: int = 16
    """Levels shorter than this are dropped."""
    num_levels: int = 10_000
    """Levels of each split. The splits share none."""
    val_fraction: float = 0.02
    """Share of the episodes for validation: at least one where there are 3 episodes or more, none if 0."""
    test_fraction: float = 0.02
    """Share of the episodes for testing, as above."""
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "hard"
    """Procgen's difficulty of the levels; a few games have extreme or memory."""
    use_backgrounds: bool = True
    """Procgen draws a picture behind the levels; without, black."""
    restrict_themes: bool = False
    """Procgen draws all levels in one theme."""
    use_monochrome_assets: bool = False
    """Procgen draws plain rectangles in the place of pictures."""
    center_agent: bool = True
    """Procgen's view follows the agent; without, it shows the whole level."""
    height: int = 64
    """Of the frames, in pixels. What Gymnasium's environments show is resized; Procgen's games draw 64, and more slowly
    128 or 256."""
    width: int = 64
    """Of the frames, in pixels."""
    frame_skip: int | None = None
    """Gymnasium: steps of the environment for each time step, all with one action; by default 4 of Atari's, else 1."""
    sticky_actions: float = 0.0
    """Gymnasium: probability that the last action is done again in the place of the chosen one, as in Machado et al.
    2018. The action that was done is the one that is recorded."""
    env_kwargs: tuple[str, ...] = ()
    """Gymnasium: arguments for the environment, for instance `continuous=False`."""

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
        self.expect("planner_rollouts", self.planner_rollouts >= 1, "at least 1")
        self.expect("planner_explore", 0 <= self.planner_explore < 1, "0 or more and less than 1")
        self.expect("learner", not self.learner or self.policy == "walker", "none but with --policy walker")
        self.expect("only_solved", not (self.only_solved and self.learner), "False with a `learner`")

    def expect(self, name: str, ok: bool, expected: str) -> None:
        """Raises an InputError with the value of the field `name` unless it is `ok`."""
        if not ok:
            raise InputError(f"`{name}` {getattr(self, name)}: expected {expected}")


PLANNER_OPTIONS = ("planner_rollouts", "planner_explore", "learner", "only_solved")
PROCGEN_OPTIONS: tuple[str, ...] = (
    *("distribution_mode", "use_backgrounds", "restrict_themes", "use_monochrome_assets", "center_agent"),
    *("action_weights", *PLANNER_OPTIONS),
)
GYMNASIUM_OPTIONS = ("height", "width", "frame_skip", "sticky_actions", "env_kwargs")
SPECIAL_OPTIONS = {*PROCGEN_OPTIONS, *GYMNASIUM_OPTIONS}
"""Options that mean something to some environments only; the others are everyone's."""


class Recording(NamedTuple):
    """What a batch of B environments did in T = EPISODE_STEPS time steps.

    frames_BTHWC: uint8, the frame before each action.
    actions_BT: int32; `actions_BT[:, t]` leads from frame t to frame t + 1. Beyond one integer (B, T, A), of the type
      that `Metadata.action_dtype` tells.
    rewards_BT: float32, earned by the action.
    first_BT: bool, whether the frame is the first of a level; true at t = 0. Clips are cut there.
    levels_BT: int32, the seed of the level that the frame shows; None where there is no such thing.
    terminated_BT: bool, whether the action ended the level, by death, goal or otherwise; None where that is not told.
    truncated_BT: bool, whether the action was the level's last because its time was up; None as above.
    success_BT: bool, whether the action solved the level; None where levels are not solved, or it is not told.
    """

    frames_BTHWC: np.ndarray
    actions_BT: np.ndarray
    rewards_BT: np.ndarray
    first_BT: np.ndarray
    levels_BT: np.ndarray | None = None
    terminated_BT: np.ndarray | None = None
    truncated_BT: np.ndarray | None = None
    success_BT: np.ndarray | None = None


class Environment(ABC):
    """Something to be played.

    name: What --env and metadata.json call it.
    frame_shape: (height, width, 3) of its frames.
    fps: Frames per second at which it plays naturally.
    action_names: Names of the actions 0, 1, ...; none where an action is more than one integer.
    action_columns: What such actions say.
    same_actions: Names of actions that always do what another one does, each with the other one's name.
    idle_action: Name of the action that does nothing, if there is one.
    policies: The ways to act that it has (`RecordingOptions.policy`).
    options: Names of the options that it has beside everyone's (`SPECIAL_OPTIONS`).
    at_once: Episodes that `play` is asked for at a time, at most.
    """

    name: str
    frame_shape: tuple[int, int, int]
    fps: float
    action_names: tuple[str, ...]
    action_columns: tuple[ActionColumn, ...] = ()
    same_actions: Mapping[str, str] = MappingProxyType({})
    idle_action: str | None = None
    policies: tuple[str, ...] = ("uniform", "sticky")
    options: tuple[str, ...] = ()
    at_once: int = 4

    @abstractmethod
    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        """Plays `num_envs` episodes side by side: a function of the arguments alone.

        Args:
          split: "train", "val" or "test". Splits must not share what is to be held out, for instance levels.
          rng: The only source of randomness. It is different for each split and each call.
        """

    def sized(self, options: RecordingOptions) -> "Environment":
        """This environment, with frames of another size if that is asked for and can be had."""
        return self

    def check(self, options: RecordingOptions) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuses what cannot be played.

        Raises:
          InputError: A value of the options does not work here, or a package is missing.
        """

    def levels(self, options: RecordingOptions, split: str, num: int, seed: int) -> Levels:
        """Levels of a split, to be played once each: a function of the arguments alone.

        Raises:
          InputError: It has none that can be played so.
        """
        raise InputError(f"{self.name}: a policy cannot be played there")

    def provenance(self, options: RecordingOptions) -> dict[str, Any]:
        """What metadata.json and a continued run should know beside the options: versions, seeds of levels."""
        return {"versions": {"numpy": np.__version__}}

    def options_of(self, options: RecordingOptions) -> dict[str, Any]:
        """The options that mean something here, as JSON has them.

        Raises:
          InputError: One that means nothing here was chosen.
        """
        used = {}
        for field in dataclasses.fields(RecordingOptions):
            value = getattr(options, field.name)
            if field.name not in SPECIAL_OPTIONS or field.name in self.options:
                used[field.name] = list(value) if isinstance(value, tuple) else value
            else:
                options.expect(field.name, value == field.default, f"nothing: {self.name} has no such option")
        options.expect("policy", options.policy in self.policies, f"{' or '.join(self.policies)} for {self.name}")
        looks, defaults = options.policy in ("planner", "walker"), RecordingOptions()
        explores = looks or options.planner_explore == defaults.planner_explore
        options.expect("planner_explore", explores, "nothing but with --policy planner or walker")
        rolls = options.policy == "planner" or options.planner_rollouts == defaults.planner_rollouts
        options.expect("planner_rollouts", rolls, "nothing but with --policy planner")
        weighs = options.policy != "uniform" or not options.action_weights
        options.expect("action_weights", weighs, "none with --policy uniform")
        return used


def options_of(made_by: Mapping[str, Any]) -> RecordingOptions | None:
    """What a dataset was recorded with, by `Metadata.made_by`; None where it was not recorded from an environment."""
    while "of" in made_by:  # as of clips that were exported with a world, and of those that repeat none
        made_by = made_by["of"]
    config = made_by.get("config")
    if made_by.get("command") != "generate_dataset.py" or not isinstance(config, dict):
        return None
    values: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items()}
    return RecordingOptions(**values)
