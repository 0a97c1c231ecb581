"""All that decides what a folder of videos, arrays or pictures is converted to."""

import dataclasses
import re
from typing import Literal

from models.errors import InputError
from sources.registry import KINDS


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """All that decides what a folder is converted to."""

    input_dir: str = "data/coinrun_episodes"
    """Folder to read, with its sub-folders and what links lead to. Each file is one episode: videos (.mp4 .m4v .avi
    .webm .mkv .mov .ts .gif); .npy with frames (T, H, W, C), uint8 or floats in [0, 1]; .npz with frames under
    `frames`, `observations`, `video` or `arr_0` and, if you have them, `actions` (whole numbers, one-hot rows, or rows
    of several numbers; actions[t] leads from frame t to frame t + 1), `rewards` (earned by the action at t), and what
    ends an episode with frame t (`dones`, `terminated`, `truncated`, `is_last`, ...) or begins one (`is_first`).
    Actions and rewards may lack the last frame's (then 0). A folder of pictures (.png .jpg .webp .bmp), in the order of
    their numbers, is one episode too. Where one file holds several episodes, NAME.episodes.json beside it lists their
    first frames."""
    source: Literal["auto", *KINDS] = "auto"  # type: ignore[valid-type]
    """What to read from the input folder: arrays (.npy and .npz), videos, folders of images, or what other projects
    publish (docs/data.md); auto takes what is there."""
    height: int | None = None
    """Resize frames to this height, together with --width; pictures are stretched. Without it all files must have
    frames of one size, that of most of them."""
    width: int | None = None
    """Resize frames to this width. Of Jasmine's records, --height and --width are the size that the frames have."""
    camera: str = ""
    """Which one to take where an episode has several views: cameras (LeRobot), observations (Minari)."""
    fps: float | None = None
    """Frames per second. Videos are resampled to it, by dropping or repeating frames; by default to the rate of
    most of them. For arrays and images it only says how fast they play; default 15."""
    clip_length: int = 32
    """Frames in a clip."""
    min_clip_length: int = 16
    """The rest of an episode becomes a shorter clip if it has at least this many frames, otherwise it is dropped."""
    val_fraction: float = 0.05
    """Share of the files whose clips are for validation; at least one if there are two files."""
    test_fraction: float = 0.05
    """Share of the files whose clips are for testing; at least one if there are three files."""
    seed: int = 0
    """Decides which files go to which split."""
    group: str = ""
    """Regular expression; files for which it finds the same text (its first group, if it has one) go into the same
    split, for instance "(.*)_cam" for the cameras of one episode."""
    actions_lead_to: bool = False
    """The files' actions[t] and rewards[t] belong to the step that leads to frame t, not to that which leads on from
    it; they are moved by one."""
    drop_without_actions: bool = False
    """Where some sources have actions and others do not, leave the others out."""
    environment: str = ""
    """Name of where the episodes come from; by default the name of the input folder."""
    strict: bool = False
    """Stop at the first file that cannot be used as it is, instead of skipping or changing it."""

    def check(self) -> None:
        """Raises an InputError for a value that cannot work."""
        if self.source not in ("auto", *KINDS):
            raise InputError(f"`source` {self.source}: must be auto or one of {', '.join(KINDS)}")
        if (self.height is None) != (self.width is None):
            raise InputError(f"`height` {self.height} `width` {self.width}: give both, or neither to keep the size")
        for name in ("height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"`{name}` {value}: must be positive")
        if not 1 <= self.min_clip_length <= self.clip_length:
            raise InputError(
                f"`min_clip_length` {self.min_clip_length}: must be from 1 to `clip_length` {self.clip_length}"
            )
        try:
            re.compile(self.group)
        except re.error as error:
            raise InputError(f"`group` {self.group}: not a regular expression ({error})") from error
        fractions = (self.val_fraction, self.test_fraction)
        if not (min(fractions) >= 0 and sum(fractions) < 1):
            raise InputError(
                f"`val_fraction` {fractions[0]} `test_fraction` {fractions[1]}: must leave files for training"
            )
