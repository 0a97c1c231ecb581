"""From the command line to `main`: parsing, presets and one-line errors."""

import contextlib
import ctypes
import dataclasses
import io
import os
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro

from models.errors import DivergenceError, InputError

Config = TypeVar("Config")


def run(main: Callable[[Config], None], config: type[Config], presets: Mapping[str, Config] | None = None) -> None:
    """Parses `config` from the command line and calls `main` with it.

    Args:
      main: The script's main function.
      config: A dataclass; each field with its docstring becomes a flag.
      presets: Full sets of defaults by name, chosen by `--preset NAME`; flags override them. The first is the
        default.

    Input errors, diverged trainings, full devices and failed file operations become one line on stderr and exit status
    1, Ctrl-C exit status 130.
    """
    keep_freed_memory()
    raise_file_limit()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main(with_paths(parse(config, presets, sys.argv[1:])))
    except (InputError, DivergenceError, OSError) as error:
        print(f"error: {with_flags(error, config)}", file=sys.stderr)
        raise SystemExit(1) from None
    except (RuntimeError, AssertionError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: {with_flags(out_of_memory(error, config), config)}", file=sys.stderr)
            raise SystemExit(1) from None
        if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):  # JAX starts devices
            raise
        wanted, reason = os.environ.get("JAX_PLATFORMS", ""), " ".join(str(error).split())[:200]
        print(f"error: JAX_PLATFORMS={wanted}: there is no such device here ({reason or 'not found'})", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def out_of_memory(error: Exception, config: Any) -> InputError:
    """What a device's memory has no room for, how much there is, and which of the command's flags take less."""
    import jax

    wanted = re.search(r"allocat\w+ ([\d.]+ ?(?:bytes|[KMGT]i?B))", str(error))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = f"; there are {limit / 2**30:.1f} GiB in all" if limit else ""
    less = {
        "remat": "`remat` block",
        "grad_accum": "a larger `grad_accum`",
        "fsdp": "`fsdp` over more devices",
        "batch_size": "a smaller `batch_size`",
        "num_clips": "fewer clips (`num_clips`)",
        "max_players": "fewer `max_players`",
    }
    flags = [text for name, text in less.items() if name in {field.name for field in dataclasses.fields(config)}]
    remedy = f"; less is taken by {', '.join(flags)}" if flags else ""
    return InputError(
        f"out of memory on a device: no room for another {wanted[1] if wanted else 'array'}{there}{remedy}"
    )


def with_flags(error: Exception, config: Any) -> str:
    """An error's message with the fields that it names (`width`) as the flags that set them (--model.width)."""
    flags: dict[str, str] = {}
    of = getattr(error, "of", None)
    for field in dataclasses.fields(config):
        kind = field.type
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            flags.setdefault(field.name, f"--{field.name}")
        elif of is not None and issubclass(kind, of):
            flags |= {inner.name: f"--{field.name}.{inner.name}" for inner in dataclasses.fields(kind)}
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), str(error))


def with_paths(config: Config) -> Config:
    """The configuration with ~ in its paths as the home folder.

    Raises:
      InputError: A path is an address of a store (gs://, s3://): files are read and written here, nowhere else.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if not (field.name.endswith(PATH_FIELDS) and all(isinstance(path, str) for path in values)):
            continue
        for path in values:
            if re.match(r"\w+://", path):
                raise InputError(f"`{field.name}` {path}: must be a folder; mount the store, or copy what is in it")
        paths = tuple(os.path.expanduser(path) for path in values)
        changes[field.name] = paths if isinstance(value, tuple) else paths[0]
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


PATH_FIELDS = ("_dir", "checkpoint", "init_from", "_cache", "run", "out", "metrics", "compare")
"""Ends of the names of those fields that hold paths."""


DEFAULT_CACHE = "~/.cache/jafar"


def raise_file_limit() -> None:
    """As many open files as the system allows: datasets have a file for each few dozen clips."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_up_jax(compile_cache: str, deterministic: bool = False) -> None:
    """Sets up JAX, before anything touches a device.

    Args:
      compile_cache: Folder of compiled programs; empty for none. JAX_COMPILATION_CACHE_DIR wins over the default.
      deterministic: Only deterministic kernels on a GPU, not chosen by trial.
    """
    import jax  # not at the top: workers that record games start faster without it

    if deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    if compile_cache:
        is_default = os.path.expanduser(compile_cache) == os.path.expanduser(DEFAULT_CACHE)
        if not (is_default and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
            jax.config.update("jax_compilation_cache_dir", _writable(compile_cache))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _writable(folder: str) -> str:
    """The folder, or, for a user without a home or with one that is read-only, a temporary one."""
    folder = os.path.expanduser(folder)
    try:
        if folder.startswith("~"):
            raise OSError("no HOME")
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        raise OSError("not writable")
    except OSError as error:
        elsewhere = os.path.join(tempfile.gettempdir(), f"jafar-{os.getuid()}")
        print(f"compiled programs go to {elsewhere}, not to {folder} ({error.strerror or error})", file=sys.stderr)
        return elsewhere


def keep_freed_memory() -> None:
    """Has malloc keep freed memory instead of giving it back to the system, where JAX computes on CPUs.

    XLA's CPU backend frees all its buffers after each step; glibc would hand such large blocks back, and a quarter of
    the next step would go into getting them anew, page by page. Works only before JAX starts its threads.
    """
    libc = ctypes.CDLL(None)
    if os.path.exists("/dev/nvidiactl") or not hasattr(libc, "mallopt"):  # a GPU, or a C library without such options
        return
    arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1  # names in malloc.h
    libc.mallopt(arena_max, 1)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(top_pad, 2**30)
    libc.mallopt(trim_threshold, -1)


def parse(config: type[Config], presets: Mapping[str, Config] | None, args: list[str]) -> Config:
    """Builds `config` from `args`; raises InputError for a preset or value that cannot work."""
    if not presets:
        return tyro.cli(config, args=args)
    args, name = _take_preset(args, default=next(iter(presets)))
    if name not in presets:
        raise InputError(f"--preset {name}: no such preset; choose one of {', '.join(presets)}")
    described = f"--preset {{{','.join(presets)}}} sets all defaults at once; other flags override it. Shown: {name}."
    return tyro.cli(config, default=presets[name], args=args, description=f"{config.__doc__}\n\n{described}")


def _take_preset(args: list[str], default: str) -> tuple[list[str], str]:
    """Splits `--preset NAME` or `--preset=NAME` off the arguments."""
    rest, name = [], default
    words = iter(args)
    for word in words:
        if word == "--preset":
            name = next(words, "")
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
        else:
            rest.append(word)
    return rest, name
