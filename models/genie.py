"""A world: tokenizer, latent action model and dynamics model together, and how one is loaded from a path."""

import dataclasses
import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.causal import Causal
from models.dynamics import Dynamics, DynamicsConfig, TokenDynamics
from models.errors import InputError, check_patch_size
from models.flow import Flow
from models.heads import BINS, Heads, HeadsConfig, Judged
from models.lam import LAM, LAMConfig
from models.maskgit import MaskGIT
from models.maskgit_head import MaskGITHead
from models.nn import Compute, num_patches
from models.policy import Agent, AgentConfig, Policy, PolicyConfig
from models.sampling import SamplingConfig
from models.stored import all_steps, first_line, newest_whole, read_items
from models.tokenizer import Tokenizer, TokenizerConfig

CONFIG_VERSION = 1
PARAMETERS = "parameters.npz"
"""What an exported world (export.py) has in the place of checkpoints: its variables by path, parameters in half
precision."""

DYNAMICS: dict[str, type[Dynamics]] = {
    "maskgit": MaskGIT,
    "maskgit_head": MaskGITHead,
    "causal": Causal,
    "flow": Flow,
}
"""The kinds of dynamics models, by `DynamicsConfig.kind`."""


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What makes up a world.

    tokenizer: None where the dynamics model needs none.
    lam: None where the dynamics model takes the dataset's true actions.
    window: Frames in a training clip; a rollout sees this many at once.
    heads: None where the world does not say what actions earn, and where levels end.
    """

    tokenizer: TokenizerConfig | None
    lam: LAMConfig | None
    dynamics: DynamicsConfig
    window: int
    heads: HeadsConfig | None = None

    def __post_init__(self):
        kind = self.dynamics.kind
        if self.tokenizer and self.tokenizer.kind == "mae" and issubclass(DYNAMICS[kind], TokenDynamics):
            raise InputError(
                f"`tokenizer_checkpoint`: a tokenizer of kind mae, which makes no tokens for dynamics of kind {kind}; "
                "give one of kind vq"
            )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.tokenizer.frame_shape if self.tokenizer else self.dynamics.frame_shape


class World(nnx.Module):
    """A playable world model (Genie)."""

    def __init__(self, cfg: WorldConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        self.tokenizer: Any = Tokenizer(cfg.tokenizer, compute, rngs) if cfg.tokenizer else None
        self.lam = LAM(cfg.lam, compute, rngs) if cfg.lam else None
        self.dynamics = DYNAMICS[cfg.dynamics.kind](cfg.dynamics, compute, rngs)
        size = cfg.dynamics.num_patches, cfg.dynamics.width
        self.heads = Heads(cfg.heads, *size, compute, rngs) if cfg.heads else None
        self.dynamics.keeps_hidden |= cfg.heads is not None

    @property
    def num_actions(self) -> int:
        """Actions that a player can choose from."""
        return self.cfg.dynamics.num_actions

    def infer_actions(self, frames_BTHWC: jax.Array) -> jax.Array:
        """Latent actions (B, Tm1) between frames in [0, 1]."""
        if self.lam is None:
            raise InputError("this world was trained on true actions and has no latent action model to infer them")
        return self.lam.infer(frames_BTHWC)

    def judge(self, state: Any, action_B: jax.Array) -> Judged:
        """What actions (B) lead to that are taken in the state of a rollout; without heads, nothing.

        It comes with the next frame, which `models.sampling.next_frame` draws from the same state and actions.
        """
        if self.heads is None:
            none_B = jnp.zeros(len(action_B), jnp.float32)
            return Judged(none_B, none_B, none_B)
        return self.heads(state.hidden_BNM, self.dynamics.embed_actions(action_B))


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """What makes up an agent that learns in a world."""

    agent: AgentConfig
    world: WorldConfig


class ActorCritic(nnx.Module):
    """An agent that learns in a world, which stays as it is.

    critic: Says what lies ahead of a frame, as a distribution over `models.heads.bins`.
    clone: The policy as it was at first.
    """

    def __init__(self, cfg: ActorCriticConfig, compute: Compute, rngs: nnx.Rngs):
        self.cfg = cfg
        self.agent = Agent(cfg.agent, compute, rngs)
        self.critic = Policy(dataclasses.replace(cfg.agent.policy, num_actions=BINS), compute, rngs)
        self.clone = Policy(cfg.agent.policy, compute, rngs)
        self.world = World(cfg.world, compute, rngs)


def sized(cfg: DynamicsConfig, tokenizer: TokenizerConfig | None, frame_shape: tuple[int, int, int]) -> DynamicsConfig:
    """A dynamics model's configuration with the sizes that its tokenizer has; without one, those of its own patches.

    Raises:
      InputError: Its patches are larger than the frames.
    """
    if tokenizer:
        sizes: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("num_codes", "num_patches", "patch_size")}
        if cfg.kind == "flow":
            sizes["latent_width"] = tokenizer.code_width
    else:
        check_patch_size(cfg.patch_size, frame_shape, DynamicsConfig)
        sizes = {"num_patches": num_patches(frame_shape, cfg.patch_size)}
    return dataclasses.replace(cfg, frame_shape=frame_shape, **sizes)


KINDS: dict[str, tuple[type, type]] = {
    "tokenizer": (Tokenizer, TokenizerConfig),
    "lam": (LAM, LAMConfig),
    "world": (World, WorldConfig),
    "agent": (Agent, AgentConfig),
    "actor_critic": (ActorCritic, ActorCriticConfig),
}
PARTS = {"world": ("tokenizer", "lam"), "actor_critic": ("agent",)}
"""What can be taken out of the checkpoint of a whole."""
Model = TypeVar("Model", Tokenizer, LAM, World, Agent)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads `<ckpt_dir>/config.json`: kind, model, training configuration and versions.

    Raises:
      InputError: There is no checkpoint, or it is damaged or of another version.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: no checkpoint here (no config.json); name the `ckpt_dir` of a training")
    try:
        config = json.loads(file.read_text())
        version = config["config_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error!r}); restore it, or train again in another `ckpt_dir`") from error
    if version != CONFIG_VERSION:
        raise InputError(f"{file}: checkpoint version {version}, expected {CONFIG_VERSION}; train again")
    return config


def model_config(kind: str, fields: dict[str, Any]) -> Any:
    """The frozen configuration of a model from what `config.json` holds."""
    if kind == "world":
        return WorldConfig(
            tokenizer=_as_config(TokenizerConfig, fields["tokenizer"]),
            lam=_as_config(LAMConfig, fields["lam"]),
            dynamics=_as_config(DynamicsConfig, fields["dynamics"]),
            window=fields["window"],
            heads=_as_config(HeadsConfig, fields.get("heads")),
        )
    if kind == "agent":
        return AgentConfig(_as_config(PolicyConfig, fields["policy"]), _as_config(LAMConfig, fields["lam"]))
    if kind == "actor_critic":
        return ActorCriticConfig(**{name: model_config(name, fields[name]) for name in ("agent", "world")})
    return _as_config(KINDS[kind][1], fields)


def _as_config(of: type, fields: dict[str, Any] | None) -> Any:
    """A configuration from JSON, which knows no tuples; what an older one lacks takes the default,
    and what this one does not know is refused."""
    if fields is None:
        return None
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(of)}:
        raise InputError(f"made by another version: {of.__name__} has no {', '.join(sorted(unknown))}; train again")
    return of(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def stored_sampling(path: str | Path) -> SamplingConfig:
    """How a world's training says that it is best sampled; the paper's way where it says nothing."""
    return _as_config(SamplingConfig, read_config(path)["train"].get("sampling", {}))


def stored_model_config(path: str | Path, kind: str) -> Any:
    """The configuration of the model of a checkpoint, or of a part of it (`PARTS`).

    Raises:
      InputError: There is no checkpoint, or it is of another kind.
    """
    config = read_config(path)
    cfg = model_config(config["kind"], config["model"])
    if kind in PARTS.get(config["kind"], ()) and getattr(cfg, kind):
        return getattr(cfg, kind)
    if config["kind"] != kind:
        held, needed = (f"an {name}" if name[0] == "a" else f"a {name}" for name in (config["kind"], kind))
        raise InputError(f"{path}: holds {held}, but {needed} is needed")
    return cfg


def load(path: str | Path, kind: str, compute: Compute = Compute(), step: int | None = None) -> Any:  # noqa: B008
    """Loads a model for inference from the `ckpt_dir` of its training; nothing else is needed.

    Args:
      path: The folder that holds `config.json`: a training's, or that of an exported world.
      kind: One of `KINDS`; also what is part of another one (`PARTS`).
      step: Which checkpoint; by default the latest that is whole, with a warning if a later one is damaged. The moving
        average of the parameters is taken where there is one.
    Raises:
      InputError: There is no checkpoint, or it is damaged or of another kind.
    """
    cfg = stored_model_config(path, kind)
    if (whole := read_config(path)["kind"]) != kind:
        return getattr(load(path, whole, compute, step), kind)
    model = nnx.eval_shape(lambda: KINDS[kind][0](cfg, compute, nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(abstract))
    exported = Path(path) / PARAMETERS
    if exported.is_file() and step is not None:
        raise InputError(f"{path}: an exported world, which has no checkpoint of step {step}")
    values = _read_parameters(exported, target) if exported.is_file() else _restore(Path(path), target, step)
    nnx.replace_by_pure_dict(abstract, values)
    return nnx.merge(graphdef, abstract)


def _restore(path: Path, target: Any, step: int | None) -> Any:
    """Variables of a checkpoint, as `target` has them: of the given step, or of the newest that is whole."""

    def read(folder: Path) -> Any:
        item = "ema" if (folder / "ema").is_dir() else "model"
        return read_items(folder, {item: target})[item]

    if step is not None:
        if step not in all_steps(path):
            raise InputError(f"{path}: no checkpoint of step {step}; there are {all_steps(path) or 'none'}")
        return read(path.absolute() / str(step))
    found, values, damaged = newest_whole(path, read)
    for reason in damaged.values():
        print(f"warning: {reason}; step {found} is taken in its place", file=sys.stderr)
    return values


def _read_parameters(file: Path, target: Any) -> Any:
    """Variables of an exported world, as `target` has them."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: damaged ({first_line(error)}); copy or export it again") from error
    leaves, tree = jax.tree.flatten_with_path(target)
    names = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    shapes = {name: leaf.shape for name, (_, leaf) in zip(names, leaves, strict=True)}
    if shapes != {name: array.shape for name, array in arrays.items()}:
        differing = sorted(set(shapes.items()) ^ {(name, array.shape) for name, array in arrays.items()})
        raise InputError(f"{file}: made by another version of the models; export it again ({differing[0]})")
    values = [
        jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def write_parameters(folder: Path, world: World) -> None:
    """Writes `PARAMETERS`: all variables of a world, the parameters in half precision.

    Raises:
      InputError: A value is beyond half precision's range.
    """
    arrays: dict[str, Any] = {}
    for path, value in nnx.to_flat_state(nnx.state(world)):
        array = np.asarray(value[...])
        name = "/".join(map(str, path))
        if isinstance(value, nnx.Param) and array.dtype == np.float32:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                raise InputError(f"{name}: holds values beyond half precision, up to {np.abs(value[...]).max():.3g}")
        arrays[name] = array
    np.savez(folder / PARAMETERS, **arrays)


def fingerprint(model: nnx.Module) -> str:
    """A hash of a model's variables: equal for equal weights, wherever they lie and whoever saved them."""
    digest = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model))):
        array = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(path: str | Path, compute: Compute = Compute(), step: int | None = None) -> Tokenizer:  # noqa: B008
    """Loads a tokenizer; see `load`."""
    return load(path, "tokenizer", compute, step)


def load_lam(path: str | Path, compute: Compute = Compute(), step: int | None = None) -> LAM:  # noqa: B008
    """Loads a latent action model; see `load`."""
    return load(path, "lam", compute, step)


@dataclasses.dataclass(frozen=True)
class Inference:
    """How a trained model is computed."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and activations; auto takes bfloat16 on an accelerator."""
    quant: Literal["none", "int8"] = "none"
    """Take the products of the blocks' dense layers in int8, whatever the model was trained with."""

    @property
    def compute(self) -> Compute:
        """The same, for `load`."""
        return Compute(self.dtype, quant=self.quant).settled()


def load_world(path: str | Path, compute: Compute = Compute(), step: int | None = None) -> World:  # noqa: B008
    """Loads a world; see `load`."""
    return load(path, "world", compute, step)


def load_agent(path: str | Path, compute: Compute = Compute(), step: int | None = None) -> Agent:  # noqa: B008
    """Loads a policy, with its LAM if it has one; see `load`."""
    return load(path, "agent", compute, step)
