"""What a policy imagines in a world, and what comes of it: what an actor–critic learns from (kin: Hafner et al. 2023).

Frame 0 is the last one of the prompt. Action s is chosen after frame s and leads to frame s + 1; what it earns and
whether it ends the level are judged from frame s, as in `models.heads`; value s is what lies ahead of frame s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agents.planning import DISCOUNT, earned, reached
from models.genie import ActorCritic, World
from models.heads import Judged, bins
from models.policy import Policy
from models.sampling import SamplingConfig, next_frame, start_rollout

LAMBDA = 0.95  # λ: how far a return trusts what was imagined, before it takes the critic's word


class Imagined(NamedTuple):
    """B rollouts of S actions.

    frames_BTHWC: In [0, 1]: what a choice sees of the prompt, and the S frames after it; T is context + S.
    actions_BS: int32.
    judged: Of each action, (B, S).
    """

    frames_BTHWC: jax.Array
    actions_BS: jax.Array
    judged: Judged


class Targets(NamedTuple):
    """What an actor–critic learns from rollouts, besides their frames and actions.

    returns_BS: Discounted reward from each action on, less what losing costs.
    advantages_BS: By how much that is more than the critic expected, in units of the returns' spread.
    reached_BS: Probability that the level has not ended before the action.
    """

    returns_BS: jax.Array
    advantages_BS: jax.Array
    reached_BS: jax.Array


def imagine_by(
    policy: Policy,
    world: World,
    frames_BTHWC: jax.Array,
    actions_BTm1: jax.Array,
    horizon: int,
    key: jax.Array,
    sampling: SamplingConfig,
) -> Imagined:
    """Plays on from prompts by a policy, for use inside of what is compiled already.

    Args:
      frames_BTHWC: In [0, 1], at least as many as a choice sees.
      actions_BTm1: Those between, the world's.
      horizon: S, actions to take.
    """

    def step(carry: Any, key: jax.Array) -> Any:
        state, seen_BCHWC = carry
        act_key, frame_key = jax.random.split(key)
        action_B = jax.random.categorical(act_key, policy(seen_BCHWC).logits_BTA[:, -1]).astype(jnp.int32)
        judged = world.judge(state, action_B)
        frame_BHWC, state = next_frame(world, state, action_B, frame_key, sampling)
        seen_BCHWC = jnp.concatenate([seen_BCHWC[:, 1:], frame_BHWC[:, None]], axis=1)
        return (state, seen_BCHWC), (frame_BHWC, action_B, judged)

    seen_BCHWC = frames_BTHWC[:, frames_BTHWC.shape[1] - policy.cfg.context :]
    begun = start_rollout(world, frames_BTHWC, actions_BTm1), seen_BCHWC
    _, found = jax.lax.scan(step, begun, jax.random.split(key, horizon))
    later_BSHWC, actions_BS, judged = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
    return Imagined(jnp.concatenate([seen_BCHWC, later_BSHWC], axis=1), actions_BS, judged)


def targets(model: ActorCritic, imagined: Imagined) -> Targets:
    """What comes of rollouts, as the critic sees it now."""
    judged, values_BSp1 = imagined.judged, expected(model.critic(imagined.frames_BTHWC).logits_BTA)
    returns_BS = lambda_returns(earned(judged), 1.0 - judged.end_X, values_BSp1)
    low, high = jnp.percentile(returns_BS, jnp.array([5.0, 95.0]))
    # Of small returns, which are mostly the heads' noise, no large advantages are made.
    advantages_BS = (returns_BS - values_BSp1[:, :-1]) / jnp.maximum(high - low, 1.0)
    return Targets(returns_BS, advantages_BS, reached(judged))


def lambda_returns(rewards_BS: jax.Array, goes_on_BS: jax.Array, values_BSp1: jax.Array) -> jax.Array:
    """TD(λ) returns (B, S) of actions.

    Args:
      rewards_BS, goes_on_BS: What each earns, and the probability that it does not end the level.
      values_BSp1: Of the frame before each action, and of the last one.
    """

    def back(after_B: jax.Array, action: Any) -> tuple[jax.Array, jax.Array]:
        reward_B, goes_on_B, value_B = action
        return_B = reward_B + DISCOUNT * goes_on_B * ((1 - LAMBDA) * value_B + LAMBDA * after_B)
        return return_B, return_B

    actions = jax.tree.map(lambda x: x.swapaxes(0, 1), (rewards_BS, goes_on_BS, values_BSp1[:, 1:]))
    return jax.lax.scan(back, values_BSp1[:, -1], actions, reverse=True)[1].swapaxes(0, 1)


def expected(logits_XK: jax.Array) -> jax.Array:
    """The value that a critic's distribution over `models.heads.bins` means."""
    return jax.nn.softmax(logits_XK) @ bins()
