"""The tables of what clips can come from. A new kind of source, or a new environment, is a file and a line here.

docs/data.md has a recipe for each.
"""

import re

from models.errors import InputError
from sources.action_npy import ActionNpy
from sources.arrays import Arrays
from sources.environment import Environment, RecordingOptions
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


def folder_name(name: str) -> str:
    """A name for the folder of an environment's dataset."""
    return re.sub(r"[^\w.-]+", "-", name.removeprefix(PREFIX))
