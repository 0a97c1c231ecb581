"""Minari's datasets in HDF5: a group for each episode, with one observation more than there are actions.

    data/main_data.hdf5    episode_0/observations (T + 1, ...), actions (T, ...), rewards, terminations, truncations
    data/metadata.json     action_space, ...

Observations that are pictures are arrays, or a JPEG file each. The action at t leads from observation t to t + 1, as
here; the last observation has none.
"""

import dataclasses
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import InputError
from sources.actions import columns_of, counted, per_frame, typed_actions
from sources.images import decode_image
from sources.kind import DamageError, Episode, Header, choose_view, natural
from sources.layout import Layout, in_order, opened

JPEG = b"\xff\xd8"  # what its files begin with


class Minari(Layout):
    """A group is one episode."""

    def fits(self, file: Any) -> bool:
        return any(_is_episode(file, key) for key in file)

    def keys(self, path: Path, file: Any, camera: str) -> list[str]:
        keys = sorted((key for key in file if _is_episode(file, key)), key=natural)
        choose_view(str(path), _views(file[keys[0]]), camera)
        return keys

    def header(self, path: Path, file: Any, key: str, camera: str) -> Header:
        pictures = _pictures(path, file, key, camera)
        height, width = _rgb(f"{path}: {key}", pictures[0]).shape[:2]
        actions, names = _actions(path, file, key), None
        columns, space = columns_of(actions), _action_space(path)
        if space.get("type") == "Discrete" and not columns:
            names = counted(int(space["n"]))
        sizes = space["nvec"] if space.get("type") == "MultiDiscrete" else [2] * len(columns)
        if space.get("type") in ("MultiDiscrete", "MultiBinary") and len(sizes) == len(columns):
            columns = tuple(dataclasses.replace(c, values=counted(n)) for c, n in zip(columns, sizes, strict=True))
        return Header(len(pictures), height, width, has_actions=True, columns=columns, action_names=names)

    def open(self, path: Path, file: Any, key: str, camera: str, fps: Fraction) -> Episode:
        num_frames = len(_pictures(path, file, key, camera))
        actions, earned = _actions(path, file, key), file[key]["rewards"][()]
        if not len(actions) == len(earned) == num_frames - 1:
            raise InputError(
                f"{path}: {key} has {num_frames} observations, {len(actions)} actions and {len(earned)} rewards; "
                "expected one more observation"
            )
        return Episode(
            _frames(path, key, camera),
            per_frame(f"{path}: {key}/actions", actions, num_frames),
            np.append(earned, 0).astype(np.float32),
            between=frozenset({"actions", "rewards"}),
        )


def _is_episode(file: Any, key: str) -> bool:
    return key.startswith("episode_") and "observations" in file[key]


def _views(group: Any) -> dict[str, Any]:
    """Those of an episode's observations that are pictures.

    uint8 (T + 1, H, W, 3 or 1) or (T + 1, H, W); of JPEG files (T + 1,), or (T + 1, bytes) if all are equally long.
    """
    import h5py

    views: dict[str, Any] = {}

    def look(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and len(node):
            dtype = h5py.check_vlen_dtype(node.dtype) if node.ndim == 1 else node.dtype
            is_array = (node.ndim == 4 and node.shape[-1] in (1, 3)) or (node.ndim == 3 and min(node.shape[1:]) >= 16)
            if dtype == np.uint8 and (is_array or (node.ndim in (1, 2) and node[0][:2].tobytes() == JPEG)):
                views[name] = node

    observations = group["observations"]
    if isinstance(observations, h5py.Group):
        observations.visititems(look)
    else:
        look("observations", observations)
    return views


def _pictures(path: Path, file: Any, key: str, camera: str) -> Any:
    """The dataset of an episode's pictures."""
    views = _views(file[key])
    return views[choose_view(f"{path}: {key}", views, camera)]


def _rgb(where: str, value: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), of an array or of a file."""
    if value.ndim == 1:
        return decode_image(where, value.tobytes())
    value = value.reshape(*value.shape[:2], -1)
    return value.repeat(3, axis=-1) if value.shape[-1] == 1 else value


def _action_space(path: Path) -> dict[str, Any]:
    """What the metadata say of the actions; nothing where there are none."""
    beside = path.with_name("metadata.json")
    if not beside.is_file():
        return {}
    space = json.loads(beside.read_text()).get("action_space", {})
    return json.loads(space) if isinstance(space, str) else space


def _actions(path: Path, file: Any, key: str) -> np.ndarray:
    """Actions of the steps between observations."""
    node = file[key]["actions"]
    if not hasattr(node, "shape"):
        raise InputError(f"{path}: {key}: its actions are of several kinds ({', '.join(node)}); expected one array")
    values = node[()]
    start = _action_space(path).get("start", 0)
    return typed_actions(f"{path}: {key}: its actions", values - start if values.ndim == 1 and start else values)


def _frames(path: Path, key: str, camera: str) -> Iterator[np.ndarray]:
    with opened(path) as file:
        pictures = _pictures(path, file, key, camera)
        for number, value in enumerate(in_order(path, pictures, range(len(pictures)))):
            try:
                frame = _rgb(f"{path}: {key}: frame {number}", value)
            except InputError as error:
                raise (DamageError(f"{error}; the rest is left out") if number else error) from error
            yield frame
