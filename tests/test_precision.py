"""Mixed precision and activation checkpointing: what stays float32, and that memory tricks change no gradient. And what
becomes of gradients: parts of a batch, the optimizer, the moving average.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.dynamics import DynamicsConfig
from models.kernels import RMSNorm, rotate, squared_relu
from models.lam import LAM, LAMConfig
from models.maskgit import MaskGIT
from models.nn import Compute, Places, STConfig, STTransformer
from models.tokenizer import Tokenizer, TokenizerConfig
from utils.optim import OptimConfig, learning_rate_schedule, make_optimizer, matrices, phases
from utils.state import TrainState, apply_gradients, gradients
from utils.train import TrainConfig

SIZE = {"width": 16, "num_heads": 2, "num_blocks": 2}
X = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)


def test_bfloat16_is_for_products_only():
    cfg = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=(8, 8, 3))
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: Tokenizer(cfg, Compute(dtype="bfloat16"), nnx.Rngs(0))))
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(variables))
    frames = jnp.zeros((1, 3, 8, 8, 3))
    jaxpr = jax.make_jaxpr(lambda v: nnx.merge(graphdef, v)(frames, train=True))(variables).jaxpr
    products = 0
    for eqn in equations(jaxpr):
        dtypes = {v.aval.dtype for v in eqn.invars if hasattr(v, "aval") and jnp.issubdtype(v.aval.dtype, jnp.floating)}
        if eqn.primitive.name in ("exp", "rsqrt", "reduce_sum", "reduce_max", "log", "argmax"):
            assert dtypes <= {jnp.dtype("float32")}, eqn
        if eqn.primitive.name == "dot_general":
            code_products = any(16 in v.aval.shape and 4 in v.aval.shape for v in eqn.invars)
            products += dtypes == {jnp.dtype("bfloat16")}
            assert dtypes == {jnp.dtype("bfloat16")} or code_products, eqn
    assert products >= 12
    out = jax.eval_shape(lambda v: nnx.merge(graphdef, v)(frames), variables)
    assert out.frames_BTHWC.dtype == out.commitment.dtype == out.latents_BTNL.dtype == jnp.float32


def test_logits_and_moments_are_float32_in_bfloat16():
    cfg = DynamicsConfig(**SIZE, num_codes=16, num_patches=4, num_actions=3)
    model = nnx.eval_shape(lambda: MaskGIT(cfg, Compute(dtype="bfloat16"), nnx.Rngs(0)))
    tokens = jnp.zeros((1, 3, 4), jnp.int32)
    graphdef, variables = nnx.split(model)
    out = jax.eval_shape(lambda v: nnx.merge(graphdef, v)(tokens, tokens > 0, tokens[:, :, 0]), variables)
    assert out.logits_BTNK.dtype == jnp.float32
    moments = jax.eval_shape(make_optimizer(OptimConfig(), 100).init, nnx.state(model, nnx.Param))
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(moments))


def test_bfloat16_stays_near_float32():
    outs = [
        STTransformer(STConfig(**SIZE), Compute(dtype=d), nnx.Rngs(0), Places(2))(X).x_BTNM.astype(jnp.float32)
        for d in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(outs[0], outs[1], atol=0.1)
    assert np.any(outs[0] != outs[1])


def test_frames_are_encoded_in_float32_whatever_the_dtype():
    cfg = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=(8, 8, 3))
    lam_cfg = LAMConfig(**SIZE, patch_size=4, num_codes=4, code_width=4, frame_shape=(8, 8, 3))
    exact, half = (Tokenizer(cfg, Compute(dtype=dtype), nnx.Rngs(0)) for dtype in ("float32", "bfloat16"))
    lam, half_lam = (LAM(lam_cfg, Compute(dtype=dtype), nnx.Rngs(0)) for dtype in ("float32", "bfloat16"))
    frames = jax.random.uniform(jax.random.key(1), (8, 6, 8, 8, 3))
    np.testing.assert_array_equal(half.encode(frames), exact.encode(frames))
    np.testing.assert_array_equal(half(frames).latents_BTNL, exact(frames).latents_BTNL)
    np.testing.assert_array_equal(half_lam.infer(frames), lam.infer(frames))
    assert np.any(half(frames, train=True).latents_BTNL != exact(frames).latents_BTNL)  # training takes its dtype
    assert half.encoder.compute.dtype == "bfloat16"  # and the model is as it was
    assert np.any(half(frames).frames_BTHWC != exact(frames).frames_BTHWC)


@pytest.mark.parametrize("what", ["norm", "norm and rotation", "squared_relu"])
def test_in_sixteen_bits_no_float32_copy_is_kept(what):
    norm = RMSNorm(16)
    norm.scale[...] = 1 + 0.1 * jax.random.normal(jax.random.key(2), (16,))
    given = jax.random.normal(jax.random.key(0), (2, 6, 4, 2, 16), jnp.bfloat16)
    turn = lambda y: rotate(y, 3)

    def plain(x):
        if what == "squared_relu":
            return jnp.square(jax.nn.relu(x))
        y = x.astype(jnp.float32)
        y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6) * norm.scale[...]).astype(x.dtype)
        return turn(y) if "rotation" in what else y

    own = {"norm": norm, "norm and rotation": lambda x: norm(x, turn), "squared_relu": squared_relu}[what]
    (y, back), (expected, plain_back) = jax.vjp(own, given), jax.vjp(plain, given)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(*(f(y)[0].astype(jnp.float32) for f in (back, plain_back)), rtol=0.02, atol=0.02)
    kept = lambda back: [x.nbytes for x in jax.tree.leaves(back) if x.dtype != bool]
    assert max(kept(back)) <= given.nbytes
    assert sum(kept(back)) <= 1.6 * given.nbytes  # a root for each 16 numbers here, for 64 and more in a preset
    assert what == "squared_relu" or sum(kept(plain_back)) > 2 * given.nbytes


@functools.cache
def gradient(remat):
    model = STTransformer(STConfig(**SIZE), Compute(remat=remat), nnx.Rngs(0), Places(2))
    graphdef, params = nnx.split(model)
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(X).x_BTNM))))(params)


@pytest.mark.parametrize("remat", ["dots", "outputs", "block", "offload"])
def test_activation_checkpointing_changes_no_gradient(remat):
    plain, saved = gradient("none"), gradient(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), plain, saved)


def test_activation_checkpointing_saves_memory():
    x = jax.random.normal(jax.random.key(0), (4, 8, 16, 32))

    def temporary(how):
        model = STTransformer(STConfig(width=32, num_heads=2, num_blocks=6), Compute(remat=how), nnx.Rngs(0), Places(2))
        graphdef, params = nnx.split(model)
        step = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x).x_BTNM ** 2)))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    none, block = temporary("none"), temporary("block")
    assert block < none / 2


def test_scanned_blocks_equal_unrolled_ones():
    model = STTransformer(STConfig(**SIZE), Compute(), nnx.Rngs(0), Places(2))
    graphdef, stacked = nnx.split(model.blocks)
    x = X
    for i in range(2):
        x = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], stacked))(x).x_BTNM
    np.testing.assert_allclose(model(X).x_BTNM, model.norm(x), atol=1e-5)
    first, second = jax.tree.leaves(stacked)[0]
    assert np.any(first != second)  # blocks differ from the start


def test_weight_decay_touches_matrices_only():
    cfg = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=(8, 8, 3))
    model = jax.jit(lambda: nnx.state(Tokenizer(cfg, Compute(), nnx.Rngs(0)), nnx.Param))()
    params = model
    decayed = {jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_flatten_with_path(matrices(params))[0] if v}
    assert any("qkv" in name for name in decayed)
    assert not any(word in name for name in decayed for word in ("scale", "bias", "position"))
    # A zero gradient moves matrices towards zero and leaves the rest alone.
    tx = make_optimizer(OptimConfig(warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda params: tx.update(zeros, tx.init(params), params)[0])(params)
    moved = {jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_flatten_with_path(updates)[0] if np.any(v != 0)}
    assert moved <= decayed
    assert moved


def test_schedules():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=10, decay_steps=20, final_learning_rate=0.1)
    wsd = learning_rate_schedule(cfg, 100)
    np.testing.assert_allclose([wsd(0), wsd(10), wsd(79), wsd(90), wsd(100)], [0.1, 1.0, 1.0, 0.55, 0.1], atol=1e-6)
    cosine = learning_rate_schedule(OptimConfig(**(cfg.__dict__ | {"schedule": "cosine"})), 100)
    np.testing.assert_allclose([cosine(10), cosine(55), cosine(100)], [1.0, 0.55, 0.1], atol=1e-6)
    # More steps leave the past of a wsd schedule as it was.
    longer = learning_rate_schedule(cfg, 200)
    np.testing.assert_allclose([longer(s) for s in range(80)], [wsd(s) for s in range(80)])
    assert phases(OptimConfig(), 30) == (3, 10)


def updates_of(cfg, gradients, num_steps=10):
    """The updates of one matrix, 1 at first, by a sequence of gradients."""
    tx, params = make_optimizer(cfg, num_steps), {"kernel": jnp.ones(4)}
    opt_state, made = tx.init(params), []
    for gradient in gradients:
        updates, opt_state = tx.update({"kernel": jnp.asarray(gradient)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        made.append(updates["kernel"])
    return np.stack(made)


def test_gradients_are_clipped():
    """AdamW takes no heed of the scale that all gradients share, so a large one is followed by a small one."""
    clipping = OptimConfig(grad_clip=0.5)
    plain = OptimConfig(grad_clip=0)
    large, small = np.array([3.0, 0, 0, 4.0]), np.array([0.1, 0.2, 0.0, 0.2])  # of norm 5 and 0.3
    clipped = updates_of(clipping, [large, small])
    np.testing.assert_allclose(clipped, updates_of(plain, [large / 10, small]), rtol=1e-5)
    assert np.abs(clipped[1] / updates_of(plain, [large, small])[1] - 1).max() > 0.1


def test_the_optimizer_is_adamw_on_the_schedule():
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=2, decay_steps=4, beta1=0.8, beta2=0.95, weight_decay=0.3)
    rng = np.random.default_rng(0)
    gradients_, kernel = rng.normal(size=(6, 4)) / 4, np.ones(4)
    mean, square, expected = np.zeros(4), np.zeros(4), []
    for i, gradient in enumerate(gradients_):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        direction = mean / (1 - 0.8 ** (i + 1)) / np.sqrt(square / (1 - 0.95 ** (i + 1)))
        expected.append(-float(learning_rate_schedule(cfg, 10)(i)) * (direction + 0.3 * kernel))
        kernel = kernel + expected[-1]
    np.testing.assert_allclose(updates_of(cfg, gradients_), expected, rtol=1e-3, atol=1e-6)


def linear_state(optimizer, ema=False):
    return TrainState.create(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param, optimizer, ema)


def test_the_moving_average_follows_the_parameters():
    state = linear_state(optax.sgd(0.1), ema=True)
    expected = jax.tree.map(np.asarray, state.params)
    cfg = TrainConfig(ema_decay=0.75)
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.full_like(x, 1.0 + step), state.params)
        state, norms = apply_gradients(state, grads, cfg)
        state = state.move_average(cfg.ema_decay)
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * np.asarray(b), expected, state.params)
        np.testing.assert_allclose(norms["grad_norm"], (1 + step) * np.sqrt(8), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, expected)


def test_gradients_of_parts_are_averaged_and_their_arrays_put_in_order():
    state = linear_state(optax.sgd(0.1))
    x_BM = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(model, x_BM):
        y_BL = model(x_BM)
        return jnp.mean(y_BL**2), ({"largest": jnp.mean(jnp.max(y_BL, axis=1))}, y_BL)

    whole, parts = (gradients(loss_fn, state, x_BM, n) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)
    np.testing.assert_allclose(parts[2], state.model()(x_BM), rtol=1e-5, atol=1e-6)
