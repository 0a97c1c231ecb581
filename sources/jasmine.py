"""Records as Jasmine and its forerunners publish them: pickled dicts in ArrayRecord files.

    {train,val,test}/data_0000.array_record     a record: raw_video (bytes), sequence_length, perhaps actions (T,)
    metadata.json                               num_actions, ...

A record is a chunk of an episode; which chunks follow one another is not said, so each is read as an episode of its
own. `actions[t]` was taken at frame t, as here.

A pickle may name any function to be called. Here it reaches none: what it says of an array is noted, and the array is
made from that. Not even NumPy's own unpickling runs: with a dtype made for it, that would take bytes for pointers.
"""

import contextlib
import dataclasses
import io
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from models.errors import InputError
from sources.actions import as_actions, counted
from sources.kind import DamageError, Episode, Header, Kind, Told, files_ending
from utils.records import SPLITS

_ADMITTED = "bytes, strings, integers, dicts and NumPy arrays of numbers"
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_CODES = re.compile(r"[iu][1248]|f[248]|b1")


@dataclasses.dataclass(frozen=True)
class Jasmine(Kind):
    """A file of records.

    height, width: Of the frames, which the records do not say.
    """

    name = "jasmine"
    plural = "files of Jasmine's records"
    suffixes = (".array_record", "metadata.json")
    knows_steps = True
    height: int = 0
    width: int = 0

    def told(self, told: Told) -> Kind:
        return Jasmine(told.height or 0, told.width or 0)

    def check(self) -> None:
        if not (self.height and self.width):
            raise InputError(
                "`height` and `width`: Jasmine's records do not say the size of their frames; give both (CoinRun's are "
                "64×64, Minecraft's 90×160)"
            )

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        return files_ending(self.suffixes, folder, names)

    def header(self, path: Path) -> Header:
        with _opened(path) as records:
            frames, actions = self._chunk(path, records, 0)
            num_frames = len(records) * len(frames)
        num_actions = _metadata(path).get("num_actions")
        return Header(
            num_frames,
            self.height,
            self.width,
            has_actions=actions is not None,
            is_guess=True,
            action_names=counted(num_actions) if actions is not None and type(num_actions) is int else None,
            split=path.parent.name if path.parent.name in SPLITS else None,
        )

    def open(self, path: Path, fps: Fraction) -> Episode:
        """Opens a file. It is read twice: at once for the actions, then record by record for the frames."""
        actions: list[np.ndarray | None] = []
        with contextlib.suppress(DamageError):  # the frames will meet it again
            for _, actions_T in self._chunks(path):
                actions.append(actions_T)
        given = [actions_T for actions_T in actions if actions_T is not None]
        if given and len(given) < len(actions):
            raise InputError(f"{path}: {len(actions) - len(given)} of its {len(actions)} records have no actions")
        return Episode(self._frames(path), np.concatenate(given) if given else None)

    def _frames(self, path: Path) -> Iterator[np.ndarray | None]:
        for number, (frames_THWC, _) in enumerate(self._chunks(path)):
            if number:
                yield None
            yield from frames_THWC

    def _chunks(self, path: Path) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Frames and actions of each record, up to the first that is damaged."""
        with _opened(path) as records:
            for number in range(len(records)):
                try:
                    chunk = self._chunk(path, records, number)
                except InputError as error:
                    raise (DamageError(f"{error}; the rest is left out") if number else error) from error
                yield chunk

    def _chunk(self, path: Path, records: ArrayRecordDataSource, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Frames (T, H, W, 3), and actions (T,) or None, of one record."""
        where = f"{path}: record {number}"
        try:
            record = read_pickle(where, records[number])
        except InputError:
            raise
        except Exception as error:  # array_record's C++ errors, and a pickle's, have no common type
            raise InputError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error
        video, length = record.get("raw_video"), record.get("sequence_length")
        if not isinstance(video, bytes) or not isinstance(length, int) or length < 1:
            raise InputError(f"{where}: holds {', '.join(record)}; expected raw_video and sequence_length")
        if len(video) != length * self.height * self.width * 3:
            raise InputError(
                f"{where}: {len(video)} bytes are not {length} frames of {self.height}×{self.width}; `height` and "
                "`width` must be those of the records"
            )
        frames_THWC = np.frombuffer(video, np.uint8).reshape(length, self.height, self.width, 3)
        if (given := record.get("actions")) is None:
            return frames_THWC, None
        if not isinstance(given, np.ndarray) or len(given) != length:
            raise InputError(f"{where}: actions of shape {np.shape(given)}; expected {length}")
        actions = as_actions(f"{where}: actions", given)
        if actions.dtype != np.int32 or actions.ndim > 1:
            raise InputError(f"{where}: actions are {given.dtype} of shape {given.shape}; expected whole numbers (T,)")
        return frames_THWC, actions


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[ArrayRecordDataSource]:
    """The records of a file, of which there are some."""
    try:
        source: ArrayRecordDataSource = ArrayRecordDataSource([str(path)])
        found = len(source)
    except Exception as error:  # array_record's C++ errors have no common type
        raise InputError(f"{path}: not a readable ArrayRecord file ({error})") from error
    if not found:
        raise InputError(f"{path}: has no records")
    with source:
        yield source


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata.json that lies beside a file or above its folder; empty without one."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "metadata.json").is_file():
            fields = json.loads((folder / "metadata.json").read_text())
            return fields if isinstance(fields, dict) else {}
    return {}


class _Dtype:
    """What a pickle says of a dtype."""

    def __init__(self, code: str, *_: Any):
        if not (isinstance(code, str) and _CODES.fullmatch(code)):
            raise InputError(f"an array of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise InputError(f"an array of byte order {state[1]!r}")
        self.order = state[1]


class _Array:
    """What a pickle says of an array, and the array made from that."""

    value: np.ndarray

    def __init__(self, *_: Any):
        """The shape and the type of a new array follow with its state."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise InputError("an array that is not of numbers")
        values = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        self.value = values.reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Makes what pickle makes without a name, and `_Array`; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("numpy", "ndarray") or (name == "_reconstruct" and module in _NUMPY):
            return _Array
        raise InputError(f"the name {module}.{name}")


def read_pickle(where: str, data: bytes) -> dict[str, Any]:
    """Reads a pickled dict without running anything in it.

    Args:
      where: For messages.

    Raises:
      InputError: It holds anything but `_ADMITTED`. Damage raises whatever it raises.
    """
    try:
        value = _checked(_Unpickler(io.BytesIO(data)).load())
    except InputError as error:
        raise InputError(f"{where}: holds {error}; only {_ADMITTED} are read") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {type(value).__name__}; expected a dict")
    return value


def _checked(value: Any) -> Any:
    """The value with arrays in the place of what was noted of them, if it holds nothing else."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _checked(inner) for key, inner in value.items()}
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, bytes | str | int):
        raise InputError(type(value).__name__)
    return value
