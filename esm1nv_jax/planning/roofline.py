"""Time of a compiled step, from its kernels and a chip's figures: a roofline; and its memory.

A kernel takes the longest of its products (FLOPs over peak), its other operations and its reading
and writing (bytes over bandwidth), each at the chip's efficiency. Attention takes the sum of its
products and of what surrounds them (exponentials, dropout's hash), for no overlap of them is sure.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.flash_gpu import padded_head_size
from esm1nv_jax.planning.chips import Chip, Efficiency
from esm1nv_jax.planning.hlo import Kernel, Program

# Of each probability, each time it is computed: instructions in the PTX of the loops of flash_gpu.
SOFTMAX_OPERATIONS = 8.5  # mask, scale, maximum, exponential, sum, rounding
DROPOUT_OPERATIONS = 6  # a quarter of the hash, its comparison, the selection
TPU_DROPOUT_OPERATIONS = 8.5  # half of the hash in flash_tpu, counted in its source
SAMPLED_ROWS, SAMPLED_DEVICES = 16_384, 64  # whose mean is the load of a device


@dataclasses.dataclass(frozen=True)
class Load:
    """The work of one device in one step, from rows of the input stream."""

    rows: float
    row_length: float
    tokens: float  # with <s> and </s>, without padding
    residues: float
    sequences: float
    squares: float  # sum of squared segment lengths
    selected: float  # positions predicted
    tiles_forward: float  # scores of one head that flash attention computes
    tiles_backward: float
    slowest: float = 1.0  # expected scores of the busiest device over those of the mean device

    @property
    def slots(self) -> float:
        return self.rows * self.row_length


@dataclasses.dataclass(frozen=True)
class Step:
    """What the kernels do not tell of the step they belong to."""

    model: EncoderConfig
    attention: str  # backend
    microbatches: int
    hosts: int
    per_host: int  # devices


@dataclasses.dataclass(frozen=True)
class Estimate:
    kernels: list[tuple[Kernel, float]]  # with the seconds of each
    exposed: float  # seconds of collectives that nothing overlaps

    @property
    def seconds(self) -> float:
        return sum(s for kernel, s in self.kernels if kernel.kind != "collective") + self.exposed

    def by_class(self) -> list[dict[str, Any]]:
        """Number, bytes, FLOPs and seconds by phase and kind, the slowest first."""
        classes: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0] * 4)
        for kernel, seconds in self.kernels:
            seconds = seconds if kernel.kind != "collective" else 0.0
            added = (kernel.times, kernel.bytes, kernel.flops, seconds)
            sums = classes[kernel.phase, kernel.kind]
            sums[:] = [total + x for total, x in zip(sums, added, strict=True)]
        names = ("phase", "kind", "kernels", "bytes", "flops", "seconds")
        rows = [dict(zip(names, (*key, *sums), strict=True)) for key, sums in classes.items()]
        return sorted(rows, key=lambda row: -row["seconds"])

    def collectives(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": kernel.opcode.removesuffix("-start"),
                "bytes": kernel.bytes,
                "asynchronous": kernel.asynchronous,
                "seconds": seconds,
                "dtype": kernel.shape.lstrip("(").split("[")[0],
            }
            for kernel, seconds in self.kernels
            if kernel.kind == "collective"
        ]


def estimate(
    program: Program, chip: Chip, efficiency: Efficiency, load: Load, step: Step
) -> Estimate:
    """Times every kernel; a collective overlaps with the kernels scheduled before its result."""
    timed = [(kernel, _seconds(kernel, chip, efficiency, load, step)) for kernel in program.kernels]
    exposed = 0.0
    for i, (kernel, seconds) in enumerate(timed):
        if kernel.kind == "collective":
            end = program.needed_at.get(kernel.name, i) if kernel.asynchronous else i
            under = sum(s for other, s in timed[i + 1 : end] if other.kind != "collective")
            exposed += max(seconds - under, 0.0)
    return Estimate(timed, exposed)


def _seconds(kernel: Kernel, chip: Chip, efficiency: Efficiency, load: Load, step: Step) -> float:
    if kernel.kind == "collective":
        devices, speed = step.hosts * step.per_host, chip.link
        if step.hosts > 1:  # a ring over all hosts passes each of a host's network cards
            speed = min(speed, chip.network * step.per_host or speed)
        twice = 2 if kernel.opcode.startswith("all-reduce") else 1
        moved = twice * kernel.bytes * (devices - 1) / devices
        return moved / (speed * efficiency.memory) if speed else 0.0
    memory = kernel.bytes / (chip.bandwidth * efficiency.memory)
    if not kernel.asynchronous:
        memory += chip.launch * kernel.times
    if kernel.kind == "attention":
        once = attention_seconds(kernel, chip, load, step) / efficiency.attention
        return max(memory, once / step.microbatches * kernel.times)
    compute = kernel.flops / (chip.flops * efficiency.products)
    if chip.vector:
        compute = max(compute, kernel.vector / (chip.vector * efficiency.products))
    return max(memory, compute)


def attention_seconds(kernel: Kernel, chip: Chip, load: Load, step: Step) -> float:
    """Of the attention of one layer over all rows of the slowest device, at the chip's peaks."""
    forward, backward = load.tiles_forward, load.tiles_backward
    if step.attention == "splash":  # with segment ids it still visits every block
        forward = backward = load.rows * load.row_length**2
    elif step.attention == "cudnn":  # one sequence a row, by its length
        forward = backward = load.squares
    operations = SOFTMAX_OPERATIONS
    if step.model.attention_dropout:
        on_tpu = step.attention == "pallas_tpu"
        operations += TPU_DROPOUT_OPERATIONS if on_tpu else DROPOUT_OPERATIONS
    name = kernel.op.rsplit("/", 2)[-2] if "/" in kernel.op else kernel.op
    if kernel.phase == "backward" and "forward" not in name and "_fwd_" not in name:
        # Products of a score: the scores and dP again, dV, dK, dQ; for flash_gpu the first two
        # twice; splash computes dQ in a kernel of its own.
        products = 3 if "_dq_" in name else 4 if "_dkv_" in name else 7
        products = 5 if step.attention in ("cudnn", "pallas_tpu") else products
        passes = 1 if products < 7 else 2
        scores = backward
    else:
        products, passes, scores = 2, 1, forward
    scores *= step.model.heads * load.slowest
    head_size = step.model.width // step.model.heads
    if step.attention.startswith("pallas"):
        head_size = padded_head_size(head_size)
    seconds = scores * products * 2 * head_size / chip.flops
    return seconds + (scores * passes * operations / chip.vector if chip.vector else 0.0)


