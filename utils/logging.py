"""Where numbers and pictures of a training go: console, metrics.jsonl, image files, TensorBoard, wandb.

Every writer has the same three methods; `Writers` hands on to several, or, in all processes but one, to none.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from models.errors import InputError
from utils.video import write_png


class Writer(Protocol):
    """Takes what a training has to say about a step."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name."""

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """A uint8 picture."""

    def close(self) -> None:
        """Writes out what is still held."""


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self.writers = writers

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for writer in self.writers:
            writer.scalars(step, values)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        for writer in self.writers:
            writer.image(step, name, image_HWC)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class Console:
    """A live bar on a terminal, plain lines elsewhere and where tqdm's TQDM_DISABLE is set."""

    def __init__(self, name: str, first_step: int, num_steps: int):
        self.name = name
        self.num_steps = num_steps
        self.start = (first_step, time.monotonic())
        plain = not sys.stderr.isatty() or "TQDM_DISABLE" in os.environ
        self.bar = tqdm(total=num_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, disable=plain)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN or k.startswith("val_"))
        if not self.bar.disable:
            if "loss" in values:
                self.bar.set_postfix_str(shown)
                self.bar.update(step - self.bar.n)
            else:
                self.bar.write(f"step {step}  {shown}")
            return
        first, began = self.start
        left = (time.monotonic() - began) / max(step - first, 1) * (self.num_steps - step)
        print(f"{self.name} step {step}/{self.num_steps}  {shown}  {_clock(left)} left", flush=True)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        pass  # a console shows no pictures

    def close(self) -> None:
        self.bar.close()


SHOWN = ("loss", "psnr", "accuracy", "usage", "steps_per_s", "mfu", "data_wait")


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}"


class Files:
    """`metrics.jsonl`, one object a line, and `images/<name>_<step>.png` in the checkpoint folder."""

    def __init__(self, folder: Path, first_step: int):
        self.folder = folder
        path = folder / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint: their old lines go, so that the curve has no doubles.
        kept = [line for line in _lines(path) if line["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self.file = path.open("a", buffering=1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step} | values) + "\n")

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        (self.folder / "images").mkdir(exist_ok=True)
        write_png(self.folder / "images" / f"{name}_{step:07}.png", image_HWC)

    def close(self) -> None:
        self.file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the last line of a killed run may be cut short
    return lines


class TensorBoard:
    """TensorBoard event files in `<ckpt_dir>/tensorboard`."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace("val_", "val/", 1), value, step)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self.writer.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def check_wandb() -> None:
    """Refuses to begin a training whose log would stop at a question that nobody answers.

    Raises:
      InputError: wandb has no key, and no terminal to ask for one.
    """
    import wandb

    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not (offline or wandb.api.api_key or sys.stdin.isatty()):
        raise InputError(
            "`log`: wandb has no API key, and there is no terminal to ask for one; run `wandb login` once, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline"
        )


class Wandb:
    """A Weights & Biases run, which a resumed training continues by the id kept in the checkpoint folder.

    The id belongs to the folder that it was made for: a copy of the folder is another training, and gets its own run.
    """

    def __init__(self, folder: Path, entity: str, project: str, name: str, config: dict[str, Any]):
        import wandb

        id_file = folder / "wandb_id.txt"
        run_id, *owners = id_file.read_text().splitlines() if id_file.exists() else [wandb.util.generate_id()]
        here = _identity(folder)
        if owners and not set(owners) & set(here):  # it was neither moved nor is it where it was
            print(f"{folder}: a copy of another training's folder, which begins a run of its own", flush=True)
            run_id = wandb.util.generate_id()
        id_file.write_text("\n".join([run_id, *here]) + "\n")
        self.wandb = wandb
        self.run = wandb.init(
            entity=entity or None, project=project, name=name or None, id=run_id, resume="allow", config=config
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(image_HWC)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _identity(folder: Path) -> tuple[str, str]:
    """Two things of which a folder that is moved keeps one, and a copy none: its path, and its place on the disk."""
    found = folder.stat()
    return str(folder.resolve()), f"inode {found.st_dev}:{found.st_ino}"
