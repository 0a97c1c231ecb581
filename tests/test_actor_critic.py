"""Policies that learn in a world: in one whose right answers are known, and by the script on one that was trained.

The known one is a counter: a bright square stands at the place that counts, action 1 moves it on; the step from 3 to 4
earns 10, the step from 6 on ends the level, lost.
"""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evaluate_policy
import train_actor_critic
import train_policy
from agents.imagination import LAMBDA, Imagined, expected, imagine_by, lambda_returns, targets
from agents.labels import in_windows, label
from agents.planning import DISCOUNT, LOSS
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import (
    CONFIG_VERSION,
    ActorCritic,
    ActorCriticConfig,
    World,
    WorldConfig,
    load,
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
from tests.test_train import losses
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
    """The counter as a world; its state is the count.

    asked: Prompts and the actions between, of the last start.
    """

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))  # which nothing may teach
        self.cfg = dataclasses.replace(TRUE, window=5)
        self.tokenizer = self.lam = None
        self.dynamics = self

    def start(self, tokenizer, frames, actions, window):
        assert frames.shape[1] == actions.shape[1] + 1
        each = picture(jnp.arange(PLACES)).reshape(PLACES, -1)
        return jnp.argmax(frames[:, -1].reshape(len(frames), -1) @ each.T, axis=-1)

    def next_frame(self, tokenizer, count_B, action_B, key, sampling):
        return self.scale[...] * picture(count_B + action_B), count_B + action_B

    def judge(self, count_B, action_B):
        ends = ((count_B >= ENDS) & (action_B == 1)).astype(jnp.float32)
        return Judged(10.0 * ((count_B == EARNS) & (action_B == 1)), ends, 0.0 * ends)


def prompts(counts) -> jax.Array:
    """Frames before a count, and that: more than a choice sees."""
    return picture(jnp.array(counts)[:, None] + jnp.array([-2, -1, 0]))


def rollouts(counts, horizon: int) -> Imagined:
    policy, frames, actions = Policy(POLICY, Compute(), nnx.Rngs(0)), prompts(counts), jnp.ones((len(counts), 2), int)
    play = lambda frames, key: imagine_by(policy, Counter(), frames, actions, horizon, key, SAMPLING)
    return jax.jit(play)(frames, jax.random.key(0))


def test_what_is_imagined_belongs_together():
    """Action h was chosen after frame h and led to frame h + 1, and what is judged is that action from frame h."""
    counts = np.array([2, 3, 4, 5, 6] * 5)
    frames, actions_BS, judged = rollouts(counts, horizon=4)
    count_BSp1 = count_of(frames[:, POLICY.context - 1 :])
    before_BS, actions_BS = count_BSp1[:, :-1], np.asarray(actions_BS)
    assert len(np.unique(actions_BS)) == 2
    np.testing.assert_array_equal(np.minimum(before_BS + actions_BS, PLACES - 1), count_BSp1[:, 1:])
    np.testing.assert_array_equal(judged.reward_X, 10.0 * ((before_BS == EARNS) & (actions_BS == 1)))
    np.testing.assert_array_equal(judged.end_X, (before_BS >= ENDS) & (actions_BS == 1))
    np.testing.assert_array_equal(count_of(frames[:, :2]), np.stack([counts - 1, counts], axis=1))  # of the prompt


def test_choices_see_what_was_imagined():
    """Drawn from the policy's own distribution over what stands before each action."""
    policy = Policy(POLICY, Compute(), nnx.Rngs(0))
    policy.action_out.kernel[...] = 50.0 * jax.random.normal(jax.random.key(5), policy.action_out.kernel.shape)
    frames, actions = prompts(range(2, PLACES)), jnp.ones((PLACES - 2, 2), int)
    imagined = jax.jit(lambda key: imagine_by(policy, Counter(), frames, actions, 5, key, SAMPLING))(jax.random.key(0))
    shares = jax.nn.softmax(policy(imagined.frames_BTHWC[:, :-1]).logits_BTA)
    taken = jnp.take_along_axis(shares, imagined.actions_BS[..., None], axis=-1)
    sure = np.asarray(shares.max(axis=-1)) > 0.999
    assert sure.sum() > 10
    assert (np.asarray(taken)[..., 0][sure] > 0.5).all()


def test_returns_by_hand():
    reward, goes_on = np.array([1.0, 0.0, 4.0]), np.array([1.0, 0.5, 0.0])
    values = np.array([7.0, 2.0, 3.0, 100.0])
    last = 4.0  # the level is over: what comes after counts nothing
    middle = 0.0 + DISCOUNT * 0.5 * ((1 - LAMBDA) * 3.0 + LAMBDA * last)
    first = 1.0 + DISCOUNT * ((1 - LAMBDA) * 2.0 + LAMBDA * middle)
    found = lambda_returns(*(jnp.asarray(x)[None] for x in (reward, goes_on, values)))
    np.testing.assert_allclose(found, [[first, middle, last]], rtol=1e-6)


def actor_critic() -> ActorCritic:
    model = ActorCritic(ActorCriticConfig(AgentConfig(POLICY, None), TRUE), Compute(), nnx.Rngs(0))
    model.world = Counter()
    return model


def test_targets_count_losses_and_stop_at_an_end():
    imagined = rollouts([ENDS] * 16, horizon=6)
    told = jax.jit(lambda imagined: targets(actor_critic(), imagined))(imagined)
    ended_BS = np.asarray(imagined.judged.end_X) == 1
    assert ended_BS.any(axis=1).sum() > 10
    np.testing.assert_array_equal(told.reached_BS[:, 0], 1)
    np.testing.assert_array_equal(told.reached_BS[:, 1:], 1 - np.maximum.accumulate(ended_BS, axis=1)[:, :-1])
    np.testing.assert_allclose(told.returns_BS[ended_BS], -LOSS, atol=1e-5)


