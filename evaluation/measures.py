"""How models are measured: on which clips, how a world is played, and each measure of evaluate.py.

Frames are uint8 (B, T, H, W, C) here, as they are shown and stored; metrics turn them into [0, 1].
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evaluation.perceptual import I3D, I3D_MIN_FRAMES, LPIPS, frame_features, i3d_features
from evaluation.statistics import (
    NOT_MEASURED,
    Figure,
    adjusted_mutual_information,
    best_map,
    contingency,
    figure,
    frechet_distance,
    jackknife,
)
from models.genie import World
from models.lam import LAM
from models.nn import patchify
from models.sampling import SamplingConfig, next_frame, start_rollout
from models.tokenizer import Tokenizer
from utils.data import ClipSource
from utils.metrics import psnr, ssim

LABELLED = (10, 50, 200, 1000)  # labelled transitions from which a map of latent to true actions is learned
DRAWS = 20  # of which transitions these are
FRAMES_PER_CLIP = 4  # that count for the frame distance: neighbours are too alike to add much
CONTROL_HORIZONS = (1, 4, 8)
UNCHANGED = 4  # of 255: a pixel that differs by no more counts as unchanged
CHUNK = 64  # frames compared at a time


class Clips(NamedTuple):
    """The clips of an evaluation.

    actions_BT: int32, `actions_BT[:, t]` leads to frame t + 1; None where the dataset has none.
    """

    frames_BTHWC: np.ndarray
    actions_BT: np.ndarray | None


def choose_clips(source: ClipSource, num_clips: int, seed: int) -> Clips:
    """Draws windows of `source.seq_len` frames that do not overlap, spread over as many records as possible.

    A function of the dataset, `num_clips` and `seed` alone; fewer clips are the first of more. Gives what there is
    where that is less than `num_clips`.
    """
    T, rng = source.seq_len, np.random.default_rng(seed)
    shards = source.metadata.splits[source.split]
    lengths = [n for shard in shards for n, count in shard.lengths if n >= T for _ in range(count)]
    # Each record's windows in random order; all first ones come before all second ones.
    places = []
    for record, length in enumerate(lengths):
        for turn, slot in enumerate(rng.permutation(length // T)):
            places.append((turn, rng.random(), record, (slot * T + 0.5) / (length - T + 1)))
    chosen = sorted(places)[:num_clips]
    batch = source.windows([place[2] for place in chosen], [place[3] for place in chosen])
    return Clips(batch.frames_BTHWC, batch.actions_BT)


def digest(frames: np.ndarray) -> str:
    """Names a set of clips: equal digests, equal frames."""
    return hashlib.sha256(frames.tobytes()).hexdigest()[:16]


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


def run_tokenizer(tokenizer: Tokenizer, frames: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructions, uint8, and tokens (B, T, N)."""

    def reconstruct(tokenizer, frames):
        out = tokenizer(to_float(frames))
        return to_uint8(out.frames_BTHWC), out.tokens_BTN

    return in_batches(jitted(tokenizer, reconstruct), batch_size, frames)


