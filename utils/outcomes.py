"""What came of the actions of a clip: rewards and ends, as a training takes them."""

from collections.abc import Sequence

import numpy as np

from models.ends import ENDED, GOES_ON, LOST, SOLVED, TIME_UP
from models.errors import InputError
from utils.records import Clip


def ends_of(clip: Clip) -> np.ndarray:
    """How the level ended with each action, uint8 (T,): `GOES_ON` and the other ways of `models.ends`.

    An end that only the clock made is `TIME_UP`: no picture tells it. Where the clip does not say whether its level was
    solved, an end is `ENDED`.
    """
    assert clip.terminated_T is not None
    way = ENDED if clip.success is None else SOLVED if clip.success else LOST
    ends_T = np.where(clip.terminated_T, way, GOES_ON)
    return (ends_T if clip.truncated_T is None else np.where(clip.truncated_T, TIME_UP, ends_T)).astype(np.uint8)


def lacking(clip: Clip, outcomes: Sequence[str]) -> str:
    """Which of the outcomes ("reward", "end") a clip does not tell, in words; empty if it tells them all."""
    held = {"reward": clip.rewards_T, "end": clip.terminated_T}
    names = {"reward": "rewards", "end": "ends (`terminated`)"}
    return " and no ".join(names[name] for name in outcomes if held[name] is None)


def expect_outcomes(clip: Clip, outcomes: Sequence[str], where: str) -> None:
    """Refuses a clip that does not tell them.

    Raises:
      InputError: It says which are missing.
    """
    if missing := lacking(clip, outcomes):
        raise InputError(
            f"`heads`: {where} has no {missing} to learn from; record a game (generate_dataset.py, sources.Recorder), "
            "or leave the heads out"
        )
