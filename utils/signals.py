"""Signals: the first one lets a training save and stop."""

import os
import signal
from typing import Any

import jax
import numpy as np


class StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a request to save and stop; the second one stops at once."""

    def __init__(self) -> None:
        self.received = False
        self.old = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        print("stopping after this step; a second signal stops at once", flush=True)

    def requested(self, step: int, interval: int) -> bool:
        """Whether to stop now. Several processes agree on it every `interval` steps."""
        if jax.process_count() == 1:
            return self.received
        if step % interval:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.received)).any())

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self.old.items():
            signal.signal(number, handler)
