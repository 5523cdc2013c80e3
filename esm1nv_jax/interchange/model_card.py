"""The README.md of an exported folder: only what the provenance tells, and what it does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.common import metrics_log
from esm1nv_jax.model.encoder import parameter_count

if TYPE_CHECKING:
    from esm1nv_jax.checkpoints.model_folder import Weights

SAMPLE = "the 10,000 proteins that ship with esm1nv_jax, out of Swiss-Prot"
SAMPLE_LICENCE = "UniProt Consortium, CC BY 4.0 (attribution needed)"


def text(weights: Weights, architecture: str, approximated: str) -> str:
    """Markdown with the front matter that model hubs read."""
    made, model = weights.provenance, weights.model
    licence, left_out = made.get("licence"), made.get("tensors_left_out")
    front = ["---", "library_name: transformers", "pipeline_tag: fill-mask", "tags: [protein]"]
    front += [f"license: {licence}"] if licence else []
    kind = "rotary" if model.position_kind == "rotary" else f"{model.positions:,} learned"
    parts = [
        "\n".join([*front, "---"]),
        "# A protein language model",
        f"{architecture} with {parameter_count(model):,} parameters before its vocabulary was cut "
        f"to {len(model.vocabulary.split(' '))} tokens: {model.layers} layers, {model.width} wide, "
        f"{model.heads} heads, FFN {model.ffn}, {model.norm}-LN, {kind} positions. Written by "
        f"esm1nv_jax {__version__}.",
        "```python\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        'model = AutoModelForMaskedLM.from_pretrained("THIS_FOLDER").eval()\n'
        'logits = model(**tokenizer("MKT<mask>L", return_tensors="pt")).logits\n'
        "```".replace("<mask>", _mask(model.vocabulary)),
        "One token a residue. A character that is no residue is one unknown token; small letters "
        "are raised, white space and one final `*` are removed.",
        "## Differences from the model it was made of\n\n"
        + (approximated or "None: the same numbers, rounding apart."),
        "## Training\n\n" + _training(made),
        "## Data\n\n" + _data(made),
        "## Figures\n\n" + _figures(made),
        "## Licence\n\n"
        + (f"Of the weights: {licence}." if licence else "Of the weights: not recorded.")
        + (f" Data: {SAMPLE_LICENCE}." if _data_path(made) == "sample" else ""),
        "## What is not in it\n\n"
        "The contact head (ESM) and the token types (BERT) are zero: nobody trained them."
        + (f" Left out on the way: {', '.join(left_out)}." if left_out else ""),
        "## Provenance\n\n```json\n" + json.dumps(made, indent=1) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(folder: epath.Path) -> str | None:
    """The `license:` of a folder's README.md, if it names one in its front matter."""
    path = folder / "README.md"
    if not path.exists():
        return None
    front = path.read_bytes().decode("utf-8", "replace").split("---")
    lines = front[1].splitlines() if len(front) > 2 and not front[0].strip() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return found[0] if found else None


def figures_of(run: str, step: int) -> dict[str, Any] | None:
    """The newest validation figures of a run up to `step`, from its metrics.jsonl."""
    try:
        records = metrics_log.read(run)
        found = [r for r in records if r["kind"] == "validation" and r["step"] <= step]
    except (OSError, KeyError, TypeError):
        return None
    return found[-1] if found else None


def _training(made: dict[str, Any]) -> str:
    config = made.get("config")
    if not config:
        origin = made.get("converted_from")
        return f"Not by esm1nv_jax: converted from {origin}." if origin else "Not recorded."
    steps = made.get("steps", [])
    masking, optimizer, batch = config["masking"], config["optimizer"], config["batch"]
    size = f"{batch['rows']} rows an update" if batch.get("rows") else "rows by sequences a device"
    lines = [
        f"Masked language modelling, recipe `{masking['recipe']}`, {masking['rate']:.0%} of "
        "residues selected.",
        f"AdamW, peak learning rate {optimizer['peak_lr']}, {optimizer['warmup']} warm-up updates; "
        f"{size} of {config['data']['row_length']} tokens; products in "
        f"{config['compute']['dtype']}.",
    ]
    if len(steps) > 1:
        lines.append(f"The average of {len(steps)} checkpoints, updates {steps[0]} to {steps[-1]}.")
    elif steps:
        lines.append(f"Update {steps[0]:,} of its run.")
    return "\n".join(f"- {line}" for line in lines)


def _data(made: dict[str, Any]) -> str:
    path = _data_path(made)
    if path is None:
        return "Not recorded."
    data = made["config"]["data"]
    name = SAMPLE if path == "sample" else f"`{path}`"
    return (
        f"{name}; sequences cropped to {data['max_residues']} residues ({data['crop']}). "
        + (
            f"Fingerprints of the training split: {', '.join(made['data'])}."
            if made.get("data")
            else ""
        )
    ).rstrip()


def _data_path(made: dict[str, Any]) -> str | None:
    return ((made.get("config") or {}).get("data") or {}).get("path")


def _figures(made: dict[str, Any]) -> str:
    found = made.get("figures")
    if not isinstance(found, dict) or "perplexity_mask" not in found:
        return "None recorded."
    return (
        f"Validation after update {found['step']:,}: perplexity {found['perplexity']:.3f} over all "
        f"selected positions, {found['perplexity_mask']:.3f} over `<mask>` positions only."
    )


def _mask(vocabulary: str) -> str:
    return "[MASK]" if "[MASK]" in vocabulary.split(" ") else "<mask>"
