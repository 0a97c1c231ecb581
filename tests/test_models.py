"""What the models may see, what carries gradient, and how quantisation behaves."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
import train_lam
from models.causal import Causal
from models.dynamics import DynamicsConfig, masked_cross_entropy
from models.errors import InputError
from models.genie import DYNAMICS as KINDS
from models.kernels import attention, rotate
from models.lam import LAM, LAMConfig
from models.maskgit import MaskGIT
from models.nn import Compute, STConfig, patchify, unpatchify
from models.tokenizer import Tokenizer, TokenizerConfig
from models.vq import VectorQuantizer
from tests import shapes
from utils.data import Batch
from utils.optim import make_optimizer
from utils.state import TrainState

B, T, H, W = 2, 4, 8, 8
SIZE = {"width": 16, "num_heads": 2, "num_blocks": 2}
TOKENIZER = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=(H, W, 3))
LAM_CONFIG = LAMConfig(**SIZE, patch_size=4, num_codes=3, code_width=4, frame_shape=(H, W, 3))
DYNAMICS = DynamicsConfig(**SIZE, num_codes=16, num_patches=4, num_actions=3)
FRAMES = jax.random.uniform(jax.random.key(0), (B, T, H, W, 3))
TOKENS = jax.random.randint(jax.random.key(1), (B, T, 4), 0, 16)
ACTIONS = jnp.array([[-1, 0, 1, 2], [-1, 2, 1, 0]])


def influence(fn, x):
    """Matrix (T out, T in): does the gradient of the outputs of frame i by the inputs of frame j differ from zero?

    `fn` maps (B, T, ...) to (B, T', ...).
    """

    def row(i):
        grads = jax.grad(lambda x: jnp.sum(jnp.sin(3 * jnp.take(fn(x), i, axis=1))))(x)
        return jnp.any(grads != 0, axis=tuple(k for k in range(x.ndim) if k != 1))

    outputs = jax.eval_shape(fn, x).shape[1]
    return np.asarray(jax.jit(jax.vmap(row))(jnp.arange(outputs)))


def test_tokenizer_sees_no_later_frame():
    model = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0))
    seen = influence(lambda x: model(x).frames_BTHWC, FRAMES)
    np.testing.assert_array_equal(seen, np.tril(np.ones((T, T), bool)))


@pytest.mark.parametrize("change", [False, True])
def test_lam_decoder_sees_past_frames_and_actions_only(change):
    model = LAM(dataclasses.replace(LAM_CONFIG, decoder_sees_change=change), Compute(), nnx.Rngs(0))
    # At the start the decoder repeats the last frame, whatever the action; a trained one does not.
    model.patch_out.kernel[...] = jax.random.normal(jax.random.key(4), model.patch_out.kernel.shape)
    vectors = jax.random.normal(jax.random.key(2), (B, T - 1, 4))
    past = np.tril(np.ones((T - 1, T - 1), bool))  # row t predicts frame t + 1 from frames and actions up to t
    np.testing.assert_array_equal(influence(lambda x: model.predict(x, vectors), FRAMES[:, :-1]), past)
    np.testing.assert_array_equal(influence(lambda a: model.predict(FRAMES[:, :-1], a), vectors), past)


def test_latent_action_depends_on_the_next_frame_and_no_later_one():
    model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
    seen = influence(model.latents, FRAMES)
    np.testing.assert_array_equal(seen, np.tril(np.ones((T - 1, T), bool), k=1))


@pytest.mark.parametrize("action_token", ["prepend", "add"])
def test_dynamics_is_causal_in_tokens_and_actions(action_token):
    model = MaskGIT(dataclasses.replace(DYNAMICS, action_token=action_token), Compute(), nnx.Rngs(0))
    table = model.token_embedding[...][TOKENS]
    actions = model.action_embedding[...][ACTIONS]

    def logits(x_BTNM, a_BTM):
        a = a_BTM[:, :, None]
        x = jnp.concatenate([a, x_BTNM], axis=2) if action_token == "prepend" else x_BTNM + a
        return model._predict(x + model.position_NM[...], None, keep=False).logits_BTNK

    # The same as calling the model, but with embeddings to differentiate by.
    called = model(TOKENS, jnp.zeros_like(TOKENS, bool), ACTIONS).logits_BTNK
    np.testing.assert_allclose(logits(table, actions), called, atol=1e-5)
    causal = np.tril(np.ones((T, T), bool))
    np.testing.assert_array_equal(influence(lambda x: logits(x, actions), table), causal)
    np.testing.assert_array_equal(influence(lambda a: logits(table, a), actions), causal)


@pytest.mark.parametrize("action_token", ["prepend", "add"])
def test_the_causal_model_sees_tokens_before_each_one_and_the_action_that_leads_there(action_token):
    cfg = dataclasses.replace(DYNAMICS, kind="causal", action_token=action_token)
    model = Causal(cfg, Compute(), nnx.Rngs(0))
    run = jax.jit(lambda tokens, actions: model(tokens, jnp.zeros_like(tokens, bool), actions).logits_BTNK)
    logits = run(TOKENS, ACTIONS)
    for t, n in ((0, 0), (1, 2), (2, 0), (T - 1, 3)):
        change = np.abs(run(TOKENS.at[:, t, n].add(1) % 16, ACTIONS) - logits).max(axis=(0, 3)).reshape(-1)
        assert np.all(change[: t * 4 + n + 1] == 0)  # neither an earlier token nor the one itself
        assert (t, n) == (T - 1, 3) or change[t * 4 + n + 1 :].max() > 0
    other = ACTIONS.at[:, 2].set((ACTIONS[:, 2] + 1) % 3)
    change = np.abs(run(TOKENS, other) - logits).max(axis=(0, 3))
    assert np.all(change[:2] == 0)
    assert np.all(change[2] > 0)


def test_like_codes_start_with_like_embeddings():
    model = MaskGIT(dataclasses.replace(DYNAMICS, width=64), Compute(), nnx.Rngs(0))
    tokenizer = Tokenizer(dataclasses.replace(TOKENIZER, code_width=8), Compute(), nnx.Rngs(0))
    codebook = np.array(jax.random.normal(jax.random.key(0), (16, 8)))
    codebook[1] = codebook[0] + 0.01
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    last = np.asarray(model.token_embedding[-1])
    tokenizer.vq.sums_KL[...] = jnp.asarray(codebook)
    model.start_from(tokenizer)
    table = np.asarray(model.token_embedding[...])
    np.testing.assert_array_equal(table[-1], last)
    likeness = np.corrcoef(table[:-1])
    assert likeness[0, 1] > 0.5 > likeness[0, 2:].max()
    assert 0.25 < table.std() < 1


def test_an_action_changes_the_frame_it_leads_to_and_nothing_earlier():
    model = MaskGIT(DYNAMICS, Compute(), nnx.Rngs(0))
    hidden = jnp.ones_like(TOKENS, bool).at[:, 0].set(False)
    run = jax.jit(lambda actions: model(TOKENS, hidden, actions).logits_BTNK)
    logits = run(ACTIONS)
    for t in range(1, T):
        other = ACTIONS.at[:, t].set((ACTIONS[:, t] + 1) % 3)
        change = jnp.abs(logits - run(other)).max(axis=(0, 2, 3))
        assert np.all(np.asarray(change[:t]) == 0)
        assert change[t] > 0


def test_hidden_tokens_are_invisible_and_alone_carry_loss():
    model = MaskGIT(DYNAMICS, Compute(), nnx.Rngs(0))
    run = jax.jit(lambda tokens: model(tokens, hidden, ACTIONS).logits_BTNK)
    hidden, weight, _ = MaskGIT.draw(DYNAMICS, jax.random.key(3), B, T)
    np.testing.assert_allclose(weight, np.full(B, hidden.size / hidden.sum()), rtol=1e-6)
    assert not hidden[:, 0].any()
    assert 0 < hidden[:, 1:].sum() < hidden[:, 1:].size
    lies = jnp.where(hidden, (TOKENS + 5) % 16, TOKENS)
    np.testing.assert_array_equal(run(TOKENS), run(lies))
    lies = jnp.where(hidden, TOKENS, (TOKENS + 5) % 16)
    assert jnp.abs(run(TOKENS) - run(lies)).max() > 0

    logits = run(TOKENS)
    by_logits = jax.grad(lambda x: masked_cross_entropy(x, TOKENS, hidden)[0].sum())(logits)
    np.testing.assert_array_equal(jnp.any(by_logits != 0, axis=-1), hidden)
    nll, hits = masked_cross_entropy(logits, TOKENS, hidden)
    expected = -np.log(np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(TOKENS)[..., None], -1))[
        ..., 0
    ]
    np.testing.assert_allclose(nll, np.where(hidden, expected, 0), rtol=1e-4)
    assert set(np.unique(hits)) <= {0.0, 1.0}


@pytest.mark.parametrize("mask_rates", ["clip", "frame"])
def test_hidden_shares_follow_their_distribution(mask_rates):
    cfg = dataclasses.replace(DYNAMICS, mask_rates=mask_rates, num_patches=64)
    shares = MaskGIT.hide(cfg, jax.random.key(0), 500, 8)[:, 1:].mean(axis=-1)
    spread = float(shares.std(axis=1).mean())
    if mask_rates == "clip":  # U(0.5, 1) per clip, the same for its frames
        assert abs(float(shares.mean()) - 0.75) < 0.02
        assert spread < 0.08
    else:  # U(0, 1) per frame
        assert abs(float(shares.mean()) - 0.5) < 0.02
        assert spread > 0.2


@pytest.mark.parametrize(("shape", "patch"), [((8, 8, 3), 4), ((9, 14, 3), 4), ((7, 5, 1), 3), ((4, 4, 3), 1)])
def test_patchify_round_trip(shape, patch):
    frames = jax.random.uniform(jax.random.key(0), (2, 3, *shape))
    patches = patchify(frames, patch)
    assert patches.shape[2] == -(-shape[0] // patch) * -(-shape[1] // patch)
    np.testing.assert_array_equal(unpatchify(patches, patch, shape), frames)


def test_unquantized_steps_pass_latents_then_codes():
    vq = VectorQuantizer(3, 4, 0.9, 0, nnx.Rngs(0), unquantized_steps=2)
    z = jax.random.normal(jax.random.key(1), (5, 4))
    unit_z = np.asarray(z) / np.linalg.norm(z, axis=1, keepdims=True)
    for step in range(3):
        quantized = vq(z, train=True)
        codes = vq.lookup(quantized.codes_X)
        np.testing.assert_allclose(quantized.vectors_XL, unit_z if step < 2 else codes, atol=1e-5)
        assert (quantized.commitment == 0) == (step < 2)
        np.testing.assert_allclose(vq(z).vectors_XL, codes, atol=1e-5)  # outside of training always codes
        vq.update(quantized.latents_XL, quantized.codes_X, jax.random.key(step))


def test_patches_are_row_by_row():
    frames = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    np.testing.assert_array_equal(patchify(frames, 2)[0, 0, 1], [2, 3, 6, 7])


def test_padding_repeats_the_edge():
    frames = jnp.arange(3.0).reshape(1, 1, 1, 3, 1)
    np.testing.assert_array_equal(patchify(frames, 2)[0, 0, 1], [2, 2, 2, 2])


def test_straight_through_gradient():
    vq = VectorQuantizer(8, 4, 0.9, 0, nnx.Rngs(0))
    z, weight = jax.random.normal(jax.random.key(0), (5, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    quantized = vq(z)
    np.testing.assert_allclose(quantized.vectors_XL, vq.lookup(quantized.codes_X), atol=1e-6)
    nearest = np.argmax(np.asarray(z) @ np.asarray(vq.codebook_KL).T, axis=1)
    np.testing.assert_array_equal(quantized.codes_X, nearest)
    # As if quantisation were not there: the gradient of the normalised latent.
    through = jax.grad(lambda z: jnp.sum(vq(z).vectors_XL * weight))(z)
    plain = jax.grad(lambda z: jnp.sum(z / jnp.linalg.norm(z, axis=-1, keepdims=True) * weight))(z)
    np.testing.assert_allclose(through, plain, atol=1e-5)
    assert jnp.abs(jax.grad(lambda z: vq(z).commitment)(z)).max() > 0


def test_codes_follow_their_latents():
    vq = VectorQuantizer(2, 3, 0.5, 0, nnx.Rngs(0))
    target = jnp.array([[0.0, 0.6, 0.8]])
    for _ in range(30):
        vq.update(target, jnp.array([0]), jax.random.key(0))
    np.testing.assert_allclose(vq.codebook_KL[0], target[0], atol=1e-3)


def test_unused_codes_stay_until_they_are_reset():
    vq = VectorQuantizer(4, 3, 0.9, 3, nnx.Rngs(0))
    before = vq.codebook_KL
    latents = jnp.eye(3)
    for i in range(2):
        vq.update(latents, jnp.array([0, 0, 1]), jax.random.key(i))
    np.testing.assert_array_equal(vq.codebook_KL[2:], before[2:])
    np.testing.assert_array_equal(vq.idle_K[...], [0, 0, 2, 2])
    vq.update(latents, jnp.array([0, 0, 1]), jax.random.key(2))
    np.testing.assert_array_equal(vq.idle_K[...], 0)
    for code in np.asarray(vq.codebook_KL[2:]):  # each is now one of the latents
        assert np.min(np.abs(np.eye(3) - code).sum(axis=1)) < 1e-5


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("xla", "float32", 1e-5), ("xla", "bfloat16", 0.02), ("cudnn", "bfloat16", 0.02)],
)
def test_attention_equals_the_textbook(implementation, dtype, tolerance):
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8)).astype(dtype).astype(np.float32)
    logits = np.einsum("bsqd,btqd->bqst", q, k) / np.sqrt(8)
    for causal in (False, True):
        masked = np.where(np.tril(np.ones((5, 5))) > 0, logits, -np.inf) if causal else logits
        weights = np.exp(masked) / np.exp(masked).sum(-1, keepdims=True)
        expected = np.einsum("bqst,btqd->bsqd", weights, v)
        y = attention(*(x.astype(dtype) for x in (q, k, v)), causal=causal, implementation=implementation)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(np.float32), expected, atol=tolerance)


@pytest.mark.parametrize(("length", "flash"), [(16, False), (64, True), (65, True)])
def test_flash_attention_is_for_long_axes_and_given_even_lengths(length, flash, monkeypatch):
    """What cuDNN is asked for, answered by XLA."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 2, 8), jnp.bfloat16)
    expected = [attention(q, k, v, causal=causal) for causal in (False, True)]
    library = jax.nn.dot_product_attention

    def instead(q, k, v, implementation, **options):
        assert implementation == ("cudnn" if flash else "xla")
        assert q.shape[1] % 2 == 0
        return library(q, k, v, implementation="xla", **options)

    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("models.kernels.flash_capable", lambda device: True)
    monkeypatch.setattr("jax.nn.dot_product_attention", instead)
    for causal, y in zip((False, True), expected, strict=True):
        np.testing.assert_array_equal(attention(q, k, v, causal=causal), y)


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 1, 8))
    scores = lambda start: jnp.einsum("bsnqd,btnqd->st", rotate(q, start), rotate(k, start))
    np.testing.assert_allclose(scores(0), scores(1000), atol=1e-3)
    assert jnp.abs(rotate(q, 0) - rotate(q, 1)).max() > 0.1


