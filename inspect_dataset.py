"""Shows what is in a dataset, before a day of training.

    python inspect_dataset.py data/coinrun
    python inspect_dataset.py data/mine --output_dir runs/mine --fix duplicates

Writes report.html with clips to play, contact_sheet.png, report.md and summary.json, and says what stands out. With
--fix duplicates it also writes a dataset without clips that occur more than once and those that cannot be read; with
--fix val one that holds some clips out, as for a single video.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from tqdm import tqdm

from evaluation.scan import Scan, gather, parts_of, scan_part
from models.errors import InputError
from sources.workers import num_cores, running
from utils.cli import run
from utils.records import Metadata, read_metadata
from utils.video import write_png

if TYPE_CHECKING:
    from evaluation.duplicates import Duplicates


@dataclasses.dataclass(frozen=True)
class Config:
    """Shows what is in a dataset."""

    data_dir: tyro.conf.Positional[str]
    """The dataset's folder."""
    output_dir: str = ""
    """Where to write; default: runs/inspections/<name of the dataset>."""
    fix: Literal["none", "duplicates", "val"] = "none"
    """Also write a dataset, to dataset/ in the output folder: without duplicates and damaged records; or with a val
    split where there is none, from the ends of the train split."""
    num_clips: int = 12
    """Clips to show, a half of them held out where there are as many."""
    seed: int = 0
    """Of the choice of clips."""
    num_workers: int | None = None
    """Processes that read; by default one for each core, 0 reads in this one."""

    def __post_init__(self):
        for name, value in (("num_clips", self.num_clips), ("num_workers", self.num_workers or 0)):
            if value < 0:
                raise InputError(f"`{name}` {value}: must be 0 or more")


def scan(cfg: Config, metadata: Metadata) -> Scan:
    """Reads the whole dataset."""
    parts = parts_of(cfg.data_dir, metadata)
    workers = num_cores() if cfg.num_workers is None else cfg.num_workers
    found = []
    total = sum(sum(part.lengths) for part in parts)
    # For a single part no process is worth its start.
    with (
        tqdm(total=total, unit=" frames", unit_scale=True, disable=None) as bar,
        running(scan_part, parts, workers if len(parts) > 1 else 0) as scans,
    ):
        for part, of_part in zip(parts, scans, strict=True):
            found.append(of_part)
            bar.update(sum(part.lengths))
    return gather(found)


def main(cfg: Config) -> None:
    # Not at the top: they bring scipy and JAX, which the workers do without.
    from evaluation.duplicates import find_duplicates
    from evaluation.fixes import expect_empty
    from evaluation.inspection import remarks, summarise
    from evaluation.inspection_page import choose_clips, contact_sheet, film, pictures_of_pairs, sections
    from evaluation.page import write_page

    began = time.perf_counter()
    metadata, data = read_metadata(cfg.data_dir), Path(cfg.data_dir)
    folder = Path(cfg.output_dir or Path("runs/inspections") / data.resolve().name)
    if cfg.fix != "none":
        expect_empty(folder / "dataset")
    found = scan(cfg, metadata)
    duplicates = find_duplicates(found)
    summary = summarise(metadata, found, duplicates)
    notes = remarks(summary)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [found.places[i] for i in choose_clips(found, cfg.num_clips, cfg.seed)]
    films = [film(data, metadata, place, f"clip-{i}") for i, place in enumerate(chosen)]
    pairs = pictures_of_pairs(data, found, duplicates)
    write_page(folder, f"Dataset {cfg.data_dir}", sections(summary, notes, films, pairs))
    if films:
        write_png(folder / "contact_sheet.png", contact_sheet(films))
    (folder / "summary.json").write_text(json.dumps(summary | {"remarks": notes}, indent=1) + "\n")
    frames = summary["frames"]
    print(f"{cfg.data_dir}: {summary['clips']:,} clips, {frames:,} frames ({time.perf_counter() - began:.1f} s)")
    for note in notes:
        print(f"- {note}", file=sys.stderr)
    print(f"wrote {folder}/report.html, contact_sheet.png, report.md and summary.json")
    if cfg.fix != "none":
        fix(cfg, metadata, found, duplicates, folder / "dataset")


def fix(cfg: Config, metadata: Metadata, found: Scan, duplicates: "Duplicates", folder: Path) -> None:
    """Writes the dataset that `fix` asks for, and says how it differs."""
    from evaluation.fixes import with_val, without_repeats, write_fixed

    damaged = sum(damage.clips for damage in found.damaged)
    splits = with_val(found) if cfg.fix == "val" else without_repeats(found, duplicates)
    if cfg.fix == "duplicates" and len(splits) == len(found.places) and not damaged:
        print(f"{cfg.data_dir} has no duplicates and nothing damaged: there is nothing to fix")
        return
    kept = write_fixed(cfg.data_dir, metadata, splits, folder, cfg.fix)
    moved = sum(split != place.split for place, split in splits.items())
    left_out = f"without {len(found.places) - kept:,} duplicates and {damaged:,} damaged ones"
    print(f"wrote {folder}: {kept:,} clips, {f'{moved:,} of them held out' if cfg.fix == 'val' else left_out}")


if __name__ == "__main__":
    run(main, Config)
