"""`esm1nv predict`: labels of the proteins of a FASTA file by a fine-tuned model's head, into one
file; a killed job goes on where it was."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import embedding_files, fasta_job
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.inference.fasta_job import AS_GIVEN, Computation, FastaRequest, Writer
from esm1nv_jax.inference.model import load_and_say
from esm1nv_jax.inference.partial_results import PER_PROTEIN, PartReader
from esm1nv_jax.model.heads import HeadConfig, to_predictions

# Arrays of a part and data sets of HDF5; those with one row a residue begin with `per_residue`.
LETTERS, BY_RESIDUE, BY_PROTEIN = "per_residue_letter", "per_residue_prediction", "prediction"


def predict(request: FastaRequest) -> str | None:
    """Predicts the labels of a FASTA file; returns the hash of the contents, or None for a shard.

    Raises UserError with everything finished so far kept in `OUT.parts`.
    """
    write = embedding_files.writer_for(Path(request.out), WRITERS)
    return fasta_job.run(request, "predict", lambda: _computation(request), write)


def _computation(request: FastaRequest) -> Computation:
    model = load_and_say(
        request.checkpoint, request.precision, request.max_residues, request.engine
    )
    head = model.require_head()
    outputs = OutputSpec((), head=head)

    def run(sequences: list[bytes]) -> dict[str, np.ndarray]:
        ids = [tokenizer.residue_ids(sequence) for sequence in sequences]
        arrays = embed_sequences(
            model.on_devices, ids, outputs, model.longest, request.deterministic
        )
        values = to_predictions(head, arrays["head"])
        if head.level == "protein":
            return {BY_PROTEIN: values}
        return {LETTERS: np.frombuffer(b"".join(sequences), "S1"), BY_RESIDUE: values}

    described = dataclasses.asdict(head) | {"classes": list(head.classes)}
    settings = {"head": described, "head_parameters": model.head_digest}
    return Computation(model, run, settings, 4 * head.outputs + 1)


def write_csv(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """A header, and one line a residue or a protein; numbers with the digits that float32 has."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for i, columns in enumerate(_tables(reader, metadata)):
            if i == 0:
                writer.writerow(columns)
            texts = ([_text(x) for x in column.tolist()] for column in columns.values())
            writer.writerows(zip(*texts, strict=True))


def write_parquet(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """One row a residue or a protein."""
    import pyarrow as pa  # optional, and slow to import
    import pyarrow.parquet as pq

    tables = (pa.table(columns) for columns in _tables(reader, metadata))
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
        text = json.dumps(metadata | {"contents": reader.digest()})
        writer.add_key_value_metadata({"esm1nv_jax": text})


def _tables(reader: PartReader, metadata: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """Columns of every part: `id`, of residues `position` (from 1) and `residue`, of one class a
    row `label`, and then `p_CLASS` for every class, or `value`."""
    head = HeadConfig(**metadata["head"])
    for arrays in reader.parts(*PER_PROTEIN, *reader.fields):
        ids = np.array(arrays["ids"], object)
        columns = {"id": ids}
        values = arrays.get(BY_PROTEIN)
        if values is None:
            rows, values = arrays["rows"], arrays[BY_RESIDUE]
            columns["id"] = np.repeat(ids, rows)
            columns["position"] = np.concatenate([np.arange(1, n + 1) for n in rows])
            columns["residue"] = arrays[LETTERS].astype("U1").astype(object)
        if head.kind == "classification":
            columns["label"] = np.array(head.classes, object)[values.argmax(axis=1)]
        names = [f"p_{name}" for name in head.classes] or ["value"]
        yield columns | dict(zip(names, values.T, strict=True))


def _text(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value


WRITERS: dict[str, Writer] = {
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".h5": embedding_files.write_hdf5,
}


def main(argv: list[str]) -> None:
    parser = Parser(
        "predict",
        "Predicts labels with a fine-tuned model: one row a residue or a protein, in the order of "
        "the\nFASTA, with the probability of each class or the value. Killed and started again, it "
        "goes on\nwhere it was.",
        "esm1nv predict --checkpoint runs/ss3 --fasta proteins.fasta.gz --out labels.parquet",
    )
    fasta_job.add_arguments(parser, ".parquet, .csv or .h5")
    args = parser.parse_args(argv)
    with fasta_job.resumable(args.out):
        if args.merge:
            write = embedding_files.writer_for(Path(args.out), WRITERS)
            fasta_job.merge(args.out, write, args.overwrite)
            return
        fasta_job.check_required(parser, args)
        request = FastaRequest(
            long=args.long or "window",
            shard=command.parse_shard(args.shard),
            max_residues=args.max_residues,
            **{name: getattr(args, name) for name in AS_GIVEN},
        )
        predict(request)
