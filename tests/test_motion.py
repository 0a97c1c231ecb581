"""Decoders that move the last frame: what they can move, what they see, and that ways of decoding agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train_dynamics
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import World, WorldConfig
from models.kernels import rotate_space
from models.lam import LAM, LAMConfig
from models.motion import DAMAGED, Damage, MotionHead, draw_damage, frames_before, moved_patches
from models.nn import Compute, Past, patchify
from models.sampling import SamplingConfig, next_frame, rollout, start_rollout
from models.tokenizer import Tokenizer, TokenizerConfig
from tests.test_models import influence
from utils.data import Batch

SIZE = {"width": 16, "num_heads": 2, "num_blocks": 2, "rotary_space": True}
SHAPE = (8, 12, 3)
TOKENIZER = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, motion_reach=3, frame_shape=SHAPE)
LAM_CONFIG = LAMConfig(**SIZE, patch_size=4, num_codes=3, code_width=4, motion_reach=3, frame_shape=SHAPE)
DYNAMICS = DynamicsConfig(
    **SIZE, num_codes=16, num_patches=6, num_actions=3, sees_picture=True, patch_size=4, frame_shape=SHAPE
)
CONFIG = WorldConfig(TOKENIZER, LAM_CONFIG, DYNAMICS, window=5)
FRAMES = jax.random.uniform(jax.random.key(0), (2, 5, *SHAPE))
ACTIONS = jnp.array([[0, 1, 2, 1], [2, 2, 0, 1]])


def one_hot_moves(dx, dy, reach, patches, ways=2):
    moves = np.zeros((1, 1, patches, ways, 2, 2 * reach + 1), np.float32)
    moves[..., 0, dx + reach] = 1
    moves[..., 1, dy + reach] = 1
    return jnp.asarray(moves)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (2, -1), (-3, 3), (5, -5)])
@pytest.mark.parametrize(("shape", "patch"), [((8, 12, 3), 4), ((9, 14, 1), 4), ((8, 8, 3), 2)])
def test_a_shift_moves_the_picture_and_its_edge_goes_on(shape, patch, dx, dy):
    """Any reach, also beyond a patch, and frames that the patch size does not divide."""
    picture = jax.random.uniform(jax.random.key(1), (1, 1, *shape))
    H, W, _ = shape
    rows, columns = -(-H // patch) * patch, -(-W // patch) * patch
    padded = jnp.pad(picture, ((0, 0), (0, 0), (0, rows - H), (0, columns - W), (0, 0)), mode="edge")
    y, x = np.clip(np.arange(rows) + dy, 0, rows - 1), np.clip(np.arange(columns) + dx, 0, columns - 1)
    expected = patchify(padded[:, :, y][:, :, :, x], patch)
    moved = moved_patches(picture, one_hot_moves(dx, dy, 5, expected.shape[2]), patch)
    for way in range(2):
        np.testing.assert_allclose(moved[:, :, way], expected, atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two_shifts():
    picture = jax.random.uniform(jax.random.key(1), (1, 1, 8, 8, 3))
    moves = (one_hot_moves(0, 0, 2, 4) + one_hot_moves(1, 0, 2, 4)) / 2
    both = [moved_patches(picture, one_hot_moves(dx, 0, 2, 4), 4) for dx in (0, 1)]
    np.testing.assert_allclose(
        moved_patches(picture, moves.at[..., 1, :].multiply(1), 4), (both[0] + both[1]) / 2, atol=1e-6
    )


def test_a_new_head_shows_the_last_frame_nearly():
    slope = jnp.broadcast_to(jnp.linspace(0, 1, 12)[:, None], (2, 5, *SHAPE))
    made = MotionHead(16, 4, SHAPE, 3, Compute(), nnx.Rngs(0))(jnp.zeros((2, 5, 6, 16)), slope)
    assert jnp.mean(jnp.square(made - slope)) < 0.1 * slope.var()
    again = MotionHead(16, 4, SHAPE, 3, Compute(remat="block"), nnx.Rngs(0))(jnp.zeros((2, 5, 6, 16)), slope)
    np.testing.assert_allclose(made, again, atol=1e-6)


def test_a_moving_decoder_sees_no_later_frame():
    model = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0))
    T = FRAMES.shape[1]
    latents = lambda x: model._latents(x, frames_before(x)).latents_BTNL
    np.testing.assert_array_equal(influence(latents, FRAMES), np.tril(np.ones((T, T), bool)))
    tokens = model.encode(FRAMES)
    given = influence(lambda last: model.decode_after(tokens, last).frames_BTHWC, FRAMES)
    np.testing.assert_array_equal(given, np.tril(np.ones((T, T), bool)))


def test_the_moving_lam_predicts_from_the_past_and_the_action():
    model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
    vectors = jax.random.normal(jax.random.key(2), (2, 4, 4))
    past = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(influence(lambda x: model.predict(x, vectors), FRAMES[:, :-1]), past)
    np.testing.assert_array_equal(influence(lambda a: model.predict(FRAMES[:, :-1], a), vectors), past)


def test_decoding_a_clip_equals_decoding_it_frame_by_frame_and_a_fixed_point_of_whole_passes():
    model = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0))
    tokens = model.encode(FRAMES)
    whole = model.decode(tokens).frames_BTHWC
    last, cache, frames = jnp.full((2, 1, *SHAPE), 0.5), model.decoder.empty_cache(2, 6, 5), []
    step = jax.jit(lambda tokens, last, cache, t: model.decode_after(tokens, last, Past(cache, t), keep=True))
    for t in range(5):
        out = step(tokens[:, t : t + 1], last, cache, t)
        cache = cache.write(out.time, t)
        last = jnp.clip(out.frames_BTHWC, 0, 1)
        frames.append(out.frames_BTHWC[:, 0])
    np.testing.assert_allclose(whole, jnp.stack(frames, axis=1), atol=1e-5)
    given_its_own = model.decode_after(tokens, frames_before(jnp.clip(whole, 0, 1))).frames_BTHWC
    np.testing.assert_allclose(whole, given_its_own, atol=1e-5)
    np.testing.assert_allclose(model(FRAMES).frames_BTHWC, whole, atol=1e-5)  # what evaluation reports


def test_training_decodes_from_the_decoders_own_last_pictures():
    model = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0))
    tokens = model.encode(FRAMES)
    first = model.decode_after(tokens, frames_before(FRAMES)).frames_BTHWC
    second = model.decode_after(tokens, frames_before(jnp.clip(first, 0, 1))).frames_BTHWC
    np.testing.assert_allclose(model(FRAMES, train=True).frames_BTHWC, second, atol=1e-5)
    assert jnp.abs(first - second).max() > 1e-3


CLOSED = dataclasses.replace(TOKENIZER, closed_loop=True)


def test_in_a_closed_loop_each_frame_is_encoded_against_the_picture_made_before_it():
    model = Tokenizer(CLOSED, Compute(), nnx.Rngs(0))
    made = model(FRAMES)
    shown = frames_before(jnp.clip(made.frames_BTHWC, 0, 1))
    np.testing.assert_array_equal(model.encode(FRAMES, shown), made.tokens_BTN)
    assert jnp.any(model.encode(FRAMES) != made.tokens_BTN)
    np.testing.assert_allclose(model.decode(made.tokens_BTN).frames_BTHWC, made.frames_BTHWC, atol=1e-5)
    np.testing.assert_allclose(model.decode_after(made.tokens_BTN, shown).frames_BTHWC, made.frames_BTHWC, atol=1e-5)
    seen = influence(lambda x: model(x).frames_BTHWC, FRAMES)
    np.testing.assert_array_equal(seen, np.tril(np.ones((5, 5), bool)))


def test_only_a_closed_loop_looks_at_what_is_shown():
    model = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0))
    np.testing.assert_array_equal(model.encode(FRAMES, FRAMES), model.encode(FRAMES))


def test_training_with_a_closed_loop_mends_damaged_pictures():
    model = Tokenizer(CLOSED, Compute(), nnx.Rngs(0))
    damage = draw_damage(jax.random.key(1), FRAMES.shape[0], FRAMES.shape[1:], 1.0, 0.1)
    own = model.decode_after(model.encode(FRAMES), frames_before(FRAMES)).frames_BTHWC
    shown = damage(frames_before(jnp.clip(own, 0, 1)))
    out = model(FRAMES, train=True, damage=damage)
    np.testing.assert_array_equal(out.tokens_BTN, model.encode(FRAMES, shown))
    np.testing.assert_allclose(out.frames_BTHWC, model.decode_after(out.tokens_BTN, shown).frames_BTHWC, atol=1e-5)
    assert jnp.any(out.tokens_BTN != model(FRAMES, train=True).tokens_BTN)


def test_damage_blurs_by_degrees_and_adds_noise():
    point = jnp.zeros((1, 1, 7, 7, 1)).at[0, 0, 3, 3].set(1.0)
    kernel = np.array([1.0, 2.0, 1.0]) / 4
    thrice = np.convolve(np.convolve(kernel, kernel), kernel)
    for level, line in ((0.5, np.pad(kernel, 2)), (1.0, thrice)):
        blurred = Damage(jnp.full((1, 1), level), jnp.zeros_like(point))(point)
        np.testing.assert_allclose(blurred[0, 0, :, :, 0], np.outer(line, line), atol=1e-6)
    plain = Damage(jnp.ones((2, 5)), jnp.zeros_like(FRAMES))(jnp.full_like(FRAMES, 0.3))
    np.testing.assert_allclose(plain, 0.3, atol=1e-6)  # edges go on
    drawn = draw_damage(jax.random.key(0), 200, (3, *SHAPE), 0.5, 0.0)
    assert not drawn.noise_BTHWC.any()
    assert 0.48 < drawn.blur_BT.max() <= 0.5
    assert abs(jnp.mean(drawn.blur_BT > 0) - DAMAGED) < 0.05  # what is good must not be mended


def test_the_dynamics_model_learns_tokens_of_the_pictures_that_it_is_shown():
    cfg = dataclasses.replace(CONFIG, tokenizer=CLOSED)
    world = World(cfg, Compute(), nnx.Rngs(0))
    batch = Batch(frames_BTHWC=(255 * FRAMES).astype(jnp.uint8))
    batch, drawn = train_dynamics.draw(world, batch, jax.random.key(0))
    tokens, frames, last = train_dynamics.see(world, batch, drawn)
    np.testing.assert_allclose(last, frames_before(frames) + drawn.damage.noise_BTHWC, atol=1e-6)
    np.testing.assert_array_equal(tokens, world.tokenizer.encode(frames, last))
    stored = batch._replace(tokens_BTN=jnp.zeros_like(tokens))
    np.testing.assert_array_equal(train_dynamics.see(world, stored, drawn)[0], tokens)  # not the stored ones
    opened = World(CONFIG, Compute(), nnx.Rngs(0))
    assert not train_dynamics.see(opened, stored, drawn)[0].any()


@pytest.mark.parametrize("kind", ["maskgit", "maskgit_head", "causal"])
def test_a_rollout_moves_the_prompt_and_then_its_own_pictures(kind):
    world = World(
        dataclasses.replace(CONFIG, dynamics=dataclasses.replace(DYNAMICS, kind=kind)), Compute(), nnx.Rngs(0)
    )
    cfg = SamplingConfig(steps=2, temperature=0.0)
    played = rollout(world, FRAMES[:, :2], ACTIONS, jax.random.key(0), cfg)
    state = start_rollout(world, FRAMES[:, :2], ACTIONS[:, :1])
    np.testing.assert_array_equal(state.picture_BHWC, FRAMES[:, 1])
    frame, state = next_frame(world, state, ACTIONS[:, 1], jax.random.fold_in(jax.random.key(0), 2), cfg)
    np.testing.assert_allclose(frame, played[:, 0], atol=1e-5)
    np.testing.assert_array_equal(state.picture_BHWC, frame)
    # The picture counts: for the decoder, and for what the dynamics model makes of it.
    other = start_rollout(world, FRAMES[:, :2], ACTIONS[:, :1])._replace(picture_BHWC=FRAMES[:, 0])
    moved, _ = next_frame(world, other, ACTIONS[:, 1], jax.random.fold_in(jax.random.key(0), 2), cfg)
    assert jnp.abs(moved - frame).max() > 0.05


def test_the_dynamics_model_sees_the_last_picture_and_no_later_one():
    world = World(CONFIG, Compute(), nnx.Rngs(0))
    tokens = world.tokenizer.encode(FRAMES)
    led_by = jnp.pad(ACTIONS, ((0, 0), (1, 0)), constant_values=-1)
    hidden = jnp.ones_like(tokens, bool)
    seen = influence(lambda x: world.dynamics(tokens, hidden, led_by, last_BTHWC=frames_before(x)).logits_BTNK, FRAMES)
    np.testing.assert_array_equal(seen, np.tril(np.ones((5, 5), bool), k=-1))


def test_pictures_get_noise_in_training_alone():
    drawn = type(World(CONFIG, Compute(), nnx.Rngs(0)).dynamics).draw(DYNAMICS, jax.random.key(0), 400, 3)
    spread = np.asarray(drawn.damage.noise_BTHWC).std(axis=(2, 3, 4)).reshape(-1)
    assert 0.09 < spread.max() < 0.12
    assert abs(spread.mean() - 0.05) < 0.005
    plain = dataclasses.replace(DYNAMICS, sees_picture=False)
    world = World(dataclasses.replace(CONFIG, dynamics=plain), Compute(), nnx.Rngs(0))
    assert world.dynamics.draw(plain, jax.random.key(0), 2, 3).damage is None


def test_space_is_rotated_by_row_and_column():
    """Scores depend on how two places lie to each other alone; places outside of the frame stay as they are."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 1, 8))
    q, k = (jnp.broadcast_to(x, (1, 1, 13, 1, 8)) for x in (q, k))
    turned_q, turned_k = (rotate_space(x, 0, columns=4, extra=1) for x in (q, k))
    np.testing.assert_array_equal(turned_q[:, :, 0], q[:, :, 0])
    scores = np.asarray(jnp.einsum("btnqd,btmqd->nm", turned_q, turned_k))[1:, 1:].reshape(3, 4, 3, 4)
    np.testing.assert_allclose(scores[0, 0, 1, 2], scores[1, 1, 2, 3], atol=1e-5)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3
    one = rotate_space(q[:, :, 6:7], 6, columns=4, extra=1)
    np.testing.assert_allclose(one, turned_q[:, :, 6:7], atol=1e-6)


def test_bad_reach_and_widths_are_refused():
    with pytest.raises(InputError, match="`motion_reach` -1"):
        dataclasses.replace(TOKENIZER, motion_reach=-1)
    with pytest.raises(InputError, match="`rotary_space`"):
        TokenizerConfig(width=12, num_heads=2, rotary_space=True)
