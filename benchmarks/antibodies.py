"""Antibodies: what an antibody model and a general one know of them, beside baselines.

    python benchmarks/antibodies.py --fasta sp201401_*.fasta.gz \\
        --models AntiBERTy=models/antiberty [NAME=MODEL ...]

Variable domains are found in FASTA files of proteins by the cysteines and the tryptophan that all
have. Two questions, the same for every model:

- perplexity at the same `<mask>` positions (as `esm1nv evaluate` asks);
- is the residue of a related antibody likelier than others? For each of `--wild-types` domains the
  nearest other domain of the same length, at least 70 % identical, gives natural substitutions;
  against each stand three other residues at that position, drawn at random. Masked marginals
  (`esm1nv score`), AUC by domain, mean and standard error over domains. The baseline is BLOSUM62.
"""

from __future__ import annotations

import re
import sys

import numpy as np

import esm1nv_jax
from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.inference.evaluate import evaluate_model
from esm1nv_jax.inference.evaluation_report import ORDER, blosum62
from esm1nv_jax.inference.mutants import AMINO_ACIDS
from esm1nv_jax.inference.proteingym_summary import auc
from esm1nv_jax.model.label_metrics import standard_error

# First cysteine, tryptophan of framework 2, second cysteine, of heavy and of light chains.
HEAVY = re.compile(r"C.{8,16}W[VIFL][RK]Q.{38,52}D[TSAM][AG][VTMILR]Y[YF]C")
LIGHT = re.compile(r"C.{8,18}W[YFLH][QKLR]Q.{36,50}[ED][DA][EVTFASIL][AGD]?.{0,2}Y[YF]C")
LENGTHS = range(85, 146)


def variable_domains(paths: list[str]) -> dict[str, str]:
    """Sequences by id, each once, of the 20 amino acids alone."""
    found: dict[str, str] = {}
    for path in paths:
        for identifier, residues in scan(path, skip=True):
            sequence = residues.decode()
            if len(sequence) not in LENGTHS or not set(sequence) <= set(AMINO_ACIDS):
                continue
            if HEAVY.search(sequence) or LIGHT.search(sequence):
                found.setdefault(sequence, identifier)
    return {identifier: sequence for sequence, identifier in found.items()}


def nearest(sequence: str, others: list[str]) -> str | None:
    """The most similar other sequence of the same length, at least 70 % identical."""
    identities = {
        other: np.mean([a == b for a, b in zip(sequence, other, strict=True)])
        for other in others
        if len(other) == len(sequence) and other != sequence
    }
    best = max(identities, key=lambda other: identities[other], default=None)
    return best if best and identities[best] >= 0.7 else None


def substitutions(sequence: str, relative: str, random: np.random.Generator) -> dict[str, bool]:
    """Mutants in the notation A4G: True for those of the relative, False for random ones."""
    mutants = {}
    for i, (old, new) in enumerate(zip(sequence, relative, strict=True), start=1):
        if old != new:
            rest = sorted(set(AMINO_ACIDS) - {old, new})
            mutants[f"{old}{i}{new}"] = True
            mutants |= {f"{old}{i}{x}": False for x in random.choice(rest, 3, replace=False)}
    return mutants


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Antibodies and baselines.", "see the file")
    parser.add_argument("--fasta", nargs="+", required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL")
    parser.add_argument("--wild-types", type=int, default=60)
    args = parser.parse_args(argv)
    models = dict(model.split("=", 1) for model in args.models)

    domains = variable_domains(args.fasta)
    source = MemorySource([(name, s.encode()) for name, s in domains.items()])
    sequences = list(domains.values())
    print(f"{len(domains)} variable domains")

    random = np.random.default_rng(0)
    pairs = [(s, relative) for s in sequences if (relative := nearest(s, sequences))]
    chosen = [pairs[i] for i in random.permutation(len(pairs))[: args.wild_types]]
    tables = [(s, substitutions(s, relative, random)) for s, relative in chosen]
    scores, overall = {}, {}
    for name, path in models.items():
        model = esm1nv_jax.load(path)
        overall[name] = evaluate_model(model, source)["overall"]
        scores[name] = [model.score_variants(wild, list(mutants)) for wild, mutants in tables]
    matrix = blosum62()
    scores["BLOSUM62"] = [
        np.array([matrix[ORDER.index(m[0]), ORDER.index(m[-1])] for m in mutants])
        for _, mutants in tables
    ]

    count = sum(sum(mutants.values()) for _, mutants in tables)
    print(f"{len(tables)} wild types, {count} natural substitutions\n")
    print("| | perplexity at `<mask>` | all selected | AUC of natural substitutions |")
    print("|---|---|---|---|")
    for baseline in ("unigram", "composition"):
        first = overall[next(iter(overall))]
        print(f"| {baseline} | {cell(first, f'{baseline}_mask')} | | |")
    for name, of_wild_types in scores.items():
        values = [
            auc(np.array(list(mutants.values())), predicted)
            for (_, mutants), predicted in zip(tables, of_wild_types, strict=True)
        ]
        row = overall.get(name)
        shown = [cell(row, f"perplexity{x}") if row else "" for x in ("_mask", "")]
        area = f"{np.mean(values):.3f} ± {standard_error(values):.3f}"
        print(f"| {name} | {' | '.join(shown)} | {area} |")


def cell(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}"


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
