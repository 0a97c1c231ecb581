"""Plays unseen levels of the real game by a cloned policy, beside its oracle and others who play the same levels.

    python evaluate_policy.py --checkpoint runs/policy --oracle_checkpoint runs/oracle

Which true action a latent one stands for is learned from a few labelled steps of the training data; how far that goes
is told by the number of labels (Genie, §3.3). Writes report.html, report.md and metrics.json.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agents.labels import CodeMap, ContextMap, Labelled, PairMap, Steps, in_windows, label, others
from agents.policy import Chooser, PolicyPlayer
from evaluation.measured import Measured, write_json
from evaluation.page import write_page
from evaluation.playing import BEFORE, MAPS, ORACLE, Clone, described, measured_play, sections
from models.errors import InputError
from models.genie import load, load_agent, read_config
from models.policy import Agent
from sources.environment import Environment, RecordingOptions
from sources.once import Played, Player, play, scripted
from sources.procgen import PlanningPlayer, Procgen
from sources.registry import open_game
from sources.walker import Walker
from utils.cli import DEFAULT_CACHE, run, set_up_jax
from utils.data import ClipSource


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures a policy by the levels that it solves."""

    checkpoint: str = "runs/policy"
    """--ckpt_dir of the training of a policy, of latent or of true actions."""
    oracle_checkpoint: str = ""
    """--ckpt_dir of the training of one of true actions, to be compared with; empty for none."""
    data_dir: str = ""
    """Dataset that labels are taken from, and that tells the game and its options; default: the policy's."""
    output_dir: str = ""
    """Where to write; default: evaluation/ in the checkpoint's folder."""
    num_levels: int = 500
    """Levels that everybody plays."""
    curve_levels: int = 0
    """Of these, as many for the other numbers of labels and the other maps; 0 for all."""
    planner_levels: int = 0
    """Of these, as many for the planner, which takes long; 0 for all."""
    max_steps: int = 300
    """Time steps that a level may take."""
    split: Literal["test", "val", "train"] = "test"
    """Which levels: those of the split of no dataset's training, unless it is train."""
    labels: tuple[int, ...] = (0, 10, 50, 200, 1000)
    """Numbers of labelled steps from which the map from latent to true actions is learned."""
    main_labels: int = 200
    """The one of them with which the policy is compared with the others."""
    temperature: float = 0.5
    """Of the choice among the policy's actions; 0 takes the likeliest one."""
    seed: int = 0
    """Of the levels, the labels and all choices."""
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        for name in ("num_levels", "max_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")
        if self.main_labels not in self.labels:
            raise InputError(f"`main_labels` {self.main_labels}: must be one of `labels` {self.labels}")
        if self.temperature < 0:
            raise InputError(f"`temperature` {self.temperature}: must not be negative")


@dataclasses.dataclass(frozen=True)
class Table:
    """Where everybody plays: the game, and the same levels for each."""

    cfg: Config
    game: Environment
    options: RecordingOptions
    num_actions: int

    def play(self, name: str, make_player: Any, num: int = 0) -> Played:
        """How the first `num` levels go, 0 for all, by the player that `make_player` makes for them."""
        cfg, began = self.cfg, time.perf_counter()
        levels = self.game.levels(self.options, cfg.split, cfg.num_levels, cfg.seed)
        player: Player = make_player(levels)
        played = play(levels, player, cfg.max_steps, self.num_actions, num or cfg.num_levels)
        levels.close()
        print(f"{described(name, played)} ({time.perf_counter() - began:.0f} s)", flush=True)
        return played


def action_shares(source: ClipSource, seed: int, num_clips: int = 256) -> np.ndarray:
    """How often each action is done in the dataset."""
    rng = np.random.default_rng(seed)
    clips = rng.permutation(len(source))[:num_clips].tolist()
    actions = source.windows(clips, rng.random(len(clips)).tolist()).actions_BT
    return np.bincount(actions.reshape(-1), minlength=source.metadata.num_actions) / actions.size


def action_map(kind: str, labelled: Labelled, more: Steps, agent: Agent, num_actions: int, seed: int) -> Any:
    """The map of a kind (`evaluation.playing.MAPS`) from latent to true actions; without labels they mean anything."""
    num_codes = agent.cfg.policy.num_actions
    if kind == "code" or not len(labelled.actions_N):
        return CodeMap(labelled, num_codes, num_actions, seed)
    if kind == "pair":
        return PairMap(labelled, num_codes, num_actions)
    return ContextMap(labelled, more, num_codes, num_actions)


