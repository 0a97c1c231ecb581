"""Checkpoints: asynchronous, atomic, restorable on any number of devices (orbax).

<ckpt_dir>/config.json                                    kind, command, model, training flags, versions
<ckpt_dir>/<step>/model | optimizer | ema | meta          separate items, so that inference reads one of them

An exported world (export.py) has parameters.npz and data/ in the place of the steps. Nothing is written into its
folder: what would go into that of a training goes to runs/worlds/<name of the folder>.
"""

import contextlib
import dataclasses
import errno
import hashlib
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
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from models.errors import DamagedCheckpointError, InputError
from models.genie import CONFIG_VERSION, PARAMETERS, read_config
from models.stored import all_steps, checkpoint_steps, fault, first_line, newest_whole, read_items
from utils.data import frames_folder
from utils.lock import FolderLock
from utils.mixture import shares
from utils.sharding import state_sharding
from utils.state import TrainState

HARMLESS = {
    *("ckpt_dir", "data_dir", "tokenizer_checkpoint", "lam_checkpoint", "init_from"),
    *("policy_checkpoint", "world_checkpoint"),
    *("log", "entity", "project", "run_name", "tensorboard", "profile", "debug_nans", "log_gradients", "deterministic"),
    *("log_interval", "val_interval", "val_batches", "checkpoint_interval", "keep_latest", "keep_every", "keep_best"),
    *("steps", "temperature", "order", "top_k", "top_p", "guidance"),  # of sampling
    *("num_workers", "fsdp", "batch_per_device", "distributed", "coordinator", "num_processes", "process_id"),
    *("remat", "attention", "platform", "compile_cache"),
}
"""Training flags that a resumed run may change: they do not touch the curve beyond rounding."""

SPOKEN_OF = {"num_steps"}
"""Training flags that a resumed run may change too, and that do touch the curve: `fit` says how."""


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


def write_config(folder: Path, kind: str, model: Any, train: Any, parts: dict[str, str] | None = None) -> dict:
    """Writes `config.json`; if there is one, checks that this run may continue it.

    Args:
      parts: Fingerprints of the trained parts that the model begins with; those of a resumed run must be the same.
    Returns:
      The training flags that stood there; empty for a new folder.
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
        "weights": [round(share.weight, 6) for share in shares(train.data_dir)],
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }
    fields = json.loads(json.dumps(fields))
    stored: dict[str, Any] = {}
    if (folder / "config.json").exists():
        stored = read_config(folder)
        if stored["kind"] != kind:
            raise InputError(f"`ckpt_dir` {folder}: holds a {stored['kind']}, not a {kind}; choose another folder")
        compared = [name for name in ("model", "train", "parts", "weights") if name in stored]
        old, new = (_flat({name: config[name] for name in compared}) for config in (stored, fields))
        defaults = _flat({"model": _defaults(model)})
        differing = [
            f"{name}: stored {old.get(name)}, given {new.get(name)}"
            for name in sorted(old | new)
            if _differs(old, new, name, defaults) and name.split(".")[-1] not in HARMLESS | SPOKEN_OF
        ]
        if differing and all_steps(folder):
            raise InputError(
                f"`ckpt_dir` {folder}: holds a training with another configuration ({'; '.join(differing)}); give the "
                "stored values to resume it, or another `ckpt_dir`"
            )
        if all_steps(folder) and "init_from" in fields["train"]:
            fields["train"]["init_from"] = stored.get("train", {}).get("init_from", "")  # where it really began
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "config.json.tmp"
        temporary.write_text(json.dumps(fields, indent=2))
        os.replace(temporary, folder / "config.json")
    return stored.get("train", {})


def take_folder(folder: Path) -> contextlib.AbstractContextManager:
    """Makes the folder of a training, and takes it for this run alone while the context lasts.

    Raises:
      InputError: Another training has it, or it holds an exported world.
    """
    if is_exported(folder):
        raise InputError(
            f"`ckpt_dir` {folder}: holds an exported world, which cannot be trained on; choose another folder, and "
            "begin there with this world by `init_from`"
        )
    return FolderLock(folder) if jax.process_index() == 0 else contextlib.nullcontext()


def _differs(old: dict[str, Any], new: dict[str, Any], name: str, defaults: dict[str, Any]) -> bool:
    """Whether a field differs; one that is younger than the stored configuration was off then, or at its default."""
    if name not in old:
        return bool(new[name]) and new[name] != defaults.get(name)
    return old[name] != new.get(name)


def _defaults(model: Any) -> dict[str, Any]:
    """The defaults of a model's configuration; those of each part where it has parts."""
    parts = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    parts = {name: part for name, part in parts.items() if dataclasses.is_dataclass(part)}
    if parts:
        return {name: _defaults(part) for name, part in parts.items()}
    fields = dataclasses.fields(model)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


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

    Of a mixture that is the first dataset, whose actions have the numbers that the world knows.

    Raises:
      InputError: There is no checkpoint, or no dataset.
    """
    if is_exported(checkpoint):
        return str(Path(checkpoint) / "data")
    return frames_folder(shares(read_config(checkpoint)["train"]["data_dir"])[0].folder)


def output_of(checkpoint: str | Path, name: str = "") -> Path:
    """Where what is made of a checkpoint goes by default: into its folder, but never into an exported world's."""
    exported = is_exported(checkpoint)
    return (Path("runs/worlds") / Path(checkpoint).resolve().name if exported else Path(checkpoint)) / name


