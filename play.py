"""Opens a page in which a person plays a learned world.

    python play.py --checkpoint runs/dynamics
    python play.py --checkpoint runs/a --checkpoint runs/b     # two worlds side by side, under the same keys
    python play.py --real --policy_checkpoint runs/policy      # beside the real game; a policy plays both

The page asks for each frame over a WebSocket, so a slow browser or network makes the game slower and nothing piles
up. Of requests that come faster than frames, the latest counts.
"""

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated

import jax
import tyro

from agents.clones import Clone
from agents.worlds import surest_actions
from models.errors import InputError
from models.genie import Inference, World, load_world, stored_sampling
from models.sampling import SamplingFlags
from player.acting import Acting, Side
from player.actions import actions_doing, read_actions
from player.controls import Controls, controls_of
from player.engine import Engine
from player.game import MAX_STEPS, Game
from player.real import RealGame
from player.screen import Screen
from player.server import check_address, check_origin, serve
from sources.registry import open_game
from utils.actions import ActionLabel
from utils.checkpoint import data_of
from utils.cli import DEFAULT_CACHE, run, set_up_jax, with_flags
from utils.data import ClipSource
from utils.records import Metadata, read_metadata


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags, Inference):
    """Serves a web page in which to play a world, to compare two of them, or to hold them against the real game;
    sampling is what it starts with."""

    checkpoint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """--ckpt_dir of the world's training, or an exported world; give the flag twice to compare two. Default:
    runs/dynamics."""
    real: bool = False
    """Play beside the world the real game that its dataset was recorded from: the same level under the same keys, which
    are the game's own then. What the world's latent actions do must be known (evaluate.py)."""
    policy_checkpoint: str = ""
    """--ckpt_dir of the training of a policy that can play in the place of the player; empty for none."""
    policy_temperature: float = 0.5
    """Of the policy's choices; 0 takes the likeliest action."""
    labels: int = 200
    """Steps of the policy's training data whose true actions tell what its latent ones stand for in the real game."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others on the network play."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Origin of a page that may show this one besides itself, as a proxy's that does not tell its name
    (https://example.org); give the flag again for more."""
    port: int = 8000
    """0 takes any free one."""
    open: bool = True
    """Open the page in the browser."""
    max_players: int = 4
    """Pages that may play at a time; they share the device."""
    data_dir: str = ""
    """Dataset of the frames to start from; default: the one that the first world was trained on."""
    split: str = "val"
    """Its split: train, val or test."""
    seed: int = 0
    """That the page starts with, and of the choice of frames to start from."""
    fps: float = 0.0
    """Frames per second that the page aims at; 0 takes the dataset's."""
    compile_cache: str = DEFAULT_CACHE
    """Folder of compiled programs, for quick restarts; empty for none."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.checkpoint) > 2:
            raise InputError(f"`checkpoint`: {len(self.checkpoint)} worlds given; at most two can be compared")
        for origin in self.allow_origin:
            check_origin(origin)
        if self.max_players < 1:
            raise InputError(f"`max_players` {self.max_players}: must be at least 1")
        if self.steps is not None and self.steps > MAX_STEPS:
            raise InputError(f"`steps` {self.steps}: must be from 1 to {MAX_STEPS}")
        if self.fps < 0 or not 0 <= self.seed < 2**31:
            raise InputError(f"`fps` {self.fps}, `seed` {self.seed}: must not be negative (the seed below 2**31)")
        if self.policy_temperature < 0:
            raise InputError(f"`policy_temperature` {self.policy_temperature}: must not be negative")
        if self.labels < 1:
            raise InputError(f"`labels` {self.labels}: must be at least 1")


def load_game(cfg: Config) -> Game:
    """Loads the worlds and opens the real game, compiles them, and finds frames to start from."""
    names = cfg.checkpoint or ("runs/dynamics",)
    on_cpu = jax.default_backend() == "cpu"
    sampling = [cfg.over(stored_sampling(name)) for name in names]
    # A CPU gains little from a batch: taking turns, each frame is ready as soon as it can be.
    width = 1 if on_cpu else cfg.max_players
    thread = ThreadPoolExecutor(1, "device")
    source, real, message, metadata = None, None, "", None
    if cfg.real:
        folder = cfg.data_dir or data_of(names[0])
        real, metadata = open_real(cfg, folder), read_metadata(folder)
    else:
        source, message = open_dataset(cfg, names[0])
        metadata = source.metadata if source else None
    worlds = [load_world(name, cfg.compute) for name in names]
    acting = read_acting(cfg, names, worlds, metadata)
    engines: list[Screen] = [Engine(world, width, thread) for world in worlds]
    if real:
        names, engines, sampling = (real.name, *names), [real, *engines], [sampling[0], *sampling]
    print("compiling...", flush=True)
    for engine, way in zip(engines, sampling, strict=True):
        engine.warm_up(way)
    fps = cfg.fps or (metadata.fps if metadata else 10.0)
    return Game(names, engines, acting, sampling, source, real, message, fps, cfg.seed, cfg.max_players)


def open_real(cfg: Config, folder: str) -> RealGame:
    """The game that a dataset was recorded from.

    Raises:
      InputError: There is none, its package is missing, or its levels cannot be played one by one.
    """
    game, options = open_game(folder)
    return RealGame(
        f"the real {game.name}", lambda number: game.levels(options, cfg.split, 1, number), game.frame_shape
    )


def read_acting(cfg: Config, names: Sequence[str], worlds: Sequence[World], metadata: Metadata | None) -> Acting:
    """What the actions do of the real game, if it is played, and of worlds; and who may choose them."""
    true_names = (metadata.action_names if metadata else None) or ()
    columns = metadata.action_columns if metadata else ()
    idle = metadata.idle_action if metadata else None
    controls = [Controls(columns) if columns else None] if cfg.real else []
    controls += [controls_of(world.cfg.dynamics, columns) for world in worlds]
    if any(controls) and not all(controls):
        raise InputError("`checkpoint`: the actions of one world have columns, those of the other have none")
    hands = [control for control in controls if control]
    if hands:
        if cfg.policy_checkpoint:
            raise InputError("`policy_checkpoint`: a policy cannot play where actions have columns")
        return Acting([Side(hand.actions()) for hand in hands], idle, hands)
    policy = cfg.policy_checkpoint
    clone = Clone(policy, cfg.policy_temperature, cfg.labels, cfg.seed) if policy else None
    sides, policies = [], []
    if cfg.real and metadata:
        same = metadata.same_actions
        sides.append(Side([ActionLabel(name, true=same.get(name, name)) for name in true_names], true_names))
        policies += [clone.in_game(metadata.frame_shape, len(true_names))] if clone else []
    for name, world in zip(names, worlds, strict=True):
        actions = read_actions(name, world.num_actions, true_names if world.lam is None else None)
        surest = partial(surest_actions, name, world, metadata)
        sides.append(Side(actions, surest=surest() if cfg.real else {}))
        if clone:
            codes_of = lambda actions=actions, surest=surest: actions_doing(true_names, actions, surest(), idle)
            policies.append(clone.in_world(world, name, codes_of))
    return Acting(sides, idle, policies=policies)


def open_dataset(cfg: Config, checkpoint: str) -> tuple[ClipSource | None, str]:
    """The clips to start from; or None, if the world's own dataset has gone, and what to tell the player."""
    try:
        return ClipSource(cfg.data_dir or data_of(checkpoint), cfg.split, 1), ""
    except InputError as error:
        if cfg.data_dir:
            raise
        print(f"warning: no frames to start from: {with_flags(error, Config)}", file=sys.stderr)
        return None, f"The dataset of {checkpoint} is not there. Upload a picture, or start with --data_dir."


def main(cfg: Config) -> None:
    set_up_jax(cfg.compile_cache)
    check_address(cfg.host, cfg.port)
    asyncio.run(serve(load_game(cfg), cfg.host, cfg.port, cfg.open, cfg.allow_origin))


if __name__ == "__main__":
    run(main, Config)
