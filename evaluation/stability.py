"""Stability: what becomes of long rollouts."""

import numpy as np

from evaluation.measured import Measured, curve, of_clips

UNCHANGED = 4  # of 255: a pixel that differs by no more counts as unchanged


def measure_stability(
    video: np.ndarray,
    real: np.ndarray,
    video_levels: np.ndarray | None = None,
    real_levels: np.ndarray | None = None,
) -> Measured:
    """Sharpness, colours and motion of long rollouts, frame by frame, beside real clips.

    The figures are means over the last quarter of the rollouts, and over all of the real clips.

    Args:
      video: Rollouts with their prompt of one frame.
      video_levels, real_levels: Of the clips; those of one level count as dependent.
    """
    reference = colour_histogram(real).mean(axis=(0, 1))
    measured = Measured()
    for measure, values_BT in _of_frames(video, reference).items():
        name, tail = f"long_rollout_{measure}", values_BT[:, -(-3 * values_BT.shape[1] // 4) :]
        measured |= of_clips(name, (tail if tail.shape[1] else values_BT).mean(axis=1), video_levels)
        measured |= Measured(curves={name: curve(values_BT, levels_B=video_levels)})
    for measure, values_BT in _of_frames(real, reference).items():
        measured |= of_clips(f"real_{measure}", values_BT.mean(axis=1), real_levels)
    return measured


def measure_motion(rollouts: np.ndarray, real: np.ndarray, levels_B: np.ndarray | None = None) -> Measured:
    """Whether rollouts move, and stay sharp, as the clips that they began from do, frame by frame; curves only.

    Args:
      rollouts: With their prompt of one frame; real: the same clips as they were.
    """
    curves = {}
    for name, frames in (("rollout", rollouts), ("real", real)):
        curves[f"{name}_unchanged"] = curve(unchanged(frames), levels_B=levels_B)
        curves[f"{name}_sharpness"] = curve(sharpness(frames)[:, 1:], levels_B=levels_B)
    return Measured(curves=curves)


def _of_frames(frames: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure of all frames but the first, (B, Tm1); `reference` is the mean colour histogram of real frames."""
    return {
        "sharpness": sharpness(frames)[:, 1:],
        "colour_distance": np.abs(colour_histogram(frames) - reference).sum(axis=3).mean(axis=2)[:, 1:] / 2,
        "unchanged": unchanged(frames),
    }


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels' brightness in 1/255, (B, T)."""
    brightness = frames.astype(np.float32).mean(axis=-1)
    across, down = np.abs(np.diff(brightness, axis=-1)), np.abs(np.diff(brightness, axis=-2))
    return (across.mean(axis=(2, 3)) + down.mean(axis=(2, 3))) / 2


def colour_histogram(frames: np.ndarray, bins: int = 16) -> np.ndarray:
    """Shares of the values of each channel: (B, T, C, bins)."""
    T, H, W, C = frames.shape[1:]
    places = np.arange(T * C).reshape(T, 1, 1, C) * bins
    # Clip by clip: the indices take eight times the memory of the frames.
    counts = [np.bincount((clip // (256 // bins) + places).reshape(-1), minlength=T * C * bins) for clip in frames]
    return np.stack(counts).reshape(-1, T, C, bins) / (H * W)


def unchanged(frames: np.ndarray) -> np.ndarray:
    """Share of pixels that the step before left within `UNCHANGED` in every channel, (B, Tm1)."""
    steps = range(1, frames.shape[1])
    return np.stack([alike(frames[:, t - 1], frames[:, t]).mean(axis=(1, 2)) for t in steps], axis=1)


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which pixels of two pictures (..., H, W, C) differ by at most `UNCHANGED` in every channel."""
    return np.abs(a.astype(np.int16) - b).max(axis=-1) <= UNCHANGED
