"""Checks arrays against the shapes in their names (see `models/nn.py`), in every public function and method of models/.

Arguments and the fields of what is returned must agree with each other: what is called B twice has one length.
"""

import functools
import importlib
import inspect
import pkgutil
import re
import types
from typing import Any, NamedTuple

import jaxtyping

import models

SUFFIX = re.compile(r"_((?:X|[A-Z](?:m1|p1)?|1)(?:[A-Z](?:m1|p1)?|\d)*)$")
ACTIONS = ("actions_BT", "actions_BTm1", "actions_BS", "action_B")
AXIS = re.compile(r"[A-Z](?:m1|p1)?|\d")


def axes_of(name: str) -> list[str] | None:
    """The axes in a name such as `frames_BTm1HWC`, or None."""
    found = SUFFIX.search(name)
    return AXIS.findall(found[1]) if found else None


class Named(NamedTuple):
    """An array with its shape in its name; `within` is the path to the tuple whose field it is, where it is one."""

    name: str
    array: Any
    within: str = ""


def named_arrays(name: str, value: Any, within: str = "") -> list[Named]:
    """Arrays with shapes in their names: the value, or the fields of a NamedTuple."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [
            found for field, held in value._asdict().items() for found in named_arrays(field, held, f"{within}_{name}")
        ]
    return [Named(name, value, within)] if axes_of(name) and hasattr(value, "shape") else []


def check(where: str, arrays: list[Named]) -> None:
    """Raises AssertionError where an array has another shape than its name and the other arrays say.

    Fields of tuples may be stacked in front; rows R and places S are along time in one cache, along space in another.
    Actions may have a last axis more than their name says: that of their columns (see `models/actions.py`).
    """
    # Plain axes come first: T must be known before T - 1 can be looked at.
    with jaxtyping.jaxtyped("context"):
        known: set[str] = set()
        for name, array, within in sorted(arrays, key=lambda named: "m1" in named.name or "p1" in named.name):
            words = []
            for axis in axes_of(name) or []:
                base = axis[0]
                if axis == "X":
                    words.append("...")
                elif axis.endswith(("m1", "p1")):
                    sign = "-" if axis.endswith("m1") else "+"
                    words.append(f"{base}{sign}1" if base in known else axis)
                else:
                    known.add(axis)
                    words.append(f"{axis}_{within}" if within and axis in "RS" else axis)
            shape = " ".join(["..."] * (bool(within) and "..." not in words) + words)
            if name in ACTIONS and array.ndim == len(axes_of(name) or []) + 1:
                shape += " columns"
            expected = jaxtyping.Shaped[Any, shape]  # type: ignore[valid-type]
            fits = isinstance(array, expected)
            assert fits, f"{where}: {name} has shape {array.shape}, among {[(x.name, x.array.shape) for x in arrays]}"


def checked(function: types.FunctionType) -> Any:
    """The function, with its arguments and results checked."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        arrays = [entry for name, value in given.items() for entry in named_arrays(name, value)]
        check(function.__qualname__, arrays)
        result = function(*args, **kwargs)
        check(f"the result of {function.__qualname__}", arrays + named_arrays("result", result))
        return result

    return wrapper


def install() -> None:
    """Wraps every public function and method of models/, wherever it has been imported to."""
    modules = [importlib.import_module(f"models.{m.name}") for m in pkgutil.iter_modules(models.__path__)]
    replaced = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if isinstance(value, types.FunctionType):
                replaced[value] = checked(value)
            elif isinstance(value, type):
                for method, held in list(vars(value).items()):
                    if method.startswith("_") and method != "__call__":
                        continue
                    if isinstance(held, types.FunctionType):
                        setattr(value, method, checked(held))
                    elif isinstance(held, staticmethod):
                        setattr(value, method, staticmethod(checked(held.__func__)))
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value in replaced:
                setattr(module, name, replaced[value])
