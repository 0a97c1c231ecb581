"""Learning-rate schedules and the optimizer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Flags of the optimizer, the same in all trainings. Defaults: Appendix F."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (Jordan et al. 2024) makes the updates of the blocks' matrices orthogonal; all else is NAdamW's."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """wsd: warm-up, constant, linear decay over the last --decay_steps; cosine: warm-up, then decay to the end."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up from zero; at most a tenth of a run too short for the recipe."""
    decay_steps: int = 30_000
    """Last steps of a wsd schedule, in which the rate falls to --final_learning_rate; at most a third of a run too
    short for the recipe."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.9
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, on matrices only."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    ema_decay: float = 0.0
    """Decay of a moving average of the parameters, used for validation and sampling; 0 keeps none."""


def phases(cfg: OptimConfig, num_steps: int) -> tuple[int, int]:
    """Steps of warm-up and of decay. In a run that is too short for the recipe they are at most 1/10 and 1/3 of it."""
    warmup_steps, decay_steps = cfg.warmup_steps, cfg.decay_steps
    if warmup_steps + (decay_steps if cfg.schedule == "wsd" else 0) > num_steps:
        warmup_steps, decay_steps = min(warmup_steps, num_steps // 10), min(decay_steps, num_steps // 3)
    return warmup_steps, decay_steps if cfg.schedule == "wsd" else num_steps - warmup_steps


def learning_rate_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step (0 is the first update)."""
    warmup_steps, decay_steps = phases(cfg, num_steps)
    warmup = optax.linear_schedule(cfg.learning_rate / max(warmup_steps, 1), cfg.learning_rate, warmup_steps)
    constant = optax.constant_schedule(cfg.learning_rate)
    if cfg.schedule == "cosine":
        alpha = cfg.final_learning_rate / cfg.learning_rate
        decay = optax.cosine_decay_schedule(cfg.learning_rate, max(decay_steps, 1), alpha)
    else:
        decay = optax.linear_schedule(cfg.learning_rate, cfg.final_learning_rate, max(decay_steps, 1))
    return optax.join_schedules([warmup, constant, decay], [warmup_steps, num_steps - decay_steps])


def raised_rate(cfg: OptimConfig, planned: int | None, num_steps: int, first_step: int, kept: Sequence[int]) -> str:
    """A line about a rate that a longer training raises again, after it had begun to fall; empty if it does not.

    Args:
      planned, num_steps: Steps of the whole training, before (None if it is new) and now.
      first_step: Where it resumes.
      kept: Steps of its checkpoints.
    """
    if not (planned and 0 < first_step < num_steps) or planned == num_steps:
        return ""
    before, after = (float(learning_rate_schedule(cfg, n)(min(first_step, n))) for n in (planned, num_steps))
    if after <= before * 1.01:
        return ""
    fell = planned - phases(cfg, planned)[1]
    earlier = [step for step in kept if step <= fell]
    remedy = f"take the checkpoints after {earlier[-1]} away" if earlier else "keep some with --keep_every"
    return (
        f"\nnote: --num_steps {num_steps} instead of {planned} raises the learning rate from {before:.2g} to "
        f"{after:.2g}, which had begun to fall at step {fell}. A longer run of --schedule wsd goes on from before that "
        f"as if it had been planned; {remedy}"
    )


NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's five iterations, each with its coefficients: optax scans what is given so, and else unrolls it, which makes a
step compile for half as long again."""


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW or Muon with clipping and a schedule; moments are float32, like the parameters."""
    rate = learning_rate_schedule(cfg, num_steps)
    if cfg.optimizer == "muon":
        decay = {"weight_decay": cfg.weight_decay, "adam_weight_decay": cfg.weight_decay}
        # Updates as large as AdamW's usually are (Liu et al. 2025), so that one learning rate serves both.
        updates = optax.contrib.muon(
            rate,
            adam_b1=cfg.beta1,
            adam_b2=cfg.beta2,
            **decay,
            weight_decay_mask=matrices,
            muon_weight_dimension_numbers=_hidden_matrices,
            consistent_rms=0.2,
            ns_coeffs=NEWTON_SCHULZ,
        )
    else:
        updates = optax.adamw(rate, cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=matrices)
    return optax.chain(optax.stateless(_clipped(cfg.grad_clip)), updates) if cfg.grad_clip else updates


def _clipped(most: float) -> Callable[[Any, Any], Any]:
    """Clips gradients to a global norm; those of heads, or of a critic, by themselves, lest they slow the rest down."""

    def clip(grads: Any, _: Any) -> Any:
        is_apart = lambda path: jax.tree_util.keystr(path).startswith(("['heads']", "['critic']"))
        leaves = jax.tree.leaves_with_path(grads)
        norms = [optax.tree.norm([x for path, x in leaves if is_apart(path) == part]) for part in (False, True)]

        def clipped(path: Any, x: jax.Array) -> jax.Array:
            norm = norms[is_apart(path)]
            return jnp.where(norm < most, x, x / norm.astype(x.dtype) * most)

        return jax.tree.map_with_path(clipped, grads)

    return clip


def _hidden_matrices(params: Any) -> Any:
    """Axes of the matrices inside blocks, which are stacked; None for everything else."""

    def axes(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers(-2, -1) if "'blocks'" in name and "'kernel'" in name else None

    return jax.tree.map_with_path(axes, params)


def matrices(params: Any) -> Any:
    """A mask of the matrices of dense layers: no norms, biases, embeddings or positions.

    By name and not by rank, because stacked layers give every parameter one more axis.
    """
    return jax.tree.map_with_path(lambda path, _: "'kernel'" in jax.tree_util.keystr(path), params)
