"""The table of metrics: what each figure in metrics.json is called, in which unit it is, and what it says.

    python -m evaluation.table                           # the tables of docs/evaluation.md
    python -m evaluation.table --metrics metrics.json    # the figures that sum up a report, as a table for a README

Reports, comparisons and summaries read names, units and arrows from here, and from nowhere else.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from evaluation.actions import LABELLED
from evaluation.control import HORIZONS
from evaluation.measured import read_metrics
from utils.cli import run


class Metric(NamedTuple):
    """A row of the table.

    key: In metrics.json.
    unit: Empty for numbers without one.
    better: Which way is better; empty where neither is, as for the figures of real clips.
    says: One sentence.
    digits: Behind the point, where it is shown.
    """

    key: str
    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    says: str
    digits: int = 3

    @property
    def arrow(self) -> str:
        """Which way is better, as a sign."""
        return {"higher": "↑", "lower": "↓", "": ""}[self.better]

    @property
    def title(self) -> str:
        """Name, unit and arrow, for instance "PSNR, dB ↑"."""
        return f"{self.name}, {self.unit} {self.arrow}".strip() if self.unit else f"{self.name} {self.arrow}".strip()


class Subject(NamedTuple):
    """What the same metrics are measured of.

    key: Comes before the metric's: rollout + psnr → rollout_psnr.
    given: Whether the clips alone decide, so that no value is better than another.
    """

    key: str
    name: str
    says: str
    given: bool = False

    def of(self, metric: Metric) -> Metric:
        """A metric of this subject."""
        return metric._replace(
            key=f"{self.key}_{metric.key}",
            name=f"{metric.name}: {self.name}",
            better="" if self.given else metric.better,
            says=f"{self.says} {metric.says}",
        )


FRAMES = (
    Metric(
        "psnr",
        "PSNR",
        "dB",
        "higher",
        "Peak signal-to-noise ratio; equal frames score 60. Of rollouts, that of the mean error over clips.",
        2,
    ),
    Metric("psnr_mean", "mean of PSNRs", "dB", "higher", "Of the clips' own; still scenes weigh most.", 2),
    Metric("ssim", "SSIM", "", "higher", "Structural similarity (Wang et al. 2004), 1 for equal frames."),
    Metric("lpips", "LPIPS", "", "lower", "Perceptual distance (Zhang et al. 2018), 0 for equal frames.", 4),
    Metric("l1", "L1", "", "lower", "Mean absolute difference of pixels in [0, 1].", 4),
)
MODELS = (
    Subject("tokenizer", "tokenizer's reconstruction, all frames", "Frames through the tokenizer and back."),
    Subject("lam", "LAM's next frame", "Frames that the LAM predicts from the past and its latent action."),
)
ROLLOUTS = (
    Subject("rollout", "rollout from 1 frame", "Frames that the world predicts from 1 frame and the clip's actions."),
    Subject("copy_last_frame", "last of 1 prompt frame repeated", "A picture that stands still.", given=True),
    Subject("reconstruction", "reconstruction of the same frames", "The tokenizer's limit to the rollout."),
    Subject(
        "lam_rollout", "LAM's own decoder rolled out", "Frames that the LAM makes of its own, with the same actions."
    ),
    Subject("rollout_4", "rollout from 4 frames", "As from 1 frame, with motion to see in the prompt."),
    Subject("copy_last_frame_4", "last of 4 prompt frames repeated", "A picture that stands still.", given=True),
    Subject("reconstruction_4", "reconstruction of the same frames", "The tokenizer's limit to the rollout."),
)
DISTRIBUTION = (
    Metric("fvd", "FVD of rollouts", "", "lower", "Fréchet distance of I3D's logits from other real clips.", 2),
    Metric("fvd_floor", "FVD of real clips (floor)", "", "", "The same of the clips that rollouts began from.", 2),
    Metric(
        "frame_distance",
        "Fréchet distance of rollouts' frames",
        "",
        "lower",
        "Of the last feature map of the LPIPS network, from frames of other real clips; no FID: the network differs.",
        2,
    ),
    Metric("frame_distance_floor", "the same of real frames (floor)", "", "", "The same of these clips' frames.", 2),
)
DELTA_PSNR = Metric(
    "delta_psnr",
    "Δ PSNR",
    "dB",
    "higher",
    "By how much the clip's own actions beat random ones (Genie, §3), t frames after a prompt of one, with the same "
    "noise; at 0 the world ignores its actions.",
    2,
)
CHANGED = Metric(
    "changed_psnr", "PSNR of what changes", "dB", "higher", "Of those pixels alone that change in truth.", 2
)
CONTROL = tuple(
    Metric(f"delta_psnr_t{t}", f"Δ{t} PSNR", "dB", "higher", f"The same, {t} frames after the prompt.")
    for t in HORIZONS
)
MEANING = (
    Metric(
        "latent_action_ami",
        "adjusted mutual information",
        "",
        "higher",
        "Agreement of latent with true actions (Vinh et al. 2010), 1 for the same, about 0 for unrelated.",
    ),
    Metric(
        "latent_action_pair_ami",
        "the same of pairs",
        "",
        "higher",
        "Of a latent action together with the one before it.",
    ),
)
ACCURACY = (
    *(
        Metric(
            f"action_accuracy_{n}",
            f"map from {n} labels",
            "",
            "higher",
            f"Share of true actions that a map from latent ones tells, learned from {n} transitions of other clips.",
        )
        for n in LABELLED
    ),
    *(
        Metric(
            f"action_accuracy_pair_{n}",
            f"map from {n} labels, of pairs",
            "",
            "higher",
            "The same from a latent action and the one before it.",
        )
        for n in LABELLED
    ),
    Metric("action_accuracy_majority", "most frequent action", "", "", "The same of always naming the most frequent."),
)
OUTCOMES = (
    *(
        Metric(f"{key}{name}_ap", f"average precision of {name}s{where}", "", "higher", says)
        for key, where, says in (
            ("", "", "Of what the heads say of each next step, with the clip in view up to there."),
            ("rollout_", " in rollouts", "The same in rollouts of the clip's actions from its second frame on."),
        )
        for name in ("reward", "end")
    ),
    *(
        Metric(f"{key}{name}_base_rate", f"base rate of {name}s{where}", "", "", f"Share of steps that {does}.")
        for key, where in (("", ""), ("rollout_", " in rollouts"))
        for name, does in (("reward", "earn something"), ("end", "end a level"))
    ),
    Metric(
        "return_correlation",
        "correlation of returns",
        "",
        "higher",
        "Pearson's, of what these rollouts are expected to earn with what the clips earned.",
    ),
)
CODES = (
    Metric("usage", "share used", "", "higher", "Share of the codes that occur on these clips."),
    Metric("perplexity", "perplexity", "", "higher", "So many codes, evenly used, have the same entropy.", 1),
)
CODEBOOKS = (
    Subject("tokenizer_codebook", "tokenizer", "The tokens of all patches."),
    Subject("lam_codebook", "latent actions", "One of each transition."),
)
DRIFT = (
    Metric("sharpness", "sharpness", "1/255", "", "Mean difference of neighbouring pixels' brightness."),
    Metric(
        "colour_distance",
        "colour distance",
        "",
        "",
        "Total variation, 0 to 1, between a frame's histogram and that of all real frames.",
    ),
    Metric(
        "unchanged", "share of unchanged pixels", "", "", "Those within 4/255 of the frame before in every channel."
    ),
)
VIDEOS = (
    Subject(
        "long_rollout", "rollouts", "The last quarter of long rollouts with actions of held-out clips, strung together."
    ),
    Subject("real", "real clips", "What real clips have, for comparison.", given=True),
)


def _each(subjects: Iterable[Subject], metrics: Sequence[Metric]) -> list[Metric]:
    return [subject.of(metric) for subject in subjects for metric in metrics]


METRICS = {
    metric.key: metric
    for metric in (
        *_each((*MODELS, *ROLLOUTS), FRAMES),
        *_each((subject for subject in ROLLOUTS if not subject.key.startswith("reconstruction")), [CHANGED]),
        *DISTRIBUTION,
        *CONTROL,
        *MEANING,
        *ACCURACY,
        *OUTCOMES,
        *_each(CODEBOOKS, CODES),
        *_each(VIDEOS, DRIFT),
    )
}
"""All metrics by key."""
HEADLINES = (
    *("tokenizer_psnr", "lam_psnr", "rollout_psnr", "copy_last_frame_psnr"),
    *("rollout_psnr_mean", "copy_last_frame_psnr_mean", "delta_psnr_t4", "fvd"),
)
"""Keys of those that sum up a report."""

WORLDS = {
    metric.key: metric
    for metric in (
        Metric(
            "margin",
            "ahead of the repeated frame",
            "dB",
            "higher",
            "PSNR of the mean error of rollouts from 1 frame, less that of this frame repeated.",
            2,
        ),
        METRICS["rollout_psnr"]._replace(name="PSNR"),
        METRICS["rollout_psnr_mean"]._replace(name="mean of PSNRs"),
        METRICS["rollout_ssim"]._replace(name="SSIM"),
        METRICS["rollout_lpips"]._replace(name="LPIPS"),
        METRICS["delta_psnr_t4"],
        METRICS["fvd"]._replace(name="FVD"),
        Metric(
            "last_sharpness", "sharpness at the end", "", "", "That of the rollouts' last frame, over the truth's.", 2
        ),
        Metric("last_unchanged", "unchanged at the end", "", "", "Share of pixels in the last step, less the truth's."),
    )
}
"""Those of the table of several worlds by key; what is not in `METRICS` is made for it of what a world's report has."""
OF_SEVERAL = tuple(metric for metric in WORLDS.values() if metric.key not in METRICS)


