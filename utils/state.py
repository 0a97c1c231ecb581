"""The state of a training, and the functions of it that every train step is made of."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.vq import Codebook


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "rest", "opt_state", "ema"),
    meta_fields=("graphdef", "trainable", "optimizer"),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    params: What gradients train (nnx.State).
    rest: Frozen parts and codebooks (nnx.State).
    ema: A moving average of `params` and of the codebooks, which follow an encoder that is averaged too; or None.
    """

    params: Any
    rest: Any
    opt_state: Any
    ema: Any
    graphdef: Any
    trainable: Any
    optimizer: Any

    @classmethod
    def create(cls, model: nnx.Module, trainable: Any, optimizer: optax.GradientTransformation, ema: bool):
        """The state before the first step. `trainable` is an nnx filter of the parameters that gradients train."""
        graphdef, params, rest = nnx.split(model, trainable, ...)  # type: ignore[misc]
        state = cls(params, rest, optimizer.init(params), None, graphdef, trainable, optimizer)
        return dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.averaged(params, rest))) if ema else state

    def averaged(self, params: Any, rest: Any) -> Any:
        """Those of the variables of which a moving average is kept."""
        return nnx.merge_state(params, nnx.filter_state(rest, Codebook))

    def with_average(self) -> tuple[Any, Any]:
        """(params, rest) with the moving average in the place of what it averages."""
        params, codebooks = self.split(self.ema)
        return params, nnx.merge_state(self.rest, codebooks)

    def split(self, variables: Any) -> tuple[Any, Any]:
        """Splits all variables of the model into (params, rest)."""
        params, rest = nnx.split_state(variables, self.trainable, ...)
        return params, rest

    def with_rest_of(self, model: Any) -> "TrainState":
        """This state, with what is not trained by gradients taken from a model (its codebooks have moved)."""
        return dataclasses.replace(self, rest=self.split(nnx.state(model))[1])

    def move_average(self, decay: float) -> "TrainState":
        """The state with its moving average, if it has one, moved towards what a step has made; counters are copied."""
        if self.ema is None:
            return self
        move = lambda a, b: decay * a + (1 - decay) * b if jnp.issubdtype(b.dtype, jnp.floating) else b
        return dataclasses.replace(self, ema=jax.tree.map(move, self.ema, self.averaged(self.params, self.rest)))

    def model(self, params: Any = None) -> Any:
        """The model, with other parameters if given."""
        return nnx.merge(self.graphdef, self.params if params is None else params, self.rest)

    def best_model(self) -> Any:
        """The model to look at and to keep: the moving average, where there is one."""
        return self.model() if self.ema is None else nnx.merge(self.graphdef, *self.with_average())


def gradients(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]], state: TrainState, inputs: Any, grad_accum: int
) -> tuple[Any, dict[str, jax.Array], Any]:
    """Gradients of a loss that is a mean over the batch, taken in `grad_accum` equal parts.

    Args:
      loss_fn: From model and inputs to (loss, (metrics, batch-first arrays)).
      inputs: A tree of batch-first arrays.
    Returns:
      Gradients, the metrics (means over the parts, with `loss`), and the arrays of the whole batch.
    """

    def part(inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            return loss_fn(state.model(params), inputs)

        (value, (metrics, arrays)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return grads, {"loss": value} | metrics, arrays

    if grad_accum == 1:
        return part(inputs)

    # Part i holds the clips i, i + n, ...: each device keeps the clips that it has.
    parts = jax.tree.map(lambda x: x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1), inputs)

    def body(total: Any, inputs: Any) -> Any:
        grads, metrics, arrays = part(inputs)
        return jax.tree.map(jnp.add, total, (grads, metrics)), arrays

    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, arrays = jax.lax.scan(body, zeros, parts)
    grads, metrics = jax.tree.map(lambda x: x / grad_accum, total)
    arrays = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), arrays)
    return grads, metrics, arrays


def large_norm(tree: Any) -> jax.Array:
    """The global norm, also of values whose squares are beyond float32: it is finite as long as they are."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)])
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * optax.tree.norm(jax.tree.map(lambda x: x / scale, tree))


def apply_gradients(state: TrainState, grads: Any, cfg: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer.

    Args:
      cfg: Its `log_gradients` counts.
    Returns:
      The state, and `grad_norm` and `param_norm`, on request by component too.
    """
    updates, opt_state = state.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": large_norm(params)}
    if cfg.log_gradients:
        norms |= {f"grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items()}
    return dataclasses.replace(state, params=params, opt_state=opt_state), norms
