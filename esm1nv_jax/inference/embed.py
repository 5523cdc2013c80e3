"""`esm1nv embed`: a FASTA file to one file of embeddings; killed, it is taken up again."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.arguments import Parser
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import EXIT_SAVED, UserError
from esm1nv_jax.inference import formats
from esm1nv_jax.inference.embed_options import KINDS, Request
from esm1nv_jax.inference.parts import Reader, Spool, disk
from esm1nv_jax.inference.proteins import Proteins, scan

PART_BYTES = 1 << 28  # of results held in memory at once
PART_RESIDUES, PART_BATCHES = 1 << 18, 16  # a part has at least so many, where memory allows


def embed(request: Request) -> str | None:
    """Embeds a FASTA file; returns the hash of the contents, or None for a shard.

    Raises UserError with everything finished so far kept in `OUT.parts`.
    """
    spool = Spool(Path(request.out))
    files.check(request.out)
    if spool.out.exists() and not spool.folder.exists() and not request.overwrite:
        raise UserError(f"{spool.out} exists; add --overwrite, or choose another --out")
    advice = "mend it, or pass over such faults with --on_error=skip"
    proteins = scan(request.fasta, request.on_error == "skip", advice)
    console.print(f"{request.fasta}: {proteins}", markup=False)
    work = _Work(request, proteins)
    if not request.overwrite:  # other devices would cut it otherwise
        work.part_residues = spool.part_residues() or work.part_residues
    spool.begin(work.settings(), request.overwrite)
    mine, of = request.shard or (1, 1)
    with spool.hold(f"job-{mine}-of-{of}"):
        work.run(spool, mine - 1, of)
        if request.shard is None:
            return assemble(spool)
    console.print(
        f"shard {mine} of {of} is done, {len(spool.missing())} parts of {spool.total} are missing; "
        f"when none is: esm1nv embed --merge --out {spool.out}",
        markup=False,
    )
    return None


def merge(out: str, overwrite: bool = False) -> str:
    """Joins the parts that shards have made; returns the hash of the contents."""
    spool = Spool(Path(out))
    formats.choose(spool.out)
    spool.resume()
    if spool.out.exists() and not overwrite:
        raise UserError(f"{out} exists; add --overwrite")
    if missing := spool.missing():
        shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        raise UserError(
            f"{len(missing)} of {spool.total} parts are missing ({shown}); part p is made by the "
            "job --shard=i/n with i = p modulo n + 1"
        )
    return assemble(spool)


def assemble(spool: Spool) -> str:
    """All parts into the one file, which appears by rename; then the parts are removed."""
    settings = spool.resume()
    reader = Reader(spool)
    temporary = spool.out.with_name(spool.out.name + ".tmp")
    try:
        with disk(spool.out, spool.folder):
            formats.choose(spool.out)(temporary, reader, settings)
            os.replace(temporary, spool.out)
    finally:
        temporary.unlink(missing_ok=True)
    spool.clear()
    digest = reader.digest()
    console.print(
        f"{spool.out}: {reader.proteins:,} proteins, {', '.join(reader.fields)}", markup=False
    )
    print(f"contents {digest}")
    return digest


class _Work:
    """The model, and the FASTA cut into parts."""

    def __init__(self, request: Request, proteins: Proteins):
        from esm1nv_jax.inference.engine import Want
        from esm1nv_jax.inference.model import check_layers, load

        self.request, self.proteins = request, proteins
        self.model = load(request.checkpoint, request.precision)
        check_layers(request.layers, self.model.config)
        self.want = Want(request.include, request.layers, request.dtype)
        self.limit = self.model.longest
        self._tell_of_long_ones()
        self.part_residues = self._part_residues()

    def _tell_of_long_ones(self) -> None:
        n, limit, long = (
            int(np.sum(self.proteins.lengths > self.limit)),
            self.limit,
            (self.request.long),
        )
        if not n:
            return
        what = f"{n:,} protein{'s' * (n != 1)} longer than the {limit:,} residues the model reads"
        if long == "error":
            name = next(i for i, s in self.proteins if len(s) > limit)
            raise UserError(f"{what}, the first is {name}; choose --long=window or truncate")
        does = "read in overlapping windows" if long == "window" else "cut"
        note = ""
        if long == "window" and self.model.prefixes_only:
            note = "; the model was trained on prefixes and has never seen the middle of any"
        console.print(f"{what}: {does}{note}", markup=False)

    def _part_residues(self) -> int:
        """Residues in a part: bounded by memory, and many batches where there is room."""
        config, shapes = self.model.config, self.model.placed.shapes
        size = np.dtype(self.request.dtype).itemsize
        width = config.width * len(self.request.layers) * ("per_residue" in self.request.include)
        width += 32 * ("logits" in self.request.include)
        wanted = max(PART_RESIDUES, PART_BATCHES * shapes.tokens * shapes.devices)
        return min(wanted, PART_BYTES // max(1, width * size))

    def settings(self) -> dict:
        """All that the contents depend on, and where the model came from."""
        request, provenance = self.request, self.model.provenance
        return {
            "proteins": self.proteins.digest,
            "model": _digest(self.model.params),
            "checkpoint": request.checkpoint,
            "run": provenance.get("run"),
            "steps": provenance.get("steps"),
            "include": list(request.include),
            "layers": list(request.layers),
            "precision": request.precision,
            "dtype": request.dtype,
            "long": request.long,
            "longest": self.limit,
            "deterministic": request.deterministic,
            "tokens": list(_tokens()) if "logits" in request.include else None,
            "part_residues": self.part_residues,
            "parts": sum(1 for _ in self._cut(map(int, self.proteins.lengths), int)),
        }

    def _cut(self, items: Iterator, size) -> Iterator[list]:
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

    def run(self, spool: Spool, mine: int, of: int) -> None:
        """Computes the parts mine, mine + of, ... that are not there yet."""
        wanted = {part for part in spool.missing() if part % of == mine}
        parts = self._cut(iter(self.proteins), lambda protein: len(protein[1]))
        total = done = 0
        for part, lengths in enumerate(self._cut(map(int, self.proteins.lengths), int)):
            total += sum(lengths) * (part % of == mine)
            done += sum(lengths) * (part % of == mine and part not in wanted)
        if done:
            console.print(f"taking up {spool.folder}: {done:,} of {total:,} residues are there")
        began, start = time.monotonic(), done
        with bar("embed", total, "residues", start=done) as progress:
            for part, records in enumerate(parts):
                if part not in wanted:
                    continue
                spool.write(part, self._compute(records))
                done += sum(len(sequence) for _, sequence in records)
                rate = (done - start) / (time.monotonic() - began)
                progress.update(done, f"{rate:,.0f} residues/s")

    def _compute(self, records: list[tuple[str, bytes]]) -> dict[str, np.ndarray]:
        from esm1nv_jax.data import tokenizer
        from esm1nv_jax.inference.engine import encode

        names = [name for name, _ in records]
        kept = [s if self.request.long == "window" else s[: self.limit] for _, s in records]
        found = encode(
            self.model.placed,
            [tokenizer.residue_ids(sequence) for sequence in kept],
            self.want,
            self.limit,
            self.request.deterministic,
        )
        with np.errstate(over="ignore"):  # what is too large for float16 is told below
            found = {name: value.astype(self.request.dtype) for name, value in found.items()}
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise UserError(
                    f"{name} of some protein from {names[0]} to {names[-1]} is not finite in "
                    f"{self.request.dtype}; take --dtype=float32, or check the checkpoint"
                )
        return {
            "ids": np.array(names),
            "lengths": np.array([len(s) for _, s in records], np.int64),
            "checksums": np.array([hashlib.md5(s).hexdigest() for _, s in records]),
            "rows": np.array([len(s) for s in kept], np.int64),
        } | found


def _tokens() -> tuple[str, ...]:
    from esm1nv_jax.data.tokenizer import TOKENS

    return TOKENS


def _digest(params: dict) -> str:
    import jax

    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf))
    return total.hexdigest()


def main(argv: list[str]) -> int | None:
    parser = Parser(
        "embed",
        "Embeds the proteins of a FASTA file into one file, in the order of the FASTA. Killed and "
        "started again, it goes on where it was.",
        "esm1nv embed --checkpoint runs/first --fasta proteins.fasta.gz --out proteins.h5 "
        "--include mean,per_residue",
    )
    add = parser.add_argument
    add("--checkpoint", help="a run, one of its steps, a model folder or an exported folder")
    add("--fasta", help="proteins, plain or compressed by gzip, zstd or xz")
    add("--out", required=True, help="file to write: .parquet, .h5 or .npz")
    add("--include", default="mean", help=f"some of {','.join(KINDS)} (default mean)")
    add("--layers", default="-1", help="0 the embeddings, k block k, -1 the last after its norm")
    add("--precision", default="fp32", help="of the computation: fp32 (default) or bf16")
    add("--dtype", default="float32", help="of what is stored: float32 (default) or float16")
    add("--long", default="window", help="proteins too long: window (default), truncate or error")
    add("--deterministic", action="store_true", help="the same bits whatever else is in the file")
    add("--shard", help="i/n: do the i-th part of the work, to be joined by --merge")
    add("--merge", action="store_true", help="join what all shards have made into --out")
    add("--overwrite", action="store_true", help="replace --out and unfinished work")
    add("--on_error", default="stop", help="stop at a bad record, or skip and count it")
    args = parser.parse_args(_joined(argv))
    _leave_on_sigterm()
    if args.merge:
        merge(args.out, args.overwrite)
        return
    for name in ("checkpoint", "fasta"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing")
    request = Request(
        args.checkpoint,
        args.fasta,
        args.out,
        tuple(filter(None, args.include.split(","))),
        _integers("layers", args.layers, ","),
        args.precision,
        args.dtype,
        args.long,
        args.deterministic,
        _shard(args.shard),
        args.overwrite,
        args.on_error,
    )
    try:
        embed(request)
    except (SystemExit, KeyboardInterrupt):
        if (parts := Spool(Path(args.out)).folder).is_dir():
            console.print(f"stopped; finished parts are kept in {parts}; the same command goes on")
        raise


def _joined(argv: list[str]) -> list[str]:
    """`--layers -1,3` as `--layers=-1,3`: argparse would take the value for an option."""
    argv = list(argv)
    if "--layers" in argv[:-1]:
        at = argv.index("--layers")
        argv[at : at + 2] = [f"--layers={argv[at + 1]}"]
    return argv


def _integers(name: str, text: str, divider: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(divider))
    except ValueError:
        raise UserError(f"--{name}={text} is not integers divided by {divider!r}") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = _integers("shard", text, "/")
    if len(numbers) != 2:
        raise UserError(f"--shard={text} is not i/n, such as 1/4")
    return numbers[0], numbers[1]


def _leave_on_sigterm() -> None:
    """SIGTERM, as a scheduler sends it, means: what is finished is kept, start me again."""

    def leave(*_):
        raise SystemExit(EXIT_SAVED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)
