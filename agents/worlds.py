"""Rollouts of a world side by side on the device, each of which can begin anew: what its environments are made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError
from models.genie import World
from models.heads import Judged
from models.sampling import SamplingConfig, next_frame, start_rollout
from utils.actions import ActionLabel, read_labels
from utils.checkpoint import LABELS, find_labels
from utils.data import ClipSource
from utils.records import Metadata

MOST_PROMPTS = 256


class Prompts(NamedTuple):
    """What rollouts begin with.

    frames_PTHWC: uint8.
    actions_PTm1: Those between the frames, as the world takes them.
    """

    frames_PTHWC: np.ndarray
    actions_PTm1: np.ndarray


class Stepped(NamedTuple):
    """What a step makes of B rollouts.

    states: Of all of them.
    frames_BHWC: uint8.
    judged: Of the actions taken; see `models.heads`.
    ended_B: Whether the level ended, drawn by its probability.
    """

    states: Any
    frames_BHWC: jax.Array
    judged: Judged
    ended_B: jax.Array


def read_prompts(world: World, data_dir: str, split: str, num_frames: int) -> Prompts:
    """Windows of a dataset, one from each clip, of as many clips as there are up to `MOST_PROMPTS`.

    Raises:
      InputError: There are none, they have frames of another shape, or they lack the actions that the world takes.
    """
    if not 1 <= num_frames < world.cfg.window:
        raise InputError(f"`prompt_frames` {num_frames}: must be from 1 to {world.cfg.window - 1}")
    source = ClipSource(data_dir, split, num_frames)
    found, expected = source.metadata.frame_shape, world.cfg.dynamics.frame_shape
    if found != expected:
        raise InputError(f"`data_dir` {data_dir}: frames of {found}, the world's are {expected}")
    rng = np.random.default_rng(0)
    clips = rng.permutation(len(source))[:MOST_PROMPTS]
    batch = source.windows(clips.tolist(), rng.random(len(clips)).tolist())
    if world.lam is None:
        if batch.actions_BT is None:
            raise InputError(f"`data_dir` {data_dir}: has no actions, which this world takes")
        return Prompts(batch.frames_BTHWC, batch.actions_BT[:, :-1])
    infer = jax.jit(lambda frames: world.infer_actions(frames.astype(jnp.float32) / 255))
    if num_frames == 1:
        return Prompts(batch.frames_BTHWC, np.zeros((len(clips), 0), np.int32))
    return Prompts(batch.frames_BTHWC, np.concatenate([np.asarray(infer(x[None])) for x in batch.frames_BTHWC]))


def world_labels(checkpoint: str, num_actions: int) -> list[ActionLabel]:
    """What a world's actions do, as evaluate.py has found.

    Raises:
      InputError: There are no labels, or they are of another world, or no action stands for a true one.
    """
    if not (file := find_labels(checkpoint)):
        raise InputError(f"{checkpoint}: has no {LABELS}, which says what actions do; run evaluate.py first")
    labels = read_labels(file, num_actions)
    if not any(label.true for label in labels):
        raise InputError(f"{file}: knows no true actions; run evaluate.py on a dataset that has them")
    return labels


def real_actions(checkpoint: str, num_actions: int) -> dict[str, int]:
    """For each true action that some of a world's latent ones do, the latent one that does it most surely."""
    labels = world_labels(checkpoint, num_actions)
    by_share = sorted(range(num_actions), key=lambda i: labels[i].share or 0.0)
    surest = {labels[i].true: i for i in by_share if labels[i].true}
    return dict(sorted(surest.items()))


