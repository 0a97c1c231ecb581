"""Processes that read data for a training. They import this, so it brings no JAX."""

import os
import signal
import threading
import time


def begin_worker(worker: int, workers: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and Slurm's SIGTERM all of a task; the training itself ends its
    workers, after it has saved. If it is killed, they end by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process within a second of its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
