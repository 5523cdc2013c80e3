"""The speed of `esm1nv prepare`, beside the least that any program must do with the same file.

    python benchmarks/prepare.py --fasta FILE.gz [MORE.gz ...] [--copies 8] [--json OUT.json]

Copies the input, under other ids, into one gzip file of a size worth timing, and runs in turn, in
each of `--rounds`: `gzip -dc | wc -l`; a bare loop that decompresses, splits at `>`, makes a
tf.Example of each record and writes one ArrayRecord file; `prepare` with one worker; with two.
Ratios are of the medians. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from isal import igzip

UNIREF50 = 52_000_000

BARE = """
import gzip, sys
from array_record.python.array_record_module import ArrayRecordWriter
from isal import igzip
from tensorflow_datasets.proto import tf_example_pb2
source, out, options = sys.argv[1:]
writer = ArrayRecordWriter(out, options)
rest = b""
def write(record):
    header, _, body = record.partition(b"\\n")
    name, _, description = header.partition(b" ")
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(name)
    feature["description"].bytes_list.value.append(description)
    feature["sequence"].bytes_list.value.append(body.replace(b"\\n", b""))
    writer.write(example.SerializeToString())
with igzip.open(source) as file:
    while block := file.read(1 << 20):
        *records, rest = (rest + block).split(b"\\n>")
        for record in records:
            write(record.removeprefix(b">"))
write(rest)
writer.close()
"""


def enlarge(sources: list[str], copies: int, out: Path) -> int:
    """Writes `copies` of the sources under different ids; returns the number of sequences."""
    text = b"\n" + b"\n".join(igzip.open(source).read().strip() for source in sources)
    with gzip.open(out, "wb", compresslevel=6) as file:
        for copy in range(copies):
            file.write(text.replace(b"\n>", b"\n>%d_" % copy).lstrip() + b"\n")
    return copies * text.count(b"\n>")


def timed(command: list[str] | str) -> tuple[float, float]:
    """(seconds, seconds of all cores together)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, shell=isinstance(command, str), check=True, capture_output=True)
    spent, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fasta", nargs="+", required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        report(args, folder)
    finally:
        shutil.rmtree(folder)


def report(args: argparse.Namespace, folder: Path) -> None:
    source = folder / "all.fasta.gz"
    sequences = enlarge(args.fasta, args.copies, source)
    held_out = ["--validation", str(sequences // 1000), "--test", str(sequences // 50)]

    def prepared(workers: int) -> list[str]:
        options = f"--fasta {source} --out {folder / 'set'} --workers {workers}".split()
        return [sys.executable, "-m", "esm1nv_jax", "prepare", *options, *held_out]

    bare = [sys.executable, "-c", BARE, str(source), str(folder / "bare")]
    runs = {
        "gzip -dc | wc -l": f"gzip -dc {source} | wc -l",
        "bare loop": [*bare, "group_size:1,uncompressed"],
        "bare loop, compressed": [*bare, "group_size:1"],
        "prepare, 1 worker": prepared(1),
        "prepare, 2 workers": prepared(2),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, command in runs.items():
            times[name].append(timed(command))
            shutil.rmtree(folder / "set", ignore_errors=True)
    median = {name: statistics.median(t for t, _ in pairs) for name, pairs in times.items()}
    cores = {name: statistics.median(c for _, c in pairs) for name, pairs in times.items()}
    megabytes = source.stat().st_size / 1e6
    print(f"{sequences:,} sequences, {megabytes:.0f} MB compressed, {args.rounds} rounds\n")
    print(f"{'':24}{'s':>8}{'core-s':>8}{'sequences/s':>14}{'52M: minutes':>14}")
    for name, spent in median.items():
        rate = sequences / spent
        minutes = UNIREF50 / rate / 60
        print(f"{name:24}{spent:8.2f}{cores[name]:8.2f}{rate:14,.0f}{minutes:14.1f}")
    ratios = {
        "prepare with 1 worker / bare loop": median["bare loop"] / median["prepare, 1 worker"],
        "the same, by time of cores": cores["bare loop"] / cores["prepare, 1 worker"],
        "prepare with 2 workers / with 1": (
            median["prepare, 1 worker"] / median["prepare, 2 workers"]
        ),
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if args.json:
        text = json.dumps({"sequences": sequences, "seconds": times, "ratios": ratios}, indent=1)
        Path(args.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
