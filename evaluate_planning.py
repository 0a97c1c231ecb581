"""Plays unseen levels of the real game by plans that are made in a world: a measure of the world that no PSNR gives.

    python evaluate_planning.py --checkpoint runs/dynamics

The world needs heads (train_dynamics.py --heads reward,end), and its dataset a game of Procgen. Plans of several
lengths stand beside plans chosen blindly, sticky play and random play. Prints a table and writes planning.json.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agents.planning import Shooter, WorldPlanner
from agents.worlds import world_labels
from evaluation.measured import write_json
from evaluation.statistics import figure
from evaluation.table import figure_text, markdown_table
from models.errors import InputError
from models.genie import World, load_world, stored_sampling
from models.sampling import SamplingFlags
from sources.once import Player, Scripted, play
from sources.policies import choose_actions
from sources.procgen import Procgen
from sources.registry import open_game
from utils.checkpoint import data_of, output_of
from utils.cli import DEFAULT_CACHE, run, set_up_jax


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags):
    """Measures a world by the levels of the real game that plans made in it solve."""

    checkpoint: str = "runs/dynamics"
    """--ckpt_dir of the training of a world with heads, or an exported one."""
    data_dir: str = ""
    """Dataset that tells the game and its options; default: the world's."""
    output_dir: str = ""
    """Where to write planning.json; default: planning/ in the checkpoint's folder."""
    lengths: tuple[int, ...] = (5, 10, 20)
    """Steps of the plans."""
    held: int = 5
    """Steps of a plan that are played before the next one is made."""
    num_plans: int = 16
    """Plans to choose from."""
    num_levels: int = 100
    """Levels that plans play."""
    blind_levels: int = 500
    """Levels that those play who make no plans, which costs little; the first ones are the same."""
    max_steps: int = 300
    """Time steps that a level may take."""
    split: Literal["test", "val"] = "test"
    """Which levels: of none that the world was trained on."""
    seed: int = 0
    """Of the levels, the plans and all else."""
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("held", "num_plans", "num_levels", "blind_levels", "max_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` {getattr(self, name)}: must be at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"`lengths` {self.lengths}: must be numbers of at least 1")


def world_actions(cfg: Config, world: World, game: Procgen) -> tuple[np.ndarray, Sequence[float]]:
    """For each of the world's actions the game's that it stands for, and how often plans choose it, by comparison."""
    if world.lam is None:
        return np.arange(len(game.action_names)), game.weights_A
    labels = world_labels(cfg.checkpoint, world.num_actions)
    true = [label.true or game.idle_action or "" for label in labels]  # what never occurs stands for none
    return np.array([game.action_names.index(name) for name in true]), [label.count + 1 for label in labels]


def main(cfg: Config) -> None:
    set_up_jax(cfg.compile_cache)
    world = load_world(cfg.checkpoint)
    if world.heads is None:
        raise InputError(
            f"`checkpoint` {cfg.checkpoint}: has no heads; train it with train_dynamics.py --heads reward,end"
        )
    data_dir = cfg.data_dir or data_of(cfg.checkpoint)
    game, options = open_game(data_dir)
    if not isinstance(game, Procgen):
        raise InputError(f"`data_dir` {data_dir}: recorded from {game.name}; plans are played in games of Procgen")
    true_A, weights_A = world_actions(cfg, world, game)
    propose = lambda rng, num, steps: choose_actions("sticky", weights_A, rng, num, steps)
    planner: dict[str, Any] = {"propose": propose, "held": cfg.held, "num_plans": cfg.num_plans, "true_A": true_A}
    planner |= {"idle": game.action_names.index(game.idle_action or ""), "seed": cfg.seed}
    rng, shape = np.random.default_rng(cfg.seed), (cfg.blind_levels, cfg.max_steps)
    players: dict[str, Player] = {
        policy: Scripted(choose_actions(policy, game.weights_A, rng, *shape)) for policy in ("uniform", "sticky")
    }
    players[f"plans of {cfg.held}, chosen blindly"] = WorldPlanner(None, **planner, length=cfg.held)
    shooter = Shooter(world, cfg.over(stored_sampling(cfg.checkpoint)), cfg.seed)
    plans = {f"plans of {length}": WorldPlanner(shooter, **planner, length=length) for length in cfg.lengths}
    found, rows = {}, []
    for name, player in (players | plans).items():
        began = time.perf_counter()
        levels = game.levels(options, cfg.split, cfg.num_levels if name in plans else cfg.blind_levels, cfg.seed)
        solved_N = play(levels, player, cfg.max_steps, len(game.action_names)).solved_N
        levels.close()
        of_all, seconds = figure(solved_N), round(time.perf_counter() - began, 1)
        found[name] = of_all._asdict() | {"solved": solved_N.astype(int).tolist(), "seconds": seconds}
        rows.append((name, figure_text(of_all._asdict()), str(of_all.n), f"{seconds:.0f}"))
        print(f"{name}: {rows[-1][1]} of {of_all.n} levels solved ({seconds:.0f} s)", flush=True)
    folder = Path(cfg.output_dir or output_of(cfg.checkpoint, "planning"))
    write_json(folder / "planning.json", found | {"config": dataclasses.asdict(cfg)})
    print("\n".join(markdown_table(("who plays", "share of levels solved", "levels", "seconds"), rows)))
    print(f"wrote {folder}/planning.json")


if __name__ == "__main__":
    run(main, Config)
