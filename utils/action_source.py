"""Where the actions come from that a dynamics model is trained on: chosen once, then asked."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import flops
from models.errors import InputError
from models.genie import World
from models.lam import LAMConfig
from models.padding import after_first, mean_of_true
from utils.data import Batch
from utils.records import Metadata

PREDICTING = nnx.Any(nnx.PathContains("dynamics"), nnx.PathContains("heads"))
"""The parts of a world that every training of it trains."""


class Acted(NamedTuple):
    """The actions of a batch, and what training a LAM along adds.

    actions_BTm1: int32, or rows (see `models.actions`); entry t leads from frame t to frame t + 1.
    loss: The LAM's, or 0.
    codes: Latents and codes that its codebook learns from (see `VectorQuantizer.update`), or None.
    vectors_BTm1L: Of a LAM that learns by the dynamics model's loss, the actions' codes with their gradient.
    """

    actions_BTm1: jax.Array
    loss: jax.Array | float = 0.0
    codes: tuple[jax.Array, jax.Array] | None = None
    vectors_BTm1L: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TrueActions:
    """The dataset's own."""

    lam = None
    trainable = nnx.All(nnx.Param, PREDICTING)

    def actions_of(self, metadata: Metadata) -> dict[str, Any]:
        """The fields of a `DynamicsConfig` that say what the actions are.

        Raises:
          InputError: The dataset has none.
        """
        if not metadata.has_actions:
            raise InputError("`use_gt_actions`: the dataset has no actions; train a LAM instead")
        columns = metadata.action_columns
        return {
            "num_actions": metadata.num_actions,
            "action_values": tuple(len(column.values or ()) for column in columns),
            "action_mean": tuple(column.mean for column in columns),
            "action_scale": tuple(column.scale for column in columns),
        }

    def flops(self, num_frames: int) -> int:
        """Of a training step for one clip."""
        return 0

    def actions(self, world: World, batch: Batch, frames_BTHWC: jax.Array, train: bool) -> Acted:
        """The actions of clips whose frames are given too, in [0, 1]."""
        actions_BTm1 = batch.actions_BT[:, :-1]
        return Acted(actions_BTm1.astype(jnp.float32) if world.cfg.dynamics.action_values else actions_BTm1)


@dataclasses.dataclass(frozen=True)
class InferredActions:
    """Those that a trained LAM infers from the frames."""

    lam: LAMConfig
    trainable = nnx.All(nnx.Param, PREDICTING)

    def actions_of(self, metadata: Metadata) -> dict[str, Any]:
        return {"num_actions": self.lam.num_codes}

    def flops(self, num_frames: int) -> int:
        return flops.lam_infer(self.lam, num_frames)

    def actions(self, world: World, batch: Batch, frames_BTHWC: jax.Array, train: bool) -> Acted:
        return Acted(world.infer_actions(frames_BTHWC))


@dataclasses.dataclass(frozen=True)
class StoredActions(InferredActions):
    """Those that the same LAM inferred when the token dataset was made."""

    def flops(self, num_frames: int) -> int:
        return 0

    def actions(self, world: World, batch: Batch, frames_BTHWC: jax.Array, train: bool) -> Acted:
        return Acted(batch.latent_actions_BT[:, :-1].astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class LearnedActions:
    """Those of a LAM that is trained along; it shares no parameter with the dynamics model, and no gradient.

    commitment: Weight of the loss that holds latents near their codes.
    """

    lam: LAMConfig
    commitment: float
    trainable = nnx.All(nnx.Param, nnx.Any(PREDICTING, nnx.PathContains("lam")))

    def actions_of(self, metadata: Metadata) -> dict[str, Any]:
        """Raises InputError where the dataset has no frames to learn from."""
        if metadata.tokens:
            raise InputError("`data_dir`: without frames no LAM can be trained along; give `lam_checkpoint`")
        return {"num_actions": self.lam.num_codes}

    def flops(self, num_frames: int) -> int:
        return flops.lam_step(self.lam, num_frames)

    def actions(self, world: World, batch: Batch, frames_BTHWC: jax.Array, train: bool) -> Acted:
        assert world.lam
        out = world.lam(frames_BTHWC, train, batch.weight_BT)
        squares = jnp.square(out.next_frames_BTm1HWC - frames_BTHWC[:, 1:])
        error = mean_of_true(squares, after_first(batch.weight_BT))
        return Acted(out.actions_BTm1, error + self.commitment * out.commitment, (out.latents_BTm1L, out.actions_BTm1))


@dataclasses.dataclass(frozen=True)
class JointActions(LearnedActions):
    """Those of a LAM without a decoder: its encoder learns what helps the dynamics model to predict the next frame."""

    def actions_of(self, metadata: Metadata) -> dict[str, Any]:
        return super().actions_of(metadata) | {"action_width": self.lam.code_width}

    def flops(self, num_frames: int) -> int:
        return 3 * flops.lam_infer(self.lam, num_frames)

    def actions(self, world: World, batch: Batch, frames_BTHWC: jax.Array, train: bool) -> Acted:
        assert world.lam
        out = world.lam.act(frames_BTHWC, train, batch.weight_BT)
        return Acted(out.codes_X, self.commitment * out.commitment, (out.latents_XL, out.codes_X), out.vectors_XL)


ActionSource = TrueActions | InferredActions | LearnedActions
