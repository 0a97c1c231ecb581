"""Worker processes that make clips, and how many of them this machine has room for."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from models.errors import InputError
from utils.worker import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextlib.contextmanager
def running(function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int) -> Iterator[Iterator[Result]]:
    """Runs `function` on the tasks in worker processes and gives the results, in the order of the tasks.

    The workers end at once when an exception, Ctrl-C or SIGTERM leaves the block, and when this process dies. A
    terminal's Ctrl-C, which goes to every process, passes them by. They are spawned: threads, as JAX, PyAV and others
    have them, do not survive a fork.

    Args:
      function: Of a module, so that a worker can import it.
      num_workers: Processes; 0 runs the tasks in this one, as their results are asked for.

    Raises:
      InputError: While results are asked for: a worker was killed.
    """
    if num_workers == 0 or not tasks:
        yield map(function, tasks)
        return
    num_workers = min(num_workers, len(tasks))
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(num_workers, mp_context=context, initializer=end_with_parent) as executor:
            try:
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the workers
                try:
                    futures = [executor.submit(function, task) for task in tasks]  # starts the workers
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                yield (future.result() for future in futures)
            except BaseException:
                for process in set(multiprocessing.active_children()).difference(others):
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise InputError(
            f"`num_workers` {num_workers}: a worker was killed, most likely for lack of memory; run the same command "
            "with fewer"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, sigterm)


def num_cores(root: str | Path = "/") -> int:
    """The cores that this process may use: no more than its affinity and its container's CPU quota allow.

    Args:
      root: Where /proc and /sys are looked for.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _cpu_quotas(Path(root)))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of this process's control group and of those around it (versions 2 and 1)."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        # A container may see its own group as the mount, while the path is the host's: then only the mount exists.
        for folder in (group, *group.parents):
            if controllers:
                limit = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                limit = _read(folder / "cpu.max").split()
            if len(limit) == 2 and all(number.isdecimal() for number in limit):  # others: "max", -1, no such file
                yield int(limit[0]) / int(limit[1])
            if folder == mount:
                break


def _read(file: Path) -> str:
    """The text of a small file, empty if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
