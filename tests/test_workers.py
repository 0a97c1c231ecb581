"""Worker processes: the order of their results, how they end, and how many there is room for."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from models.errors import InputError
from sources.workers import num_cores, running


def slow_first(number: int) -> tuple[int, int]:
    """Returns the number and the process; 0 takes longer than all others."""
    time.sleep(0.5 if number == 0 else 0)
    return number, os.getpid()


def end_or_wait(number: int) -> int:
    """0 is killed; the others would take a minute."""
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_results_come_in_the_order_of_the_tasks(num_workers):
    with running(slow_first, range(4), num_workers) as results:
        numbers, processes = zip(*results, strict=True)
    assert numbers == (0, 1, 2, 3)
    assert (set(processes) == {os.getpid()}) == (num_workers == 0)


def test_workers_leave_ctrl_c_to_their_parent():
    with running(time.sleep, [1], 1) as results:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)
        assert next(results) is None


def test_a_killed_worker_is_one_line_and_the_others_end():
    began = time.monotonic()
    with (
        pytest.raises(InputError, match=r"`num_workers` 2: a worker was killed") as caught,
        running(end_or_wait, range(3), 2) as results,
    ):
        list(results)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


def test_sigterm_ends_the_block_and_the_workers():
    def stopped_by_the_system() -> None:
        with running(time.sleep, [60, 60], 2) as results:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            next(results)

    handler, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        stopped_by_the_system()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),  # two and a half cores keep three processes busy
        ("0::/\n", {"cpu.max": "5000 100000"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 16),
        ("0::/\n", {}, 16),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4),
        ("0::/elsewhere/on/the/host\n", {"cpu.max": "300000 100000"}, 3),
        ("2:memory:/\n1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        (
            "2:memory:/\n1:cpu,cpuacct:/docker/b1f5\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"},
            3,
        ),
        (
            "1:cpu:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "500000", "cpu/job/cpu.cfs_period_us": "100000"},
            5,
        ),
        (None, {}, 16),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_quota(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    contents = {f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in files.items()}
    for name, text in (contents | ({"proc/self/cgroup": groups} if groups else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_cores(tmp_path) == expected


def test_cores_of_this_machine():
    assert 1 <= num_cores() <= len(os.sched_getaffinity(0))
