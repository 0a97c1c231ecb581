"""Codebooks: how many of their codes are used, how evenly, and what they look like."""

import jax.numpy as jnp
import numpy as np

from evaluation.clips import to_float, to_uint8
from evaluation.measured import Measured, of_picture
from evaluation.statistics import jackknife
from models.nn import patchify
from utils.video import strip, upscale

SHOWN_CODES, COLUMNS = 32, 16  # in the picture of the codes, at most
SHOWN_PIXELS = 32  # to which a patch is enlarged


def measure_codes(subject: str, codes: np.ndarray, num_codes: int, levels_B: np.ndarray | None = None) -> Measured:
    """Usage, perplexity and dead codes of a codebook.

    Args:
      subject: Begins the names, for instance "tokenizer".
      codes: (B, ...).
      levels_B: Of the clips; those of one level count as dependent.
    """
    counts_BK = np.stack([np.bincount(row.reshape(-1), minlength=num_codes) for row in codes])

    def perplexity(counts_BK: np.ndarray) -> float:
        p = counts_BK.sum(axis=0) / counts_BK.sum()
        return float(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))

    usage = lambda counts_BK: float((counts_BK.sum(axis=0) > 0).mean())
    total = counts_BK.sum(axis=0)
    book = {
        "codes": num_codes,
        "dead": int((total == 0).sum()),
        "tokens": int(total.sum()),
        "counts": total,
    }
    return Measured(
        figures={
            f"{subject}_codebook_usage": jackknife(usage, counts_BK, groups=[levels_B]),
            f"{subject}_codebook_perplexity": jackknife(perplexity, counts_BK, groups=[levels_B]),
        },
        details={f"{subject}_codebook": book},
    )


def mean_patches(frames: np.ndarray, tokens: np.ndarray, num_codes: int, patch_size: int) -> np.ndarray:
    """The mean patch of each of the most used codes, the most used first: uint8 (codes, patch, patch, C)."""
    counts = np.bincount(tokens.reshape(-1), minlength=num_codes)
    patches = np.asarray(patchify(to_float(frames), patch_size)).reshape(tokens.size, -1)
    chosen = [k for k in np.argsort(-counts, kind="stable")[:SHOWN_CODES] if counts[k]]
    means = np.stack([patches[tokens.reshape(-1) == k].mean(axis=0) for k in chosen])
    return np.asarray(to_uint8(jnp.asarray(means))).reshape(len(chosen), patch_size, patch_size, -1)


def code_sheet(patches: np.ndarray) -> Measured:
    """A picture of patches (codes, patch, patch, C) side by side."""
    columns = min(COLUMNS, len(patches))
    grid = upscale(patches[: len(patches) // columns * columns], -(-SHOWN_PIXELS // patches.shape[1]))
    sheet = strip(grid.reshape(-1, columns, *grid.shape[1:]))
    return of_picture("codes", sheet, "The most used codes of the tokenizer: mean patch of each, most used first.")
