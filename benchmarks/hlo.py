"""What a compiled program does, read from its text: what its devices tell each other, and what it launches."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import jaxprs_in_params

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "broadcast", "domain", "add-dependency", "async-update"),
}
"""Instructions that launch nothing of their own; nor does what ends something asynchronous."""

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One instruction of a program.

    shape: Of its result, as it is written.
    rest: Operands and attributes, as they are written.
    """

    opcode: str
    shape: str
    rest: str


class Collective(NamedTuple):
    """What devices tell each other.

    shapes: Of the whole arrays: gathered, or before they are scattered.
    size: Bytes of these.
    devices: How many take part.
    times: How often it happens.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    devices: int
    times: int

    @property
    def moved(self) -> float:
        """Bytes that each device sends, in a ring."""
        share = (self.devices - 1) / self.devices
        return self.size * self.times * share * (2 if self.kind == "all-reduce" else 1)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the one that it starts with."""
    found: dict[str, list[Instruction]] = {}
    entry, here = "", ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            here = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
            entry = here if line.startswith("ENTRY") else entry
            found[here] = []
        elif (match := INSTRUCTION.match(line)) and here:
            found[here].append(Instruction(match[3], match[2], match[4]))
    return found, entry


def run(text: str, into_fusions: bool) -> Iterator[tuple[Instruction, int]]:
    """All instructions that a program runs, and how often: those of a loop as often as it turns, where that is known.

    Args:
      into_fusions: Also what is fused into one kernel.
    """
    known, entry = computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in known.get(name, ()):
            yield instruction, times
            inner = times
            if instruction.opcode == "while":
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
                inner *= int(turns[1]) if turns else 1
            elif instruction.opcode not in ("call", "conditional", "async-start") and not into_fusions:
                continue
            called = re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", instruction.rest)
            for several in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
                called += [branch.strip().lstrip("%") for branch in several.split(",")]
            for other in called:
                yield from walk(other, inner)

    yield from walk(entry, 1)


def arrays(shape: str) -> list[tuple[tuple[int, ...], int]]:
    """Dimensions and bytes of the arrays in a shape as it is written."""
    found = []
    for kind, written in ARRAY.findall(shape):
        dimensions = tuple(int(n) for n in written.split(",") if n)
        found.append((dimensions, math.prod(dimensions) * BYTES.get(kind, 4)))
    return found


def collectives(text: str) -> list[Collective]:
    """All that the devices of a program tell each other, over its loops."""
    found = []
    for instruction, times in run(text, into_fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        devices = group_size(instruction.rest)
        if devices == 1:
            continue
        given = arrays(instruction.shape)
        started = instruction.opcode.endswith("-start") and kind != "all-reduce"
        if started:  # what goes in stands before what comes out; the whole arrays are wanted
            half = len(given) // 2
            given = given[:half] if kind == "reduce-scatter" else given[half:]
        scale = devices if kind == "reduce-scatter" and not started else 1
        size = scale * sum(size for _, size in given)
        found.append(Collective(kind, tuple(dimensions for dimensions, _ in given), size, devices, times))
    return found


def group_size(rest: str) -> int:
    """How many devices take part in a collective, in any of the ways in which a program writes that down; else 2."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2


def kernels(text: str) -> Counter[str]:
    """How many kernels of each kind a program launches; custom calls by their target."""
    counts: Counter[str] = Counter()
    for instruction, times in run(text, into_fusions=False):
        if instruction.opcode in NO_KERNEL or instruction.opcode.endswith("-done"):
            continue
        target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
        counts[target[1] if target else instruction.opcode] += times
    return counts


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products of a traced program, those of recomputed activations too."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            total += turns * product_flops(inner)
    return total


def int8_products(text: str) -> int:
    """Matrix products of int8 that a program says, each once however often it runs: those summed in int32."""
    products = ("dot", "convolution", "custom-call")
    found = (each for part in computations(text)[0].values() for each in part)
    return sum(each.opcode in products and each.shape.lstrip("(").startswith("s32[") for each in found)
