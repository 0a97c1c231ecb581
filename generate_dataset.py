"""Plays CoinRun and writes what happens as a dataset of clips (docs/data.md has the format).

    python generate_dataset.py --num_episodes 10000     # 10M transitions, as in Genie's appendix F

One episode is 1,000 time steps of one environment. Where the agent dies or takes the coin, the recording goes on in a
new clip, so that a clip never crosses the end of a level and next to nothing is thrown away. A run that was stopped
continues when the same command is given again; see `sources/recording.py`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

from sources.environment import EPISODE_STEPS, RecordingOptions
from sources.recording import record
from sources.registry import ENVIRONMENTS
from sources.workers import num_cores
from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config(RecordingOptions):
    """Plays CoinRun and writes a dataset of clips."""

    env: Literal[*ENVIRONMENTS] = "coinrun"  # type: ignore[valid-type]
    """What to play."""
    output_dir: str = "data/coinrun"
    """Folder of the new dataset. A finished dataset is never overwritten, an unfinished one is continued."""
    num_workers: int | None = None
    """Worker processes, 0.8 GB of memory each; by default one for each core. It has no effect on the files."""

    def check(self) -> None:
        super().check()
        self.expect("num_workers", self.num_workers is None or self.num_workers >= 1, "at least 1")


def main(config: Config) -> None:
    start = time.perf_counter()
    folder = Path(config.output_dir)
    metadata, num_reused = record(ENVIRONMENTS[config.env], config, folder, config.num_workers or num_cores())
    seconds = time.perf_counter() - start
    shards = [shard for shards in metadata.splits.values() for shard in shards]
    num_clips = sum(shard.count() for shard in shards)
    num_frames = sum(length * count for shard in shards for length, count in shard.lengths)
    speed = (config.num_episodes - num_reused) * EPISODE_STEPS / seconds
    megabytes = sum((folder / shard.file).stat().st_size for shard in shards) / 1e6
    print(
        f"{num_frames:,} frames (of {config.num_episodes * EPISODE_STEPS:,} time steps) in {num_clips:,} clips, "
        f"{speed:,.0f} frames/s, {megabytes:,.1f} MB: {folder}"
    )


if __name__ == "__main__":
    run(main, Config)
