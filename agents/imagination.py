"""What a policy imagines in a world, and what comes of it: what an actor–critic learns from (kin: Hafner et al. 2023).

Frame 0 is the last one of the prompt. Action h is chosen after frame h and leads to frame h + 1; what it earns and
whether it ends the level are judged from frame h, as in `models.heads`; value h is what lies ahead of frame h.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agents.planning import DISCOUNT, earned, reached
from models.genie import ActorCritic, World
from models.heads import Judged, bins
from models.policy import Policy
from models.sampling import SamplingConfig, next_frame, start_rollout

TRACE = 0.95  # λ: how far a return trusts what was imagined, before it takes the critic's word


class Imagined(NamedTuple):
    """B rollouts of H actions.

    frames_BSHWC: In [0, 1]: what a choice sees of the prompt, and the H frames after it; S is context + H.
    actions_BH: int32.
    judged: Of each action, (B, H).
    """

    frames_BSHWC: jax.Array
    actions_BH: jax.Array
    judged: Judged


class Lesson(NamedTuple):
    """What rollouts teach, besides their frames and actions.

    returns_BH: Discounted reward from each action on, less what losing costs.
    advantages_BH: By how much that is more than the critic expected, in units of the returns' spread.
    reached_BH: Probability that the level has not ended before the action.
    """

    returns_BH: jax.Array
    advantages_BH: jax.Array
    reached_BH: jax.Array


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
      horizon: H, actions to take.
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
    later_BHHWC, actions_BH, judged = jax.tree.map(lambda x: x.swapaxes(0, 1), found)
    return Imagined(jnp.concatenate([seen_BCHWC, later_BHHWC], axis=1), actions_BH, judged)


def lesson(model: ActorCritic, imagined: Imagined) -> Lesson:
    """What comes of rollouts, as the critic sees it now."""
    judged, values_BHp1 = imagined.judged, expected(model.critic(imagined.frames_BSHWC).logits_BTA)
    returns_BH = lambda_returns(earned(judged), 1.0 - judged.end_X, values_BHp1)
    low, high = jnp.percentile(returns_BH, jnp.array([5.0, 95.0]))
    # Of small returns, which are mostly the heads' noise, no large advantages are made.
    advantages_BH = (returns_BH - values_BHp1[:, :-1]) / jnp.maximum(high - low, 1.0)
    return Lesson(returns_BH, advantages_BH, reached(judged))


def lambda_returns(rewards_BH: jax.Array, goes_on_BH: jax.Array, values_BHp1: jax.Array) -> jax.Array:
    """TD(λ) returns (B, H) of actions.

    Args:
      rewards_BH, goes_on_BH: What each earns, and the probability that it does not end the level.
      values_BHp1: Of the frame before each action, and of the last one.
    """

    def back(after_B: jax.Array, action: Any) -> tuple[jax.Array, jax.Array]:
        reward_B, goes_on_B, value_B = action
        return_B = reward_B + DISCOUNT * goes_on_B * ((1 - TRACE) * value_B + TRACE * after_B)
        return return_B, return_B

    actions = jax.tree.map(lambda x: x.swapaxes(0, 1), (rewards_BH, goes_on_BH, values_BHp1[:, 1:]))
    return jax.lax.scan(back, values_BHp1[:, -1], actions, reverse=True)[1].swapaxes(0, 1)


def expected(logits_XK: jax.Array) -> jax.Array:
    """The value that a critic's distribution over `models.heads.bins` means."""
    return jax.nn.softmax(logits_XK) @ bins()
