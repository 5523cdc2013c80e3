"""`esm1nv embed`: a FASTA file to one file of embeddings; a killed job goes on where it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.fasta import Proteins
from esm1nv_jax.inference import fasta_job, layer_record
from esm1nv_jax.inference.embedding_files import BY_HASH, BY_ID, JOINED, LAYOUTS, writer_for
from esm1nv_jax.inference.engine import embed_sequences
from esm1nv_jax.inference.fasta_job import AS_GIVEN, Computation, FastaRequest
from esm1nv_jax.inference.forward_pass import KINDS, OutputSpec
from esm1nv_jax.inference.model import check_layers, load_and_say

ESM_KINDS = {"per_tok": "per_residue", "bos": "cls"}  # names in esm-extract


@dataclasses.dataclass(frozen=True)
class EmbedRequest(FastaRequest):
    """What is to be embedded and how."""

    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    esm_layers: bool = False  # layers are those of esm-extract, whose last one is our -1
    layout: str = JOINED

    def __post_init__(self):
        writer_for(Path(self.out))
        super().__post_init__()
        dtypes = ("float32", "float16")
        self.check_choices({"include": KINDS, "dtype": dtypes, "layout": LAYOUTS})
        layers = "repr-layers" if self.esm_layers else "layers"
        options: dict[str, tuple] = {"include": self.include, layers: self.layers}
        for name, given in options.items():
            if not given:
                raise UserError(f"--{name} names none; leave it out, or see --help")
            if len(set(given)) < len(given):
                raise UserError(f"--{name} names one twice: {', '.join(map(str, given))}")
        if self.layout == JOINED:
            return
        if Path(self.out).suffix != ".h5":
            raise UserError(f"--layout={self.layout} is for HDF5: let --out end in .h5")
        if (len(self.include), len(self.layers)) != (1, 1) or "logits" in self.include:
            raise UserError(
                f"--layout={self.layout} holds one array for each protein: give one of --include, "
                "no logits, and one of --layers"
            )

    def check_ids(self, proteins: Proteins) -> None:
        """Raises UserError for an id that cannot be the name of a data set, before the work."""
        if self.layout == BY_ID:
            for name, _ in proteins:
                if "/" in name or name == ".":
                    raise UserError(
                        f"id {name!r} cannot name a data set of HDF5, where / divides groups; "
                        "rename it, or take --layout=joined"
                    )


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
    model = load_and_say(
        request.checkpoint, request.precision, request.max_residues, request.engine
    )
    if "logits" in request.include:
        model.require_lm_head()
    layers, blocks = request.layers, model.config.layers
    if request.esm_layers:  # counted from the end where negative, the last after its LayerNorm
        if unknown := [i for i in layers if not -blocks - 1 <= i <= blocks]:
            raise UserError(
                f"--repr-layers {unknown[0]} is unknown; there are 0 (embeddings) to {blocks} (the "
                f"last block, also -1), and from the end -1 to {-blocks - 1}"
            )
        layers = tuple((i + blocks + 1) % (blocks + 1) for i in request.layers)
        layers = tuple(-1 if i == blocks else i for i in layers)
        console.print(f"--repr-layers are stored as {', '.join(map(str, layers))}")
    check_layers(layers, model.config)
    layer_record.print_recommended(request.checkpoint, model.digest, layers)
    outputs = OutputSpec(request.include, layers, request.dtype)

    def run(sequences: list[bytes]) -> dict[str, np.ndarray]:
        ids = [tokenizer.residue_ids(sequence) for sequence in sequences]
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
    if request.layout != JOINED:
        settings["layout"] = request.layout
    size = width * np.dtype(request.dtype).itemsize
    return Computation(model, run, settings, size, with_hashes=request.layout == BY_HASH)


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
    add("--include", nargs="+", action="extend", help=f"some of {' '.join(KINDS)} (default mean)")
    numbers = "0 the embeddings, k block k, -1 (default) the last after its LayerNorm"
    add("--layers", nargs="+", action="extend", help=numbers)
    add("--layout", default=JOINED, help="of HDF5: joined (default), per-protein or biotrainer")
    add("--dtype", default="float32", help="of what is stored: float32 (default) or float16")
    esm = parser.add_argument_group("as in esm-extract; also --include mean per_tok bos")
    esm.add_argument(
        "--repr-layers", nargs="+", action="extend", help="as --layers, but the last block is -1"
    )
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
                include=tuple(
                    ESM_KINDS.get(kind, kind) for kind in _words(args.include or ["mean"])
                ),
                layers=command.parse_integers("layers", layers),
                dtype=args.dtype,
                layout=args.layout,
                long=args.long or ("window" if cut is None else "truncate"),
                shard=command.parse_shard(args.shard),
                max_residues=args.max_residues if cut is None else cut,
                esm_layers=args.repr_layers is not None,
                **{name: getattr(args, name) for name in AS_GIVEN},
            )
        )


def _words(values: list[str]) -> list[str]:
    """Values divided by blanks or by commas."""
    return [word for value in values for word in value.split(",") if word]
