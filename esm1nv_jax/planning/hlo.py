"""Reads a compiled program: its kernels, the bytes and FLOPs of each, its collectives.

XLA prints what it compiled as text (`compiled.as_text()`). On GPUs it offers no cost analysis, and
its cost analysis counts the body of a loop once, so the text is what is read. Every instruction of
the entry computation that computes or moves something is one kernel. A kernel reads each operand
once and writes its result once: caches are not modelled. Arrays that a TPU keeps in its on-chip
memory, `S(1)` in their layout, take no bytes of the device's main memory.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "c64": 8}
_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)}
_NO_WORK = """
parameter constant tuple get-tuple-element bitcast bitcast-convert partition-id replica-id iota
after-all opt-barrier""".split()
_TRANSCENDENTAL = """
exponential tanh erf log log-plus-one exponential-minus-one rsqrt sqrt power logistic divide
""".split()
_ARITHMETIC = """
add subtract multiply maximum minimum select compare and or xor not negate abs convert
shift-right-logical shift-left clamp reduce reduce-window""".split()
_MOVES = """
copy transpose concatenate pad slice reshape parameter bitcast fusion broadcast constant
dynamic-slice dynamic-update-slice copy-start slice-start""".split()
# Of each element in a kernel of kernels/token_kernel.py, in the PTX of its loop.
TOKEN_KERNEL_OPERATIONS = {
    "residual_norm_forward": 43,
    "residual_norm_backward": 60,
    "gelu_backward": 24,
}
_PARTIAL = {"gather", "dynamic-slice", "slice"}  # read as much as they return
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*S\(1\)[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*\) -> .*)?\{\s*$")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or one collective. `bytes`, `flops` and `vector` are of all `times` together."""

    name: str
    opcode: str
    kind: str  # gemm, attention, collective, reduction, elementwise, copy or other
    phase: str  # forward, backward or optimizer (with masking)
    op: str  # the operation of the Python program it comes from
    shape: str  # of the result
    bytes: float
    flops: float  # of matrix products
    vector: float  # operations on elements outside of products
    times: int = 1
    asynchronous: bool = False  # may overlap with compute


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # everything after the operands; of parameters and constants, the operand too

    def attribute(self, key: str) -> str:
        return _find(rf"\b{key}=%?([\w.$-]+)", self.rest)

    @property
    def op(self) -> str:
        return _find(r'op_name="([^"]*)', self.rest)

    @property
    def phase(self) -> str:
        op = self.op
        return "backward" if "transpose(" in op else "forward" if "jvp(" in op else "optimizer"


_Computation = dict[str, _Instruction]


