"""Fidelity: how near frames are to the true ones."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evaluation.clips import in_batches, jitted, to_float, to_uint8
from evaluation.measured import Curve, Measured, curve
from evaluation.perceptual import LPIPS
from evaluation.statistics import NOT_MEASURED, Figure, figure
from models.lam import LAM
from models.tokenizer import Tokenizer
from utils.metrics import psnr, ssim

CHUNK = 64  # frames compared at a time


class Scores(NamedTuple):
    """Of the frames of one video against those of another, each (B, T); LPIPS is None without its network."""

    psnr: np.ndarray
    ssim: np.ndarray
    l1: np.ndarray
    lpips: np.ndarray | None
    mse: np.ndarray

    def cut(self, clips: slice, frames: slice = slice(None)) -> "Scores":
        """Those of some clips and frames."""
        return jax.tree.map(lambda x: x[clips, frames], self)


Compare = Callable[[np.ndarray, np.ndarray], Scores]
"""From two videos (B, T, H, W, C), uint8, to the scores of their frames."""


def frame_metrics(lpips: LPIPS | None) -> Compare:
    """Makes the function that compares frames."""

    def metrics(lpips, a, b):
        a, b = to_float(a), to_float(b)
        mse, l1 = jnp.mean(jnp.square(a - b), axis=(1, 2, 3)), jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))
        return psnr(a, b), ssim(a, b), l1, lpips(a, b) if lpips else None, mse

    compiled = jitted(lpips, metrics) if lpips else jax.jit(lambda a, b: metrics(None, a, b))

    def compare(a: np.ndarray, b: np.ndarray) -> Scores:
        flat = [np.reshape(x, (-1, *x.shape[2:])) for x in (a, b)]
        return Scores(*jax.tree.map(lambda x: x.reshape(a.shape[:2]), in_batches(compiled, CHUNK, *flat)))

    return compare


def pooled_psnr(mse_B: np.ndarray, levels_B: np.ndarray | None = None) -> Figure:
    """PSNR in dB of the mean over clips of their mean squared errors, with that mean's interval (delta method)."""
    error = figure(mse_B, levels_B)
    if not error.n:
        return NOT_MEASURED
    least = max(error.mean, 1e-6)
    mean, half = -10 * math.log10(least), 10 / math.log(10) * (error.high - error.mean) / least
    return Figure(mean, mean - half, mean + half, error.n)


def measure_fidelity(
    subject: str, scores: Scores, levels_B: np.ndarray | None = None, first: int = 1, pooled: bool = False
) -> Measured:
    """Figure and curve of each frame metric.

    Args:
      subject: Begins the names, for instance "rollout": rollout_psnr.
      levels_B: Of the clips; those of one level count as dependent.
      first: Number of the first frame.
      pooled: `psnr` is that of the mean error over clips, not the mean of their PSNRs, in which scenes where nothing
        moves would drown the others (a repeated frame is perfect there); `psnr_mean` is that mean in any case.
    """
    figures, per_clip, curves = {}, {}, {}
    of_frames = {name: values for name, values in scores._asdict().items() if name != "mse"}
    for metric, values_BT in (of_frames | {"psnr_mean": scores.psnr}).items():
        name = f"{subject}_{metric}"
        if values_BT is None:
            figures[name] = NOT_MEASURED
            continue
        per_clip[name] = values_BT.mean(axis=1)
        figures[name], curves[name] = figure(per_clip[name], levels_B), curve(values_BT, first, levels_B)
    if pooled:
        per_clip[f"{subject}_mse"] = scores.mse.mean(axis=1)
        figures[f"{subject}_psnr"] = pooled_psnr(per_clip[f"{subject}_mse"], levels_B)
        curves[f"{subject}_psnr"] = Curve(first, [pooled_psnr(column, levels_B) for column in scores.mse.T])
    return Measured(figures, per_clip, curves)


class Reconstruction(NamedTuple):
    """What a tokenizer makes of clips: uint8 frames and int32 tokens, if it has such."""

    frames_BTHWC: np.ndarray
    tokens_BTN: np.ndarray | None


def reconstruct(tokenizer: Tokenizer, frames: np.ndarray, batch_size: int) -> Reconstruction:
    """Frames through the tokenizer and back."""

    def forward(tokenizer, frames):
        out = tokenizer(to_float(frames))
        return to_uint8(out.frames_BTHWC), out.tokens_BTN

    return Reconstruction(*in_batches(jitted(tokenizer, forward), batch_size, frames))


class Inference(NamedTuple):
    """What a LAM makes of clips: uint8 predictions of frames 1 ... T - 1 and the latent actions that led to them.

    Without a decoder of its own it predicts what stands there already.
    """

    next_frames_BTm1HWC: np.ndarray
    actions_BTm1: np.ndarray


def infer(lam: LAM, frames: np.ndarray, batch_size: int) -> Inference:
    """Frames through the LAM."""

    def forward(lam, frames):
        if not lam.cfg.own_decoder:
            return frames[:, :-1], lam.infer(to_float(frames))
        out = lam(to_float(frames))
        return to_uint8(out.next_frames_BTm1HWC), out.actions_BTm1

    return Inference(*in_batches(jitted(lam, forward), batch_size, frames))
