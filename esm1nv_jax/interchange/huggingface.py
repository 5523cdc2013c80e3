"""A folder of `transformers`, read and written without it: EsmForMaskedLM, BertForMaskedLM or
EsmcForMaskedLM, or of a fine-tuned ESM or BERT For{Token,Sequence}Classification."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints.model_folder import NO_LM_HEAD, Weights, flatten, unflatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import BOS, EOS, MASK, PAD, vocabulary
from esm1nv_jax.interchange import (
    esmc,
    head_tensors,
    model_card,
    tensor_names,
    tensors,
    tokenizer_files,
)
from esm1nv_jax.interchange.config_fields import ConfigFields
from esm1nv_jax.interchange.esmc import ESMC
from esm1nv_jax.interchange.tensor_names import BERT, ESM, Family
from esm1nv_jax.model import esm2
from esm1nv_jax.model.encoder_config import EncoderConfig

CONFIG, PROVENANCE = "config.json", "provenance.json"
# Rows of the embedding's padding: nothing reads them, but with them a round trip is bit-exact.
PADDING = "vocabulary_padding.safetensors"
# The masked-LM head of a fine-tuned model, of which `transformers` has no class with both heads.
LM_HEAD = "lm_head.safetensors"
# The contact head, which BertForMaskedLM does not have.
CONTACT_HEAD = "contact_head.safetensors"
# Fields of EncoderConfig that neither EsmForMaskedLM nor BertForMaskedLM has.
MODERN = ("norm_kind", "bias", "qk_norm", "tied_head", "branch_scale", "bias_kv", "bare_head")
FAMILIES = {"esm": ESM, "bert": BERT, "esmc": ESMC}  # by model_type
BERT_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def is_hf_folder(folder: epath.Path) -> bool:
    """Whether a config.json of `transformers` lies there (a run has one of its own)."""
    try:
        return "model_type" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read(path: str, vocabulary_file: str | None = None) -> Weights:
    """Weights of a folder as `save_pretrained` writes it.

    Args:
      path: holds config.json, the weights, and tokenizer.json or vocab.txt.
      vocabulary_file: the tokens, where the folder has none.

    Raises UserError that names what is missing, unknown, or cannot be expressed here.
    """
    folder = epath.Path(path)
    try:
        fields = json.loads((folder / CONFIG).read_text())
        model_type = fields.get("model_type")
    except OSError:
        raise UserError(f"{folder} has no {CONFIG}; give a folder of save_pretrained") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is not a JSON object ({error})") from None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{folder / CONFIG}: model_type is {model_type!r}; "
            f"{', '.join(FAMILIES)} can be converted (EsmForMaskedLM, BertForMaskedLM, "
            "EsmcForMaskedLM, or Esm or BertFor{Token,Sequence}Classification)"
        )
    family, hf_config = FAMILIES[model_type], ConfigFields(fields, str(folder / CONFIG))
    hf_tensors = tensors.read_tensors(folder)
    config = _encoder_config(family, hf_config, folder, vocabulary_file)
    has_frequency = any(name.endswith(ESM.frequency) for name in hf_tensors)
    if config.position_kind == "rotary" and not has_frequency:
        theta = hf_config.get("rope_theta", float, esm2.ROPE_THETA)
        theta = esmc.rope_theta(hf_config) if family is ESMC else theta
        hf_tensors[ESM.frequency] = esm2.rope_frequencies(config.head_size, theta)
    name = str((fields.get("architectures") or [ESMC.architecture])[0])
    if family is ESMC and name != ESMC.architecture:
        raise UserError(
            f"{folder / CONFIG}: of ESMC {ESMC.architecture} can be converted, not {name}; "
            "fine-tune that one here"
        )
    head = head_tensors.read_config(fields, hf_tensors, str(folder))
    head_params = {}
    if head:
        head_params = head_tensors.pop_params(family, head, hf_tensors, config.width, str(folder))
    has_lm_head = head is None or (folder / LM_HEAD).exists()
    if not has_lm_head:
        hf_tensors |= tensor_names.fresh_lm_head(family, config)
    elif head:
        hf_tensors |= tensors.read_safetensors(folder / LM_HEAD)
    if (folder / CONTACT_HEAD).exists():
        hf_tensors |= tensors.read_safetensors(folder / CONTACT_HEAD)
    contacts = head_tensors.pop_contact_params(family, config, hf_tensors, str(folder))
    params, left_out = tensor_names.from_tensors(family, config, hf_tensors, str(folder))
    params |= {f"head/{name}": value for name, value in head_params.items()}
    tensor_names.check_finite(params | (contacts or {}), str(folder))
    provenance: dict[str, Any] = {
        "converted_from": str(folder),
        "architecture": head_tensors.architecture(family, head),
        "tensors_left_out": left_out,
    }
    if not has_lm_head:
        provenance |= NO_LM_HEAD
    if license_name := model_card.read_license(folder):
        provenance["licence"] = license_name
    try:
        if (folder / PROVENANCE).exists():
            provenance = json.loads((folder / PROVENANCE).read_text()) | provenance
        if (folder / PADDING).exists():
            _restore_padding(folder / PADDING, config, params)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: {PROVENANCE} or {PADDING} is damaged ({error}); the model does not need "
            "them, remove them or export it again"
        ) from None
    return Weights(unflatten(params), config, provenance, head, contacts)


def write(path: str, weights: Weights, difference: str = "") -> None:
    """Writes a folder that AutoTokenizer and AutoModelForMaskedLM open, or of a fine-tuned model
    AutoModelForTokenClassification or AutoModelForSequenceClassification; config.json comes last.

    `difference` from the model here, if there is one, goes into the model card.
    Raises UserError where `inexact_reason` of the model or of its head is not None.
    """
    head = weights.head
    if reason := inexact_reason(weights.model) or head_tensors.inexact_reason(head):
        raise UserError(reason)
    config, params = weights.model, flatten(weights.params)
    family = ESM if config.norm == "pre" else BERT
    if esmc.is_esmc(config):
        family = ESMC
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
    (folder / tensors.SAFETENSORS).write_bytes(content)
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
    hf_config = _to_hf_config(family, config) | {"architectures": [name]}
    hf_config |= head_tensors.config_fields(head) if head else {}
    (folder / CONFIG).write_text(json.dumps(hf_config, indent=2))


def inexact_reason(config: EncoderConfig) -> str | None:
    """What of this architecture no class has that is written here, or None."""
    if esmc.is_esmc(config):
        return None
    if reason := _modern_reason(config):
        return reason
    if config.norm == "post" and (config.position_kind == "rotary" or config.token_dropout):
        return (
            "model.norm='post' with rotary positions or token dropout is no architecture of "
            "transformers; only norm='pre' can be converted with them"
        )
    fix = (
        "train with the config's argument hf (pretrain_small:hf, quickstart:hf), or convert with "
        "--approximate, which prints the difference"
    )
    activations = {config.ffn_activation, config.head_activation}
    if config.norm == "pre" and activations != {"gelu_erf"}:
        part = "ffn" if config.ffn_activation != "gelu_erf" else "head"
        return (
            f"model.{part}_activation='gelu_tanh' cannot be converted exactly: EsmForMaskedLM "
            f"has 'gelu_erf' only; {fix}"
        )
    if config.norm == "post" and len(activations) > 1:
        return (
            f"model.ffn_activation={config.ffn_activation!r} and model.head_activation="
            f"{config.head_activation!r} cannot be converted exactly: BertForMaskedLM has one for "
            f"both; {fix}"
        )
    return None


def _modern_reason(config: EncoderConfig) -> str | None:
    """Which field has a value that no architecture written here can even approximate, or None."""
    found = {name: getattr(config, name) for name in MODERN}
    differing = [name for name in MODERN if found[name] != getattr(EncoderConfig, name)]
    if config.ffn_activation == "swiglu":
        found, differing = found | {"ffn_activation": "swiglu"}, [*differing, "ffn_activation"]
    if not differing:
        return None
    values = ", ".join(f"model.{name}={found[name]!r}" for name in differing)
    return (
        f"{values} cannot be converted: neither EsmForMaskedLM nor BertForMaskedLM has it, "
        "and EsmcForMaskedLM only all at once, as esm1nv_jax/interchange/esmc.py lists them"
    )


def approximate_config(config: EncoderConfig) -> EncoderConfig:
    """The architecture that `--approximate` converts to: the erf form of GELU throughout."""
    if reason := _modern_reason(config):
        raise UserError(reason)
    config = dataclasses.replace(config, ffn_activation="gelu_erf", head_activation="gelu_erf")
    if reason := inexact_reason(config):
        raise UserError(reason)
    return config


def _to_hf_config(family: Family, config: EncoderConfig) -> dict[str, Any]:
    if family is ESMC:
        return esmc.to_config_fields(config) | {"esm1nv_jax_version": __version__}
    known = vocabulary(config.vocabulary)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": "esm" if family is ESM else "bert",
        "vocab_size": len(known.tokens),
        "pad_token_id": known.own_id(PAD),
        "mask_token_id": known.own_id(MASK),
        "bos_token_id": known.own_id(BOS),
        "eos_token_id": known.own_id(EOS),
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "gelu",
        "max_position_embeddings": config.positions + tensor_names.first_position(family, config),
        "position_embedding_type": "absolute",
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "esm1nv_jax_version": __version__,
    }
    if family is BERT:
        tanh = config.ffn_activation == "gelu_tanh"
        return fields | {
            "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
            "type_vocab_size": 2,
        }
    return fields | {
        "position_embedding_type": "rotary" if config.position_kind == "rotary" else "absolute",
        "emb_layer_norm_before": config.embedding_norm,
        "token_dropout": config.token_dropout,
        "is_folding_model": False,
    }


def _encoder_config(
    family: Family, fields: ConfigFields, folder: epath.Path, vocabulary_file: str | None
) -> EncoderConfig:
    kinds = ("absolute", "rotary") if family is ESM else ("absolute",)
    kind = fields.choice("position_embedding_type", kinds, "absolute", "no relative positions here")
    for name in ("is_decoder", "add_cross_attention", "is_folding_model"):
        fields.choice(name, (False,), False, "this is an encoder with a masked-LM head")
    size = fields.get("vocab_size", int, esmc.ROWS if family is ESMC else None)
    text = tokenizer_files.read_vocabulary(folder, size, vocabulary_file, fields.values)
    known = vocabulary(text)
    default = {BERT.architecture: 0, ESMC.architecture: 1}.get(family.architecture)
    pad = fields.get("pad_token_id", int, default)
    if pad != known.own_id(PAD):
        raise UserError(
            f"{fields.source}: pad_token_id is {pad}, the vocabulary's padding token has id "
            f"{known.own_id(PAD)}; they must agree, for positions are counted by it"
        )
    if family is ESMC:
        return esmc.encoder_config(fields, text)
    shared: dict[str, Any] = {
        "layers": fields.get("num_hidden_layers", int),
        "width": fields.get("hidden_size", int),
        "heads": fields.get("num_attention_heads", int),
        "ffn": fields.get("intermediate_size", int),
        "dropout": fields.get("hidden_dropout_prob", float, 0.1),
        "attention_dropout": fields.get("attention_probs_dropout_prob", float, 0.1),
        "norm_epsilon": fields.get("layer_norm_eps", float, 1e-12),
        "vocabulary": text,
    }
    positions = fields.get("max_position_embeddings", int)
    if family is BERT:
        act = fields.choice("hidden_act", tuple(BERT_ACTIVATIONS), "gelu", "other activation")
        shared |= dict.fromkeys(("ffn_activation", "head_activation"), BERT_ACTIVATIONS[act])
        return EncoderConfig(norm="post", positions=positions, **shared)
    mask = fields.values.get("mask_token_id")
    if mask is not None and mask != known.own_id(MASK):
        raise UserError(
            f"{fields.source}: mask_token_id is {mask}, the vocabulary's mask token has id "
            f"{known.own_id(MASK)}; they must agree"
        )
    return EncoderConfig(
        norm="pre",
        positions=positions if kind == "rotary" else positions - pad - 1,
        position_kind="rotary" if kind == "rotary" else "learned",
        embedding_norm=fields.get("emb_layer_norm_before", bool, False),
        token_dropout=fields.get("token_dropout", bool, False),
        ffn_activation="gelu_erf",
        head_activation="gelu_erf",
        **shared,
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
