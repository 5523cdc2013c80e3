"""Classes of test proteins by identity to the nearest training sequence, for `--groups`.

    python benchmarks/identity.py --train sp201401_nr50-0[0-7].fasta.gz \\
        --test sp201401_nr50-08.fasta.gz --out identity.tsv
    esm1nv evaluate --checkpoint MODEL --fasta sp201401_nr50-08.fasta.gz --groups identity.tsv

Needs mmseqs2 (apt-get install mmseqs2). Identity is that of the best local alignment that covers
half of the test protein; proteins without one are in the lowest class. A cluster at 50 % is not
free of homology: what a model says of proteins that it has nearly seen is told apart here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from esm1nv_jax.inference.evaluate import read_fasta

LOW, MIDDLE, HIGH = "identity under 30 %", "identity 30 to 50 %", "identity over 50 %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", required=True, metavar="FASTA")
    parser.add_argument("--test", required=True, metavar="FASTA")
    parser.add_argument("--out", required=True, metavar="TSV")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if shutil.which("mmseqs") is None:
        parser.error("mmseqs is not installed; apt-get install mmseqs2")
    test = read_fasta(options.test)
    names = test.ids(range(len(test.lengths)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train = [read_fasta(path) for path in options.train]
        write(folder / "train.fasta", train)
        write(folder / "test.fasta", [test])
        search = "mmseqs easy-search test.fasta train.fasta hits.tsv scratch -v 1 -s 5.7 -c 0.5"
        search += f" --cov-mode 2 --max-seqs 300 --threads {options.threads}"
        search += " --format-output query,fident"
        subprocess.run(search.split(), cwd=folder, check=True)
        best: dict[str, float] = {}
        for line in (folder / "hits.tsv").read_text().splitlines():
            number, identity = line.split("\t")
            name = names[int(number)]
            best[name] = max(best.get(name, 0.0), float(identity))
    classes = {name: group(best.get(name, 0.0)) for name in names}
    Path(options.out).write_text(
        "".join(f"{name}\t{c}\n" for name, c in classes.items()), encoding="utf-8"
    )
    for name, count in sorted(Counter(classes.values()).items()):
        print(f"{name:<22} {count:,}")


def group(identity: float) -> str:
    return LOW if identity < 0.3 else MIDDLE if identity <= 0.5 else HIGH


def write(path: Path, sources) -> None:
    """FASTA with numbers for names, so that no tool cuts an id in its own way."""
    with path.open("wb") as file:
        number = 0
        for source in sources:
            for sequence in source.sequences(range(len(source.lengths))):
                file.write(b">%d\n%b\n" % (number, sequence))
                number += 1


if __name__ == "__main__":
    main()
