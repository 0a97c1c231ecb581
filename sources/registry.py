"""The tables of what clips can come from. A new kind of source, or a new environment, is a file and a line here.

docs/data.md has a recipe for each.
"""

from sources.action_npy import ActionNpy
from sources.arrays import Arrays
from sources.environment import Environment
from sources.genieredux import GenieRedux
from sources.hdf5 import HDF5
from sources.images import Images
from sources.jasmine import Jasmine
from sources.kind import Kind
from sources.lerobot import LeRobot
from sources.procgen import CoinRun
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
ENVIRONMENTS: dict[str, Environment] = {environment.name: environment for environment in (CoinRun(),)}
