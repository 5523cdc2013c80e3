"""`esm1nv convert`: models to `transformers` and `peft`, and from the formats of other tools."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from etils import epath

from esm1nv_jax.common import command, files
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError

# Imports inside functions: `--help` and mistakes do without JAX.
if TYPE_CHECKING:
    from esm1nv_jax.checkpoints.model_folder import Weights

SOURCES = {
    "hf": "a folder of save_pretrained",
    "nemo": "a .nemo file of NeMo 1.x",
    "fair-esm": "a .pt file of fair-esm",
}
MEASURED_PROTEINS = 32  # of the bundled sample's test split, over which a difference is measured


def to_hf(checkpoint: str, out: str, approximate: bool = False) -> str:
    """Writes `out` for `transformers`; returns what is not exact, or ''.

    Raises UserError where the model is no architecture of `transformers`, unless `approximate`
    allows the erf form of GELU in place of the tanh form: then the difference is measured.
    """
    from esm1nv_jax.interchange import huggingface, model_card
    from esm1nv_jax.interchange.loader import load_weights

    _check_empty(out)
    weights, difference = _convertible(load_weights(checkpoint), approximate)
    provenance = weights.provenance
    run, steps = provenance.get("run"), provenance.get("steps", [])
    if "metrics" not in provenance and run and len(steps) == 1:
        metrics = model_card.validation_metrics(run, steps[0])
        provenance = provenance | ({"metrics": metrics} if metrics else {})
    with files.writing(out):
        huggingface.write(out, dataclasses.replace(weights, provenance=provenance), difference)
    return difference


def to_peft(checkpoint: str, out: str, approximate: bool = False) -> str:
    """Writes the LoRA of a fine-tuned run as an adapter folder of `peft`, its base model in it.

    Returns and raises as `to_hf`; raises UserError, too, where the run has no LoRA.
    """
    from esm1nv_jax.checkpoints import model_folder, step_folder
    from esm1nv_jax.interchange import huggingface
    from esm1nv_jax.interchange.loader import load_weights
    from esm1nv_jax.model.lora import LoraConfig

    _check_empty(out)
    weights, found = load_weights(checkpoint), model_folder.find_finetuned(checkpoint)
    metadata = step_folder.read_metadata(*found) if found else {}
    if not found or not metadata.get("lora"):
        raise UserError(
            f"{checkpoint} holds no LoRA, which only the run of a fine-tuning with --method lora=8 "
            "or such does; give that run, or convert the whole model with --to hf"
        )
    tuned, difference = _convertible(weights, approximate)
    adapters = step_folder.read_params(*found)["lora"]
    base = load_weights(metadata["base"]["path"])
    with files.writing(out):
        lora = LoraConfig(**metadata["lora"])
        huggingface.write_adapter(out, base, tuned, lora, adapters, difference)
    return difference


def _convertible(weights: Weights, approximate: bool) -> tuple[Weights, str]:
    """A model as `transformers` can have it, and what is not exact, or ''."""
    from esm1nv_jax.interchange import head_tensors, hf_config

    if reason := head_tensors.inexact_reason(weights.head):
        raise UserError(reason)
    reason = hf_config.inexact_reason(weights.model)
    if not reason:
        return weights, ""
    if not approximate:
        raise UserError(reason)
    config = hf_config.approximate_config(weights.model)
    approximated = dataclasses.replace(weights, model=config)
    return approximated, measure_difference(weights, approximated)


def import_model(path: str, out: str, source: str = "hf", vocabulary: str | None = None) -> Weights:
    """Makes the model folder `out` of a model in one of `SOURCES`, and returns its weights.

    `vocabulary` is a file of tokens, where a folder of `transformers` has none.
    """
    from esm1nv_jax.checkpoints import model_folder
    from esm1nv_jax.interchange import fair_esm, huggingface, nemo

    _check_empty(out)
    if not epath.Path(path).exists():
        raise UserError(f"{path} does not exist; give {SOURCES[source]}")
    readers = {"nemo": nemo.read, "fair-esm": fair_esm.read}
    weights = huggingface.read(path, vocabulary) if source == "hf" else readers[source](path)
    with files.writing(out):
        model_folder.write(out, weights)
    return weights


def measure_difference(exact: Weights, approximated: Weights) -> str:
    """One sentence on how far two models are apart, on proteins of the bundled sample."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from esm1nv_jax.data import pipeline
    from esm1nv_jax.data.source import open_split
    from esm1nv_jax.model import encoder, esm2, heads, masking

    residues = min(256, exact.model.positions - 2)
    stream = pipeline.StreamConfig(seed=0, rows=4, row_length=residues + 2, max_residues=residues)
    head = exact.head

    @jax.jit
    def compare(params, batch):
        layout = batch["segment_ids"], batch["positions"]
        tokens = esm2.map_missing_to_unk(exact.model.vocabulary, batch["tokens"])
        masked = masking.mask(masking.recipe("card"), tokens, layout[0], batch["mask_bits"])
        columns = masked.prediction_positions_BM
        logits, losses, of_head = [], [], []
        for model in (exact.model, approximated.model):

            def forward(tokens, model=model, **options):
                return encoder.forward(model, params["encoder"], tokens, *layout, **options)

            output = forward(masked.inputs_BT, prediction_positions_BM=columns)
            logits.append(output.logits * masked.is_target_BM[..., None])
            sums = masking.cross_entropy_sums(output.logits, masked)
            losses.append((sums["loss_mask"], sums["num_masked"]))
            if head is not None:
                x_BTD = forward(tokens, hidden_layers=(-1,)).hidden[-1]
                outputs = heads.logits(head, params["head"], x_BTD, *layout, residues)
                is_read = layout[0][..., None] > 0 if head.level == "residue" else True
                of_head.append(jnp.where(is_read, outputs, 0))
        largest = [jnp.max(abs(a - b)) for a, b in (logits, of_head or (jnp.zeros(1),) * 2)]
        return jnp.stack(largest), jnp.array(losses)

    differences, losses, proteins = np.zeros(2), np.zeros((2, 2)), 0
    params = {"encoder": exact.encoder_params, "head": exact.params.get("head")}
    for batch in pipeline.evaluation_batches(open_split("sample", "test"), stream):
        names = ("tokens", "segment_ids", "positions", "mask_bits")
        largest, sums = compare(params, {name: batch[name] for name in names})
        differences, losses = np.maximum(differences, largest), losses + np.float64(sums)
        proteins += int(((batch["segment_ids"] > 0) & (batch["positions"] == 0)).sum())
        if proteins >= MEASURED_PROTEINS:
            break
    before, after = np.exp(losses[:, 0] / losses[:, 1])
    num_masked = int(losses[0, 1])
    return (
        f"approximate: {approximated.model.ffn_activation} stands for "
        f"{exact.model.ffn_activation} in the FFN; on {num_masked:,} <mask> positions of the "
        f"bundled sample logits differ by up to {differences[0]:.2g}, perplexity is "
        f"{after:.4f} instead of {before:.4f}"
        + (f"; outputs of the head differ by up to {differences[1]:.2g}" if head else "")
    )


