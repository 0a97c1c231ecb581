"""MaskGIT's schedule, and cached rollouts against plain ones."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import World, WorldConfig
from models.kernels import KV
from models.lam import LAMConfig
from models.maskgit import fill_tokens, halton_ranks
from models.motion import frames_before
from models.nn import Compute, Past
from models.sampling import SamplingConfig, next_frame, restrict, rollout, start_rollout
from models.tokenizer import TokenizerConfig

SIZE = {"width": 16, "num_heads": 2, "num_blocks": 2}
FRAME = (8, 8, 3)
WINDOW = 5
CONFIG = WorldConfig(
    TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=FRAME),
    LAMConfig(**SIZE, patch_size=4, num_codes=3, code_width=4, frame_shape=FRAME),
    DynamicsConfig(**SIZE, num_codes=16, num_patches=4, num_actions=3),
    window=WINDOW,
)
FRAMES = jax.random.uniform(jax.random.key(0), (2, WINDOW, *FRAME))
ACTIONS = jnp.array([[0, 1, 2, 1], [2, 2, 0, 1]])


@pytest.fixture(scope="module")
def world() -> World:
    return World(CONFIG, Compute(), nnx.Rngs(0))


def plain_rollout(world, frames, actions, key, cfg):
    """The same without any cache: every MaskGIT step runs the whole clip."""
    tokens = world.tokenizer.encode(frames)
    for t in range(frames.shape[1], actions.shape[1] + 1):
        led_by = jnp.pad(actions[:, :t], ((0, 0), (1, 0)), constant_values=-1)

        def logits(tokens_BN, hidden_BN, tokens=tokens, led_by=led_by):
            clip = jnp.concatenate([tokens, tokens_BN[:, None]], axis=1)
            hidden = jnp.concatenate([jnp.zeros_like(tokens, bool), hidden_BN[:, None]], axis=1)
            return world.dynamics(clip, hidden, led_by).logits_BTNK[:, -1]

        new = fill_tokens(logits, (len(tokens), tokens.shape[2]), jax.random.fold_in(key, t), cfg, columns=2)
        tokens = jnp.concatenate([tokens, new[:, None]], axis=1)
    return jnp.clip(world.tokenizer.decode(tokens).frames_BTHWC[:, frames.shape[1] :], 0, 1)


@pytest.mark.parametrize(
    ("cfg", "prompt"),
    [
        (SamplingConfig(steps=3), 1),
        (SamplingConfig(steps=2, temperature=0.0, order="random"), 3),
        (SamplingConfig(steps=3, order="halton", top_k=8, top_p=0.9), 1),
    ],
)
def test_cached_rollout_equals_the_plain_one(world, prompt, cfg):
    key = jax.random.key(7)
    cached = rollout(world, FRAMES[:, :prompt], ACTIONS, key, cfg)
    plain = plain_rollout(world, FRAMES[:, :prompt], ACTIONS, key, cfg)
    np.testing.assert_allclose(cached, plain, atol=1e-4)


def test_a_head_guesses_in_play_as_it_does_in_training():
    """Of a frame that is all hidden, after a whole past; also with a picture of it in view."""
    dynamics = dataclasses.replace(CONFIG.dynamics, kind="maskgit_head", head_blocks=1, sees_picture=True)
    world = World(dataclasses.replace(CONFIG, dynamics=dynamics), Compute(), nnx.Rngs(0))
    cfg, key = SamplingConfig(steps=3), jax.random.key(7)
    cached = rollout(world, FRAMES[:, :1], ACTIONS[:, :2], key, cfg)
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    tokens = state.tokens_BN[:, None]
    for t in (1, 2):
        led_by = jnp.pad(ACTIONS[:, :t], ((0, 0), (1, 0)), constant_values=-1)
        last = jnp.concatenate([frames_before(FRAMES[:, :1]), FRAMES[:, :1], cached[:, : t - 1]], axis=1)

        def logits(tokens_BN, hidden_BN, tokens=tokens, led_by=led_by, last=last):
            clip = jnp.concatenate([tokens, tokens_BN[:, None]], axis=1)
            # Whether tokens of the past are hidden for their own frames' sake is of no account to later ones.
            hidden = jnp.concatenate([jnp.ones_like(tokens, bool), hidden_BN[:, None]], axis=1)
            return world.dynamics(clip, hidden, led_by, last_BTHWC=last).logits_BTNK[:, -1]

        new = fill_tokens(logits, (2, tokens.shape[2]), jax.random.fold_in(key, t), cfg, columns=2)
        state = next_frame(world, state, ACTIONS[:, t - 1], jax.random.fold_in(key, t), cfg)[1]
        np.testing.assert_array_equal(state.tokens_BN, new)
        tokens = jnp.concatenate([tokens, new[:, None]], axis=1)


def test_a_head_sees_the_past_and_of_its_own_frame_what_is_not_hidden():
    dynamics = dataclasses.replace(CONFIG.dynamics, kind="maskgit_head", head_blocks=1)
    world = World(dataclasses.replace(CONFIG, dynamics=dynamics), Compute(), nnx.Rngs(0))
    tokens = world.tokenizer.encode(FRAMES)
    led_by = jnp.pad(ACTIONS, ((0, 0), (1, 0)), constant_values=-1)
    hidden = jnp.zeros_like(tokens, bool).at[:, :, 0].set(True)
    run = jax.jit(lambda tokens, led_by: world.dynamics(tokens, hidden, led_by).logits_BTNK)
    logits = run(tokens, led_by)
    for t in range(WINDOW):
        for n in range(tokens.shape[2]):
            other = tokens.at[:, t, n].set((tokens[:, t, n] + 1) % dynamics.num_codes)
            change = np.abs(run(other, led_by) - logits).max(axis=(0, 2, 3))
            np.testing.assert_array_equal(change > 0, [s > t or (s == t and n > 0) for s in range(WINDOW)])
        change = np.abs(run(tokens, led_by.at[:, t].set((led_by[:, t] + 1) % 3)) - logits).max(axis=(0, 2, 3))
        np.testing.assert_array_equal(change > 0, [s >= t for s in range(WINDOW)])


def test_cached_logits_equal_those_of_the_whole_clip(world):
    tokens = world.tokenizer.encode(FRAMES)
    led_by = jnp.pad(ACTIONS, ((0, 0), (1, 0)), constant_values=-1)
    seen = jnp.zeros_like(tokens, bool)
    whole = world.dynamics(tokens, seen, led_by).logits_BTNK
    state = start_rollout(world, FRAMES[:, :-1], ACTIONS[:, :-1])
    past = Past(state.dynamics, state.frame)
    last = world.dynamics(tokens[:, -1:], seen[:, -1:], led_by[:, -1:], past, state.tokens_BN).logits_BTNK
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_cached_causal_decoding_equals_teacher_forced_logits():
    cfg = dataclasses.replace(CONFIG, dynamics=dataclasses.replace(CONFIG.dynamics, kind="causal"))
    world = World(cfg, Compute(), nnx.Rngs(0))
    tokens = world.tokenizer.encode(FRAMES)
    led_by = jnp.pad(ACTIONS, ((0, 0), (1, 0)), constant_values=-1)
    whole = world.dynamics(tokens, jnp.zeros_like(tokens, bool), led_by).logits_BTNK
    state = start_rollout(world, FRAMES[:, :-1], ACTIONS[:, :-1])
    blocks, B, N, Q, _, D = state.dynamics.v_BRQSD.shape
    space = KV(jnp.zeros((blocks, B, 1, Q, D, N)), jnp.zeros((blocks, B, 1, Q, N, D)))
    step = jax.jit(
        lambda token, place, space: world.dynamics.next_token(
            token, led_by[:, -1], state.tokens_BN[:, place], Past(state.dynamics, state.frame, space, place)
        )
    )
    for place in range(tokens.shape[2]):
        token = tokens[:, -1, place - 1] if place else jnp.zeros(2, jnp.int32)
        out = step(token, jnp.int32(place), space)
        space = space.write(out.space, jnp.int32(place))
        np.testing.assert_allclose(out.logits_BTNK[:, 0, 0], whole[:, -1, place], atol=1e-5)


def test_a_causal_rollout_equals_one_without_caches():
    cfg = dataclasses.replace(CONFIG, dynamics=dataclasses.replace(CONFIG.dynamics, kind="causal"))
    world = World(cfg, Compute(), nnx.Rngs(0))
    run = jax.jit(lambda tokens, actions: world.dynamics(tokens, jnp.zeros_like(tokens, bool), actions).logits_BTNK)
    tokens = np.array(world.tokenizer.encode(FRAMES[:, :2]))
    for t in range(2, WINDOW):
        led_by = jnp.pad(ACTIONS[:, :t], ((0, 0), (1, 0)), constant_values=-1)
        tokens = np.concatenate([tokens, np.zeros_like(tokens[:, :1])], axis=1)
        for place in range(tokens.shape[2]):
            tokens[:, t, place] = np.argmax(run(tokens, led_by)[:, t, place], axis=-1)
    plain = jnp.clip(world.tokenizer.decode(tokens).frames_BTHWC[:, 2:], 0, 1)
    cached = rollout(world, FRAMES[:, :2], ACTIONS, jax.random.key(0), SamplingConfig(temperature=0.0))
    np.testing.assert_allclose(cached, plain, atol=1e-4)


def test_a_thousand_frames_take_constant_memory_and_time_per_frame(world):
    cfg = SamplingConfig(steps=1)
    step = jax.jit(lambda state, key: next_frame(world, state, jnp.array([1, 2]), key, cfg)[1])
    state = step(start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0]), jax.random.key(0))
    sizes, times = [x.nbytes for x in jax.tree.leaves(state)], []
    for i in range(1000):
        began = time.perf_counter()
        state = jax.block_until_ready(step(state, jax.random.key(i)))
        times.append(time.perf_counter() - began)
    assert int(state.frame) == 1002
    assert [x.nbytes for x in jax.tree.leaves(state)] == sizes
    assert step._cache_size() == 1  # nothing was compiled for a later frame
    # Medians, and wide bounds: what would grow with the frames would be a hundred times slower by now.
    assert np.median(times[-300:]) < 3 * np.median(times[:300])


def test_long_rollouts_keep_their_size_and_slide(world):
    cfg = SamplingConfig(steps=1)
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    sizes = [x.shape for x in jax.tree.leaves(state)]
    step = jax.jit(lambda state, key: next_frame(world, state, jnp.array([1, 2]), key, cfg))
    S = WINDOW - 1
    for i in range(3 * WINDOW):
        before = state
        frame, state = step(state, jax.random.key(i))
        # Each frame takes the place of the one that is S frames older, and touches no other.
        for old, new in zip((*before.dynamics, *before.decoder), (*state.dynamics, *state.decoder), strict=True):
            axis = 5 if old.shape[5] == S else 4
            changed = np.moveaxis(np.asarray(old != new), axis, 0).reshape(S, -1).any(axis=1)
            np.testing.assert_array_equal(changed, np.arange(S) == int(before.frame) % S)
        assert [x.shape for x in jax.tree.leaves(state)] == sizes
        assert np.isfinite(frame).all()
    assert int(state.frame) == 1 + 3 * WINDOW
    assert step._cache_size() == 1
    # All that the ring holds counts, wherever it begins.
    tokens = jnp.zeros((2, 1, 4), jnp.int32)
    run = jax.jit(
        lambda past: (
            world.dynamics(tokens, tokens > 0, tokens[:, :, 0], Past(past, state.frame), tokens[:, 0]).logits_BTNK
        )
    )
    logits, past = run(state.dynamics), state.dynamics
    for slot in range(S):
        other = past._replace(v_BRQSD=past.v_BRQSD.at[..., slot, :].add(1.0))
        assert np.abs(run(other) - logits).max() > 1e-4
    turned = KV(jnp.roll(past.k_BRQDS, 1, axis=5), jnp.roll(past.v_BRQSD, 1, axis=4))
    np.testing.assert_allclose(run(turned), logits, atol=1e-5)


def test_prompts_longer_than_the_window_count_by_their_end(world):
    long = jnp.concatenate([jax.random.uniform(jax.random.key(9), (2, 3, *FRAME)), FRAMES[:, 1:]], axis=1)
    more = jnp.concatenate([jnp.zeros((2, 3), jnp.int32), ACTIONS[:, 1:]], axis=1)
    a = start_rollout(world, long, more)
    b = start_rollout(world, FRAMES[:, 1:], ACTIONS[:, 1:])
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_every_token_is_filled_once_on_a_cosine_schedule(order, steps):
    """The model insists on token 3 in step 0, 4 in step 1, and so on: what stands at the end tells when it was set."""
    N, hidden_counts = 16, []

    def logits(tokens, hidden):
        hidden_counts.append(hidden.sum())
        step = len(hidden_counts) - 1
        return jnp.zeros((1, N, 40)).at[:, :, 3 + step].set(50.0)

    with jax.disable_jit():
        tokens = fill_tokens(logits, (1, N), jax.random.key(0), SamplingConfig(steps=steps, order=order))
    expected = [N, *(int(N * np.cos(np.pi / 2 * (i + 1) / steps) + 1e-6) for i in range(steps - 1))]
    np.testing.assert_array_equal([int(n) for n in hidden_counts], expected)
    set_in_step = np.bincount(np.asarray(tokens)[0] - 3, minlength=steps)
    np.testing.assert_array_equal(set_in_step, -np.diff([*expected, 0]))


def test_confidence_order_settles_sure_tokens_first():
    seen = []

    def logits(tokens, hidden):
        seen.append(np.asarray(hidden)[0])
        sure = jnp.array([9.0, 0.1, 6.0, 0.2])[:, None]
        return (jax.nn.one_hot(jnp.array([1, 2, 3, 4]), 8) * sure)[None]

    with jax.disable_jit():
        tokens = fill_tokens(logits, (1, 4), jax.random.key(0), SamplingConfig(steps=2, temperature=0.0))
    np.testing.assert_array_equal(seen[1], [False, True, False, True])
    np.testing.assert_array_equal(tokens[0], [1, 2, 3, 4])


def test_temperature_zero_is_deterministic_and_one_is_not(world):
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    draw = lambda key, cfg: next_frame(world, state, jnp.array([0, 1]), jax.random.key(key), cfg)[0]
    # One step of random order depends on nothing but the logits when the temperature is zero.
    cold = SamplingConfig(steps=1, temperature=0.0)
    np.testing.assert_array_equal(draw(0, cold), draw(1, cold))
    warm = SamplingConfig(steps=1)
    assert jnp.abs(draw(0, warm) - draw(1, warm)).max() > 0


def test_steps_and_temperature_may_be_traced(world):
    """One program serves all of them, also different ones in one batch, and draws what a fixed one draws."""
    state = start_rollout(world, FRAMES[:1, :1], ACTIONS[:1, :0])
    draw = lambda cfg, key: next_frame(world, state, jnp.array([1]), key, cfg)[0]
    many = jax.jit(jax.vmap(draw))
    cfgs = [SamplingConfig(1, 0.0), SamplingConfig(4, 1.0), SamplingConfig(3, 0.5)]
    keys = jax.random.split(jax.random.key(3), 3)
    together = many(jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *cfgs), keys)
    one = jax.jit(draw)
    apart = [one(cfg, key) for cfg, key in zip(cfgs, keys, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), atol=1e-4)
    assert one._cache_size() == 1


def settle(cfg, logits_K, N=512):
    """Tokens that all have the same distribution, each drawn once."""
    logits = lambda tokens, hidden: jnp.broadcast_to(logits_K, (1, N, len(logits_K)))
    return np.asarray(fill_tokens(logits, (1, N), jax.random.key(0), cfg))[0]


def test_draws_follow_the_temperature():
    p = np.array([0.6, 0.3, 0.1])
    for temperature in (1.0, 0.5):
        tokens = settle(SamplingConfig(steps=1, temperature=temperature), jnp.log(p), N=4096)
        expected = p ** (1 / temperature) / np.sum(p ** (1 / temperature))
        np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 4096, expected, atol=0.03)


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_temperature_zero_takes_the_likeliest(order):
    tokens = settle(SamplingConfig(steps=3, temperature=0.0, order=order), jnp.array([0.0, 0.2, 0.1]))
    assert set(tokens) == {1}


def test_top_k_draws_the_likeliest_codes_only():
    logits = jnp.array([0.1, 0.5, 0.2, 0.4, 0.3])
    assert set(settle(SamplingConfig(steps=1, top_k=2), logits)) == {1, 3}
    assert set(settle(SamplingConfig(steps=1, top_k=1), logits)) == {1}
    assert set(settle(SamplingConfig(steps=1, top_k=9), logits)) == set(range(5))


def test_top_p_draws_the_fewest_codes_that_make_up_the_probability():
    logits = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))
    assert set(settle(SamplingConfig(steps=1, top_p=0.75), logits)) == {1, 3}
    assert set(settle(SamplingConfig(steps=1, top_p=0.9), logits)) == {1, 2, 3}
    assert set(settle(SamplingConfig(steps=1, top_p=1e-6), logits)) == {1}
    # What top_k leaves is made a distribution again: 0.5 of 0.8 is not yet 0.7.
    kept = np.isfinite(restrict(logits, SamplingConfig(top_k=2, top_p=0.7)))
    np.testing.assert_array_equal(kept, [False, True, False, True])


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 6)])
def test_halton_ranks_are_an_order_of_all_tokens(grid):
    np.testing.assert_array_equal(np.sort(halton_ranks(*grid)), np.arange(grid[0] * grid[1]))


def test_halton_order_spreads_settled_tokens_evenly():
    """When half the tokens are settled, each quarter of the frame has about half of its own: closer than by chance."""

    def variance(order):
        seen = []

        def logits(tokens, hidden):
            seen.append(np.asarray(hidden))
            return jnp.zeros((64, 64, 4))

        with jax.disable_jit():
            fill_tokens(logits, (64, 64), jax.random.key(0), SamplingConfig(steps=3, order=order), columns=8)
        settled = ~seen[2]
        assert len({row.tobytes() for row in settled}) > 16, "not all rollouts begin at the same token"
        return settled.reshape(64, 2, 4, 2, 4).sum((2, 4)).var()

    assert variance("halton") < variance("random") / 2


def test_bad_settings_are_named():
    for flags, message in (
        ({"steps": 0}, "`steps` 0"),
        ({"temperature": -1}, "`temperature` -1"),
        ({"temperature": float("nan")}, "`temperature` nan"),
        ({"top_k": -1}, "`top_k` -1"),
        ({"top_p": 0.0}, "`top_p` 0"),
    ):
        with pytest.raises(InputError, match=message):
            SamplingConfig(**flags)


def test_hidden_tokens_are_drawn_anew_in_each_step():
    seen = []

    def logits(tokens, hidden):
        seen.append((np.asarray(tokens), np.asarray(hidden)))
        return jnp.zeros((1, 64, 1000))

    with jax.disable_jit():
        fill_tokens(logits, (1, 64), jax.random.key(0), SamplingConfig(steps=3))
    (_, _), (first, _), (second, hidden) = seen
    assert np.mean(first[hidden] == second[hidden]) < 0.1


def test_the_noise_on_the_confidence_fades():
    """In the last step but one of eight it is small, so that the unsure half of the tokens stays hidden."""
    sure, hidden_before = np.arange(64) % 2 == 0, []

    def logits(tokens, hidden):
        hidden_before.append(np.asarray(hidden)[0])
        return jnp.zeros((1, 64, 4)).at[:, :, 0].set(50.0 * sure * (len(hidden_before) == 7))

    with jax.disable_jit():
        fill_tokens(logits, (1, 64), jax.random.key(0), SamplingConfig(steps=8))
    before, after = hidden_before[6], hidden_before[7]
    assert (before & sure).sum() > 0
    assert (after & ~sure).sum() == min(after.sum(), (before & ~sure).sum())


def test_a_causal_model_draws_each_token_by_its_own_chance():
    cfg = dataclasses.replace(CONFIG, dynamics=dataclasses.replace(CONFIG.dynamics, kind="causal"))
    world = World(cfg, Compute(), nnx.Rngs(0))
    # All codes are equally likely everywhere: a number drawn twice would give the same code twice.
    world.dynamics.token_embedding[...] = jnp.zeros_like(world.dynamics.token_embedding[...])
    state = start_rollout(world, FRAMES[:, :1], ACTIONS[:, :0])
    tokens = next_frame(world, state, ACTIONS[:, 0], jax.random.key(0), SamplingConfig())[1].tokens_BN
    assert all(len(set(row)) > 1 for row in np.asarray(tokens).tolist())
    assert np.any(tokens[0] != tokens[1])
