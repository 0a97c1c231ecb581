"""Devices: one mesh with the axes `data` and `fsdp`, shardings computed from shapes, and many hosts."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import InputError


def start_distributed(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a multi-host run; does nothing on one machine.

    With arguments they say where to meet. Without, JAX reads them from Slurm, Open MPI or a cloud's environment, if
    that tells of more than one process.
    """
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")) or (
        os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")
    ):
        jax.distributed.initialize()


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes as (data, fsdp).

    Args:
      fsdp: Over how many devices parameters and optimizer state are sharded; 1 is plain data parallelism.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise InputError(f"`fsdp` {fsdp}: must divide the number of devices, {devices}")
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch: split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
