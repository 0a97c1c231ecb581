"""Policies that learn in a world: in one whose right answers are known, and by the script on one that was trained.

The known one is a counter: a bright square stands at the place that counts, action 1 moves it on; the step from 3 to 4
earns 10, the step from 6 on ends the level, lost.
"""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train_actor_critic
import train_policy
from agents.imagination import TRACE, expected, imagine_by, lambda_returns, lesson
from agents.planning import DISCOUNT, LOSS
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import (
    CONFIG_VERSION,
    ActorCritic,
    ActorCriticConfig,
    World,
    WorldConfig,
    load_agent,
    load_world,
    write_parameters,
)
from models.heads import BINS, HeadsConfig, Judged, two_hot
from models.lam import LAMConfig
from models.nn import Compute
from models.policy import AgentConfig, Policy, PolicyConfig
from models.sampling import SamplingConfig
from models.tokenizer import TokenizerConfig
from tests.conftest import CACHE, make_clip
from utils.data import Batch
from utils.optim import OptimConfig, make_optimizer
from utils.records import Metadata, write_metadata, write_shard
from utils.state import TrainState

EARNS, ENDS, PLACES = 3, 6, 8
FRAME = (8, 8, 3)
POLICY = PolicyConfig(width=16, num_heads=2, num_blocks=1, patch_size=4, context=2, num_actions=2, frame_shape=FRAME)
SIZE = {"width": 16, "num_heads": 2, "num_blocks": 1}
PARTS = {"num_patches": 4, "patch_size": 4, "num_codes": 16, "frame_shape": FRAME}
TOKENIZER = TokenizerConfig(**SIZE, patch_size=4, num_codes=16, code_width=4, frame_shape=FRAME)
LAM = LAMConfig(**SIZE, patch_size=4, num_codes=3, code_width=4, frame_shape=FRAME)
LATENT = WorldConfig(
    TOKENIZER,
    LAM,
    DynamicsConfig(**SIZE, **PARTS, num_actions=3),
    window=6,
    heads=HeadsConfig(("reward", "end"), False),
)
TRUE = dataclasses.replace(LATENT, lam=None, dynamics=DynamicsConfig(**SIZE, **PARTS, num_actions=2))
SAMPLING = SamplingConfig(steps=1, temperature=0.0)


def picture(count_X: jax.Array) -> jax.Array:
    """A bright square of 2 × 2 pixels at one of eight places, (..., H, W, C) in [0, 1]."""
    at = jnp.zeros((PLACES, *FRAME))
    for count, (row, column) in enumerate(itertools.product((1, 5), (0, 2, 4, 6))):
        at = at.at[count, row : row + 2, column : column + 2].set(1.0)
    return at[jnp.clip(count_X, 0, PLACES - 1)]


def count_of(frames: jax.Array) -> np.ndarray:
    each = np.asarray(picture(jnp.arange(PLACES))).reshape(PLACES, -1)
    return (np.asarray(frames).reshape(*frames.shape[:-3], -1) @ each.T).argmax(axis=-1)


class Counter(nnx.Module):
    """The counter as a world; its state is the count."""

    def __init__(self):
        self.cfg = types.SimpleNamespace(window=5, heads=TRUE.heads)
        self.tokenizer = self.lam = None
        self.dynamics = self

    def start(self, tokenizer, frames, actions, window):
        each = picture(jnp.arange(PLACES)).reshape(PLACES, -1)
        return jnp.argmax(frames[:, -1].reshape(len(frames), -1) @ each.T, axis=-1)

    def next_frame(self, tokenizer, count_B, action_B, key, sampling):
        return picture(count_B + action_B), count_B + action_B

    def judge(self, count_B, action_B):
        ends = ((count_B >= ENDS) & (action_B == 1)).astype(jnp.float32)
        return Judged(10.0 * ((count_B == EARNS) & (action_B == 1)), ends, 0.0 * ends)


def rollouts(counts, horizon: int, seed: int = 0):
    policy, frames = Policy(POLICY, Compute(), nnx.Rngs(0)), picture(jnp.array(counts))[:, None].repeat(2, axis=1)
    return jax.jit(
        lambda frames, key: imagine_by(
            policy, Counter(), frames, jnp.zeros((len(frames), 1), int), horizon, key, SAMPLING
        )
    )(frames, jax.random.key(seed))


def test_what_is_imagined_belongs_together():
    """Action h was chosen after frame h and led to frame h + 1, and what is judged is that action from frame h."""
    frames, actions_BH, judged = rollouts([0, 1, 2, 3, 5, 6] * 4, horizon=4)
    count_BHp1 = count_of(frames[:, POLICY.context - 1 :])
    before_BH, actions_BH = count_BHp1[:, :-1], np.asarray(actions_BH)
    assert len(np.unique(actions_BH)) == 2
    np.testing.assert_array_equal(np.minimum(before_BH + actions_BH, PLACES - 1), count_BHp1[:, 1:])
    np.testing.assert_array_equal(judged.reward_X, 10.0 * ((before_BH == EARNS) & (actions_BH == 1)))
    np.testing.assert_array_equal(judged.end_X, (before_BH >= ENDS) & (actions_BH == 1))
    np.testing.assert_array_equal(frames[:, 0], frames[:, 1])  # what a choice sees of the prompt


