"""Checkpoints on disk, as orbax writes them: which there are, whether they are whole, and what is in them."""

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from models.errors import DamagedCheckpointError, InputError

Read = TypeVar("Read")


def all_steps(path: str | Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, be they whole or not."""
    folders = Path(path).iterdir() if Path(path).is_dir() else ()
    return sorted(int(p.name) for p in folders if p.name.isdigit() and p.is_dir())


def checkpoint_steps(path: str | Path) -> list[int]:
    """Steps of the checkpoints in a folder whose files are all there, ascending."""
    return [step for step in all_steps(path) if fault(Path(path) / str(step)) is None]


def fault(folder: Path) -> str | None:
    """What is missing of a checkpoint, by what orbax itself wrote about it; None if nothing is."""
    try:
        items = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        for item, handler in items.items():
            if "Json" in handler:
                json.loads((folder / item / ("metrics" if item == "metrics" else "metadata")).read_text())
                continue
            tree = json.loads((folder / item / "_METADATA").read_text())["tree_metadata"]
            has_arrays = not all(entry["value_metadata"]["skip_deserialize"] for entry in tree.values())
            if has_arrays and not (folder / item / "manifest.ocdbt").stat().st_size:
                return f"{item}/manifest.ocdbt is empty"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"what orbax says of it cannot be read: {first_line(error)}"
    return None


def newest_whole(path: str | Path, read: Callable[[Path], Read]) -> tuple[int, Read, dict[int, str]]:
    """Reads the newest checkpoint that is whole.

    Args:
      read: Reads what is wanted from a checkpoint's folder.
    Returns:
      Its step, what was read, and what is wrong with each of the newer ones, by step.
    Raises:
      InputError: There is no checkpoint, or `read` refuses one.
      DamagedCheckpointError: None of them is whole.
    """
    damaged: dict[int, str] = {}
    for step in reversed(all_steps(path)):
        folder = Path(path).absolute() / str(step)
        try:
            return step, read(folder), damaged
        except DamagedCheckpointError as error:
            damaged[step] = str(error)
    if not damaged:
        raise InputError(f"{path}: no checkpoint of step any; there are none")
    raise DamagedCheckpointError(f"{next(iter(damaged.values()))}; there is no other that is whole")


def read_items(folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Items of a checkpoint, each in the tree, shapes, types and shardings of its target.

    Raises:
      InputError: An item holds other arrays than the model has.
      DamagedCheckpointError: Files are missing, truncated or changed.
    """
    reason = fault(folder)
    if reason is None:
        values, reason = _read(folder, targets)
    if reason is not None:
        raise DamagedCheckpointError(f"{folder}: damaged ({reason})")
    return values


def _read(folder: Path, targets: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The items, and what went wrong."""
    values: dict[str, Any] = {}
    with _quiet():
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                for item, target in targets.items():
                    if item in ("model", "ema"):
                        listed = checkpointer.metadata(folder / item).item_metadata
                        if listed is None:
                            return {}, f"{item}: its list of arrays cannot be read"
                        _expect(folder, listed.tree, target)
                    values[item] = checkpointer.restore(folder / item, target)
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of tensorstore, of zstd, of json: they have no common type
            time.sleep(0.5)  # tensorstore's threads still complain
            return {}, f"{item}: {first_line(error).split('. See full')[0]}"
    return values, None


def _expect(folder: Path, stored: Any, target: Any) -> None:
    """Refuses a checkpoint of a model with other names or shapes."""

    def shapes(tree: Any) -> set[tuple[str, tuple[int, ...]]]:
        return {
            ("/".join(str(getattr(key, "key", key)) for key in path), tuple(leaf.shape))
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    differing = sorted(shapes(stored) ^ shapes(target))
    if differing:
        raise InputError(f"{folder}: made by another version of the models; train again ({differing[0]})")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the pages that asyncio prints about each array of a damaged checkpoint off the terminal."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()  # now, while nobody listens, the coroutines that were never awaited go
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may go on for pages."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
