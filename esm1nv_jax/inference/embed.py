"""`esm1nv embed`: a FASTA file to one file of embeddings; a killed job goes on where it was.

Parquet, HDF5 and npz are written from a stream of parts. All hold the same: for every protein its
id, length and the MD5 of its sequence, and the arrays asked for under names such as `mean_-1`.
Arrays with one row a residue are lists in Parquet; in HDF5 and npz they are joined, and residues of
protein i are rows offsets[i] to offsets[i + 1].
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import fasta_job, layer_record
from esm1nv_jax.inference.engine import KINDS, OutputSpec, embed_sequences
from esm1nv_jax.inference.fasta_job import AS_GIVEN, Computation, FastaRequest, Writer
from esm1nv_jax.inference.model import check_layers, load
from esm1nv_jax.inference.partial_results import PER_PROTEIN, PartReader

ESM_KINDS = {"per_tok": "per_residue", "bos": "cls"}  # names in esm-extract
PACKAGES = {".parquet": "pyarrow", ".h5": "h5py"}  # that write these files, and are optional


@dataclasses.dataclass(frozen=True)
class EmbedRequest(FastaRequest):
    """What is to be embedded and how."""

    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    esm_layers: bool = False  # layers are those of esm-extract, whose last one is our -1

    def __post_init__(self):
        writer_for(Path(self.out))
        super().__post_init__()
        self.check_choices({"include": KINDS, "dtype": ("float32", "float16")})
        for name in ("include", "layers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"--{name} names one twice: {getattr(self, name)}")


def embed(request: EmbedRequest) -> str | None:
    """Embeds a FASTA file; returns the hash of the contents, or None for a shard.

    Raises UserError with everything finished so far kept in `OUT.parts`.
    """
    write = writer_for(Path(request.out))
    return fasta_job.run(request, "embed", lambda: _computation(request), write)


def merge(out: str, overwrite: bool = False) -> str:
    """Joins the parts that shards have made; returns the hash of the contents."""
    return fasta_job.merge(out, writer_for(Path(out)), overwrite)


def _computation(request: EmbedRequest) -> Computation:
    model = load(request.checkpoint, request.precision, request.max_residues)
    if "logits" in request.include:
        model.require_lm_head()
    layers, blocks = request.layers, model.config.layers
    if request.esm_layers:  # counted from the end where negative, the last after its LayerNorm
        layers = tuple((i + blocks + 1) % (blocks + 1) for i in request.layers)
        layers = tuple(-1 if i == blocks else i for i in layers)
        console.print(f"--repr-layers are stored as {', '.join(map(str, layers))}")
    check_layers(layers, model.config)
    layer_record.print_recommended(request.checkpoint, model.digest, layers)
    outputs = OutputSpec(request.include, layers, request.dtype)

    def run(ids: list[np.ndarray]) -> dict[str, np.ndarray]:
        arrays = embed_sequences(
            model.on_devices, ids, outputs, model.longest, request.deterministic
        )
        with np.errstate(over="ignore"):  # what is too large for float16 is reported by the job
            return {name: value.astype(request.dtype) for name, value in arrays.items()}

    width = model.config.width * len(layers) * ("per_residue" in request.include)
    width += 32 * ("logits" in request.include)
    settings = {
        "include": list(request.include),
        "layers": list(layers),
        "dtype": request.dtype,
        "tokens": list(tokenizer.TOKENS) if "logits" in request.include else None,
    }
    return Computation(model, run, settings, width * np.dtype(request.dtype).itemsize)


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


def main(argv: list[str]) -> None:
    parser = Parser(
        "embed",
        "Embeds the proteins of a FASTA file into one file, in the order of the FASTA. Killed and "
        "started again, it goes on where it was.",
        "esm1nv embed --checkpoint runs/first --fasta proteins.fasta.gz --out proteins.h5 "
        "--include mean per_residue",
    )
    add = parser.add_argument
    fasta_job.add_arguments(parser, ".parquet, .h5 or .npz")
    add("--include", nargs="+", default=["mean"], help=f"some of {' '.join(KINDS)} (default mean)")
    add("--layers", nargs="+", help="0 the embeddings, k block k, -1 the last after its LayerNorm")
    add("--dtype", default="float32", help="of what is stored: float32 (default) or float16")
    esm = parser.add_argument_group("as in esm-extract; also --include mean per_tok bos")
    esm.add_argument("--repr-layers", nargs="+", help="as --layers, but the last block is -1")
    esm.add_argument("--truncation-seq-length", type=int, metavar="N", help="cut to N residues")
    esm.add_argument("--toks-per-batch", metavar="N", help="ignored: batches fit the device")
    args = parser.parse_args(argv)
    with fasta_job.resumable(args.out):
        if args.merge:
            merge(args.out, args.overwrite)
            return
        fasta_job.check_required(parser, args)
        for ours, theirs in (("layers", "repr_layers"), ("max_residues", "truncation_seq_length")):
            if getattr(args, ours) is not None and getattr(args, theirs) is not None:
                parser.error(f"--{ours} and --{theirs} say the same; give one of them")
        if args.toks_per_batch is not None:
            console.print("--toks-per-batch is ignored: batches are chosen to fit the device")
        cut = args.truncation_seq_length
        layers = _words(args.layers or args.repr_layers or ["-1"])
        embed(
            EmbedRequest(
                include=tuple(ESM_KINDS.get(kind, kind) for kind in _words(args.include)),
                layers=fasta_job.parse_integers("layers", layers),
                dtype=args.dtype,
                long=args.long or ("window" if cut is None else "truncate"),
                shard=fasta_job.parse_shard(args.shard),
                max_residues=args.max_residues if cut is None else cut,
                esm_layers=args.repr_layers is not None,
                **{name: getattr(args, name) for name in AS_GIVEN},
            )
        )


def _words(values: list[str]) -> list[str]:
    """Values divided by blanks or by commas."""
    return [word for value in values for word in value.split(",") if word]