class Program:
    """The kernels of one compiled program, each loop as often as it runs."""

    def __init__(self, text: str):
        self.computations, entry = _parse(text)
        self.kernels: list[Kernel] = []  # in the order of the schedule
        self.needed_at: dict[str, int] = {}  # collective: index of the kernel that needs its result
        self.uncounted_loops: list[str] = []  # whose number of iterations the text does not tell
        self._walk(entry, 1, False)

    def of_kind(self, kind: str) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.kind == kind]

    def saved_activations(self) -> float:
        """Bytes of results of the forward pass that the backward pass reads."""
        return max(map(_saved_activations, self.computations.values()))

    def _walk(self, computation: str, times: int, asynchronous: bool) -> None:
        scope = self.computations[computation]
        for it in scope.values():
            if it.opcode in _NO_WORK or '"AllocateBuffer"' in it.rest:
                continue
            if it.opcode.endswith("-done"):
                self.needed_at.update({operand: len(self.kernels) for operand in it.operands})
                continue
            inner = it.attribute("body") or it.attribute("to_apply") or it.attribute("calls")
            if it.opcode == "while":
                self._walk(inner, times * self._iterations(it, scope), False)
            elif it.opcode in ("call", "async-start") and inner in self.computations:
                self._walk(inner, times, it.opcode == "async-start")
            elif it.opcode == "conditional":
                for branch in re.findall(r"%([\w.$-]+)", it.rest.split("metadata")[0]):
                    if branch in self.computations:
                        self._walk(branch, times, asynchronous)
                        break
            else:
                self.kernels.append(self._kernel(it, scope, times, asynchronous))

    def _iterations(self, loop: _Instruction, scope: _Computation) -> int:
        """Of a loop over a counter: as XLA states it, else from its condition `counter < limit`."""
        if stated := _find(r'known_trip_count"?[:=]\{"n":"?(\d+)', loop.rest):
            return int(stated)
        condition = self.computations.get(loop.attribute("condition"), {})
        initial = scope.get(loop.operands[0])

        def value(name: str) -> int | None:
            """Of a constant, or of an element of the loop's state before the first iteration."""
            it = condition.get(name)
            if it is not None and it.opcode == "get-tuple-element" and initial is not None:
                it = _source(initial.operands[int(it.attribute("index"))], scope, ("copy",))
            text = _find(r"^(-?\d+)\)", it.rest) if it and it.opcode == "constant" else ""
            return int(text) if text else None

        compares = [it for it in condition.values() if it.opcode == "compare"]
        if len(compares) == 1 and "direction=LT" in compares[0].rest:
            first, limit = map(value, compares[0].operands)
            if first is not None and limit is not None:
                return limit - first
        self.uncounted_loops.append(loop.name)
        return 1

    def _nested(
        self, it: _Instruction, scope: _Computation
    ) -> Iterator[tuple[_Instruction, _Computation]]:
        """An instruction and those of the fusions in it, each with its computation."""
        yield it, scope
        if it.opcode == "fusion":
            inner = self.computations.get(it.attribute("calls"), {})
            for instruction in inner.values():
                yield from self._nested(instruction, inner)

    def _kernel(self, it: _Instruction, scope, times: int, asynchronous: bool) -> Kernel:
        collective = it.opcode.startswith(COLLECTIVES)
        nested = list(self._nested(it, scope))
        flops = sum(_product_flops(*pair) for pair in nested)
        if collective:
            # What one device adds to the sum; a start names operands and results both.
            sources = (_source(operand, scope) for operand in it.operands)
            moved = sum(size(source.shape, on_chip=True) for source in sources if source)
        elif it.opcode == "copy-start":  # its result names the destination and the source
            moved = self._read(it, scope) + size(it.shape.split(", ")[0])
        else:
            moved = self._read(it, scope) + size(it.shape)
        started = (asynchronous or it.opcode.endswith("-start")) and '"is_sync":true' not in it.rest
        return Kernel(
            name=it.name,
            opcode=it.opcode,
            kind="collective" if collective else _kind(it, {i.opcode for i, _ in nested}, flops),
            phase=it.phase,
            op=it.op,
            shape=re.sub(r"\{[\d,:A-Z()]*\}", "", it.shape),
            bytes=moved * times,
            flops=flops * times,
            vector=sum(_vector_operations(*pair) for pair in nested) * times,
            times=times,
            asynchronous=started,
        )

    def _read(self, it: _Instruction, scope: _Computation) -> float:
        inner = self.computations.get(it.attribute("calls"), {}) if it.opcode == "fusion" else {}
        parameters = {
            int(i.rest.split(")")[0]): i.name for i in inner.values() if i.opcode == "parameter"
        }
        total, seen = 0.0, set()
        for number, operand in enumerate(it.operands):
            source = _source(operand, scope)
            if source is None or source.name in seen or source.opcode == "constant":
                continue
            seen.add(source.name)
            whole = size(scope[operand].shape)
            users = [i for i in inner.values() if parameters.get(number) in i.operands]
            if users and all(i.opcode in _PARTIAL for i in users):
                whole = min(whole, sum(size(i.shape, on_chip=True) for i in users))
            elif it.opcode in _PARTIAL and number == 0:
                whole = min(whole, size(it.shape, on_chip=True))
            total += whole
        return total


def _saved_activations(scope: _Computation) -> float:
    saved: dict[str, float] = {}
    for it in scope.values():
        if it.opcode in _NO_WORK or it.phase != "backward":
            continue
        for operand in it.operands:
            source, shape = (
                _source(operand, scope),
                scope[operand].shape if operand in scope else "",
            )
            if source is not None and source.opcode == "get-tuple-element":
                shape, source = source.shape, _source(source.operands[0], scope)
            if source and source.opcode not in _NO_WORK and source.phase == "forward":
                saved[f"{source.name} {shape}"] = size(shape)
    return sum(saved.values())


