"""Sampling: how codes are drawn, and rollouts: from prompt frames to a state, from a state and an action to a frame.

Keys and values of past frames are cached, in the dynamics model and in the tokenizer's decoder, so that a frame costs
one frame and not the window. The caches are rings of `window - 1` frames: a rollout of any length needs constant memory
and constant time per frame.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError

if TYPE_CHECKING:
    from models.dynamics_config import DynamicsConfig
    from models.genie import World


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("steps", "temperature"),
    meta_fields=("order", "top_k", "top_p", "guidance"),
)
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a frame is drawn; of tokens (Chang et al. 2022). Defaults: Genie, Appendix F.

    A causal model draws token after token, so steps and order are of no account there; of a flow only steps,
    temperature and guidance count. A pytree: `steps` and `temperature` may be traced, so that a change of them
    compiles nothing anew.
    """

    steps: int = 25
    """Steps per frame, of a MaskGIT or a flow."""
    temperature: float = 1.0
    """Of the tokens' distribution; 0 takes the likeliest. Of a flow the spread of the noise that it begins with."""
    order: Literal["confidence", "random", "halton"] = "confidence"
    """Which tokens a step settles: the likeliest (with noise that fades over the steps), random ones, or such as lie
    evenly spread over the frame (Besnier et al. 2025)."""
    top_k: int = 0
    """Draw among this many of a token's likeliest codes only; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest codes whose probability, at temperature 1, adds up to this; 1 for all."""
    guidance: float = 1.0
    """By how much a flow does what the action says rather than what is likely without it (Ho & Salimans 2022); 1 is
    what it has learned. All others run the head twice, and need a world that was trained with `action_dropout`."""

    def __post_init__(self):
        # What is traced cannot be looked at.
        if isinstance(self.steps, int) and self.steps < 1:
            raise InputError(f"`steps` {self.steps}: must be at least 1")
        if isinstance(self.temperature, int | float) and not 0 <= self.temperature < float("inf"):
            raise InputError(f"`temperature` {self.temperature}: must be finite and not negative")
        if self.top_k < 0:
            raise InputError(f"`top_k` {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"`guidance` {self.guidance}: must be finite and not negative")

    def expect(self, dynamics: "DynamicsConfig") -> None:
        """Refuses what a world cannot be sampled with."""
        if self.guidance != 1.0 and not dynamics.action_dropout:
            raise InputError(
                f"`guidance` {self.guidance:g}: needs a world trained with `action_dropout`; take 1", of=type(self)
            )


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How frames are drawn, where that is not left to the world; its own way is what its training found best."""

    steps: int | None = None
    """Steps per frame, of a MaskGIT or a flow; default: the world's."""
    temperature: float | None = None
    """Of the tokens' distribution, 0 takes the likeliest; of a flow's first noise; default: the world's."""
    order: Literal["confidence", "random", "halton"] | None = None
    """Which tokens a step settles: the likeliest, random ones, or such as lie evenly spread; default: the world's."""
    top_k: int | None = None
    """Draw among this many of a token's likeliest codes only, 0 for all; default: the world's."""
    top_p: float | None = None
    """Draw among the fewest likeliest codes whose probability adds up to this, 1 for all; default: the world's."""
    guidance: float | None = None
    """By how much a flow that was trained with `action_dropout` does what the action says; default: the world's."""

    def __post_init__(self):
        self.over(SamplingConfig())  # which refuses what cannot work

    def over(self, world: SamplingConfig) -> SamplingConfig:
        """The world's way of sampling, with what is chosen here in its place."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingFlags)}
        return dataclasses.replace(world, **{name: value for name, value in chosen.items() if value is not None})


def start_rollout(world: "World", frames_BTHWC: jax.Array, actions_BTm1: jax.Array) -> Any:
    """Reads prompt frames: the state of a rollout, which is the dynamics kind's own (see `Dynamics.start`).

    Args:
      frames_BTHWC: At least one frame, in [0, 1]; of more than `window - 1`, the last ones count.
      actions_BTm1: int32, or rows, the actions between them; empty for a single frame.
    """
    T = min(frames_BTHWC.shape[1], world.cfg.window - 1)
    frames_BTHWC = frames_BTHWC[:, -T:]
    actions_BTm1 = actions_BTm1[:, actions_BTm1.shape[1] - (T - 1) :]
    return world.dynamics.start(world.tokenizer, frames_BTHWC, actions_BTm1, world.cfg.window - 1)


def next_frame(
    world: "World", state: Any, action_B: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> tuple[jax.Array, Any]:
    """Draws the frame that an action leads to.

    Args:
      action_B: int32, or rows (see `models.actions`), one action for each rollout of the batch.
    Returns:
      The frame (B, H, W, C), float32 in [0, 1], and the state after it.
    """
    cfg.expect(world.cfg.dynamics)
    frame_BHWC, state = world.dynamics.next_frame(world.tokenizer, state, action_B, key, cfg)
    return jnp.clip(frame_BHWC, 0.0, 1.0), state


def rollout(
    world: "World", frames_BTHWC: jax.Array, actions_BS: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> jax.Array:
    """Plays a sequence of actions from prompt frames; the batch is spread over all devices where they divide it.

    Args:
      frames_BTHWC: T prompt frames in [0, 1].
      actions_BS: int32, or rows; `actions_BS[:, t]` leads from frame t to frame t + 1, the first T - 1 between prompt
        frames.
    Returns:
      The S + 1 - T predicted frames that follow the prompt, (B, S + 1 - T, H, W, C), float32 in [0, 1].
    """
    graphdef, variables = nnx.split(world)
    devices = np.array(jax.local_devices())
    if len(devices) > 1 and len(actions_BS) % len(devices) == 0:
        mesh = jax.sharding.Mesh(devices, "data")
        split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p)) for p in (("data",), ()))
        frames_BTHWC, actions_BS = jax.device_put((frames_BTHWC, actions_BS), split)
        variables, key = jax.device_put((variables, key), whole)
    return _rollout(graphdef, variables, frames_BTHWC, actions_BS, key, cfg)


@functools.partial(jax.jit, static_argnames="graphdef")
def _rollout(graphdef, variables, frames_BTHWC, actions_BS, key, cfg):
    return roll(nnx.merge(graphdef, variables), frames_BTHWC, actions_BS, key, cfg)


def roll(
    world: "World", frames_BTHWC: jax.Array, actions_BS: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> jax.Array:
    """As `rollout`, for use inside of what is compiled already."""
    T = frames_BTHWC.shape[1]
    state = start_rollout(world, frames_BTHWC, actions_BS[:, : T - 1])
    return imagine(world, state, actions_BS[:, T - 1 :], key, cfg)[0]


def imagine(
    world: "World", state: Any, actions_BS: jax.Array, key: jax.Array, cfg: SamplingConfig
) -> tuple[jax.Array, Any]:
    """Plays actions on from a state, for use inside of what is compiled already.

    Returns:
      Frames (B, S, H, W, C), and what the world's heads say of each action (`models.heads.Judged`, of (B, S)).
    """

    def play(state: Any, action_B: jax.Array) -> tuple[Any, tuple[jax.Array, Any]]:
        judged = world.judge(state, action_B)
        frame_BHWC, state = next_frame(world, state, action_B, jax.random.fold_in(key, state.frame), cfg)
        return state, (frame_BHWC, judged)

    _, found = jax.lax.scan(play, state, actions_BS.swapaxes(0, 1))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def draw_codes(log_p_XK: jax.Array, key: jax.Array, cfg: SamplingConfig) -> jax.Array:
    """Draws codes (...), int32, from log-probabilities at a temperature; at 0 the likeliest.

    One random number per code drawn, looked up in the cumulative distribution: K of them, as for Gumbel noise, would
    take as long as a block of the model.
    """
    log_p_XK = restrict(log_p_XK, cfg)
    log_p_XK -= jnp.max(log_p_XK, axis=-1, keepdims=True)
    cumulative_XK = jnp.cumsum(jnp.exp(log_p_XK / jnp.maximum(cfg.temperature, 1e-6)), axis=-1)
    u_X1 = jax.random.uniform(key, (*log_p_XK.shape[:-1], 1)) * cumulative_XK[..., -1:]
    drawn_X = jnp.sum(cumulative_XK <= u_X1, axis=-1)
    return jnp.minimum(drawn_X, log_p_XK.shape[-1] - 1).astype(jnp.int32)


def restrict(log_p_XK: jax.Array, cfg: SamplingConfig) -> jax.Array:
    """Sets the log-probabilities of codes beyond `top_k` and `top_p` to -inf; the likeliest code always stays."""
    if cfg.top_k:
        least_X1 = jax.lax.top_k(log_p_XK, min(cfg.top_k, log_p_XK.shape[-1]))[0][..., -1:]
        log_p_XK = jnp.where(log_p_XK < least_X1, -jnp.inf, log_p_XK)
    if cfg.top_p < 1:
        sorted_XK = jnp.sort(log_p_XK, axis=-1, descending=True)
        p_XK = jax.nn.softmax(sorted_XK)
        likelier_XK = jnp.cumsum(p_XK, axis=-1) - p_XK
        least_X1 = jnp.min(jnp.where(likelier_XK < cfg.top_p, sorted_XK, jnp.inf), axis=-1, keepdims=True)
        log_p_XK = jnp.where(log_p_XK < least_X1, -jnp.inf, log_p_XK)
    return log_p_XK
