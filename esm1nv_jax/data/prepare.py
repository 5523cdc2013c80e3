"""`esm1nv prepare`: makes a data set of three splits from FASTA files or tables.

The data set is made in a folder beside `--out` and renamed when it is whole, so that `--out` is
either complete or not there.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
import tempfile
import time
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser, usable_cores
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta, first_pass, manifest, splits
from esm1nv_jax.data.splits import Size, SplitAssignment
from esm1nv_jax.data.tables import COLUMNS, input_name, parse_columns, protein_file

_SMALLEST_CHUNK, _LARGEST_CHUNK = 4 << 20, 128 << 20  # bytes of text in a chunk, and so in a shard
_CHUNKS = 256  # enough to keep the workers busy, few enough to list the folder
_TEXT_PER_BYTE = 2.3  # of UniRef50, compressed
_BYTES_PER_SEQUENCE = 200  # compressed; 450 plain
_MARGIN = 2  # candidates per sequence held out, since the number of sequences is a guess
_MOST_UNMATCHED, _SOME_UNMATCHED = 0.5, 0.05  # shares of sequences without a cluster
_ADVICE = "fix it, or keep the first with --on-error=skip"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The options of `prepare`. `fasta` are paths; "-" is standard input."""

    fasta: tuple[str, ...]
    out: str
    validation: Size = None
    test: Size = None
    seed: int = 0
    workers: int = 1
    min_length: int = 1
    max_length: int | None = None
    groups: str | None = None
    on_error: str = "stop"
    columns: tuple[str, str] = COLUMNS  # of ids and of sequences, where a file is a table

    def __post_init__(self):
        for name, least in (("validation", 0), ("test", 0), ("workers", 1), ("min_length", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be {least} or more, found {value}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must lie in 0..2**64 - 1, found {self.seed}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise UserError(
                f"--max-length {self.max_length} is less than --min-length {self.min_length}"
            )
        if files.is_remote(self.out):
            raise UserError(f"--out {self.out} is no folder on a disk; prepare one, and copy it")
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"--on-error must be stop or skip, found {self.on_error!r}")
        if list(self.fasta).count("-") > 1:
            raise UserError("standard input (-) can be read once only")


def prepare(options: Preparation) -> dict:
    """Makes the data set and returns its manifest. Raises UserError, and then leaves nothing."""
    began = time.monotonic()
    with _unfinished_folder(Path(options.out)) as (folder, lock):
        sources = [protein_file(name, folder, options.columns) for name in options.fasta]
        sizes = [path.stat().st_size for path, _ in sources]
        text = sum(sizes) * _TEXT_PER_BYTE
        task = first_pass.WorkerTask(
            sources=tuple(path for path, _ in sources),
            names=tuple(map(input_name, options.fasta)),
            folder=folder,
            workers=options.workers,
            chunk_bytes=int(min(max(text / _CHUNKS, _SMALLEST_CHUNK), _LARGEST_CHUNK)),
            seed=options.seed,
            holdout_below=_holdout_below(options, sum(sizes)),
            min_length=options.min_length,
            max_length=options.max_length,
            skip=options.on_error == "skip",
            cluster_table=_save_table(options.groups, folder),
        )
        parsed = first_pass.run(task, lock, sum(sizes))
        skipped, assigned = _assign(options, task, parsed)
        if assigned is None:
            console.print("the holdout candidates do not make the splits exact: reading again")
            for chunk in parsed.chunks:
                for path, _ in chunk.files(folder):
                    path.unlink(missing_ok=True)
            task = dataclasses.replace(task, holdout_below=first_pass.EVERY_KEY)
            parsed = first_pass.run(task, lock, sum(sizes))
            skipped, assigned = _assign(options, task, parsed)
            assert assigned is not None
        with bar("hold out", int(assigned.candidate.sum()), "sequences") as shown:
            written = manifest.write_splits(
                folder, parsed.chunks, assigned, task.chunk_bytes, shown.advance
            )
        if task.cluster_table:
            task.cluster_table.unlink()
        for path, copy in sources:
            if copy is not None:
                path.unlink()
        manifest.finalize(folder, written, with_clusters=task.cluster_table is not None)
        content = _manifest(options, sizes, parsed, skipped, written)
        content["seconds"] = round(time.monotonic() - began, 1)
        manifest.write(folder, content)
    return content


def _holdout_below(options: Preparation, size: int) -> int:
    """The key below which about `_MARGIN` times as many sequences lie as are held out."""
    sequences = max(1, size // _BYTES_PER_SEQUENCE)
    try:
        share = sum(splits.resolve_sizes(sequences, options.validation, options.test)) / sequences
    except UserError:  # they do not fit the guess; they may fit the sequences
        share = 1.0
    return min(int(_MARGIN * share * (1 << 64)), first_pass.EVERY_KEY)


def _save_table(groups: str | None, folder: Path) -> Path | None:
    """Reads the clusters once, for all workers to map into their memory."""
    if groups is None:
        return None
    table, mmseqs = splits.load_table(Path(groups))
    if mmseqs:
        console.print(f"{groups} is read as MMseqs2 writes it: representative, tab, member")
    path = folder / "clusters.npy"
    np.save(path, table)
    return path


def _assign(
    options: Preparation, task: first_pass.WorkerTask, parsed: first_pass.FirstPass
) -> tuple[Counter, SplitAssignment | None]:
    """(counts of duplicates; the split of every sequence, or None with too few candidates)."""
    ids, contents = parsed.take("ids"), parsed.take("contents")
    same, other = fasta.find_duplicates(ids, contents)
    if other.size and not task.skip:
        sources = list(zip(task.sources, task.names, strict=True))
        raise fasta.conflict_error(sources, ids[other[0]], _ADVICE)
    del ids, contents
    keys, lengths = parsed.take("keys"), parsed.take("lengths")
    kept = len(keys) - same.size - other.size
    if options.groups is not None:
        _check_clusters(options.groups, sum(c.without_cluster for c in parsed.chunks), len(keys))
    validation, test = splits.resolve_sizes(kept, options.validation, options.test)
    split = np.zeros(len(keys), np.int8)
    split[same] = split[other] = splits.DROPPED
    candidate = keys < np.uint64(task.holdout_below)
    available = np.flatnonzero(candidate & (split != splits.DROPPED))
    skipped = Counter({fasta.DUPLICATE: same.size, fasta.CONFLICT: other.size})
    # Splits that whole clusters of candidates make exact are those of all sequences; others would
    # depend on how many candidates there are, and so on how the input is compressed.
    every = task.holdout_below == first_pass.EVERY_KEY
    if available.size:
        whole = options.groups is not None or not every
        split[available] = splits.assign(keys[available], validation, test, whole)
    found = np.bincount(split[available], minlength=splits.DROPPED)
    if not every and tuple(found[1:]) != (validation, test):
        return skipped, None
    sizes = zip(splits.NAMES[1:], (validation, test), splits.DEFAULT_SIZES, strict=True)
    for name, size, card in sizes:
        if getattr(options, name) is None and size < card:
            console.print(
                f"--{name} {size:,}: {splits.DEFAULT_SHARE:.0%} of {kept:,} sequences, as the "
                f"default of {card:,} is more"
            )
    if kept and not (split == splits.TRAIN).any():
        raise UserError(
            f"the clusters of {options.groups} are too large: whole ones for validation and test "
            "leave nothing to train on; hold out 0 for one of them"
        )
    return skipped, SplitAssignment(split, candidate, keys, lengths)


def _check_clusters(groups: str, without: int, sequences: int) -> None:
    """Reports how many sequences have a cluster; raises UserError where most have none."""
    what = f"{without:,} of {sequences:,} sequences are not in {groups}"
    if without > _MOST_UNMATCHED * sequences:
        raise UserError(
            f"{what}; its first column must hold ids or accessions of the FASTA, its last the "
            "cluster (a sequence that is alone in its cluster needs a line, too)"
        )
    if without > _SOME_UNMATCHED * sequences:
        console.print(f"warning: {what}; each is taken for a cluster of its own")


def _manifest(
    options: Preparation,
    sizes: list[int],
    parsed: first_pass.FirstPass,
    duplicates: Counter,
    written: dict[str, manifest.SplitWriter],
) -> dict:
    parts = [parsed.whole_files, *parsed.chunks]
    sequences = sum((part.sources for part in parts), Counter())
    content = {
        "format": manifest.FORMAT,
        "program": f"esm1nv_jax {__version__}",
        "packages": {name: version(name) for name in ("array_record", "isal", "numpy")},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "sources": [
            {"file": name, "bytes": size, "md5": parsed.md5[i], "sequences": sequences[i]}
            for i, (name, size) in enumerate(zip(options.fasta, sizes, strict=True))
        ],
        "skipped": dict(sorted(sum((part.skipped for part in parts), duplicates).items())),
        "first_skipped": [fault for part in parts for fault in part.faults][:20],
        "normalized": dict(sorted(sum((part.normalized for part in parts), Counter()).items())),
        "splits": {name: manifest.describe(split) for name, split in written.items()},
    }
    if options.groups:
        content["clusters"] = {
            "file": options.groups,
            "sequences_without": sum(c.without_cluster for c in parsed.chunks),
            **{name: len(np.unique(split.keys)) for name, split in written.items()},
        }
    return content


@contextmanager
def _unfinished_folder(out: Path) -> Iterator[tuple[Path, int]]:
    """(a folder that becomes `out` if all goes well, a descriptor that holds its lock)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out, or remove it")
    if out.is_mount() or (out.exists() and out.samefile(".")):
        raise UserError(
            f"{out} cannot be replaced, being a mounted disk or the current folder; name a new"
            f" folder in it: --out {out / 'NAME'}"
        )
    out = out.resolve()  # a link to a folder would not be replaced by a rename
    prefix = f".{out.name}.unfinished-"
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_if_abandoned(old)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        folder.chmod(0o755)
        lock = os.open(folder, os.O_RDONLY)
    try:
        with files.writing(out):
            files.try_lock(lock, folder)
            yield folder, lock
            folder.rename(out)
    except MemoryError:
        raise UserError("memory ran out; free some, or try fewer --workers") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(old: Path) -> None:
    """Removes what a killed run left; a live run holds its lock."""
    lock = os.open(old, os.O_RDONLY)
    try:
        locked = files.try_lock(lock, old)
    finally:
        os.close(lock)
    if locked is False:
        raise UserError(f"another preparation is writing {old}; wait for it or stop it")
    if locked:
        shutil.rmtree(old, ignore_errors=True)
    else:
        console.print(f"{old} is left from another preparation; remove it if none is running")


def _parse_size(text: str) -> Size:
    """A number of sequences, or a share of them between 0 and 1."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        if 0 < (share := float(text)) < 1:
            return share
    raise ArgumentTypeError(f"{text!r} is neither a number of sequences nor a share such as 0.01")


def main(argv: list[str]) -> None:
    parser = Parser(
        "prepare",
        "Make a data set from FASTA files, or tables; plain, or compressed by gzip, zstd or xz.",
        "esm1nv prepare --fasta uniref50.fasta.gz --out data/uniref50",
    )
    add = parser.add_argument
    kinds = "FASTA, CSV, TSV or Parquet files, or pipes; -: stdin"
    add("--fasta", nargs="+", action="extend", metavar="FILE", help=kinds)
    of_tables = "of CSV, TSV and Parquet (default: %(default)s)"
    add("--columns", default=",".join(COLUMNS), help=of_tables)
    add("--out", metavar="DIR", help="the folder to make")
    for name, size in zip(splits.NAMES[1:], splits.DEFAULT_SIZES, strict=True):
        add(
            f"--{name}",
            type=_parse_size,
            metavar="N",
            help=f"sequences to hold out for {name}, a number or a share such as 0.01 (default: "
            f"{size:,}, at most {splits.DEFAULT_SHARE:.0%} of all)".replace("%", "%%"),
        )
    add("--seed", type=int, default=0, help="of the choice of splits (default: %(default)s)")
    cores = min(usable_cores(), 16)
    add("--workers", type=int, default=cores, help="processes (default here: %(default)s)")
    shorter = "residues; shorter sequences are left out (default: %(default)s)"
    add("--min-length", type=int, default=1, metavar="N", help=shorter)
    longer = "residues; longer sequences are left out (default: none)"
    add("--max-length", type=int, metavar="N", help=longer)
    add("--groups", metavar="TSV", help="accession, tab, cluster: clusters are not divided")
    on_error = "stop (default) at a bad record, or skip and count it"
    add("--on-error", default="stop", metavar="{stop,skip}", help=on_error)
    add("--verify", metavar="DIR", help="instead: read a data set and compare with its manifest")
    options = vars(parser.parse_args(argv))
    if folder := options.pop("verify"):
        content = manifest.verify(Path(folder))
        console.print(f"{folder} agrees with its manifest: {manifest.summary(content)}")
        return
    if not options["fasta"] or not options["out"]:
        raise UserError("--fasta and --out are needed (see esm1nv prepare --help)")
    options["fasta"] = tuple(options["fasta"])
    options["columns"] = parse_columns(options["columns"])
    content = prepare(Preparation(**options))
    console.print(f"{options['out']}: {manifest.summary(content)}")
