"""Every measure on cases with a known answer; evaluate.py as a whole."""

import html
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy
from flax import nnx

import evaluate
from evaluation import table
from evaluation.actions import action_labels, measure_meaning, merge_actions
from evaluation.charts import Chart, HeatMap, Line, chart_svg
from evaluation.clips import choose_clips, digest, in_batches
from evaluation.codes import mean_patches, measure_codes
from evaluation.comparison import comparison
from evaluation.control import measure_control, strung_actions
from evaluation.distribution import measure_distribution
from evaluation.fidelity import Scores, frame_metrics, measure_fidelity
from evaluation.measured import Measured, Picture, of_clips
from evaluation.page import Section, Table, write_page
from evaluation.rollouts import Player, measure_changed, measure_rollouts, play_on, roll_lam
from evaluation.sampling import measure_sampling
from evaluation.stability import measure_stability
from evaluation.statistics import (
    adjusted_mutual_information,
    best_map,
    contingency,
    difference,
    figure,
    frechet_distance,
    jackknife,
)
from evaluation.suite import from_other_levels
from evaluation.worlds import names_of
from models.dynamics import DynamicsConfig
from models.errors import InputError
from models.genie import CONFIG_VERSION, World, WorldConfig
from models.lam import LAM, LAMConfig
from models.nn import Compute
from models.sampling import SamplingConfig, rollout
from models.tokenizer import TokenizerConfig
from tests.conftest import CACHE, FRAME, ROOT, make_dataset, script
from utils.data import ClipSource
from utils.records import read_metadata

rng = np.random.default_rng(0)
B, T, A = 6, 10, 3
TRUTH = rng.integers(0, 256, (B, T, *FRAME)).astype(np.uint8)
ACTIONS = rng.integers(0, A, (B, T - 1))
compare = frame_metrics(None)


def world_config(window: int = 6) -> WorldConfig:
    size = {"width": 16, "num_heads": 2, "num_blocks": 1}
    return WorldConfig(
        TokenizerConfig(**size, patch_size=4, num_codes=16, code_width=4, frame_shape=FRAME),
        None,
        DynamicsConfig(**size, num_codes=16, num_patches=16, num_actions=2),
        window=window,
    )


# Statistics


def test_intervals_are_students():
    values = rng.standard_normal(12)
    low, high = scipy.stats.t.interval(0.95, 11, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose(figure([*values, np.nan]), (values.mean(), low, high, 12))
    assert math.isnan(figure([1.0]).low)
    assert figure([]).n == 0


def test_clips_of_one_level_count_once():
    values = rng.standard_normal(9)
    alone = figure(values)
    np.testing.assert_allclose(figure(values, np.arange(9) * 7), alone)
    thrice = figure(np.repeat(values, 3), np.repeat(np.arange(9), 3))
    np.testing.assert_allclose(thrice[:3], alone[:3])
    assert thrice.n == 27
    assert figure(np.repeat(values, 3)).low > alone.low  # which takes them for news
    np.testing.assert_allclose(
        jackknife(lambda x: float(x.mean()), np.repeat(values, 3), groups=[np.repeat(np.arange(9), 3)])[:3], alone[:3]
    )
    assert math.isnan(figure(values, np.zeros(9)).low)
    with_gaps = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(figure(with_gaps, np.array([4, 4, 4, 2])), figure([1.0, 3.0, 5.0], np.array([0, 0, 1])))


def test_the_jackknife_of_a_mean_is_its_interval():
    values = rng.standard_normal(15)
    np.testing.assert_allclose(jackknife(lambda x: float(x.mean()), values), figure(values))


def test_paired_differences_are_sharper():
    common, step = rng.standard_normal(40) * 10, rng.standard_normal(40) * 0.1 + 1
    a, b = figure(common), figure(common + step)
    paired, apart = difference(a, b, (common, common + step)), difference(a, b)
    assert paired.low > 0.9
    assert apart.low < 0 < apart.high
    np.testing.assert_allclose(paired.mean, apart.mean)


def test_mutual_information_equals_scikit_learns():
    a = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    b = [1, 1, 1, 1, 2, 1, 2, 2, 2, 2, 3, 1, 3, 3, 3, 2, 2]
    np.testing.assert_allclose(adjusted_mutual_information(contingency(a, b, 4, 4)), 0.2782096465726981)
    draw = np.random.default_rng(0)
    x = draw.integers(0, 6, 500)
    y = np.where(draw.random(500) < 0.5, x, draw.integers(0, 4, 500))
    np.testing.assert_allclose(adjusted_mutual_information(contingency(x, y, 6, 6)), 0.3070746550001097)
    np.testing.assert_allclose(adjusted_mutual_information(contingency(x, (x + 2) % 6, 6, 6)), 1.0)
    shuffled = [adjusted_mutual_information(contingency(x, draw.permutation(y), 6, 6)) for _ in range(20)]
    assert abs(np.mean(shuffled)) < 0.005
    assert adjusted_mutual_information(np.array([[3, 4]])) == 0.0


@pytest.mark.parametrize("n", [5, 50])
def test_frechet_distance_equals_the_textbooks(n):
    """With roots of covariances, with fewer and with more samples than the 8 features."""
    a, b = rng.standard_normal((n, 8)), rng.standard_normal((n + 2, 8)) * 2 + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(cov_a) @ cov_b @ scipy.linalg.sqrtm(cov_a)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-3)
    np.testing.assert_allclose(frechet_distance(a, a), 0, atol=1e-9)
    np.testing.assert_allclose(frechet_distance(a, a + 3), 8 * 9)
    assert math.isnan(frechet_distance(a[:1], b))


