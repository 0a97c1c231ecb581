"""CoinRun, as Procgen has it: playing it, how to act, and what there is to know about its actions."""

import contextlib
import io
from typing import Any

import numpy as np

from models.errors import InputError
from sources.environment import EPISODE_STEPS, Environment, Recording, RecordingOptions
from utils.records import COINRUN_IDLE_ACTION, COINRUN_SAME_ACTIONS

# So far apart that no split of any dataset shares a level with another split of any other.
FIRST_LEVEL = {"train": 0, "val": 2**29, "test": 2**30}
MAX_LEVELS = 2**29
ACTION_NAMES = (
    *("LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NONE", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP"),
    *("D", "A", "W", "S", "Q", "E"),  # keys of other games: in CoinRun they do what NONE does
)
# Of ACTION_NAMES. More go right than left, since a level begins at its left wall; half jump, since walls and chasms
# stop who walks. So one step in eight scrolls to the left, and a latent action for it can be learned.
STICKY_WEIGHTS = (*(1, 5, 6, 1, 2, 3, 2, 6, 8), *[0.25] * 6)
STICKY_HOLD = 8  # mean time steps for which the sticky policy holds an action


class CoinRun(Environment):
    """CoinRun (Cobbe et al. 2019). A level ends where the agent dies or takes the coin; the next one follows."""

    name = "coinrun"
    frame_shape = (64, 64, 3)
    fps = 15
    action_names = ACTION_NAMES
    same_actions = COINRUN_SAME_ACTIONS
    idle_action = COINRUN_IDLE_ACTION

    def check(self, options: RecordingOptions) -> None:
        options.expect("num_levels", 1 <= options.num_levels <= MAX_LEVELS, f"1 to {MAX_LEVELS}")
        import_procgen()

    def provenance(self, options: RecordingOptions) -> dict[str, Any]:
        return {
            "level_seeds": {split: [first, first + options.num_levels] for split, first in FIRST_LEVEL.items()},
            "versions": {"procgen-mirror": import_procgen().__version__.strip(), "numpy": np.__version__},
        }

    def play(self, options: RecordingOptions, split: str, num_envs: int, rng: np.random.Generator) -> Recording:
        B, T = num_envs, EPISODE_STEPS
        env = import_procgen().ProcgenGym3Env(
            num=B,
            env_name=self.name,
            distribution_mode=options.distribution_mode,
            use_backgrounds=options.use_backgrounds,
            restrict_themes=options.restrict_themes,
            use_monochrome_assets=options.use_monochrome_assets,
            center_agent=options.center_agent,
            start_level=FIRST_LEVEL[split],  # Procgen ignores it where num_levels is 0
            num_levels=options.num_levels,
            rand_seed=int(rng.integers(2**31 - 1)),
            num_threads=0,
        )
        actions_BT = choose_actions(options.policy, rng, B, T)
        frames_BTHWC = np.empty((B, T, *self.frame_shape), np.uint8)
        rewards_BT = np.empty((B, T), np.float32)
        first_BT = np.empty((B, T), bool)
        levels_BT = np.empty((B, T), np.int32)
        # At the end of a level the environment shows the next level's first frame at once, with `first` set, together
        # with the reward of the level that has ended: that of the action before.
        _, observation, first_B = env.observe()
        for t in range(T):
            if first_B.any():
                levels_B = [info["level_seed"] for info in env.get_info()]
            frames_BTHWC[:, t] = observation["rgb"]
            first_BT[:, t] = first_B
            levels_BT[:, t] = levels_B
            env.act(actions_BT[:, t])
            rewards_BT[:, t], observation, first_B = env.observe()
        env.close()
        return Recording(frames_BTHWC, actions_BT, rewards_BT, first_BT, levels_BT)


def choose_actions(policy: str, rng: np.random.Generator, num_envs: int, num_steps: int) -> np.ndarray:
    """Actions (num_envs, num_steps) int32 of a policy that does not look at the game."""
    shape = (num_envs, num_steps)
    if policy == "uniform":
        return rng.integers(len(ACTION_NAMES), size=shape, dtype=np.int32)
    weights = np.array(STICKY_WEIGHTS)
    choices_BT = rng.choice(len(ACTION_NAMES), shape, p=weights / weights.sum()).astype(np.int32)
    chosen_BT = rng.random(shape) < 1 / STICKY_HOLD  # at time steps that are not chosen, the action before is held
    held_since_BT = np.maximum.accumulate(np.where(chosen_BT, np.arange(num_steps), 0), axis=1)
    return np.take_along_axis(choices_BT, held_since_BT, axis=1)


def import_procgen() -> Any:
    """The package, which is imported when it is needed.

    Raises:
      InputError: It is not installed.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gym, which procgen imports, says there that it is outdated
            import procgen
    except ImportError as error:
        raise InputError(
            f"CoinRun needs the package procgen-mirror ({error}); install the pinned packages with "
            "`pip install --no-deps -r requirements-procgen.txt`"
        ) from error
    return procgen
