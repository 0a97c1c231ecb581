"""Image metrics, on frames in [0, 1]."""

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB over the last three axes (H, W, C); equal frames score 60.

    The ceiling is about what rounding to 8 bits leaves, so that still scenes do not weigh as infinity in a mean.
    """
    mse = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(-3, -2, -1))
    return -10.0 * jnp.log10(jnp.maximum(mse, 1e-6))


def pooled_psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """PSNR (T) in dB of each frame of a set of videos (B, T, H, W, C), of the mean error over the set.

    In a mean of decibels, scenes where nothing moves would drown the others: a repeated frame is perfect there.
    """
    mse_T = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(0, 2, 3, 4))
    return -10.0 * jnp.log10(jnp.maximum(mse_T, 1e-6))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004) over the last three axes (H, W, C)."""
    image = a.shape[-3:]
    scores = dm_pix.ssim(a.astype(jnp.float32).reshape(-1, *image), b.astype(jnp.float32).reshape(-1, *image))
    return scores.reshape(a.shape[:-3])


def unchanged(frames_BTHWC: jax.Array, most: float = 4 / 255) -> jax.Array:
    """Share of pixels, (B, T - 1), that each step leaves within `most` in every channel."""
    step = jnp.abs(jnp.diff(frames_BTHWC.astype(jnp.float32), axis=1))
    return jnp.mean(jnp.max(step, axis=-1) <= most * 1.0001, axis=(2, 3))


def rollout_quality(predicted: jax.Array, misled: jax.Array, frames: jax.Array) -> dict[str, jax.Array]:
    """How rollouts from one prompt frame go, for a validation; pooled over the batch's clips.

    Args:
      predicted: (B, T - 1, H, W, C), with the clips' own actions; misled: with random ones.
      frames: (B, T, H, W, C), the clips.
    Returns:
      psnr, psnr_copy: Of the rollouts, and of the first frame repeated.
      margin_t: Their difference at frame t.
      delta_psnr_t4: By how much the clips' own actions beat random ones at frame 4 (Genie, §3).
      unchanged, real_unchanged: Share of pixels that a step leaves as they are: a frozen world shows.
    """
    future = frames[:, 1:]
    copied = jnp.broadcast_to(frames[:, :1], future.shape)
    own_BT = psnr(predicted, future)
    margin_T = pooled_psnr(predicted, future) - pooled_psnr(copied, future)
    delta_T = jnp.mean(own_BT - psnr(misled, future), axis=0)
    values = {"psnr": jnp.mean(own_BT), "psnr_copy": jnp.mean(psnr(copied, future))}
    values |= {f"margin_{t}": margin_T[t - 1] for t in (1, 4, 8, 15) if t <= len(margin_T)}
    values |= {"delta_psnr_t4": delta_T[3]} if len(delta_T) > 3 else {}
    return values | {"unchanged": jnp.mean(unchanged(predicted)), "real_unchanged": jnp.mean(unchanged(future))}


def usage(codes: jax.Array, num_codes: int, weight: jax.Array | None = None) -> jax.Array:
    """Share of the codes that occur at all, where something counts (see `models.padding`)."""
    occurs = 1.0 if weight is None else (weight.reshape(-1) > 0).astype(jnp.float32)
    return jnp.mean(jnp.zeros(num_codes).at[codes.reshape(-1)].max(occurs))


def perplexity(codes: jax.Array, num_codes: int) -> jax.Array:
    """exp of the entropy of the codes: `num_codes` when all are used alike, 1 when there is only one."""
    p = jnp.zeros(num_codes).at[codes.reshape(-1)].add(1.0) / codes.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def average_precision(score_X: np.ndarray, label_X: np.ndarray) -> float:
    """Area under the curve of precision over recall, of scores that are to find what is labelled 1; NaN without any.

    Scores that tell nothing reach the base rate, the share of 1 among the labels. What is labelled NaN is left out.
    """
    known = ~np.isnan(label_X)
    score, label = np.asarray(score_X)[known], np.asarray(label_X)[known] > 0
    if not label.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # equal scores are found together
    found = np.cumsum(label[order])[last]
    return float(np.sum(np.diff(found, prepend=0) * found / (last + 1)) / label.sum())


def precision_metrics(name: str, ranked_BT2: np.ndarray) -> dict[str, float]:
    """Scores and labels as metrics: the base rate as `<name>_base`, and if it is not 0 the average precision."""
    score_X, label_X = ranked_BT2[..., 0].reshape(-1), ranked_BT2[..., 1].reshape(-1)
    base = float(np.nanmean(label_X)) if not np.isnan(label_X).all() else 0.0
    return {f"{name}_base": base} | ({name: average_precision(score_X, label_X)} if base else {})
