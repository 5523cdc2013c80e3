"""`esm1nv embed`: a FASTA file to one file of embeddings; a killed job goes on where it was."""

from __future__ import annotations

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
from esm1nv_jax.common.arguments import Parser
from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import EXIT_SAVED, UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.proteins import Proteins, scan
from esm1nv_jax.inference.embedding_files import writer_for
from esm1nv_jax.inference.engine import KINDS, OutputSpec, embed_sequences
from esm1nv_jax.inference.model import PRECISIONS, check_layers, load
from esm1nv_jax.inference.partial_results import PartialResults, PartReader

PART_BYTES = 1 << 28  # of results held in memory at once
PART_RESIDUES, PART_BATCHES = 1 << 18, 16  # a part has at least so many, where memory allows
ESM_KINDS = {"per_tok": "per_residue", "bos": "cls"}  # names in esm-extract
AS_GIVEN = "checkpoint fasta out precision dtype deterministic overwrite on_error".split()
CHOICES = {
    "include": KINDS,
    "precision": tuple(PRECISIONS),
    "dtype": ("float32", "float16"),
    "long": ("window", "truncate", "error"),
    "on_error": ("stop", "skip"),
}


@dataclasses.dataclass(frozen=True)
class EmbedRequest:
    """What is to be embedded and how. `shard` is (i, n): the i-th of n jobs, from 1."""

    checkpoint: str
    fasta: str
    out: str
    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    precision: str = "fp32"
    dtype: str = "float32"
    long: str = "window"
    deterministic: bool = False
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    on_error: str = "stop"
    max_residues: int | None = None
    esm_layers: bool = False  # layers are those of esm-extract, whose last one is our -1

    def __post_init__(self):
        writer_for(Path(self.out))
        for name, allowed in CHOICES.items():
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (values,)
            unknown = [value for value in values if value not in allowed]
            if unknown or not values:
                option = f"--{name.replace('_', '-')}={unknown[0] if unknown else ''}"
                raise UserError(f"{option} is unknown; there are {', '.join(allowed)}")
        for name in ("include", "layers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"--{name} names one twice: {getattr(self, name)}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            i, n = self.shard
            raise UserError(f"--shard={i}/{n} is not i/n with i from 1 to n, such as 1/4")


def embed(request: EmbedRequest) -> str | None:
    """Embeds a FASTA file; returns the hash of the contents, or None for a shard.

    Raises UserError with everything finished so far kept in `OUT.parts`.
    """
    results = PartialResults(Path(request.out))
    files.check(request.out)
    if results.out.exists() and not results.folder.exists() and not request.overwrite:
        raise UserError(f"{results.out} exists; add --overwrite, or choose another --out")
    advice = "fix it, or pass over such faults with --on-error=skip"
    proteins = scan(request.fasta, request.on_error == "skip", advice)
    console.print(f"{request.fasta}: {proteins}")
    job = _Job(request, proteins)
    if not request.overwrite:  # other devices would cut it otherwise
        job.part_residues = (results.settings() or {}).get("part_residues") or job.part_residues
    results.begin(job.settings(), request.overwrite)
    shard, shards = request.shard or (1, 1)
    with results.lock(f"job-{shard}-of-{shards}"):
        job.run(results, shard - 1, shards)
        if request.shard is None:
            return assemble(results)
    console.print(
        f"shard {shard} of {shards} is done, {count(len(results.missing()), 'part')} of "
        f"{results.total} missing; when none is: esm1nv embed --merge --out {results.out}"
    )
    return None


def merge(out: str, overwrite: bool = False) -> str:
    """Joins the parts that shards have made; returns the hash of the contents."""
    results = PartialResults(Path(out))
    writer_for(results.out)
    results.resume()
    if results.out.exists() and not overwrite:
        raise UserError(f"{out} exists; add --overwrite")
    if missing := [part for part in range(results.total) if not results.path(part).exists()]:
        numbers = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise UserError(
            f"{len(missing)} of {results.total} parts are missing ({numbers}); part p is made by "
            "the job --shard=i/n for which i - 1 is the remainder of p / n"
        )
    return assemble(results)


def assemble(results: PartialResults) -> str:
    """All parts into the one file, which appears by rename; then the parts are removed."""
    settings = results.resume()
    reader = PartReader(results)
    with files.replacing(results.out, results.folder) as new:
        writer_for(results.out)(new, reader, settings)
    results.clear()
    digest = reader.digest()
    console.print(f"{results.out}: {count(reader.proteins, 'protein')}, {', '.join(reader.fields)}")
    print(f"contents {digest}")
    return digest


class _Job:
    """The model, and the FASTA cut into parts."""

    def __init__(self, request: EmbedRequest, proteins: Proteins):
        self.request, self.proteins = request, proteins
        self.model = load(request.checkpoint, request.precision, request.max_residues)
        self.layers = request.layers
        blocks = self.model.config.layers
        if request.esm_layers:  # counted from the end where negative, the last after its LayerNorm
            self.layers = tuple((i + blocks + 1) % (blocks + 1) for i in request.layers)
            self.layers = tuple(-1 if i == blocks else i for i in self.layers)
            console.print(f"--repr-layers are stored as {', '.join(map(str, self.layers))}")
        check_layers(self.layers, self.model.config)
        self.outputs = OutputSpec(request.include, self.layers, request.dtype)
        self.limit = self.model.longest
        self._report_long_proteins()
        self.part_residues = self._choose_part_residues()

    def _report_long_proteins(self) -> None:
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

    def _choose_part_residues(self) -> int:
        """Residues in a part: bounded by memory, and many batches where there is room."""
        config, shapes = self.model.config, self.model.on_devices.shapes
        size = np.dtype(self.request.dtype).itemsize
        width = config.width * len(self.layers) * ("per_residue" in self.request.include)
        width += 32 * ("logits" in self.request.include)
        wanted = max(PART_RESIDUES, PART_BATCHES * shapes.tokens * shapes.devices)
        return min(wanted, PART_BYTES // max(1, width * size))

    def settings(self) -> dict[str, Any]:
        """All that the contents depend on, and where the model came from."""
        request, provenance = self.request, self.model.provenance
        return {
            "proteins": self.proteins.digest,
            "count": len(self.proteins.lengths),
            "model": self.model.digest,
            "checkpoint": request.checkpoint,
            "run": provenance.get("run"),
            "steps": provenance.get("steps"),
            "include": list(request.include),
            "layers": list(self.layers),
            "precision": request.precision,
            "dtype": request.dtype,
            "long": request.long,
            "longest": self.limit,
            "deterministic": request.deterministic,
            "tokens": list(tokenizer.TOKENS) if "logits" in request.include else None,
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
        began, start, first = time.monotonic(), done, 0
        with bar("embed", total, "residues", start=done) as progress:
            parts = self._cut(self.proteins, lambda protein: len(protein[1]))
            for part, records in enumerate(parts):
                if part in wanted:
                    results.write(part, first, [name for name, _ in records], self._embed(records))
                    done += sum(len(sequence) for _, sequence in records)
                    rate = (done - start) / (time.monotonic() - began)
                    progress.update(done, f"{rate:,.0f} residues/s")
                first += len(records)

    def _embed(self, records: list[tuple[str, bytes]]) -> dict[str, np.ndarray]:
        kept = [s if self.request.long == "window" else s[: self.limit] for _, s in records]
        arrays = embed_sequences(
            self.model.on_devices,
            [tokenizer.residue_ids(sequence) for sequence in kept],
            self.outputs,
            self.limit,
            self.request.deterministic,
        )
        with np.errstate(over="ignore"):  # what is too large for float16 is reported below
            arrays = {name: value.astype(self.request.dtype) for name, value in arrays.items()}
        for name, value in arrays.items():
            if not np.isfinite(value).all():
                raise UserError(
                    f"{name} of some protein from {records[0][0]} to {records[-1][0]} is not "
                    f"finite in {self.request.dtype}; take --dtype=float32, or check the checkpoint"
                )
        return {
            "lengths": np.array([len(s) for _, s in records], np.int64),
            "checksums": np.array([hashlib.md5(s).hexdigest().encode() for _, s in records]),
            "rows": np.array([len(s) for s in kept], np.int64),
        } | arrays


def main(argv: list[str]) -> None:
    parser = Parser(
        "embed",
        "Embeds the proteins of a FASTA file into one file, in the order of the FASTA. Killed and "
        "started again, it goes on where it was.",
        "esm1nv embed --checkpoint runs/first --fasta proteins.fasta.gz --out proteins.h5 "
        "--include mean per_residue",
    )
    add = parser.add_argument
    add("--checkpoint", help="a run, one of its steps, a model folder or an exported folder")
    add("--fasta", help="proteins, plain or compressed by gzip, zstd or xz")
    add("--out", required=True, help="file to write: .parquet, .h5 or .npz")
    add("--include", nargs="+", default=["mean"], help=f"some of {' '.join(KINDS)} (default mean)")
    add("--layers", nargs="+", help="0 the embeddings, k block k, -1 the last after its LayerNorm")
    add("--precision", default="fp32", help="of matrix products: fp32 (default) or bf16")
    add("--dtype", default="float32", help="of what is stored: float32 (default) or float16")
    add("--long", help="proteins too long: window (default), truncate or error")
    add("--max-residues", type=int, metavar="N", help="read at once (default as trained)")
    add("--deterministic", action="store_true", help="the same bits whatever else is in the file")
    add("--shard", metavar="I/N", help="do the I-th of N shares, to be joined by --merge")
    add("--merge", action="store_true", help="join what all shards have made into --out")
    add("--overwrite", action="store_true", help="replace --out and unfinished work")
    add("--on-error", default="stop", help="stop at a bad record, or skip and count it")
    esm = parser.add_argument_group("as in esm-extract; also --include mean per_tok bos")
    esm.add_argument("--repr-layers", nargs="+", help="as --layers, but the last block is -1")
    esm.add_argument("--truncation-seq-length", type=int, metavar="N", help="cut to N residues")
    esm.add_argument("--toks-per-batch", metavar="N", help="ignored: batches fit the device")
    args = parser.parse_args(argv)
    _leave_on_sigterm()
    if args.merge:
        merge(args.out, args.overwrite)
        return
    for name in ("checkpoint", "fasta"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing")
    for ours, theirs in (("layers", "repr_layers"), ("max_residues", "truncation_seq_length")):
        if getattr(args, ours) is not None and getattr(args, theirs) is not None:
            parser.error(f"--{ours} and --{theirs} say the same; give one of them")
    if args.toks_per_batch is not None:
        console.print("--toks-per-batch is ignored: batches are chosen to fit the device")
    cut = args.truncation_seq_length
    request = EmbedRequest(
        include=tuple(ESM_KINDS.get(kind, kind) for kind in _words(args.include)),
        layers=_integers("layers", _words(args.layers or args.repr_layers or ["-1"])),
        long=args.long or ("window" if cut is None else "truncate"),
        shard=_shard(args.shard),
        max_residues=args.max_residues if cut is None else cut,
        esm_layers=args.repr_layers is not None,
        **{name: getattr(args, name) for name in AS_GIVEN},
    )
    try:
        embed(request)
    except (SystemExit, KeyboardInterrupt):
        if (folder := PartialResults(Path(args.out)).folder).is_dir():
            console.print(f"stopped; finished parts are kept in {folder}; the same command goes on")
        raise


def _words(values: list[str]) -> list[str]:
    """Values divided by blanks or by commas."""
    return [word for value in values for word in value.split(",") if word]


def _integers(name: str, words: list[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, words))
    except ValueError:
        raise UserError(f"--{name}={','.join(words)} is not a list of integers") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = _integers("shard", text.split("/"))
    if len(numbers) != 2:
        raise UserError(f"--shard={text} is not i/n, such as 1/4")
    return numbers[0], numbers[1]


def _leave_on_sigterm() -> None:
    """SIGTERM, as a scheduler sends it, means: what is finished is kept, start me again."""

    def leave(*_):
        raise SystemExit(EXIT_SAVED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