def surest_actions(checkpoint: str, world: World, metadata: Metadata | None) -> dict[str, int]:
    """For the true actions of a game, by name, the one of a world that does each most surely, where one does.

    Args:
      metadata: Of the game's dataset; None where that is not there.
    Raises:
      InputError: Nothing is known of the game's actions, or of what the world's do.
    """
    if metadata is None or metadata.action_names is None:
        raise InputError(f"`checkpoint` {checkpoint}: no dataset tells the true actions of its game (`data_dir`)")
    names, num_actions = metadata.action_names, world.num_actions
    if world.lam is not None:
        known = real_actions(checkpoint, num_actions)
    elif num_actions == len(names):
        known = {name: action for action, name in enumerate(names)}
    else:
        raise InputError(f"`checkpoint` {checkpoint}: takes {num_actions} true actions, the game has {len(names)}")
    merged = {name: metadata.same_actions.get(name, name) for name in names}
    return {name: known[like if like in known else name] for name, like in merged.items() if {name, like} & {*known}}


class Worlds:
    """A world, of which any number of rollouts are advanced by one compiled step.

    Args:
      prompts: Rollout i begins with prompt `index_B[i]`.
    """

    def __init__(self, world: World, sampling: SamplingConfig, prompts: Prompts):
        graphdef, variables = nnx.split(world)
        self.num_prompts = len(prompts.frames_PTHWC)
        self._given = jax.device_put((variables, prompts))

        def start(given: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            variables, (frames_PTHWC, actions_PTm1) = given
            prompt_1THWC = frames_PTHWC[index][None].astype(jnp.float32) / 255
            state = start_rollout(nnx.merge(graphdef, variables), prompt_1THWC, actions_PTm1[index][None])
            return state, frames_PTHWC[index, -1]

        def step(given: Any, state: Any, action: jax.Array, key: jax.Array) -> tuple[Any, ...]:
            world = nnx.merge(graphdef, given[0])
            noise_key, end_key = jax.random.split(key)
            judged = jax.tree.map(lambda x: x[0], world.judge(state, action[None]))
            frame_1HWC, state = next_frame(world, state, action[None], noise_key, sampling)
            ended = jax.random.uniform(end_key) < judged.end_X
            return state, (frame_1HWC[0] * 255 + 0.5).astype(jnp.uint8), judged, ended

        def begin(given: Any, index_B: jax.Array) -> tuple[Any, jax.Array]:
            return jax.vmap(start, (None, 0))(given, index_B)

        def begin_anew(given: Any, states: Any, frames_BHWC: jax.Array, again_B: jax.Array, index_B: jax.Array):
            pick = lambda a, b: jnp.where(again_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            anew = lambda old: jax.tree.map(pick, begin(given, index_B), old)
            return jax.lax.cond(jnp.any(again_B), anew, lambda old: old, (states, frames_BHWC))

        def advance(given, states, action_B, again_B, index_B, key) -> Stepped:
            keys_B = jax.random.split(key, len(action_B))
            after, frames, judged, ended_B = jax.vmap(step, (None, 0, 0, 0))(given, states, action_B, keys_B)
            after, frames = begin_anew(given, after, frames, again_B, index_B)
            judged = jax.tree.map(lambda x_B: jnp.where(again_B, 0.0, x_B), judged)
            return Stepped(after, frames, judged, ended_B & ~again_B)

        self._begin, self._begin_anew, self._advance = jax.jit(begin), jax.jit(begin_anew), jax.jit(advance)

    def start(self, index_B: Sequence[int] | np.ndarray) -> tuple[Any, jax.Array]:
        """Rollouts at the end of their prompts: their states, and the last frames (B, H, W, C), uint8."""
        return self._begin(self._given, np.asarray(index_B, np.int32))

    def restart(self, states: Any, frames_BHWC: Any, again_B: np.ndarray, index_B: np.ndarray) -> tuple[Any, jax.Array]:
        """As `start` for those rollouts for which `again_B` says so; the others stay as they are."""
        return self._begin_anew(self._given, states, frames_BHWC, again_B, np.asarray(index_B, np.int32))

    def step(
        self, states: Any, action_B: np.ndarray, key: jax.Array, again_B: np.ndarray, index_B: np.ndarray
    ) -> Stepped:
        """Takes an action (int32, or a row) in each rollout; where `again_B` says so, it begins anew instead."""
        return self._advance(self._given, states, action_B, again_B, np.asarray(index_B, np.int32), key)
