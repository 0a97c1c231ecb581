"""Products in int8, by qwix, for the dense layers of the blocks: in training forward and backward, and in sampling.

What is summed over shares a scale: a row of the input, a column of the weights, and of a gradient likewise. Parameters,
norms, softmax, logits, codebooks and the optimizer stay as they are, so checkpoints do not change.
"""

from typing import Any

import jax
import jax.numpy as jnp

from models.errors import InputError


@jax.custom_vjp
def int8_product(x_XM: jax.Array, kernel_MF: jax.Array) -> jax.Array:
    """x · kernel (X, F) of matrices, in x's dtype: their values rounded to int8, products summed in int32.

    Rounding counts as the identity for the gradient, whose own two products are of int8 as well.

    Raises:
      InputError: qwix is not installed.
    """
    return _forward(x_XM, kernel_MF)[0]


def _forward(x_XM: jax.Array, kernel_MF: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
    qwix = _qwix()
    x, kernel = _rounded(x_XM, 0), _rounded(kernel_MF, 1)
    y_XF = qwix.dot_general(x, kernel, (((1,), (0,)), ((), ())))
    return y_XF.astype(x_XM.dtype), (x, kernel)


def _backward(saved: tuple[Any, Any], grad_XF: jax.Array) -> tuple[jax.Array, jax.Array]:
    qwix = _qwix()
    x, kernel = saved
    # Each of them has its scales along an axis that is summed over now: the gradient takes them up.
    to_x, to_kernel = _rounded(grad_XF * kernel.scale, 0), _rounded(grad_XF * x.scale, 1)
    grad_XM = qwix.dot_general(to_x, kernel.qvalue, (((1,), (1,)), ((), ())))
    grad_MF = qwix.dot_general(x.qvalue, to_kernel, (((0,), (0,)), ((), ())))
    return grad_XM.astype(grad_XF.dtype), grad_MF.astype(grad_XF.dtype)


int8_product.defvjp(_forward, _backward)


def _rounded(x_XM: jax.Array, axis: int) -> Any:
    """A matrix in int8, with a float32 scale for each place along `axis`."""
    return _qwix().quantize(x_XM.astype(jnp.float32), jnp.int8, channelwise_axes=(axis,))


def _qwix() -> Any:
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise InputError("`quant` int8: needs qwix; pip install qwix") from error
    return qwix
