"""`esm1nv inspect`: a data set and a batch of it, shown to a person."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esm1nv_jax.arguments import Parser
from esm1nv_jax.data import manifest, tokenizer
from esm1nv_jax.data.dataset import SAMPLE, SPLITS, Source, open_split
from esm1nv_jax.data.pipeline import Batch, StreamConfig, train_batches
from esm1nv_jax.errors import UserError

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue")
_BAR = 40  # characters
_MASK_RATE = 0.15


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


def masked(batch: Batch, row: int) -> np.ndarray:
    """Tokens of a row that would be masked: of each segment the smallest hashes. bool [T]."""
    segment, bits = batch["segment_ids"][row], batch["mask_bits"][row].astype(np.int64)
    residue = (segment > 0) & (batch["tokens"][row] >= tokenizer.FIRST_RESIDUE)
    chosen = np.zeros(len(segment), bool)
    for i in range(1, segment.max(initial=0) + 1):
        here = np.flatnonzero(residue & (segment == i))
        n = max(1, round(_MASK_RATE * len(here)))
        chosen[here[np.argsort(bits[here], kind="stable")[:n]]] = True
    return chosen


def drawn(batch: Batch, row: int) -> Text:
    """A row as letters: a colour a segment, masked residues reversed, padding as dots."""
    letters = {tokenizer.BOS: "‹", tokenizer.EOS: "›", tokenizer.PAD: "·", tokenizer.UNK: "?"}
    text = Text()
    hidden = masked(batch, row)
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


def stream_of(config_file: str | None, packed: bool) -> tuple[str, StreamConfig]:
    """(data, stream) of a training config, or those of the published model on the sample."""
    if config_file is None:
        return SAMPLE, StreamConfig(
            seed=0, rows=64, row_length=512, max_residues=510, packed=packed
        )
    raise UserError("--config is not read yet")


def main(argv: list[str]) -> None:
    parser = Parser(
        "inspect",
        "Show a data set and a batch of it.",
        "esm1nv inspect data/uniref50 --row_length 1024",
    )
    add = parser.add_argument
    add("data", nargs="?", default=SAMPLE, help="a prepared folder (default: %(default)s)")
    add("--split", default="train", help=f"{', '.join(SPLITS)} (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the stream (default: %(default)s)")
    add("--row_length", type=int, default=512, help="tokens (default: %(default)s)")
    add("--rows", type=int, default=64, help="rows in a batch (default: %(default)s)")
    add("--crop", default="prefix", help="prefix or random (default: %(default)s)")
    add("--padded", action="store_true", help="one sequence a row")
    add("--show", type=int, default=3, help="rows to draw (default: %(default)s)")
    given = parser.parse_args(argv)
    source = open_split(given.data, given.split)
    config = StreamConfig(
        seed=given.seed,
        rows=given.rows,
        row_length=given.row_length,
        max_residues=given.row_length - 2,
        crop=given.crop,
        packed=not given.padded,
    )
    out = Console(highlight=False)
    out.print(overview(given.data, source, given.split), "")
    if given.data != SAMPLE and (table := skipped(given.data)):
        out.print(table, "")
    batch, _ = next(train_batches(source, config))
    for row in range(min(given.show, config.rows)):
        ids = [i for i, _ in itertools.groupby(batch["example_ids"][row].tolist()) if i >= 0]
        out.print(f"row {row}: {', '.join(source.ids(ids))}", soft_wrap=True)
        out.print(drawn(batch, row), "")
    out.print(f"reversed: masked at {100 * _MASK_RATE:.0f} %, as in training's first epoch", "")
    out.print(speed(source, config))
