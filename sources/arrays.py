"""NumPy arrays as a source of frames: one episode in each .npy or .npz. Nothing is ever unpickled."""

import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.actions import as_actions, columns_of, per_frame
from sources.kind import Episode, Header, Kind, episode_starts, files_ending, separated
from utils.actions import ActionColumn

ARRAY_SUFFIXES = (".npy", ".npz")
BESIDE_VIDEO = ".action.npy"  # holds the actions of a video of that name, and no frames
# What the arrays of an .npz are called, in order of preference: by Gymnasium, D4RL, Dreamer and others.
FRAME_KEYS = ("frames", "observations", "video", "arr_0")
ACTION_KEYS = ("actions", "action")
REWARD_KEYS = ("rewards", "reward")
LAST_KEYS = (  # true where an episode ends with this frame
    *("dones", "done", "terminals", "terminal", "terminated", "terminations"),
    *("truncated", "truncations", "timeouts", "is_last", "is_terminal"),
)
FIRST_KEYS = ("is_first",)  # true where one starts with it

# What reading a damaged .npy or .npz raises.
_DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


class Arrays(Kind):
    """Frames (T, H, W, 3) or (T, H, W, 1), uint8 or floats in [0, 1]; .npz may hold actions, rewards and ends too."""

    name = "npy"
    plural = "arrays"
    suffixes = ARRAY_SUFFIXES

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        if "metadata.npy" in names:
            path = folder / "metadata.npy"
            print(f"{path}: not read; Jafar keeps a pickle there, which could run code, and it is not needed")
        others = [name for name in names if name != "metadata.npy" and not name.lower().endswith(BESIDE_VIDEO)]
        return files_ending(ARRAY_SUFFIXES, folder, others)

    def header(self, path: Path) -> Header:
        key, names = _frames_key(path)
        num_frames, height, width, _ = _array_shape(path, key)
        action, reward = _first_of(ACTION_KEYS, names), _first_of(REWARD_KEYS, names)
        unused = sorted(names - {key, action, reward, *LAST_KEYS, *FIRST_KEYS})
        remarks = (f"hold {', '.join(unused)}, which is not used",) if unused else ()
        columns: tuple[ActionColumn, ...] = ()
        if action:
            given = _read(path, names & {action, *LAST_KEYS, *FIRST_KEYS})
            columns = columns_of(as_actions(f"{path}: {action}", given[action], _starts(path, given, num_frames)))
        return Header(num_frames, height, width, has_actions=action is not None, remarks=remarks, columns=columns)

    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens an episode: a .npy is mapped, an .npz is read at once."""
        key, names = _frames_key(path)
        num_frames = _array_shape(path, key)[0]
        action, reward = _first_of(ACTION_KEYS, names), _first_of(REWARD_KEYS, names)
        if key is None:
            with _readable(path):
                frames = np.load(path, mmap_mode="r", allow_pickle=False)
            return Episode(separated(_rgb_frames(path, frames), episode_starts(path)))
        given = _read(path, names & {key, action, reward, *LAST_KEYS, *FIRST_KEYS})
        starts = _starts(path, given, num_frames)
        actions = None
        if action:
            actions = per_frame(f"{path}: {action}", as_actions(f"{path}: {action}", given[action], starts), num_frames)
        rewards = _per_frame(path, reward, given[reward], num_frames) if reward else None
        short = {
            "actions": actions is not None and len(given[action]) < num_frames,  # type: ignore[index]
            "rewards": rewards is not None and len(given[reward]) < num_frames,  # type: ignore[index]
        }
        return Episode(
            separated(_rgb_frames(path, given[key]), sorted(starts)),
            actions,
            None if rewards is None else rewards.astype(np.float32),
            between=frozenset(name for name in short if short[name]),
        )


def _first_of(keys: Sequence[str], names: set[str]) -> str | None:
    return next((key for key in keys if key in names), None)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what cannot be read."""
    try:
        yield
    except _DAMAGED as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _read(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Some of the arrays of an .npz."""
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names}


def _starts(path: Path, given: dict[str, np.ndarray], num_frames: int) -> set[int]:
    """The frames with which an episode starts, by a list beside the file and by what the arrays mark."""
    starts = set(episode_starts(path))
    for name in given.keys() & {*LAST_KEYS, *FIRST_KEYS}:
        marked = np.flatnonzero(_per_frame(path, name, given[name], num_frames))
        starts |= set((marked + 1 if name in LAST_KEYS else marked).tolist())
    return starts


def _frames_key(path: Path) -> tuple[str | None, set[str]]:
    """Where an array file holds its frames, None for .npy, and the names of all its arrays."""
    if path.suffix.lower() == ".npy":
        return None, set()
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGED as error:
        raise InputError(f"{path}: not an .npz file ({error})") from error
    key = next((key for key in FRAME_KEYS if key in names), None)
    if key is None:
        raise InputError(f"{path}: holds {sorted(names)}; expected frames under one of {', '.join(FRAME_KEYS)}")
    return key, names


def _array_shape(path: Path, key: str | None) -> tuple[int, ...]:
    """The shape of the frames of an array file, from its header alone, if they can be used."""
    try:
        if key is None:
            with open(path, "rb") as file:
                shape, dtype = _array_header(file)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
                shape, dtype = _array_header(member)
    except _DAMAGED as error:
        raise InputError(f"{path}: not a NumPy array file ({error})") from error
    if dtype.hasobject:
        raise InputError(f"{path}: holds Python objects, that is a pickle, which could run code; save uint8 frames")
    if dtype != np.uint8 and dtype.kind != "f":
        raise InputError(f"{path}: frames are {dtype}; expected uint8, or floats in [0, 1]")
    if len(shape) != 4 or shape[-1] not in (1, 3):
        hint = "; transpose them" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise InputError(f"{path}: frames have shape {shape}; expected (T, H, W, 3) or (T, H, W, 1){hint}")
    if min(shape) <= 0:
        raise InputError(f"{path}: frames have shape {shape}, which is empty")
    return shape


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type from the header of a .npy stream; executes nothing."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _rgb_frames(path: Path, frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
    """Frames of an array as uint8 RGB."""
    for t in range(len(frames_THWC)):
        frame = np.asarray(frames_THWC[t])
        if frame.dtype != np.uint8:
            low, high = frame.min(), frame.max()
            if not (low >= 0 and high <= 1):  # also refuses NaN
                raise InputError(f"{path}: frame {t} has floats from {low} to {high}; expected [0, 1], or save uint8")
            frame = np.rint(frame.astype(np.float32) * 255).astype(np.uint8)
        yield frame.repeat(3, axis=-1) if frame.shape[-1] == 1 else frame


def _per_frame(path: Path, name: str, values: np.ndarray, num_frames: int) -> np.ndarray:
    """One value per frame; a missing last one becomes 0."""
    if values.dtype.kind not in "iufb":
        raise InputError(f"{path}: {name} are {values.dtype}; expected numbers")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or len(values) not in (num_frames - 1, num_frames):
        raise InputError(f"{path}: {name} have shape {values.shape}; expected {num_frames} or {num_frames - 1} values")
    return np.pad(values, (0, num_frames - len(values)))
