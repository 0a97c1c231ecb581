"""NumPy arrays as a source of frames: one episode in each .npy or .npz. Nothing is ever unpickled."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.kind import Episode, Header, Kind, episode_starts, files_ending, separated

ARRAY_SUFFIXES = (".npy", ".npz")
# What the arrays of an .npz are called, in order of preference: by Gymnasium, D4RL, Dreamer and others.
FRAME_KEYS = ("frames", "observations", "video", "arr_0")
ACTION_KEYS = ("actions", "action")
REWARD_KEYS = ("rewards", "reward")
LAST_KEYS = (  # true where an episode ends with this frame
    *("dones", "done", "terminals", "terminal", "terminated", "terminations"),
    *("truncated", "truncations", "timeouts", "is_last", "is_terminal"),
)
FIRST_KEYS = ("is_first",)  # true where one starts with it
MAX_ACTIONS = 4096  # a larger number in `actions` is not the index of a discrete action

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
        return files_ending(ARRAY_SUFFIXES, folder, [name for name in names if name != "metadata.npy"])

    def header(self, path: Path) -> Header:
        key, names = _frames_key(path)
        num_frames, height, width, _ = _array_shape(path, key)
        action, reward = _first_of(ACTION_KEYS, names), _first_of(REWARD_KEYS, names)
        unused = sorted(names - {key, action, reward, *LAST_KEYS, *FIRST_KEYS})
        remarks = (f"hold {', '.join(unused)}, which is not used",) if unused else ()
        return Header(num_frames, height, width, has_actions=action is not None, remarks=remarks)

    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens an episode: a .npy is mapped, an .npz is read at once."""
        key, names = _frames_key(path)
        num_frames = _array_shape(path, key)[0]
        action, reward = _first_of(ACTION_KEYS, names), _first_of(REWARD_KEYS, names)
        starts = set(episode_starts(path))
        try:
            if key is None:
                frames = np.load(path, mmap_mode="r", allow_pickle=False)
                return Episode(separated(_rgb_frames(path, frames), sorted(starts)))
            wanted = {key, action, reward, *LAST_KEYS, *FIRST_KEYS} & names
            with np.load(path, allow_pickle=False) as archive:
                given = {name: archive[name] for name in wanted if name}
        except _DAMAGED as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        for name in given.keys() & {*LAST_KEYS, *FIRST_KEYS}:
            marked = np.flatnonzero(_per_frame(path, name, given[name], num_frames))
            starts |= set((marked + 1 if name in LAST_KEYS else marked).tolist())
        actions = _discrete(path, action, given[action], num_frames, starts) if action else None
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


def _discrete(path: Path, name: str, values: np.ndarray, num_frames: int, starts: set[int]) -> np.ndarray:
    """Actions (T,) or (T, 1), whole numbers, or (T, A), one-hot, as int32 from 0.

    Args:
      starts: Frames with which an episode starts; in Dreamer's files the action that led there is a row of zeros.
    """
    if values.ndim == 2 and values.shape[1] > 1 and values.dtype.kind in "iufb":
        is_none = np.logical_not(values.any(axis=1, keepdims=True))[:, 0]
        is_none[[0, *(start for start in starts if start < len(values))]] = False
        one_hot = np.isin(values, (0, 1)).all() and (values.sum(axis=1) <= 1).all() and not is_none.any()
        if not one_hot:
            raise InputError(
                f"{path}: {name} have shape {values.shape} and are not one-hot; expected one discrete action per frame"
            )
        values = values.argmax(axis=1)
    actions = _per_frame(path, name, values, num_frames)
    whole = actions.dtype.kind in "iub" or (np.isfinite(actions).all() and (actions == np.rint(actions)).all())
    if not (whole and actions.min() >= 0 and actions.max() < MAX_ACTIONS):
        raise InputError(
            f"{path}: {name} are {actions.dtype} from {actions.min()} to {actions.max()}; expected whole "
            f"numbers from 0 to {MAX_ACTIONS - 1}, one for each discrete action"
        )
    return actions.astype(np.int32)


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
