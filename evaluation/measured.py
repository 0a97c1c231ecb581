"""What a measure returns. Measures are joined by `|`, and all of them together are metrics.json."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.statistics import Figure, figure
from models.errors import InputError


class Curve(NamedTuple):
    """Figures over frames, the first of which is frame `first`."""

    first: int
    figures: Sequence[Figure]


class Picture(NamedTuple):
    """An image, uint8 (H, W, 3), with its file name (without suffix) and what it shows."""

    name: str
    image_HWC: np.ndarray
    caption: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured, by name.

    figures: Estimates; their names are those of `evaluation.table`.
    per_clip: Values (B,) behind a figure, for paired comparison.
    curves: Over the frames of a clip.
    details: Whatever else belongs into metrics.json; numbers, strings, arrays, figures, and dicts and lists of such.
    pictures: For the report.
    """

    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    per_clip: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Picture] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "Measured") -> "Measured":
        """Both together.

        Raises:
          ValueError: They have a name in common.
        """
        joined = {}
        for part in (field.name for field in dataclasses.fields(self)):
            a, b = getattr(self, part), getattr(other, part)
            if a.keys() & b.keys():
                raise ValueError(f"{part} measured twice: {', '.join(sorted(a.keys() & b.keys()))}")
            joined[part] = {**a, **b}
        return Measured(**joined)

    def to_json(self) -> dict[str, Any]:
        """Means by name, then intervals, curves, details and the values of each clip; null for what is not known."""
        flat = {name: f.mean for name, f in self.figures.items()}
        intervals = {name: {"low": f.low, "high": f.high, "n": f.n} for name, f in self.figures.items()}
        curves = {}
        for name, (first, figures) in self.curves.items():
            means, lows, highs, n = zip(*figures, strict=True)
            curves[name] = {"first": first, "mean": means, "low": lows, "high": highs, "n": n[0]}
        parts = {"intervals": intervals, "per_horizon": curves, **self.details, "per_clip": self.per_clip}
        return _plain(flat | parts)


def of_clips(name: str, values_B: np.ndarray, levels_B: np.ndarray | None = None) -> Measured:
    """A figure from one value a clip; clips of one level count as dependent."""
    return Measured(figures={name: figure(values_B, levels_B)}, per_clip={name: np.asarray(values_B)})


def curve(values_BT: np.ndarray, first: int = 1, levels_B: np.ndarray | None = None) -> Curve:
    """A curve from a row a clip; clips of one level count as dependent."""
    return Curve(first, [figure(column, levels_B) for column in values_BT.T])


def of_picture(name: str, image_HWC: np.ndarray, caption: str) -> Measured:
    """A picture of an image of any number of channels; without three of them it is grey."""
    grey = image_HWC.shape[-1] != 3
    image_HWC = image_HWC[..., :1].repeat(3, axis=-1) if grey else image_HWC
    return Measured(pictures={name: Picture(name, image_HWC, caption)})


def read_metrics(path: str | Path, field: str) -> dict[str, Any]:
    """Reads what `Measured.to_json` gave.

    Args:
      field: Of the configuration, that names the path; for errors.
    Raises:
      InputError: It is missing, or something else.
    """
    try:
        metrics = json.loads(Path(path).read_text())
        if not isinstance(metrics["intervals"], dict):
            raise TypeError("intervals")
        return metrics
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"`{field}` {path}: not a metrics.json of evaluate.py ({error!r})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _plain(value: Any, digits: int = 5) -> Any:
    """For JSON: rounded floats, null for NaN, lists for arrays."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x, digits) for key, x in value.items()}
    if isinstance(value, Figure):
        return _plain(value._asdict(), digits)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(x, digits) for x in value]
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not math.isfinite(number):
            return None
        # Small errors keep as many digits as large ones.
        return round(number, digits) if abs(number) >= 0.01 else float(f"{number:.{digits}g}")
    return value.item() if isinstance(value, np.generic) else value