def run_lam(lam: LAM, frames: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of frames 1 ... T - 1, uint8, and latent actions (B, Tm1)."""

    def predict(lam, frames):
        out = lam(to_float(frames))
        return to_uint8(out.next_frames_BTm1HWC), out.actions_BTm1

    return in_batches(jitted(lam, predict), batch_size, frames)


class Player:
    """Plays a world. A single step is compiled, and serves rollouts of every length.

    What a clip becomes depends on the seed, the clip's number, its prompt and its actions; the batch size changes
    nothing. The same clip with other actions meets the same noise, so that a difference is the actions'.
    """

    def __init__(self, world: World, sampling: SamplingConfig, batch_size: int, seed: int):
        self.batch_size = batch_size
        self.frames, self.seconds = 0, 0.0  # since the step was compiled
        self._warm = False
        shape, window = world.cfg.tokenizer.frame_shape, world.cfg.window
        blank = jnp.zeros((1, window, *shape)), jnp.zeros((1, window - 1), jnp.int32)
        state = jax.eval_shape(lambda: start_rollout(world, *blank))
        axes: Any = jax.tree.map(lambda _: 0, state)._replace(frame=None)

        def start(world, prompt_BTHWC, actions_BTm1):
            one = lambda prompt, actions: start_rollout(world, to_float(prompt)[None], actions[None])
            return jax.vmap(one, out_axes=axes)(prompt_BTHWC, actions_BTm1)

        def step(world, state, action_B, number_B):
            def one(state, action, number):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), state.frame)
                frame_1HWC, state = next_frame(world, state, action[None], key, sampling)
                return to_uint8(frame_1HWC[0]), state

            return jax.vmap(one, in_axes=(axes, 0, 0), out_axes=(0, axes))(state, action_B, number_B)

        self._start, self._step = jitted(world, start), jitted(world, step)

    def __call__(self, prompt: np.ndarray, actions: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
        """The frames that follow a prompt.

        Args:
          prompt: T frames.
          actions: (B, S); `actions[:, t]` leads to frame t + 1, the first T - 1 between prompt frames.
          numbers: (B,), of the clips; their rows by default.
        Returns:
          S + 1 - T frames.
        """
        numbers = np.arange(len(prompt)) if numbers is None else numbers
        return in_batches(self._play, self.batch_size, prompt, actions.astype(np.int32), numbers.astype(np.int32))

    def _play(self, prompt: np.ndarray, actions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        T = prompt.shape[1]
        state = self._start(prompt, actions[:, : T - 1])
        if not self._warm:  # compiling is not counted
            self._step(state, actions[:, T - 1], numbers)
            self._warm = True
        frames, began = [], time.perf_counter()
        for t in range(T - 1, actions.shape[1]):
            frame, state = self._step(state, actions[:, t], numbers)
            frames.append(frame)
        video = np.stack([np.asarray(frame) for frame in frames], axis=1)
        self.frames += video.shape[0] * video.shape[1]
        self.seconds += time.perf_counter() - began
        return video


Play = Callable[..., np.ndarray]
"""`Player.__call__`, or what stands in for it."""
Compare = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""From two videos of one shape to metrics (B, T) of their frames."""


def frame_metrics(lpips: LPIPS | None) -> Compare:
    """PSNR, SSIM, L1 and, where there is a network for it, LPIPS of frames."""

    def metrics(lpips, a, b):
        a, b = to_float(a), to_float(b)
        mse = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
        values = {"psnr": psnr(a, b), "mse": mse, "ssim": ssim(a, b), "l1": jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))}
        return values | ({"lpips": lpips(a, b)} if lpips else {})

    compiled = jitted(lpips, metrics) if lpips else jax.jit(lambda a, b: metrics(None, a, b))

    def compare(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        flat = [np.reshape(x, (-1, *x.shape[2:])) for x in (a, b)]
        values = in_batches(compiled, CHUNK, *flat)
        return {name: x.reshape(a.shape[:2]) for name, x in values.items()}

    return compare


def pooled_psnr(mse_B: np.ndarray) -> Figure:
    """PSNR in dB of the mean over clips of their mean squared errors, with that mean's interval."""
    error = figure(mse_B)
    mean, low, high = (-10 * math.log10(max(x, 1e-6)) for x in (error.mean, error.high, error.low))
    return Figure(mean, low, high, error.n)


class Results:
    """What was measured; becomes metrics.json.

    figures: Estimates by name.
    per_clip: Values (B,) behind a figure, for paired comparison.
    curves: For each name (x of the first entry, figures over clips of each following x).
    details: Whatever else, ready for JSON.
    """

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.per_clip: dict[str, np.ndarray] = {}
        self.curves: dict[str, tuple[int, list[Figure]]] = {}
        self.details: dict[str, Any] = {}

    def add(self, name: str, values_B: np.ndarray) -> None:
        """A figure from one value a clip."""
        self.figures[name], self.per_clip[name] = figure(values_B), np.asarray(values_B)

    def add_curve(self, name: str, values_BT: np.ndarray, first: int = 1) -> None:
        """A curve from a row a clip."""
        self.curves[name] = (first, [figure(column) for column in values_BT.T])

    def add_scores(self, name: str, scores: dict[str, np.ndarray], first: int = 1, pooled: bool = False) -> None:
        """Figure and curve of each frame metric.

        Args:
          pooled: PSNR of the mean error over clips, not the mean of their PSNRs, in which scenes where nothing moves
            would drown the others (a repeated frame is perfect there).
        """
        for metric in ("psnr", "ssim", "l1", "lpips"):
            if metric in scores:
                self.add(f"{name}_{metric}", scores[metric].mean(axis=1))
                self.add_curve(f"{name}_{metric}", scores[metric], first)
                if metric == "psnr" and pooled:
                    self.figures[f"{name}_psnr"] = pooled_psnr(scores["mse"].mean(axis=1))
                    self.curves[f"{name}_psnr"] = first, [pooled_psnr(column) for column in scores["mse"].T]
            else:
                self.figures[f"{name}_{metric}"] = NOT_MEASURED

    def to_json(self) -> dict[str, Any]:
        """Means by name, then intervals, curves, details and the values of each clip; null for what is not known."""
        flat = {name: f.mean for name, f in self.figures.items()}
        intervals = {name: {"low": f.low, "high": f.high, "n": f.n} for name, f in self.figures.items()}
        curves = {}
        for name, (first, figures) in self.curves.items():
            means, lows, highs, n = zip(*figures, strict=True)
            curves[name] = {"first": first, "mean": means, "low": lows, "high": highs, "n": n[0]}
        parts = {"intervals": intervals, "per_horizon": curves, **self.details, "per_clip": self.per_clip}
        return plain(flat | parts)


def plain(value: Any, digits: int = 5) -> Any:
    """For JSON: rounded floats, null for NaN, lists for arrays."""
    if isinstance(value, dict):
        return {str(key): plain(x, digits) for key, x in value.items()}
    if isinstance(value, Figure):
        return plain(value._asdict(), digits)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(x, digits) for x in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), digits) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def measure_rollouts(
    results: Results, play: Play, compare: Compare, truth: np.ndarray, actions: np.ndarray, reconstructed: dict
) -> dict[int, np.ndarray]:
    """Fidelity of rollouts from 1 and from 4 prompt frames, between two lines on the same frames.

    The lines are the last prompt frame repeated, and the tokenizer's reconstruction of the truth.

    Args:
      actions: (B, Tm1), the ones to play.
      reconstructed: Metrics (B, T) of the tokenizer's reconstruction.
    Returns:
      The predicted frames by number of prompt frames.
    """
    played = {}
    for prompt in (1, 4):
        if prompt >= truth.shape[1]:
            continue
        mark = "" if prompt == 1 else f"_{prompt}"
        future = truth[:, prompt:]
        copy = np.broadcast_to(truth[:, prompt - 1 : prompt], future.shape)
        played[prompt] = play(truth[:, :prompt], actions)
        results.add_scores(f"rollout{mark}", compare(played[prompt], future), pooled=True)
        results.add_scores(f"copy_last_frame{mark}", compare(copy, future), pooled=True)
        results.add_scores(
            f"reconstruction{mark}", {name: x[:, prompt:] for name, x in reconstructed.items()}, pooled=True
        )
    return played


