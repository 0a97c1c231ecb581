"""Where clips come from. `Recorder` is for a loop of one's own; the scripts at the root are for everything else."""

from sources.recorder import Recorder

__all__ = ["Recorder"]
