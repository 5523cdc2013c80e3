"""Reads a compiled program: its kernels, the bytes and FLOPs of each, its collectives.

XLA prints what it compiled as text (`compiled.as_text()`); on GPUs it offers no cost analysis, so
the text is all there is. Every instruction of the entry computation that is not mere naming is one
kernel. A kernel reads each of its operands once and writes its result once: what caches add or take
away is not known here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

_WIDTH = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
_NAMING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "replica-id",
    "iota",
    "after-all",
    "bitcast-convert",
    "opt-barrier",
}
_TRANSCENDENTAL = {
    "exponential",
    "tanh",
    "erf",
    "log",
    "log-plus-one",
    "exponential-minus-one",
    "rsqrt",
    "sqrt",
    "power",
    "logistic",
    "divide",
}
_ARITHMETIC = {
    "add",
    "subtract",
    "multiply",
    "maximum",
    "minimum",
    "select",
    "compare",
    "and",
    "or",
    "xor",
    "not",
    "negate",
    "abs",
    "convert",
    "shift-right-logical",
    "shift-left",
    "clamp",
    "reduce",
    "reduce-window",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_PARTIAL = {"gather", "dynamic-slice", "slice"}  # read as much as they give

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*\) -> .*)?\{\s*$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or one collective. `bytes`, `flops`, `vector`: of all its `times` together."""

    name: str
    opcode: str
    kind: str  # gemm, attention, collective, reduction, elementwise, copy or other
    phase: str  # forward, backward or update
    op: str  # where it comes from in the Python program
    shape: str  # of the result
    bytes: float
    flops: float  # of products
    vector: float  # operations on elements outside of products
    times: int = 1
    asynchronous: bool = False  # of a collective: whether it may overlap with compute
    groups: str = ""  # of a collective


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # everything after the operands

    def attribute(self, key: str) -> str:
        found = re.search(rf"\b{key}=%?([\w.$-]+)", self.rest)
        return found.group(1) if found else ""

    def numbers(self, key: str) -> list[int]:
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.rest)
        return [int(n) for n in found.group(1).split(",") if n] if found else []


class Program:
    """The kernels of one compiled program, with loops unrolled into their counts."""

    def __init__(self, text: str):
        self.text = text
        self.computations, self.entry = _parse(text)
        self.kernels: list[Kernel] = []  # in the order of the schedule
        self.ends: dict[str, int] = {}  # of a collective: where in that order its result is needed
        self._walk(self.entry, 1, False)

    def of(self, kind: str) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.kind == kind]

    def kept(self) -> float:
        """Bytes of results of the forward that the backward reads: activations at their height."""
        return max(self._kept_in(computation) for computation in self.computations.values())

    def _kept_in(self, around) -> float:
        phases = {it.name: _phase(_op(it)) for it in around.values()}
        kept: dict[str, float] = {}
        for it in around.values():
            if it.opcode in _NAMING or phases[it.name] == "forward":
                continue
            for operand in it.operands:
                source, size_of = _base(operand, around), operand
                if source is not None and source.opcode == "get-tuple-element":
                    size_of, source = source.name, _base(source.operands[0], around)
                if source is None or source.opcode in _NAMING or phases[source.name] != "forward":
                    continue
                if phases[it.name] == "backward":
                    kept[f"{source.name} {around[size_of].shape}"] = size(around[size_of].shape)
        return sum(kept.values())

    def _walk(self, computation: str, times: int, asynchronous: bool) -> None:
        instructions = self.computations[computation]
        for it in instructions.values():
            if it.opcode in _NAMING:
                continue
            if it.opcode.endswith("-done"):
                self.ends.update({operand: len(self.kernels) for operand in it.operands})
                continue
            inner = it.attribute("body") or it.attribute("to_apply") or it.attribute("calls")
            if it.opcode == "while":
                trips = re.search(r'known_trip_count"?[:=]\{"n":"?(\d+)', it.rest)
                self._walk(inner, times * int(trips[1] if trips else 1), False)
            elif it.opcode in ("call", "async-start") and inner in self.computations:
                self._walk(inner, times, it.opcode == "async-start")
            elif it.opcode == "conditional":
                for branch in re.findall(r"%([\w.$-]+)", it.rest.split("metadata")[0]):
                    if branch in self.computations:
                        self._walk(branch, times, asynchronous)
                        break
            else:
                self.kernels.append(self._kernel(it, instructions, times, asynchronous))

    def _kernel(self, it: _Instruction, around, times: int, asynchronous: bool) -> Kernel:
        op = _op(it)
        collective = next((c for c in COLLECTIVES if it.opcode.startswith(c)), "")
        inner = self.computations.get(it.attribute("calls"), {}) if it.opcode == "fusion" else {}
        flops = _dot_flops(it, around) + sum(_dot_flops(i, inner) for i in inner.values())
        moved = self._read(it, around) + size(it.shape)
        if collective:
            # What one device sends into the sum; a start names operands and results both.
            moved = sum(size(_base(o, around).shape) for o in it.operands if o in around)
        opcodes = {it.opcode, *(i.opcode for i in inner.values())}
        return Kernel(
            name=it.name,
            opcode=it.opcode,
            kind="collective" if collective else _kind(it, opcodes, flops, op),
            phase=_phase(op),
            op=op,
            shape=re.sub(r"\{[\d,:A-Z()]*\}", "", it.shape),
            bytes=moved * times,
            flops=flops * times,
            vector=sum(_vector(i, inner) for i in inner.values() or [it]) * times,
            times=times,
            asynchronous=bool(collective)
            and (asynchronous or it.opcode.endswith("-start"))
            and '"is_sync":true' not in it.rest,
            groups=_between(it.rest, "replica_groups=", ", ") if collective else "",
        )

    def _read(self, it: _Instruction, around) -> float:
        inner = self.computations.get(it.attribute("calls"), {}) if it.opcode == "fusion" else {}
        parameters = {
            int(i.rest.split(")")[0]): i.name for i in inner.values() if i.opcode == "parameter"
        }
        total, seen = 0.0, set()
        for number, operand in enumerate(it.operands):
            source = _base(operand, around)
            if source is None or source.name in seen or source.opcode == "constant":
                continue
            seen.add(source.name)
            whole = size(around[operand].shape)
            users = [i for i in inner.values() if parameters.get(number) in i.operands]
            if users and all(i.opcode in _PARTIAL for i in users):
                whole = min(whole, sum(size(i.shape) for i in users))
            elif it.opcode in _PARTIAL and number == 0:
                whole = min(whole, size(it.shape))
            total += whole
        return total