def measure_control(
    results: Results,
    play: Play,
    compare: Compare,
    truth: np.ndarray,
    actions: np.ndarray,
    predicted: np.ndarray,
    num_actions: int,
    seed: int,
) -> None:
    """Δ_t PSNR (Genie, §3): by how much the right actions beat random ones, t frames after a prompt of one.

    Args:
      predicted: What `actions` led to, from frame 1 on.
    """
    horizons = [t for t in CONTROL_HORIZONS if t < truth.shape[1]]
    last = horizons[-1]
    random = np.random.default_rng(seed).integers(0, num_actions, (len(truth), last), np.int32)
    future = truth[:, 1 : last + 1]
    right = compare(predicted[:, :last], future)["psnr"]
    delta = right - compare(play(truth[:, :1], random), future)["psnr"]
    by_action: dict[str, dict[str, Figure]] = {}
    for t in horizons:
        results.add(f"delta_psnr_t{t}", delta[:, t - 1])
        by_action[str(t)] = {str(a): figure(delta[actions[:, t - 1] == a, t - 1]) for a in range(num_actions)}
    results.add_curve("delta_psnr", delta)
    results.details["delta_psnr_by_action"] = by_action


COINRUN_SAME = {"LEFT+DOWN": "LEFT", "DOWN": "NONE", "RIGHT+DOWN": "RIGHT"} | dict.fromkeys("DAWSQE", "NONE")
"""CoinRun's actions that do the same as another: down matters on crates only, and six keys do nothing."""


