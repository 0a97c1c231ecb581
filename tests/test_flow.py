"""Flows: what they see, that steps and caches are exact, that few steps are learned, and worlds without a tokenizer."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import evaluate
import export
import sample
from models import flops
from models.dynamics import DynamicsConfig, Seen, actions_to
from models.errors import InputError
from models.flow import Flow, Task, guided, to_values
from models.flow_steps import draw_steps, edge_error, mixed, towards
from models.genie import World, WorldConfig, load_world
from models.kernels import KV
from models.lam import LAM, LAMConfig
from models.motion import frames_before, softened
from models.nn import Compute
from models.sampling import SamplingConfig, next_frame, rollout, start_rollout
from models.tokenizer import Decoded
from tests.conftest import SMALL, here, script
from tests.test_distributed import assert_close, processes
from tests.test_train import assert_same, flags, losses, refused, stored

FRAME = (8, 12, 3)
CFG = DynamicsConfig(
    kind="flow", width=16, num_heads=2, num_blocks=1, head_blocks=1, patch_size=4, num_patches=6, num_actions=3,
    motion_reach=2, rotary_space=True, frame_shape=FRAME,
)  # fmt: skip
FRAMES = jax.random.uniform(jax.random.key(0), (2, 5, *FRAME))
ACTIONS = jnp.array([[0, 1, 2, 1], [2, 2, 0, 1]])
KEY = jax.random.key(7)


def world_of(cfg: DynamicsConfig = CFG) -> World:
    return World(WorldConfig(None, None, cfg, window=5), Compute(), nnx.Rngs(0))


@pytest.fixture(scope="module")
def world() -> World:
    return world_of()


def seen(frames=FRAMES, actions=ACTIONS):
    return Seen(None, frames, frames_before(frames), actions)


def test_without_noise_a_frame_is_itself_and_steps_end_at_what_is_predicted():
    frames = jax.random.uniform(jax.random.key(1), (1, 2, 9, 10, 3))  # the patch size divides neither side
    cfg = dataclasses.replace(CFG, frame_shape=(9, 10, 3), num_patches=9)
    flow = Flow(cfg, Compute(), nnx.Rngs(0))
    values = to_values(frames, cfg)
    noise = jax.random.normal(KEY, values.shape)
    np.testing.assert_allclose(flow._frames(mixed(noise, values, jnp.ones((1, 2)))), frames, atol=1e-6)
    np.testing.assert_array_equal(mixed(noise, values, jnp.zeros((1, 2))), noise)
    for level in (0.0, 0.25, 0.75):
        at = jnp.full((1, 2), level)
        noisy = mixed(noise, values, at)
        np.testing.assert_allclose(towards(noisy, values, at, 1.0 - level), values, atol=1e-6)
        np.testing.assert_allclose(towards(noisy, values, at, 0.25), mixed(noise, values, at + 0.25), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_any_number_of_steps_of_a_perfect_predictor_is_exact(world, monkeypatch, steps):
    truth, told = to_values(FRAMES[:, 1:2], CFG), []

    def perfect(self, task, noisy_BTNP, level_BT, size_BT, guidance):
        told.append((float(level_BT[0, 0]), float(size_BT[0, 0])))
        np.testing.assert_allclose(noisy_BTNP, mixed(noise, truth, level_BT), atol=1e-5)
        return truth

    monkeypatch.setattr(Flow, "predict", perfect)
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    noise = jax.random.normal(KEY, truth.shape)
    with jax.disable_jit():
        action = world.dynamics.embed_actions(ACTIONS[:, :1])
        made = world.dynamics.make(Task(state.hidden_BNM[:, None], action, truth), noise, steps)
    np.testing.assert_allclose(made, truth, atol=1e-6)
    # Smaller steps than it was trained for are told as the smallest of those.
    np.testing.assert_allclose(told, [(i / steps, max(1 / steps, 1 / 4)) for i in range(steps)], atol=1e-6)


def test_a_rollout_equals_one_without_caches(world):
    flow, frames, steps = world.dynamics, FRAMES[:, :2], 3

    @jax.jit
    def made(frames, actions, key):
        led_by = flow.embed_actions(actions_to(actions))
        read = flow.read(flow.noisy(to_values(frames, CFG), 0), led_by[:, :-1]).x_BTNM
        task = Task(read[:, -1:], led_by[:, -1:], to_values(frames[:, -1:], CFG))
        return flow._frames(jnp.clip(flow.make(task, jax.random.normal(key, task.last_BTNP.shape), steps), -1, 1))

    for t in range(2, 5):
        frames = jnp.concatenate([frames, made(frames, ACTIONS[:, :t], jax.random.fold_in(KEY, t))], axis=1)
    cached = rollout(world, FRAMES[:, :2], ACTIONS, KEY, SamplingConfig(steps=steps))
    np.testing.assert_allclose(cached, frames[:, 2:], atol=1e-4)
    assert jnp.abs(jnp.diff(frames, axis=1)).max() > 0.05


def predicted(flow, frames, actions_BTm1, noisy):
    """The prediction of each frame after the first, as training makes it."""
    values, led_by = to_values(frames, flow.cfg), flow.embed_actions(actions_to(actions_BTm1))
    task = Task(flow.read(values, led_by).x_BTNM[:, :-1], led_by[:, 1:], values[:, :-1])
    level = jnp.full(noisy.shape[:2], 0.5)
    return flow.predict(task, noisy, level, level)


def test_a_frame_is_made_of_the_past_the_action_that_leads_to_it_and_its_own_noise():
    """By gradient, of a world whose actions have columns, so that one can differentiate by them."""
    columns = {"num_actions": 0, "action_values": (0, 3), "action_mean": (0.0,) * 2, "action_scale": (1.0,) * 2}
    flow = Flow(dataclasses.replace(CFG, **columns), Compute(), nnx.Rngs(0))
    actions = jax.random.uniform(KEY, (2, 4, 2))
    noisy = jax.random.normal(KEY, (2, 4, 6, 48))

    def reached(i):
        grads = jax.grad(lambda x: jnp.sum(jnp.sin(3 * predicted(flow, *x)[:, i])))((FRAMES, actions, noisy))
        return [jnp.any(x != 0, axis=tuple(k for k in range(x.ndim) if k != 1)) for x in grads]

    by_frame, by_action, by_noise = jax.jit(jax.vmap(reached))(jnp.arange(4))
    np.testing.assert_array_equal(by_frame, np.tril(np.ones((4, 5), bool)))  # frame t + 1 of frames up to t
    np.testing.assert_array_equal(by_action, np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(by_noise, np.eye(4, dtype=bool))


def test_a_new_flow_without_motion_keeps_a_picture_still():
    still = world_of(dataclasses.replace(CFG, motion_reach=0))
    played = rollout(still, FRAMES[:, :1], ACTIONS, KEY, SamplingConfig(steps=2))
    np.testing.assert_allclose(played, jnp.broadcast_to(FRAMES[:, :1], played.shape), atol=1e-5)


def test_still_videos_teach_a_moving_flow_to_keep_still():
    """In any number of steps, and although it was never shown true frames alone."""
    graphdef, params = nnx.split(world_of().dynamics)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, moments, key):
        frames = jnp.repeat(jax.random.uniform(key, (8, 1, *FRAME)), 5, axis=1)
        actions = jax.random.randint(key, (8, 4), 0, 3)
        drawn = Flow.draw(CFG, key, 8, 5)
        loss = lambda params: nnx.merge(graphdef, params).loss(seen(frames, actions), drawn)[0]
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, values = optimizer.init(params), []
    for i in range(60):
        params, moments, value = train(params, moments, jax.random.key(i))
        values.append(value)
    assert values[-1] < values[0] / 4
    trained = world_of()
    nnx.update(trained.dynamics, params)
    for steps in (1, 4):
        played = rollout(trained, FRAMES[:, :1], ACTIONS, KEY, SamplingConfig(steps=steps))
        error = jnp.sqrt(jnp.mean(jnp.square(played - FRAMES[:, :1])))
        assert error < 0.12, (steps, error)  # 0.29 is the spread of the picture


def test_guidance_goes_on_from_what_is_likely_without_the_action():
    """Where nothing moves, each patch is linear in its hidden state, whose length stays; 0 heeds no action."""
    still = world_of(dataclasses.replace(CFG, motion_reach=0, action_dropout=0.2))
    out = still.dynamics.patch_out.kernel
    out[...] = jax.random.normal(KEY, out.shape) / 20

    begin = 0.4 + 0.2 * FRAMES[:, :1]

    @jax.jit
    def first(actions, sampling):
        state = start_rollout(still, begin, ACTIONS[:, :0])
        return next_frame(still, state, actions, KEY, sampling)[1].values_BNP

    def made(guidance, actions=ACTIONS[:, 0]):
        return first(actions, SamplingConfig(1, 0.0, guidance=guidance)) - to_values(begin, still.dynamics.cfg)[:, 0]

    told, none = made(1.0), made(1.0, jnp.array([-1, -1]))
    assert jnp.abs(told - none).max() > 0.01
    assert jnp.abs(none).max() < 0.7  # nothing is clipped
    for guidance, low, high in ((0.0, 1.0, 1.0), (0.5, 1.0, 1.2), (1.5, 0.8, 1.0)):
        changed, straight = made(guidance), none + guidance * (told - none)
        length_BN1 = jnp.sum(changed * straight, axis=-1, keepdims=True) / jnp.sum(straight**2, axis=-1, keepdims=True)
        np.testing.assert_allclose(changed, length_BN1 * straight, atol=1e-5)
        assert low - 1e-4 < length_BN1.min() <= length_BN1.max() < high + 1e-4
        assert low == high or jnp.abs(length_BN1 - 1).max() > 1e-3
    states = jax.random.normal(KEY, (2, 1, 3, 5, 8))
    np.testing.assert_allclose(*(jnp.linalg.norm(x, axis=-1) for x in (guided(*states, 2.5), states[0])), rtol=1e-5)
    plain, twice = (Flow.frame_flops(CFG, 4, SamplingConfig(3, guidance=guidance)) for guidance in (1.0, 1.5))
    assert twice - plain == 3 * flops.flow_head(CFG, 1)
    with pytest.raises(InputError, match="`guidance` 2: needs a world trained with `action_dropout`"):
        rollout(world_of(), FRAMES[:, :1], ACTIONS, KEY, SamplingConfig(1, guidance=2.0))


def test_the_head_learns_without_some_actions():
    drawn = draw_steps(dataclasses.replace(CFG, action_dropout=0.5), jax.random.key(0), 1, (4000, 1, 1))
    own_T, untold_T = drawn.own_BT[0, 1:-1], drawn.untold_BTm1[0, 1:]
    assert abs(float(own_T[untold_T].mean()) - float(own_T.mean())) < 0.05  # dice of their own
    cfg = dataclasses.replace(CFG, action_dropout=0.25)
    plain, drawn = Flow.draw(CFG, KEY, 60, 16), Flow.draw(cfg, KEY, 60, 16)
    assert 0.2 < jnp.mean(drawn.untold_BTm1) < 0.3
    assert plain.untold_BTm1 is None
    jax.tree.map(np.testing.assert_array_equal, plain, drawn._replace(untold_BTm1=None))
    # The last action leads to the last frame, and nothing else knows of it.
    flow, other = world_of(cfg).dynamics, ACTIONS.at[:, -1].add(-1)
    drawn = Flow.draw(cfg, KEY, 2, 5)
    told = jnp.array([[False, True, False, False], [True, False, False, False]])

    @jax.jit
    def loss(actions, untold):
        return flow.loss(seen(FRAMES, actions), drawn._replace(untold_BTm1=untold))[0]

    assert loss(ACTIONS, told) != loss(other, told)
    untold = told.at[:, -1].set(True)
    assert loss(ACTIONS, untold) == loss(other, untold)
    with pytest.raises(InputError, match=r"`action_dropout` 0\.25: is for `kind` flow"):
        DynamicsConfig(action_dropout=0.25)
    with pytest.raises(InputError, match=r"`action_dropout` 1\.0: must be"):
        dataclasses.replace(CFG, action_dropout=1.0)


def test_steps_are_drawn_of_every_size():
    for most, sizes in ((1, set()), (2, set()), (4, {0.5}), (8, {0.5, 0.25})):
        drawn = Flow.draw(dataclasses.replace(CFG, flow_steps=most), KEY, 50, 16)
        assert set(np.unique(drawn.size_BTm1)) == {1.0, 1.0 / most}
        whole = np.asarray(drawn.size_BTm1) == 1.0
        assert not np.asarray(drawn.level_BTm1)[whole].any()
        assert set(np.unique(drawn.halved_size_BX)) == sizes
        levels = np.asarray(drawn.halved_level_BX / drawn.halved_size_BX)
        np.testing.assert_array_equal(levels, levels.round())
        assert np.all(drawn.halved_level_BX + drawn.halved_size_BX <= 1.0)
        assert not drawn.own_BT[:, 0].any()
        assert all(len(set(row)) == len(row) for row in np.asarray(drawn.halved_BX).tolist())
    assert 0.3 < np.mean(drawn.own_BT[:, 1:]) < 0.7


def test_a_perfect_predictor_has_no_loss_and_its_two_steps_lead_there(world, monkeypatch):
    still = jnp.broadcast_to(FRAMES[:, :1], FRAMES.shape)
    values, drawn = to_values(still, CFG), Flow.draw(CFG, KEY, 2, 5)
    assert drawn.halved_BX.shape == (2, 1)
    monkeypatch.setattr(Flow, "predict", lambda self, task, noisy, level, size: values[:, : noisy.shape[1]])
    loss, metrics = world.dynamics.loss(seen(still), drawn)
    assert loss < 1e-10
    assert metrics["flow_mse"] < 1e-10
    noisy = mixed(drawn.start_BTm1NP[:, :1], values[:, :1], drawn.halved_level_BX)
    np.testing.assert_allclose(world.dynamics._two_steps(None, noisy, drawn), values[:, :1], atol=1e-5)


def test_steps_between_learn_from_two_of_half_their_size(world):
    """A goal of its own making, which no gradient passes."""
    flow, drawn = world.dynamics, Flow.draw(CFG, KEY, 2, 5)
    level, half = jnp.zeros((2, 1)), jnp.full((2, 1), 0.25)
    drawn = drawn._replace(halved_level_BX=level, halved_size_BX=2 * half)
    noisy, values = drawn.start_BTm1NP[:, :1], to_values(FRAMES[:, :1], CFG)
    task = Task(jax.random.normal(KEY, (2, 1, 6, 16)), flow.embed_actions(ACTIONS[:, :1]), values)

    @jax.jit
    def both(noisy):
        there = towards(noisy, flow.predict(task, noisy, level, half), level, 0.25)
        there = towards(there, flow.predict(task, there, half, half), half, half)
        gradient = jax.grad(lambda x: flow._two_steps(task, x, drawn).sum())(noisy)
        return towards(noisy, flow._two_steps(task, noisy, drawn), level, 2 * half), there, gradient

    led, there, gradient = both(noisy)
    np.testing.assert_allclose(led, there, atol=1e-5)
    assert jnp.abs(there - noisy).max() > 0.1
    assert not jnp.any(gradient)


def test_own_frames_take_the_place_of_past_ones():
    drawn = Flow.draw(CFG, KEY, 2, 5)
    flows = [world_of(dataclasses.replace(CFG, own_frames=count)).dynamics for count in (0, 1, 2)]

    @jax.jit
    def losses(own_BT):
        return [flow.loss(seen(), drawn._replace(own_BT=own_BT))[0] for flow in flows]

    none, all_but_first = jnp.zeros((2, 5), bool), jnp.ones((2, 5), bool).at[:, 0].set(False)
    np.testing.assert_allclose(losses(none), losses(none)[0], rtol=1e-5)
    true, once, twice = losses(all_but_first)
    np.testing.assert_allclose(true, losses(none)[0], rtol=1e-5)
    assert abs(once - true) > 1e-4
    assert abs(twice - once) > 1e-6


def test_a_batch_can_be_cut_in_parts(world):
    """All that is drawn goes with its clip, so the loss is the mean of the clips' own."""
    inputs, loss = (seen(), Flow.draw(CFG, KEY, 2, 5)), jax.jit(lambda inputs: world.dynamics.loss(*inputs)[0])
    parts = [loss(jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)) for i in range(2)]
    assert abs(parts[0] - parts[1]) > 1e-5
    np.testing.assert_allclose(loss(inputs), (parts[0] + parts[1]) / 2, rtol=1e-5)


