"""What the figures of a world say, in words."""

from typing import Any

FEW_DB = 0.5  # by which rollouts with their own actions are better at frame 4 than with random ones: hardly anything


def verdict(metrics: dict[str, Any]) -> str:
    """What the measurement says of the world, in a line or two."""
    margin = metrics["rollout_psnr"] - metrics["copy_last_frame_psnr"]
    delta = metrics["delta_psnr_t4"]
    lines = [f"its rollouts are {margin:+.1f} dB against a still picture, its actions worth {delta:.1f} dB at frame 4"]
    if margin < 0:
        lines.append(
            "a still picture is better: what moves is too small or too rare to be learned so; see its inspection"
        )
    if delta < FEW_DB:
        lines.append(
            "its buttons do next to nothing: where little moves, give the true actions (demo.py --use_gt_actions)"
        )
    return "\n".join(lines)
