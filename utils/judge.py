"""The heads of a world in training."""

from typing import Any

import jax
import jax.numpy as jnp

from models.actions import no_actions
from models.dynamics import Seen
from models.errors import InputError
from models.genie import World
from models.heads import NAMES, HeadsConfig
from utils.data import Batch


def head_names(flag: str) -> tuple[str, ...]:
    """From what --heads says, such as "reward,end".

    Raises:
      InputError: There is no such head.
    """
    names = tuple(dict.fromkeys(name.strip() for name in flag.split(",") if name.strip()))
    if wrong := [name for name in names if name not in NAMES]:
        raise InputError(f"`heads` {flag}: there is no head {wrong[0]}; choose of {', '.join(NAMES)}")
    return names


def heads_config(flag: str, sees_action: bool) -> HeadsConfig | None:
    """The heads that --heads asks for, if any."""
    return HeadsConfig(head_names(flag), sees_action) if head_names(flag) else None


def judge(world: World, seen: Seen, batch: Batch, train: bool) -> tuple[Any, dict[str, jax.Array]]:
    """The heads' loss on clips that the dynamics model sees whole, and metrics; 0 and none without heads.

    They judge the action after every frame, the last one's too, with which a level may end. Where heads see no latent
    action, none stands there.
    """
    if world.heads is None:
        return 0.0, {}
    cfg, shape = world.cfg.dynamics, seen.actions_BTm1.shape[:1]
    if world.heads.cfg.sees_action:
        after_BT = batch.actions_BT.astype(seen.actions_BTm1.dtype)
    else:
        last_B1 = jnp.asarray(no_actions(cfg, (*shape, 1)))
        after_BT = jnp.concatenate([seen.actions_BTm1, last_B1], axis=1)
    action_BTM = world.dynamics.embed_actions(after_BT)
    hidden_BTNM = world.dynamics.hidden(seen)
    loss, metrics = world.heads.loss(hidden_BTNM, action_BTM, batch.rewards_BT, batch.ends_BT)
    return loss, {name: value for name, value in metrics.items() if not (train and value.ndim)}