def miscounted(program, useful: float, mfu: float) -> str:
    """Why a program cannot have been read rightly, or an empty text."""
    if program.uncounted_loops:
        return f"iterations of {len(program.uncounted_loops)} loops of the program are not known"
    if mfu > 1:
        return f"the program was misread, for it would reach an MFU of {mfu:.0%}"
    attention = bool(program.of_kind("attention"))  # its products are not in the text
    if not attention and sum(k.flops for k in program.kernels) < 0.9 * useful:
        return "fewer products were found in the program than the step needs"
    return ""


def memory_of(compiled, program, state) -> dict[str, float]:
    """Bytes by kind; their sum is the peak. `frozen` are parameters that are not trained."""
    import jax

    parameters, frozen, optimizer = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.frozen, state.opt_state)
    )
    stats = compiled.memory_analysis()
    inputs = stats.argument_size_in_bytes - parameters - frozen - optimizer
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    activations = min(program.saved_activations(), stats.temp_size_in_bytes)
    return {
        "parameters": parameters,
        **({"frozen": frozen} if frozen else {}),
        "optimizer": optimizer,
        "batch": max(inputs, 0) + max(outputs, 0),
        "activations": activations,
        "temporaries": stats.temp_size_in_bytes - activations,
    }


def stream_load(run, source, rows: int, devices: int, chip: str = "") -> Load:
    """The load of a device with `rows` rows: the mean over many rows of a run's input stream.
    `chip` is its `device_kind`, by which the attention kernel chooses its tiles."""
    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.data.pipeline import train_dataset
    from esm1nv_jax.model.kernels.flash_gpu import Blocks

    batches = iter(train_dataset(source, stream_config(run, rows)))
    sampled = max(min(SAMPLED_DEVICES, SAMPLED_ROWS // rows), 2)
    blocks = Blocks(128, 128, 128) if chip.startswith("TPU") else Blocks.of(chip)
    loads = [load_of(b, run.masking.rate, blocks) for b in itertools.islice(batches, sampled)]
    return mean_load(loads, devices)


def load_of(batch, rate: float, flash_blocks) -> Load:
    """From one device's rows of the input stream (NumPy arrays) and the rate of masking, which
    does not count where the rows have labels."""
    from esm1nv_jax.model.masking import target_counts

    ids_BT = batch["segment_ids"]
    real = ids_BT > 0
    B, T = ids_BT.shape
    owner = (np.arange(B)[:, None] * (T + 1) + ids_BT)[real]
    lengths = np.unique(owner, return_counts=True)[1]
    maskable = np.maximum(lengths - 2, 0)
    if "label_examples" in batch:
        selected = int((batch["label_examples"] >= 0).sum())
    else:
        selected = int(target_counts(rate, T)[maskable].sum())
    return Load(
        rows=B,
        row_length=T,
        tokens=int(real.sum()),
        residues=int(maskable.sum()),
        sequences=len(lengths),
        squares=float((lengths.astype(np.float64) ** 2).sum()),
        selected=selected,
        tiles_forward=_visited(ids_BT, flash_blocks.queries, flash_blocks.keys),
        tiles_backward=_visited(ids_BT, flash_blocks.backward, flash_blocks.backward),
    )


def mean_load(loads: Sequence[Load], devices: int) -> Load:
    """The mean of the work of several devices, and what the slowest of `devices` has more of it.

    All wait for the slowest at the all-reduce. Its work is expected at the mean plus the spread
    times the expected maximum of as many normal numbers (Blom, 1958).
    """
    columns = zip(*map(dataclasses.astuple, loads), strict=True)
    mean = Load(*map(statistics.fmean, columns))
    spread = statistics.pstdev(load.tiles_forward for load in loads) / mean.tiles_forward
    largest = statistics.NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
    return dataclasses.replace(mean, slowest=1 + spread * max(largest, 0.0))


def _visited(ids_BT, rows: int, columns: int) -> int:
    """Scores of one head that the kernel computes, those outside of segments included."""
    import jax.numpy as jnp

    from esm1nv_jax.model.kernels.flash_gpu import visited_blocks

    fill = -ids_BT.shape[1] % (rows * columns // np.gcd(rows, columns))
    low, high = visited_blocks(jnp.asarray(np.pad(ids_BT, ((0, 0), (0, fill)))), rows, columns)
    return int(jnp.sum(high - low)) * rows * columns
