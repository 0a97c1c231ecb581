"""What a training leaves to the machine: settled once, before anything is built."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax

from models.genie import read_config
from models.stored import all_steps

Config = TypeVar("Config")


def settled(cfg: Config) -> Config:
    """The configuration of a training with a batch size in the place of `batch_per_device`, and a dtype of auto.

    A resumed training keeps what it began with: the same command goes on with the same curve on any devices.
    """
    given: Any = cfg
    wanted: dict[str, Any] = {}
    if given.batch_per_device:
        wanted["batch_size"] = given.batch_per_device * jax.device_count()
    if given.dtype == "auto":
        wanted["dtype"] = given.compute.dtype
    folder = Path(given.ckpt_dir)
    began = read_config(folder)["train"] if all_steps(folder) else {}
    kept = {name: began.get(name, value) for name, value in wanted.items()}
    for name, value in wanted.items():
        if kept[name] != value and jax.process_index() == 0:
            print(f"{name} {kept[name]}, with which {folder} began, and not {value}", flush=True)
    return dataclasses.replace(given, **kept)
