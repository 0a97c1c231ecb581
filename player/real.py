"""The real game as a screen: what a world is held against, level by level."""

import asyncio
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from models.errors import InputError
from models.sampling import SamplingConfig
from player.screen import Prompts, Request

MAX_LEVEL = 2**31 - 1
PATIENCE_S = 3.0  # in which levels are opened to be chosen from: some games take seconds for one


class Level:
    """A level that is being played.

    levels: It alone (`sources.once.Levels`).
    frame_HWC: What it shows.
    end: How it ended, in words; empty while it goes on.
    """

    def __init__(self, levels: Any):
        self.levels, self.frame_HWC, self.end = levels, levels.frames()[0].copy(), ""


class RealGame:
    """The real game (`Screen`). Its states are levels that go on with each step: none can be gone back to.

    Args:
      name: What the page calls it.
      open_level: Opens the level of a number, alone (`sources.once.Levels`); the same one each time.
      frame_shape: (H, W, C).
    """

    def __init__(self, name: str, open_level: Callable[[int], Any], frame_shape: tuple[int, int, int]):
        self.name, self._open_level, self.frame_shape = name, open_level, frame_shape
        self._thread = ThreadPoolExecutor(1, "game")  # environments need not bear more

    def prompts(self, seed: int, count: int) -> Prompts:
        """The first frames of levels that are drawn with `seed`: so many, or of a slow game at least one."""
        levels_P = np.random.default_rng(seed).integers(MAX_LEVEL, size=count).tolist()
        return self._thread.submit(self._look, levels_P).result()

    def warm_up(self, cfg: SamplingConfig) -> None:
        """Opens a level, which loads what all need."""
        self._thread.submit(self._open, 0).result()

    async def start(self, frame_HWC: np.ndarray, level: int | None = None) -> Level:
        """A level at its beginning, which `frame_HWC` shows.

        Raises:
          InputError: There is no level with this beginning.
        """
        if level is None:
            raise InputError("No level of the real game begins with this picture; choose another one.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open, level)

    async def step(self, request: Request) -> tuple[np.ndarray, Level]:
        """The next frame (H, W, C), uint8, and the level; the last one again when that is over."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._act, request)

    def end(self, state: Level) -> str:
        """How a level ended; empty while it goes on."""
        return state.end

    async def serve(self) -> None:
        """Waits: nothing queues here."""
        await asyncio.Event().wait()

    def _look(self, levels_P: list[int]) -> Prompts:
        began = time.monotonic()
        frames: list[np.ndarray] = []
        for level in levels_P:
            if frames and time.monotonic() > began + PATIENCE_S:
                break
            frames.append(self._open(level).frame_HWC)
        return Prompts(np.stack(frames), levels_P[: len(frames)])

    def _open(self, number: int) -> Level:
        levels = self._open_level(number)
        level = Level(levels)
        # Whoever lets go of a level, wherever: it is closed where it was played.
        weakref.finalize(level, self._thread.submit, levels.close).atexit = False
        return level

    def _act(self, request: Request) -> tuple[np.ndarray, Level]:
        level: Level = request.state
        if not level.end:
            action = np.asarray(request.action)  # one integer, or a row of columns
            action_1 = (action if action.ndim else action.astype(np.int32))[None]
            frames_NHWC, _, over_N, solved_N = level.levels.step(action_1)
            if over_N[0]:  # there may be no frame of the end to be seen
                level.end = ("solved" if solved_N[0] else "lost") if level.levels.tells_solved else "over"
            else:
                level.frame_HWC = frames_NHWC[0].copy()
        return level.frame_HWC, level