def test_choices_see_what_was_imagined():
    """Drawn from the policy's own distribution over what stands before each action."""
    policy = Policy(POLICY, Compute(), nnx.Rngs(0))
    policy.action_out.kernel[...] = 50.0 * jax.random.normal(jax.random.key(5), policy.action_out.kernel.shape)
    frames = picture(jnp.arange(PLACES))[:, None].repeat(2, axis=1)
    none = jnp.zeros((PLACES, 1), int)
    imagined = jax.jit(lambda key: imagine_by(policy, Counter(), frames, none, 5, key, SAMPLING))(jax.random.key(0))
    shares = jax.nn.softmax(policy(imagined.frames_BSHWC[:, :-1]).logits_BTA)
    taken = jnp.take_along_axis(shares, imagined.actions_BH[..., None], axis=-1)
    sure = np.asarray(shares.max(axis=-1)) > 0.999
    assert sure.sum() > 10
    assert (np.asarray(taken)[..., 0][sure] > 0.5).all()


def test_returns_by_hand():
    reward, goes_on = np.array([1.0, 0.0, 4.0]), np.array([1.0, 0.5, 0.0])
    values = np.array([7.0, 2.0, 3.0, 100.0])
    last = 4.0  # the level is over: what comes after counts nothing
    middle = 0.0 + DISCOUNT * 0.5 * ((1 - TRACE) * 3.0 + TRACE * last)
    first = 1.0 + DISCOUNT * ((1 - TRACE) * 2.0 + TRACE * middle)
    found = lambda_returns(*(jnp.asarray(x)[None] for x in (reward, goes_on, values)))
    np.testing.assert_allclose(found, [[first, middle, last]], rtol=1e-6)


def actor_critic() -> ActorCritic:
    model = ActorCritic(ActorCriticConfig(AgentConfig(POLICY, None), TRUE), Compute(), nnx.Rngs(0))
    model.world = Counter()
    return model


def test_a_lesson_counts_losses_and_stops_at_an_end():
    imagined = rollouts([ENDS] * 16, horizon=6)
    told = jax.jit(lambda imagined: lesson(actor_critic(), imagined))(imagined)
    ended_BH = np.asarray(imagined.judged.end_X) == 1
    assert ended_BH.any(axis=1).sum() > 10
    np.testing.assert_array_equal(told.reached_BH[:, 0], 1)
    np.testing.assert_array_equal(told.reached_BH[:, 1:], 1 - np.maximum.accumulate(ended_BH, axis=1)[:, :-1])
    np.testing.assert_allclose(told.returns_BH[ended_BH], -LOSS, atol=1e-5)


def test_a_critic_says_what_it_was_told():
    logits = jnp.log(two_hot(jnp.array([-3.0, 0.0, 7.5])) + 1e-9)
    assert logits.shape == (3, BINS)
    np.testing.assert_allclose(expected(logits), [-3.0, 0.0, 7.5], atol=1e-3)


def test_a_policy_learns_what_a_counter_pays():
    """It goes on where that earns, and stays where it would be lost; the clone and the world stay as they are."""
    cfg = train_actor_critic.Config(horizon=4, seq_len=2, stay=0.0, entropy=0.01)
    trainable = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("policy"), nnx.PathContains("critic")))
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=1, decay_steps=1, weight_decay=0.0), 10_000)
    state = TrainState.create(actor_critic(), trainable, optimizer, ema=False)
    assert set(state.params) == {"agent", "critic"}
    before = jax.tree.map(np.array, nnx.to_pure_dict(state.rest))
    counts = np.arange(64) % (ENDS + 1)
    frames = np.asarray(picture(jnp.asarray(counts))[:, None].repeat(2, axis=1) * 255, np.uint8)
    batch = Batch(frames, np.zeros((64, 2), np.int32))
    step = jax.jit(lambda state, key: train_actor_critic.train_step(state, batch, key, cfg, SAMPLING))
    for i in range(60):
        state, metrics = step(state, jax.random.key(i))
    policy = state.model().agent.policy
    each = picture(jnp.arange(ENDS + 1))[:, None].repeat(2, axis=1)
    goes_on = np.asarray(jax.nn.softmax(policy(each).logits_BTA)[:, 0, 1])
    assert (goes_on[: EARNS + 1] > 0.8).all(), goes_on
    assert goes_on[ENDS] < 0.2, goes_on
    assert metrics["worth"] > 2
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.to_pure_dict(state.rest)))


