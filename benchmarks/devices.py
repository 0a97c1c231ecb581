"""Accelerators that need not be here: what XLA must know to compile for one, and what its vendor says of its speed."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from models.errors import InputError


class Device(NamedTuple):
    """An accelerator, by its vendor's datasheet.

    memory: Bytes.
    flops: Dense 16-bit products, operations per second, with sums in float32.
    bandwidth: Bytes of memory read or written per second.
    link: Bytes per second that a device sends to the others of its host.
    capability, cores, shared, per_core, threads, cache, clock: Of an NVIDIA GPU: compute capability; multiprocessors;
      bytes of shared memory of a block at most and of a multiprocessor; threads of one; bytes of L2 cache; GHz.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    capability: str = ""
    cores: int = 0
    shared: int = 0
    per_core: int = 0
    threads: int = 2048
    cache: int = 0
    clock: float = 0.0


HOPPER: Any = {"capability": "9.0", "cores": 132, "shared": 232_448, "per_core": 233_472, "cache": 52_428_800}
ADA: Any = {"capability": "8.9", "shared": 101_376, "per_core": 102_400, "threads": 1536}
DEVICES = {
    "h100": Device("gpu", 84_929_347_584, 989e12, 3.35e12, 450e9, **HOPPER, clock=1.98),
    "h200": Device("gpu", 150_754_820_096, 989e12, 4.8e12, 450e9, **HOPPER, clock=1.98),
    "a100": Device("gpu", 85_094_825_984, 312e12, 2.04e12, 300e9, "8.0", 108, 166_912, 167_936, 2048, 41_943_040, 1.41),
    "l40s": Device("gpu", 47_810_936_832, 362e12, 0.864e12, 32e9, **ADA, cores=142, cache=100_663_296, clock=2.52),
    "rtx4090": Device("gpu", 25_393_692_672, 165e12, 1.008e12, 32e9, **ADA, cores=128, cache=75_497_472, clock=2.52),
    "v5e": Device("tpu", 16 * 2**30, 197e12, 0.819e12, 200e9),
    "v5p": Device("tpu", 95 * 2**30, 459e12, 2.765e12, 600e9),
    "v6e": Device("tpu", 32 * 2**30, 918e12, 1.64e12, 450e9),
}
GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
USABLE = 0.92
"""Share of a device's memory that a step may take: the rest goes to the runtime, the next batch and gaps."""


def prepare() -> None:
    """Has JAX compute on this CPU, and accept compilers of devices that are not there; before it starts."""
    os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", TPU_SKIP_MDS_QUERY="1")
    jax.config.update("jax_platforms", "cpu")


def absent_devices(name: str, count: int, hosts: int) -> Sequence[Any]:
    """Devices of a kind, to compile for; of "cpu" those that XLA makes of this machine.

    Raises:
      InputError: Its compiler is not installed, or there is no such arrangement of it.
    """
    from jax.experimental.topologies import get_topology_desc

    if name == "cpu":
        if count > jax.device_count():
            raise InputError(f"`devices` {count}: there are {jax.device_count()}; XLA_FLAGS makes more of a CPU")
        return jax.devices()[:count]
    if count % hosts:
        raise InputError(f"`devices` {count}: must be a multiple of `hosts` {hosts}")
    device = DEVICES[name]
    try:
        if device.platform == "gpu":
            shape = f"1x{hosts}x{count // hosts}"
            found = get_topology_desc(platform="cuda", target_config=target_config(name, device), topology=shape)
        else:
            found = get_topology_desc(platform="tpu", **tpu_topology(name, count))
    except Exception as error:  # of the plugins, which have no common type
        extra = "requirements-cuda13.txt" if device.platform == "gpu" else "requirements-tpu.txt"
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"`device` {name}: cannot be compiled for ({reason}); `make fit-deps` installs {extra}"
        ) from error
    return found.devices


def tpu_topology(name: str, count: int) -> dict[str, Any]:
    """The arguments of a TPU slice of so many chips."""
    if count not in GRIDS:
        raise InputError(f"`devices` {count}: a slice has {', '.join(map(str, GRIDS))} chips")
    flat = name in ("v5e", "v6e")
    grid = GRIDS[count] if flat else f"{GRIDS[count]}x1"
    if count > 1:
        return {"topology_name": f"{name}:{grid}"}
    return {"topology_name": f"{name}:{grid}", "chips_per_host_bounds": [1, 1, 1]}


def target_config(name: str, device: Device) -> str:
    """What XLA must know of an NVIDIA GPU to compile for it, as a text protobuf."""
    major, minor = device.capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {device.per_core}
  threads_per_core_limit: {device.threads}
  core_count: {device.cores}
  fpus_per_core: {64 if device.capability == "8.0" else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(device.bandwidth)}
  l2_cache_size: {device.cache}
  clock_rate_ghz: {device.clock}
  device_memory_size: {device.memory}
  shared_memory_per_block_optin: {device.shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
