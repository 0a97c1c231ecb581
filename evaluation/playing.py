"""Playing: how many levels of the real game each player solves, and how that grows with labelled steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from evaluation.charts import Chart, Line
from evaluation.measured import Measured
from evaluation.page import Section, Table
from evaluation.statistics import difference, figure
from evaluation.table import figure_of, figure_text

MAPS = {
    "code": "by the code alone, as in the paper",
    "pair": "by the code and the one before it",
    "context": "by the code and what the policy sees",
}
"""Ways to learn which true action a latent one stands for."""
KEYS = ("solved", "returns", "steps")
ORACLE = "oracle"
BEFORE = "clone"
"""Who a policy was before it learned in a world; what follows the name says how it acts."""


class Clone(NamedTuple):
    """A policy of latent actions, by how many labels and which map it acts through."""

    labels: int
    kind: str

    @property
    def name(self) -> str:
        return f"latent, {self.labels} labels, {self.kind}"


def measured_play(found: Mapping[str, Any], levels_N: np.ndarray) -> Measured:
    """Figures of players by name, each with `solved_N`, `returns_N`, `steps_N` of the first levels, and `actions_A`.

    Levels that come twice count as dependent.
    """
    figures, per_level = {}, {}
    for name, played in found.items():
        for key in KEYS:
            values_N = np.asarray(getattr(played, f"{key}_N"), float)
            figures[f"{name}: {key}"] = figure(values_N, levels_N[: len(values_N)])
        per_level[f"{name}: solved"] = played.solved_N
    actions = {name: played.actions_A for name, played in found.items()}
    return Measured(figures, per_level, details={"players": list(found), "actions": actions, "levels": levels_N})


def compared(metrics: Mapping[str, Any], name: str, other: str) -> dict[str, Any]:
    """By how much a player solves more levels than another one of the same, in points of a hundred."""
    ours, theirs = (np.array(metrics["per_clip"][f"{n}: solved"], float) for n in (name, other))
    n = min(len(ours), len(theirs))
    pairs = 100 * theirs[:n], 100 * ours[:n]
    return difference(figure(pairs[0]), figure(pairs[1]), pairs, np.array(metrics["levels"][:n]))._asdict()


def best_sticky(metrics: Mapping[str, Any]) -> str | None:
    """Name of the best of those who do not look at the game."""
    blind = [name for name in metrics["players"] if name.startswith(("sticky", "most frequent", "next most frequent"))]
    return max(blind, key=lambda name: metrics[f"{name}: solved"] or 0, default=None)


def sections(metrics: Mapping[str, Any]) -> list[Section]:
    """What a report of players holds."""
    main = Clone(metrics["main_labels"], "context").name
    curve = [name for name in metrics["players"] if name.startswith("latent") and name != main]
    shown = [name for name in metrics["players"] if name not in curve]
    made = [Section("Players", _setting(metrics), [_players(metrics, shown), *_against(metrics, shown)])]
    if curve:
        text = "Labelled steps of the training data tell which true action a latent one stands for: "
        text += "; ".join(f"{name}, {says}" for name, says in MAPS.items())
        text += ". Without any, each latent action stands for one at random."
        made.append(Section("Labels", text, [_players(metrics, [main, *curve]), _curve(metrics)]))
    return made


def _setting(metrics: Mapping[str, Any]) -> str:
    return (
        f"{metrics['game']}, {metrics['num_levels']} levels of the {metrics['split']} split, the same for all players, "
        f"at most {metrics['max_steps']} steps in each; policies at temperature {metrics['temperature']}."
    )


def _players(metrics: Mapping[str, Any], names: list[str]) -> Table:
    rows = []
    for name in names:
        solved, returns, steps = (figure_of(metrics, f"{name}: {key}") for key in KEYS)
        share = solved and solved["mean"] is not None and {k: solved[k] and 100 * solved[k] for k in solved}
        n = returns["n"] if returns else 0
        cells = [figure_text(share or None, 1), figure_text(returns, 2), figure_text(steps, 0), str(n)]
        rows.append([name, *cells])
    return Table(["", "levels solved, % ↑", "earned ↑", "steps", "levels"], rows)


def _against(metrics: Mapping[str, Any], shown: list[str]) -> list[Table]:
    """Policies against the best sticky player, the oracle, and who they were before, level by level."""
    before = (name for name in metrics["players"] if name.startswith(BEFORE))
    others = [name for name in (best_sticky(metrics), ORACLE, *before) if name and name in metrics["players"]]
    policies = [name for name in shown if name.startswith(("latent", "policy", ORACLE))]
    told = metrics["per_clip"]
    rows = [
        [f"{name} − {other}", figure_text(compared(metrics, name, other), 1)]
        for name in policies
        for other in others
        if name != other and None not in told[f"{other}: solved"]
    ]
    return [Table(["the same levels", "points more of levels solved"], rows)] if rows else []


def _curve(metrics: Mapping[str, Any]) -> Chart:
    labels = [num for num in metrics["labels"] if num]
    lines = []
    for kind in MAPS:
        found = [figure_of(metrics, f"{Clone(num, kind).name}: solved") or {} for num in labels]
        lines.append(Line(f"latent, {kind}", labels, *([f.get(k) for f in found] for k in ("mean", "low", "high"))))
    level = {name: figure_of(metrics, f"{name}: solved") for name in (ORACLE, best_sticky(metrics) or "random")}
    level["no labels"] = figure_of(metrics, f"{Clone(0, 'code').name}: solved")
    lines += [Line(name, labels, [f["mean"]] * len(labels)) for name, f in level.items() if f]
    return Chart("Levels solved by the number of labels", "labelled steps", lines, log_x=True)


def described(name: str, played: Any) -> str:
    """A player's levels in a line."""
    solved, n = figure(played.solved_N), len(played.returns_N)
    share = f"{solved.mean:.1%} of {n} levels solved, " if solved.n else f"{n} levels, "
    return f"{name:>34}: {share}{played.returns_N.mean():.2f} earned in {played.steps_N.mean():.0f} steps"
