"""`esm1nv inspect`: a data set and a batch of it, shown to a person."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esm1nv_jax.common import config_file
from esm1nv_jax.common.arguments import Parser
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import manifest, tokenizer
from esm1nv_jax.data.pipeline import Batch, StreamConfig, rows_for, train_batches
from esm1nv_jax.data.source import SAMPLE, SPLITS, Source, open_split
from esm1nv_jax.data.stream_config import stream_config

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
_BAR = 40  # characters
_MASK_RATE = 0.15  # where no config says another


def overview(data: str, source: Source, split: str) -> Table:
    """Counts, and the lengths as a histogram."""
    lengths = np.asarray(source.lengths, np.int64)
    table = Table(title=f"{data}: {split}", title_justify="left", show_header=False, box=None)
    for name, value in (
        ("sequences", f"{len(lengths):,}"),
        ("residues", f"{lengths.sum():,}"),
        ("residues a sequence", f"{lengths.mean():.0f} ({lengths.min()} to {lengths.max():,})"),
        ("clusters", "none" if source.groups is None else f"{len(source.groups.first) - 1:,}"),
        ("fingerprint", source.fingerprint[:16]),
    ):
        table.add_row(name, value)
    histogram = manifest.histogram(lengths)
    most = max(histogram.values())
    for name, n in histogram.items():
        table.add_row(name, f"{'█' * round(_BAR * n / most):{_BAR}} {n:,}")
    return table


def skipped(data: str) -> Table | None:
    """What the manifest says was mended or passed over."""
    content = manifest.read(Path(data))
    rows = [(what, name, n) for what in ("mended", "skipped") for name, n in content[what].items()]
    if not rows:
        return None
    table = Table(title="while it was prepared", title_justify="left", show_header=False, box=None)
    for what, name, n in rows:
        table.add_row(what, name, f"{n:,}")
    return table


def masked(batch: Batch, row: int, rate: float) -> np.ndarray:
    """Tokens of a row that would be masked: of each segment the smallest hashes. bool [T]."""
    segment, bits = batch["segment_ids"][row], batch["mask_bits"][row].astype(np.int64)
    residue = (segment > 0) & (batch["tokens"][row] >= tokenizer.FIRST_RESIDUE)
    chosen = np.zeros(len(segment), bool)
    for i in range(1, segment.max(initial=0) + 1):
        here = np.flatnonzero(residue & (segment == i))
        n = max(1, round(rate * len(here)))
        chosen[here[np.argsort(bits[here], kind="stable")[:n]]] = True
    return chosen


def drawn(batch: Batch, row: int, rate: float = _MASK_RATE) -> Text:
    """A row as letters: a colour a segment, masked residues reversed, padding as dots."""
    letters = {tokenizer.BOS: "‹", tokenizer.EOS: "›", tokenizer.PAD: "·", tokenizer.UNK: "?"}
    text = Text()
    hidden = masked(batch, row, rate)
    tokens, segments = batch["tokens"][row].tolist(), batch["segment_ids"][row].tolist()
    for token, segment, mask in zip(tokens, segments, hidden, strict=True):
        style = _COLOURS[segment % len(_COLOURS)] if segment else "dim"
        letter = letters.get(token) or tokenizer.TOKENS[token]
        text.append(letter, f"reverse {style}" if mask else style)
    return text


def speed(source: Source, config: StreamConfig, batches: int = 20) -> Table:
    """How full and how fast the stream is here, on one core."""
    stream = train_batches(source, config)
    next(stream)  # opens what is opened once
    began, spent = time.monotonic(), time.thread_time()
    made = [next(stream)[0] for _ in range(batches)]
    seconds, spent = time.monotonic() - began, time.thread_time() - spent
    tokens = sum(int(np.count_nonzero(b["segment_ids"])) for b in made)
    sequences = sum(int(np.count_nonzero(b["tokens"] == tokenizer.BOS)) for b in made)
    table = Table(title="the stream", title_justify="left", show_header=False, box=None)
    table.add_row("rows", f"{config.rows} of {config.row_length} tokens a batch")
    table.add_row("full", f"{100 * tokens / (batches * config.rows * config.row_length):.2f} %")
    table.add_row("sequences a batch", f"{sequences / batches:.1f}")
    table.add_row("sequences/s", f"{sequences / seconds:,.0f}")
    table.add_row("sequences a core-second", f"{sequences / spent:,.0f}")
    return table


def configured(given: str, overrides: list[str]) -> ConfigDict:
    """The config of a run."""
    return config_file.from_option(given, overrides)


def stream_of(config: ConfigDict, source: Source) -> StreamConfig:
    """The stream of a run on one device."""
    stream = stream_config(config, rows=1)
    batch = config.batch
    rows = batch.rows or rows_for(source.lengths, batch.sequences_per_device, stream)
    return dataclasses.replace(stream, rows=rows)


def main(argv: list[str]) -> None:
    parser = Parser(
        "inspect",
        "Show a data set, and what a run on one device would be fed of it.",
        "esm1nv inspect data/uniref50 --config=configs/pretrain_small.py:shipped",
    )
    add = parser.add_argument
    add("data", nargs="?", help="a prepared folder (default: the config's, or the sample)")
    add("--config", metavar="FILE[:ARGS]", help="a training config; else rows of 512 tokens")
    add("--split", default="train", help=f"{', '.join(SPLITS)} (default: %(default)s)")
    add("--show", type=int, default=3, help="rows to draw (default: %(default)s)")
    given, overrides = parser.parse_known_args(argv)
    if given.config:
        config = configured(given.config, overrides)
        data = given.data or config.data.path
        if not data:
            raise UserError("the config names no data; write esm1nv inspect DIR --config=...")
        source = open_split(data, given.split)
        stream, rate = stream_of(config, source), config.masking.rate
    else:
        if overrides:
            raise UserError(f"option {overrides[0]!r} is unknown (see esm1nv inspect --help)")
        data = given.data or SAMPLE
        source = open_split(data, given.split)
        stream = StreamConfig(seed=0, rows=64, row_length=512, max_residues=510)
        rate = _MASK_RATE
    out = Console(highlight=False)
    out.print(overview(data, source, given.split), "")
    if data != SAMPLE and (table := skipped(data)):
        out.print(table, "")
    batch, _ = next(train_batches(source, stream))
    for row in range(min(given.show, stream.rows)):
        ids = [i for i, _ in itertools.groupby(batch["example_ids"][row].tolist()) if i >= 0]
        out.print(f"row {row}: {', '.join(source.ids(ids))}", soft_wrap=True)
        out.print(drawn(batch, row, rate), "")
    out.print(f"in reverse: one choice of {100 * rate:g} % to be predicted", "")
    out.print(speed(source, stream))
