"""FASTA of the clusters of a corpus, for `esm1nv prepare --groups`: at most so many of each.

    python benchmarks/clusters.py CORPUS OUT [--members 8]

CORPUS holds sp201401_nr50-0[0-8].fasta.gz, the representatives, and sp201401_members-*.fasta.gz,
whose headers name their cluster by c50=. Clusters of shard 08, the test set, are left out, members
and all. Writes OUT/clusters.fasta.gz and OUT/groups.tsv: each representative and a random choice of
the others, in the order of the names of the clusters.
"""

from __future__ import annotations

import gzip
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser


def records(path: Path) -> Iterator[tuple[str, str]]:
    header, lines = "", []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.startswith(">"):
                if header:
                    yield header, "".join(lines)
                header, lines = line[1:].rstrip(), []
            else:
                lines.append(line.strip())
    yield header, "".join(lines)


def accession(header: str) -> str:
    return header.split()[0].partition("_")[2]


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Clusters of a corpus.", "clusters.py CORPUS OUT")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--members", type=int, default=8, help="at most, of each cluster")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tested = {accession(h) for h, _ in records(args.corpus / "sp201401_nr50-08.fasta.gz")}
    clusters: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(args.corpus.glob("sp201401_nr50-0[0-7].fasta.gz")):
        for header, sequence in records(path):
            clusters[accession(header)] = [(accession(header), sequence)]
    for path in sorted(args.corpus.glob("sp201401_members-*.fasta.gz")):
        for header, sequence in records(path):
            cluster = re.search(r"c50=(\S+)", header)[1]
            if cluster not in tested:
                clusters[cluster].append((accession(header), sequence))
    random.seed(0)
    with (
        gzip.open(args.out / "clusters.fasta.gz", "wt", encoding="utf-8") as fasta,
        (args.out / "groups.tsv").open("w", encoding="utf-8") as groups,
    ):
        for cluster in sorted(clusters):
            first, *others = clusters[cluster]
            chosen = random.sample(others, min(args.members - 1, len(others)))
            for name, sequence in (first, *chosen):
                fasta.write(f">{name}\n{sequence}\n")
                groups.write(f"{name}\t{cluster}\n")


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
