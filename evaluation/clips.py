"""Clips: on which a model is measured, and how arrays of them go through it.

Frames are uint8 (B, T, H, W, C) in this room, as they are shown and stored; models and metrics take them as float32 in
[0, 1].
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from utils.data import ClipSource


class Clips(NamedTuple):
    """The clips of an evaluation.

    frames_BTHWC: uint8.
    actions_BT: int32, or rows; `actions_BT[:, t]` leads to frame t + 1. None where the dataset has none.
    levels_B: A number for the level of each; where the dataset knows none, for the record.
    rewards_BT, ends_BT: See `utils.data.Batch`.
    """

    frames_BTHWC: np.ndarray
    actions_BT: np.ndarray | None
    levels_B: np.ndarray
    rewards_BT: np.ndarray | None = None
    ends_BT: np.ndarray | None = None


def choose_clips(source: ClipSource, num_clips: int, seed: int) -> Clips:
    """Draws windows of `source.seq_len` frames that do not overlap, spread over as many records as possible.

    Where they are to tell outcomes they reach up to the end of a clip, where these are.

    A function of the dataset, `num_clips` and `seed` alone; fewer clips are the first of more. Gives what there is
    where that is less than `num_clips`.
    """
    T, rng = source.seq_len, np.random.default_rng(seed)
    shards = source.metadata.splits[source.split]
    lengths = [n for shard in shards for n, count in shard.lengths if n >= T for _ in range(count)]
    # Each record's windows in random order; all first ones come before all second ones.
    places = []
    for record, length in enumerate(lengths):
        first = length % T if source.outcomes else 0
        for turn, slot in enumerate(rng.permutation(length // T)):
            places.append((turn, rng.random(), record, source.position(first + slot * T, length)))
    chosen = sorted(places)[:num_clips]
    records = [place[2] for place in chosen]
    batch = source.windows(records, [place[3] for place in chosen])
    seeds = [clip.level_seed for i in range(0, len(records), 64) for clip in source.clips(records[i : i + 64])]
    levels = [-1 - record if seed is None else seed for seed, record in zip(seeds, records, strict=True)]
    return Clips(batch.frames_BTHWC, batch.actions_BT, np.array(levels), batch.rewards_BT, batch.ends_BT)


def digest(frames: np.ndarray) -> str:
    """Names a set of clips: equal digests, equal frames."""
    return hashlib.sha256(frames.tobytes()).hexdigest()[:16]


def to_float(frames: Any) -> jax.Array:
    """uint8 to float32 in [0, 1]."""
    return jnp.asarray(frames).astype(jnp.float32) / 255


def to_uint8(frames: jax.Array) -> jax.Array:
    """About [0, 1] to uint8."""
    return (jnp.clip(frames, 0, 1) * 255 + 0.5).astype(jnp.uint8)


def jitted(model: nnx.Module, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(model, *arrays)` compiled, with the model bound."""
    graphdef, variables = nnx.split(model)
    compiled = jax.jit(lambda variables, *arrays: fn(nnx.merge(graphdef, variables), *arrays))
    return lambda *arrays: compiled(variables, *arrays)


def in_batches(fn: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> Any:
    """Applies `fn` to slices of `batch_size` rows and joins what it returns.

    The last slice is filled up with its first row: one shape means one compilation.
    """
    n, parts = len(arrays[0]), []
    for start in range(0, n, batch_size):
        slices = [array[start : start + batch_size] for array in arrays]
        kept = len(slices[0])
        filled = [np.concatenate([x, np.repeat(x[:1], batch_size - kept, axis=0)]) for x in slices]
        parts.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], fn(*filled)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