def test_the_best_map_takes_the_majority_and_falls_back():
    np.testing.assert_array_equal(best_map(np.array([0, 0, 0, 2]), np.array([1, 1, 0, 0]), 4, 2), [1, 0, 0, 0])


# Frames


def test_frame_metrics_on_known_pairs():
    draw = np.random.default_rng(1)
    a = draw.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    b = np.clip(a.astype(int) + draw.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    found = compare(a[None, None], b[None, None])
    # scikit-image with Wang's window: gaussian_weights, sigma 1.5, use_sample_covariance False.
    np.testing.assert_allclose(found.psnr, 20.99926561, rtol=1e-5)
    np.testing.assert_allclose(found.ssim, 0.95316053, atol=1e-4)
    np.testing.assert_allclose(found.l1, 0.07648974, rtol=1e-5)
    same = compare(TRUTH, TRUTH)
    np.testing.assert_allclose([same.psnr, same.ssim, 1 - same.l1], np.ones((3, B, T)) * [[[60]], [[1]], [[1]]])


def test_noise_and_shifts_score_below_the_truth():
    smooth = np.linspace(0, 255, 16).astype(np.uint8)[None, None, None, :, None] * np.ones((2, 3, 16, 1, 3), np.uint8)
    shifted = compare(np.roll(smooth, 1, axis=3), smooth)
    noise = compare(TRUTH[:2, :3], smooth)
    assert np.all(noise.psnr < shifted.psnr)
    assert np.all(noise.ssim < shifted.ssim)
    assert np.all(shifted.psnr < 60)


def test_joining_batches_changes_nothing():
    fn = lambda x, y: {"sum": x + y, "pair": (x,)}
    x, y = np.arange(7.0), np.ones(7)
    for size in (1, 3, 7, 10):
        out = in_batches(fn, size, x, y)
        np.testing.assert_array_equal(out["sum"], x + 1)
        np.testing.assert_array_equal(out["pair"][0], x)


# Clips


def test_clips_are_fixed_apart_and_spread(dataset):
    source = ClipSource(dataset, "val", 6)
    clips = choose_clips(source, 20, seed=3)
    again = choose_clips(source, 7, seed=3)
    np.testing.assert_array_equal(clips.frames_BTHWC[:7], again.frames_BTHWC)
    np.testing.assert_array_equal(clips.actions_BT[:7], again.actions_BT)
    assert (choose_clips(source, 7, seed=4).frames_BTHWC != again.frames_BTHWC).any()
    # 24 records: so many clips are from as many records, and the background tells which.
    first = choose_clips(source, 24, seed=0).frames_BTHWC
    assert len(np.unique(first[:, 0, 0], axis=0)) == 24
    # Records of 12 frames hold two windows, which do not overlap; there are no more than that.
    everything = choose_clips(source, 1000, seed=0).frames_BTHWC
    assert len(everything) == sum(n // 6 for n in (6 + j % 7 for j in range(24)))
    frames = everything.reshape(-1, *FRAME)
    assert digest(everything) == digest(everything.copy()) != digest(frames[1:])


# Rollouts


def test_playing_equals_the_rollout_of_each_clip_alone():
    """Whatever the batch: three clips in batches of two."""
    world = World(world_config(), Compute(), nnx.Rngs(0))
    cfg, frames, actions = SamplingConfig(steps=2), TRUTH[:3, :2], ACTIONS[:3, :8] % 2
    played = Player(world, cfg, 2, seed=5)(frames, actions)
    for b in range(3):
        key = jax.random.fold_in(jax.random.key(5), b)
        single = rollout(world, jnp.asarray(frames[b : b + 1]) / 255, jnp.asarray(actions[b : b + 1]), key, cfg)
        np.testing.assert_allclose(played[b].astype(int), np.asarray(single[0]) * 255, atol=1)


def oracle(prompt, actions, numbers=None):
    """Returns the truth wherever the actions so far are the clip's own, else noise."""
    start = prompt.shape[1]
    out = TRUTH[:, start : actions.shape[1] + 1].copy()
    wrong = np.cumsum(actions != ACTIONS[:, : actions.shape[1]], axis=1)[:, start - 1 :] > 0
    out[wrong] = np.random.default_rng(9).integers(0, 256, (wrong.sum(), *FRAME))
    return out


def ignorant(prompt, actions, numbers=None):
    """Repeats the first frame, whatever is pressed."""
    return np.repeat(prompt[:, :1], actions.shape[1] + 1 - prompt.shape[1], axis=1)


def measured(play):
    played = play_on(play, TRUTH, ACTIONS)
    rollouts = measure_rollouts(compare, TRUTH, played, compare(TRUTH // 2, TRUTH))
    return rollouts | measure_control(play, compare, TRUTH, ACTIONS, played[1], A, seed=0)


def test_an_oracle_scores_best_and_an_ignorant_world_has_no_control():
    best, worst = measured(oracle).figures, measured(ignorant).figures
    for prompt in ("", "_4"):
        assert best[f"rollout{prompt}_psnr"].mean == pytest.approx(60)
        assert best[f"rollout{prompt}_ssim"].mean == pytest.approx(1)
        for line in ("copy_last_frame", "reconstruction"):
            assert best[f"rollout{prompt}_psnr"].low > best[f"{line}{prompt}_psnr"].high
    assert worst["rollout_psnr"] == worst["copy_last_frame_psnr"]
    for t in (1, 4, 8):
        assert best[f"delta_psnr_t{t}"].low > 0
        assert worst[f"delta_psnr_t{t}"].mean == 0
        assert worst[f"delta_psnr_t{t}"].low <= 0 <= worst[f"delta_psnr_t{t}"].high
    assert best["delta_psnr_t1"].mean < best["delta_psnr_t8"].mean  # a wrong action is likelier the longer it takes


def test_curves_have_the_horizons_and_lpips_is_not_zero_but_unknown():
    metrics = measured(oracle).to_json()
    assert metrics["per_horizon"]["rollout_psnr"]["mean"] == [60.0] * (T - 1)
    assert len(metrics["per_horizon"]["rollout_4_psnr"]["mean"]) == T - 4
    assert metrics["rollout_lpips"] is None
    by_action = metrics["delta_psnr_by_action"]["4"]
    assert sum(entry["n"] for entry in by_action.values()) == B
    json.dumps(metrics, allow_nan=False)


def test_what_changes_is_scored_alone():
    truth = np.zeros((2, 3, 8, 8, 3), np.uint8)
    truth[:, 1, :4] = 100  # half of the picture changes once,
    truth[:, 2, :4] = 100  # and then nothing
    predicted = truth[:, 1:].copy()
    predicted[:, :, 4:] = 255  # wrong where nothing changes
    perfect = measure_changed("rollout", predicted, truth).figures["rollout_changed_psnr"]
    assert perfect.mean == pytest.approx(60)
    nothing = np.repeat(truth[:, :1], 3, axis=1)
    assert math.isnan(measure_changed("x", predicted, nothing).figures["x_changed_psnr"].mean)
    still = measure_changed("copy", np.zeros_like(predicted), truth).figures["copy_changed_psnr"]
    assert still.mean == pytest.approx(-20 * np.log10(100 / 255), abs=1e-4)


@pytest.mark.parametrize("reach", [0, 2])
def test_the_lam_is_rolled_out_frame_by_frame(reach):
    size = {"width": 16, "num_heads": 2, "num_blocks": 1}
    lam = LAM(
        LAMConfig(**size, patch_size=8, num_codes=A, motion_reach=reach, frame_shape=FRAME), Compute(), nnx.Rngs(0)
    )
    lam.code_out.kernel[...] *= 20
    rolled = roll_lam(lam, TRUTH[:3, :5], ACTIONS[:3, :4], batch_size=2)
    frames = jnp.asarray(TRUTH[:3, :1], jnp.float32) / 255
    for t in range(4):
        made = lam.predict(frames, lam.vq.lookup(jnp.asarray(ACTIONS[:3, : t + 1])))
        frames = jnp.concatenate([frames, jnp.clip(made[:, -1:], 0, 1)], axis=1)
    np.testing.assert_allclose(rolled, np.asarray(frames[:, 1:]) * 255, atol=1.01)
    if reach:
        assert (rolled[:, 0] != roll_lam(lam, TRUTH[:3, :5], (ACTIONS[:3, :4] + 1) % A, 2)[:, 0]).any()


def test_long_rollouts_press_what_clips_press():
    pressed = strung_actions(ACTIONS, 4, 22, seed=1)
    assert pressed.shape == (4, 22)
    rows = {tuple(row) for row in ACTIONS}
    for clip in pressed:
        assert tuple(clip[:9]) in rows
        assert tuple(clip[9:18]) in rows
        assert any(tuple(clip[18:]) == row[:4] for row in rows)


def test_the_floor_is_of_other_levels():
    levels = np.array([1, 2, 3, 1, 2, 4, 5, 5])
    m, others = from_other_levels(levels, 4)
    assert m == 3
    assert not set(levels[:m]) & set(levels[others])
    assert len(others) == m
    assert from_other_levels(np.array([1, 1, 1]), 2)[0] == 0


def test_ways_of_sampling_are_swept(monkeypatch):
    monkeypatch.setattr("evaluation.sampling.STEPS", (1, 3))
    monkeypatch.setattr("evaluation.sampling.ORDERS", ("random", "halton"))
    world = World(world_config(), Compute(), nnx.Rngs(0))
    rows = measure_sampling(compare, world, TRUTH[:3, :4], ACTIONS[:3, :3] % 2, 2, 0, SamplingConfig()).details[
        "sampling_sweep"
    ]
    assert len({(row["order"], row["temperature"], row["steps"]) for row in rows}) == len(rows) == 2 * 3 * 2
    for temperature in (0.0, 0.5, 1.0):  # a single step leaves the order nothing to say
        assert len({r["psnr"] for r in rows if r["steps"] == 1 and r["temperature"] == temperature}) == 1
    assert len({row["psnr"] for row in rows}) > 6
    assert all(5 < row["psnr"] < 30 and row["sharpness"] > 0 for row in rows)


# Latent actions and codes


def meaning(latent, true, num_latent=4, names=("L", "R", "N")):
    return measure_meaning(latent, true, num_latent, names, seed=0)


def test_perfect_latent_actions_are_understood_and_shuffled_ones_are_not():
    true = rng.integers(0, 3, (160, 15))
    perfect = meaning((true + 1) % 4, true)
    assert perfect.figures["latent_action_ami"].mean == pytest.approx(1)
    for n in (50, 200, 1000):
        assert perfect.figures[f"action_accuracy_{n}"].mean == pytest.approx(1)
    noise = meaning(rng.permutation(true.reshape(-1)).reshape(true.shape), true)
    assert abs(noise.figures["latent_action_ami"].mean) < 0.01
    assert abs(noise.figures["action_accuracy_1000"].mean - 1 / 3) < 0.06
    assert noise.figures["action_accuracy_majority"].n == 80
    # What a code alone does not tell: whether the action went on or turned about.
    turned = (true[:, 1:] + true[:, :-1]) % 3
    both = meaning(true[:, 1:], turned).figures
    assert both["action_accuracy_pair_1000"].mean == pytest.approx(1)
    assert both["latent_action_pair_ami"].mean > 0.6 > 0.01 > abs(both["latent_action_ami"].mean)
    few = meaning(true[:8], true[:8])
    assert math.isnan(few.details["latent_actions"]["accuracy"]["1000"].mean)
    labels = action_labels(perfect.details["latent_actions"]["table"], ["L", "R", "N"])
    assert [label.name for label in labels] == ["", "L", "R", "N"]
    assert [label.share for label in labels] == [None, 1, 1, 1]
    assert sum(label.count for label in labels) == true.size


def test_coinruns_equal_actions_are_merged(tmp_path):
    """Also in a dataset from before its metadata said which are equal."""
    moves = ("LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NONE", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP")
    fields = {"frame_shape": FRAME, "fps": 15, "action_names": [*moves, *"DAWSQE"], "splits": {}, "made_by": {}}

    def metadata(**changes):
        (tmp_path / "metadata.json").write_text(json.dumps({"format_version": 1} | fields | changes))
        return read_metadata(tmp_path)

    coinrun, another = metadata(environment="coinrun"), metadata(environment="another")
    names, merged = merge_actions(coinrun.action_names, coinrun.same_actions)
    assert names == list(moves)
    np.testing.assert_array_equal(merged, [*range(9), 4, 4, 4, 4, 4, 4])
    assert merge_actions(another.action_names, another.same_actions).names == fields["action_names"]
    said = metadata(environment="another", same_actions={"UP": "NONE"})
    names, merged = merge_actions(said.action_names, said.same_actions)
    assert "UP" not in names
    assert merged[5] == merged[4]


def test_codebooks_used_evenly_and_hardly():
    even = np.tile(np.arange(8), (5, 2, 3))
    results = measure_codes("even", even, 8) | measure_codes("single", np.zeros((5, 2, 3), int), 8)
    assert results.figures["even_codebook_usage"].mean == 1
    assert results.figures["even_codebook_perplexity"].mean == pytest.approx(8)
    assert results.figures["single_codebook_usage"].mean == 1 / 8
    assert results.figures["single_codebook_perplexity"].mean == pytest.approx(1)
    assert results.details["single_codebook"]["dead"] == 7


def test_pictures_of_codes_are_their_mean_patches():
    frames = np.zeros((1, 1, 4, 4, 3), np.uint8)
    frames[..., 2:, :] = 200
    frames[..., :2, :2, :] = 100
    pictures = mean_patches(frames, np.array([[[0, 2, 0, 2]]]), 3, 2)
    assert pictures.shape == (2, 2, 2, 3)
    assert (pictures[0] == 50).all()
    assert (pictures[1] == 200).all()


# Distribution and stability


def test_distances_of_frames_rank_noise_above_real_clips():
    from tests.test_perceptual import random_lpips

    smooth = np.clip(TRUTH // 16 + np.linspace(0, 200, 16).astype(np.uint8)[:, None], 0, 255).astype(np.uint8)
    found = measure_distribution(TRUTH[:3], smooth[:3], smooth[3:], None, random_lpips(), 2).figures
    assert found["frame_distance"].mean > 3 * found["frame_distance_floor"].mean > 0
    assert math.isnan(found["fvd"].mean)
    lone = measure_distribution(TRUTH[:1], TRUTH[:1], TRUTH[1:2], None, random_lpips(), 2)
    assert lone.to_json()["frame_distance"] is None


def test_stability_of_still_and_of_noisy_rollouts():
    real = np.full((3, 4, 8, 8, 3), 100, np.uint8)
    real[:, :, :, ::2] = 110
    still = measure_stability(real[:2].repeat(3, axis=1), real)
    noisy = measure_stability(rng.integers(128, 256, (2, 12, 8, 8, 3)).astype(np.uint8), real)
    assert still.figures["long_rollout_unchanged"].mean == 1
    assert still.figures["long_rollout_colour_distance"].mean == 0
    assert still.figures["long_rollout_sharpness"].mean == still.figures["real_sharpness"].mean == pytest.approx(5)
    assert noisy.figures["long_rollout_unchanged"].mean < 0.1
    assert noisy.figures["long_rollout_colour_distance"].mean == pytest.approx(1)
    assert noisy.figures["long_rollout_sharpness"].mean > 20
    assert len(noisy.curves["long_rollout_sharpness"].figures) == 11


# The table of metrics, reports


def test_measures_join_unless_they_share_a_name():
    a, b = of_clips("a", np.arange(3.0)), of_clips("b", np.arange(4.0))
    joined = a | b | Measured(details={"note": 1})
    assert list(joined.figures) == ["a", "b"]
    assert list(a.figures) == ["a"]
    assert joined.to_json()["per_clip"] == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match="figures measured twice: a"):
        _ = joined | a


def test_the_documented_table_is_the_tables():
    """docs/evaluation.md holds what `python -m evaluation.table` prints."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    documented = re.search(r"<!-- begin: python -m evaluation.table -->(.*)<!-- end -->", page, re.DOTALL)
    assert documented[1].strip() == table.reference()


def test_rows_of_the_table_say_how_they_are_shown():
    assert table.METRICS["rollout_psnr"].title == "PSNR: rollout from 1 frame, dB ↑"
    assert table.METRICS["copy_last_frame_psnr"].arrow == ""  # no model makes it better
    assert table.METRICS["fvd"].title == "FVD of rollouts ↓"
    metrics = of_clips("rollout_psnr", np.array([20.0, 22.0])).to_json()
    assert table.headlines(metrics).splitlines()[2] == "| PSNR: rollout from 1 frame, dB ↑ | 21.00 ± 12.71 |"


def test_reports_hold_everything_and_escape(tmp_path):
    line = Line("<a>", [1, 10, 100], [1.0, None, 3.0], [0.5, None, None], [1.5, None, None])
    blocks = [
        Table(["", "x"], [["<b>", "1"]]),
        Chart("chart", "labelled", [line], log_x=True),
        HeatMap("map", ["r"], ["c", "d"], np.array([[0.25, 0.75]])),
        Picture("dot", np.zeros((2, 2, 3), np.uint8), "a dot"),
    ]
    write_page(tmp_path, "A & B", [Section("One", "text", blocks)])
    page = (tmp_path / "report.html").read_text()
    assert "A &amp; B" in page
    assert page.index("a dot") < page.index("labelled") < page.index("</html>")
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "data:image/png;base64," in page
    assert "<b>" not in page
    assert "nan" not in page
    assert "http" not in page
    assert "![a dot](pictures/dot.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "pictures" / "dot.png").is_file()
    # Written again, the same bytes; and no id twice, however many charts there are.
    write_page(tmp_path / "again", "A & B", [Section("One", "text", blocks)])
    assert (tmp_path / "again" / "report.html").read_text() == page
    two = "".join(chart_svg(Chart(title, "n", [line])) for title in ("a", "b"))
    ids = re.findall(r' id="([^"]*)"', two)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"#([a-z][0-9a-f]{10})\b", two)) <= set(ids)


def test_charts_survive_odd_values():
    assert chart_svg(Chart("empty", "x", [Line("a", [1], [None])])) == ""
    line = chart_svg(Chart("line", "x", [Line("a", [3, 4], [2.0, 3.0])]))
    point = chart_svg(Chart("point", "x", [Line("a", [3], [2.0]), Line("unknown", [3], [None])]))
    assert "<use" in point  # a dot, where a line has no length
    assert "<use" not in line
    assert "unknown" not in point
    many = chart_svg(Chart("many", "x", [Line(str(i), [3, 4], [2.0, i]) for i in range(8)]))
    assert many.count("stroke-dasharray") == 2 * 2  # the two lines beyond the colours, there and in the legend
    assert "$5 < 6$" in html.unescape(chart_svg(Chart("$5 < 6$", "x", [Line("a", [3], [2.0])])))


# The script


def config(checkpoint, dataset, output, **changes):
    few = {"steps": 2, "num_clips": 5, "long_frames": 8, "batch_size": 4, "compile_cache": str(CACHE)}
    paths = tuple(map(str, checkpoint if isinstance(checkpoint, tuple) else (checkpoint,)))
    return evaluate.Config(checkpoint=paths, data_dir=str(dataset), output_dir=str(output), **(few | changes))


REQUIRED = [
    *("tokenizer_psnr", "tokenizer_ssim", "lam_psnr", "rollout_psnr", "rollout_ssim", "copy_last_frame_psnr"),
    *("tokenizer_codebook_usage", "lam_codebook_usage", "delta_psnr_t4", "latent_action_ami"),
]


def test_a_world_is_measured_twice_alike_also_beside_another(trained, dataset, tmp_path):
    a, both, b = tmp_path / "a", tmp_path / "both", tmp_path / "both" / "world"
    flags = ["--steps", 2, "--num_clips", 5, "--long_frames", 8, "--batch_size", 4, "--compile_cache", CACHE]
    done = script("evaluate", "--checkpoint", trained["world"], "--data_dir", dataset, "--output_dir", a, *flags)
    assert "report.html" in done.stdout
    other = shutil.copytree(trained["world"], tmp_path / "other")
    evaluate.main(config((trained["world"], other), dataset, both))
    assert (a / "metrics.json").read_bytes() == (b / "metrics.json").read_bytes()
    joint = json.loads((both / "metrics.json").read_text())
    one, two = joint["worlds"].values()
    assert one == two  # being the same world
    single = json.loads((a / "metrics.json").read_text())
    assert one["rollout_psnr"] == single["rollout_psnr"]
    np.testing.assert_allclose(one["margin"], single["rollout_psnr"] - single["copy_last_frame_psnr"], atol=1e-4)
    assert one["intervals"]["margin"]["low"] < one["margin"] < one["intervals"]["margin"]["high"]
    motion = single["per_horizon"]
    last = motion["rollout_sharpness"]["mean"][-1] / motion["real_sharpness"]["mean"][-1]
    np.testing.assert_allclose(one["last_sharpness"], last, atol=1e-4)
    page = (both / "report.md").read_text()
    assert page.count("\n| world | ") == page.count("\n| other | ") == 7  # the table, and each chart as one
    assert json.loads((both / "speed.json").read_text()).keys() == {"world", "other"}
    assert (both / "other" / "report.html").is_file()
    metrics = json.loads((a / "metrics.json").read_text())
    for name in REQUIRED:
        assert math.isfinite(metrics[name])
        assert metrics["intervals"][name]["n"] >= 1
    assert set(metrics["intervals"]) <= set(table.METRICS)
    assert metrics["split"] == "val"
    assert len(metrics["clip_levels"]) > metrics["num_clips"]
    assert "rollout_psnr" in comparison(metrics, metrics)
    assert len(metrics["per_horizon"]["rollout_psnr"]["mean"]) == 5
    assert len(json.loads((trained["world"] / "action_labels.json").read_text())) == 3
    assert json.loads((a / "speed.json").read_text())["rollout_frames_per_second"] > 0
    page = (a / "report.html").read_text()
    for heading in ("Fidelity", "Distribution", "Controllability", "latent actions mean", "Codebooks", "Stability"):
        assert heading in page


def test_comparing_marks_what_differs(trained, dataset, tmp_path, capsys):
    evaluate.main(config(trained["tokenizer"], dataset, tmp_path / "a", num_clips=8))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert "rollout_psnr" not in metrics
    # Another batch size: the same clips, and figures that differ by rounding only.
    evaluate.main(config(trained["tokenizer"], dataset, tmp_path / "c", num_clips=8, batch_size=3))
    other = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert other["clips_digest"] == metrics["clips_digest"]
    np.testing.assert_allclose(other["per_clip"]["tokenizer_psnr"], metrics["per_clip"]["tokenizer_psnr"], atol=0.01)
    changed = json.loads(json.dumps(metrics))
    changed["per_clip"]["tokenizer_psnr"] = [
        x + 1 + 0.01 * i for i, x in enumerate(metrics["per_clip"]["tokenizer_psnr"])
    ]
    changed["tokenizer_psnr"] += 1.035
    (tmp_path / "b.json").write_text(json.dumps(changed | {"wall_s": 3.0}))
    capsys.readouterr()
    evaluate.main(evaluate.Config(compare=(str(tmp_path / "a" / "metrics.json"), str(tmp_path / "b.json"))))
    starred = [row for row in capsys.readouterr().out.splitlines()[:-1] if row.endswith("*")]
    assert [row.split()[0] for row in starred] == ["tokenizer_psnr"]
    assert "+1.03" in starred[0]
    assert "dB ↑" in starred[0]
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InputError, match=r"b\.json: not a metrics\.json"):
        evaluate.main(evaluate.Config(compare=(str(tmp_path / "a" / "metrics.json"), str(tmp_path / "b.json"))))


def test_the_difference_that_is_tested_is_the_one_shown():
    """Of a pooled PSNR: here the pooled one falls, though the mean of the clips' PSNRs rises."""
    mse = [np.array([0.001, 0.001, 0.001, 0.1]), np.array([0.0005, 0.0005, 0.0005, 0.12])]
    scores = [Scores(*[-10 * np.log10(x)[:, None]] * 3, None, x[:, None]) for x in mse]
    a, b = (
        measure_fidelity("rollout", x, pooled=True).to_json() | {"clips_digest": "same", "clip_levels": [1, 2, 3, 4]}
        for x in scores
    )
    rows = {line.split()[0]: line for line in comparison(a, b).splitlines()[1:-1]}
    shown = -10 * (np.log10(mse[1].mean()) - np.log10(mse[0].mean()))
    assert shown < 0
    assert f"{shown:+.4f}" in rows["rollout_psnr"]
    assert "+2.05" in rows["rollout_psnr_mean"]
    assert "~" not in "".join(rows.values())
    del b["per_clip"]["rollout_ssim"]
    alone = [line for line in comparison(a, b).splitlines() if line.endswith("~")]
    assert [line.split()[0] for line in alone] == ["rollout_ssim"]  # which cannot be compared clip by clip


def test_a_lam_is_measured_also_without_true_actions(trained, dataset, tmp_path):
    bare = make_dataset(tmp_path / "data", clips=6, actions=False)
    evaluate.main(config(trained["lam"], bare, tmp_path / "a"))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert math.isfinite(metrics["lam_psnr"])
    assert "latent_actions" not in metrics
    assert "tokenizer_psnr" not in metrics
    evaluate.main(config(trained["lam"], dataset, tmp_path / "b"))
    assert "latent_action_ami" in json.loads((tmp_path / "b" / "metrics.json").read_text())


def save(folder, kind, cfg, model, seq_len):
    """A checkpoint without a training."""
    import dataclasses

    fields = {"config_version": CONFIG_VERSION, "kind": kind, "model": dataclasses.asdict(cfg)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | {"train": {"seq_len": seq_len, "data_dir": ""}}))
    with ocp.CheckpointManager(folder.absolute()) as manager:
        values = ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(model)))
        manager.save(1, args=ocp.args.Composite(model=values))
    return folder


def test_a_world_of_true_actions_is_played_with_them(dataset, tmp_path):
    cfg = world_config(window=3)
    world = save(tmp_path / "world", "world", cfg, World(cfg, Compute(), nnx.Rngs(0)), 3)
    evaluate.main(config(world, dataset, tmp_path / "a", steps=1))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["actions"] == "true"
    assert "rollout_4_psnr" not in metrics
    assert "delta_psnr_t4" not in metrics
    labels = json.loads((world / "action_labels.json").read_text())
    assert [label["name"] for label in labels] == ["LEFT", "RIGHT"]
    bare = make_dataset(tmp_path / "bare", clips=3, actions=False)
    with pytest.raises(InputError, match="true actions"):
        evaluate.main(config(world, bare, tmp_path / "b", steps=1))


def test_wrong_inputs_are_named(trained, tmp_path):
    other = make_dataset(tmp_path / "other", shape=(24, 24, 3), clips=3)
    with pytest.raises(InputError, match=r"\(24, 24, 3\)"):
        evaluate.main(config(trained["tokenizer"], other, tmp_path))
    with pytest.raises(InputError, match="`num_clips` -1"):
        evaluate.Config(num_clips=-1)
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate.main(config(tmp_path / "none", other, tmp_path))
    with pytest.raises(InputError, match="one of them is given twice"):
        evaluate.main(config((trained["world"], trained["world"]), other, tmp_path))
    with pytest.raises(InputError, match="holds a tokenizer; several checkpoints must be worlds"):
        evaluate.main(config((trained["tokenizer"], trained["world"]), other, tmp_path))


def test_worlds_are_named_by_what_tells_them_apart():
    assert names_of(("runs/a/world", "runs/b")) == {"world": "runs/a/world", "b": "runs/b"}
    assert list(names_of(("runs/a/world", "runs/b/world", "runs/b/other"))) == ["a-world", "b-world", "b-other"]