def test_edges_are_to_be_as_strong_as_in_truth_wherever_they_lie():
    edge = lambda at: jnp.broadcast_to((jnp.arange(8) >= at)[:, None].astype(float), (1, 1, 8, 8, 3))
    np.testing.assert_allclose(edge_error(edge(3), edge(5), 8), 0, atol=1e-6)
    np.testing.assert_allclose(edge_error(edge(3) + 0.3, edge(3), 8), 0, atol=1e-6)
    blurred = edge_error(softened(edge(3)), edge(3), 8)
    assert 0.02 < blurred < edge_error(softened(softened(edge(3))), edge(3), 8)
    assert jnp.isfinite(jax.grad(lambda x: edge_error(x, edge(3), 8).sum())(jnp.zeros((1, 1, 8, 8, 3)))).all()


def test_the_ring_slides_in_constant_memory(world):
    step = jax.jit(lambda state, key: next_frame(world, state, ACTIONS[:, 0], key, SamplingConfig(steps=1)))
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    shapes = [x.shape for x in jax.tree.leaves(state)]
    for i in range(9):
        before = state.backbone
        frame, state = step(state, jax.random.key(i))
        changed = np.moveaxis(np.asarray(before.v_BRQSD != state.backbone.v_BRQSD), 4, 0).reshape(4, -1).any(axis=1)
        np.testing.assert_array_equal(changed, np.arange(4) == (1 + i) % 4)
        assert np.isfinite(frame).all()
    assert [x.shape for x in jax.tree.leaves(state)] == shapes
    assert step._cache_size() == 1


