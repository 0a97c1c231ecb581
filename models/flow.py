"""A flow: makes the next frame out of noise in a few steps, over continuous values (kin: diffusion forcing, Chen et al.
2024; shortcut forcing, Hafner et al. 2025).

A causal backbone reads each frame once. A small head of spatial blocks makes the next frame from the backbone's output
at each place, the action, the last picture and, where it takes several steps, the frame that is still noisy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import flops, init
from models.actions import ColumnEmbedding, no_actions
from models.dynamics import Dynamics, Seen, actions_to
from models.dynamics_config import DynamicsConfig, head_config
from models.flow_steps import WAVES, Drawn, draw_steps, edge_error, mixed, pick, put, towards, waves
from models.kernels import KV
from models.lam import LAM
from models.motion import MotionHead, frames_before
from models.nn import Compute, Past, Places, STTransformer, Transformed, linear, patchify, unpatchify
from models.padding import after_first
from models.sampling import SamplingConfig
from models.vq import Codebook


class FlowState(NamedTuple):
    """All that the next frame depends on, besides the action.

    backbone: Cache along time, stacked over blocks, of `window` frames; frame t lies in slot t % S.
    decoder: The same, of a tokenizer's decoder; None in pixels.
    hidden_BNM: The backbone's output at the last frame.
    values_BNP: The last frame.
    read_BNP: The last frame as the backbone has read it, with its noise.
    picture_BHWC: The last frame, in [0, 1].
    frame: Index of the next frame, int32.
    """

    backbone: KV
    decoder: KV | None
    hidden_BNM: jax.Array
    values_BNP: jax.Array
    read_BNP: jax.Array
    picture_BHWC: jax.Array
    frame: jax.Array


class Task(NamedTuple):
    """What the head makes frames of, all but the noisy frame: one entry for each frame that others follow.

    hidden_BTNM: The backbone's output there.
    action_BTM: Embedding of the action that leads to the next frame.
    last_BTNP: The values of the frame there.
    """

    hidden_BTNM: jax.Array
    action_BTM: jax.Array
    last_BTNP: jax.Array


class Flow(Dynamics):
    """Makes the next frame as values (..., N, P): each patch's pixels in [-1, 1], or its latent, of unit variance."""

    def __init__(self, cfg: DynamicsConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(cfg, compute, rngs)
        values, places = num_values(cfg), Places(-(-cfg.frame_shape[1] // cfg.patch_size))
        # The last row stands for no action.
        if cfg.action_width:
            self.codes_AL = Codebook(jnp.zeros((cfg.num_actions + 1, cfg.action_width)))
            self.code_in = linear(cfg.action_width, cfg.width, compute, rngs, bias=True)
        else:
            self.action_embedding = init.embeddings(rngs, cfg.num_actions + 1, cfg.width)
        if cfg.action_values:
            self.action_columns = ColumnEmbedding(cfg, compute, rngs)
        # Each patch beside its change, so that motion can be seen before any attention.
        self.patch_in = linear(2 * values, cfg.width, compute, rngs, bias=True)
        self.position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.transformer = STTransformer(cfg, compute, rngs, places)
        self.noisy_in = linear(values, cfg.width, compute, rngs)
        self.last_in = linear(values, cfg.width, compute, rngs)
        self.level_in = linear(4 * WAVES, cfg.width, compute, rngs, bias=True)
        self.head_position_NM = init.positions(rngs, cfg.num_patches, cfg.width)
        self.head = STTransformer(head_config(cfg), compute, rngs, places, sees_time=False)
        if cfg.motion_reach:
            self.move = MotionHead(cfg.width, cfg.patch_size, cfg.frame_shape, cfg.motion_reach, compute, rngs)
        else:
            self.patch_out = linear(cfg.width, values, compute, rngs, scale=0.0, bias=True)

    def embed_actions(self, actions_X: jax.Array) -> jax.Array:
        if not self.cfg.action_width:
            return super().embed_actions(actions_X)
        return self.embed_codes(self.codes_AL[...][actions_X])

    def embed_codes(self, codes_XL: jax.Array) -> jax.Array:
        """Embeddings (..., M), float32, of the codes of a LAM that learns along; zero is no action."""
        return self.code_in(codes_XL * self.cfg.action_width**0.5).astype(jnp.float32)

    def no_action(self) -> jax.Array:
        """The embedding (M) of an action that nobody tells."""
        return self.embed_actions(jnp.asarray(no_actions(self.cfg, ())))

    def follow(self, lam: LAM) -> None:
        """Takes over the codes of a LAM that has learned along, after each step."""
        self.codes_AL[...] = self.codes_AL[...].at[:-1].set(lam.vq.codebook_KL)

    def read(
        self,
        values_BTNP: jax.Array,
        action_BTM: jax.Array,
        past: Past | None = None,
        before_BNP: jax.Array | None = None,
        keep: bool = False,
    ) -> Transformed:
        """Runs the backbone over the frames of a clip, or over one after a past.

        Args:
          values_BTNP: As `noisy` makes them.
          action_BTM: Embeddings of those that led to each frame.
          before_BNP: The frame before the first given one, as it was read, if there is one.
          past, keep: See `STTransformer`.
        """
        before_BNP = values_BTNP[:, 0] if before_BNP is None else before_BNP
        change_BTNP = jnp.diff(values_BTNP, axis=1, prepend=before_BNP[:, None])
        x_BTNM = self.patch_in(jnp.concatenate([values_BTNP, 2.0 * change_BTNP], axis=-1))
        x_BTNM += action_BTM[:, :, None] + self.position_NM[...]
        return self.transformer(x_BTNM, past, keep)

    def predict(
        self, task: Task, noisy_BTNP: jax.Array, level_BT: jax.Array, size_BT: jax.Array, guidance: float = 1.0
    ) -> jax.Array:
        """What each next frame will be, values (B, T, N, P): where a step of the given size points to.

        Args:
          noisy_BTNP: (1 - level) · noise + level · the frame.
          level_BT, size_BT: In [0, 1) and (0, 1].
          guidance: See `SamplingConfig`. What the action changes is told by hidden states, not by values: between two
            moved pictures lies none that is moved by half.
        """
        x_BTNM = task.hidden_BTNM + self.noisy_in(noisy_BTNP) + self.last_in(task.last_BTNP)

        def after(action_XM: jax.Array) -> jax.Array:
            told_BTM = self.level_in(waves(level_BT, size_BT)) + action_XM
            return self.head(x_BTNM + told_BTM[:, :, None] + self.head_position_NM[...]).x_BTNM

        hidden_BTNM = after(task.action_BTM)
        if guidance != 1.0:
            hidden_BTNM = guided(hidden_BTNM, after(self.no_action()), guidance)
        if not self.cfg.motion_reach:
            # At first nothing changes.
            return task.last_BTNP + self.patch_out(hidden_BTNM).astype(jnp.float32)
        last_BTHWC = unpatchify(0.5 + 0.5 * task.last_BTNP, self.cfg.patch_size, self.cfg.frame_shape)
        return 2.0 * patchify(self.move(hidden_BTNM, last_BTHWC), self.cfg.patch_size) - 1.0

    def make(self, task: Task, noise_BTNP: jax.Array, steps: jax.Array | int, guidance: float = 1.0) -> jax.Array:
        """The next frames, values (B, T, N, P), out of noise in so many steps."""
        size = 1.0 / jnp.asarray(steps, jnp.float32)
        told_BT = jnp.full(noise_BTNP.shape[:2], jnp.maximum(size, 1.0 / self.cfg.flow_steps))

        def step(i: jax.Array, noisy_BTNP: jax.Array) -> jax.Array:
            level_BT = jnp.full_like(told_BT, i * size)
            made_BTNP = self.predict(task, noisy_BTNP, level_BT, told_BT, guidance)
            return towards(noisy_BTNP, made_BTNP, level_BT, size)

        return jax.lax.fori_loop(0, steps, step, noise_BTNP)

    @staticmethod
    def needs_tokenizer(cfg: DynamicsConfig) -> bool:
        return cfg.space == "latents"

    @staticmethod
    def flops(cfg: DynamicsConfig, num_frames: int) -> int:
        return flops.flow_read(cfg, num_frames) + flops.flow_head(cfg, num_frames - 1)

    @staticmethod
    def frame_flops(cfg: DynamicsConfig, window: int, sampling: SamplingConfig) -> int:
        heads = sampling.steps * (1 if sampling.guidance == 1.0 else 2)
        return flops.flow_read(cfg, 1, window) + heads * flops.flow_head(cfg, 1)

    @staticmethod
    def draw(
        cfg: DynamicsConfig, key: jax.Array, num_clips: int, num_frames: int, weight_BT: jax.Array | None = None
    ) -> Drawn:
        drawn = draw_steps(cfg, key, num_clips, (num_frames, cfg.num_patches, num_values(cfg)))
        return drawn._replace(counts_BTm1=after_first(weight_BT))

    def loss(self, seen: Seen, drawn: Drawn) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Squared error of the predicted frames in pixels' units, white being 1, and weighted.

        A frame at level l weighs 0.1 + 0.9 l, since of what is nearly done little is left to be wrong; one that is made
        in a single step weighs 1. Steps of the smallest size, and the whole one, learn from the true frame; those
        between, from where two of the model's own lead.
        """
        values_BTNP, action_BTM = self._given(seen)
        whole_BTm1, told_BTm1M = jnp.ones_like(drawn.size_BTm1), action_BTM[:, 1:]
        if drawn.untold_BTm1 is not None:
            told_BTm1M = jnp.where(drawn.untold_BTm1[..., None], self.no_action(), told_BTm1M)

        def task_after(shown_BTNP: jax.Array) -> Task:
            hidden_BTNM = self.read(shown_BTNP + drawn.context_BTNP, action_BTM).x_BTNM
            return Task(hidden_BTNM[:, :-1], told_BTm1M, shown_BTNP[:, :-1])

        task = task_after(values_BTNP)
        for _ in range(self.cfg.own_frames):
            made = self.predict(task, drawn.start_BTm1NP, jnp.zeros_like(whole_BTm1), whole_BTm1)
            own_BTNP = jnp.pad(jax.lax.stop_gradient(self.within(made)), ((0, 0), (1, 0), (0, 0), (0, 0)))
            task = task_after(jnp.where(drawn.own_BT[:, :, None, None], own_BTNP, values_BTNP))

        next_BTm1NP, level_BTm1, size_BTm1 = values_BTNP[:, 1:], drawn.level_BTm1, drawn.size_BTm1
        if drawn.halved_BX.shape[1]:
            level_BTm1 = put(level_BTm1, drawn.halved_BX, drawn.halved_level_BX)
            size_BTm1 = put(size_BTm1, drawn.halved_BX, drawn.halved_size_BX)
        noisy_BTm1NP = mixed(drawn.start_BTm1NP, next_BTm1NP, level_BTm1)
        goal_BTm1NP = next_BTm1NP
        if drawn.halved_BX.shape[1]:
            some, noisy = jax.tree.map(lambda x: pick(x, drawn.halved_BX), (task, noisy_BTm1NP))
            goal = self._two_steps(some, noisy, drawn)
            goal_BTm1NP = put(next_BTm1NP, drawn.halved_BX, goal)
        made_BTm1NP = self.predict(task, noisy_BTm1NP, level_BTm1, size_BTm1)
        counts_BTm1 = jnp.ones_like(level_BTm1) if drawn.counts_BTm1 is None else drawn.counts_BTm1
        weight_BTm1 = counts_BTm1 * jnp.where(size_BTm1 == 1.0, 1.0, 0.1 + 0.9 * level_BTm1)
        error_BTm1 = jnp.mean(jnp.square(0.5 * (made_BTm1NP - goal_BTm1NP)), axis=(2, 3))
        loss = jnp.mean(weight_BTm1 * error_BTm1)
        if self.cfg.edge_weight:
            made, goal = (self._frames(x) for x in (made_BTm1NP, goal_BTm1NP))
            loss += self.cfg.edge_weight * jnp.mean(weight_BTm1 * edge_error(made, goal, self.cfg.patch_size))

        def share(is_BTm1: jax.Array) -> jax.Array:
            return jnp.sum(error_BTm1 * counts_BTm1 * is_BTm1) / jnp.maximum(jnp.sum(counts_BTm1 * is_BTm1), 1e-6)

        return loss, {"one_step_mse": share(size_BTm1 == 1.0), "flow_mse": share(size_BTm1 < 1.0)}

    def hidden(self, seen: Seen) -> jax.Array:
        values_BTNP, action_BTM = self._given(seen)
        return self.read(self.noisy(values_BTNP, 0), action_BTM).x_BTNM

    def _given(self, seen: Seen) -> tuple[jax.Array, jax.Array]:
        """The frames of clips (B, T, N, P), and the embeddings (B, T, M) of the actions that lead to them."""
        values_BTNP = to_values(seen.frames_BTHWC, self.cfg) if self.in_pixels else seen.coded
        assert values_BTNP is not None
        if seen.codes_BTm1L is None:
            return values_BTNP, self.embed_actions(actions_to(seen.actions_BTm1))
        return values_BTNP, self.embed_codes(jnp.pad(seen.codes_BTm1L, ((0, 0), (1, 0), (0, 0))))

    def _two_steps(self, task: Task, noisy_BXNP: jax.Array, drawn: Drawn) -> jax.Array:
        """Where a step has to point to, to lead as far as two of half its size."""
        level_BX, size_BX = drawn.halved_level_BX, drawn.halved_size_BX
        there = noisy_BXNP
        for done in (0.0, 0.5):
            at_BX = level_BX + done * size_BX
            there = towards(there, self.predict(task, there, at_BX, 0.5 * size_BX), at_BX, 0.5 * size_BX)
        scale_BX11 = ((1.0 - level_BX) / size_BX)[:, :, None, None]
        return jax.lax.stop_gradient(noisy_BXNP + scale_BX11 * (there - noisy_BXNP))

    def _frames(self, values_BTNP: jax.Array) -> jax.Array:
        return unpatchify(0.5 + 0.5 * values_BTNP, self.cfg.patch_size, self.cfg.frame_shape)

    def start(self, tokenizer: Any, frames_BTHWC: jax.Array, actions_BTm1: jax.Array, window: int) -> FlowState:
        decoder = None
        if self.in_pixels:
            values_BTNP = to_values(frames_BTHWC, self.cfg)
        else:
            values_BTNP = tokenizer.encode_latents(frames_BTHWC)
            decoder = tokenizer.decode_latents_after(values_BTNP, frames_before(frames_BTHWC), keep=True).time
            decoder = decoder.padded(window)
        read_BTNP = self.noisy(values_BTNP, 0)
        read = self.read(read_BTNP, self.embed_actions(actions_to(actions_BTm1)), keep=True)
        assert read.time
        last = read.x_BTNM[:, -1], values_BTNP[:, -1], read_BTNP[:, -1], frames_BTHWC[:, -1].astype(jnp.float32)
        return FlowState(read.time.padded(window), decoder, *last, jnp.int32(frames_BTHWC.shape[1]))

    def next_frame(
        self, tokenizer: Any, state: FlowState, action_B: jax.Array, key: jax.Array, sampling: SamplingConfig
    ) -> tuple[jax.Array, FlowState]:
        last_B1NP, past = state.values_BNP[:, None], Past(state.backbone, state.frame)
        action_B1M = self.embed_actions(action_B)[:, None]
        noise_B1NP = sampling.temperature * jax.random.normal(key, last_B1NP.shape)
        task = Task(state.hidden_BNM[:, None], action_B1M, last_B1NP)
        made_B1NP = self.make(task, noise_B1NP, sampling.steps, sampling.guidance)
        made_B1NP, decoder = self.within(made_B1NP), state.decoder
        slot = state.frame % state.backbone.k_BRQDS.shape[-1]
        if decoder is None:
            picture_BHWC = self._frames(made_B1NP)[:, 0]
        else:
            last_B1HWC = state.picture_BHWC[:, None]
            decoded = tokenizer.decode_latents_after(made_B1NP, last_B1HWC, Past(decoder, state.frame), keep=True)
            decoder = decoder.write(decoded.time, slot)
            picture_BHWC = jnp.clip(decoded.frames_BTHWC[:, 0], 0.0, 1.0)
        read_B1NP = self.noisy(made_B1NP, state.frame)
        read = self.read(read_B1NP, action_B1M, past, state.read_BNP, keep=True)
        assert read.time
        last = read.x_BTNM[:, 0], made_B1NP[:, 0], read_B1NP[:, 0], picture_BHWC
        return picture_BHWC, FlowState(state.backbone.write(read.time, slot), decoder, *last, state.frame + 1)

    @property
    def in_pixels(self) -> bool:
        """Whether frames are made of pixels."""
        return self.cfg.space == "pixels"

    def within(self, values_BTNP: jax.Array) -> jax.Array:
        """Values as a frame may have them."""
        return jnp.clip(values_BTNP, -1.0, 1.0) if self.in_pixels else values_BTNP

    def noisy(self, values_BTNP: jax.Array, first: jax.Array | int) -> jax.Array:
        """Values as the backbone reads them in a rollout: the noise depends on a frame's number alone.

        Args:
          first: Number of the first given frame.
        """
        _, T, N, P = values_BTNP.shape
        root = jax.random.fold_in(jax.random.key(0), 2**31 - 1)  # apart from the noise that frames begin with
        noise = lambda t: jax.random.normal(jax.random.fold_in(root, t), (N, P))
        return values_BTNP + 2.0 * self.cfg.context_noise * jax.vmap(noise)(first + jnp.arange(T))


def guided(told_BTNM: jax.Array, any_BTNM: jax.Array, guidance: float) -> jax.Array:
    """Hidden states that go on from those without an action to those that are told it, and beyond, no longer than they.

    Longer ones would say more of all else as well, and move farther than any frame does (as in Lin et al. 2024).
    """
    length = lambda x_BTNM: jnp.linalg.norm(x_BTNM.astype(jnp.float32), axis=-1, keepdims=True)
    beyond_BTNM = any_BTNM + guidance * (told_BTNM - any_BTNM)
    ratio_BTN1 = length(told_BTNM) / jnp.maximum(length(beyond_BTNM), 1e-6)
    return beyond_BTNM * ratio_BTN1.astype(beyond_BTNM.dtype)


def num_values(cfg: DynamicsConfig) -> int:
    """Values of each place, P."""
    return cfg.latent_width if cfg.space == "latents" else cfg.patch_size**2 * cfg.frame_shape[2]


def to_values(frames_BTHWC: jax.Array, cfg: DynamicsConfig) -> jax.Array:
    """Frames in [0, 1] as values (B, T, N, P), float32."""
    return 2.0 * patchify(frames_BTHWC.astype(jnp.float32), cfg.patch_size) - 1.0
