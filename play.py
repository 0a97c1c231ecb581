"""Opens a page in which a person plays a learned world.

    python play.py --checkpoint runs/dynamics
    python play.py --checkpoint runs/a --checkpoint runs/b     # two worlds side by side, under the same keys

The page asks for each frame over a WebSocket, so a slow browser or network makes the game slower and nothing piles
up. Of requests that come faster than frames, the latest counts.
"""

import asyncio
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import jax
import tyro

from models.errors import InputError
from models.genie import Inference, load_world, stored_sampling
from models.sampling import SamplingFlags
from player.actions import read_actions
from player.controls import controls_of
from player.engine import Engine
from player.game import MAX_STEPS, Game
from player.server import check_address, check_origin, serve
from utils.checkpoint import data_of
from utils.cli import DEFAULT_CACHE, run, set_up_jax, with_flags
from utils.data import ClipSource


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags, Inference):
    """Serves a web page in which to play a world, or to compare two of them; sampling is what it starts with."""

    checkpoint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """--ckpt_dir of the world's training, or an exported world; give the flag twice to compare two. Default:
    runs/dynamics."""
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


def load_game(cfg: Config) -> Game:
    """Loads the worlds, compiles them, and finds frames to start from."""
    names = cfg.checkpoint or ("runs/dynamics",)
    on_cpu = jax.default_backend() == "cpu"
    sampling = cfg.over(stored_sampling(names[0]))
    # A CPU gains little from a batch: taking turns, each frame is ready as soon as it can be.
    width = 1 if on_cpu else cfg.max_players
    thread = ThreadPoolExecutor(1, "device")
    engines = [Engine(load_world(name, cfg.compute), width, thread) for name in names]
    source, message = open_dataset(cfg, names[0])
    metadata = source.metadata if source else None
    true_names = metadata.action_names if metadata else None
    columns = metadata.action_columns if metadata else ()
    controls = [controls_of(engine.cfg.dynamics, columns) for engine in engines]
    if any(controls) and not all(controls):
        raise InputError("`checkpoint`: the actions of one world have columns, those of the other have none")
    actions = [
        control.actions()
        if control
        else read_actions(name, engine.num_actions, true_names if engine.cfg.lam is None else None)
        for name, engine, control in zip(names, engines, controls, strict=True)
    ]
    print("compiling...", flush=True)
    for engine in engines:
        engine.warm_up(sampling)
    fps = cfg.fps or (metadata.fps if metadata else 10.0)
    idle = metadata.idle_action if metadata else None
    hands = [control for control in controls if control] or None
    return Game(names, engines, actions, sampling, source, message, fps, cfg.seed, cfg.max_players, idle, hands)


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