# By the script


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of an exported world with heads, of latent actions, and its data, of which every second clip ends."""
    folder, splits = tmp_path_factory.mktemp("world"), {}
    for k, split in enumerate(("train", "val")):
        clips = [make_clip(1000 * k + i, 8, FRAME) for i in range(12)]
        splits[split] = (write_shard(folder / "data", f"{split}/0", clips),)
    write_metadata(folder / "data", Metadata("squares", FRAME, 10.0, ("LEFT", "RIGHT"), splits, {}))
    model = World(LATENT, Compute(), nnx.Rngs(0))
    out = model.heads.reward.out
    out.kernel[...] = jax.random.normal(jax.random.key(1), out.kernel.shape) / 10
    write_parameters(folder, model)
    stored = {"kind": "world", "model": dataclasses.asdict(LATENT), "config_version": CONFIG_VERSION}
    stored["train"] = {"seq_len": 6, "sampling": {"steps": 1}, "data_dir": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def config(of, world, ckpt_dir, **changes):
    few = {"batch_size": 2, "seq_len": 4, "num_steps": 4, "val_batches": 1, "warmup_steps": 0, "decay_steps": 1}
    often = {"checkpoint_interval": 2, "val_interval": 4, "log_interval": 1, "compile_cache": str(CACHE)}
    paths = {"data_dir": str(world / "data"), "ckpt_dir": str(ckpt_dir)}
    return dataclasses.replace(of, **few | often | paths | changes)


@pytest.fixture(scope="module")
def clone(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    cfg = config(train_policy.PRESETS["tiny"], world, folder, lam_checkpoint=str(world), num_steps=2)
    train_policy.main(dataclasses.replace(cfg, model=dataclasses.replace(POLICY, num_actions=0)))
    return folder


def improve(world, clone, ckpt_dir, **changes):
    paths = {"world_checkpoint": str(world), "policy_checkpoint": str(clone), "horizon": 3}
    cfg = config(train_actor_critic.PRESETS["tiny"], world, ckpt_dir, **paths | changes)
    train_actor_critic.main(cfg)


@pytest.fixture(scope="module")
def improved(world, clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("improved")
    improve(world, clone, folder)
    return folder


def variables(agent):
    return nnx.to_pure_dict(nnx.state(agent))


def test_what_comes_of_it_is_an_agent(improved, clone):
    before, after = variables(load_agent(clone)), variables(load_agent(improved))
    jax.tree.map(np.testing.assert_array_equal, before["lam"], after["lam"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["policy"], after["policy"])
    assert any(jax.tree.leaves(moved))
    rows = [json.loads(line) for line in (improved / "metrics.jsonl").read_text().splitlines()]
    told = next(row for row in rows if "val_worth" in row)
    assert {"val_worth_of_clone", "val_solved", "val_ended_of_clone", "val_divergence"} <= set(told)
    with pytest.raises(InputError, match="holds an actor_critic, but a world is needed"):
        load_world(improved)


def test_it_resumes_exactly(improved, world, clone, tmp_path):
    improve(world, clone, tmp_path, num_steps=2)
    improve(world, clone, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, *(variables(load_agent(folder)) for folder in (improved, tmp_path)))


def test_at_first_it_is_the_clone_and_expects_nothing(world, clone):
    agent, imagined_in = load_agent(clone), load_world(world)
    model = ActorCritic(ActorCriticConfig(agent.cfg, imagined_in.cfg), Compute(), nnx.Rngs(7))
    train_actor_critic.begin(model, agent, imagined_in)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, variables(a), variables(b))
    same(model.agent, agent)
    same(model.world, imagined_in)
    same(model.clone, agent.policy)
    same(model.critic.blocks, agent.policy.blocks)
    frames = jax.random.uniform(jax.random.key(0), (1, 3, *FRAME))
    np.testing.assert_allclose(expected(model.critic(frames).logits_BTA), 0, atol=0.01)


def test_what_does_not_fit_is_refused(world, clone, tmp_path):
    with pytest.raises(
        InputError, match="`seq_len` 6: must be at least the policy's 2 frames, and below the world's 6"
    ):
        improve(world, clone, tmp_path, seq_len=6)
    other = World(dataclasses.replace(LATENT, heads=None), Compute(), nnx.Rngs(1))
    for name, heads, model in (("blind", None, other), ("other", LATENT.heads, World(LATENT, Compute(), nnx.Rngs(1)))):
        folder = tmp_path / name
        folder.mkdir()
        write_parameters(folder, model)
        stored = json.loads((world / "config.json").read_text())
        stored["model"]["heads"] = heads and dataclasses.asdict(heads)
        (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="has no heads"):
        improve(tmp_path / "blind", clone, tmp_path / "out", data_dir=str(world / "data"))
    with pytest.raises(InputError, match="its actions are not those of"):
        improve(tmp_path / "other", clone, tmp_path / "out", data_dir=str(world / "data"))
    with pytest.raises(InputError, match="`stay` -1"):
        train_actor_critic.Config(stay=-1)
