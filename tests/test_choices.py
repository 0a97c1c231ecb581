"""What recipes choose between: a grid of codes or a codebook, Muon or AdamW; and kernels made for CPUs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.errors import InputError
from models.fsq import FiniteScalarQuantizer
from models.kernels import products
from models.lam import LAM, LAMConfig
from models.nn import Compute
from models.tokenizer import Tokenizer, TokenizerConfig
from models.vq import first_of_largest
from tests.conftest import FRAME
from utils.optim import OptimConfig, make_optimizer

LEVELS = (2, 3, 4)


def test_a_grid_has_all_its_codes_and_each_is_its_own_nearest():
    vq = FiniteScalarQuantizer(LEVELS, decay=0.9)
    codes = jnp.arange(math.prod(LEVELS))
    vectors = vq.lookup(codes)
    assert len({tuple(row) for row in np.asarray(vectors).round(5).tolist()}) == 24
    np.testing.assert_array_equal(vq.codebook_KL, vectors)
    for axis, levels in enumerate(LEVELS):
        np.testing.assert_allclose(np.unique(vectors[:, axis] * 3**0.5), np.linspace(-1, 1, levels), atol=1e-6)
    inverse = jnp.arctanh(jnp.clip(vectors * 3**0.5, -0.999, 0.999))  # the latents that lie on the grid
    found = vq(inverse)
    np.testing.assert_array_equal(found.codes_X, codes)
    np.testing.assert_allclose(found.vectors_XL, vectors, atol=1e-6)


def test_rounding_passes_the_gradient_of_the_squashing():
    vq = FiniteScalarQuantizer(LEVELS, decay=0.9)
    z = jnp.array([[0.3, -0.8, 1.7]])
    grad = jax.grad(lambda z: vq(z).vectors_XL.sum())(z)
    np.testing.assert_allclose(grad, (1 - jnp.tanh(z) ** 2) * 3**-0.5, rtol=1e-5)


def test_a_centred_grid_uses_both_sides_of_what_latents_share():
    vq = FiniteScalarQuantizer((2, 2), decay=0.5, centred=True)
    z = 5.0 + jax.random.normal(jax.random.key(0), (200, 2))
    assert set(np.unique(vq(z).codes_X)) == {3}  # as it begins, around zero
    assert set(np.unique(vq(z, train=True).codes_X)) == {0, 1, 2, 3}
    for _ in range(12):
        vq.update(z, vq(z).codes_X, jax.random.key(0))
    assert set(np.unique(vq(z).codes_X)) == {0, 1, 2, 3}
    assert vq.updates[...] == 12


def test_at_first_latents_pass_unrounded_in_training():
    vq = FiniteScalarQuantizer((2, 2), decay=0.5, unquantized_steps=1)
    z = jnp.array([[0.3, -0.2]])
    np.testing.assert_allclose(vq(z, train=True).vectors_XL, jnp.tanh(z) * 2**-0.5, rtol=1e-6)
    np.testing.assert_allclose(np.abs(vq(z).vectors_XL), 2**-0.5, rtol=1e-6)
    vq.update(z, vq(z).codes_X, jax.random.key(0))
    np.testing.assert_allclose(np.abs(vq(z, train=True).vectors_XL), 2**-0.5, rtol=1e-6)


@pytest.mark.parametrize("model", [Tokenizer, LAM])
def test_tokenizer_and_lam_take_a_grid(model):
    of = TokenizerConfig if model is Tokenizer else LAMConfig
    size = {"width": 16, "num_heads": 2, "num_blocks": 1, "patch_size": 8, "frame_shape": FRAME}
    cfg = of(**size, num_codes=8, code_width=3, levels=(2, 2, 2))
    made = model(cfg, Compute(), nnx.Rngs(0))(jax.random.uniform(jax.random.key(0), (2, 3, *FRAME)), train=True)
    codes = made.tokens_BTN if model is Tokenizer else made.actions_BTm1
    assert codes.min() >= 0
    assert codes.max() < 8
    for wrong in ({"num_codes": 9}, {"code_width": 4}, {"levels": (8, 1, 1)}):
        with pytest.raises(InputError, match="`levels` "):
            dataclasses.replace(cfg, **wrong)


def test_products_are_those_of_an_einsum_and_so_are_their_gradients():
    x, table = jax.random.normal(jax.random.key(0), (2, 3, 5, 8)), jax.random.normal(jax.random.key(1), (7, 8))
    weights = jax.random.normal(jax.random.key(2), (2, 3, 5, 7))
    plain = lambda x, table: jnp.einsum("...m,km->...k", x, table)
    np.testing.assert_allclose(products(x, table), plain(x, table), rtol=1e-5)
    found, expected = (
        jax.grad(lambda x, t, f=f: (f(x, t) * weights).sum(), (0, 1))(x, table) for f in (products, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_first_of_the_largest_is_argmax():
    scores = jax.random.randint(jax.random.key(0), (50, 9), 0, 4).astype(jnp.float32)  # with many equal ones
    np.testing.assert_array_equal(first_of_largest(scores), jnp.argmax(scores, axis=-1))


def test_muon_turns_the_matrices_of_blocks_and_adam_the_rest():
    size = {"width": 16, "num_heads": 2, "num_blocks": 2, "patch_size": 8, "frame_shape": FRAME}
    params = nnx.state(Tokenizer(TokenizerConfig(**size, num_codes=8, code_width=4), Compute(), nnx.Rngs(0)), nnx.Param)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    cfg = OptimConfig(optimizer="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, grad_clip=0.0)
    updates = {}
    nadam = optax.nadamw(1.0, cfg.beta1, cfg.beta2, weight_decay=0.0)
    for name, made in (("muon", make_optimizer(cfg, 100)), ("nadam", nadam)):
        updates[name], _ = made.update(grads, made.init(params), params)
    turned = 0
    for (path, muon), adam in zip(
        jax.tree.leaves_with_path(updates["muon"]), jax.tree.leaves(updates["nadam"]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "'blocks'" in name and "'kernel'" in name:
            turned += 1
            for matrix in muon:  # of each of the stacked blocks
                values = jnp.linalg.svd(matrix, compute_uv=False)
                assert values.min() > 0.25 * values.max(), name  # far nearer to orthogonal than a gradient is
                np.testing.assert_allclose(jnp.sqrt(jnp.mean(matrix**2)), 0.2, rtol=0.3)
        else:
            np.testing.assert_allclose(muon, adam, rtol=1e-5, err_msg=name)
    assert turned >= 8
    assert optax.tree.norm(updates["muon"]) > 0
