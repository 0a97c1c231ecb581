"""A world as an environment of Gymnasium, for any agent library; alone, or many on the device in one compiled step."""

import dataclasses
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from agents.registration import MAX_EPISODE_STEPS
from agents.worlds import Worlds, read_prompts, real_actions
from models.actions import LARGEST
from models.errors import InputError
from models.genie import World, load_world, stored_sampling
from models.nn import Compute
from utils.checkpoint import data_of
from utils.records import read_metadata


@dataclasses.dataclass(frozen=True)
class Played:
    """A world that is ready to be played.

    fps: Frames per second at which it plays naturally.
    action_space: Of one rollout.
    action_names: Of its actions 0, 1, …; empty where they have none.
    codes: From these actions to the world's own; None where they are the same.
    """

    worlds: Worlds
    frame_shape: tuple[int, int, int]
    fps: float
    action_space: gymnasium.Space
    action_names: tuple[str, ...]
    codes: np.ndarray | None

    def own_actions(self, action_B: np.ndarray) -> np.ndarray:
        """Actions as the world takes them: int32, or rows of float32."""
        if self.codes is not None:
            return self.codes[action_B]
        return np.asarray(
            action_B, np.int32 if isinstance(self.action_space, gymnasium.spaces.Discrete) else np.float32
        )


def open_world(
    checkpoint: str, data_dir: str = "", split: str = "val", prompt_frames: int = 1, actions: str = "latent"
) -> Played:
    """Loads a world, and prompts for it.

    Args:
      checkpoint: --ckpt_dir of a world's training, or an exported world.
      data_dir: Dataset of the prompts; by default the one that belongs to the checkpoint.
      split: Of the dataset.
      prompt_frames: Frames that a rollout begins with, of which an agent sees the last one.
      actions: "latent": the world's own, which are the true ones of a world that was trained on such; "real": true ones
        by name, each done by the latent one that evaluate.py found to do it.
    Raises:
      InputError: The checkpoint, the dataset and the actions do not fit together.
    """
    world = load_world(checkpoint, Compute(dtype="float32"))
    data_dir = data_dir or data_of(checkpoint)
    metadata = read_metadata(data_dir)
    names: tuple[str, ...] = ()
    codes, num_actions = None, world.num_actions
    if actions not in ("latent", "real"):
        raise InputError(f'`actions` {actions}: must be "latent" or "real"')
    if world.lam is None:
        names = metadata.action_names or ()
    elif actions == "real":
        found = real_actions(checkpoint, num_actions)
        names, codes, num_actions = tuple(found), np.array(list(found.values()), np.int32), len(found)
    worlds = Worlds(world, stored_sampling(checkpoint), read_prompts(world, data_dir, split, prompt_frames))
    shape = world.cfg.dynamics.frame_shape
    return Played(worlds, shape, metadata.fps, action_space(world, num_actions), names, codes)


def action_space(world: World, num_actions: int) -> gymnasium.Space:
    """A number, or a row of numbers; of real ones, up to `models.actions.LARGEST` standard deviations.

    Raises:
      InputError: Some columns are discrete and some real, for which there is no plain space.
    """
    cfg = world.cfg.dynamics
    if not cfg.action_values:
        return gymnasium.spaces.Discrete(num_actions)
    if all(cfg.action_values):
        return gymnasium.spaces.MultiDiscrete(np.array(cfg.action_values))
    if any(cfg.action_values):
        raise InputError("this world's actions have discrete and real columns, for which there is no environment")
    mean, scale = (np.array(x, np.float32) for x in (cfg.action_mean, cfg.action_scale))
    return gymnasium.spaces.Box(mean - LARGEST * scale, mean + LARGEST * scale, dtype=np.float32)


