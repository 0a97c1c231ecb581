"""The measures that a tokenizer, a LAM and a world take; a new measure is called from here."""

import dataclasses
import math
from typing import Literal, NamedTuple, Self

import jax
import numpy as np

from evaluation.actions import (
    LABELLED,
    action_labels,
    measure_meaning,
    merge_actions,
    true_action_labels,
)
from evaluation.buttons import CLIPS, measure_buttons
from evaluation.clips import Clips, choose_clips, in_batches, jitted, to_float
from evaluation.codes import code_sheet, mean_patches, measure_codes
from evaluation.control import action_sweep, measure_control, strung_actions
from evaluation.distribution import measure_distribution
from evaluation.fidelity import Compare, Scores, frame_metrics, infer, measure_fidelity, reconstruct
from evaluation.measured import Measured, of_picture
from evaluation.perceptual import LPIPS, load_i3d, load_lpips
from evaluation.rollouts import Player, measure_changed, measure_rollouts, play_on, roll_lam
from evaluation.stability import measure_motion, measure_stability
from models.errors import InputError
from models.genie import World
from models.lam import LAM
from models.tokenizer import Tokenizer
from utils.actions import ActionLabel
from utils.data import ClipSource
from utils.video import strip

SHOWN_CLIPS = 4  # in a picture
LONG_ROLLOUTS = 16  # at least, where so many clips are rolled out: what becomes of four is a matter of luck
LARGEST_I3D_BATCH = 16  # clips: their frames are enlarged to 224 × 224


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured, and by what. Zeros stand for defaults by device."""

    num_clips: int = 0
    """Clips to measure on, or all if there are fewer; 0: 512, on a CPU 32."""
    rollout_clips: int = 0
    """How many of them to roll out; 0: all, on a CPU 8."""
    fvd_clips: int = 0
    """Clips for FVD and the frame distance, and as many others to compare with; 0, and at most: --rollout_clips."""
    long_frames: int = 0
    """Frames of the long rollouts; 0: 300."""
    batch_size: int = 0
    """Clips at a time, which changes speed and memory alone; 0: 64, on a CPU 4."""
    sweep_sampling: bool = False
    """Also roll out with other steps, orders and temperatures, for a table of what is worth its time."""
    perceptual_net: Literal["alexnet", "vgg16"] = "alexnet"
    """Network of LPIPS and of the frame distance."""
    seed: int = 0
    """Of the choice of clips and of sampling."""

    def __post_init__(self):
        for name in ("num_clips", "rollout_clips", "fvd_clips", "long_frames", "batch_size"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` {getattr(self, name)}: must be positive, or 0 for the default")

    def with_defaults(self) -> Self:
        """Fills in what depends on the device."""
        cpu = jax.default_backend() == "cpu"
        num_clips = self.num_clips or (32 if cpu else 512)
        rollout_clips = min(num_clips, self.rollout_clips or (8 if cpu else num_clips))
        return dataclasses.replace(
            self,
            num_clips=num_clips,
            rollout_clips=rollout_clips,
            fvd_clips=min(rollout_clips, self.fvd_clips or rollout_clips),
            long_frames=self.long_frames or 300,
            batch_size=self.batch_size or (4 if cpu else 64),
        )


class Bench(NamedTuple):
    """What all measures of an evaluation share.

    plan: Without zeros, and with no more clips than there are.
    pool: Clips, more than are measured: others to compare real clips with, and enough labelled transitions.
    """

    plan: Plan
    source: ClipSource
    pool: Clips
    lpips: LPIPS | None
    compare: Compare

    @property
    def truth(self) -> np.ndarray:
        """The frames to measure on."""
        return self.pool.frames_BTHWC[: self.plan.num_clips]

    @property
    def levels(self) -> np.ndarray:
        """Of these clips."""
        return self.pool.levels_B[: self.plan.num_clips]


def set_up(plan: Plan, source: ClipSource) -> Bench:
    """Reads the clips and the network of LPIPS."""
    plan = plan.with_defaults()
    labelled = 2 * math.ceil(LABELLED[-1] / max(source.seq_len - 2, 1))  # transitions that have one before them
    pool = choose_clips(source, max(2 * plan.num_clips, labelled), plan.seed)
    found = len(pool.frames_BTHWC)
    plan = dataclasses.replace(plan, num_clips=min(plan.num_clips, found), rollout_clips=min(plan.rollout_clips, found))
    lpips = load_lpips(plan.perceptual_net)
    return Bench(plan, source, pool, lpips, frame_metrics(lpips))


def measure_tokenizer(bench: Bench, tokenizer: Tokenizer) -> tuple[Measured, Scores]:
    """Reconstructions, and the codebook if there is one; the second result holds the scores of each frame."""
    truth, cfg = bench.truth, tokenizer.cfg
    frames, tokens = reconstruct(tokenizer, truth, bench.plan.batch_size)
    scores = bench.compare(frames, truth)
    measured = measure_fidelity("tokenizer", scores, bench.levels, first=0)
    if tokens is not None:
        measured |= measure_codes("tokenizer", tokens, cfg.num_codes, bench.levels)
        measured |= code_sheet(mean_patches(truth, tokens, cfg.num_codes, cfg.patch_size))
    measured |= _pairs("reconstructions", truth, frames, "Truth over the tokenizer's reconstruction.")
    return measured, scores


class MeasuredLAM(NamedTuple):
    """What was measured of a LAM.

    actions_BTm1: Latent actions of the whole pool.
    labels: Of the latent actions, where the dataset knows the true ones.
    """

    measured: Measured
    actions_BTm1: np.ndarray
    labels: list[ActionLabel] | None


def measure_lam(bench: Bench, lam: LAM) -> MeasuredLAM:
    """Next frames, codebook and meaning of latent actions."""
    plan, truth, metadata = bench.plan, bench.truth, bench.source.metadata
    frames, actions = infer(lam, bench.pool.frames_BTHWC, plan.batch_size)
    levels = bench.pool.levels_B
    measured = measure_codes("lam", actions, lam.cfg.num_codes, levels)
    if lam.cfg.own_decoder:
        measured |= measure_fidelity("lam", bench.compare(frames[: len(truth)], truth[:, 1:]), bench.levels)
        n = plan.rollout_clips
        rolled = roll_lam(lam, truth[:n], actions[:n], plan.batch_size)
        measured |= measure_fidelity("lam_rollout", bench.compare(rolled, truth[:n, 1:]), levels[:n], pooled=True)
        measured |= measure_changed("lam_rollout", rolled, truth[:n], levels[:n])
    if not metadata.action_names or bench.pool.actions_BT is None:
        return MeasuredLAM(measured, actions, None)
    names, index_A = merge_actions(metadata.action_names, metadata.same_actions)
    meaning = measure_meaning(
        actions, index_A[bench.pool.actions_BT[:, :-1]], lam.cfg.num_codes, names, plan.seed, levels
    )
    labels = action_labels(meaning.details["latent_actions"]["table"], names)
    return MeasuredLAM(measured | meaning, actions, labels)


def measure_presses(bench: Bench, lam: LAM, play: Player) -> Measured:
    """What each latent action does in a world, from prompts out of more clips than all else is measured on."""
    plan = bench.plan
    frames = choose_clips(bench.source, max(CLIPS, len(bench.pool.frames_BTHWC)), plan.seed).frames_BTHWC
    actions = in_batches(jitted(lam, lambda lam, frames: lam.infer(to_float(frames))), plan.batch_size, frames)
    return measure_buttons(play, frames, actions, lam.cfg.num_codes, plan.seed)


def true_actions(bench: Bench, world: World) -> tuple[np.ndarray, list[ActionLabel] | None]:
    """The dataset's own actions of the whole pool (B, Tm1), for a world that was trained on such, and their labels;
    rows, which have none, where an action has columns.

    Raises:
      InputError: The dataset has none, or has others.
    """
    names, columns = bench.source.metadata.action_names, bench.source.metadata.action_columns
    actions, values = bench.pool.actions_BT, tuple(len(column.values or ()) for column in columns)
    if actions is None or len(names or ()) != world.num_actions or values != world.cfg.dynamics.action_values:
        raise InputError(
            f"`data_dir` {bench.source.folder}: this world was trained on true actions, which are missing here"
        )
    if names is None:
        return actions[:, :-1].astype(np.float32), None
    return actions[:, :-1], true_action_labels(actions, names)


def measure_world(
    bench: Bench, play: Player, actions: np.ndarray, reconstruction: Scores | None, labels: list[ActionLabel] | None
) -> Measured:
    """Everything that takes rollouts.

    Args:
      actions: (B, Tm1), those of the whole pool, for the world to play.
      reconstruction: What `measure_tokenizer` gives; None of a world without a tokenizer.
      labels: Of the actions, for a picture.
    """
    plan, everything = bench.plan, bench.pool.frames_BTHWC
    n, num_actions = plan.rollout_clips, play.num_actions
    num_long = min(n, max(plan.batch_size, LONG_ROLLOUTS))
    pressed = strung_actions(actions, num_long, plan.long_frames, plan.seed + 1)
    truth, actions, levels = everything[:n], actions[:n], bench.levels[:n]

    played = play_on(play, truth, actions)
    limit = reconstruction.cut(slice(n)) if reconstruction else None
    measured = measure_rollouts(bench.compare, truth, played, limit, levels)
    measured |= measure_control(play, bench.compare, truth, actions, played[1], num_actions, plan.seed, levels)

    rollouts = np.concatenate([truth[:, :1], played[1]], axis=1)
    caption = "Truth over rollouts from the first frame with the truth's actions."
    measured |= _pairs("rollouts", truth, rollouts, caption)
    measured |= measure_motion(rollouts, truth, levels)
    names = [label.name for label in labels] if labels else [""] * num_actions
    if num_actions:
        measured |= action_sweep(play, truth[0, 0], truth.shape[1] - 1, names)

    m, others = from_other_levels(bench.pool.levels_B, min(plan.fvd_clips, n))
    size = min(plan.batch_size, LARGEST_I3D_BATCH)
    sets = rollouts[:m], truth[:m], everything[others]
    measured |= measure_distribution(*sets, load_i3d(), bench.lpips, size, (levels[:m], bench.pool.levels_B[others]))

    prompts = truth[:num_long, :1]
    video = np.concatenate([prompts, play(prompts, pressed)], axis=1)
    measured |= measure_stability(video, everything, levels[: len(prompts)], bench.pool.levels_B)
    return measured | Measured(details={"long_frames": plan.long_frames})


def from_other_levels(levels_B: np.ndarray, most: int) -> tuple[int, np.ndarray]:
    """How many clips, from the first on, can be compared with as many of other levels, and which these are."""
    for m in range(most, 0, -1):
        others = np.flatnonzero(~np.isin(levels_B, levels_B[:m]))
        if len(others) >= m:
            return m, others[-m:]
    return 0, np.arange(0)


def _pairs(name: str, truth: np.ndarray, frames: np.ndarray, caption: str) -> Measured:
    rows = [row for pair in zip(truth[:SHOWN_CLIPS], frames[:SHOWN_CLIPS], strict=True) for row in pair]
    return of_picture(name, strip(rows), caption)
