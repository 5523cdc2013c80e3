"""Requests and processes of `esm1nv embed` that tests share."""

import os
import subprocess
import sys

import numpy as np

from esm1nv_jax.inference.embed import EmbedRequest
from tests.inference.models import make_proteins, write_fasta

PROTEINS = make_proteins(40, seed=11, longest=150)  # some longer than the model's 64 residues
EVERYTHING = ("mean", "per_residue", "cls", "logits")


def request(model_path, folder, proteins=PROTEINS, out="out.npz", **options):
    fasta = write_fasta(folder / "in.fasta", proteins)
    return EmbedRequest(model_path, fasta, str(folder / out), **options)


def read_npz(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def by_protein(path, name):
    """The rows of each protein under its id."""
    found = read_npz(path)
    offsets = found["offsets"]
    return {
        str(i): found[name][offsets[k] : offsets[k + 1]]
        if len(found[name]) > len(offsets)
        else found[name][k]
        for k, i in enumerate(found["id"])
    }


RUN = """
import sys, time
from esm1nv_jax import cli
from esm1nv_jax.common import command
from esm1nv_jax.inference import fasta_job, partial_results
fasta_job.PART_RESIDUES, fasta_job.PART_BATCHES = 300, 0
write = partial_results.PartialResults.write
def slow(self, *args):
    write(self, *args)
    time.sleep({pause})
partial_results.PartialResults.write = slow
sys.exit(command.run(cli.dispatch, sys.argv[1:]))
"""


def start(argv, pause=0.0):
    code = RUN.format(pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