def merge_actions(names: Sequence[str], environment: str) -> tuple[list[str], np.ndarray]:
    """Names of the actions that differ in effect, and for each action the index of its name among them."""
    same = COINRUN_SAME if environment == "coinrun" else {}
    merged = [same.get(name, name) for name in names]
    kept = list(dict.fromkeys(merged))
    return kept, np.array([kept.index(name) for name in merged])


def measure_meaning(
    results: Results, latent: np.ndarray, true: np.ndarray, num_latent: int, names: Sequence[str], seed: int
) -> None:
    """How far latent actions tell true ones.

    A map of latent to true actions is learned on some transitions of the first half of the clips and scored on the
    second half.

    Args:
      latent, true: (B, Tm1); true ones are indices of `names`.
    """
    both = np.stack([latent, true], axis=-1)
    ami = lambda pairs: adjusted_mutual_information(contingency(pairs[..., 0], pairs[..., 1], num_latent, len(names)))
    results.figures["latent_action_ami"] = jackknife(ami, both)
    table = contingency(latent, true, num_latent, len(names))
    half, rng = len(latent) // 2, np.random.default_rng(seed)
    codes, labels = latent[:half].reshape(-1), true[:half].reshape(-1)
    accuracy: dict[str, Figure] = {}
    for n in LABELLED:
        if n > len(codes):
            accuracy[str(n)] = NOT_MEASURED
            continue
        hits = []
        for _ in range(DRAWS):
            drawn = rng.choice(len(codes), n, replace=False)
            guess = best_map(codes[drawn], labels[drawn], num_latent, len(names))
            hits.append((guess[latent[half:]] == true[half:]).mean(axis=1))
        accuracy[str(n)] = figure(np.mean(hits, axis=0))
        results.figures[f"action_accuracy_{n}"] = accuracy[str(n)]
    majority = np.bincount(labels, minlength=len(names)).argmax() if half else 0
    results.figures["action_accuracy_majority"] = figure((true[half:] == majority).mean(axis=1))
    results.details["latent_actions"] = {
        "transitions": int(latent.size),
        "action_names": list(names),
        "table": table,
        "accuracy": accuracy,
        "accuracy_majority": results.figures["action_accuracy_majority"],
        "accuracy_chance": 1 / len(names),
    }


