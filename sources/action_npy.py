"""Videos with their actions in an array beside them: any.mp4 and any.action.npy."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from models.errors import InputError
from sources.actions import as_actions, columns_of, per_frame
from sources.arrays import BESIDE_VIDEO
from sources.kind import Episode, Header, Kind, episode_starts, files_ending, separated
from sources.video import VIDEO_SUFFIXES, Video, count_pictures, iterate_pictures


class ActionNpy(Kind):
    """A video with an action for each picture, which leads on from it, or to it (--actions_lead_to)."""

    name = "action_npy"
    plural = "videos with an .action.npy"
    suffixes = (BESIDE_VIDEO,)

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        beside = set(names)
        return [path for path in files_ending(VIDEO_SUFFIXES, folder, names) if f"{path.stem}{BESIDE_VIDEO}" in beside]

    def header(self, path: Path) -> Header:
        return Video().header(path)._replace(has_actions=True, columns=columns_of(_actions(path)))

    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens a video, which is decoded once before, to know whether there is an action for the last picture."""
        given, num_frames = _actions(path), count_pictures(path)
        actions = per_frame(f"{_beside(path)}: actions", given, num_frames)
        between = frozenset({"actions"} if len(given) < num_frames else ())
        frames: Iterator[np.ndarray | None] = separated(iterate_pictures(path), episode_starts(path))
        return Episode(frames, actions, between=between)


def _beside(path: Path) -> Path:
    return path.with_name(path.stem + BESIDE_VIDEO)


def _actions(path: Path) -> np.ndarray:
    """All the actions of a video."""
    beside = _beside(path)
    try:
        values = np.load(beside, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{beside}: cannot be read ({error})") from error
    return as_actions(f"{beside}: actions", values)
