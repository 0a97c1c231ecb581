"""Writes a dataset of clips from a loop of one's own: `from sources import Recorder`."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError
from sources.actions import Seen, Space, described, seen
from sources.levels import Outcomes, total
from utils.actions import ActionColumn
from utils.records import SPLITS, Clip, Metadata, Shard, write_metadata, write_shard

SHARD_BYTES = 2**26  # raw frames in one file


class Step(NamedTuple):
    """One time step of an episode."""

    frame_HWC: np.ndarray
    action: int | np.ndarray | None
    reward: float
    terminated: bool
    truncated: bool


class Recorder:
    """Records what is played elsewhere, one time step after the other.

        recorder = Recorder("data/mine", action_names=("LEFT", "RIGHT"))
        recorder.step(frame, action, reward, done)  # what was seen, what was done then, what it earned, was it the last
        recorder.close()

    Whole episodes are divided among the splits: the second one is for validation, the third one for testing, then each
    1 / fraction-th. Without `close` there is no dataset; as a context manager the recorder closes itself.

    Args:
      folder: Of the new dataset; it must be empty, or not exist.
      action_names: Of the actions 0, 1, ...; None where `step` is given no actions, or rows.
      action_columns: Names of what an action says that is a row, of integers from 0 or of real numbers.
      environment: What is played, for the metadata; by default the folder's name.
      fps: Frames per second at which it plays naturally.
      same_actions: Names of actions that always do what another one does, each with the other one's name.
      idle_action: Name of the action that does nothing.
      clip_length, min_clip_length: Frames, as in `RecordingOptions`.
      val_fraction, test_fraction: Shares of the episodes.
    """

    def __init__(
        self,
        folder: str | Path,
        action_names: Sequence[str] | None = None,
        *,
        action_columns: Sequence[str] = (),
        environment: str | None = None,
        fps: float = 15.0,
        same_actions: Mapping[str, str] | None = None,
        idle_action: str | None = None,
        clip_length: int = 32,
        min_clip_length: int = 16,
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
    ):
        self.folder = Path(folder).expanduser()
        if not 1 <= min_clip_length <= clip_length:
            raise InputError(f"min_clip_length {min_clip_length}: expected 1 to {clip_length} frames, the clip_length")
        for fraction in (val_fraction, test_fraction):
            if not 0 <= fraction <= 0.25:
                raise InputError(f"fraction {fraction}: expected 0 to 0.25, so that most episodes are for training")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder}: is not empty; choose another folder, or delete this one")
        self.folder.mkdir(parents=True, exist_ok=True)
        if action_names is not None and action_columns:
            raise InputError("action_names and action_columns: an action is an integer or a row; name one of them")
        self.action_names = None if action_names is None else tuple(action_names)
        self._columns = tuple(action_columns)
        self._dtype: type | None = None if action_columns else np.int32
        self._seen = {split: Seen() for split in SPLITS}
        self._facts = {
            "environment": environment or self.folder.name,
            "fps": float(fps),
            "same_actions": dict(same_actions or {}),
            "idle_action": idle_action,
        }
        self._clip_length, self._min_clip_length = clip_length, min_clip_length
        shares = {"val": val_fraction, "test": test_fraction}
        self._every = {split: round(1 / share) for split, share in shares.items() if share}
        self._frame_shape: tuple[int, int, int] | None = None
        self._num_episodes = self._num_kept = 0  # all, and those of which there are clips
        self._outcomes = Outcomes()
        self._closed = False
        self._waiting: dict[str, list[Clip]] = {split: [] for split in SPLITS}  # clips that are in no file yet
        self._shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self._begin()

    def step(
        self,
        frame: np.ndarray,
        action: int | Sequence[float] | np.ndarray | None = None,
        reward: float = 0.0,
        done: bool = False,
        truncated: bool = False,
        success: bool | None = None,
    ) -> None:
        """Records a time step.

        Args:
          frame: uint8 (height, width, 3), RGB; all of one size. It is copied.
          action: What was done when the frame was seen.
          reward: What the action earned.
          done: Whether the action ended the episode; the next frame is the first of another one.
          truncated: As `done`, where the end was that time was up.
          success: With the end: whether the episode reached its goal, if that can be said; of an episode that fills
            more than one file its last clips know.

        Raises:
          InputError: The frame or the action is unlike those before, or unlike what was promised.
          OSError: A file cannot be written.
        """
        if self._closed:
            raise InputError(f"{self.folder}: the recorder is closed")
        frame, action, over = self._checked_frame(frame), self._checked_action(action), bool(done or truncated)
        self._steps.append(Step(frame, action, float(reward), over and not truncated, bool(truncated)))
        self._rewards += float(reward)
        self._new += 1
        self._time += 1
        if self._new == self._clip_length:
            self._cut()
        if over:
            solved = None if success is None else int(success)
            self._outcomes = total([self._outcomes, Outcomes(1, solved, self._rewards)])
            self.end_episode(success)

    def end_episode(self, success: bool | None = None) -> None:
        """Ends the episode where it is, for instance because the game was left; there need be none."""
        if self._time == 0:
            return
        if self._new and len(self._steps) >= self._min_clip_length:
            self._cut()
        self._waiting[self._split] += [dataclasses.replace(clip, success=success) for clip in self._clips]
        if _size(self._waiting[self._split]) >= SHARD_BYTES:
            self._write(self._split)
        self._num_episodes += 1
        self._num_kept += self._cuts > 0
        self._begin()

    def close(self) -> None:
        """Writes the rest and `metadata.json`.

        Raises:
          InputError: There is no clip: nothing was recorded, or only episodes shorter than `min_clip_length`.
          OSError: A file cannot be written.
        """
        if self._closed:
            return
        self.end_episode()
        self._closed = True
        for split in SPLITS:
            self._write(split)
        if self._frame_shape is None or not any(self._shards.values()):
            raise InputError(
                f"{self.folder}: nothing to write; no episode had {self._min_clip_length} frames, the min_clip_length"
            )
        every = Seen()
        for part in self._seen.values():
            every = every.plus(part)
        values = None if self._dtype == np.float32 else ()
        space = Space(tuple(ActionColumn(name, values) for name in self._columns))
        metadata = Metadata(
            **self._facts,  # type: ignore[arg-type]
            frame_shape=self._frame_shape,
            action_names=self.action_names,
            splits={split: tuple(shards) for split, shards in self._shards.items()},
            made_by={"command": "sources.Recorder", "episodes": self._num_episodes},
            levels=self._outcomes.as_json(),
            action_columns=described(space, every, self._seen["train"]).columns if self._columns else (),
        )
        write_metadata(self.folder, metadata)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # What was recorded before something failed is kept; what failed is told, even if there is nothing to keep.
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext():
            self.close()

    def _begin(self) -> None:
        """Starts an episode."""
        self._steps: list[Step] = []  # of the clip before, to reach back to, and those that are in no clip yet
        self._new = self._time = self._cuts = 0
        self._rewards = 0.0
        self._clips: list[Clip] = []
        self._split = "train"
        for split, offset in (("test", 2), ("val", 1)):
            if split in self._every and self._num_kept % self._every[split] == offset:
                self._split = split

    def _cut(self) -> None:
        """Makes a clip of the last steps."""
        self._cuts += 1
        self._steps = self._steps[-self._clip_length :]
        frames, actions, rewards, terminated, truncated = zip(*self._steps, strict=True)
        actions_T = np.array(actions, self._dtype) if self.action_names or self._columns else None
        self._seen[self._split] = self._seen[self._split].plus(seen(actions_T))
        self._clips.append(
            Clip(
                frames_THWC=np.stack(frames),
                clip_id=f"episode{self._num_episodes:06d}/step{self._time - len(frames):06d}",
                actions_T=actions_T,
                rewards_T=np.array(rewards, np.float32),
                terminated_T=np.array(terminated),
                truncated_T=np.array(truncated),
            )
        )
        self._new = 0
        if _size(self._clips) >= SHARD_BYTES:  # a long episode: what became of it is told with its last clips alone
            self._waiting[self._split] += self._clips
            self._clips = []
            self._write(self._split)

    def _write(self, split: str) -> None:
        """Writes the clips that wait."""
        if self._waiting[split]:
            file = f"{split}/{len(self._shards[split]):05d}.array_record"
            self._shards[split].append(write_shard(self.folder, file, self._waiting[split]))
            self._waiting[split] = []

    def _checked_frame(self, frame: np.ndarray) -> np.ndarray:
        """A copy of the frame."""
        found = np.array(frame)
        expected = self._frame_shape or "(height, width, 3)"
        is_frame = found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        if not is_frame or self._frame_shape not in (None, found.shape):
            raise InputError(f"frame of {found.dtype} {found.shape}: expected uint8 {expected}")
        self._frame_shape = found.shape
        return found

    def _checked_action(self, action: Any) -> int | np.ndarray | None:
        """The action, if it is what was promised."""
        if self._columns:
            return self._checked_row(np.array(action))
        if self.action_names is None and action is None:
            return None
        if self.action_names is None:
            raise InputError(f"action {action}: name the actions first, Recorder(folder, action_names=(...))")
        if np.ndim(action) or action is None or int(action) != action or not 0 <= action < len(self.action_names):
            raise InputError(f"action {action}: expected 0 to {len(self.action_names) - 1}, as there are action_names")
        return int(action)

    def _checked_row(self, row: np.ndarray) -> np.ndarray:
        """A row of numbers, of the type of those before."""
        dtype = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.int32}.get(row.dtype.kind)
        if row.shape != (len(self._columns),) or dtype is None or not np.isfinite(row).all():
            raise InputError(f"action {row}: expected {len(self._columns)} numbers, as there are action_columns")
        if self._dtype not in (None, dtype) or (dtype == np.int32 and row.min() < 0):
            raise InputError(f"action {row}: expected real numbers always, or integers from 0 always")
        self._dtype = dtype
        return row.astype(dtype)


def _size(clips: Sequence[Clip]) -> int:
    """Bytes of raw frames."""
    return sum(clip.frames_THWC.nbytes for clip in clips if clip.frames_THWC is not None)
