"""A world on the device: the next frames of several rollouts at once."""

import asyncio
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.actions import no_actions
from models.genie import World
from models.sampling import SamplingConfig, next_frame, start_rollout
from player.screen import Request


class Engine:
    """A world on the device, and the queue in front of it (`Screen`).

    Requests of several players are computed together, `width` of them in one call. There is one program for any
    number of them up to `width`, any steps and any temperature: nothing compiles after `warm_up`. What it computes
    equals `models.sampling.rollout`.

    Args:
      thread: An executor of one thread, through which all engines use the device in turns.
    """

    def __init__(self, world: World, width: int, thread: ThreadPoolExecutor):
        graphdef, self._variables = nnx.split(world)
        self.cfg = world.cfg
        self.num_actions = world.num_actions
        self._no_action = no_actions(world.cfg.dynamics, ())
        between = no_actions(world.cfg.dynamics, (1, 0))
        self._width, self._thread = width, thread
        self._queue: asyncio.Queue[tuple[Request, asyncio.Future]] = asyncio.Queue()

        @jax.jit
        def start(variables, frame_HWC):
            frames_BTHWC = frame_HWC[None, None].astype(jnp.float32) / 255
            return start_rollout(nnx.merge(graphdef, variables), frames_BTHWC, jnp.asarray(between))

        @jax.jit
        def step(variables, requests):
            def one(request: Request) -> tuple[jax.Array, Any]:
                key = jax.random.fold_in(jax.random.key(request.seed), request.state.frame)
                world, action_B = nnx.merge(graphdef, variables), request.action[None]
                frame_BHWC, state = next_frame(world, request.state, action_B, key, request.cfg)
                return (frame_BHWC[0] * 255 + 0.5).astype(jnp.uint8), state

            stacked = jax.tree.map(lambda *x: jnp.stack(x), *requests)
            if len(requests) == 1:  # without vmap, which turns the writing of the caches into scatters
                frame_HWC, state = one(requests[0])
                return frame_HWC[None], (state,)
            frames, states = jax.vmap(one)(stacked)
            return frames, tuple(jax.tree.map(lambda x, i=i: x[i], states) for i in range(len(requests)))

        self._start, self._step = start, step

    def warm_up(self, cfg: SamplingConfig) -> None:
        """Compiles everything."""
        blank = np.zeros(self.frame_shape, np.uint8)
        self._compute([Request(self._start(self._variables, blank), np.zeros_like(self._no_action), 0, cfg)])

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.cfg.frame_shape

    async def start(self, frame_HWC: np.ndarray, level: int | None = None) -> Any:
        """The state after one prompt frame, uint8 and of the world's shape, of whatever level."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._start, self._variables, frame_HWC)

    async def step(self, request: Request) -> tuple[np.ndarray, Any]:
        """The next frame (H, W, C), uint8, and the state after it. If the caller is cancelled, so is its request."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, future))
        return await future

    def end(self, state: Any) -> str:
        """Nothing: a rollout goes on for ever."""
        return ""

    async def serve(self) -> None:
        """Answers requests until it is cancelled."""
        self._queue = asyncio.Queue()  # a queue belongs to one event loop
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._width and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._answer([(request, future) for request, future in batch if not future.done()])
            del batch  # it holds states of players who may leave before the next request comes

    async def _answer(self, batch: list[tuple[Request, asyncio.Future]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            requests = [request for request, _ in batch]
            answers = await loop.run_in_executor(self._thread, self._compute, requests) if batch else []
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:  # whatever it is belongs to those who asked
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)

    def _compute(self, requests: Sequence[Request]) -> list[tuple[np.ndarray, Any]]:
        full = [*requests, *[requests[0]] * (self._width - len(requests))]
        # Fixed types, so that there is one program.
        arrays = tuple(
            Request(
                r.state,
                np.asarray(r.action, self._no_action.dtype),
                np.int32(r.seed),
                dataclasses.replace(r.cfg, steps=np.int32(r.cfg.steps), temperature=np.float32(r.cfg.temperature)),  # type: ignore[arg-type]
            )
            for r in full
        )
        frames, states = self._step(self._variables, arrays)
        return list(zip(np.asarray(frames), states, strict=True))[: len(requests)]
