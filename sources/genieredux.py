"""Sessions as GenieRedux generates them: pictures or a video, and the action that led to each frame.

    <set>/info.json
    <set>/000000/000000/frames/000000.jpg    or frames.mp4; an instance, a session of it, the frames
    <set>/000000/000000/actions.json         {"actions": [{"src_id": -1, "tgt_id": 0, "action": 3, ...}, ...]}

An entry names the frame `tgt_id` and the action that led there from the frame `src_id`. Here actions lead on from their
frame, so the action of a frame is that of the entry whose `src_id` it is.
"""

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from models.errors import InputError
from sources.actions import as_actions
from sources.images import pictures_in, read_image
from sources.kind import DamageError, Episode, Header, Kind
from sources.video import iterate_pictures, read_video_info

ACTIONS, VIDEO, FOLDER = "actions.json", "frames.mp4", "frames"


class GenieRedux(Kind):
    """The folder of a session. Its video has a rate of 1, which means nothing."""

    name = "genieredux"
    plural = "GenieRedux sessions"
    owns_folder = True
    knows_steps = True

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        has_frames = VIDEO in names or (folder / FOLDER).is_dir()
        return [folder] if ACTIONS in names and has_frames else []

    def header(self, path: Path) -> Header:
        if (path / VIDEO).is_file():
            info = read_video_info(path / VIDEO)
            num_frames, height, width, remarks = info.num_frames, info.height, info.width, info.remarks
        else:
            files = pictures_in(path / FOLDER)
            num_frames, (height, width), remarks = len(files), read_image(files[0]).shape[:2], ()
        return Header(num_frames, height, width, has_actions=True, is_guess=True, remarks=remarks)

    def open(self, path: Path, fps: Fraction) -> Episode:
        actions = _read_actions(path / ACTIONS)
        return Episode(_frames(path, len(actions)), actions, between=frozenset({"actions"}))


def _read_actions(path: Path) -> np.ndarray:
    """Actions (T,) that lead on from the frames 0 to T - 1; 0 for the last one, which none leads on from."""
    try:
        entries = json.loads(path.read_text())["actions"]
        leads_from = {entry["src_id"]: (entry["tgt_id"], entry["action"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    last = len(entries) - 1
    ways = [leads_from.get(t, (None, None)) for t in range(last)]
    wrong = next((t for t, (target, _) in enumerate(ways) if target != t + 1), None)
    if last < 1 or wrong is not None:
        lacks = f"has no action from frame {wrong} to {wrong + 1}" if wrong is not None else "has no actions"
        raise InputError(f"{path}: {lacks}")
    actions = as_actions(f"{path}: its actions", np.array([action for _, action in ways]))
    if actions.ndim > 1:
        raise InputError(f"{path}: its actions are not whole numbers")
    return np.append(actions, np.int32(0))


def _frames(path: Path, num_frames: int) -> Iterator[np.ndarray]:
    """The frames 0 to `num_frames` - 1, of which actions.json speaks."""
    count = 0
    frames = iterate_pictures(path / VIDEO) if (path / VIDEO).is_file() else _numbered(path / FOLDER)
    for count, frame in enumerate(frames, 1):
        if count > num_frames:
            raise DamageError(f"{path}: {ACTIONS} speaks of {num_frames} of its frames only; the rest is left out")
        yield frame
    if count < num_frames:
        raise DamageError(f"{path}: has {count} frames, but {ACTIONS} speaks of {num_frames}")


def _numbered(folder: Path) -> Iterator[np.ndarray]:
    """The pictures 000000.jpg, 000001.jpg, ..., up to the first that is missing or damaged."""
    for number, file in enumerate(pictures_in(folder)):
        try:
            if not (file.stem.isdecimal() and int(file.stem) == number):
                raise InputError(f"{folder}: {file.name} stands in the place of frame {number}")
            frame = read_image(file)
        except InputError as error:
            raise (DamageError(f"{error}; the rest of its folder is left out") if number else error) from error
        yield frame