def test_steps_may_be_traced_and_noise_has_a_temperature(world):
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    draw = jax.jit(lambda cfg, key: next_frame(world, state, ACTIONS[:, 0], key, cfg)[0])
    one, other = (draw(SamplingConfig(4, 1.0), jax.random.key(k)) for k in (0, 1))
    assert jnp.abs(one - other).max() > 1e-4
    cold = [draw(SamplingConfig(2, 0.0), jax.random.key(k)) for k in (0, 1)]
    np.testing.assert_array_equal(*cold)
    assert draw._cache_size() == 1


class Patches:
    """A continuous tokenizer whose latents are the patches themselves."""

    def __init__(self, flow):
        self.flow = flow

    def encode_latents(self, frames_BTHWC, last_BTHWC=None):
        return to_values(frames_BTHWC, self.flow.cfg)

    def decode_latents_after(self, latents_BTNL, last_BTHWC, past=None, keep=False):
        B, T = last_BTHWC.shape[:2]
        frame = 0 if past is None else past.frame
        time = KV(*(jnp.full_like(x, frame + 1.0) for x in KV.empty((1, B, 6, 2), 8, T, jnp.float32)))
        return Decoded(self.flow._frames(latents_BTNL), latents_BTNL, time)


def test_latents_take_the_way_of_pixels():
    """With latents that are pixels both make the same frames; the decoder is given its own past, and keeps it."""
    pixels, latents = (
        Flow(dataclasses.replace(CFG, motion_reach=0, space=space, latent_width=48), Compute(), nnx.Rngs(0))
        for space in ("pixels", "latents")
    )
    change = 0.02 * jax.random.normal(KEY, (16, 48))
    for flow in (pixels, latents):
        flow.patch_out.kernel[...] = change
    frames = 0.3 + 0.4 * FRAMES  # that nothing is clipped
    states = [flow.start(Patches(flow), frames[:, :2], ACTIONS[:, :1], 4) for flow in (pixels, latents)]
    sampling = SamplingConfig(steps=2)
    steps = [
        jax.jit(lambda state, action, flow=flow: flow.next_frame(Patches(flow), state, action, KEY, sampling))
        for flow in (pixels, latents)
    ]
    for t in (1, 2, 3):
        drawn = [step(state, ACTIONS[:, t]) for step, state in zip(steps, states, strict=True)]
        made, states = [frame for frame, _ in drawn], [state for _, state in drawn]
        np.testing.assert_allclose(*made, atol=1e-5)
    assert jnp.abs(made[0] - frames[:, 1]).max() > 0.01
    np.testing.assert_array_equal(states[1].decoder.v_BRQSD[0, 0, 0, 0, :, 0], [5, 1, 3, 4])
    drawn = Flow.draw(pixels.cfg, KEY, 2, 5)
    coded = seen(frames)._replace(coded=to_values(frames, CFG))
    np.testing.assert_allclose(latents.loss(coded, drawn)[0], pixels.loss(seen(frames), drawn)[0], rtol=1e-4)


