"""What a world's heads say of rewards and ends, against what came to pass in held-out clips."""

import copy

import jax
import numpy as np

from evaluation.clips import Clips, choose_clips, in_batches, jitted, to_float
from evaluation.measured import Measured
from evaluation.statistics import figure, jackknife
from models.actions import no_actions
from models.dynamics import Seen
from models.ends import GOES_ON, TIME_UP
from models.genie import World
from models.heads import Judged
from models.motion import frames_before
from models.sampling import SamplingConfig, imagine, start_rollout
from utils.data import ClipSource
from utils.metrics import average_precision

PROMPT = 2  # frames: from the second one on, a clip of 16 has 15 actions whose outcomes are known


def measure_heads(
    world: World, source: ClipSource, sampling: SamplingConfig, num_clips: int, batch_size: int, seed: int
) -> Measured:
    """How well the heads find rewards and ends, with the clips' frames in view and in rollouts of their actions.

    Args:
      num_clips: Of which the outcomes are rare events; more than for anything else.
    Returns:
      Nothing for a world without heads, or of a dataset that does not tell what its heads say.
    """
    if world.heads is None or not source.tells(world.heads.cfg.names):
        return Measured()
    source = copy.copy(source)
    source.outcomes = world.heads.cfg.names
    clips = choose_clips(source, num_clips, seed)
    actions_BT = _actions(world, clips, batch_size)
    seen = in_batches(jitted(world, judge_seen), batch_size, clips.frames_BTHWC, actions_BT)
    T = source.seq_len

    def dreamt(world: World, prompt: jax.Array, actions_BT: jax.Array, number_B: jax.Array) -> Judged:
        def one(prompt: jax.Array, actions_1T: jax.Array, number: jax.Array) -> Judged:
            state = start_rollout(world, to_float(prompt)[None], actions_1T[:, : PROMPT - 1])
            key = jax.random.fold_in(jax.random.key(seed), number)
            return jax.tree.map(lambda x: x[0], imagine(world, state, actions_1T[:, PROMPT - 1 :], key, sampling)[1])

        return jax.vmap(one)(prompt, actions_BT[:, None], number_B)

    numbers = np.arange(len(actions_BT), dtype=np.int32)
    rolled = in_batches(jitted(world, dreamt), batch_size, clips.frames_BTHWC[:, :PROMPT], actions_BT, numbers)
    measured = Measured(details={"outcome_steps": T - PROMPT + 1, "outcome_clips": len(actions_BT)})
    for name, scores in (("reward", lambda j: j.reward_X), ("end", lambda j: j.end_X)):
        if name not in source.outcomes:
            continue
        label_BT = _labels(name, clips)
        measured |= _precision(name, scores(seen), label_BT, clips.levels_B)
        measured |= _precision(f"rollout_{name}", scores(rolled), label_BT[:, PROMPT - 1 :], clips.levels_B)
    if "reward" in source.outcomes:
        true_B = clips.rewards_BT[:, PROMPT - 1 :].sum(axis=1)  # type: ignore[index]
        found = jackknife(_correlation, expected_return(rolled), true_B, groups=[clips.levels_B] * 2)
        measured |= Measured({"return_correlation": found})
    return measured


def judge_seen(world: World, frames: jax.Array, actions_BT: jax.Array) -> Judged:
    """What the heads say of the action after each frame of clips (B, T), all of which they see up to that frame."""
    frames = to_float(frames)
    last = frames_before(frames)
    coded = world.tokenizer.code(frames, last) if world.tokenizer else None
    seen = Seen(coded, frames, last, actions_BT[:, :-1])
    assert world.heads
    return world.heads(world.dynamics.hidden(seen), world.dynamics.embed_actions(actions_BT))


def expected_return(judged: Judged) -> np.ndarray:
    """What each row of actions is expected to earn, (B,), if nothing is earned after an end."""
    lasts = np.cumprod(1 - np.asarray(judged.end_X), axis=1)
    before = np.concatenate([np.ones_like(lasts[:, :1]), lasts[:, :-1]], axis=1)
    return np.sum(before * np.asarray(judged.reward_X), axis=1)


def _actions(world: World, clips: Clips, batch_size: int) -> np.ndarray:
    """The action after each frame of clips (B, T), as the world takes it: inferred, but for the last, which is none."""
    if world.lam is None:
        assert clips.actions_BT is not None
        return clips.actions_BT.astype(np.float32 if world.cfg.dynamics.action_values else np.int32)
    infer = jitted(world, lambda world, frames: world.infer_actions(to_float(frames)))
    between = in_batches(infer, batch_size, clips.frames_BTHWC)
    return np.concatenate([between, no_actions(world.cfg.dynamics, (len(between), 1))], axis=1).astype(np.int32)


def _labels(name: str, clips: Clips) -> np.ndarray:
    """1 for what is to be found (B, T), NaN where no picture tells it."""
    if name == "reward":
        assert clips.rewards_BT is not None
        return (clips.rewards_BT > 0).astype(np.float64)
    assert clips.ends_BT is not None
    return np.where(clips.ends_BT == TIME_UP, np.nan, clips.ends_BT != GOES_ON)


def _precision(name: str, score_BT: np.ndarray, label_BT: np.ndarray, levels_B: np.ndarray) -> Measured:
    """Average precision and the base rate; parts without anything to be found count as the whole does."""
    whole = average_precision(score_BT, label_BT)

    def statistic(score: np.ndarray, label: np.ndarray) -> float:
        value = average_precision(score, label)
        return whole if np.isnan(value) else value

    found = jackknife(statistic, np.asarray(score_BT), label_BT, groups=[levels_B] * 2)
    base = figure(np.nanmean(label_BT, axis=1), levels_B)
    return Measured({f"{name}_ap": found, f"{name}_base_rate": base})


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan")