def action_labels(table: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each latent action its most frequent true action, that one's share, and the number of transitions."""
    labels = []
    for row in np.asarray(table):
        n, best = int(row.sum()), int(row.argmax())
        labels.append({"name": names[best] if n else "", "share": round(row[best] / n, 4) if n else 0.0, "count": n})
    return labels


def measure_codes(results: Results, name: str, codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Usage, perplexity and dead codes of a codebook; returns how often each code occurs."""
    counts = np.stack([np.bincount(row.reshape(-1), minlength=num_codes) for row in codes])

    def perplexity(counts_BK: np.ndarray) -> float:
        p = counts_BK.sum(axis=0) / counts_BK.sum()
        return float(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))

    results.figures[f"{name}_codebook_usage"] = jackknife(lambda c: float((c.sum(axis=0) > 0).mean()), counts)
    results.figures[f"{name}_codebook_perplexity"] = jackknife(perplexity, counts)
    total = counts.sum(axis=0)
    results.details[f"{name}_codebook"] = {
        "codes": num_codes,
        "dead": int((total == 0).sum()),
        "tokens": int(total.sum()),
        "counts": total,
    }
    return total


def code_pictures(frames: np.ndarray, tokens: np.ndarray, counts: np.ndarray, patch_size: int, most: int = 32):
    """The mean patch of each of the most used codes, the most used first: uint8 (codes, patch, patch, C)."""
    patches = np.asarray(patchify(to_float(frames), patch_size)).reshape(tokens.size, -1)
    chosen = [k for k in np.argsort(-counts, kind="stable")[:most] if counts[k]]
    means = np.stack([patches[tokens.reshape(-1) == k].mean(axis=0) for k in chosen])
    return np.asarray(to_uint8(jnp.asarray(means))).reshape(len(chosen), patch_size, patch_size, -1)


def measure_distribution(
    results: Results,
    generated: np.ndarray,
    real: np.ndarray,
    others: np.ndarray,
    i3d: I3D | None,
    lpips: LPIPS | None,
    batch_size: int,
) -> None:
    """FVD and Fréchet distance of frames, of rollouts and of real clips from other real clips.

    Real clips against other real clips are the floor. With few clips both are far too high; compare them at equal n.

    Args:
      generated: Rollouts with their prompts; `real`: the same clips as they were; `others`: as many other clips.
    """
    sets = {"": generated, "_floor": real}
    for name in sets:
        results.figures[f"fvd{name}"] = results.figures[f"frame_distance{name}"] = NOT_MEASURED
    if len(real) < 2:
        return
    if i3d is not None and real.shape[1] >= I3D_MIN_FRAMES and real.shape[-1] == 3:
        read = jitted(i3d, lambda i3d, frames: i3d_features(i3d, to_float(frames)))
        reference = in_batches(read, batch_size, others)
        for name, clips in sets.items():
            results.figures[f"fvd{name}"] = jackknife(frechet_distance, in_batches(read, batch_size, clips), reference)
    if lpips is not None:
        look = jitted(lpips, lambda lpips, frames: frame_features(lpips, to_float(frames)))
        T = real.shape[1]
        times = sorted({round(1 + k * (T - 2) / (FRAMES_PER_CLIP - 1)) for k in range(FRAMES_PER_CLIP)})

        def features(clips: np.ndarray) -> np.ndarray:
            flat = clips[:, times].reshape(-1, *clips.shape[2:])
            return in_batches(look, CHUNK, flat).reshape(len(clips), len(times), -1)

        # Whole clips are left out for the interval: frames of one clip are alike.
        distance = lambda a, b: frechet_distance(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
        reference = features(others)
        for name, clips in sets.items():
            results.figures[f"frame_distance{name}"] = jackknife(distance, features(clips), reference)


def measure_stability(results: Results, video: np.ndarray, real: np.ndarray) -> None:
    """What becomes of long rollouts, frame by frame, beside real clips.

    sharpness: Mean absolute difference of neighbouring pixels' brightness, in 1/255.
    colour_distance: Total variation, from 0 to 1, between a frame's colour histogram and that of all real frames.
    unchanged: Share of pixels that the step before left within 4/255 in every channel.

    The figures are means over the last quarter of the rollout.

    Args:
      video: Rollouts with their prompt of one frame.
    """
    reference = colour_histogram(real).mean(axis=(0, 1))
    for name, frames in (("long_rollout", video), ("real", real)):
        curves = {
            "sharpness": sharpness(frames)[:, 1:],
            "colour_distance": np.abs(colour_histogram(frames) - reference).sum(axis=3).mean(axis=2)[:, 1:] / 2,
            "unchanged": unchanged(frames),
        }
        for measure, values_BT in curves.items():
            tail = values_BT[:, -(-3 * values_BT.shape[1] // 4) :] if name == "long_rollout" else values_BT
            tail = tail if tail.shape[1] else values_BT
            results.add(f"{name}_{measure}", tail.mean(axis=1))
            if name == "long_rollout":
                results.add_curve(f"{name}_{measure}", values_BT)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """See `measure_stability`: (B, T)."""
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
    """See `measure_stability`: (B, T - 1)."""
    steps = [
        np.abs(frames[:, t].astype(np.int16) - frames[:, t - 1]).max(axis=-1) <= UNCHANGED
        for t in range(1, frames.shape[1])
    ]
    return np.stack([step.mean(axis=(1, 2)) for step in steps], axis=1)