def test_a_lam_learns_along_by_the_loss_of_the_flow():
    """Its encoder gets the gradient, its codes are what a player's actions mean, and it has no decoder."""
    lam = LAM(
        LAMConfig(
            width=16, num_heads=2, num_blocks=1, patch_size=4, num_codes=3, code_width=4, unquantized_steps=0,
            own_decoder=False, frame_shape=FRAME,
        ),
        Compute(), nnx.Rngs(0),
    )  # fmt: skip
    cfg = dataclasses.replace(CFG, action_width=4, flow_steps=1, own_frames=0)
    flow, drawn = Flow(cfg, Compute(), nnx.Rngs(1)), Flow.draw(cfg, KEY, 2, 5)

    def loss(lam, flow):
        out = lam.act(FRAMES, train=True)
        return flow.loss(seen(FRAMES, out.codes_X)._replace(codes_BTm1L=out.vectors_XL), drawn)[0]

    grads = jax.jit(nnx.grad(loss))(lam, flow)
    assert jnp.abs(grads["code_in"]["kernel"][...]).max() > 0
    assert not hasattr(lam, "decoder")
    out = lam.act(FRAMES)
    flow.follow(lam)
    np.testing.assert_allclose(flow.embed_actions(out.codes_X), flow.embed_codes(out.vectors_XL), atol=1e-5)
    np.testing.assert_array_equal(flow.embed_actions(jnp.array([-1])), flow.embed_codes(jnp.zeros((1, 4))))