def size(shape: str, on_chip: bool = False) -> float:
    """Bytes of a shape, or of all arrays of a tuple, in main memory (or also `on_chip`)."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, chip in _ARRAY.findall(shape)
        if on_chip or not chip
    )


def _dimensions(shape: str) -> tuple[int, ...]:
    """Of an array, or of the first one of a tuple."""
    match = _ARRAY.search(shape)
    return tuple(int(n) for n in match[2].split(",") if n) if match else ()


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = collections.defaultdict(dict)
    entry, current = "", ""
    for line in re.sub(r"\n(?=\"|\}\})", " ", text).splitlines():  # one instruction, several lines
        if match := _LINE.match(line):
            if not current:
                continue
            name, shape, opcode, tail = match.groups()
            literal = opcode in ("parameter", "constant")
            operands, rest = ((), tail) if literal else _operands(tail)
            computations[current][name] = _Instruction(name, shape, opcode, operands, rest)
        elif match := _HEADER.match(line):
            current = match.group(2)
            entry = current if match.group(1) else entry
        elif line.startswith("}"):
            current = ""
    return dict(computations), entry


def _operands(tail: str) -> tuple[tuple[str, ...], str]:
    depths = itertools.accumulate(((c == "(") - (c == ")") for c in tail), initial=1)
    end = next((i for i, depth in enumerate(depths) if depth == 0), len(tail)) - 1
    return tuple(re.findall(r"%([\w.$-]+)", tail[:end])), tail[end + 1 :]


def _source(name: str, scope: _Computation, through=()) -> _Instruction | None:
    """The instruction that made an operand, behind bitcasts and opcodes in `through`."""
    it = scope.get(name)
    while it is not None and it.opcode in ("bitcast", *through) and it.operands:
        it = scope.get(it.operands[0])
    return it


def _product_flops(it: _Instruction, scope: _Computation) -> float:
    """FLOPs of a dot, a cuBLAS call or a convolution, as which TPUs compute products."""
    if it.opcode == "convolution":
        return _convolution_flops(it, scope)
    if it.opcode == "custom-call" and re.search(r"gemm|cublas", it.rest[:200]):
        contracting = _find(r'"lhs_contracting_dimensions":\[([^\]]*)', it.rest)
    elif it.opcode == "dot":
        contracting = _find(r"lhs_contracting_dims=\{([^}]*)", it.rest)
    else:
        return 0.0
    if it.operands[0] not in scope:
        return 0.0
    left = _dimensions(scope[it.operands[0]].shape)
    depth = math.prod(left[int(i)] for i in re.findall(r"\d+", contracting))
    return 2.0 * depth * math.prod(_dimensions(it.shape))


def _convolution_flops(it: _Instruction, scope: _Computation) -> float:
    """Multiplications with elements that exist: batch dimensions of a product become spatial ones,
    whose windows are padded or dilated so that each holds one real element."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.rest)
    if labels is None or any(name not in scope for name in it.operands):
        return 0.0
    left, right, out = labels.groups()
    shapes = [_dimensions(scope[name].shape) for name in it.operands[:2]] + [_dimensions(it.shape)]
    window = dict(re.findall(r"(\w+)=([\dx_]+)", _find(r"window=\{([^}]*)", it.rest)))

    def values(key: str, i: int, default: str) -> list[int]:
        text = window[key].split("x")[i] if key in window else default
        return [int(n) for n in text.split("_")]

    pairs = 1  # (window position, offset in it) that hit a real element
    for i in range(sum(label.isdigit() for label in out)):
        given, made = shapes[0][left.index(str(i))], shapes[2][out.index(str(i))]
        (extent,), (stride,) = values("size", i, "1"), values("stride", i, "1")
        (gap,), (spread,) = values("lhs_dilate", i, "1"), values("rhs_dilate", i, "1")
        low = values("pad", i, "0_0")[0]
        places = (o * stride + k * spread - low for o in range(made) for k in range(extent))
        pairs *= sum(p >= 0 and p % gap == 0 and p // gap < given for p in places)
    depth = shapes[1][right.index("i")]
    return 2.0 * pairs * depth * shapes[2][out.index("b")] * shapes[2][out.index("f")]


def _vector_operations(it: _Instruction, scope: _Computation) -> float:
    """Operations on elements; a transcendental counts as the instructions it takes, about 12."""
    cost = 12 if it.opcode in _TRANSCENDENTAL else 1 if it.opcode in _ARITHMETIC else 0
    cost = TOKEN_KERNEL_OPERATIONS.get(_token_kernel(it), cost)
    sized = scope.get(it.operands[0], it) if it.opcode in ("reduce", "reduce-window") else it
    return float(cost * math.prod(_dimensions(sized.shape))) if cost else 0.0


def _token_kernel(it: _Instruction) -> str:
    """Its name in TOKEN_KERNEL_OPERATIONS, or an empty text."""
    names = TOKEN_KERNEL_OPERATIONS if it.opcode == "custom-call" else ()
    return next((name for name in names if name in it.op), "")


def _kind(it: _Instruction, opcodes: set[str], flops: float) -> str:
    target = it.attribute("custom_call_target") or it.rest[:300]
    fused = it.opcode == "custom-call" and ("flash_" in it.op or "splash" in it.op)
    if fused or "fmha" in target:
        return "attention"
    if flops:
        return "gemm"
    if name := _token_kernel(it):
        return "elementwise" if name == "gelu_backward" else "reduction"
    if opcodes & {"sort", "scatter", "gather"} or it.opcode == "custom-call":
        return "other"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    return "copy" if opcodes <= set(_MOVES) else "elementwise"


def _find(pattern: str, text: str) -> str:
    """The first group of a pattern where it matches, else an empty text."""
    match = re.search(pattern, text)
    return match[1] if match else ""
