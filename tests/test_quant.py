"""int8 products: near the true ones, in int8 indeed, and nowhere that tokens depend on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.nn import Compute, Places, STConfig, STTransformer
from models.quant import int8_product
from models.tokenizer import Tokenizer, TokenizerConfig

x_XM = jax.random.normal(jax.random.key(0), (24, 16))
kernel_MF = jax.random.normal(jax.random.key(1), (16, 32))
CFG = STConfig(width=16, num_heads=2, num_blocks=2)


def error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_are_near_the_true_ones(dtype):
    given = x_XM.astype(dtype), kernel_MF.astype(dtype)
    weight_XF = jax.random.normal(jax.random.key(2), (24, 32)).astype(dtype)

    def both(product):
        return product(*given), *jax.grad(lambda a, b: jnp.sum(product(a, b) * weight_XF), argnums=(0, 1))(*given)

    for rounded, true, like in zip(both(int8_product), both(jnp.matmul), (weight_XF, *given), strict=True):
        assert rounded.shape == like.shape
        assert rounded.dtype == like.dtype
        assert 0.001 < error(rounded.astype(jnp.float32), true.astype(jnp.float32)) < 0.03


def test_scales_follow_rows_and_columns():
    """A row or a column 1,024 times larger than the others costs these nothing."""
    large_X1, large_F = jnp.ones((24, 1)).at[3].set(1024.0), jnp.ones(32).at[5].set(1024.0)
    y_XF = int8_product(x_XM * large_X1, kernel_MF * large_F)
    np.testing.assert_allclose(y_XF / (large_X1 * large_F), int8_product(x_XM, kernel_MF), rtol=1e-4, atol=1e-4)


def transformer(**compute) -> STTransformer:
    return STTransformer(CFG, Compute(**compute), nnx.Rngs(0), Places(2))


def test_each_dense_layer_of_a_block_multiplies_int8_three_times():
    """Forward, and for the gradient of either side; attention's own products stay."""
    x_BTNM = jnp.ones((1, 2, 4, 16))

    def counted(**compute):
        graphdef, variables = nnx.split(transformer(**compute))
        loss = lambda v, x: jnp.sum(jnp.square(nnx.merge(graphdef, v)(x).x_BTNM))
        dots = list(products_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x_BTNM).jaxpr))
        return sum(dtype == jnp.int8 for dtype in dots), sum(dtype != jnp.int8 for dtype in dots)

    plain, rounded = counted(), counted(quant="int8")
    assert plain[0] == 0
    layers = 6  # queries, keys and values, and outputs, along either axis; feed-forward in and out
    assert rounded == (3 * layers, plain[1] - 3 * layers)


def products_of(jaxpr):
    """The dtype of each matrix product, also of what is called or scanned, which counts once."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.invars[0].aval.dtype
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products_of(inner)


def test_a_transformer_stays_near_the_true_one_and_has_its_parameters():
    x_BTNM = jax.random.normal(jax.random.key(3), (2, 3, 4, 16))
    true, rounded = transformer(), transformer(quant="int8")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(true), nnx.state(rounded))
    assert 0.001 < error(rounded(x_BTNM).x_BTNM, true(x_BTNM).x_BTNM) < 0.05


def test_tokens_are_those_of_float32():
    cfg = TokenizerConfig(width=16, num_heads=2, num_blocks=1, patch_size=4, num_codes=64, frame_shape=(8, 8, 3))
    frames = jax.random.uniform(jax.random.key(4), (2, 3, 8, 8, 3))
    true, rounded = (Tokenizer(cfg, Compute(quant=quant), nnx.Rngs(0)) for quant in ("none", "int8"))
    np.testing.assert_array_equal(true.encode(frames), rounded.encode(frames))
    assert error(rounded.decode(true.encode(frames)).frames_BTHWC, true.decode(true.encode(frames)).frames_BTHWC) > 1e-5
