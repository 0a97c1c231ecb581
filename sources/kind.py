"""What a kind of source is: videos, arrays, folders of pictures. `sources/registry.py` has the table of all kinds."""

import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from models.errors import InputError
from utils.actions import ActionColumn

STARTS_SUFFIX = ".episodes.json"


class DamageError(InputError):
    """The rest of an episode cannot be read, or not be trusted; the frames before are good."""


class ChoiceError(InputError):
    """The user must choose, for all sources alike: nothing can be read before."""


class Header(NamedTuple):
    """What can be known of an episode without reading all of it.

    num_frames: At the rate `fps`.
    fps: Frames per second, exactly; None for sources that have no rate.
    has_actions: Whether it holds an action for each frame.
    is_guess: Whether `num_frames` may be wrong; 0 is then "unknown".
    remarks: What a dataset of it leaves out or changes, each as it can stand after "3 of 10 videos: ".
    columns: Of actions beyond one integer; a discrete column with no values is one whose values are to be counted.
    action_names: Of the actions 0, 1, ..., where the source knows how many there are; else they are counted.
    split: "train", "val" or "test" where whoever published the source has put it there.
    """

    num_frames: int
    height: int
    width: int
    fps: Fraction | None = None
    has_actions: bool = False
    is_guess: bool = False
    remarks: tuple[str, ...] = ()
    columns: tuple[ActionColumn, ...] = ()
    action_names: tuple[str, ...] | None = None
    split: str | None = None


class Episode(NamedTuple):
    """An episode that has been opened, or several that follow one another.

    frames: One at a time, uint8 RGB (H, W, 3); None between the frames of two episodes.
    actions_T: int32 from 0, or None; `actions_T[t]` leads from frame t to frame t + 1. Beyond one integer (T, A), int32
      or float32, with a column for each of the header's.
    rewards_T: float32 or None; `rewards_T[t]` was earned by the action at t.
    between: Which of "actions" and "rewards" the source has one less of than frames, so that they lie between frames
      whatever convention the source follows.
    """

    frames: Iterable[np.ndarray | None]
    actions_T: np.ndarray | None = None
    rewards_T: np.ndarray | None = None
    between: frozenset[str] = frozenset()


class Told(NamedTuple):
    """What the user says of sources that do not say it themselves.

    height, width: Of the frames; None where nothing was said.
    camera: Which of several views of an episode to take; empty for the only one.
    """

    height: int | None = None
    width: int | None = None
    camera: str = ""


class Kind(ABC):
    """One kind of source. Errors of a single source are `InputError`s that name its path: it is skipped.

    name: What --source calls it.
    plural: What messages call several of them, for instance "videos".
    suffixes: What the names of the files that it reads end in, in lower case; other files are counted as passed over.
    owns_folder: Whether all that lies below a folder in which it has detected something belongs to it.
    knows_steps: Whether its files always say which frame an action leads from, so that --actions_lead_to cannot be.
    """

    name: ClassVar[str]
    plural: ClassVar[str]
    suffixes: ClassVar[Sequence[str]] = ()
    owns_folder: ClassVar[bool] = False
    knows_steps: ClassVar[bool] = False

    def told(self, told: Told) -> "Kind":
        """The kind that knows what the user says; most have no use for it."""
        return self

    def check(self) -> None:  # noqa: B027 (most have nothing to refuse)
        """Called once, before sources of this kind are read.

        Raises:
          InputError: A package is missing, or something that the sources do not say.
        """

    @abstractmethod
    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        """The episodes of this kind in a folder: files of it, or the folder itself, or names below these (`file.h5/3`).

        Args:
          names: Of the files in the folder itself, without hidden ones and those that an earlier kind has taken.
        """

    @abstractmethod
    def header(self, path: Path) -> Header:
        """Reads what an episode says of itself, or its first frame.

        Raises:
          InputError: It cannot be read, or not be used.
        """

    @abstractmethod
    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens an episode; its frames are read as they are asked for, where the format allows it.

        Args:
          fps: Rate of the dataset. Where `header` gives a rate, frames must be resampled to this one.

        Raises:
          InputError: It cannot be read; also while frames are being asked for.
          DamageError: While frames are being asked for: those given so far are good and may be kept.
        """


def need(package: str, what: str) -> None:
    """Refuses to go on without an optional package.

    Raises:
      InputError: It is not installed; the message names the command that does it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} are read with the package {package}, which is not installed; run make reader-deps")


def choose_view(where: str, views: Collection[str], camera: str) -> str:
    """The view of an episode that the user has named, by its name or the end of it; the only one if nothing was named.

    Raises:
      ChoiceError: None fits, or more than one.
    """
    fitting = [view for view in views if view == camera] or [view for view in views if view.endswith(camera)]
    if len(fitting) == 1:
        return fitting[0]
    held = f"it has {', '.join(views)}" if views else "it has no pictures"
    raise ChoiceError(f"{where}: {held}; choose one with `camera`" if views else f"{where}: {held}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into an InputError that names the source, so that one ends no conversion."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # libav, pillow, numpy, zipfile, ...: their errors have no common type
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def files_ending(suffixes: Sequence[str], folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the files in a folder that have one of the suffixes, in upper or lower case."""
    return [folder / name for name in names if Path(name).suffix.lower() in suffixes]


_NUMBER = re.compile(r"(?<![0-9A-Za-z)\].])-?\d+(?:\.\d+)?(?!\.?\d)|\d+")


def natural(name: str) -> tuple[list[tuple[float, str]], str]:
    """A key that sorts numbers in names by value: 2 before 10, -1 before 0, 0.25 before 0.5.

    A minus or a point is part of a number only where nothing but it can be meant: in "t_-3" and "0.5", not in "a-3",
    "take7.12" or "1.2.3".
    """
    key: list[tuple[float, str]] = []
    end = 0
    for match in _NUMBER.finditer(name):
        key += [(float("inf"), name[end : match.start()]), (float(match.group()), "")]
        end = match.end()
    return [*key, (float("inf"), name[end:])], name


def pattern(name: str) -> str:
    """A name with its numbers left open: equal for the pictures of one sequence."""
    return _NUMBER.sub("#", name.rpartition(".")[0]) + Path(name).suffix.lower().replace(".jpeg", ".jpg")


def episode_starts(path: Path) -> list[int]:
    """Where the episodes of a file, or of a folder of pictures, start: the list in `<name>.episodes.json` beside it.

    Returns:
      Numbers of frames, ascending; empty without such a file.

    Raises:
      InputError: The file holds something else.
    """
    for name in (path.name, path.stem):
        beside = path.with_name(name + STARTS_SUFFIX)
        if beside.is_file():
            break
    else:
        return []
    try:
        starts = json.loads(beside.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {beside.name} cannot be read ({error})") from error
    whole = isinstance(starts, list) and all(type(start) is int and start >= 0 for start in starts)
    if not whole or sorted(set(starts)) != starts:
        raise InputError(f"{path}: {beside.name} must hold the numbers of first frames, ascending, like [0, 120, 300]")
    return starts


def separated(frames: Iterable[np.ndarray], starts: Sequence[int]) -> Iterator[np.ndarray | None]:
    """Frames with None before each frame that starts a further episode."""
    first = set(starts)
    for number, frame in enumerate(frames):
        if number in first and number:
            yield None
        yield frame
