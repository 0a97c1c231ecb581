"""A trained policy, ready to act wherever its game is played: in the real one, and in worlds of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from agents.labels import ActionMap, CodeMap, ContextMap, Labelled, Steps, in_windows, label, others
from agents.policy import Chooser, PolicyPlayer
from models.errors import InputError
from models.genie import World, load_agent
from models.lam import LAM

MakePlayer = Callable[[int], PolicyPlayer]
"""From a seed to a player of one level."""


LEARNER_TEMPERATURE, LEARNER_LABELS = 0.2, 200


@functools.lru_cache(maxsize=1)
def learner(checkpoint: str, seed: int, frame_shape: tuple[int, int, int], num_actions: int) -> MakePlayer:
    """A policy that plays where clips are recorded, loaded and compiled once in each process; see `Clone.in_game`."""
    jax.config.update("jax_platforms", "cpu")  # else each of the processes that record would take a GPU for itself
    return Clone(checkpoint, LEARNER_TEMPERATURE, LEARNER_LABELS, seed).in_game(frame_shape, num_actions)


class Clone:
    """A policy, with what its actions are in the real game and in worlds.

    Args:
      checkpoint: --ckpt_dir of its training.
      temperature: Of its choices.
      num_labels: Steps of its training data whose true actions tell what its latent ones stand for; they are read when
        that is asked for. `seed` draws them.
    """

    def __init__(self, checkpoint: str, temperature: float, num_labels: int, seed: int):
        self._checkpoint, self._temperature = checkpoint, temperature
        self._num_labels, self._seed = num_labels, seed
        self._agent = load_agent(checkpoint)
        self._shape = self._agent.cfg.frame_shape
        self._choose = Chooser(self._agent, rows=1)
        self._choose(np.zeros((1, self._choose.context, *self._shape), np.uint8))  # compiles
        self._map: ActionMap | None = None

    def in_game(self, frame_shape: tuple[int, int, int], num_actions: int) -> MakePlayer:
        """Chooses true actions: its own, or by a map that is learned from labels.

        Args:
          frame_shape: (H, W, C) of what there is to be seen.
        Raises:
          InputError: It has learned another game, by the shape of its frames or the number of its actions.
        """
        self._expect("frames of {}", self._shape, frame_shape)
        if self._agent.lam is None:
            self._expect("{} actions", self._agent.cfg.policy.num_actions, num_actions)
            return self._player(None)
        if self._map is None:
            source = in_windows(self._agent, self._checkpoint)
            labelled = label(self._agent, source, self._num_labels, self._seed)
            self._expect("{} actions", source.metadata.num_actions, num_actions)
            more = others(self._agent, source, self._seed)
            self._map = ContextMap(labelled, more, self._agent.cfg.policy.num_actions, num_actions)
        return self._player(self._map)

    def in_world(self, world: World, name: str, codes_of: Callable[[], Sequence[int]]) -> MakePlayer:
        """Chooses a world's actions: its own, or those that stand for the true ones that it chooses.

        Args:
          name: What an error calls the world.
          codes_of: For each true action the world's latent one; asked where both are needed.
        Raises:
          InputError: Its latent actions are not the world's, or as for `in_game`.
        """
        if world.lam is None:
            return self.in_game(world.cfg.frame_shape, world.num_actions)
        self._expect("frames of {}", self._shape, world.cfg.frame_shape)
        if self._agent.lam is not None:
            if not same_lam(self._agent.lam, world.lam):
                raise InputError(
                    f"`policy_checkpoint` {self._checkpoint}: its latent actions are not those of {name}; train the "
                    f"policy with --lam_checkpoint {name}"
                )
            return self._player(None)
        codes_A, num_true = np.asarray(codes_of()), self._agent.cfg.policy.num_actions
        self._expect("{} actions", num_true, len(codes_A))
        none_NX = np.zeros((num_true, 0))
        known = Labelled(Steps(np.arange(num_true), np.zeros(num_true, int), none_NX, none_NX), codes_A)
        return self._player(CodeMap(known, num_true, world.num_actions))

    def _player(self, action_map: ActionMap | None) -> MakePlayer:
        return lambda seed: PolicyPlayer(self._choose, self._temperature, action_map, seed)

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise InputError(
                f"`policy_checkpoint` {self._checkpoint}: learned a game with {what.format(found)}; here are "
                f"{what.format(expected)}"
            )


def same_lam(one: LAM, other: LAM) -> bool:
    """Whether latent action models have the same variables, but for the half precision that a world is exported in."""
    if one.cfg != other.cfg:
        return False
    trees = [nnx.to_pure_dict(nnx.state(lam)) for lam in (one, other)]
    return all(jax.tree.leaves(jax.tree.map(_same, *trees)))


def _same(a: jax.Array, b: jax.Array) -> bool:
    return bool(np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2**-10, atol=1e-7))