def figure_text(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """For instance "28.312 ± 0.421"; "not measured" for none."""
    if figure is None or figure.get("mean") is None:
        return "not measured"
    text = f"{figure['mean']:.{digits}f}"
    if figure.get("low") is None:
        return text
    return f"{text} ± {(figure['high'] - figure['low']) / 2:.{digits}f}"


def figure_of(metrics: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """A figure of metrics.json with its interval, or None."""
    if key not in metrics.get("intervals", {}):
        return None
    return {"mean": metrics[key]} | metrics["intervals"][key]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> list[str]:
    """Lines of a table in Markdown; columns of numbers, all but the first, are set right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def reference() -> str:
    """The whole table in Markdown: subjects and metrics where each is measured of each, and all others."""

    def subjects(subjects: Iterable[Subject]) -> list[str]:
        rows = [(f"`{s.key}_…`", s.name, s.says) for s in subjects]
        return [*markdown_table(("key begins", "of", "what that is"), rows, numbers=False), ""]

    def metrics(metrics: Iterable[Metric], begin: str = "") -> list[str]:
        rows = [(f"`{begin}{m.key}`", m.name, m.unit or "–", m.better or "–", m.says) for m in metrics]
        return [*markdown_table(("key", "name", "unit", "better", "what it says"), rows, numbers=False), ""]

    lines = ["### Fidelity", "", *subjects((*MODELS, *ROLLOUTS)), *metrics((*FRAMES, CHANGED), "…_")]
    lines += ["### Distribution", "", *metrics(DISTRIBUTION)]
    lines += ["### Controllability", "", *metrics((DELTA_PSNR, *CONTROL))]
    lines += ["### Meaning of latent actions", "", *metrics((*MEANING, *ACCURACY))]
    lines += ["### Rewards and ends", "", *metrics(OUTCOMES)]
    lines += ["### Codebooks", "", *subjects(CODEBOOKS), *metrics(CODES, "…_")]
    lines += ["### Stability of long rollouts", "", *subjects(VIDEOS), *metrics(DRIFT, "…_")]
    lines += ["### Several worlds", "", *metrics(OF_SEVERAL)]
    return "\n".join(lines).rstrip()


def headlines(metrics: Mapping[str, Any]) -> str:
    """The figures that sum up a report, as a table in Markdown."""
    rows = []
    for metric in (METRICS[key] for key in HEADLINES if key in metrics):
        rows.append((metric.title, figure_text(figure_of(metrics, metric.key), metric.digits)))
    return "\n".join(markdown_table(("", "mean ± 95 % interval"), rows))


@dataclasses.dataclass(frozen=True)
class Config:
    """Prints the table of metrics in Markdown."""

    metrics: str = ""
    """A metrics.json of evaluate.py: prints the figures that sum it up."""


def main(cfg: Config) -> None:
    print(headlines(read_metrics(cfg.metrics, "metrics")) if cfg.metrics else reference())


if __name__ == "__main__":
    run(main, Config)
