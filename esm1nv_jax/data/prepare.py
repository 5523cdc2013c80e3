"""`esm1nv prepare`: FASTA to a data set of three splits.

The data set is made in a folder beside `--out` and renamed when it is whole, so that `--out` is
either complete or not there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import glob
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.common.arguments import Parser
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import (
    clusters,
    duplicates,
    first_pass,
    manifest,
    split_writer,
    splits,
    worker_pool,
)
from esm1nv_jax.data.records import disk_error

_COPY = "copy-of-"
_SMALLEST, _LARGEST = 4 << 20, 128 << 20  # bytes of text in a unit, and so in a shard
_UNITS = 256  # as many as keep both workers and a person who lists the folder content
_TEXT_PER_BYTE = 2.3  # of UniRef50, compressed
_BYTES_PER_SEQUENCE = 200  # compressed; 450 plain
_MARGIN = 2  # how many times more may be held out than will be, since their number is a guess


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is asked of `prepare`. `fasta` are paths; '-' is standard input."""

    fasta: tuple[str, ...]
    out: str
    validation: int = 5_000
    test: int = 1_000_000
    seed: int = 0
    workers: int = 1
    min_length: int = 1
    max_length: int | None = None
    groups: str | None = None
    on_error: str = "stop"

    def __post_init__(self):
        for name, least in (("validation", 0), ("test", 0), ("workers", 1), ("min_length", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be {least} or more, found {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must lie in 0..2**64 - 1, found {self.seed}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise UserError(
                f"--max_length {self.max_length} is less than --min_length {self.min_length}"
            )
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"--on_error must be stop or skip, found {self.on_error!r}")
        if list(self.fasta).count("-") > 1:
            raise UserError("standard input (-) can be read once only")


def prepare(wanted: Preparation) -> dict:
    """Makes the data set and returns its manifest. Raises UserError, and then leaves nothing."""
    began = time.monotonic()
    with _folder_in_the_making(Path(wanted.out)) as (folder, lock):
        sources = tuple(_source(name, i, folder) for i, name in enumerate(wanted.fasta))
        size = sum(path.stat().st_size for path in sources)
        job = first_pass.Job(
            sources=sources,
            names=tuple("standard input" if name == "-" else name for name in wanted.fasta),
            folder=folder,
            workers=wanted.workers,
            unit_bytes=int(min(max(size * _TEXT_PER_BYTE / _UNITS, _SMALLEST), _LARGEST)),
            seed=wanted.seed,
            held_below=_held_below(wanted, size),
            min_length=wanted.min_length,
            max_length=wanted.max_length,
            skip=wanted.on_error == "skip",
            map=_save_map(wanted.groups, folder),
        )
        scanned = worker_pool.run(job, lock, size)
        chosen = _Chosen(wanted, job, scanned)
        if chosen.too_few:  # the guess was wrong: again, and anything may be held out
            console.print("more sequences must be held out than were set apart: reading again")
            for unit in scanned.units:
                first_pass.shard(folder, unit.number).unlink(missing_ok=True)
                first_pass.maybe_shard(folder, unit.number).unlink(missing_ok=True)
            job = dataclasses.replace(job, held_below=worker_pool.ALL)
            scanned = worker_pool.run(job, lock, size)
            chosen = _Chosen(wanted, job, scanned)
        with bar("hold out", int(chosen.maybe.sum()), "sequences") as shown:
            made = split_writer.lay_out(
                folder,
                scanned.units,
                chosen.split,
                chosen.maybe,
                chosen.lengths,
                chosen.keys,
                job.unit_bytes,
                shown.advance,
            )
        if job.map:
            job.map.unlink()
        for path in folder.glob(f"{_COPY}*"):
            path.unlink()
        split_writer.save(folder, made, with_clusters=job.map is not None)
        content = _content(wanted, scanned, chosen, made, folder)
        content["seconds"] = round(time.monotonic() - began, 1)
        manifest.write(folder, content)
    return content


class _Chosen:
    """The split of every sequence. Arrays are [kept], in the order of the input."""

    def __init__(self, wanted: Preparation, job: first_pass.Job, scanned: worker_pool.Scanned):
        ids, contents = scanned.take("ids"), scanned.take("contents")
        same, other = duplicates.find(ids, contents)
        if other.size and not job.skip:
            raise duplicates.report(job.sources, job.names, ids[other[0]])
        del ids, contents
        self.skipped = Counter({duplicates.SAME: same.size, duplicates.OTHER: other.size})
        self.keys, self.lengths = scanned.take("keys"), scanned.take("lengths")
        self.maybe = self.keys < np.uint64(job.held_below)
        self.split = np.zeros(len(self.keys), np.int8)
        self.split[same] = self.split[other] = splits.DROPPED
        kept = len(self.keys) - same.size - other.size
        self.without_cluster = sum(unit.without_cluster for unit in scanned.units)
        if job.map is not None and kept and self.without_cluster == len(self.keys):
            raise UserError(
                f"no sequence is named in {wanted.groups}; its first column must hold ids or"
                " accessions of the FASTA, its last the cluster"
            )
        splits.check_sizes(kept, wanted.validation, wanted.test)
        held = np.flatnonzero(self.maybe & (self.split != splits.DROPPED))
        self.too_few = (
            held.size < wanted.validation + wanted.test and job.held_below != worker_pool.ALL
        )
        if not self.too_few and held.size:
            self.split[held] = splits.choose(
                self.keys[held], wanted.validation, wanted.test, whole=job.map is not None
            )


def _content(
    wanted: Preparation,
    scanned: worker_pool.Scanned,
    chosen: _Chosen,
    made: dict[str, split_writer.Split],
    folder: Path,
) -> dict:
    """The manifest."""
    skipped = Counter(scanned.of_files.skipped) + chosen.skipped
    mended = Counter(scanned.of_files.mended)
    read: Counter = Counter()
    faults = list(scanned.of_files.faults)
    for unit in scanned.units:
        skipped += unit.skipped
        mended += unit.mended
        read += unit.sources
        faults += unit.faults
    content = {
        "format": manifest.FORMAT,
        "program": f"esm1nv_jax {__version__}",
        "made_with": {name: version(name) for name in ("array_record", "isal", "numpy")},
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "asked": {k: v for k, v in dataclasses.asdict(wanted).items() if k != "out"},
        "sources": [
            {"file": name, "bytes": size, "md5": md5, "sequences": read[i]}
            for i, (name, size, md5) in enumerate(
                zip(wanted.fasta, scanned.sizes, scanned.checksums, strict=True)
            )
        ],
        "skipped": dict(sorted(skipped.items())),
        "first_skipped": faults[:20],
        "mended": dict(sorted(mended.items())),
        "splits": {name: manifest.describe(folder, split) for name, split in made.items()},
    }
    if wanted.groups:
        content["clusters"] = {
            "file": wanted.groups,
            "sequences_without": chosen.without_cluster,
            **{
                name: len(np.unique(np.concatenate([*split.keys, np.zeros(0, np.uint64)])))
                for name, split in made.items()
            },
        }
    return content


@contextmanager
def _folder_in_the_making(out: Path) -> Iterator[tuple[Path, int]]:
    """(a folder that becomes `out` if all goes well, a descriptor that holds it as ours)."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out, or remove it")
    if out.is_mount() or (out.exists() and out.samefile(".")):
        raise UserError(
            f"{out} cannot be replaced, being a mounted disk or the current folder; name a new"
            f" folder in it: --out {out / 'NAME'}"
        )
    out = out.resolve()  # a link to a folder would not be replaced by a rename
    prefix = f".{out.name}.unfinished-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_unless_alive(old)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        folder.chmod(0o755)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as failure:
        raise disk_error(out, failure) from failure
    try:
        yield folder, lock
        folder.rename(out)
    except OSError as failure:
        raise disk_error(out, failure) from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unless_alive(old: Path) -> None:
    """Removes what a killed run left; a run that is alive holds its lock."""
    lock = os.open(old, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another preparation is writing {old}; wait for it or stop it") from None
    finally:
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _source(name: str, number: int, folder: Path) -> Path:
    """The file of that name; what can be read once only is first copied into the folder."""
    if name != "-" and Path(name).is_file():
        return Path(name)
    if name != "-" and (not Path(name).exists() or Path(name).is_dir()):
        raise UserError(f"no file {name}; --fasta takes files, or - for standard input")
    if name == "-" and sys.stdin is None:
        raise UserError("standard input is closed; --fasta - reads what is piped into it")
    path = folder / f"{_COPY}{number}"
    try:
        with (
            open(0 if name == "-" else name, "rb", closefd=name != "-") as pipe,
            open(path, "wb") as copy,
        ):
            shutil.copyfileobj(pipe, copy, 1 << 20)
    except OSError as failure:
        raise disk_error(path, failure) from failure
    return path


def _save_map(groups: str | None, folder: Path) -> Path | None:
    """Loads the clusters once, for all workers to map into their memory."""
    if groups is None:
        return None
    if not Path(groups).is_file():
        raise UserError(f"no file {groups}; --groups takes a table of accession, tab, cluster")
    path = folder / "map.npy"
    np.save(path, clusters.load_map(Path(groups)))
    return path


def _held_below(wanted: Preparation, size: int) -> int:
    """The key under which about `_MARGIN` times as many sequences lie as are held out."""
    sequences = max(1, size / _BYTES_PER_SEQUENCE)
    share = _MARGIN * (wanted.validation + wanted.test) / sequences
    return worker_pool.ALL if share >= 1 else int(share * (1 << 64))


def main(argv: list[str]) -> None:
    parser = Parser(
        "prepare",
        "Make a data set of FASTA files: plain, or compressed by gzip, zstd or xz.",
        "esm1nv prepare --fasta uniref50.fasta.gz --out data/uniref50",
    )
    add = parser.add_argument
    add("--fasta", nargs="+", metavar="FILE", help="FASTA files; - is standard input")
    add("--out", metavar="DIR", help="the folder to make")
    add("--validation", type=int, default=5_000, help="sequences (default: %(default)s)")
    add("--test", type=int, default=1_000_000, help="sequences (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of splits (default: %(default)s)")
    cores = min(os.cpu_count() or 1, 16)
    add("--workers", type=int, default=cores, help="processes (default here: %(default)s)")
    add("--min_length", type=int, default=1, help="residues; shorter ones are left out")
    add("--max_length", type=int, help="residues; longer ones are left out")
    add("--groups", metavar="TSV", help="accession, tab, cluster: clusters are not divided")
    add("--on_error", default="stop", help="stop at a bad record, or skip and count it")
    add("--verify", metavar="DIR", help="instead: read a data set and compare with its manifest")
    given = vars(parser.parse_args(argv))
    verified = given.pop("verify")
    if verified:
        _verify(Path(verified))
        return
    if not given["fasta"] or not given["out"]:
        raise UserError("--fasta and --out are needed (see esm1nv prepare --help)")
    given["fasta"] = tuple(given["fasta"])
    content = prepare(Preparation(**given))
    console.print(f"{given['out']}: " + summary(content), markup=False)


def _verify(folder: Path) -> None:
    content = manifest.read(folder)
    total = sum(s["bytes"] for split in content["splits"].values() for s in split["shards"])
    with bar(f"verify {folder}", total / 1e6, "MB") as shown:
        manifest.verify(folder, lambda read: shown.advance(read / 1e6))
    console.print(f"{folder} is as its manifest says: " + summary(content), markup=False)


def summary(content: dict) -> str:
    """A data set in one line."""
    parts = [f"{name} {split['examples']:,}" for name, split in content["splits"].items()]
    skipped = sum(content["skipped"].values())
    residues = sum(split["residues"] for split in content["splits"].values())
    return f"{', '.join(parts)} sequences, {residues:,} residues, {skipped:,} skipped"
