"""Processes that work for another one. They import this first, so it brings no JAX."""

import multiprocessing
import os
import signal
import threading


def begin_reading(worker: int, workers: int) -> None:
    """Of those that read for a training. Ctrl-C reaches all processes of a terminal, and Slurm's SIGTERM all of a task;
    the training itself ends its workers, after it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Lets this process die with its parent, however that dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
