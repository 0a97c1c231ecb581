"""Devices: one mesh with the axes `data` and `fsdp`, shardings computed from shapes, and many hosts."""

import atexit
import os
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its server has no public name
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import InputError
from models.stored import first_line
from utils.data import Batch

PATIENCE_S = 300
"""Seconds that a process waits for the others of its run."""
PAUSE_S = 0.5
"""Seconds between a process's last word to the others and the end of the server that they talk through."""
TOLD_BY = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
"""Variables that say how many tasks were started together, and which of them this is. Those of a Slurm job, such as
SLURM_NTASKS, say what was reserved, also to a shell or a notebook inside of it."""


def start_distributed(coordinator: str = "", num_processes: int = 0, process_id: int = -1, how: str = "auto") -> None:
    """Joins the processes of a multi-host run; does nothing for a process that was started alone.

    With arguments they say where to meet. Without, JAX reads that from Slurm, Open MPI or a cloud's environment, if
    the variables of the very step that this process was started in tell of more than one.

    Args:
      how: "auto", or "off" for a process that trains alone whatever its environment says.
    Raises:
      InputError: The environment does not say where the others are.

    If they do not come in time, the process ends with a line that says how to go on.
    """
    if how == "off":
        if coordinator:
            raise InputError(f"`distributed` off: does not go with `coordinator` {coordinator}")
        return
    meet: tuple = (coordinator, num_processes, process_id) if coordinator else ()
    if not meet:
        num_processes, process_id = tasks()
        if num_processes == 1:
            return
    who = f"process {process_id} of {num_processes}"
    print(f"{who}: waits for the others, at most {PATIENCE_S} s; --distributed off trains alone", flush=True)
    how_on = (
        "start all with one srun or mpirun, say where to meet with --coordinator, or train alone: --distributed off"
    )

    def give_up() -> None:
        print(f"error: {who}: the others did not come in {PATIENCE_S} s; {how_on}", file=sys.stderr, flush=True)
        os._exit(1)  # JAX itself would end the process with a stack trace, and cannot be interrupted before

    patience = threading.Timer(PATIENCE_S, give_up)
    patience.start()
    try:
        jax.distributed.initialize(*meet, initialization_timeout=2 * PATIENCE_S)  # type: ignore[misc]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{who}: the others were not found ({first_line(error)}); {how_on}") from None
    finally:
        patience.cancel()
    atexit.register(leave)  # what is registered last is called first: before JAX leaves
    if sees_all_devices() and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        # JAX takes tasks for processes of one device each, and would leave all GPUs of a host but one alone.
        jax.config.update("jax_cuda_visible_devices", "all")


def leave() -> None:
    """Takes leave of the other processes a moment before JAX, at exit, ends the server that they talk through.

    JAX does both at once, and gRPC aborts a process whose server ends in the instant in which, its last call answered,
    it makes ready for the next one. So a training could end with everything saved and a core dump (once in hundreds).
    """
    state = distributed.global_state
    service, state.service = state.service, None
    if service:  # in the first process
        jax.distributed.shutdown()  # all else, in the order that JAX needs
        time.sleep(PAUSE_S)
        state.service = service


def tasks() -> tuple[int, int]:
    """How many tasks were started together with this one, and which of them this is; (1, 0) for one by itself."""
    for count, own in TOLD_BY.items():
        if int(os.environ.get(count) or 1) > 1:
            return int(os.environ[count]), int(os.environ.get(own) or 0)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts), int(os.environ.get("TPU_WORKER_ID") or 0)


def sees_all_devices() -> bool:
    """Whether a task is meant to use every GPU that it sees: it is alone on its host, or sees none of the others'."""
    count, hosts, local = (
        os.environ.get(f"SLURM_STEP_{name}", "") for name in ("NUM_TASKS", "NUM_NODES", "TASKS_PER_NODE")
    )
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (count and count == hosts):
        return True
    beside = re.match(r"\d+", local)  # as in 4(x2)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(visible and beside and len(visible.split(",")) < int(beside[0]))


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes as (data, fsdp): fsdp within a host as far as it goes, data across hosts.

    Args:
      fsdp: Over how many devices parameters and optimizer state are sharded; 1 is plain data parallelism.
      devices: Others than those of this run.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"`fsdp` {fsdp}: must divide the number of devices, {len(devices)}")
    axes: Any = {"axis_names": ("data", "fsdp"), "axis_types": (AxisType.Auto,) * 2}
    # Inside a TPU slice hosts are as near to each other as devices; elsewhere a process stands for a host.
    place = "slice_index" if devices[0].platform == "tpu" else "process_index"
    hosts = Counter(getattr(device, place, 0) for device in devices)
    here = min(hosts.values())
    if len(hosts) == 1 or max(hosts.values()) != here or (here % fsdp and fsdp % here):
        return jax.make_mesh((len(devices) // fsdp, fsdp), devices=devices, **axes)
    inner = min(fsdp, here)
    grid = create_hybrid_device_mesh(
        (here // inner, inner),
        (len(hosts) * inner // fsdp, fsdp // inner),
        devices,
        process_is_granule=place == "process_index",
    )
    return Mesh(grid, **axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch: split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def own_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which clips of a global batch the devices of this process hold; as a rule those of one block."""
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def state_sharding(mesh: Mesh, abstract: Any) -> Any:
    """A sharding for each array of a tree: its largest divisible axis over `fsdp`; small arrays are replicated."""
    fsdp = mesh.shape["fsdp"]

    def choose(x: Any) -> NamedSharding:
        axes = [i for i, n in enumerate(x.shape) if n % fsdp == 0 and n >= fsdp]
        if fsdp == 1 or not axes or np.prod(x.shape) < 1024:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(axes, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(choose, abstract)


def whole_here(tree: Any) -> Any:
    """Arrays over the devices of all processes as whole ones on a device of this process; others as they are."""

    def fetch(x: jax.Array) -> jax.Array:
        return x if x.is_fully_addressable else jax.numpy.asarray(process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def spread(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, or that lie on all devices already, as the shardings say."""

    def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def to_device(
    stream: Iterator[Batch],
    sharding: Any,
    rows: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 0,
    ahead: int = 1,
) -> Generator[Batch, None, None]:
    """Moves batches to the devices, `ahead` of their use, so that the copy overlaps with the running step.

    Args:
      sharding: Of the global batch.
      rows, batch_size: Of a process that gives a share of it alone: which clips of how many.
    """

    def place(share: np.ndarray) -> jax.Array:
        whole = (batch_size or len(share), *share.shape[1:])
        held = np.arange(len(share)) if rows is None else np.asarray(rows)

        def part(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(whole[0])
            at = np.searchsorted(held, first)
            return share[at : at + end - first]

        return jax.make_array_from_callback(whole, sharding, part)

    queue: deque[Batch] = deque()
    try:
        for batch in stream:
            queue.append(jax.tree.map(place, batch))
            if len(queue) > ahead:
                yield queue.popleft()
    finally:
        if hasattr(stream, "close"):
            stream.close()  # ends grain's workers, and gives back the shared memory of batches that wait
