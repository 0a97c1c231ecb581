"""Clips shorter than a training's (`--pad_short`): what fills them up changes nothing, and each true frame counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train_dynamics
import train_lam
import train_tokenizer
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.fsq import FiniteScalarQuantizer
from models.genie import World, WorldConfig
from models.lam import LAM, LAMConfig
from models.nn import Compute
from models.tokenizer import Tokenizer, TokenizerConfig
from models.vq import VectorQuantizer
from sources.tokens import TokenOptions, _encoder, windows
from tests.conftest import FRAME, make_clip
from tests.test_data import assert_same, take
from tests.test_mixture import coloured
from utils.action_source import JointActions, LearnedActions, TrueActions
from utils.data import Batch, ClipSource, batches
from utils.mixture import open_splits
from utils.optim import make_optimizer
from utils.records import Metadata, TokenInfo, write_metadata, write_shard
from utils.state import TrainState

SHAPE, T = (8, 8, 3), 4
SIZE = {"width": 8, "num_heads": 2, "num_blocks": 1, "rotary_space": True}
CODES = {"patch_size": 4, "num_codes": 8, "code_width": 4, "motion_reach": 2, "frame_shape": SHAPE}
TOKENIZER = TokenizerConfig(**SIZE, **CODES, closed_loop=True, picture_blur=1.0, picture_noise=0.1, reset_after=1)
LAM_CONFIG = LAMConfig(**SIZE, **CODES, unquantized_steps=0, reset_after=1)
DYNAMICS = DynamicsConfig(
    **SIZE, num_codes=8, num_patches=4, num_actions=8, sees_picture=True, patch_size=4, frame_shape=SHAPE
)
LENGTHS = (4, 2, 3, 2)


def folder_of(folder, lengths, splits=("train", "val"), names=("LEFT", "RIGHT")):
    clips = [make_clip(10 * n + i, n) for i, n in enumerate(lengths)]
    shards = {split: (write_shard(folder, f"{split}/0.array_record", clips),) for split in splits}
    write_metadata(folder, Metadata("squares", FRAME, 10.0, names, shards, {}))
    return folder


def batch_of(lengths=LENGTHS, filling=0) -> Batch:
    """Clips of these lengths; what fills them up is told by `filling`."""
    true_BT = np.arange(T) < np.array(lengths)[:, None]
    rng, other = np.random.default_rng(0), np.random.default_rng(filling)
    frames, fill = (r.integers(0, 256, (len(lengths), T, *SHAPE), np.uint8) for r in (rng, other))
    actions, fill_in = (r.integers(0, 8, (len(lengths), T), np.int32) for r in (rng, other))
    led_BT = np.roll(true_BT, -1, axis=1) & true_BT  # an action that leads out of a clip says nothing either
    return Batch(
        jnp.asarray(np.where(true_BT[:, :, None, None, None], frames, fill)),
        jnp.asarray(np.where(led_BT, actions, fill_in)),
        weight_BT=jnp.asarray(true_BT, jnp.float32),
    )


def training(kind: str):
    """A compiled step of a training, and the state that it begins with."""
    if kind == "tokenizer":
        cfg = train_tokenizer.Config(model=TOKENIZER, learning_rate=0.1, warmup_steps=0)
        model, trainable, step = Tokenizer(TOKENIZER, Compute(), nnx.Rngs(0)), nnx.Param, train_tokenizer.train_step
    elif kind == "lam":
        cfg = train_lam.Config(model=LAM_CONFIG, learning_rate=0.1, warmup_steps=0, grad_accum=2)
        model, trainable, step = LAM(LAM_CONFIG, Compute(), nnx.Rngs(0)), nnx.Param, train_lam.train_step
    else:
        dynamics, tokenizer, joint = dataclasses.replace(DYNAMICS, kind=kind), TOKENIZER, kind == "flow"
        source = LearnedActions(LAM_CONFIG, 0.1) if kind == "maskgit" else TrueActions()
        if joint:
            source = JointActions(dataclasses.replace(LAM_CONFIG, own_decoder=False), 0.1)
            dynamics = dataclasses.replace(dynamics, sees_picture=False, action_width=LAM_CONFIG.code_width)
            tokenizer = None
        cfg = train_dynamics.Config(model=dynamics, joint_lam=joint, learning_rate=0.1, warmup_steps=0)
        cfg = dataclasses.replace(cfg, lam=source.lam or LAM_CONFIG)
        model = World(WorldConfig(tokenizer, source.lam, dynamics, window=T), Compute(), nnx.Rngs(0))
        trainable, step = source.trainable, lambda *given: train_dynamics.train_step(*given, source)
    state = TrainState.create(model, trainable, make_optimizer(cfg, 10), ema=False)
    return jax.jit(lambda state, batch, key: step(state, batch, key, cfg)), state


@pytest.mark.parametrize("kind", ["tokenizer", "lam", "maskgit", "maskgit_head", "causal", "flow"])
def test_nothing_is_learned_of_what_fills_a_clip_up(kind):
    """Parameters, codebooks and metrics are the same to the bit, whatever it is."""
    run, state = training(kind)
    found = []
    for filling in (1, 2):
        after, metrics = state, {}
        for i in range(2):
            after, metrics = run(after, batch_of(filling=filling), jax.random.key(i))
        found.append((after.params, after.rest, metrics))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.isfinite(value) for value in found[0][2].values())


def test_the_loss_is_a_mean_over_true_frames_whatever_the_parts():
    model = Tokenizer(dataclasses.replace(TOKENIZER, closed_loop=False, motion_reach=0), Compute(), nnx.Rngs(0))
    cfg = train_tokenizer.Config(model=model.cfg)
    lengths = (4, 2)
    batch = batch_of(lengths)
    nothing = train_tokenizer.Drawn(None, None, None)
    step = jax.jit(lambda b: train_tokenizer.loss_fn(model, (b, nothing), cfg, None)[0])
    loss = lambda b: float(step(b))
    even, _ = train_tokenizer.draw(batch, jax.random.key(0), cfg.model)
    alone = [loss(Batch(batch.frames_BTHWC[i : i + 1, :n])) for i, n in enumerate(lengths)]
    assert loss(even) == pytest.approx(np.average(alone, weights=lengths), rel=1e-5)
    parts = [loss(jax.tree.map(lambda x, i=i: x[i::2], even)) for i in range(2)]
    assert np.mean(parts) == pytest.approx(loss(even), rel=1e-5)


@pytest.mark.parametrize("kind", ["codebook", "grid"])
def test_a_quantiser_learns_as_if_only_the_true_latents_were_there(kind):
    z = jax.random.normal(jax.random.key(0), (5, 3, 2)) + 1.0
    true = jnp.array([[1.0, 1.0, 0.0]] * 5)
    found = []
    for latents, weight in ((z, true), (z[:, :2], None)):
        vq = (
            VectorQuantizer(4, 2, 0.5, 0, nnx.Rngs(0), centred=True)
            if kind == "codebook"
            else FiniteScalarQuantizer((3, 3), 0.5, centred=True)
        )
        out = vq(latents, train=True, weight_X=None if weight is None else weight / weight.mean())
        vq.update(out.latents_XL, out.codes_X, jax.random.key(1), weight)
        found.append((out.codes_X[:, :2], out.vectors_XL[:, :2], out.commitment, nnx.state(vq)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)


def test_idle_codes_move_to_true_latents_alone():
    vq = VectorQuantizer(6, 2, 0.9, 1, nnx.Rngs(0))
    latents = jnp.concatenate([jnp.tile(jnp.array([[1.0, 0.0]]), (2, 1)), jnp.tile(jnp.array([[0.0, 1.0]]), (6, 1))])
    vq.update(latents, jnp.zeros(8, jnp.int32), jax.random.key(0), jnp.array([1.0] * 2 + [0.0] * 6))
    np.testing.assert_allclose(vq.codebook_KL[1:], np.tile([[1.0, 0.0]], (5, 1)), atol=1e-6)


def test_short_clips_join_and_end_with_their_last_frame(tmp_path):
    folder = folder_of(tmp_path, [9, 6, 3, 1])
    assert [len(ClipSource(folder, "train", 6, shortest=n)) for n in (0, 1, 2, 6, 9)] == [2, 4, 3, 2, 2]
    assert_same(
        take(batches(ClipSource(folder, "train", 6, shortest=6), 4, seed=1), 3),
        take(batches(ClipSource(folder, "train", 6), 4, seed=1), 3),
    )
    source = ClipSource(folder, "train", 6, shortest=1)
    batch, clips = source.windows(range(4), [0.9] * 4), source.clips(range(4))
    assert batch.weight_BT.sum(axis=1).tolist() == [6, 6, 3, 1]
    np.testing.assert_array_equal(batch.frames_BTHWC[0], clips[0].frames_THWC[3:])
    for frames, clip in zip(batch.frames_BTHWC[2:], clips[2:], strict=True):
        np.testing.assert_array_equal(frames, clip.frames_THWC[np.minimum(np.arange(6), len(clip) - 1)])
    straight = take(batches(source, 4, seed=5), 6)
    assert_same(take(batches(source, 4, seed=5, start=3), 3), straight[3:])
    halves = [take(batches(source, 4, seed=5, rows=rows), 6) for rows in ([0, 1], [2, 3])]
    for whole, one, two in zip(straight, *halves, strict=True):
        np.testing.assert_array_equal(whole.weight_BT, np.concatenate([one.weight_BT, two.weight_BT]))


def test_validations_take_whole_clips_and_say_when_there_are_none(tmp_path):
    pictures, short = folder_of(tmp_path / "pictures", [1, 1], ("train",)), folder_of(tmp_path / "short", [3, 3])
    whole = coloured(tmp_path / "whole", 10, 3, ("JUMP", "RIGHT"))
    train, val = open_splits(f"{short}:0.5,{whole}:0.5", 6, shortest=2)
    assert set(next(batches(train, 8, seed=0)).weight_BT.sum(axis=1).tolist()) == {3, 6}
    batch = next(batches(val, 8, seed=0))
    assert batch.weight_BT is None
    assert set(batch.frames_BTHWC[:, 0, 0, 0, 0].tolist()) == {10}
    assert set(batch.actions_BT.reshape(-1).tolist()) == {1, 2}  # numbered as in the training: LEFT, RIGHT, JUMP
    _, val = open_splits(f"{pictures}:0.5,{whole}:0.5", 6, shortest=1)  # of pictures none is held out
    assert next(batches(val, 2, seed=0)).weight_BT is None
    with pytest.raises(InputError, match=r"`seq_len` 6: the longest clip in .*short/val has 3 frames"):
        open_splits(str(short), 6, shortest=2)
    with pytest.raises(InputError, match=r"pictures: the longest clip in its train split has 1 frame, and 2 are"):
        open_splits(str(pictures), 6, shortest=2)


def test_tokens_of_a_short_clip_are_its_own(tmp_path):
    """Filled up and encoded beside longer ones, stored, and read for a training."""
    frames = folder_of(tmp_path / "frames", [9, 6, 3], names=None)
    cfg = dataclasses.replace(TOKENIZER, frame_shape=FRAME, closed_loop=False)
    tokenizer, lam = (
        Tokenizer(cfg, Compute(), nnx.Rngs(0)),
        LAM(dataclasses.replace(LAM_CONFIG, frame_shape=FRAME), Compute(), nnx.Rngs(1)),
    )
    clips = list(windows(ClipSource(frames, "train", 6, shortest=2), 6))
    made = _encoder(tokenizer, lam, 4, 6)(clips)
    assert [len(clip) for clip in made] == [6, 6, 6, 3]
    assert [clip.clip_id.split("@")[1] for clip in made] == ["0", "3", "0", "0"]  # the last one ends with its clip
    short = clips[3].frames_THWC[None] / 255
    np.testing.assert_array_equal(made[3].tokens_TN, tokenizer.encode(short)[0])
    np.testing.assert_array_equal(made[3].latent_actions_T[:2], lam.infer(short)[0])
    shard = write_shard(tmp_path / "tokens", "train/0.array_record", made)
    tokens = TokenInfo("a", "b", 6, str(frames))
    write_metadata(tmp_path / "tokens", Metadata("squares", FRAME, 10.0, None, {"train": (shard,)}, {}, tokens))
    assert len(ClipSource(tmp_path / "tokens", "train", 6, tokens_too=True)) == 3
    batch = ClipSource(tmp_path / "tokens", "train", 6, tokens_too=True, shortest=2).windows(range(4), [0.0] * 4)
    assert batch.weight_BT.sum(axis=1).tolist() == [6, 6, 6, 3]
    np.testing.assert_array_equal(batch.tokens_BTN[3, :3], made[3].tokens_TN)
    assert TokenOptions().pad_short is False
