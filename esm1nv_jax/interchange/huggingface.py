"""A folder of `transformers`, read and written without it: EsmForMaskedLM, BertForMaskedLM or
EsmcForMaskedLM, or of a fine-tuned ESM or BERT For{Token,Sequence}Classification; and LoRA of such
a model as an adapter folder of `peft`."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from esm1nv_jax.checkpoints.model_folder import NO_LM_HEAD, Weights, flatten, unflatten
from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.interchange import (
    esmc,
    head_tensors,
    hf_config,
    model_card,
    tensor_names,
    tokenizer_files,
    tool_files,
)
from esm1nv_jax.interchange.esmc import ESMC
from esm1nv_jax.interchange.hf_config import BERT, ESM
from esm1nv_jax.interchange.tool_files import ConfigFields
from esm1nv_jax.model import esm2
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.lora import LoraConfig

CONFIG, PROVENANCE = "config.json", "provenance.json"
# Rows of the embedding's padding: nothing reads them, but with them a round trip is bit-exact.
PADDING = "vocabulary_padding.safetensors"
# The masked-LM head of a fine-tuned model, of which `transformers` has no class with both heads.
LM_HEAD = "lm_head.safetensors"
# The contact head, which BertForMaskedLM does not have.
CONTACT_HEAD = "contact_head.safetensors"
ADAPTER_CONFIG, ADAPTER, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
PEFT_TASKS = {"residue": "TOKEN_CLS", "protein": "SEQ_CLS"}


def is_hf_folder(folder: epath.Path) -> bool:
    """Whether a config.json of `transformers` lies there (a run has one of its own)."""
    try:
        return "model_type" in files.parse_json((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read(path: str, vocabulary_file: str | None = None) -> Weights:
    """Weights of a folder as `save_pretrained` writes it: config.json, the weights, and
    tokenizer.json or vocab.txt, without which `vocabulary_file` has the tokens.

    Raises UserError that names what is missing, unknown, or cannot be expressed here.
    """
    folder = epath.Path(path)
    try:
        fields = files.parse_json((folder / CONFIG).read_text())
        model_type = fields.get("model_type")
    except OSError:
        raise UserError(f"{folder} has no {CONFIG}; give a folder of save_pretrained") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is not a JSON object ({error})") from None
    if not isinstance(model_type, str) or model_type not in hf_config.FAMILIES:
        raise UserError(
            f"{folder / CONFIG}: model_type is {model_type!r}; "
            f"{', '.join(hf_config.FAMILIES)} can be converted (EsmForMaskedLM, BertForMaskedLM, "
            "EsmcForMaskedLM, or Esm or BertFor{Token,Sequence}Classification)"
        )
    family, source = hf_config.FAMILIES[model_type], str(folder)
    config_fields = ConfigFields(fields, str(folder / CONFIG))
    for field, kind in (("architectures", list), ("id2label", dict)):
        config_fields.get(field, kind, kind())
    hf_tensors = tool_files.read_tensors(folder)
    config = hf_config.encoder_config(family, config_fields, folder, vocabulary_file)
    has_frequency = any(name.endswith(ESM.frequency) for name in hf_tensors)
    if config.position_kind == "rotary" and not has_frequency:
        theta = config_fields.get("rope_theta", float, esm2.ROPE_THETA)
        theta = esmc.rope_theta(config_fields) if family is ESMC else theta
        hf_tensors[ESM.frequency] = esm2.rope_frequencies(config.head_size, theta)
    name = str((fields.get("architectures") or [ESMC.architecture])[0])
    if family is ESMC and name != ESMC.architecture:
        raise UserError(
            f"{folder / CONFIG}: of ESMC {ESMC.architecture} can be converted, not {name}; "
            "fine-tune that one here"
        )
    prefix = family.layers.partition(".")[0] + "."
    bare = name == family.architecture.replace("ForMaskedLM", "Model")
    if bare and not any(tensor.startswith(prefix) for tensor in hf_tensors):
        raise UserError(
            f"{folder}: {name} has no masked-LM head; read it by {family.architecture}."
            "from_pretrained and give what its save_pretrained writes, with a head of random "
            "weights: embeddings do not depend on it, scores mean nothing"
        )
    head = head_tensors.read_config(fields, hf_tensors, source)
    head_params = {}
    if head:
        head_params = head_tensors.pop_params(family, head, hf_tensors, config.width, source)
    has_lm_head = head is None or (folder / LM_HEAD).exists()
    if not has_lm_head:
        hf_tensors |= tensor_names.fresh_lm_head(family, config)
    for file in (LM_HEAD, CONTACT_HEAD):
        if (folder / file).exists():
            hf_tensors |= tool_files.read_safetensors(folder / file)
    contacts = head_tensors.pop_contact_params(family, config, hf_tensors, source)
    weights = tensor_names.to_weights(family, config, hf_tensors, source, source, contacts)
    provenance = weights.provenance | {"architecture": head_tensors.architecture(family, head)}
    if not has_lm_head:
        provenance |= NO_LM_HEAD
    if license_name := model_card.read_license(folder):
        provenance["licence"] = license_name
    try:
        if (folder / PROVENANCE).exists():
            provenance = files.parse_json((folder / PROVENANCE).read_text()) | provenance
        if (folder / PADDING).exists():
            _restore_padding(folder / PADDING, config, flatten(weights.params))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: {PROVENANCE} or {PADDING} is damaged ({error}); the model does not need "
            "them, remove them or export it again"
        ) from None
    params = weights.params | ({"head": unflatten(head_params)} if head else {})
    return dataclasses.replace(weights, params=params, provenance=provenance, head=head)


def write(path: str, weights: Weights, difference: str = "") -> None:
    """Writes a folder that AutoTokenizer and AutoModelForMaskedLM open, or of a fine-tuned model
    AutoModelForTokenClassification or AutoModelForSequenceClassification; config.json comes last.

    `difference` from the model here, if there is one, goes into the model card.
    Raises UserError where `inexact_reason` of the model or of its head is not None.
    """
    head = weights.head
    config, params = weights.model, flatten(weights.params)
    if reason := hf_config.inexact_reason(config) or head_tensors.inexact_reason(head):
        raise UserError(reason)
    family = hf_config.family_of(config)
    if family is ESMC:
        frequency = esm2.rope_frequencies(config.head_size)
        if head or not np.array_equal(params["rotary_frequency"], frequency):
            what = "a fine-tuned ESMC" if head else "an ESMC with other rotary frequencies"
            raise UserError(f"{what} cannot be converted; use it here, by esm1nv predict or embed")
    hf_tensors = tensor_names.to_tensors(family, config, params)
    lm_head = {}
    if head:
        of_encoder = family.layers.partition(".")[0] + "."
        lm_head = {k: v for k, v in hf_tensors.items() if not k.startswith(of_encoder)}
        hf_tensors = {k: v for k, v in hf_tensors.items() if k.startswith(of_encoder)}
        hf_tensors |= head_tensors.to_hf_tensors(family, head, flatten(weights.params["head"]))
    contacts = head_tensors.to_contact_tensors(family, config, weights.contact_head)
    if family is ESM:
        hf_tensors |= contacts
    elif family is BERT:
        hf_tensors[BERT.token_types] = np.zeros((2, config.width), np.float32)
    if family is ESM and config.position_kind == "rotary":
        for i in range(config.layers):  # where transformers 4 looks for it, and 5 too
            name = f"esm.encoder.layer.{i}.attention.self.{ESM.frequency}"
            hf_tensors[name] = params["rotary_frequency"]
    hf_tensors, lm_head = (
        {k: np.ascontiguousarray(v, np.float32) for k, v in some.items()}
        for some in (hf_tensors, lm_head)
    )

    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    content = save_safetensors(hf_tensors, metadata={"format": "pt"})
    (folder / tool_files.SAFETENSORS).write_bytes(content)
    if family is not ESM and weights.contact_head:
        (folder / CONTACT_HEAD).write_bytes(save_safetensors(contacts))
    if lm_head and weights.has_lm_head:
        (folder / LM_HEAD).write_bytes(save_safetensors(lm_head))
    padding = _padding(config, params)
    if any(np.any(rows) for rows in padding.values()):
        (folder / PADDING).write_bytes(save_safetensors(padding))
    tokenizer_files.write_tokenizer(folder, config)
    (folder / PROVENANCE).write_text(json.dumps(weights.provenance, indent=1))
    name = head_tensors.architecture(family, head)
    card = model_card.model_card(weights, name, difference)
    (folder / "README.md").write_text(card, encoding="utf-8")
    fields = hf_config.to_fields(family, config) | {"architectures": [name]}
    fields |= head_tensors.config_fields(head) if head else {}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2))


def write_adapter(
    path: str, base: Weights, tuned: Weights, lora: LoraConfig, adapters: dict, difference: str = ""
) -> None:
    """Writes LoRA as an adapter folder of `peft`, in it `base`, the model that was fine-tuned.

    `tuned` is what came of it, for its head; `adapters` are parameters as `lora.init` returns them.
    A `difference` of the base from the model here goes into its model card.

    Raises UserError where `transformers` has no such model or head.
    """
    head = tuned.head
    if head is None:
        raise UserError("only a fine-tuned model has an adapter")
    params = base.encoder_params | {"head": tuned.params["head"]}
    with_head = Weights(params, tuned.model, base.provenance, head)
    folder = epath.Path(path)
    write(str(folder / BASE), with_head, difference)

    family = ESM if tuned.model.norm == "pre" else BERT
    names, layers = family.block_modules, family.layers
    weights = head_tensors.to_hf_tensors(family, head, flatten(tuned.params["head"]))
    for layer, projections in adapters.items():
        for name, pair in projections.items():
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                kernel = np.asarray(pair[ours]["kernel"])
                weights[f"{layers}.{layer}.{names[name]}.{theirs}.weight"] = kernel.T
    content = {
        f"base_model.model.{name}": np.ascontiguousarray(value, np.float32)
        for name, value in weights.items()
    }
    (folder / ADAPTER).write_bytes(save_safetensors(content, metadata={"format": "pt"}))
    adapted = "|".join(re.escape(names[name]) for name in lora.projections)
    pooler = [n.removesuffix(".weight") for n in weights if n.endswith("pooler.dense.weight")]
    config = {
        "peft_type": "LORA",
        "task_type": PEFT_TASKS[head.level],
        "base_model_name_or_path": str(folder / BASE),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": rf"{re.escape(layers)}\.\d+\.({adapted})",
        "modules_to_save": ["classifier", *pooler],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
    auto = f"AutoModelFor{head_tensors.ENDINGS[head.level].removeprefix('For')}"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: peft\nbase_model: {BASE}\ntags: [protein]\n---\n\n"
        f"# A LoRA adapter, written by esm1nv_jax\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'base = {auto}.from_pretrained("THIS_FOLDER/{BASE}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER/{BASE}")\n```\n',
        encoding="utf-8",
    )


def _padding(config: EncoderConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    unread = ~vocabulary(config.vocabulary).predicted()
    return {
        name: np.ascontiguousarray(params[name][unread], np.float32)
        for name in ("token_embedding/embedding", "lm_head/bias", "lm_head/decoder/embedding")
        if name in params
    }


def _restore_padding(path: epath.Path, config: EncoderConfig, params: dict) -> None:
    """Puts the unread rows back, if they are of this shape: a folder may have been edited."""
    unread = ~vocabulary(config.vocabulary).predicted()
    for name, rows in load_safetensors(path.read_bytes()).items():
        if name in params and rows.shape == params[name][unread].shape:
            params[name][unread] = rows