class WorldVectorEnv(gymnasium.vector.VectorEnv):
    """Many rollouts of a world, advanced by one compiled step.

    Observations are frames, uint8 (num_envs, H, W, C). Rewards are those that the world's heads expect; an episode
    terminates with the probability that they give, and is truncated after `max_episode_steps`. Without heads (see
    train_dynamics.py --heads) rewards are 0 and only the length truncates. A step of an episode that has ended begins
    the next one (Gymnasium's `NEXT_STEP`). `info` holds `end` and `solved`, the probabilities of an end and of a
    solution.

    Args:
      checkpoint, **of_world: See `open_world`.
      max_episode_steps: Steps of an episode at most; 0 for no limit.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        checkpoint: str,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        **of_world: Any,
    ):
        self.played = open_world(checkpoint, **of_world)
        self.num_envs, self.max_episode_steps, self.render_mode = num_envs, max_episode_steps, render_mode
        self.metadata = {**WorldVectorEnv.metadata, "render_fps": self.played.fps}
        self.action_names = self.played.action_names
        self.single_observation_space = gymnasium.spaces.Box(0, 255, self.played.frame_shape, np.uint8)
        self.single_action_space = self.played.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._states: Any = None
        self._frames_BHWC = np.zeros((num_envs, *self.played.frame_shape), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins all episodes, or those that `options["reset_mask"]` (num_envs,) names."""
        super().reset(seed=seed)
        if seed is not None or self._states is None:
            self._key, self._count = jax.random.key(int(self.np_random.integers(2**31))), 0
        mask_B = (options or {}).get("reset_mask")
        if mask_B is None or self._states is None:
            self._states, frames_BHWC = self.played.worlds.start(self._prompts())
            self._steps_B = np.zeros(self.num_envs, int)
            self._over_B = np.zeros(self.num_envs, bool)
        else:
            mask_B = np.asarray(mask_B, bool)
            given = self._states, self._frames_BHWC, mask_B, self._prompts()
            self._states, frames_BHWC = self.played.worlds.restart(*given)
            self._steps_B[mask_B], self._over_B[mask_B] = 0, False
        self._frames_BHWC = np.array(frames_BHWC)
        return self._frames_BHWC.copy(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        again_B = self._over_B
        self._count += 1
        key = jax.random.fold_in(self._key, self._count)
        own_B = self.played.own_actions(np.asarray(actions))
        out = self.played.worlds.step(self._states, own_B, key, again_B, self._prompts())
        self._states, self._frames_BHWC = out.states, np.array(out.frames_BHWC)
        self._steps_B = np.where(again_B, 0, self._steps_B + 1)
        terminated_B = np.array(out.ended_B)
        truncated_B = ~terminated_B & (self._steps_B >= self.max_episode_steps) & (self.max_episode_steps > 0)
        self._over_B = terminated_B | truncated_B
        info = {"end": np.asarray(out.judged.end_X), "solved": np.asarray(out.judged.solved_X)}
        rewards_B = np.array(out.judged.reward_X, np.float64)
        return self._frames_BHWC.copy(), rewards_B, terminated_B, truncated_B, info

    def render(self) -> tuple[np.ndarray, ...]:
        return tuple(self._frames_BHWC.copy())

    def _prompts(self) -> np.ndarray:
        """Which prompt each rollout is to begin with next."""
        return self.np_random.integers(self.played.worlds.num_prompts, size=self.num_envs)


class WorldEnv(gymnasium.Env):
    """One rollout of a world; see `WorldVectorEnv`.

    Its length is limited by `gymnasium.make`, to 300 steps unless `max_episode_steps` says otherwise.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, checkpoint: str, render_mode: str | None = None, **of_world: Any):
        self._one = WorldVectorEnv(checkpoint, 1, 0, render_mode, **of_world)
        self.render_mode = render_mode
        self.metadata = {**WorldEnv.metadata, "render_fps": self._one.played.fps}
        self.action_names = self._one.action_names
        self.observation_space, self.action_space = self._one.single_observation_space, self._one.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._one.reset(seed=seed)[0][0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        frames, rewards, terminated, _, info = self._one.step(np.asarray(action)[None])
        found = {name: float(values[0]) for name, values in info.items()}
        return frames[0], float(rewards[0]), bool(terminated[0]), False, found

    def render(self) -> np.ndarray:
        return self._one.render()[0]
