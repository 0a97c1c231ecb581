"""The tables of what clips can come from. A new kind of source, or a new environment, is a file and a line here.

docs/data.md has a recipe for each.
"""

from sources.arrays import Arrays
from sources.environment import Environment
from sources.images import Images
from sources.kind import Kind
from sources.procgen import CoinRun
from sources.video import Video

# What preprocess_dataset.py reads, by the name that --source has for it.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (Arrays(), Video(), Images())}

# What generate_dataset.py plays, by the name that --env has for it.
ENVIRONMENTS: dict[str, Environment] = {environment.name: environment for environment in (CoinRun(),)}
