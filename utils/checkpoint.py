"""Checkpoints: asynchronous, atomic, restorable on any number of devices (orbax).

<ckpt_dir>/config.json                                    kind, command, model, training flags, versions
<ckpt_dir>/<step>/model | optimizer | ema | meta          separate items, so that inference reads one of them

An exported world (export.py) has parameters.npz and data/ in the place of the steps. Nothing is written into its
folder: what would go into that of a training goes to runs/worlds/<name of the folder>.
"""

import dataclasses
import json
import logging
import math
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from models.errors import InputError
from models.genie import CONFIG_VERSION, PARAMETERS, checkpoint_steps, read_config
from utils.data import frames_folder
from utils.sharding import state_sharding
from utils.state import TrainState

HARMLESS = {
    *("ckpt_dir", "data_dir", "num_steps", "tokenizer_checkpoint", "lam_checkpoint"),
    *("log", "entity", "project", "run_name", "tensorboard", "profile", "debug_nans", "log_gradients", "deterministic"),
    *("log_interval", "val_interval", "val_batches", "checkpoint_interval", "keep_latest", "keep_every", "keep_best"),
    *("steps", "temperature", "order", "top_k", "top_p"),  # of sampling
    *("num_workers", "fsdp", "coordinator", "num_processes", "process_id", "remat", "attention", "compile_cache"),
}
"""Training flags that a resumed run may change: they do not touch the curve beyond rounding."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Flags of checkpointing, the same in all trainings."""

    ckpt_dir: str = ""
    """Folder of this training: checkpoints, config.json, metrics.jsonl, images. Running again resumes. Default:
    runs/<model>."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: int = 2
    """How many of the latest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this, for good; 0 none."""
    keep_best: str = ""
    """Also keep the best checkpoint by this validation metric, for instance val_psnr or val_loss; only steps that are
    both validated and saved count."""


def write_config(folder: Path, kind: str, model: Any, train: Any, parts: dict[str, str] | None = None) -> None:
    """Writes `config.json`, or, if there is one, checks that this run may continue it.

    Args:
      parts: Fingerprints of the trained parts that the model begins with; those of a resumed run must be the same.
    Raises:
      InputError: The folder holds a training that differs; the message lists each field.
    """
    fields = {
        "config_version": CONFIG_VERSION,
        "kind": kind,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": dataclasses.asdict(model),
        "train": {k: v for k, v in dataclasses.asdict(train).items() if k not in ("model", "lam", "preset")},
        "parts": parts or {},
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }
    fields = json.loads(json.dumps(fields))
    if is_exported(folder):
        raise InputError(
            f"`ckpt_dir` {folder}: holds an exported world, which cannot be trained on; choose another folder"
        )
    if (folder / "config.json").exists():
        stored = read_config(folder)
        if stored["kind"] != kind:
            raise InputError(f"`ckpt_dir` {folder}: holds a {stored['kind']}, not a {kind}; choose another folder")
        compared = [name for name in ("model", "train", "parts") if name in stored]
        old, new = (_flat({name: config[name] for name in compared}) for config in (stored, fields))
        differing = [
            f"{name}: stored {old.get(name)}, given {new.get(name)}"
            for name in sorted(old | new)
            if old.get(name) != new.get(name) and name.split(".")[-1] not in HARMLESS
        ]
        if differing and checkpoint_steps(folder):
            raise InputError(
                f"`ckpt_dir` {folder}: holds a training with another configuration ({'; '.join(differing)}); give the "
                "stored values to resume it, or another `ckpt_dir`"
            )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "config.json.tmp"
        temporary.write_text(json.dumps(fields, indent=2))
        os.replace(temporary, folder / "config.json")


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def is_exported(checkpoint: str | Path) -> bool:
    """Whether a folder holds an exported world instead of a training."""
    return (Path(checkpoint) / PARAMETERS).is_file()


def data_of(checkpoint: str | Path) -> str:
    """The dataset of frames that belongs to a checkpoint: that of its training, or the clips that it was exported with.

    Raises:
      InputError: There is no checkpoint, or no dataset.
    """
    if is_exported(checkpoint):
        return str(Path(checkpoint) / "data")
    return frames_folder(read_config(checkpoint)["train"]["data_dir"])


def output_of(checkpoint: str | Path, name: str = "") -> Path:
    """Where what is made of a checkpoint goes by default: into its folder, but never into an exported world's."""
    exported = is_exported(checkpoint)
    return (Path("runs/worlds") / Path(checkpoint).resolve().name if exported else Path(checkpoint)) / name