def test_bad_fields_are_refused():
    for fields, message in (
        ({"flow_steps": 3}, "`flow_steps` 3: must be a power of two"),
        ({"head_blocks": 0}, "`head_blocks` 0"),
        ({"context_noise": -0.1}, "`context_noise` -0.1"),
        ({"space": "latents"}, "`motion_reach` 2: is for `space` pixels"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CFG, **fields)


WORLD = [word.replace("tiny", "flow") for word in SMALL]
WORLD += ["--model.head_blocks", 1, "--model.patch_size", 4, "--model.motion_reach", 2, "--model.action_dropout", 0.3]


@pytest.fixture(scope="module")
def trained_flow(trained, dataset, tmp_path_factory):
    """A world trained for six steps, in which no tokenizer is looked for."""
    folder = tmp_path_factory.mktemp("flow") / "world"
    given = [*WORLD, *flags(dataset, folder), "--lam_checkpoint", trained["lam"], "--tokenizer_checkpoint", "nowhere"]
    here("train_dynamics", *given)
    return folder, given


def test_a_flow_resumes_exactly(trained_flow, tmp_path):
    folder, given = trained_flow
    copy = tmp_path / "world"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "6")
    script("train_dynamics", *given, "--ckpt_dir", copy)  # in another process
    assert losses(copy) == losses(folder)
    for item in ("model", "optimizer"):
        assert_same(stored(copy, 6, item), stored(folder, 6, item))


