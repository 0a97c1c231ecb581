"""Distribution: how far rollouts, as a set, are from real clips."""

from collections.abc import Callable
from typing import Any

import numpy as np

from evaluation.clips import in_batches, jitted, to_float
from evaluation.fidelity import CHUNK
from evaluation.measured import Measured
from evaluation.perceptual import I3D, I3D_MIN_FRAMES, LPIPS, frame_features, i3d_features
from evaluation.statistics import NOT_MEASURED, frechet_distance, jackknife

FRAMES_PER_CLIP = 4  # that count for the frame distance: neighbours are too alike to add much


def measure_distribution(
    generated: np.ndarray,
    real: np.ndarray,
    others: np.ndarray,
    i3d: I3D | None,
    lpips: LPIPS | None,
    batch_size: int,
    levels: tuple[np.ndarray, np.ndarray] | None = None,
) -> Measured:
    """FVD and Fréchet distance of frames, of rollouts and of real clips from other real clips.

    Real clips against other real clips are the floor. With few clips both are far too high; compare them at equal n.

    Args:
      generated: Rollouts with their prompts; `real`: the same clips as they were; `others`: as many of other levels.
      levels: Of the real clips and of the others; those of one level are left out together for the interval.
    """
    sets = {"": generated, "_floor": real}
    figures = {f"{distance}{name}": NOT_MEASURED for name in sets for distance in ("fvd", "frame_distance")}
    enough = len(real) >= 2

    if enough and i3d is not None and real.shape[1] >= I3D_MIN_FRAMES and real.shape[-1] == 3:
        read = jitted(i3d, lambda i3d, frames: i3d_features(i3d, to_float(frames)))
        reference = in_batches(read, batch_size, others)
        for name, clips in sets.items():
            figures[f"fvd{name}"] = jackknife(
                frechet_distance, in_batches(read, batch_size, clips), reference, groups=levels
            )

    if enough and lpips is not None:
        look = jitted(lpips, lambda lpips, frames: frame_features(lpips, to_float(frames)))
        reference = _features_of_some_frames(look, others)
        for name, clips in sets.items():
            # Whole clips are left out for the interval: frames of one clip are alike.
            distance = lambda a, b: frechet_distance(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
            figures[f"frame_distance{name}"] = jackknife(
                distance, _features_of_some_frames(look, clips), reference, groups=levels
            )
    return Measured(figures=figures)


def _features_of_some_frames(look: Callable[[np.ndarray], Any], clips: np.ndarray) -> np.ndarray:
    """Features (B, frames, features) of frames that are spread over each clip, its prompt left out."""
    T = clips.shape[1]
    times = sorted({round(1 + k * (T - 2) / (FRAMES_PER_CLIP - 1)) for k in range(FRAMES_PER_CLIP)})
    flat = clips[:, times].reshape(-1, *clips.shape[2:])
    return in_batches(look, CHUNK, flat).reshape(len(clips), len(times), -1)