def test_bad_sizes_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"`width` 15.*`num_heads` 2"):
        STConfig(width=15, num_heads=2)
    with pytest.raises(InputError, match=r"`patch_size` 0"):
        TokenizerConfig(patch_size=0)
    with pytest.raises(InputError, match="cudnn"):
        attention(*jnp.zeros((3, 1, 2, 1, 8)), causal=True, implementation="cudnn")


def test_every_kind_of_dynamics_can_be_chosen():
    assert set(KINDS) == set(get_args(get_type_hints(DynamicsConfig)["kind"]))


def test_shapes_in_names_are_checked():
    with pytest.raises(AssertionError, match="unpatchify"):
        unpatchify(jnp.zeros((2, 4, 12)), 2, (4, 4, 3))
    with pytest.raises(AssertionError, match="hidden_BTN"):
        masked_cross_entropy(jnp.zeros((2, 3, 4, 16)), jnp.zeros((2, 3, 4), int), jnp.ones((2, 3, 5), bool))
    model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
    with pytest.raises(AssertionError, match="actions_BTm1L"):
        model.predict(FRAMES, jnp.zeros((B, T - 1, 4)))


def test_every_array_that_models_take_carries_its_shape():
    """But for keys, numbers, and what has any shape at all."""
    numbers = {"start", "slot", "index", "place", "i", "steps", "size", "first", "mse", "perceptual"}
    plain = {"key", "values", "others"} | numbers
    for module in pkgutil.iter_modules(models.__path__):
        tree = ast.parse(inspect.getsource(importlib.import_module(f"models.{module.name}")))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for argument in function.args.args:
                if argument.annotation and ast.unparse(argument.annotation).startswith("jax.Array"):
                    named = shapes.axes_of(argument.arg) or argument.arg in plain
                    assert named, f"models/{module.name}.py, {function.name}: {argument.arg}"