@pytest.mark.slow
def test_a_flow_learns_alike_on_many_devices_in_processes_and_recomputed(trained_flow, tmp_path):
    folder, given = trained_flow
    script("train_dynamics", *given, "--ckpt_dir", tmp_path / "fsdp", "--fsdp", 2, devices=4)
    processes(2, "train_dynamics", *given, "--ckpt_dir", tmp_path / "two")
    here("train_dynamics", *given, "--ckpt_dir", tmp_path / "parts", "--grad_accum", 4, "--remat", "block")
    for name in ("fsdp", "two", "parts"):
        assert_close(losses(tmp_path / name), losses(folder))
    here("train_dynamics", *given, "--ckpt_dir", tmp_path / "half", "--dtype", "bfloat16", "--remat", "dots")
    np.testing.assert_allclose(list(losses(tmp_path / "half").values()), list(losses(folder).values()), rtol=0.05)


def test_a_world_without_a_tokenizer_samples_exports_and_is_measured(trained_flow, tmp_path, monkeypatch):
    folder, _ = trained_flow
    monkeypatch.chdir(tmp_path)
    world = load_world(folder)
    assert world.tokenizer is None
    assert world.num_actions == 3
    assert not any("tokenizer" in name for name in stored(folder, 6))
    out = tmp_path / "small"
    export.main(export.Config(run=str(folder), out=str(out), num_clips=3, num_frames=8, steps=2, guidance=1.5))
    assert "| tokenizer |" not in (out / "README.md").read_text()
    sample.main(sample.Config(checkpoint=str(out), output_dir=str(tmp_path / "samples"), num_clips=2, shown_clips=1))
    assert (tmp_path / "samples" / "rollout.gif").is_file()
    asked = {"num_clips": 3, "rollout_clips": 2, "long_frames": 3, "compile_cache": "", "sweep_sampling": True}
    evaluate.main(evaluate.Config(checkpoint=(str(out),), output_dir=str(tmp_path / "report"), **asked))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["sampling"]["steps"] == 2
    assert metrics["sampling"]["guidance"] == 1.5
    assert metrics["rollout_psnr"] > 0
    assert not any(name.startswith(("tokenizer", "reconstruction")) for name in metrics)
    assert {row["steps"] for row in metrics["sampling_sweep"]} == {1, 2, 4}
    assert "tokenizer" not in (tmp_path / "report" / "report.md").read_text()