LABELS = "action_labels.json"


def labels_file(checkpoint: str | Path) -> Path:
    """Where evaluate.py says what a world's actions do: of an exported one, apart from others of its name."""
    if not is_exported(checkpoint):
        return Path(checkpoint) / LABELS
    digest = hashlib.sha256((Path(checkpoint) / PARAMETERS).read_bytes()).hexdigest()
    return output_of(checkpoint, f"{digest[:8]}_{LABELS}")


def find_labels(checkpoint: str | Path) -> Path | None:
    """What evaluate.py has found last, else what an exported world came with; see `utils.actions.read_labels`."""
    return next((file for file in (labels_file(checkpoint), Path(checkpoint) / LABELS) if file.is_file()), None)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

RISING = ("psnr", "ssim", "accuracy", "usage", "margin", "_ap", "worth", "solved")
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
        self._set_aside_incomplete()
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
            items["ema"] = ocp.args.StandardSave(nnx.to_pure_dict(nnx.merge_state(*state.with_average())))
        try:
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:  # orbax passes on whatever its writers raised
            raise self._failure(error) from error

    def restore(self, abstract: TrainState, mesh: jax.sharding.Mesh) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest whole checkpoint onto this mesh, and sets newer ones aside; None if there is none.

        Raises:
          DamagedCheckpointError: There are checkpoints, but none is whole; none was touched.
        """
        if self.manager.latest_step() is None:
            return None

        def target(tree: Any) -> Any:
            shardings = state_sharding(mesh, tree)
            return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

        model = nnx.merge_state(abstract.params, abstract.rest)
        items = {"model": target(nnx.to_pure_dict(model)), "optimizer": target(abstract.opt_state)}
        if abstract.ema is not None:
            items["ema"] = items["model"]

        def read(folder: Path) -> dict[str, Any]:
            try:
                meta = json.loads((folder / "meta" / "metadata").read_text())
            except (OSError, ValueError) as error:
                raise DamagedCheckpointError(f"{folder}: damaged (meta: {error})") from error
            return read_items(folder, items) | {"meta": meta}

        step, restored, damaged = newest_whole(self.folder, read)
        if damaged:
            self._set_aside(damaged, f"going on from step {step}")
            self.manager.reload()

        def state_of(values: Any) -> Any:
            filled = jax.tree.map(lambda x: x, model)
            nnx.replace_by_pure_dict(filled, values)
            return abstract.split(filled)

        params, rest = state_of(restored["model"])
        ema = None if abstract.ema is None else abstract.averaged(*state_of(restored["ema"]))
        state = dataclasses.replace(abstract, params=params, rest=rest, opt_state=restored["optimizer"], ema=ema)
        return state, restored["meta"]

    def _set_aside_incomplete(self) -> None:
        """Does so with checkpoints of which files are missing, before orbax meets them."""
        faults = {step: fault(self.folder / str(step)) for step in all_steps(self.folder)}
        multihost_utils.sync_global_devices("checkpoints are looked at")  # by all, before any is renamed
        reasons = {step: f"{self.folder}/{step}: damaged ({reason})" for step, reason in faults.items() if reason}
        if reasons and len(reasons) == len(faults):
            raise DamagedCheckpointError(f"{reasons[max(reasons)]}; there is no other that is whole")
        if reasons:
            self._set_aside(reasons, f"the newest of the others is step {max(faults.keys() - reasons.keys())}")

    def _set_aside(self, damaged: dict[int, str], then: str) -> None:
        """Renames checkpoints, so that nobody takes them for good and nothing is lost."""
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                place = self.folder / f"damaged-{step}"
                while place.exists():
                    place = place.with_name(place.name + "~")
                os.replace(self.folder / str(step), place)
                print(f"{reason}; set aside as {place}, {then}", file=sys.stderr, flush=True)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")

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
        text = str(error)
        on_disk = isinstance(error, OSError) or any(os.strerror(code) in text for code in _DISK_ERRORS)
        remedy = "Mend the disk and run" if on_disk else "Once its cause is gone, run"
        return OSError(f"saving a checkpoint failed ({first_line(error)}); {good}. {remedy} the same command again")
