"""What a game's own keys do, by the measure of a world's buttons (`evaluation.buttons`): what could be had at best.

    python -m benchmarks.keys --data_dir runs/demo/data

Held-out levels of the dataset's game, played by its sticky player; from each prompt the real game goes on twice, with a
key held and with the idle one.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.common import Output, show
from evaluation.actions import merge_actions
from evaluation.buttons import HELD_FRAMES, PROMPT_FRAMES, PROMPTS, measure_buttons
from models.errors import InputError
from sources.policies import choose_actions
from sources.procgen import Procgen
from sources.registry import open_game
from utils.cli import run

CLIP = 16  # frames


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """Measures what the keys of a game of Procgen do."""

    data_dir: str = "runs/demo/data"
    """Dataset whose game is played, as it was made."""
    num_levels: int = 400
    """Levels side by side, one clip of each; at least 20, as many as there are prompts."""
    seed: int = 0
    """Of levels, actions and the choice of prompts."""

    def __post_init__(self):
        if self.num_levels < PROMPTS:
            raise InputError(f"`num_levels` {self.num_levels}: must be {PROMPTS} or more")


class Game:
    """The real game, which goes on from any few frames that it has shown; from those shown twice, as the last time."""

    def __init__(self, procgen: Procgen, env: Any, index_A: np.ndarray):
        self._procgen, self._env, self._index_A = procgen, env, index_A
        self._states: dict[bytes, bytes] = {}

    def record(self, actions_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frames (B, CLIP, H, W, 3) and the actions (B, CLIP - 1) between them of the clips in which no level ends."""
        frames, firsts = [], []
        for actions_B in actions_BT.T:
            _, observation, first_B = self._env.observe()
            pictures = self._procgen.pictures(self._env, observation)
            frames.append(pictures.copy())
            seen = np.stack(frames[-PROMPT_FRAMES:], axis=1)
            self._states |= dict(zip((x.tobytes() for x in seen), self._env.get_state(), strict=True))
            firsts.append(first_B)
            self._env.act(actions_B)
        whole_B = ~np.stack(firsts[-CLIP + 1 :]).any(axis=0)
        return np.stack(frames[-CLIP:], axis=1)[whole_B], self._index_A[actions_BT[whole_B, -CLIP:-1]]

    def play(self, prompts_BTHWC: np.ndarray, actions_BT: np.ndarray) -> np.ndarray:
        """Frames of the held actions; of a level that has ended the last one stays."""
        B, keys = len(prompts_BTHWC), [int(np.flatnonzero(self._index_A == a)[0]) for a in actions_BT[:, -1]]
        num = self._env.num
        places = np.arange(num) % B  # all of the environments play, some of them the same
        self._env.set_state([self._states[prompts_BTHWC[b, -PROMPT_FRAMES:].tobytes()] for b in places])
        last_BHWC, over_B, frames = prompts_BTHWC[:, -1], np.zeros(B, bool), []
        for _ in range(HELD_FRAMES):
            self._env.act(np.array(keys, np.int32)[places])
            _, observation, first_N = self._env.observe()
            over_B |= first_N[:B]
            pictures = self._procgen.pictures(self._env, observation)[:B]
            last_BHWC = np.where(over_B[:, None, None, None], last_BHWC, pictures)
            frames.append(last_BHWC)
        return np.stack(frames, axis=1)


def main(cfg: Config) -> None:
    game, options = open_game(cfg.data_dir)
    if not isinstance(game, Procgen):
        raise InputError(f"`data_dir` {cfg.data_dir}: not a game of Procgen, whose state could be set")
    merged = merge_actions(game.action_names, game.same_actions)
    rng = np.random.default_rng(cfg.seed)
    env = game.make(options, "val", cfg.num_levels, rand_seed=cfg.seed)
    played = Game(game, env, merged.index_A)
    frames, actions = played.record(choose_actions("sticky", game.weights_A, rng, cfg.num_levels, 2 * CLIP))
    idle = merged.names.index(game.idle_action)
    found = measure_buttons(played.play, frames, actions, len(merged.names), cfg.seed, idle).details["buttons"]
    env.close()
    told = {
        name: f"{b['agree']:>2} of {b['prompts']}  {b['right']:+.2f} {b['up']:+.2f}  {b['name']}"
        for name, b in zip(merged.names, found, strict=True)
    }
    show("each key: prompts that agree; pixels per frame to the right and up; what that is called", told, cfg.json)


if __name__ == "__main__":
    run(main, Config)