def size(shape: str) -> float:
    """Bytes of a shape, or of all arrays of a tuple."""
    return sum(
        _WIDTH.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shape)
    )


@functools.cache
def _elements(shape: str) -> tuple[int, ...]:
    found = _ARRAY.search(shape)
    return tuple(int(n) for n in found.group(2).split(",") if n) if found else ()


def _parse(text: str):
    computations: dict[str, dict[str, _Instruction]] = collections.defaultdict(dict)
    entry, current = "", ""
    for line in text.splitlines():
        if match := _LINE.match(line):
            if not current:
                continue
            name, shape, opcode, tail = match.groups()
            operands, rest = _operands(tail) if opcode != "parameter" else ((), tail)
            computations[current][name] = _Instruction(name, shape, opcode, operands, rest)
        elif match := _HEADER.match(line):
            current = match.group(2)
            entry = current if match.group(1) else entry
        elif line.startswith("}"):
            current = ""
    return dict(computations), entry


def _operands(tail: str) -> tuple[tuple[str, ...], str]:
    depth, end = 1, 0
    for end, c in enumerate(tail):  # noqa: B007, the place is what is wanted
        depth += (c == "(") - (c == ")")
        if depth == 0:
            break
    return tuple(re.findall(r"%([\w.$-]+)", tail[:end])), tail[end + 1 :]


def _base(name: str, around) -> _Instruction | None:
    """What an operand is before it was merely renamed."""
    it = around.get(name)
    while it is not None and it.opcode == "bitcast" and it.operands:
        it = around.get(it.operands[0])
    return it


def _dot_flops(it: _Instruction, around) -> float:
    if it.opcode == "custom-call" and "gemm" in it.rest[:200]:
        it = dataclasses.replace(it, shape=it.shape.strip("()").split(", ")[0])
        contracting = [
            int(n)
            for n in re.findall(r"\d+", _between(it.rest, '"lhs_contracting_dimensions":[', "]"))
        ]
    elif it.opcode == "dot":
        contracting = it.numbers("lhs_contracting_dims")
    else:
        return 0.0
    left = around.get(it.operands[0])
    if left is None:
        return 0.0
    depth = math.prod(_elements(left.shape)[i] for i in contracting)
    return 2.0 * depth * math.prod(_elements(it.shape))


def _vector(it: _Instruction, around) -> float:
    """Operations on elements; a transcendental counts as so many as it takes about."""
    shape = it.shape
    if it.opcode in ("reduce", "reduce-window"):
        first = around.get(it.operands[0])
        shape = first.shape if first else shape
    cost = 12 if it.opcode in _TRANSCENDENTAL else 1 if it.opcode in _ARITHMETIC else 0
    return cost * math.prod(_elements(shape)) if cost else 0.0


def _kind(it: _Instruction, opcodes: set[str], flops: float, op: str) -> str:
    target = it.attribute("custom_call_target") or it.rest[:300]
    if "flash_" in op or "fmha" in target or "splash" in op:
        return "attention"
    if flops:
        return "gemm"
    if opcodes & {"sort", "scatter", "gather"} or it.opcode == "custom-call":
        return "other"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    moves = {
        "copy",
        "transpose",
        "concatenate",
        "pad",
        "slice",
        "reshape",
        "parameter",
        "bitcast",
        "fusion",
        "broadcast",
        "constant",
        "dynamic-slice",
        "dynamic-update-slice",
        "copy-start",
    }
    return "copy" if opcodes <= moves else "elementwise"


def _op(it: _Instruction) -> str:
    return _between(it.rest, 'op_name="', '"')


def _phase(op: str) -> str:
    return "backward" if "transpose(" in op else "forward" if "jvp(" in op else "update"


def _between(text: str, start: str, end: str) -> str:
    at = text.find(start)
    return "" if at < 0 else text[at + len(start) :].split(end, 1)[0]