def test_one_update_weighs_a_codes_past_by_the_decay():
    vq = VectorQuantizer(2, 3, 0.9, 0, nnx.Rngs(0))
    before = np.asarray(vq.sums_KL[...])
    vq.update(jnp.array([[0.0, 3.0, 4.0], [2.0, 0.0, 0.0]]), jnp.array([1, 1]), jax.random.key(0))
    expected = [before[0], 0.9 * before[1] + 0.1 * np.array([1.0, 0.6, 0.8])]  # unit latents, summed
    np.testing.assert_allclose(vq.sums_KL[...], expected, atol=1e-6)


def test_centred_codes_look_at_latents_from_their_mean():
    """From the batch's own mean in training, from its moving average else."""
    vq, plain = (VectorQuantizer(3, 4, 0.9, 0, nnx.Rngs(0), centred=centred) for centred in (True, False))
    latents = jax.random.normal(jax.random.key(1), (6, 4)) + 5.0
    mean = jnp.mean(latents, axis=0)
    trained = vq(latents, train=True)
    np.testing.assert_array_equal(trained.codes_X, plain(latents - mean).codes_X)
    np.testing.assert_allclose(trained.commitment, plain(latents - mean).commitment, rtol=1e-4)
    np.testing.assert_array_equal(trained.latents_XL, latents)
    vq.update(trained.latents_XL, trained.codes_X, jax.random.key(0))
    plain.update(latents - mean, trained.codes_X, jax.random.key(0))
    np.testing.assert_allclose(vq.codebook_KL, plain.codebook_KL, atol=1e-5)
    np.testing.assert_allclose(vq.centre_L[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(vq(latents).commitment, plain(latents - 0.1 * mean).commitment, rtol=1e-4)


def test_idle_codes_move_to_different_latents():
    vq = VectorQuantizer(5, 8, 0.9, 1, nnx.Rngs(0))
    vq.update(jnp.eye(8), jnp.zeros(8, int), jax.random.key(0))
    fresh = np.asarray(vq.codebook_KL[1:])
    assert len(set(np.argmax(fresh, axis=1))) == 4
    np.testing.assert_allclose(np.max(fresh, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "run"),
    [
        ("encoder", lambda model, x: model.latents(x)),
        ("decoder", lambda model, x: model.predict(x, jnp.zeros((B, T, 4)))),
    ],
)
def test_lam_sees_motion_before_any_attention(part, run):
    model = LAM(dataclasses.replace(LAM_CONFIG, decoder_sees_change=True), Compute(), nnx.Rngs(0))
    transformer, seen = getattr(model, part), []

    def watched(x_BTNM):
        seen.append(x_BTNM)
        return transformer(x_BTNM)

    setattr(model, part, watched)

    def given(frames_BTHWC):
        run(model, frames_BTHWC)
        return seen.pop()

    # What goes in for a frame comes from it and from the one before.
    near = np.eye(T, dtype=bool) | np.eye(T, k=-1, dtype=bool)
    np.testing.assert_array_equal(influence(given, FRAMES), near)


def test_a_lams_decoder_predicts_without_the_actions_that_it_is_not_told():
    model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
    model.patch_out.kernel[...] = jax.random.normal(jax.random.key(4), model.patch_out.kernel.shape)
    told = jnp.ones((B, T - 1), bool).at[:, 1].set(False)
    out = model(FRAMES, told_BTm1=told)
    vectors = model.vq.lookup(out.actions_BTm1).at[:, 1].set(0.0)
    np.testing.assert_allclose(out.next_frames_BTm1HWC, model.predict(FRAMES[:, :-1], vectors), atol=1e-5)
    assert np.abs(out.next_frames_BTm1HWC - model(FRAMES).next_frames_BTm1HWC).max() > 1e-3


def test_each_step_of_a_lams_training_drops_other_actions(monkeypatch):
    told, loss_fn = [], train_lam.loss_fn
    monkeypatch.setattr(train_lam, "loss_fn", lambda m, given, cfg: (told.append(given[1]), loss_fn(m, given, cfg))[1])
    batch = Batch(jnp.zeros((64, T, H, W, 3), jnp.uint8), None)
    for dropout in (0.0, 0.25):
        cfg = train_lam.Config(model=LAM_CONFIG, action_dropout=dropout)
        model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
        state = TrainState.create(model, nnx.Param, make_optimizer(cfg, 10), ema=False)
        for i in range(2):
            train_lam.train_step(state, batch, jax.random.key(i), cfg)
    assert told[:2] == [None, None]
    assert told[2].shape == (64, T - 1)
    assert 0.65 < told[2].mean() < 0.85
    assert (told[2] != told[3]).any()
    with pytest.raises(InputError, match="action_dropout"):
        train_lam.Config(action_dropout=1.0)


def test_an_untrained_lam_repeats_the_last_frame():
    model = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0))
    np.testing.assert_array_equal(model(FRAMES).next_frames_BTm1HWC, FRAMES[:, :-1])


@pytest.mark.parametrize("action_token", ["prepend", "add"])
def test_a_hidden_place_knows_what_stood_there_a_frame_ago(action_token):
    model = MaskGIT(dataclasses.replace(DYNAMICS, action_token=action_token), Compute(), nnx.Rngs(0))
    hidden = jnp.zeros_like(TOKENS, bool).at[:, 2, 1].set(True)
    previous = TOKENS[:, 0]
    embed = lambda tokens: model.embed(tokens, hidden, ACTIONS, previous)
    other = TOKENS.at[:, 1].set((TOKENS[:, 1] + 1) % 16)
    change = np.abs(embed(TOKENS) - embed(other)).max(axis=(0, 3))[:, model.extra_places(model.cfg) :] > 0
    expected = np.zeros((T, 4), bool)
    expected[1] = expected[2, 1] = True  # where they stand, and where the next frame is hidden
    np.testing.assert_array_equal(change, expected)