def _check_empty(out: str) -> None:
    folder = epath.Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} exists and is not empty; choose another")


def main(argv: list[str]) -> int:
    parser = command.Parser(
        "convert",
        "Convert a model to a folder of Hugging Face transformers, or the LoRA of a fine-tuned run "
        "to\nan adapter of peft; or make a model folder of "
        f"{', '.join(SOURCES.values())}.",
        "esm1nv convert --to hf --checkpoint runs/first --out exported\n"
        "  esm1nv convert --from hf facebook_esm2 --out models/esm2\n"
        "  esm1nv convert --from nemo esm1nv.nemo --out models/esm1nv\n"
        "  esm1nv convert --from fair-esm esm1_t6_43M_UR50S.pt --out models/esm1",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=["hf", "peft"], help="write a folder for it")
    direction.add_argument("--from", dest="source", choices=list(SOURCES), help="read its format")
    parser.add_argument("path", nargs="?", metavar="PATH", help="what to convert")
    parser.add_argument("--checkpoint", metavar="PATH", help="the same: a run, a step or a model")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--approximate", action="store_true", help="with --to: allow erf GELU for tanh GELU"
    )
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="with --from hf: a vocab.txt or tokenizer.json"
    )
    options = parser.parse_args(argv)
    paths = [path for path in (options.path, options.checkpoint) if path]
    if len(paths) != 1:
        parser.error("name one model to convert, by --checkpoint PATH or as PATH")
    if options.approximate and not options.to:
        parser.error("--approximate goes with --to")
    if options.vocabulary and options.source != "hf":
        parser.error("--vocabulary goes with --from hf")
    if options.to:
        write = {"hf": to_hf, "peft": to_peft}[options.to]
        difference = write(paths[0], options.out, options.approximate)
        console.print(difference or "exact: the same numbers, rounding apart")
        console.print(f"{options.out}/README.md shows how to open it")
        return 0
    weights = import_model(paths[0], options.out, options.source, options.vocabulary)
    if left_out := weights.provenance["tensors_left_out"]:
        console.print(f"left out: {', '.join(left_out)}")
    console.print(f"model folder {options.out}; every verb takes --checkpoint {options.out}")
    return 0
