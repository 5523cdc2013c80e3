"""FASTA of the clusters of a corpus, for `esm1nv prepare --groups`: at most so many of each.

    python benchmarks/clusters.py CORPUS OUT [--members 8]

CORPUS holds sp201401_nr50-0[0-8].fasta.gz, the representatives, sp201401_members-*.fasta.gz, and
sp201401_cluster_map.tsv.gz: accession, a finer cluster, cluster. Clusters of shard 08, the test
set, are left out, members and all. Writes OUT/clusters.fasta.gz and OUT/groups.tsv: each
representative and a random choice of the others, in the order of the names of the clusters.
"""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.data.fasta import scan


def records(path: Path) -> Iterator[tuple[str, str]]:
    """Accession, of the id PREFIX_ACCESSION, and sequence."""
    for name, letters in scan(str(path)):
        yield name.partition("_")[2], letters.decode()


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Clusters of a corpus.", "clusters.py CORPUS OUT")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--members", type=int, default=8, help="at most, of each cluster")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.corpus / "sp201401_cluster_map.tsv.gz", "rt", encoding="utf-8") as file:
        cluster_of = {fields[0]: fields[2] for fields in map(str.split, file)}
    tested = {name for name, _ in records(args.corpus / "sp201401_nr50-08.fasta.gz")}
    clusters: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(args.corpus.glob("sp201401_nr50-0[0-7].fasta.gz")):
        clusters |= {record[0]: [record] for record in records(path)}
    for path in sorted(args.corpus.glob("sp201401_members-*.fasta.gz")):
        for record in records(path):
            if cluster_of[record[0]] not in tested:
                clusters[cluster_of[record[0]]].append(record)
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
