"""The README.md of an exported folder: what the provenance records, and what it does not."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints.model_folder import Weights, flatten
from esm1nv_jax.common import metrics_log
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.model.heads import HeadConfig

SAMPLE = "the 10,000 proteins that ship with esm1nv_jax, out of Swiss-Prot"
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
HEAD_METRICS = ("loss", "accuracy", "macro_f1", "mcc", "spearman", "mse")
SAMPLE_LICENCE = "UniProt Consortium, CC BY 4.0 (attribution needed)"


def model_card(weights: Weights, architecture: str, difference: str) -> str:
    """Markdown with the front matter that model hubs read."""
    provenance, model = weights.provenance, weights.model
    licence, left_out = provenance.get("licence"), provenance.get("tensors_left_out")
    tokens = model.vocabulary.split(" ")
    mask = "[MASK]" if "[MASK]" in tokens else "<mask>"
    task, head = "MaskedLM", weights.head
    if head:
        task = "TokenClassification" if head.level == "residue" else "SequenceClassification"
    pipeline = {"MaskedLM": "fill-mask", "TokenClassification": "token-classification"}
    tag = pipeline.get(task, "text-classification")
    front = ["---", "library_name: transformers", f"pipeline_tag: {tag}", "tags: [protein]"]
    front += [f"license: {licence}"] if licence else []
    parameters = sum(
        np.size(leaf)
        for name, leaf in flatten(weights.params).items()
        if not (head and name.startswith("lm_head/"))  # that class has one head
    )
    positions = "rotary" if model.position_kind == "rotary" else f"{model.positions:,} learned"
    path = _data_path(provenance)
    parts = [
        "\n".join([*front, "---"]),
        "# A protein language model",
        f"{architecture} with {parameters:,} parameters before its vocabulary was cut "
        f"to {len(tokens)} tokens: {model.layers} layers, {model.width} wide, {model.heads} heads, "
        f"FFN {model.ffn}, {model.norm}-LN, {positions} positions. Written by esm1nv_jax "
        f"{__version__}.",
        "```python\n"
        f"from transformers import AutoModelFor{task}, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        f'model = AutoModelFor{task}.from_pretrained("THIS_FOLDER").eval()\n'
        f'logits = model(**tokenizer("MKT{"V" if head else mask}L", return_tensors="pt")).logits\n'
        "```",
        *([_labels(head)] if head else []),
        "One token a residue, in either case. A character that is no residue is one unknown "
        "token. White space, gaps (`-`, `.`) that are no token and final `*` are removed.",
        "## Differences from the original model\n\n"
        + (difference or "None: the same numbers, rounding apart."),
        "## Training\n\n" + _training(provenance),
        "## Data\n\n" + _data(provenance),
        "## Metrics\n\n" + _metrics(provenance),
        "## Licence\n\n"
        + f"Of the weights: {licence or 'not recorded'}."
        + (f" Data: {SAMPLE_LICENCE}." if path == "sample" else ""),
        "## Left out\n\n"
        + ("" if weights.contact_head else "The contact head (ESM) is zero: it was not trained. ")
        + "The token types (BERT) are zero."
        + (f" Tensors left out: {', '.join(left_out)}." if left_out else ""),
        "## Provenance\n\n```json\n" + json.dumps(provenance, indent=1) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _labels(head: HeadConfig) -> str:
    subject = "each residue (`<s>` and `</s>` are not residues)"
    subject = subject if head.level == "residue" else "the protein"
    if head.kind == "regression":
        return f"The output is the value of {subject}."
    function = "softmax" if head.kind == "classification" else "sigmoid"
    classes = f"{len(head.classes)} classes: {', '.join(head.classes)}"
    return f"The outputs are logits (of a {function}) for {subject}, of {classes}."


def read_license(folder: epath.Path) -> str | None:
    """The `license:` of a folder's README.md, if it names one in its front matter."""
    path = folder / "README.md"
    if not path.exists():
        return None
    front = path.read_bytes().decode("utf-8", "replace").split("---")
    lines = front[1].splitlines() if len(front) > 2 and not front[0].strip() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return names[0] if names else None


def validation_metrics(run: str, step: int) -> dict[str, Any] | None:
    """The newest validation metrics of a run up to `step`, from its metrics.jsonl."""
    try:
        records = metrics_log.read(run)
        earlier = [r for r in records if r["kind"] == "validation" and r["step"] <= step]
    except (OSError, KeyError, TypeError):
        return None
    return earlier[-1] if earlier else None


def _training(provenance: dict[str, Any]) -> str:
    config = provenance.get("config")
    if not config:
        origin = provenance.get("converted_from")
        return f"Not by esm1nv_jax: converted from {origin}." if origin else "Not recorded."
    steps = provenance.get("steps", [])
    masking, optimizer, rows = config["masking"], config["optimizer"], config["batch"].get("rows")
    sequences = config["batch"].get("sequences_per_device")
    read = f"{rows} rows" if rows else f"about {sequences} sequences a device"
    rate, final_rate = masking["rate"], masking.get("final_rate") or masking["rate"]
    learned = (
        f"Masked language modelling, recipe `{masking['recipe']}`, {rate:.0%} of residues "
        f"predicted{'' if final_rate == rate else f' at first, {final_rate:.0%} at the end'}."
    )
    if "head" in provenance:
        base = provenance.get("base")
        learned = "Fine-tuned on labels, from "
        learned += f"`{base['path']}`." if base else "random weights."
    lines = [
        learned,
        f"{OPTIMIZERS[optimizer.get('kind', 'adamw')]}, "
        f"peak learning rate {optimizer['peak_lr']:.4g}, {optimizer['warmup']} warm-up steps; "
        f"{read} a step, in rows of "
        f"{config['data']['row_length']} tokens; matrix products in {config['compute']['dtype']}.",
    ]
    if len(steps) > 1:
        lines.append(f"The average of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}.")
    elif steps:
        lines.append(f"Step {steps[0]:,} of its run.")
    return "\n".join(f"- {line}" for line in lines)


def _data(provenance: dict[str, Any]) -> str:
    path = _data_path(provenance)
    if path is None:
        return "Not recorded."
    data, splits = provenance["config"]["data"], provenance.get("data")
    text = (
        f"{SAMPLE if path == 'sample' else f'`{path}`'}; sequences cropped to "
        f"{data['max_residues']} residues ({data['crop']})."
    )
    return text + (f" Fingerprints of the training split: {', '.join(splits)}." if splits else "")


def _data_path(provenance: dict[str, Any]) -> str | None:
    return ((provenance.get("config") or {}).get("data") or {}).get("path")


def _metrics(provenance: dict[str, Any]) -> str:
    metrics = provenance.get("metrics")
    if not isinstance(metrics, dict) or not metrics.keys() & {"perplexity_mask", "loss"}:
        return "None recorded."
    if "step" in metrics:
        source = f"Validation after step {metrics['step']:,}"
    else:  # `esm1nv average` evaluates on data that it names
        source = f"On {metrics.get('data', 'data that is not recorded')}"
    if "perplexity_mask" not in metrics:  # of a head
        known = {k: metrics[k] for k in HEAD_METRICS if metrics.get(k) is not None}
        values = (f"{k} {plus_minus(value, math.nan, 3)}" for k, value in known.items())
        return f"{source}: {', '.join(values)}."
    return (
        f"{source}: perplexity {metrics['perplexity']:.3f} over all selected positions, "
        f"{metrics['perplexity_mask']:.3f} over `<mask>` positions only."
    )
