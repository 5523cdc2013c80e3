"""Helpers of the tests of preparation."""

import subprocess
import sys

import tensorflow_datasets as tfds

from esm1nv_jax.data.source import open_split

SIZES = {"validation": 100, "test": 500}


def esm1nv(*words):
    """A verb in a process of its own: (exit status, stdout + stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def read_back(folder):
    """{split: {id: (sequence, description)}}, read by TFDS."""
    builder = tfds.builder_from_directory(folder)
    return {
        split: {r["id"]: (r["sequence"], r["description"]) for r in builder.as_data_source(split)}
        for split in builder.info.splits
    }


def held_out(folder, sizes=SIZES):
    return {split: set(open_split(str(folder), split).ids(range(n))) for split, n in sizes.items()}


def one_error(output):
    """Whether there is one line about an error, beside lines of progress."""
    *progress, last = output.strip().splitlines()
    return last.startswith("error: ") and all(line.startswith("read ") for line in progress)
