"""Plays a game and writes what happens as a dataset of clips (docs/data.md has the format).

    python generate_dataset.py --num_episodes 10000     # CoinRun: 10M transitions, as in Genie's appendix F
    python generate_dataset.py --env maze --policy planner
    python generate_dataset.py --env gymnasium:ALE/Breakout-v5

One episode is 1,000 time steps of one environment. Where a level ends, the recording goes on in a new clip, so that a
clip never crosses the end of a level and next to nothing is thrown away. A run that was stopped continues when the same
command is given again; see `sources/recording.py`.
"""

import dataclasses
import time
from pathlib import Path

from sources.environment import EPISODE_STEPS, RecordingOptions
from sources.levels import describe
from sources.procgen import Procgen
from sources.recording import record
from sources.registry import find_environment, folder_name
from sources.workers import num_cores
from utils.cli import run


@dataclasses.dataclass(frozen=True)
class Config(RecordingOptions):
    """Plays a game and writes a dataset of clips."""

    env: str = "coinrun"
    """What to play: one of Procgen's sixteen games (coinrun, maze, leaper, ...), or gymnasium:ID for an environment
    that Gymnasium knows, for instance gymnasium:ALE/Breakout-v5 (`make env-deps` installs some)."""
    output_dir: str | None = None
    """Folder of the new dataset, by default data/ and the name of what is played. A finished dataset is never
    overwritten, an unfinished one is continued."""
    num_workers: int | None = None
    """Worker processes, 0.8 GB of memory each; by default one for each core. It has no effect on the files."""

    def check(self) -> None:
        super().check()
        self.expect("num_workers", self.num_workers is None or self.num_workers >= 1, "at least 1")


def main(config: Config) -> None:
    start = time.perf_counter()
    environment = find_environment(config.env, config)
    if config.learner and isinstance(environment, Procgen):
        from agents.clones import learner  # JAX
        from models.genie import read_config

        read_config(config.learner)
        environment.load_learner = learner
    folder = Path(config.output_dir or Path("data") / folder_name(environment.name))
    metadata, num_reused = record(environment, config, folder, config.num_workers or num_cores())
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
    print(describe(metadata.levels or {}))


if __name__ == "__main__":
    run(main, Config)
