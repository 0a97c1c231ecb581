"""Robots' episodes as LeRobot publishes them, versions 2 and 3: tables in parquet files, and a video for each camera.

    meta/info.json       codebase_version, fps, total_episodes, features, where the files are
    v2.0, v2.1           data/chunk-000/episode_000000.parquet, videos/chunk-000/<camera>/episode_000000.mp4
    v3.0                 several episodes in one file of each; meta/episodes/ says where each one begins and ends

`action` at a frame is what was commanded there, so it leads on from it, as here. pyarrow is imported where it is used.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from sources.actions import columns_of, typed_actions
from sources.images import decode_image
from sources.kind import DamageError, Episode, Header, Kind, Told, choose_view, natural, need
from sources.video import iterate_pictures
from utils.actions import ActionColumn

INFO = "meta/info.json"
_PATHS = {  # where info.json does not say
    2: (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    3: (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}


@dataclasses.dataclass(frozen=True)
class LeRobot(Kind):
    """An episode of a dataset; it has no file of its own, so its path is made up: <dataset>/episode_000012.

    camera: Which of several to take, by its name or the end of that.
    """

    name = "lerobot"
    plural = "LeRobot episodes"
    owns_folder = True
    knows_steps = True
    camera: str = ""

    def told(self, told: Told) -> Kind:
        return LeRobot(told.camera)

    def check(self) -> None:
        need("pyarrow", self.plural)

    def detect(self, folder: Path, names: Sequence[str]) -> list[Path]:
        if not (folder / INFO).is_file():
            return []
        try:
            info = _read_info(folder)
        except InputError:
            return [folder / "episode_000000"]  # which says what is wrong
        self._camera(info)
        return [folder / f"episode_{number:06d}" for number in range(info.num_episodes)]

    def header(self, path: Path) -> Header:
        info, number = _read_info(path.parent), _number(path)
        feature = info.features[self._camera(info)]
        shape, names = feature["shape"], feature.get("names") or ("height", "width", "channels")
        sides = {"height": 0, "width": 1} | {name: i for i, name in enumerate(names) if name in ("height", "width")}
        return Header(
            _episode_rows(path.parent)[number]["length"],
            shape[sides["height"]],
            shape[sides["width"]],
            info.fps,
            has_actions="action" in info.features,
            columns=_columns(info),
        )

    def open(self, path: Path, fps: Fraction) -> Episode:
        info, number = _read_info(path.parent), _number(path)
        camera = self._camera(info)
        row = _episode_rows(path.parent)[number]
        table = _read_rows(path, info, row, camera)
        actions = None
        if "action" in table:
            kind = np.dtype(info.features["action"]["dtype"])
            actions = typed_actions(f"{path}: action", np.array(table["action"], kind))
        rewards = None
        if "next.reward" in table:
            rewards = np.array(table["next.reward"], np.float32).reshape(-1)
        if camera in table:  # pictures in the table itself
            return Episode(_from_table(path, table[camera]), actions, rewards)
        return Episode(_from_video(path, info, row, camera), actions, rewards)

    def _camera(self, info: "Info") -> str:
        """Name of the feature that is to be the frames."""
        views = [name for name, feature in info.features.items() if feature["dtype"] in ("video", "image")]
        return choose_view(str(info.root), views, self.camera)


class Info(NamedTuple):
    """What meta/info.json says.

    version: 2 or 3.
    paths: Of tables and of videos, with fields to be filled in.
    """

    root: Path
    version: int
    fps: Fraction
    num_episodes: int
    chunk_size: int
    features: dict[str, dict[str, Any]]
    paths: tuple[str, str]

    def file(self, which: int, row: dict[str, Any], video_key: str = "") -> Path:
        """Where an episode's table (0) or video (1) is, by what meta/episodes says of it."""
        number = row["episode_index"]
        fields: dict[str, Any] = {"episode_index": number, "episode_chunk": number // self.chunk_size}
        if self.version == 3:
            of = f"videos/{video_key}" if which else "data"
            fields = {name: row[f"{of}/{name}"] for name in ("chunk_index", "file_index")}
        return self.root / self.paths[which].format(**fields, video_key=video_key)


@functools.lru_cache(maxsize=8)
def _read_info(root: Path) -> Info:
    path = root / INFO
    try:
        fields = json.loads(path.read_text())
        version = int(str(fields["codebase_version"]).lstrip("v").split(".")[0])
        if version not in _PATHS:
            raise InputError(f"{path}: LeRobot version {fields['codebase_version']}; expected 2 or 3")
        table, video = _PATHS[version]
        return Info(
            root,
            version,
            Fraction(str(fields["fps"])),
            int(fields["total_episodes"]),
            int(fields.get("chunks_size") or 1000),
            {name: {"dtype": "", "shape": ()} | feature for name, feature in fields["features"].items()},
            (fields.get("data_path") or table, fields.get("video_path") or video),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _number(path: Path) -> int:
    return int(path.name.removeprefix("episode_"))


@functools.lru_cache(maxsize=8)
def _episode_rows(root: Path) -> dict[int, dict[str, Any]]:
    """What is said of each episode, by its number."""
    rows: list[dict[str, Any]] = []
    if _read_info(root).version == 2:
        lines = (root / "meta/episodes.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    else:
        import pyarrow.parquet

        for file in sorted((root / "meta/episodes").glob("*/*.parquet"), key=lambda file: natural(str(file))):
            schema = pyarrow.parquet.read_schema(file)
            wanted = ("episode_index", "length")
            names = [name for name in schema.names if name in wanted or name.startswith(("data/", "videos/"))]
            rows += pyarrow.parquet.read_table(file, columns=names).to_pylist()
    return {row["episode_index"]: row for row in rows}


def _columns(info: Info) -> tuple[ActionColumn, ...]:
    """What the columns of an action are called."""
    if "action" not in info.features:
        return ()
    feature = info.features["action"]
    width, names = feature["shape"][0], feature.get("names")
    if isinstance(names, dict):  # by groups, for instance {"motors": [...]}
        names = [name for group in names.values() for name in group]
    example = typed_actions(f"{info.root}: action", np.zeros((1, width), np.dtype(feature["dtype"])))
    return columns_of(example, names if names and len(names) == width else ())


def _read_rows(path: Path, info: Info, row: dict[str, Any], camera: str) -> dict[str, list[Any]]:
    """The columns of an episode's table that are used, in the order of its frames."""
    import pyarrow.parquet

    file, number = info.file(0, row), row["episode_index"]
    wanted = ["frame_index", "action", "next.reward", *([camera] if info.features[camera]["dtype"] == "image" else [])]
    present = pyarrow.parquet.read_schema(file).names
    table = pyarrow.parquet.read_table(
        file, columns=[name for name in wanted if name in present], filters=[("episode_index", "=", number)]
    ).sort_by("frame_index")
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if columns["frame_index"] != list(range(row["length"])):
        raise InputError(
            f"{path}: {file.name} has {table.num_rows} rows of it; expected frames 0 to {row['length'] - 1}"
        )
    return columns


def _from_table(path: Path, values: list[dict[str, Any]]) -> Iterator[np.ndarray]:
    """Pictures that the table holds as files."""
    for number, value in enumerate(values):
        try:
            yield decode_image(f"{path}: frame {number}", value["bytes"])
        except InputError as error:
            raise (DamageError(f"{error}; the rest is left out") if number else error) from error


def _from_video(path: Path, info: Info, row: dict[str, Any], camera: str) -> Iterator[np.ndarray]:
    """The pictures of an episode: all of a video, or those between two times."""
    file, length, start = info.file(1, row, camera), row["length"], 0
    if info.version == 3:
        begin_s, end_s = (row[f"videos/{camera}/{name}_timestamp"] for name in ("from", "to"))
        start = round(begin_s * info.fps)
        if round(end_s * info.fps) - start != length:
            raise InputError(
                f"{path}: {begin_s:g} to {end_s:g} seconds of its video are not {length} frames at {float(info.fps):g} "
                "per second"
            )
    pictures = iterate_pictures(file, start / info.fps, info.fps)
    count = 0
    for frame in islice(pictures, length):
        yield frame
        count += 1
    if count < length or (info.version == 2 and next(pictures, None) is not None):
        held = count if count < length else f"more than {length}"
        raise DamageError(f"{path}: {file.name} has {held} pictures of it; expected {length}, one for each action")
