"""The three formats of an embedding file, each written as a stream of parts.

All hold the same: for every protein its id, length and the MD5 of its sequence, and the arrays
asked for under names such as `mean_-1`. Arrays with one row a residue are lists in Parquet; in HDF5
and npz they are joined, and residues of protein i are rows offsets[i] to offsets[i + 1].
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.parts import ALWAYS, Reader


def by_residue(name: str) -> bool:
    return name.startswith(("per_residue", "logits"))


def parquet(path: Path, reader: Reader, metadata: dict[str, Any]) -> None:
    """One row a protein: id, length, checksum, then fixed-size lists (and lists of them)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def vectors(name):
        dtype, shape = reader.like[name]
        return pa.list_(pa.from_numpy_dtype(dtype), shape[0])

    def column(name, arrays):
        values = pa.array(arrays[name].reshape(-1))
        rows = pa.FixedSizeListArray.from_arrays(values, type=vectors(name))
        if not by_residue(name):
            return rows
        offsets = np.concatenate(([0], np.cumsum(arrays["rows"])))
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), rows)

    def kind(name):
        return pa.large_list(vectors(name)) if by_residue(name) else vectors(name)

    schema = pa.schema(
        [("id", pa.string()), ("length", pa.int64()), ("checksum", pa.string())]
        + [(name, kind(name)) for name in reader.fields]
    )
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for arrays in reader.parts(*ALWAYS, *reader.fields):
            columns = [
                pa.array(arrays["ids"].tolist(), pa.string()),
                pa.array(arrays["lengths"], pa.int64()),
                pa.array(arrays["checksums"].tolist(), pa.string()),
                *(column(name, arrays).cast(kind(name)) for name in reader.fields),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
        text = json.dumps(metadata | {"contents": reader.digest()})
        writer.add_key_value_metadata({"esm1nv_jax": text})


def hdf5(path: Path, reader: Reader, metadata: dict[str, Any]) -> None:
    """Data sets `id`, `length`, `checksum`, `offsets` and the arrays; attributes on the file."""
    import h5py

    n = reader.proteins
    with h5py.File(path, "w") as file:
        text = h5py.string_dtype()
        for name, dtype in (("id", text), ("length", "i8"), ("checksum", text)):
            file.create_dataset(name, (n,), dtype)
        file.create_dataset("offsets", (n + 1,), "i8")
        for name in reader.fields:
            dtype, shape = reader.like[name]
            file.create_dataset(name, (reader.residues if by_residue(name) else n, *shape), dtype)
        protein = residue = 0
        for arrays in reader.parts(*ALWAYS, *reader.fields):
            rows = arrays["rows"]
            here = slice(protein, protein + len(rows))
            file["id"][here] = arrays["ids"].astype(object)
            file["length"][here] = arrays["lengths"]
            file["checksum"][here] = arrays["checksums"].astype(object)
            file["offsets"][protein + 1 : protein + len(rows) + 1] = residue + np.cumsum(rows)
            residues = slice(residue, residue + int(rows.sum()))
            for name in reader.fields:
                file[name][residues if by_residue(name) else here] = arrays[name]
            protein, residue = here.stop, residues.stop
        file.attrs["esm1nv_jax"] = json.dumps(metadata | {"contents": reader.digest()})


def npz(path: Path, reader: Reader, metadata: dict[str, Any]) -> None:
    """As `np.savez` writes, but one array after another from all parts, so that none is held."""
    n = reader.proteins
    lists: dict[str, list[np.ndarray]] = {name: [] for name in ALWAYS}
    for arrays in reader.parts(*ALWAYS):
        for name, value in arrays.items():
            lists[name].append(value)
    small = {name: np.concatenate(values) for name, values in lists.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:

        def member(name, dtype, shape, blocks):
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": shape,
            }
            with file.open(f"{name}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_2_0(out, header)
                for block in blocks:
                    out.write(np.ascontiguousarray(block).tobytes())

        def whole(name, value):
            member(name, value.dtype, value.shape, [value])

        whole("id", small["ids"])
        whole("length", small["lengths"])
        whole("checksum", small["checksums"])
        whole("offsets", np.concatenate(([0], np.cumsum(small["rows"]))).astype(np.int64))
        for name in reader.fields:
            dtype, shape = reader.like[name]
            length = reader.residues if by_residue(name) else n
            member(name, dtype, (length, *shape), (part[name] for part in reader.parts(name)))
        whole("esm1nv_jax", np.array(json.dumps(metadata | {"contents": reader.digest()})))


FORMATS: dict[str, Callable[[Path, Reader, dict[str, Any]], None]] = {
    ".parquet": parquet,
    ".h5": hdf5,
    ".npz": npz,
}


def choose(path: Path) -> Callable[[Path, Reader, dict[str, Any]], None]:
    """The writer for the name of a file. Raises UserError for an extension that has none."""
    if path.suffix not in FORMATS:
        raise UserError(
            f"--out {path} ends in {path.suffix or 'nothing'}; it may end in {', '.join(FORMATS)}"
        )
    package = {".parquet": "pyarrow", ".h5": "h5py"}.get(path.suffix)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{path.suffix} needs {package}: pip install 'esm1nv_jax[embed]', or write .npz"
        )
    return FORMATS[path.suffix]