def test_what_a_flow_cannot_learn_from_is_refused(trained, dataset, tmp_path):
    given = [*WORLD, *flags(dataset, tmp_path), "--lam_checkpoint", trained["lam"]]
    done = here("train_dynamics", *given, "--model.patch_size", 40, check=False)
    assert "--model.patch_size 40: must be from 1 to the frames' shorter side, 16" in refused(done)
    done = here("train_dynamics", *given, "--model.action_dropout", 0, "--sampling.guidance", 2, check=False)
    assert "--sampling.guidance 2: needs a world trained with `action_dropout`" in refused(done)
    latents = ["--model.space", "latents", "--model.motion_reach", 0, "--model.edge_weight", 0]
    latents += ["--tokenizer_checkpoint", trained["tokenizer"]]
    done = here("train_dynamics", *given, *latents, check=False)
    assert "has tokens, but --model.space latents needs a tokenizer of kind mae" in refused(done)


@pytest.mark.slow
def test_a_world_with_a_joint_lam_trains_and_is_measured(dataset, tmp_path):
    lam = ["--lam.width", 16, "--lam.num_heads", 2, "--lam.num_blocks", 1, "--lam.patch_size", 8, "--lam.num_codes", 3]
    here("train_dynamics", *WORLD, *flags(dataset, tmp_path), "--joint_lam", *lam, "--num_steps", 3)
    world = load_world(tmp_path)
    np.testing.assert_allclose(world.dynamics.codes_AL[:-1], world.lam.vq.codebook_KL, atol=1e-6)
    assert any("['lam']['encoder']" in name for name in stored(tmp_path, 3, "optimizer"))
    asked = {"num_clips": 3, "rollout_clips": 2, "long_frames": 3, "compile_cache": ""}
    evaluate.main(evaluate.Config(checkpoint=(str(tmp_path),), output_dir=str(tmp_path / "report"), **asked))
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["actions"] == "inferred"
    assert "lam_psnr" not in metrics
