"""A FASTA file through a model into one file, part by part: a killed job goes on where it was.

`embed` and `predict` say what is computed for a part and how the file is written; this reads the
proteins, cuts them into parts, divides the parts among jobs, and joins them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import EXIT_SAVED, UserError
from esm1nv_jax.data.fasta import Proteins, scan
from esm1nv_jax.data.tables import COLUMNS, parse_columns
from esm1nv_jax.inference import cpu_engines
from esm1nv_jax.inference.engine import MemoryExhausted
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.partial_results import HASHES, PartialResults, PartReader

PART_BYTES = 1 << 28  # of results held in memory at once
PART_RESIDUES, PART_BATCHES = 1 << 18, 16  # a part has at least so many, where memory allows
AS_GIVEN = "checkpoint fasta out precision engine deterministic overwrite on_error columns".split()
OVERWRITE = (
    "replace --out; unfinished work with the same settings goes on, with others is discarded"
)
CHOICES = {"long": ("window", "truncate", "error"), "on_error": ("stop", "skip")}

Writer = Callable[[Path, PartReader, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class FastaRequest:
    """The proteins, the model and the file. `shard` is (i, n): the i-th of n jobs, from 1."""

    checkpoint: str
    fasta: str
    out: str
    precision: str = "fp32"
    engine: str = "auto"
    long: str = "window"
    deterministic: bool = False
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    on_error: str = "stop"
    max_residues: int | None = None
    columns: str = ",".join(COLUMNS)  # of ids and of sequences, where `fasta` is a table

    def __post_init__(self):
        cpu_engines.check_names(self.precision, self.engine)
        self.check_choices(CHOICES)
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            i, n = self.shard
            raise UserError(f"--shard={i}/{n} is not i/n with i from 1 to n, such as 1/4")

    def check_ids(self, proteins: Proteins) -> None:
        """Raises UserError for an id that the file to be written cannot hold."""

    def check_choices(self, choices: dict[str, tuple[str, ...]]) -> None:
        """Raises UserError for the first field that has a value of none of its choices."""
        for name, allowed in choices.items():
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (values,)
            unknown = [value for value in values if value not in allowed]
            if unknown or not values:
                option = f"--{name.replace('_', '-')}={unknown[0] if unknown else ''}"
                raise UserError(f"{option} is unknown; there are {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Computation:
    """What is computed of proteins.

    run: some normalized sequences to arrays, [proteins, ...] or [residues, ...]. settings: all
    that their contents depend on, as JSON has it. bytes_per_residue: of the arrays. with_hashes:
    whether parts hold `HASHES`.
    """

    model: Model
    run: Callable[[list[bytes]], dict[str, np.ndarray]]
    settings: dict[str, Any]
    bytes_per_residue: int
    with_hashes: bool = False


def run(
    request: FastaRequest, verb: str, load: Callable[[], Computation], write: Writer
) -> str | None:
    """Computes a FASTA file; returns the hash of the contents, or None for a shard.

    Raises UserError with everything finished so far kept in `OUT.parts`.
    """
    results = PartialResults(Path(request.out))
    files.check(request.out)
    if results.out.exists() and not results.folder.exists() and not request.overwrite:
        raise UserError(f"{results.out} exists; add --overwrite, or choose another --out")
    advice = "fix it, or pass over such faults with --on-error=skip"
    columns = parse_columns(request.columns)
    proteins = scan(request.fasta, request.on_error == "skip", advice, columns)
    console.print(f"{request.fasta}: {proteins}")
    request.check_ids(proteins)
    job = _Job(request, verb, proteins, load())
    if not request.overwrite:  # other devices would cut it otherwise
        job.part_residues = (results.settings() or {}).get("part_residues") or job.part_residues
    results.begin(job.settings(), request.overwrite)
    shard, shards = request.shard or (1, 1)
    with results.lock(f"job-{shard}-of-{shards}"):
        job.run(results, shard - 1, shards)
        if request.shard is None:
            return _assemble(results, write)
    console.print(
        f"shard {shard} of {shards} is done, {count(len(results.missing()), 'part')} of "
        f"{results.total} missing; when none is: esm1nv {verb} --merge --out {results.out}"
    )
    return None


def merge(out: str, write: Writer, overwrite: bool = False) -> str:
    """Joins the parts that shards have made; returns the hash of the contents."""
    results = PartialResults(Path(out))
    results.resume()
    if results.out.exists() and not overwrite:
        raise UserError(f"{out} exists; add --overwrite")
    if missing := [part for part in range(results.total) if not results.path(part).exists()]:
        numbers = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise UserError(
            f"{len(missing)} of {results.total} parts are missing ({numbers}); part p is made by "
            "the job --shard=i/n for which i - 1 is the remainder of p / n"
        )
    return _assemble(results, write)


def _assemble(results: PartialResults, write: Writer) -> str:
    """All parts into the one file, which appears by rename; then the parts are removed."""
    settings = results.resume()
    reader = PartReader(results)
    with files.replacing(results.out, results.folder) as new:
        write(new, reader, settings)
    results.clear()
    digest = reader.digest()
    console.print(f"{results.out}: {count(reader.proteins, 'protein')}, {', '.join(reader.fields)}")
    print(f"contents {digest}")
    return digest


class _Job:
    """A computation, and the FASTA cut into parts."""

    def __init__(
        self, request: FastaRequest, verb: str, proteins: Proteins, computation: Computation
    ):
        self.request, self.verb, self.proteins = request, verb, proteins
        self.model, self.computation = computation.model, computation
        self.limit = self.model.longest
        self._report_long_proteins()
        # Bounded by memory, and many batches where there is room.
        shapes = self.model.on_devices.shapes
        wanted = max(PART_RESIDUES, PART_BATCHES * shapes.tokens * shapes.devices)
        self.part_residues = min(wanted, PART_BYTES // max(1, computation.bytes_per_residue))

    def _report_long_proteins(self) -> None:
        if self.request.max_residues is not None:
            longest = int(self.proteins.lengths.max())
            name = next(name for name, s in self.proteins if len(s) == longest)
            self.model.check_fits(longest, name)
        limit, long = self.limit, self.request.long
        n = int(np.sum(self.proteins.lengths > limit))
        if not n:
            return
        first = next(name for name, sequence in self.proteins if len(sequence) > limit)
        what = f"{count(n, 'protein')} longer than the {limit:,} residues the model reads at once"
        what += f", the first is {first}"
        if long == "error":
            raise UserError(f"{what}; choose --long=window or truncate")
        does = "read in overlapping windows" if long == "window" else "cut"
        note = ""
        if long == "window" and self.model.prefixes_only:
            note = "; the model was trained on prefixes and has never seen the middle of any"
        console.print(f"{what}: {does}{note}")

    def settings(self) -> dict[str, Any]:
        """All that the contents depend on, and where the model came from."""
        request, provenance = self.request, self.model.provenance
        return self.computation.settings | {
            "proteins": self.proteins.digest,
            "count": len(self.proteins.lengths),
            "model": self.model.digest,
            "checkpoint": request.checkpoint,
            "run": provenance.get("run"),
            "steps": provenance.get("steps"),
            "precision": self.model.arithmetic,
            "long": request.long,
            "longest": self.limit,
            "deterministic": request.deterministic,
            "part_residues": self.part_residues,
            "parts": sum(1 for _ in self._cut(map(int, self.proteins.lengths), int)),
        }

    def _cut(self, items: Iterable, size: Callable[[Any], int]) -> Iterator[list]:
        """Stretches of the FASTA of about `part_residues` residues."""
        part, residues = [], 0
        for item in items:
            part.append(item)
            residues += size(item)
            if residues >= self.part_residues:
                yield part
                part, residues = [], 0
        if part:
            yield part

    def run(self, results: PartialResults, shard: int, shards: int) -> None:
        """Computes the parts shard, shard + shards, ... that are not there yet."""
        wanted = {part for part in results.missing() if part % shards == shard}
        total = done = 0
        for part, lengths in enumerate(self._cut(map(int, self.proteins.lengths), int)):
            total += sum(lengths) * (part % shards == shard)
            done += sum(lengths) * (part % shards == shard and part not in wanted)
        if done:
            console.print(f"going on with {results.folder}: {done:,} of {total:,} residues done")
        began, start = time.monotonic(), done
        with bar(self.verb, total, "residues", start=done) as progress:
            parts = self._cut(self.proteins, lambda protein: len(protein[1]))
            for part, records in enumerate(parts):
                if part in wanted:
                    results.write(part, [name for name, _ in records], self._part(records))
                    done += sum(len(sequence) for _, sequence in records)
                    rate = (done - start) / (time.monotonic() - began)
                    progress.update(done, f"{rate:,.0f} residues/s")

    def _part(self, records: list[tuple[str, bytes]]) -> dict[str, np.ndarray]:
        kept = [s if self.request.long == "window" else s[: self.limit] for _, s in records]
        try:
            arrays = self.computation.run(kept)
        except MemoryExhausted as error:
            name, residues = max(((n, len(s)) for n, s in records), key=lambda record: record[1])
            raise UserError(f"{name} has {residues:,} residues: {error}") from None
        for name, value in arrays.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                advice = "take --dtype=float32, or " * (value.dtype == np.float16)
                raise UserError(
                    f"{name} of some protein from {records[0][0]} to {records[-1][0]} is not "
                    f"finite in {value.dtype}; {advice}check the checkpoint"
                )
        if self.computation.with_hashes:
            named = (s + b"_%d" % len(s) for _, s in records)
            arrays[HASHES] = np.array([hashlib.sha256(text).hexdigest() for text in named])
        return {
            "lengths": np.array([len(s) for _, s in records], np.int64),
            "checksums": np.array([hashlib.md5(s).hexdigest().encode() for _, s in records]),
            "rows": np.array([len(s) for s in kept], np.int64),
        } | arrays


def add_arguments(parser: Parser, out: str) -> None:
    """The options that a `FastaRequest` is made of."""
    add = parser.add_argument
    add("--checkpoint", help="a run, one of its steps, a model folder or an exported folder")
    proteins = "proteins: FASTA, CSV or TSV, plain or compressed by gzip, zstd or xz; or Parquet"
    add("--fasta", help=proteins)
    of_tables = "of CSV, TSV and Parquet (default: %(default)s)"
    add("--columns", default=",".join(COLUMNS), help=of_tables)
    add("--out", required=True, help=f"file to write: {out}")
    cpu_engines.add_arguments(parser)
    add("--long", help="proteins too long: window (default), truncate or error")
    at_once = "residues read in one pass (default: as in training); longer proteins: see --long"
    add("--max-residues", type=int, metavar="N", help=at_once)
    add("--deterministic", action="store_true", help="the same bits whatever else is in the file")
    add("--shard", metavar="I/N", help="do the I-th of N shares, to be joined by --merge")
    add("--merge", action="store_true", help="join what all shards have made into --out")
    add("--overwrite", action="store_true", help=OVERWRITE)
    on_error = "stop (default) at a bad record, or skip and count it"
    add("--on-error", default="stop", metavar="{stop,skip}", help=on_error)


def check_required(parser: Parser, args: Any) -> None:
    for name in ("checkpoint", "fasta"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing")


@contextlib.contextmanager
def resumable(out: str) -> Iterator[None]:
    """Around the work of a command: SIGTERM, as a scheduler sends it, means that what is finished
    is kept and the command is to be started again; and whoever stops it is told so."""

    def leave(*_):
        raise SystemExit(EXIT_SAVED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if (folder := PartialResults(Path(out)).folder).is_dir():
            console.print(f"stopped; finished parts are kept in {folder}; the same command goes on")
        raise
