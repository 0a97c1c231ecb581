"""Controllability: whether, and how, a world follows its actions."""

from collections.abc import Sequence

import numpy as np

from evaluation.fidelity import Compare
from evaluation.measured import Measured, curve, of_clips, of_picture
from evaluation.rollouts import Play, Player
from evaluation.statistics import figure
from utils.video import sweep

HORIZONS = (1, 4, 8)  # frames after the prompt
SWEPT_ACTIONS, SWEPT_FRAMES = 16, 8  # at most, in the picture of the action sweep


def strung_actions(actions: np.ndarray, num_clips: int, num_frames: int, seed: int) -> np.ndarray:
    """Actions (num_clips, num_frames), int32 or rows: those of clips, drawn at random from `actions` (B, Tm1), one
    after another, as somebody may press them."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(actions), (num_clips, -(-num_frames // actions.shape[1])))
    return np.concatenate(actions[rows].swapaxes(0, 1), axis=1)[:, :num_frames]


def random_actions(num_clips: int, num_frames: int, num_actions: int, seed: int) -> np.ndarray:
    """Uniform actions (num_clips, num_frames), int32."""
    return np.random.default_rng(seed).integers(0, num_actions, (num_clips, num_frames), np.int32)


def measure_control(
    play: Play,
    compare: Compare,
    truth: np.ndarray,
    actions: np.ndarray,
    predicted: np.ndarray,
    num_actions: int,
    seed: int,
    levels_B: np.ndarray | None = None,
) -> Measured:
    """Δ_t PSNR (Genie, §3): by how much the right actions beat random ones, t frames after a prompt of one.

    Args:
      actions: (B, Tm1), the right ones, int32 or rows; for rows, others of them stand for random ones.
      predicted: What they led to, from frame 1 on.
      levels_B: Of the clips; those of one level count as dependent.
    """
    horizons = [t for t in HORIZONS if t < truth.shape[1]]
    last = horizons[-1]
    future = truth[:, 1 : last + 1]
    if actions.ndim == 2:
        others = random_actions(len(truth), last, num_actions, seed)
    else:  # rows of columns, which are likely together as they were
        rows = actions.reshape(-1, actions.shape[-1])
        others = rows[random_actions(len(truth), last, len(rows), seed)]
    random = play(truth[:, :1], others)
    delta = compare(predicted[:, :last], future).psnr - compare(random, future).psnr
    measured, by_action = Measured(curves={"delta_psnr": curve(delta, levels_B=levels_B)}), {}
    for t in horizons:
        measured |= of_clips(f"delta_psnr_t{t}", delta[:, t - 1], levels_B)
        of = lambda a, t: (actions[:, t - 1] == a).nonzero()[0]
        by_action[str(t)] = {
            str(a): figure(delta[of(a, t), t - 1], None if levels_B is None else levels_B[of(a, t)])
            for a in range(num_actions)
        }
    return measured | Measured(details={"delta_psnr_by_action": by_action})


def action_sweep(play: Player, prompt_HWC: np.ndarray, num_frames: int, names: Sequence[str]) -> Measured:
    """A picture of rollouts from one frame, in each of which one action is held.

    Args:
      num_frames: Of the rollouts, at most `SWEPT_FRAMES`.
      names: Of the actions.
    """
    rows, frames = min(play.num_actions, SWEPT_ACTIONS), min(num_frames, SWEPT_FRAMES)
    held = np.broadcast_to(np.arange(rows)[:, None], (rows, frames))
    prompts = np.repeat(prompt_HWC[None, None], rows, axis=0)
    # The same noise in each row.
    video = np.concatenate([prompts, play(prompts, held, np.zeros(rows))], axis=1)
    caption = "One prompt; in each row one action is held throughout (beside it, what it is called)."
    return of_picture("action_sweep", sweep(video, names), caption)
