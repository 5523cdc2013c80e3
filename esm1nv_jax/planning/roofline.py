"""Time and memory of a compiled step, from its kernels and a chip's figures. A roofline.

A kernel takes the longest of its products (FLOPs over peak), its other operations and its reading
and writing (bytes over bandwidth), each at the stated efficiency. Attention takes the sum of its
products and of what surrounds them (exponentials, dropout's hash), for no overlap of them is sure.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from esm1nv_jax.planning.chips import Chip
from esm1nv_jax.planning.hlo import Kernel, Program

EFFICIENCY = 0.85  # of the peaks of products and of memory
ATTENTION_EFFICIENCY = 0.7  # of the peak of products inside flash attention: assumed, small tiles
# Of each probability, each time it is computed: instructions in the PTX of the loops of `flash`.
SOFTMAX_OPERATIONS = 10  # mask, scale, maximum, exponential, sum, rounding
DROPOUT_OPERATIONS = 13  # the hash, its comparison, the selection


@dataclasses.dataclass(frozen=True)
class Load:
    """What one device has to do in one update, from real rows."""

    rows: int
    row_length: int
    tokens: int  # with <s> and </s>, without padding
    residues: int
    sequences: int
    squares: float  # sum of squared segment lengths
    selected: int  # positions predicted
    tiles: tuple[int, int]  # tiles of scores that flash attention visits: forward, backward

    @property
    def places(self) -> int:
        return self.rows * self.row_length


@dataclasses.dataclass(frozen=True)
class Timed:
    kernel: Kernel
    seconds: float
    bound: str  # compute, memory or network


@dataclasses.dataclass(frozen=True)
class Estimate:
    kernels: tuple[Timed, ...]
    exposed: float  # seconds of collectives that nothing overlaps
    hidden: float  # seconds of collectives under compute

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.kernels if t.kernel.kind != "collective") + self.exposed

    def classes(self) -> dict[tuple[str, str], dict[str, float]]:
        """By (phase, kind): number, bytes, FLOPs, seconds."""
        found = collections.defaultdict(lambda: collections.defaultdict(float))
        for t in self.kernels:
            total = found[t.kernel.phase, t.kernel.kind]
            total["kernels"] += t.kernel.times
            total["bytes"] += t.kernel.bytes
            total["flops"] += t.kernel.flops
            total["seconds"] += t.seconds if t.kernel.kind != "collective" else 0.0
        return {key: dict(value) for key, value in found.items()}


def estimate(
    program: Program,
    chip: Chip,
    load: Load,
    heads: int,
    dropout: float,
    microbatches: int,
    hosts: int,
    per_host: int,
) -> Estimate:
    """Times every kernel; collectives overlap with the kernels scheduled while they are under way.

    heads, dropout: of attention, whose kernels do not tell. hosts, per_host: devices.
    """
    timed = [
        _time(kernel, chip, load, heads, dropout, microbatches, hosts, per_host)
        for kernel in program.kernels
    ]
    exposed = hidden = 0.0
    for i, t in enumerate(timed):
        if t.kernel.kind != "collective":
            continue
        end = program.ends.get(t.kernel.name, i)
        under = sum(
            other.seconds for other in timed[i + 1 : end] if other.kernel.kind != "collective"
        )
        covered = min(t.seconds, under) if t.kernel.asynchronous else 0.0
        hidden, exposed = hidden + covered, exposed + t.seconds - covered
    return Estimate(tuple(timed), exposed, hidden)


def _time(kernel, chip, load, heads, dropout, microbatches, hosts, per_host) -> Timed:
    if kernel.kind == "collective":
        devices = hosts * per_host
        speed = EFFICIENCY * chip.link
        if hosts > 1:  # a ring over all hosts passes each of a host's network cards
            speed = min(speed, EFFICIENCY * chip.network_of(hosts) * per_host)
        twice = 2 if kernel.opcode.startswith("all-reduce") else 1
        moved = twice * kernel.bytes * (devices - 1) / devices
        return Timed(kernel, moved / speed if speed else 0.0, "network")
    memory = kernel.bytes / (chip.bandwidth * EFFICIENCY) + chip.launch * kernel.times
    compute = kernel.flops / (chip.flops * EFFICIENCY)
    if chip.vector:
        compute = max(compute, kernel.vector / (chip.vector * EFFICIENCY))
    if kernel.kind == "attention":
        compute = attention_seconds(kernel, chip, load, heads, dropout) / microbatches
        compute *= kernel.times
    if compute > memory:
        return Timed(kernel, compute, "compute")
    return Timed(kernel, memory, "memory")


def attention_seconds(kernel: Kernel, chip: Chip, load: Load, heads: int, dropout: float) -> float:
    """Of the attention of one layer over all rows of a device, by the blocks really visited."""
    forward, backward = (tiles * heads for tiles in load.tiles)
    head_size = 64
    once = SOFTMAX_OPERATIONS + (DROPOUT_OPERATIONS if dropout else 0)
    if kernel.phase == "backward" and "forward" not in kernel.op.rsplit("/", 2)[-2]:
        flops, vector = backward * 7 * 2 * head_size, backward * 2 * once
    else:
        flops, vector = forward * 2 * 2 * head_size, forward * once
    seconds = flops / (chip.flops * ATTENTION_EFFICIENCY)
    return seconds + (vector / chip.vector if chip.vector else 0.0)


def load_of(batch, rate: float, flash_blocks) -> Load:
    """From one device's rows of the input stream (NumPy arrays) and the rate of masking."""
    from esm1nv_jax.model.masking import counts

    ids_BT = batch["segment_ids"]
    real = ids_BT > 0
    B, T = ids_BT.shape
    owner = (np.arange(B)[:, None] * (T + 1) + ids_BT)[real]
    lengths = np.unique(owner, return_counts=True)[1]
    maskable = np.maximum(lengths - 2, 0)
    tiles = (
        _visited(ids_BT, flash_blocks.queries, flash_blocks.keys),
        _visited(ids_BT, flash_blocks.backward, flash_blocks.backward),
    )
    return Load(
        rows=B,
        row_length=T,
        tokens=int(real.sum()),
        residues=int(maskable.sum()),
        sequences=len(lengths),
        squares=float((lengths.astype(np.float64) ** 2).sum()),
        selected=int(counts(rate, T)[maskable].sum()),
        tiles=tiles,
    )


def _visited(ids_BT, rows: int, columns: int) -> int:
    """Scores of one head that the kernel computes, those outside of segments included."""
    import jax.numpy as jnp

    from esm1nv_jax.model.kernels.flash_gpu import visited

    fill = -ids_BT.shape[1] % (rows * columns // np.gcd(rows, columns))
    low, high = visited(jnp.asarray(np.pad(ids_BT, ((0, 0), (0, fill)))), rows, columns)
    return int(jnp.sum(high - low)) * rows * columns
