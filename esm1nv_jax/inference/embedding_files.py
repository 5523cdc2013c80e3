"""Files of embeddings: Parquet, HDF5 and npz, written from a stream of parts.

All hold the same: for every protein its id, length and the MD5 of its sequence, and the arrays
asked for under names such as `mean_-1`. Arrays with one row a residue are lists in Parquet; in HDF5
and npz they are joined, and residues of protein i are rows offsets[i] to offsets[i + 1]. The other
layouts of HDF5 are those that tools of other groups read: a data set for each protein.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.fasta_job import Writer
from esm1nv_jax.inference.partial_results import HASHES, PER_PROTEIN, PartReader

PACKAGES = {".parquet": "pyarrow", ".h5": "h5py"}  # that write these files, and are optional
LAYOUTS = JOINED, BY_ID, BY_HASH = "joined", "per-protein", "biotrainer"


def is_per_residue(name: str) -> bool:
    return name.startswith(("per_residue", "logits"))


def write_parquet(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """One row a protein: id, length, checksum, then fixed-size lists (and lists of them)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def vectors(name):
        dtype, shape = reader.like[name]
        return pa.list_(pa.from_numpy_dtype(dtype), shape[0])

    def column(name, arrays):
        values = pa.array(arrays[name].reshape(-1))
        rows = pa.FixedSizeListArray.from_arrays(values, type=vectors(name))
        if not is_per_residue(name):
            return rows
        offsets = np.concatenate(([0], np.cumsum(arrays["rows"])))
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), rows)

    def kind(name):
        return pa.large_list(vectors(name)) if is_per_residue(name) else vectors(name)

    columns = [("id", pa.string()), ("length", pa.int64()), ("checksum", pa.string())]
    schema = pa.schema(columns + [(name, kind(name)) for name in reader.fields])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for arrays in reader.parts(*PER_PROTEIN, *reader.fields):
            columns = [pa.array(arrays[name]) for name in ("ids", "lengths", "checksums")]
            columns += [column(name, arrays).cast(kind(name)) for name in reader.fields]
            writer.write_batch(pa.record_batch(columns, schema=schema))
        text = json.dumps(metadata | {"contents": reader.digest()})
        writer.add_key_value_metadata({"esm1nv_jax": text})


def write_hdf5(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """Data sets `id`, `length`, `checksum`, `offsets` and the arrays; attributes on the file. In
    another layout, one data set a protein."""
    import h5py

    if metadata.get("layout", JOINED) != JOINED:
        _write_by_protein(path, reader, metadata)
        return
    n = reader.proteins
    with h5py.File(path, "w") as file:
        text = h5py.string_dtype()
        for name, dtype in (("id", text), ("length", "i8"), ("checksum", text)):
            file.create_dataset(name, (n,), dtype)
        file.create_dataset("offsets", (n + 1,), "i8")
        for name in reader.fields:
            dtype, shape = reader.like[name]
            file.create_dataset(
                name, (reader.residues if is_per_residue(name) else n, *shape), dtype
            )
        protein = residue = 0
        for arrays in reader.parts(*PER_PROTEIN, *reader.fields):
            rows = arrays["rows"]
            here = slice(protein, protein + len(rows))
            file["id"][here] = arrays["ids"]
            file["length"][here] = arrays["lengths"]
            file["checksum"][here] = arrays["checksums"]
            file["offsets"][protein + 1 : protein + len(rows) + 1] = residue + np.cumsum(rows)
            residues = slice(residue, residue + int(rows.sum()))
            for name in reader.fields:
                file[name][residues if is_per_residue(name) else here] = arrays[name]
            protein, residue = here.stop, residues.stop
        file.attrs["esm1nv_jax"] = json.dumps(metadata | {"contents": reader.digest()})


def _write_by_protein(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """One data set a protein, named by its id or by the hash of its sequence."""
    import h5py

    (field,) = reader.fields
    with h5py.File(path, "w") as file:
        for part, arrays in enumerate(reader.parts(*PER_PROTEIN, field)):
            names = arrays["ids"]
            if metadata["layout"] == BY_HASH:
                names = reader.results.load(part, (HASHES,))[HASHES].tolist()
            values = arrays[field]
            if is_per_residue(field):
                values = np.split(values, np.cumsum(arrays["rows"])[:-1])
            for name, identifier, value in zip(names, arrays["ids"], values, strict=True):
                if name not in file:  # one hash of two ids: the sequence is the same
                    file.create_dataset(name, data=value).attrs["original_id"] = identifier
        file.attrs["model_name"] = Path(metadata["checkpoint"]).name or "esm1nv"
        file.attrs["esm1nv_jax"] = json.dumps(metadata | {"contents": reader.digest()})


def write_npz(path: Path, reader: PartReader, metadata: dict[str, Any]) -> None:
    """As `np.savez` writes, but one array after another from all parts, so that none is held."""
    n = reader.proteins

    def offsets():
        end = np.zeros(1, np.int64)
        yield end
        for part in reader.parts("rows"):
            ends = end[-1] + np.cumsum(part["rows"], dtype=np.int64)
            yield ends
            end = ends

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:

        def member(name, dtype, shape, blocks):
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_2_0(out, header)
                for block in blocks:
                    out.write(np.ascontiguousarray(block).tobytes())

        def column(name, dtype):
            return (np.asarray(part[name], dtype) for part in reader.parts(name))

        text = f"U{max(1, reader.longest_id)}"
        member("id", text, (n,), column("ids", text))
        member("length", np.int64, (n,), column("lengths", np.int64))
        member("checksum", "U32", (n,), column("checksums", "U32"))
        member("offsets", np.int64, (n + 1,), offsets())
        for name in reader.fields:
            dtype, shape = reader.like[name]
            length = reader.residues if is_per_residue(name) else n
            member(name, dtype, (length, *shape), column(name, dtype))
        described = np.array(json.dumps(metadata | {"contents": reader.digest()}))
        member("esm1nv_jax", described.dtype, (), [described])


FORMATS: dict[str, Writer] = {".parquet": write_parquet, ".h5": write_hdf5, ".npz": write_npz}


def writer_for(path: Path, formats: dict[str, Writer] = FORMATS) -> Writer:
    """The writer for the name of a file. Raises UserError for an extension that has none, or whose
    package is not installed."""
    if path.suffix not in formats:
        raise UserError(
            f"--out {path} ends in {path.suffix or 'nothing'}; it may end in {', '.join(formats)}"
        )
    package = PACKAGES.get(path.suffix)
    if package and importlib.util.find_spec(package) is None:
        instead = next(suffix for suffix in formats if suffix not in PACKAGES)
        raise UserError(f"{path.suffix} needs {package}: pip install {package}, or write {instead}")
    return formats[path.suffix]
