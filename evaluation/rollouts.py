"""Rollouts: how a world is played, and how near its rollouts are to the clips they began from."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evaluation.clips import in_batches, jitted, to_float, to_uint8
from evaluation.fidelity import Compare, Scores, measure_fidelity, pooled_psnr
from evaluation.measured import Measured
from evaluation.stability import alike
from models.genie import World
from models.lam import LAM
from models.sampling import SamplingConfig, next_frame, start_rollout

PROMPTS = (1, 4)  # frames that rollouts start from

Play = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From prompts and actions to the frames that follow: `Player.__call__`, or what stands in for it."""


class Player:
    """Plays a world. A single step is compiled, and serves rollouts of every length.

    What a clip becomes depends on the seed, the clip's number, its prompt and its actions; the batch size changes
    nothing. The same clip with other actions meets the same noise, so that a difference is the actions'.
    """

    def __init__(self, world: World, sampling: SamplingConfig, batch_size: int, seed: int):
        self.num_actions, self.batch_size = world.num_actions, batch_size
        self._frames, self._seconds = 0, 0.0  # since the step was compiled
        self._warm = False

        def start(world, prompt_BTHWC, actions_BTm1):
            one = lambda prompt, actions: start_rollout(world, to_float(prompt)[None], actions[None])
            axes = _axes(jax.eval_shape(one, prompt_BTHWC[0], actions_BTm1[0]))
            return jax.vmap(one, out_axes=axes)(prompt_BTHWC, actions_BTm1)

        def step(world, state, action_B, number_B):
            def one(state, action, number):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), state.frame)
                frame_1HWC, state = next_frame(world, state, action[None], key, sampling)
                return to_uint8(frame_1HWC[0]), state

            axes = _axes(state)
            return jax.vmap(one, in_axes=(axes, 0, 0), out_axes=(0, axes))(state, action_B, number_B)

        self._start, self._step = jitted(world, start), jitted(world, step)

    @property
    def frames_per_second(self) -> float:
        """Of all rollouts so far, without compiling."""
        return self._frames / self._seconds

    def __call__(self, prompt: np.ndarray, actions: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
        """The frames that follow a prompt.

        Args:
          prompt: T frames.
          actions: (B, S), or rows; `actions[:, t]` leads to frame t + 1, the first T - 1 between prompt frames.
          numbers: (B,), of the clips; their rows by default.
        Returns:
          S + 1 - T frames.
        """
        numbers = np.arange(len(prompt)) if numbers is None else numbers
        return in_batches(self._play, self.batch_size, prompt, as_played(actions), numbers.astype(np.int32))

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
        self._frames += video.shape[0] * video.shape[1]
        self._seconds += time.perf_counter() - began
        return video


def as_played(actions: np.ndarray) -> np.ndarray:
    """Actions as a world takes them: int32, or rows of float32."""
    return actions.astype(np.float32 if actions.dtype.kind == "f" else np.int32)


def _axes(state: Any) -> Any:
    """Axes of the clips in a rollout's state; the frame number is the same for all of them."""
    return jax.tree.map(lambda _: 0, state)._replace(frame=None)


def play_on(play: Play, truth: np.ndarray, actions: np.ndarray) -> dict[int, np.ndarray]:
    """Plays clips on from their first frames with actions (B, Tm1): predicted frames by number of prompt frames."""
    return {prompt: play(truth[:, :prompt], actions) for prompt in PROMPTS if prompt < truth.shape[1]}


def measure_rollouts(
    compare: Compare,
    truth: np.ndarray,
    played: Mapping[int, np.ndarray],
    reconstruction: Scores | None,
    levels_B: np.ndarray | None = None,
) -> Measured:
    """Fidelity of rollouts, between two lines on the same frames.

    The lines are the last prompt frame repeated, and the tokenizer's reconstruction of the truth.

    Args:
      played: What `play_on` gives.
      reconstruction: Of all frames of the clips; None without a tokenizer.
      levels_B: Of the clips; those of one level count as dependent.
    """
    measured = Measured()
    for prompt, predicted in played.items():
        mark = "" if prompt == 1 else f"_{prompt}"
        future = truth[:, prompt:]
        copy = np.broadcast_to(truth[:, prompt - 1 : prompt], future.shape)
        measured |= measure_fidelity(f"rollout{mark}", compare(predicted, future), levels_B, pooled=True)
        measured |= measure_fidelity(f"copy_last_frame{mark}", compare(copy, future), levels_B, pooled=True)
        if reconstruction:
            rest = reconstruction.cut(slice(None), slice(prompt, None))
            measured |= measure_fidelity(f"reconstruction{mark}", rest, levels_B, pooled=True)
        measured |= measure_changed(f"rollout{mark}", predicted, truth, levels_B)
        measured |= measure_changed(f"copy_last_frame{mark}", copy, truth, levels_B)
    return measured


def measure_changed(
    subject: str, predicted: np.ndarray, truth: np.ndarray, levels_B: np.ndarray | None = None
) -> Measured:
    """PSNR of the clips' mean error on those pixels alone that change in truth, from each frame to the next.

    Args:
      predicted: The last frames of `truth`, which has at least one more before them.
    """
    S = predicted.shape[1]
    changed = np.stack(
        [~alike(truth[:, t - 1], truth[:, t]) for t in range(truth.shape[1] - S, truth.shape[1])], axis=1
    )
    mse_B = np.full(len(truth), np.nan)  # of clips in which nothing changes
    for i in np.flatnonzero(changed.any(axis=(1, 2, 3))):
        error = np.square(predicted[i].astype(np.float32) - truth[i, -S:]).mean(axis=-1)
        mse_B[i] = error[changed[i]].mean(dtype=np.float64) / 255**2
    name = f"{subject}_changed"
    return Measured({f"{name}_psnr": pooled_psnr(mse_B, levels_B)}, {f"{name}_mse": mse_B})


def roll_lam(lam: LAM, truth: np.ndarray, actions: np.ndarray, batch_size: int) -> np.ndarray:
    """What the LAM's own decoder makes of a clip's first frame and its actions, frame after frame: (B, Tm1, H, W, C).

    It has no cache, so each frame takes a pass over the clip.
    """

    def forward(lam: LAM, first: jax.Array, actions: jax.Array) -> jax.Array:
        vectors = lam.vq.lookup(actions)
        S = actions.shape[1]
        past = jnp.repeat(to_float(first)[:, None], S, axis=1)
        made = lambda past: jnp.clip(lam.predict(past, vectors), 0.0, 1.0)
        # Frame t of what is made rests on frames up to t of the past: after t passes those are the decoder's own.
        step = lambda _, past: jnp.concatenate([past[:, :1], made(past)[:, :-1]], axis=1)
        return to_uint8(made(jax.lax.fori_loop(0, S - 1, step, past)))

    return in_batches(jitted(lam, forward), batch_size, truth[:, 0], actions.astype(np.int32))
