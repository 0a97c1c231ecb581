"""Converts videos, arrays and folders of images to the dataset that the training scripts read (see docs/data.md).

    python preprocess_dataset.py                                        # Jafar's data/coinrun_episodes → data/coinrun
    python preprocess_dataset.py --input_dir my_videos --output_dir data/mine --height 64 --width 64 --fps 10
    python preprocess_dataset.py tokens --tokenizer_checkpoint runs/tokenizer --lam_checkpoint runs/lam

Each file, or folder of images, is one episode. An episode is cut into clips that follow one another.
"""

import dataclasses
import sys
from pathlib import Path

from models.errors import InputError
from sources.convert import ConversionOptions, convert
from utils.cli import run
from utils.records import SPLITS, Metadata, read_metadata


@dataclasses.dataclass(frozen=True)
class Config(ConversionOptions):
    """Converts videos, arrays and folders of images to a dataset of clips for training."""

    output_dir: str = "data/coinrun"
    """Dataset to write; must not exist yet."""
    allow_skips: bool = False
    """End with status 0 even if more than half of the sources were skipped."""
    num_workers: int = 4
    """Processes that convert files; 0 converts in this one. The dataset is the same for any number."""

    def check(self) -> None:
        super().check()
        if self.num_workers < 0:
            raise InputError(f"`num_workers` {self.num_workers}: must be 0 or more")


def main(config: Config) -> None:
    config.check()
    if already_done(config):
        clips = sum(shard.count() for shards in read_metadata(config.output_dir).splits.values() for shard in shards)
        missing = f"{config.input_dir} does not exist, so there is nothing to convert"
        print(f"{config.output_dir} is ready to train on ({clips} clips); {missing}")
        return
    report(config, convert(config, config.output_dir, config.num_workers))


def already_done(config: Config) -> bool:
    """Whether the script runs as written after generate_dataset.py, which leaves nothing to convert."""
    default = Config()
    paths_given = (config.input_dir, config.output_dir) != (default.input_dir, default.output_dir)
    written = Path(config.output_dir, "metadata.json").is_file()
    return not paths_given and written and not Path(config.input_dir).exists()


def report(config: Config, metadata: Metadata) -> None:
    """Prints what was made."""
    clips = {split: sum(shard.count() for shard in metadata.splits[split]) for split in SPLITS}
    frames = sum(n * k for shards in metadata.splits.values() for shard in shards for n, k in shard.lengths)
    for split, fraction in (("train", 1), ("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and not clips[split]:
            print(f"the {split} split is empty; add more files, or change --seed", file=sys.stderr)
    height, width, _ = metadata.frame_shape
    num_sources, num_skipped = metadata.made_by["sources"], metadata.made_by["skipped"]
    print(
        f"{config.output_dir}: {num_sources - num_skipped} files read, {num_skipped} skipped; {sum(clips.values())} "
        f"clips ({', '.join(f'{split} {clips[split]}' for split in SPLITS)}), {frames} frames of {height}×{width} at "
        f"{metadata.fps:g} per second"
    )
    if 2 * num_skipped > num_sources and not config.allow_skips:
        raise InputError(
            f"{num_skipped} of {num_sources} sources were skipped, more than half, for the reasons above; the dataset "
            "is written from the others (`allow_skips` takes this for a success)"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["tokens"]:
        from sources.tokens import TokenOptions, write_tokens  # brings JAX, which a conversion does without

        del sys.argv[1]
        run(write_tokens, TokenOptions)
    else:
        run(main, Config)
