"""What is played: pictures that actions lead on, whoever draws them; the page shows up to three side by side."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from models.sampling import SamplingConfig


class Request(NamedTuple):
    """The next frame of one game: after `state`, by `action`; of a world with the randomness of `seed`.

    state: A world's is of batch size 1.
    action, seed: Integers, int32 scalars on the device; where an action has columns, it is a row of float32.
    """

    state: Any
    action: Any
    seed: Any
    cfg: SamplingConfig


class Prompts(NamedTuple):
    """Frames to start from.

    frames_PHWC: uint8.
    levels_P: Numbers of the real game's levels that begin with them; None of frames from elsewhere.
    """

    frames_PHWC: np.ndarray
    levels_P: list[int] | None = None


class Screen(Protocol):
    """Draws the frames of several games.

    frame_shape: (H, W, C).
    """

    @property
    def frame_shape(self) -> tuple[int, int, int]: ...

    def warm_up(self, cfg: SamplingConfig) -> None:
        """Does whatever takes long the first time."""

    async def start(self, frame_HWC: np.ndarray, level: int | None = None) -> Any:
        """The state after one prompt frame, uint8 and of the right shape.

        Args:
          level: Of the real game, which begins with it; None where there is none.
        """

    async def step(self, request: Request) -> tuple[np.ndarray, Any]:
        """The next frame (H, W, C), uint8, and the state after it."""

    def end(self, state: Any) -> str:
        """How a game has ended that has come to this state, in words; empty while it goes on."""

    async def serve(self) -> None:
        """Answers requests until it is cancelled."""
