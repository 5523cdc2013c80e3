"""`esm1nv inspect`: a data set, and a batch of it as a training run is fed."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from esm1nv_jax.common import config_file
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import manifest, tokenizer
from esm1nv_jax.data.fill import Batch
from esm1nv_jax.data.packing import StreamConfig, rows_for, stream_config
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.data.source import SAMPLE, SPLITS, Source, open_split

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
_BAR = 40  # characters
_MOST_TOKENS = 1 << 26  # of a batch: a gigabyte or two
_MASK_RATE = 0.15  # without a config
_SYMBOLS = {tokenizer.BOS: "‹", tokenizer.EOS: "›", tokenizer.PAD: "·", tokenizer.UNK: "?"}


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None)


def summary_table(data: str, source: Source, split: str) -> Table:
    """Counts of a split, and a histogram of its lengths."""
    lengths = np.asarray(source.lengths, np.int64)
    table = _table(f"{data}: {split}")
    clusters = "none" if source.groups is None else f"{len(source.groups.first) - 1:,}"
    spread = f"{lengths.mean():.0f} ({lengths.min()} to {lengths.max():,})"
    table.add_row("sequences", f"{len(lengths):,}")
    table.add_row("residues", f"{lengths.sum():,}")
    table.add_row("residues a sequence", spread)
    table.add_row("clusters", clusters)
    table.add_row("fingerprint", source.fingerprint[:16])
    histogram = manifest.histogram(lengths)
    most = max(histogram.values())
    for name, n in histogram.items():
        table.add_row(name, f"{'█' * round(_BAR * n / most):{_BAR}} {n:,}")
    return table


def preparation_table(data: str) -> Table | None:
    """What `esm1nv prepare` changed or skipped; None where it was nothing."""
    content, table = manifest.read(Path(data)), _table("while it was prepared")
    for what in ("normalized", "skipped"):
        for name, n in content[what].items():
            table.add_row(what, name, f"{n:,}")
    return table if table.rows else None


def masked_positions(batch: Batch, row: int, rate: float) -> np.ndarray:
    """Tokens of a row that would be predicted: those of the smallest hashes. bool [row_length].

    The rule is that of `model.masking.mask`, which this package may not import; a test compares
    them.
    """
    segment, bits = batch["segment_ids"][row], batch["mask_bits"][row].astype(np.int64)
    residue = (segment > 0) & (batch["tokens"][row] >= tokenizer.FIRST_RESIDUE)
    masked = np.zeros(len(segment), bool)
    for i in range(1, segment.max(initial=0) + 1):
        positions = np.flatnonzero(residue & (segment == i))
        n = max(1, round(rate * len(positions)))
        masked[positions[np.argsort(bits[positions], kind="stable")[:n]]] = True
    return masked


def row_text(batch: Batch, row: int, rate: float = _MASK_RATE) -> Text:
    """A row as letters: a colour a segment, masked residues in reverse, padding as dots."""
    text = Text()
    masked = masked_positions(batch, row, rate)
    tokens, segments = batch["tokens"][row].tolist(), batch["segment_ids"][row].tolist()
    for token, segment, reverse in zip(tokens, segments, masked, strict=True):
        style = _COLOURS[segment % len(_COLOURS)] if segment else "dim"
        letter = _SYMBOLS.get(token) or tokenizer.TOKENS[token]
        text.append(letter, f"reverse {style}" if reverse else style)
    return text


def stream_table(source: Source, config: StreamConfig, batches: int = 20) -> Table:
    """How full the rows are, and how fast one core makes them."""
    stream = iter(train_dataset(source, config))
    next(stream)  # the first one loads what is loaded once
    began, cpu = time.monotonic(), time.thread_time()
    made = list(itertools.islice(stream, batches))
    seconds, cpu = time.monotonic() - began, time.thread_time() - cpu
    tokens = sum(int(np.count_nonzero(b["segment_ids"])) for b in made)
    sequences = sum(int(np.count_nonzero(b["tokens"] == tokenizer.BOS)) for b in made)
    table = _table("the stream")
    table.add_row("rows", f"{config.rows} of {config.row_length} tokens a batch")
    table.add_row("full", f"{100 * tokens / (batches * config.rows * config.row_length):.2f} %")
    table.add_row("sequences a batch", f"{sequences / batches:.1f}")
    table.add_row("sequences/s", f"{sequences / seconds:,.0f}")
    table.add_row("sequences a core-second", f"{sequences / cpu:,.0f}")
    return table


def main(argv: list[str]) -> None:
    parser = Parser(
        "inspect",
        "Show a data set, and what a run on one device is fed of it.",
        "esm1nv inspect data/uniref50 --config=configs/pretrain_small.py:shipped",
    )
    add = parser.add_argument
    add("data", nargs="?", help="a prepared folder (default: the config's, or the sample)")
    add("--config", metavar="FILE[:ARGS]", help="a training config; else rows of 512 tokens")
    add("--split", default="train", help=f"{', '.join(SPLITS)} (default: %(default)s)")
    add("--show", type=int, default=3, help="rows to show (default: %(default)s)")
    options, overrides = parser.parse_known_args(argv)
    if options.config:
        config = config_file.from_option(options.config, overrides)
        data = options.data or config.data.path
        if not data:
            raise UserError("the config names no data; write esm1nv inspect DIR --config=...")
        source = open_split(data, options.split)
        stream, rate = stream_config(config, rows=1), config.masking.rate
        sequences, parts = config.batch.sequences_per_device, config.batch.microbatches
        rows = config.batch.rows or rows_for(source.lengths, sequences, stream, parts)
        stream = dataclasses.replace(stream, rows=rows)  # of a run on one device
    else:
        if overrides:
            raise UserError(f"option {overrides[0]!r} is unknown (see esm1nv inspect --help)")
        data = options.data or SAMPLE
        source = open_split(data, options.split)
        stream = StreamConfig(seed=0, rows=64, row_length=512, max_residues=510)
        rate = _MASK_RATE
    if stream.rows * stream.row_length > _MOST_TOKENS:
        raise UserError(
            f"a batch of {stream.rows:,} rows of {stream.row_length:,} tokens is too large to "
            f"show; at most {_MOST_TOKENS:,} tokens are (batch.rows, data.row_length)"
        )
    stdout.print(summary_table(data, source, options.split), "")
    if data != SAMPLE and (table := preparation_table(data)):
        stdout.print(table, "")
    batch = next(iter(train_dataset(source, stream)))
    for row in range(min(options.show, stream.rows)):
        examples = [i for i, _ in itertools.groupby(batch["example_ids"][row].tolist()) if i >= 0]
        stdout.print(f"row {row}: {', '.join(source.ids(examples))}")
        stdout.print(row_text(batch, row, rate), soft_wrap=False, end="\n\n")
    percent = f"{100 * rate:g} %"
    stdout.print(f"in reverse: the {percent} of residues to be predicted, drawn once", end="\n\n")
    stdout.print(stream_table(source, stream))