def clone_of(checkpoint: str) -> Agent | None:
    """Who a policy was before it learned in a world; None of one that did not."""
    if read_config(checkpoint)["kind"] != "actor_critic":
        return None
    whole = load(checkpoint, "actor_critic")
    whole.agent.policy = whole.clone
    return whole.agent


def play_all(cfg: Config, table: Table, agent: Agent, source: ClipSource) -> dict[str, Played]:
    """How everybody's levels went, by name."""
    N, T, rng = cfg.num_levels, cfg.max_steps, np.random.default_rng(cfg.seed)
    if agent.lam:  # first, since there may be too few clips
        labelled, more = label(agent, source, max(cfg.labels), cfg.seed), others(agent, source, cfg.seed)
    players = scripted(action_shares(source, cfg.seed), N, T, cfg.seed)
    found = {name: table.play(name, lambda levels, player=player: player) for name, player in players.items()}
    if isinstance(table.game, Procgen):
        alone = dataclasses.replace(table.options, planner_explore=0.0, learner="")
        planner = table.game.planner(alone, cfg.split, N, rng)
        name = "walker" if isinstance(planner, Walker) else "planner"
        found[name] = table.play(name, lambda levels: PlanningPlayer(planner, levels), cfg.planner_levels)
        planner.close()
    if cfg.oracle_checkpoint:
        oracle = Chooser(load_agent(cfg.oracle_checkpoint))
        found[ORACLE] = table.play(ORACLE, lambda _: PolicyPlayer(oracle, cfg.temperature, None, cfg.seed))
    if clone := clone_of(cfg.checkpoint):
        mapped, before = None, Chooser(clone)
        if clone.lam:  # from the same labels as the policy's
            known = label(clone, source, cfg.main_labels, cfg.seed), others(clone, source, cfg.seed)
            mapped = action_map("context", *known, clone, table.num_actions, cfg.seed)
        name = f"{BEFORE}, {cfg.main_labels} labels, context" if clone.lam else BEFORE
        found[name] = table.play(name, lambda _: PolicyPlayer(before, cfg.temperature, mapped, cfg.seed))
    choose = Chooser(agent)
    if not agent.lam:
        found["policy"] = table.play("policy", lambda _: PolicyPlayer(choose, cfg.temperature, None, cfg.seed))
        return found
    for num in cfg.labels:
        for kind in MAPS if num else ("code",):
            mapped = action_map(kind, labelled.first(num), more, agent, table.num_actions, cfg.seed)
            main = num == cfg.main_labels and kind == "context"
            name = Clone(num, kind).name
            player = lambda _, mapped=mapped: PolicyPlayer(choose, cfg.temperature, mapped, cfg.seed)
            found[name] = table.play(name, player, 0 if main else cfg.curve_levels)
    return found


def main(cfg: Config) -> None:
    set_up_jax(cfg.compile_cache)
    agent = load_agent(cfg.checkpoint)
    source = in_windows(agent, cfg.checkpoint, cfg.data_dir)
    if not source.metadata.num_actions:
        raise InputError(f"`data_dir` {source.folder}: has no discrete actions, which policies choose among")
    game, options = open_game(source.folder)
    table = Table(cfg, game, options, source.metadata.num_actions)
    found = play_all(cfg, table, agent, source)
    levels_N = game.levels(options, cfg.split, cfg.num_levels, cfg.seed).levels_N
    setting = {
        "game": game.name,
        **{
            name: getattr(cfg, name) for name in ("checkpoint", "oracle_checkpoint", "num_levels", "max_steps", "split")
        },
        **{name: getattr(cfg, name) for name in ("labels", "main_labels", "temperature", "seed")},
    }
    metrics = (measured_play(found, levels_N) | Measured(details=setting)).to_json()
    folder = Path(cfg.output_dir or Path(cfg.checkpoint) / "evaluation")
    write_page(folder, f"Policy {cfg.checkpoint}", sections(metrics))
    write_json(folder / "metrics.json", metrics)
    print(f"wrote {folder}/report.html, report.md and metrics.json")


if __name__ == "__main__":
    run(main, Config)