RISING = ("psnr", "ssim", "accuracy", "usage", "margin")
"""Metrics of which more is better; of all others, less."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, cfg: CheckpointConfig):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each phase of each save,
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and a failed one once more for each array
        policies: list[keep.PreservationPolicy] = [keep.LatestN(max(cfg.keep_latest, 1))]
        if cfg.keep_every:
            policies.append(keep.EveryNSteps(cfg.keep_every))
        best = cfg.keep_best
        if best:
            rising = any(name in best for name in RISING)
            score = lambda m: m.get(best, -math.inf if rising else math.inf)
            # BestN keeps the end of the sorted list.
            policies.append(
                keep.BestN(get_metric_fn=score, reverse=not rising, n=1, keep_checkpoints_without_metrics=False)
            )
        self.folder = folder
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies),
                best_fn=score if best else None,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, meta: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Starts saving; training goes on while the copy on the host is written out.

        Args:
          metrics: Of a validation of this very state, by which the best is kept; None if there was none.
        Raises:
          OSError: This or the previous save failed; the message names the checkpoint that is still good.
        """
        step = meta["step"]
        if step in self.manager.all_steps():
            return
        if not (self.folder / "config.json").is_file():
            raise OSError(f"{self.folder}: vanished while this training ran; its checkpoints are gone")
        model = nnx.merge_state(state.params, state.rest)
        items = {
            "model": ocp.args.StandardSave(nnx.to_pure_dict(model)),
            "optimizer": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave(meta),
        }
        if state.ema is not None:
            averaged = nnx.merge_state(state.ema, state.rest)
            items["ema"] = ocp.args.StandardSave(nnx.to_pure_dict(averaged))
        try:
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:  # orbax passes on whatever its writers raised
            raise self._failure(error) from error

    def restore(self, abstract: TrainState, mesh: jax.sharding.Mesh) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest good checkpoint onto this mesh; None if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None

        def target(tree: Any) -> Any:
            shardings = state_sharding(mesh, tree)
            return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

        model = nnx.merge_state(abstract.params, abstract.rest)
        items = {
            "model": ocp.args.StandardRestore(target(nnx.to_pure_dict(model))),
            "optimizer": ocp.args.StandardRestore(target(abstract.opt_state)),
            "meta": ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items["ema"] = items["model"]
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))

        def state_of(values: Any) -> Any:
            filled = jax.tree.map(lambda x: x, model)
            nnx.replace_by_pure_dict(filled, values)
            return abstract.split(filled)

        params, rest = state_of(restored["model"])
        ema = None if abstract.ema is None else state_of(restored["ema"])[0]
        state = dataclasses.replace(abstract, params=params, rest=rest, opt_state=restored["optimizer"], ema=ema)
        return state, restored["meta"]

    def latest(self) -> int:
        """Step of the latest checkpoint, 0 if there is none."""
        return self.manager.latest_step() or 0

    def close(self) -> None:
        """Waits until the last save is on disk."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OSError:
        try:
            steps = checkpoint_steps(self.folder)
        except OSError:
            steps = []
        good = f"the last good checkpoint is {self.folder}/{steps[-1]}" if steps else "there is no good checkpoint"
        return OSError(f"saving a checkpoint failed ({error}); {good}. Mend the disk and run the same command again")
