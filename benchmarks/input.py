"""How full rows are, and how fast batches come off the disk.

    python benchmarks/input.py DIR [--batches 60] [--workers 2] [--json OUT.json]

DIR is a folder made by `esm1nv prepare`. Real sequences are counted, never padding, per second of
this thread's processor time, so that other load on the machine changes the result little. With
`--workers` the stream's wall-clock rate is measured too, read by so many processes; that needs as
many cores that are free.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from esm1nv_jax.data import packing, tokenizer
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import prefetch, train_dataset
from esm1nv_jax.data.source import open_split

ROWS = 256
NEEDED = {512: 25_000, 1152: 20_000}  # sequences a core-second, by tokens in a row


def config_of(row_length: int, **options) -> StreamConfig:
    residues = min(row_length - 2, 1024)  # as pretrain_small: 1,024 residues in rows of 1,152
    return StreamConfig(seed=0, rows=ROWS, row_length=row_length, max_residues=residues, **options)


def stream(source, batches: int, config: StreamConfig) -> dict:
    """Sequences a core-second of the whole stream in one thread, and how full its rows are."""
    iterator = iter(train_dataset(source, config))
    next(iterator)
    sequences = tokens = 0
    spent = 0.0
    for _ in range(batches):
        began = time.thread_time()
        batch = next(iterator)
        spent += time.thread_time() - began
        sequences += int(np.count_nonzero(batch["tokens"] == tokenizer.BOS))
        tokens += int(np.count_nonzero(batch["segment_ids"]))
    return {
        "sequences/core-s": sequences / spent,
        "full": tokens / (batches * batch["tokens"].size),
    }


def planning(source, config: StreamConfig) -> dict:
    """Order and packing alone: what every process does for all rows of all processes."""
    plan = packing.TrainingWindows(source, config)
    windows = [plan(0)]
    began = time.thread_time()
    windows = [plan(i) for i in range(min(50, len(source) // packing.WINDOW))]
    spent = time.thread_time() - began
    tokens = sum(int((np.minimum(w.residues, config.max_residues) + 2).sum()) for w in windows)
    rows = sum(window.rows for window in windows)
    return {
        "sequences/core-s": sum(len(window.example) for window in windows) / spent,
        "full": tokens / (rows * config.row_length),
    }


def time_waited(source, config: StreamConfig) -> tuple[float, float]:
    """(milliseconds of a step, milliseconds that it waits), for steps of twice a batch's time."""
    iterator = iter(train_dataset(source, config))
    next(iterator)
    began = time.monotonic()
    for _ in range(20):
        next(iterator)
    step = 2 * (time.monotonic() - began) / 20
    batches = prefetch(train_dataset(source, config))
    next(batches)
    time.sleep(4 * step)
    waited = 0.0
    for _ in range(40):
        time.sleep(step)  # a device at work leaves the processor free
        began = time.monotonic()
        next(batches)
        waited += time.monotonic() - began
    batches.close()
    return 1e3 * step, 1e3 * waited / 40


def wall_clock(source, batches: int, config: StreamConfig, workers: int) -> float:
    """Sequences a second of wall-clock time, read by a thread (0) or by worker processes."""
    iterator = prefetch(train_dataset(source, config, workers=workers))
    for _ in range(4 * max(1, workers)):  # until workers have started, and what they made ahead
        next(iterator)
    began, sequences = time.monotonic(), 0
    for _ in range(batches):
        sequences += int(np.count_nonzero(next(iterator)["tokens"] == tokenizer.BOS))
    seconds = time.monotonic() - began
    iterator.close()
    return sequences / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    source = open_split(options.data, "train")
    table = {
        f"packed, {length} tokens": stream(source, options.batches, config_of(length))
        for length in NEEDED
    }
    for name, values in (("random crops", {"crop": "random"}), ("padded", {"packed": False})):
        table[f"{name}, 512 tokens"] = stream(source, options.batches, config_of(512, **values))
    for length in NEEDED:
        table[f"planning alone, {length} tokens"] = planning(source, config_of(length))
    print(f"{options.data}: {len(source):,} sequences, batches of {ROWS} rows\n")
    print(f"{'':28}{'sequences/core-s':>18}{'full':>10}")
    for name, line in table.items():
        print(f"{name:28}{line['sequences/core-s']:18,.0f}{100 * line['full']:8.2f} %")
    step, wait = time_waited(source, config_of(512))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nwith prefetch, a step of {step:.1f} ms waits {wait:.2f} ms")
    needed = ", ".join(f"{rate:,} at {length} tokens" for length, rate in NEEDED.items())
    print(f"needed for a host of fast devices: {needed} a core-second; peak memory {peak:.0f} MiB")
    if options.workers:
        for workers in (0, *range(1, options.workers + 1)):
            rate = wall_clock(source, 4 * options.batches, config_of(512), workers)
            print(f"{workers} worker processes: {rate:,.0f} sequences/s of wall-clock time")
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
