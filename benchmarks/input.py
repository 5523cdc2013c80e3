"""How full rows are, and how fast batches come off the disk, on one core.

    python benchmarks/input.py DIR [--batches 100] [--json OUT.json]

DIR is a folder made by `esm1nv prepare`. Rates are per second of this thread's processor time, so
that a busy machine shows less than it can, but not nonsense. The last line is Grain, reading the
same shards through the same reader, one example at a time, in the padded layout.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import grain
import numpy as np

from esm1nv_jax.data import packing, tokenizer
from esm1nv_jax.data.order import Order
from esm1nv_jax.data.pipeline import StreamConfig, train_batches
from esm1nv_jax.data.prefetch import Prefetch
from esm1nv_jax.data.source import open_split

ROWS = 256
NEEDED = 25_000  # sequences a core-second that a host of fast devices asks for


def stream(source, batches: int, row_length: int, packed: bool, crop: str) -> dict:
    config = StreamConfig(
        seed=0,
        rows=ROWS,
        row_length=row_length,
        max_residues=row_length - 2,
        packed=packed,
        crop=crop,
    )
    made = train_batches(source, config)
    next(made)
    sequences = tokens = 0
    began = time.thread_time()
    for _ in range(batches):
        batch, _ = next(made)
        spent = time.thread_time()  # counting is not the stream's work
        sequences += int(np.count_nonzero(batch["tokens"] == tokenizer.BOS))
        tokens += int(np.count_nonzero(batch["segment_ids"]))
        began += time.thread_time() - spent
    return {
        "sequences/core-s": sequences / (time.thread_time() - began),
        "full": tokens / (batches * ROWS * row_length),
    }


def planning(source, row_length: int) -> dict:
    """Order and packing alone: what every process does for all rows of all processes."""
    order = Order(len(source), 0, 0)
    lengths = np.asarray(source.lengths)
    windows = min(50, len(source) // packing.WINDOW)
    rows = tokens = 0
    began = time.thread_time()
    for window in range(windows):
        chosen = order(window * packing.WINDOW, (window + 1) * packing.WINDOW)
        here = np.minimum(lengths[chosen].astype(np.int64), row_length - 2) + 2
        rows += int(packing.best_fit(here, row_length).max()) + 1
        tokens += int(here.sum())
    spent = time.thread_time() - began
    return {
        "sequences/core-s": windows * packing.WINDOW / spent,
        "full": tokens / (rows * row_length),
    }


def grain_padded(source, batches: int, row_length: int) -> dict:
    """The same arrays less segments and hashes, by Grain, example by example."""

    def row(record):
        ids = tokenizer.encode(record["sequence"][: row_length - 2])
        tokens = np.full(row_length, tokenizer.PAD, np.int32)
        tokens[: len(ids)] = ids
        return {"tokens": tokens, "positions": np.arange(row_length, dtype=np.int32)}

    made = iter(
        grain.MapDataset.source(source)
        .seed(0)
        .shuffle()
        .map(row)
        .batch(ROWS)
        .to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    next(made)
    began = time.thread_time()
    for _ in range(batches):
        next(made)
    return {"sequences/core-s": batches * ROWS / (time.thread_time() - began), "full": None}


def waited(source, row_length: int) -> tuple[float, float]:
    """(milliseconds that a step takes, milliseconds that it waits) at twice the stream's time."""
    config = StreamConfig(seed=0, rows=ROWS, row_length=row_length, max_residues=row_length - 2)
    made = train_batches(source, config)
    next(made)
    began = time.monotonic()
    for _ in range(20):
        next(made)
    step = 2 * (time.monotonic() - began) / 20
    with Prefetch(train_batches(source, config)) as batches:
        next(batches)
        time.sleep(4 * step)
        before = batches.waited
        for _ in range(40):
            time.sleep(step)  # a device at work leaves the processor free
            next(batches)
        return 1e3 * step, 1e3 * (batches.waited - before) / 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()
    source = open_split(asked.data, "train")
    table = {}
    for length in (512, 1024):
        table[f"packed, {length} tokens"] = stream(source, asked.batches, length, True, "prefix")
    table["packed, 512, random crops"] = stream(source, asked.batches, 512, True, "random")
    table["padded, 512 tokens"] = stream(source, asked.batches, 512, False, "prefix")
    for length in (512, 1024):
        table[f"planning alone, {length}"] = planning(source, length)
    table["Grain, padded, 512 tokens"] = grain_padded(source, max(5, asked.batches // 5), 512)
    print(f"{asked.data}: {len(source):,} sequences, batches of {ROWS} rows\n")
    print(f"{'':28}{'sequences/core-s':>18}{'full':>10}")
    for name, line in table.items():
        full = "" if line["full"] is None else f"{100 * line['full']:.2f} %"
        print(f"{name:28}{line['sequences/core-s']:18,.0f}{full:>10}")
    step, wait = waited(source, 512)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nwith prefetch, a step of {step:.1f} ms waits {wait:.2f} ms")
    print(f"a host of fast devices asks for {NEEDED:,} sequences/s; peak memory {peak:.0f} MiB")
    if asked.json:
        Path(asked.json).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
