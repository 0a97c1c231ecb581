"""Where a new training may begin: at another model's parameters (`--init_from`)."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError
from models.genie import KINDS, World, load
from models.policy import Agent

MAY_DIFFER = {
    *("num_actions", "num_codes"),  # what depends on these is new
    *("codebook_decay", "reset_after", "unquantized_steps", "mask_rates", "picture_noise", "max_hidden"),  # of training
    *("picture_blur", "flow_steps", "context_noise", "own_frames", "edge_weight", "action_dropout"),  # alone
}
"""Fields in which a model may differ from the one that it begins with."""

SAME_CODE = 0.5
"""Cosine from which on the codes of two tokenizers are taken for the same one, moved by training. Two random ones of 32
numbers are nowhere near."""


def begin_with(path: str, model: Any, trained: Collection[str]) -> str:
    """Gives a new model, in place, the variables of another one, codebooks and their counters too.

    Args:
      path: A training of the same kind, or an exported world; for a tokenizer or a LAM also a world that holds one.
      model: A tokenizer, a LAM, a world or an agent.
      trained: Names of what is trained of it; of a world or an agent the rest, which is frozen, stays as it is.
    Returns:
      What was taken and what is new, in one line.
    Raises:
      InputError: There is no such checkpoint, or it is of other frames or of another architecture.
    """
    kind = next(kind for kind, (of, _) in KINDS.items() if isinstance(model, of))
    other = load(path, kind)
    if not isinstance(model, World | Agent):
        return f"begins with {path}: {_take(path, kind, model, other)}"
    told = []
    for part in (part for part in ("lam", "dynamics", "heads", "policy") if part in trained):
        ours, theirs = getattr(model, part), getattr(other, part)
        if theirs is None or (part == "heads" and theirs.cfg != ours.cfg):
            told.append(f"the {part} is new, for there is none" if theirs is None else "the heads, other ones, are new")
            continue
        before_KM = np.array(ours.token_embedding[...]) if hasattr(ours, "token_embedding") else None
        told.append(_take(path, part, ours, theirs))
        if before_KM is not None and isinstance(model, World):
            told.append(_keep_own_codes(model, other, before_KM))
    return f"begins with {path}: {'; '.join(filter(None, told))}"


def _keep_own_codes(model: World, other: World, before_KM: np.ndarray) -> str:
    """Gives those codes their own embeddings back that are not the other tokenizer's; says so if there are any."""
    codes_KL, others_KL = (np.asarray(world.tokenizer.vq.codebook_KL) for world in (model, other))
    if len(codes_KL) != len(others_KL):
        return ""  # the whole table is new already
    same_width = codes_KL.shape == others_KL.shape
    is_own_K = np.sum(codes_KL * others_KL, axis=-1) < SAME_CODE if same_width else np.ones(len(codes_KL), bool)
    dynamics: Any = model.dynamics
    table_KM = np.array(dynamics.token_embedding[...])
    table_KM[:-1][is_own_K] = before_KM[:-1][is_own_K]
    dynamics.token_embedding[...] = jnp.asarray(table_KM)
    if not is_own_K.any():
        return ""
    return f"the embeddings of {is_own_K.sum():,} of {len(codes_KL):,} codes, which differ, are new"


def _take(path: str, name: str, model: Any, other: Any) -> str:
    """Gives `model` those variables of `other` that have the same shape; the rest depends on `MAY_DIFFER` alone."""
    _expect(path, name, model.cfg, other.cfg)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, other))
    new = [place for place, value in ours.items() if place not in theirs or theirs[place].shape != value.shape]
    taken = {place: value for place, value in theirs.items() if place in ours and place not in new}
    nnx.update(model, nnx.from_flat_state(taken))
    count = sum(value.size for value in taken.values())
    shapes = [f"{'.'.join(map(str, place))} {_shape(ours[place])}, there {_shape(theirs.get(place))}" for place in new]
    return f"{count:,} values of the {name} taken, " + (f"new: {'; '.join(shapes)}" if new else "none is new")


def _shape(value: Any) -> str:
    return "none" if value is None else "×".join(map(str, np.shape(value)))


def _expect(path: str, name: str, ours: Any, theirs: Any) -> None:
    """Refuses a model whose variables would mean something else here."""
    if name != "heads" and theirs.frame_shape != ours.frame_shape:
        raise InputError(
            f"`init_from` {path}: made for frames of {theirs.frame_shape}, but the dataset has {ours.frame_shape}; "
            "convert it to that size, with preprocess_dataset.py --height and --width"
        )
    old, new = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    differing = [f"{field}: there {old[field]}, here {new[field]}" for field in new if old[field] != new[field]]
    differing = [text for text in differing if text.split(":")[0] not in MAY_DIFFER]
    if differing:
        raise InputError(f"`init_from` {path}: its {name} is built otherwise ({'; '.join(differing)}); give its values")
