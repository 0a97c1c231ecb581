"""From what was played to clips: where levels end, how they ended, and how they are cut."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sources.environment import Recording
from utils.records import Clip


class Level(NamedTuple):
    """One level of an episode: the time steps from begin to end.

    ended: Whether it came to its end, rather than the recording.
    success: Whether it was solved; None where it did not end, or it is not told.
    """

    begin: int
    end: int
    ended: bool
    success: bool | None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of the levels that came to their end.

    ended: How many there were.
    solved: How many of them were solved; None where that is not told.
    rewards: The sum of all that was earned in them.
    """

    ended: int = 0
    solved: int | None = None
    rewards: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """As `Metadata.levels` has it."""
        mean = round(self.rewards / self.ended, 4) if self.ended else None
        return {"ended": self.ended, "solved": self.solved, "rewards": mean}


def describe(levels: dict[str, Any]) -> str:
    """`Metadata.levels` in words."""
    if not levels.get("ended"):
        return "no level came to its end"
    solved = "" if levels["solved"] is None else f", {levels['solved'] / levels['ended']:.1%} solved"
    return f"{levels['ended']:,} levels came to their end{solved}, {levels['rewards']:,.2f} earned in each"


def total(outcomes: Iterable[Outcomes]) -> Outcomes:
    """All of them together."""
    outcomes = list(outcomes)
    solved = [each.solved for each in outcomes if each.solved is not None]
    return Outcomes(
        sum(each.ended for each in outcomes),
        sum(solved) if solved else None,
        round(sum(each.rewards for each in outcomes), 3),
    )


def levels_of(played: Recording, episode: int) -> Iterator[Level]:
    """The levels of one of the episodes, one after the other."""
    first_T = played.first_BT[episode]
    ends = [flags[episode] for flags in (played.terminated_BT, played.truncated_BT) if flags is not None]
    final = lambda end: any(bool(flags_T[end - 1]) for flags_T in ends)
    for begin, end in itertools.pairwise([*np.flatnonzero(first_T).tolist(), len(first_T)]):
        ended = final(end) if ends else end < len(first_T)
        told = ended and played.success_BT is not None
        yield Level(begin, end, ended, bool(played.success_BT[episode, end - 1]) if told else None)  # type: ignore[index]


def outcomes_of(played: Recording) -> Outcomes:
    """What became of the levels of all episodes."""
    ended = [(i, level) for i in range(len(played.first_BT)) for level in levels_of(played, i) if level.ended]
    return Outcomes(
        ended=len(ended),
        solved=None if played.success_BT is None else sum(bool(level.success) for _, level in ended),
        rewards=float(sum(played.rewards_BT[i, level.begin : level.end].sum(dtype=np.float64) for i, level in ended)),
    )


def cut(begin: int, end: int, clip_length: int, min_clip_length: int) -> Iterator[tuple[int, int]]:
    """Cuts a level into clips: pairs (begin, end).

    The last one reaches back over frames of the one before it, so that it is of full length and ends where the level
    does. A level that is shorter than a clip is one, if it is not shorter than `min_clip_length`.
    """
    for start in range(begin, end, clip_length):
        stop = min(start + clip_length, end)
        start = max(begin, stop - clip_length)
        if stop - start >= min_clip_length:
            yield start, stop


def clips_of(
    played: Recording, episode: int, name: str, clip_length: int, min_clip_length: int, only_solved: bool = False
) -> Iterator[Clip]:
    """Cuts one of the episodes into clips, called after its name, that lie within one level each."""

    def part(values_BT: np.ndarray | None, begin: int, end: int) -> np.ndarray | None:
        return None if values_BT is None else values_BT[episode, begin:end]

    for level in levels_of(played, episode):
        if only_solved and not level.success:
            continue
        for begin, end in cut(level.begin, level.end, clip_length, min_clip_length):
            yield Clip(
                frames_THWC=part(played.frames_BTHWC, begin, end),
                clip_id=f"{name}/step{begin:03d}",
                actions_T=part(played.actions_BT, begin, end),
                rewards_T=part(played.rewards_BT, begin, end),
                level_seed=None if played.levels_BT is None else int(played.levels_BT[episode, begin]),
                terminated_T=part(played.terminated_BT, begin, end),
                truncated_T=part(played.truncated_BT, begin, end),
                success=level.success,
            )
