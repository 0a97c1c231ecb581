"""Rewards and ends: in the data, in training, in rollouts, and that each stays with its action.

A counter is the world whose right answers are known: a bright square stands at the place that counts, action 1 moves it
on, the step from 3 to 4 earns 10, and the step from 6 on ends the level.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import export
from agents.planning import Shooter, worth
from agents.worlds import Prompts, Worlds
from evaluation.outcomes import expected_return, judge_seen, measure_heads
from models.dynamics import DynamicsConfig, Seen
from models.ends import ENDED, GOES_ON, LOST, SOLVED, TIME_UP
from models.errors import InputError
from models.genie import World, WorldConfig, model_config, sized
from models.heads import Heads, HeadsConfig, Judged, bins, two_hot
from models.motion import frames_before
from models.nn import Compute
from models.sampling import SamplingConfig, next_frame, start_rollout
from models.tokenizer import TokenizerConfig
from utils.data import ClipSource, batches
from utils.judge import head_names, heads_config, judge
from utils.metrics import average_precision, precision_metrics
from utils.mixture import open_split
from utils.optim import OptimConfig, make_optimizer
from utils.outcomes import ends_of
from utils.records import Clip, Metadata, write_metadata, write_shard

T, EARNS, ENDS = 4, 3, 6
FRAME = (8, 8, 3)
SIZE = {"width": 16, "num_heads": 2, "num_blocks": 1}
TRUE = WorldConfig(
    TokenizerConfig(**SIZE, patch_size=4, num_codes=64, code_width=8, frame_shape=FRAME),
    None,
    DynamicsConfig(**SIZE, num_codes=64, num_patches=4, patch_size=4, num_actions=2, frame_shape=FRAME),
    window=T,
    heads=HeadsConfig(("reward", "end"), sees_action=True),
)
SAMPLING = SamplingConfig(steps=1, temperature=0.0)
SPLITS = ("train", "val")


def picture(count: int) -> np.ndarray:
    """A bright square of 2 × 2 pixels at one of eight places."""
    frame = np.full(FRAME, 20, np.uint8)
    row, column = divmod(count, 4)
    frame[4 * row + 1 : 4 * row + 3, 2 * column : 2 * column + 2] = 250
    return frame


def play(seed: int) -> Clip:
    """A level of the counter, from any place on, with random actions; a quarter of them stops before it ends."""
    rng = np.random.default_rng(seed)
    frames, actions, rewards, count = [], [], [], int(rng.integers(ENDS - 1))
    length = T if seed % 4 == 0 else 99
    while len(frames) < length and not (frames and count > ENDS and len(frames) >= T):
        if count > ENDS:  # too short for a window: once more
            frames, actions, rewards, count = [], [], [], int(rng.integers(ENDS - 1))
        action = int(rng.integers(2))
        frames.append(picture(count))
        actions.append(action)
        rewards.append(10.0 * (count == EARNS and action == 1))
        count += action
    terminated = np.zeros(len(frames), bool)
    terminated[-1] = count > ENDS
    return Clip(
        np.stack(frames),
        f"count-{seed}",
        np.array(actions, np.int32),
        np.array(rewards, np.float32),
        level_seed=seed,
        terminated_T=terminated,
        truncated_T=np.zeros(len(frames), bool),
        success=seed % 2 == 0 if terminated[-1] else None,
    )


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counter")
    levels = {split: [play(i + 1000 * k) for i in range(80)] for k, split in enumerate(SPLITS)}
    splits = {split: (write_shard(folder, f"{split}/0", clips),) for split, clips in levels.items()}
    write_metadata(folder, Metadata("counter", FRAME, 10.0, ("STAY", "ON"), splits, {}))
    return folder


def count_of(frames: np.ndarray) -> np.ndarray:
    """What pictures show."""
    shown = np.stack([picture(i) for i in range(8)]).astype(int)
    return np.abs(frames[..., None, :, :, :].astype(int) - shown).sum(axis=(-3, -2, -1)).argmin(axis=-1)


# The data


def test_each_reward_and_end_comes_with_its_frame_and_action(counter):
    source = ClipSource(counter, "train", T, outcomes=("reward", "end"))
    batch = next(batches(source, 256, seed=0))
    count_BT, on_BT = count_of(batch.frames_BTHWC), batch.actions_BT == 1
    np.testing.assert_array_equal(batch.rewards_BT, 10.0 * ((count_BT == EARNS) & on_BT))
    np.testing.assert_array_equal(batch.ends_BT != GOES_ON, (count_BT == ENDS) & on_BT)
    assert set(np.unique(batch.ends_BT)) == {GOES_ON, LOST, SOLVED}
    plain = ClipSource(counter, "train", T).windows([0], [0.5])
    assert (plain.rewards_BT, plain.ends_BT) == (None, None)  # unless asked for


def test_ends_are_as_frequent_as_in_the_data(counter):
    source = ClipSource(counter, "train", T, outcomes=("end",))
    clips = source.clips(range(len(source)))
    one_of_each = np.mean([bool(clip.terminated_T[-1]) / len(clip) for clip in clips])
    drawn = np.repeat(np.arange(len(clips)), 10), np.tile(np.arange(10) / 10 + 0.05, len(clips))
    assert abs((source.windows(*drawn).ends_BT != GOES_ON).mean() / one_of_each - 1) < 0.15
    plain = ClipSource(counter, "train", T).windows(*drawn)
    last = (count_of(plain.frames_BTHWC) == ENDS) & (plain.actions_BT == 1)
    assert last.mean() < 0.75 * one_of_each  # what windows at random would see
    for start in range(len(clips[0]) - T + 1):
        window = source.windows([0], [source.position(start, len(clips[0]))])
        np.testing.assert_array_equal(window.frames_BTHWC[0], clips[0].frames_THWC[start : start + T])


def test_ways_to_end():
    clip = play(1)
    last = lambda **fields: ends_of(dataclasses.replace(clip, **fields))[-1]
    late = np.arange(len(clip)) == len(clip) - 1
    assert (last(success=True), last(success=False), last(success=None)) == (SOLVED, LOST, ENDED)
    assert last(truncated_T=late) == TIME_UP
    assert last(terminated_T=~late & late, truncated_T=None) == GOES_ON


def test_exported_clips_end_where_their_levels_do(counter, tmp_path):
    """Cut clips keep the reward and the end of each frame that is left."""
    export.write_clips(tmp_path, str(counter), 12, T, 0)
    source = ClipSource(tmp_path, "val", T, outcomes=("reward", "end"))
    for clip in source.clips(range(len(source))):
        count_T, on_T = count_of(clip.frames_THWC), clip.actions_T == 1
        np.testing.assert_array_equal(clip.terminated_T, (count_T == ENDS) & on_T)
        np.testing.assert_array_equal(clip.rewards_T, 10.0 * ((count_T == EARNS) & on_T))


def test_what_a_dataset_does_not_tell_is_said(counter, dataset):
    with pytest.raises(InputError, match=r"`heads`: .*train has no ends \(`terminated`\) to learn from"):
        ClipSource(dataset, "train", T, outcomes=("reward", "end"))
    assert ClipSource(dataset, "train", T).tells(["reward"])
    assert not ClipSource(dataset, "train", T).tells(["end"])
    with pytest.raises(InputError, match="there is no head size; choose of reward, end"):
        head_names("reward,size")
    assert heads_config("", True) is None
    mixed = open_split(f"{counter}:1,{counter}:3", "train", T, outcomes=("end",))
    batch = next(batches(mixed, 64, seed=0))
    count_BT = count_of(batch.frames_BTHWC)
    np.testing.assert_array_equal(batch.ends_BT != GOES_ON, (count_BT == ENDS) & (batch.actions_BT == 1))


# The heads


def test_two_hot_rewards_have_their_mean():
    rewards = np.array([0.0, 10.0, -3.0, 0.02, 1234.5], np.float32)
    hot = np.asarray(two_hot(jnp.asarray(rewards)))
    np.testing.assert_allclose(hot @ bins(), rewards, rtol=1e-5, atol=1e-6)
    assert ((hot > 0).sum(axis=1) <= 2).all()


def test_an_end_that_is_not_told_counts_either_way():
    heads = Heads(HeadsConfig(("end",), False), 4, 16, Compute(), nnx.Rngs(0))
    heads.end.out.bias[...] = jnp.array([0.3, -0.5, 1.0])
    hidden = jax.random.normal(jax.random.key(0), (1, 1, 4, 16))
    losses = [
        float(heads.loss(hidden, hidden[:, :, 0], jnp.zeros((1, 1)), jnp.array([[way]]))[0])
        for way in (GOES_ON, LOST, SOLVED, ENDED, TIME_UP)
    ]
    judged = heads(hidden, hidden[:, :, 0])
    end, solved = float(judged.end_X[0, 0]), float(judged.solved_X[0, 0])
    np.testing.assert_allclose(np.exp(-np.array(losses)), [1 - end, end - solved, solved, end, 1.0], rtol=1e-5)
    assert float(judged.reward_X[0, 0]) == 0.0  # there is no such head


def seen_of(world: World, frames: jax.Array, actions_BTm1: jax.Array) -> Seen:
    last = frames_before(frames)
    return Seen(world.tokenizer.encode(frames, last), frames, last, actions_BTm1)


@pytest.fixture(scope="module")
def taught(counter) -> tuple[World, set[str]]:
    """A world of the counter whose heads have learned it, and the parts of it that their loss moves: all might."""
    world = World(TRUE, Compute(), nnx.Rngs(3))
    tokens = world.tokenizer.encode(jnp.stack([jnp.asarray(picture(i)) for i in range(8)])[:, None] / 255)
    assert len(np.unique(np.asarray(tokens).reshape(8, -1), axis=0)) == 8, "the tokens tell the pictures apart"
    graphdef, params, rest = nnx.split(world, nnx.Param, ...)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            world = nnx.merge(graphdef, params, rest)
            frames = batch.frames_BTHWC.astype(jnp.float32) / 255
            return judge(world, seen_of(world, frames, batch.actions_BT[:, :-1]), batch, True)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    source, state = ClipSource(counter, "train", T, outcomes=("reward", "end")), optimizer.init(params)
    stream, before = batches(source, 64, seed=0), params
    for _ in range(200):
        params, state = step(params, state, next(stream))
    same = lambda part: all(map(np.array_equal, *(jax.tree.leaves(of[part]) for of in (before, params))))
    return nnx.merge(graphdef, params, rest), {part for part in params if not same(part)}


@pytest.fixture(scope="module")
def trained(taught) -> World:
    return taught[0]


def test_a_counter_is_judged_right_in_play(trained):
    """From the data through training to a step: observation, action, reward and end are those of one another."""
    prompts = Prompts(np.stack([picture(i) for i in range(7)])[:, None], np.zeros((7, 0), np.int32))
    worlds, never = Worlds(trained, SAMPLING, prompts), np.zeros(7, bool)
    states, frames = worlds.start(range(7))
    np.testing.assert_array_equal(count_of(np.asarray(frames)), range(7))
    for action in (0, 1):
        out = worlds.step(states, np.full(7, action), jax.random.key(0), never, np.zeros(7))
        earned, ended = 10.0 * (np.arange(7) == EARNS) * action, (np.arange(7) == ENDS) * action
        np.testing.assert_allclose(out.judged.reward_X, earned, atol=1.5)
        np.testing.assert_allclose(out.judged.end_X, ended, atol=0.2)
        np.testing.assert_allclose(out.judged.solved_X, 0.5 * ended, atol=0.25)  # even seeds are solved


def test_plans_go_where_the_reward_is(trained):
    """From 3, only plans that begin with 1 are worth something; at 6, losing half of the time is worth less than 0."""
    shooter = Shooter(trained, SAMPLING)
    plans = np.array([[0], [1]], np.int32)
    frames = np.stack([np.repeat(picture(count)[None], 2, axis=0) for count in (EARNS, ENDS, 0)])
    worths = shooter(frames, np.zeros((3, 1), np.int32), np.repeat(plans[None], 3, axis=0))
    np.testing.assert_allclose(worths, [[0, 10], [0, -2.5], [0, 0]], atol=1.5)


def test_heads_learn_without_teaching(taught):
    """Their loss moves nothing else, and a clip of their gradients slows nothing else down."""
    assert taught[1] == {"heads"}
    optimizer = make_optimizer(OptimConfig(grad_clip=0.1, warmup_steps=0), 10)
    small = {"dynamics": {"kernel": jnp.array([[0.03, 0.04]])}, "heads": {"kernel": jnp.array([[30.0, 40.0]])}}
    alone = {"dynamics": small["dynamics"]}
    both, one = (optimizer.update(x, optimizer.init(x), x)[1] for x in (small, alone))
    mu = lambda state: optax.tree.get(state, "mu")
    np.testing.assert_array_equal(mu(both)["dynamics"]["kernel"], mu(one)["dynamics"]["kernel"])
    np.testing.assert_allclose(np.linalg.norm(mu(both)["heads"]["kernel"]), 0.1 * np.linalg.norm([0.1]), rtol=1e-5)


def test_a_judgement_knows_what_came_before_it_alone():
    """The action judged, if it is a true one, and frames up to it; no later frame or action."""
    world = World(TRUE, Compute(), nnx.Rngs(1))
    out = world.heads.reward.out
    out.kernel[...] = jax.random.normal(jax.random.key(1), out.kernel.shape)
    frames = np.asarray(jax.random.randint(jax.random.key(0), (1, T, *FRAME), 0, 256), np.uint8)
    judged_of = jax.jit(lambda frames, actions: judge_seen(world, frames, actions).reward_X[0])
    actions = np.array([[0, 1, 0, 1]], np.int32)
    before = judged_of(frames, actions)
    changed = lambda *given: np.flatnonzero(np.asarray(judged_of(*given) != before)).tolist()
    other = frames.copy()
    other[:, 2] = 255 - other[:, 2]
    assert changed(other, actions) == [2, 3]
    assert changed(frames, actions ^ np.array([[0, 1, 0, 0]])) == [1, 2, 3]
    hidden, blind = jax.random.normal(jax.random.key(2), (1, 4, 16)), HeadsConfig(("reward",), sees_action=False)
    heads = Heads(blind, 4, 16, Compute(), nnx.Rngs(0))
    heads.reward.out.kernel[...] = out.kernel[...]
    np.testing.assert_array_equal(heads(hidden, hidden[:, 0])[0], heads(hidden, hidden[:, 1])[0])


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_a_flow_is_judged_without_tokens(counter, space):
    """Each action after the second frame by what a rollout from the true frames up to there says."""
    mae = TokenizerConfig(**SIZE, patch_size=4, code_width=8, frame_shape=FRAME, kind="mae", rotary_space=True)
    tokenizer = mae if space == "latents" else None
    flow = sized(DynamicsConfig(**SIZE, kind="flow", space=space, patch_size=4, num_actions=2), tokenizer, FRAME)
    world = World(dataclasses.replace(TRUE, tokenizer=tokenizer, dynamics=flow), Compute(), nnx.Rngs(0))
    out = world.heads.reward.out
    out.kernel[...] = jax.random.normal(jax.random.key(1), out.kernel.shape)
    clips = ClipSource(counter, "val", T).windows([0, 1], [0.0, 0.0])
    judged = jax.jit(lambda *given: judge_seen(world, *given).reward_X)(clips.frames_BTHWC, clips.actions_BT)

    @jax.jit
    def last(frames, actions_BT):
        state = start_rollout(world, frames.astype(jnp.float32) / 255, actions_BT[:, :-1])
        return world.judge(state, actions_BT[:, -1]).reward_X

    for t in (2, T - 1):
        there = last(clips.frames_BTHWC[:, :t], clips.actions_BT[:, :t])
        np.testing.assert_allclose(judged[:, t - 1], there, rtol=1e-4, atol=1e-4)
    assert measure_heads(world, ClipSource(counter, "val", T), SAMPLING, 8, 4, 0).figures


@pytest.mark.parametrize("kind", ["maskgit", "maskgit_head", "causal", "flow"])
def test_hidden_states_of_a_rollout_are_those_of_the_clip(kind):
    """What `next_frame` keeps for the heads equals a pass over all frames."""
    config = dataclasses.replace(TRUE, dynamics=dataclasses.replace(TRUE.dynamics, kind=kind, sees_picture=True))
    config = dataclasses.replace(config, tokenizer=None) if kind == "flow" else config
    world = World(config, Compute(), nnx.Rngs(0))
    frames, actions = jax.random.uniform(jax.random.key(0), (2, 2, *FRAME)), jnp.array([[0, 1], [1, 1]])

    @jax.jit
    def both(frames, actions):
        state = start_rollout(world, frames, actions[:, :1])
        picture, after = next_frame(world, state, actions[:, 1], jax.random.key(1), SAMPLING)
        clip = jnp.concatenate([frames, picture[:, None]], axis=1)
        tokens = None
        if world.tokenizer:
            tokens = jnp.concatenate([world.tokenizer.encode(frames), after.tokens_BN[:, None]], axis=1)
        whole = world.dynamics.hidden(Seen(tokens, clip, frames_before(clip), actions))
        return whole[:, 1:], jnp.stack([state.hidden_BNM, after.hidden_BNM], axis=1)

    np.testing.assert_allclose(*both(frames, actions), atol=1e-4)


def test_a_world_without_heads_says_nothing():
    config = dataclasses.replace(TRUE, heads=None)
    world = World(config, Compute(), nnx.Rngs(0))
    state = start_rollout(world, jnp.zeros((1, 1, *FRAME)), jnp.zeros((1, 0), jnp.int32))
    assert state.hidden_BNM is None
    assert [float(x[0]) for x in world.judge(state, jnp.array([1]))] == [0.0, 0.0, 0.0]
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    del stored["heads"]  # as from before there were any
    assert model_config("world", stored) == config
    assert model_config("world", json.loads(json.dumps(dataclasses.asdict(TRUE)))) == TRUE


# Their measure


def test_average_precision():
    score, label = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert average_precision(score, label) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.zeros(8), np.arange(8) % 4 == 0) == 0.25  # all alike: the base rate
    assert average_precision(score, np.array([1, np.nan, 1, 0])) == 1.0
    rows = np.stack([score, label], axis=-1).reshape(2, 2, 2)
    assert precision_metrics("x", rows) == {"x_base": 0.5, "x": pytest.approx(5 / 6)}
    assert precision_metrics("x", rows * 0) == {"x_base": 0.0}


def test_returns_stop_at_an_end():
    judged = Judged(*(jnp.array([row]) for row in ([1.0, 2.0, 4.0], [0.5, 1.0, 0.0], [0.5, 0.0, 0.0])))
    np.testing.assert_allclose(expected_return(judged), [1 + 0.5 * 2])
    np.testing.assert_allclose(worth(judged), [1 + 0.99 * 0.5 * (2 - 5)], rtol=1e-6)


def test_what_is_known_is_measured_as_known(trained, counter):
    measured = measure_heads(trained, ClipSource(counter, "val", T), SAMPLING, 120, 40, 0)
    figures = {name: figure.mean for name, figure in measured.figures.items()}
    assert figures["reward_ap"] > 0.9 > 0.3 > figures["reward_base_rate"]
    assert figures["end_ap"] > 0.9 > 0.3 > figures["end_base_rate"]
    assert figures["rollout_reward_ap"] > figures["rollout_reward_base_rate"]  # its first step is right
    assert figures["return_correlation"] > 0.1
    without = World(dataclasses.replace(TRUE, heads=None), Compute(), nnx.Rngs(0))
    assert not measure_heads(without, ClipSource(counter, "val", T), SAMPLING, 8, 8, 0).figures