def test_an_advantage_is_over_the_value_of_the_frame_before_the_action():
    imagined, model = rollouts([2, 3, 4, 5, 6], horizon=4), actor_critic()
    model.critic.action_out.kernel[...] = (
        jax.random.normal(jax.random.key(1), model.critic.action_out.kernel.shape) / 10
    )
    told, values = jax.jit(lambda x: (targets(model, x), expected(model.critic(x.frames_BTHWC).logits_BTA)))(imagined)
    assert values.shape == (5, 5)
    assert np.ptp(values) > 0.01
    spread = max(float(np.subtract(*np.percentile(told.returns_BS, [95, 5]))), 1.0)
    np.testing.assert_allclose(told.advantages_BS * spread, told.returns_BS - values[:, :4], rtol=1e-4, atol=1e-4)


def test_a_critic_says_what_it_was_told():
    logits = jnp.log(two_hot(jnp.array([-3.0, 0.0, 7.5])) + 1e-9)
    assert logits.shape == (3, BINS)
    np.testing.assert_allclose(expected(logits), [-3.0, 0.0, 7.5], atol=1e-3)


def test_a_policy_learns_what_a_counter_pays():
    """It goes on where that earns, and stays where it would be lost; the clone and the world stay as they are."""
    cfg = train_actor_critic.Config(horizon=4, seq_len=3, kl_weight=0.0, entropy_weight=0.01)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_steps=1, decay_steps=1, weight_decay=0.0), 10_000)
    state = TrainState.create(actor_critic(), train_actor_critic.TRAINABLE, optimizer, ema=False)
    assert set(state.params) == {"agent", "critic"}
    before = jax.tree.map(np.array, nnx.to_pure_dict(state.rest))
    counts = np.arange(64) % (ENDS + 1)
    batch = Batch(np.asarray(prompts(counts) * 255, np.uint8), np.ones((64, 3), np.int32))
    step = jax.jit(lambda state, key: train_actor_critic.train_step(state, batch, key, cfg, SAMPLING))
    for i in range(60):
        state, metrics = step(state, jax.random.key(i))
    policy = state.model().agent.policy
    goes_on = np.asarray(jax.nn.softmax(policy(prompts(range(ENDS + 1))).logits_BTA)[:, -1, 1])
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
    train_policy.main(dataclasses.replace(cfg, decisions=0, model=dataclasses.replace(POLICY, num_actions=0)))
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


def test_what_comes_of_it_is_an_agent(improved, clone, world):
    before, after = variables(load_agent(clone)), variables(load_agent(improved))
    jax.tree.map(np.testing.assert_array_equal, before["lam"], after["lam"])
    whole = load(improved, "actor_critic")
    jax.tree.map(np.testing.assert_array_equal, variables(whole.clone), before["policy"])
    jax.tree.map(np.testing.assert_array_equal, variables(whole.world), variables(load_world(world)))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["policy"], after["policy"])
    assert any(jax.tree.leaves(moved))
    rows = [json.loads(line) for line in (improved / "metrics.jsonl").read_text().splitlines()]
    told = next(row for row in rows if "val_worth" in row)
    assert {"val_worth_of_clone", "val_solved", "val_ended_of_clone", "val_divergence"} <= set(told)
    agent = load_agent(improved)
    assert in_windows(agent, str(improved)).seq_len == 4  # as in its training
    whole.agent.cfg = dataclasses.replace(agent.cfg, policy=dataclasses.replace(POLICY, context=4))
    assert in_windows(whole.agent, str(improved)).seq_len == 6  # who sees four frames looks around the step after them
    assert len(label(agent, in_windows(agent, str(improved)), 4, 0).actions_N) == 4
    with pytest.raises(InputError, match="holds an actor_critic, but a world is needed"):
        load_world(improved)


def test_who_it_was_before_plays_beside_it(improved, clone):
    before = evaluate_policy.clone_of(str(improved))
    jax.tree.map(np.testing.assert_array_equal, variables(before), variables(load_agent(clone)))
    assert evaluate_policy.clone_of(str(clone)) is None


def test_it_resumes_exactly(improved, world, clone, tmp_path, capsys):
    resumed = tmp_path / "resumed"
    shutil.copytree(improved, resumed)
    shutil.rmtree(resumed / "4")
    improve(world, clone, resumed)
    assert "at step 2" in capsys.readouterr().out
    assert losses(resumed) == losses(improved)
    whole = (variables(load(folder, "actor_critic")) for folder in (improved, resumed))
    jax.tree.map(np.testing.assert_array_equal, *whole)


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
    for seq_len in (2, 6):
        with pytest.raises(InputError, match=f"`seq_len` {seq_len}: must be above 2"):
            improve(world, clone, tmp_path, seq_len=seq_len)
    other = World(dataclasses.replace(LATENT, heads=None), Compute(), nnx.Rngs(1))
    for name, heads, model in (("blind", None, other), ("other", LATENT.heads, World(LATENT, Compute(), nnx.Rngs(1)))):
        folder = tmp_path / name
        folder.mkdir()
        write_parameters(folder, model)
        stored = json.loads((world / "config.json").read_text())
        stored["model"]["heads"] = heads and dataclasses.asdict(heads)
        (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="has no head for rewards"):
        improve(tmp_path / "blind", clone, tmp_path / "out", data_dir=str(world / "data"))
    with pytest.raises(InputError, match="its 3 actions are not the 3 of"):
        improve(tmp_path / "other", clone, tmp_path / "out", data_dir=str(world / "data"))
    with pytest.raises(InputError, match="`kl_weight` -1"):
        train_actor_critic.Config(kl_weight=-1)
