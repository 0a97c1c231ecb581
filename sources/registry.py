"""The tables of what clips can come from. A new kind of source, or a new environment, is a file and a line here.

docs/data.md has a recipe for each.
"""

import re
from pathlib import Path

from models.errors import InputError
from sources.action_npy import ActionNpy
from sources.arrays import Arrays
from sources.environment import Environment, RecordingOptions, options_of
from sources.genieredux import GenieRedux
from sources.gymnasium import Gymnasium
from sources.hdf5 import HDF5
from sources.images import Images
from sources.jasmine import Jasmine
from sources.kind import Kind
from sources.lerobot import LeRobot
from sources.procgen import GAMES, Procgen
from sources.video import Video
from sources.vpt import VPT
from utils.records import read_metadata

# What preprocess_dataset.py reads, by the name that --source has for it. What an earlier kind takes, no later one gets:
# videos that have actions beside them are not videos without.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(LeRobot(), GenieRedux(), Jasmine(), HDF5(), VPT(), ActionNpy()),
        *(Arrays(), Video(), Images()),
    )
}

# What generate_dataset.py plays, by the name that --env has for it.
ENVIRONMENTS: dict[str, Environment] = {each.name: each for each in (*map(Procgen, GAMES),)}


PREFIX = "gymnasium:"
"""Of the names of all others, which Gymnasium knows."""


def find_environment(name: str, options: RecordingOptions) -> Environment:
    """The environment that --env names.

    Raises:
      InputError: There is none of that name, its package is missing, or the options cannot work.
    """
    options.check()
    if name.startswith(PREFIX):
        return Gymnasium(name.removeprefix(PREFIX), options)
    if name not in ENVIRONMENTS:
        raise InputError(f"`env` {name}: expected {', '.join(ENVIRONMENTS)} or {PREFIX}ID")
    return ENVIRONMENTS[name].sized(options)


def open_game(folder: str | Path) -> tuple[Environment, RecordingOptions]:
    """The game that a dataset was recorded from, and its options.

    Raises:
      InputError: It was not recorded by generate_dataset.py, or the game's package is missing.
    """
    metadata = read_metadata(folder)
    options = options_of(metadata.made_by)
    if options is None:
        raise InputError(
            f"`data_dir` {folder}: not recorded by generate_dataset.py, so there is no real game to be played"
        )
    game = find_environment(metadata.environment, options)
    game.check(options)
    return game, options


def folder_name(name: str) -> str:
    """A name for the folder of an environment's dataset."""
    return re.sub(r"[^\w.-]+", "-", name.removeprefix(PREFIX))
