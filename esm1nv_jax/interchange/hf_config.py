"""Architectures of `transformers`: names of their tensors, and config.json from and to an
EncoderConfig; what it cannot express."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import BOS, EOS, MASK, PAD, vocabulary
from esm1nv_jax.interchange import esmc, tokenizer_files
from esm1nv_jax.interchange.esmc import ESMC
from esm1nv_jax.interchange.tensor_names import Family, first_position
from esm1nv_jax.interchange.tool_files import ConfigFields
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.lora import FUSED

_HF_BLOCK = {name: f"attention.self.{name}" for name in FUSED} | {
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
ESM = Family(
    architecture="EsmForMaskedLM",
    config_name="config.json",
    modules={
        "embedding_norm": "esm.embeddings.layer_norm",
        "final_norm": "esm.encoder.emb_layer_norm_after",
        "lm_head/dense": "lm_head.dense",
        "lm_head/layer_norm": "lm_head.layer_norm",
    },
    layers="esm.encoder.layer",
    block_modules=_HF_BLOCK | {"attention_norm": "attention.LayerNorm", "ffn_norm": "LayerNorm"},
    token_embedding="esm.embeddings.word_embeddings.weight",
    position_embedding="esm.embeddings.position_embeddings.weight",
    lm_head_bias="lm_head.bias",
    decoder="lm_head.decoder",
    ignored=r"esm\.pooler\..*|.*\.position_ids",
    frequency="rotary_embeddings.inv_freq",
    positions_after_padding=True,
)
BERT = Family(
    architecture="BertForMaskedLM",
    config_name="config.json",
    modules={
        "embedding_norm": "bert.embeddings.LayerNorm",
        "lm_head/dense": "cls.predictions.transform.dense",
        "lm_head/layer_norm": "cls.predictions.transform.LayerNorm",
    },
    layers="bert.encoder.layer",
    block_modules=_HF_BLOCK
    | {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"},
    token_embedding="bert.embeddings.word_embeddings.weight",
    position_embedding="bert.embeddings.position_embeddings.weight",
    lm_head_bias="cls.predictions.bias",
    decoder="cls.predictions.decoder",
    ignored=r"bert\.pooler\..*|.*\.position_ids|cls\.(?!predictions\.).*",
    token_types="bert.embeddings.token_type_embeddings.weight",
)
FAMILIES = {"esm": ESM, "bert": BERT, "esmc": ESMC}  # by model_type
# Fields that ESM and BERT share: (name there, type, default there).
SHARED: dict[str, tuple[str, type, Any]] = {
    "layers": ("num_hidden_layers", int, None),
    "width": ("hidden_size", int, None),
    "heads": ("num_attention_heads", int, None),
    "ffn": ("intermediate_size", int, None),
    "dropout": ("hidden_dropout_prob", float, 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", float, 0.1),
    "norm_epsilon": ("layer_norm_eps", float, 1e-12),
}
# Fields of EncoderConfig that neither EsmForMaskedLM nor BertForMaskedLM has.
MODERN = ("norm_kind", "bias", "qk_norm", "tied_head", "branch_scale", "bias_kv", "bare_head")
BERT_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def family_of(config: EncoderConfig) -> Family:
    """The family that this architecture is written as, if `inexact_reason` is None."""
    if esmc.is_esmc(config):
        return ESMC
    return ESM if config.norm == "pre" else BERT


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


def to_fields(family: Family, config: EncoderConfig) -> dict[str, Any]:
    """config.json of a model, but for its head."""
    known = vocabulary(config.vocabulary)
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": next(name for name, found in FAMILIES.items() if found is family),
        "vocab_size": len(known.tokens),
        "pad_token_id": known.own_id(PAD),
        "mask_token_id": known.own_id(MASK),
        "bos_token_id": known.own_id(BOS),
        "eos_token_id": known.own_id(EOS),
        "max_position_embeddings": config.positions + first_position(family, config),
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "float32",
        "esm1nv_jax_version": __version__,
    }
    if family is ESMC:
        return fields | esmc.to_fields(config)
    fields |= {theirs: getattr(config, ours) for ours, (theirs, *_) in SHARED.items()}
    fields |= {"hidden_act": "gelu", "initializer_range": 0.02}
    if family is BERT:
        tanh = config.ffn_activation == "gelu_tanh"
        return fields | {
            "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
        }
    return fields | {
        "position_embedding_type": "rotary" if config.position_kind == "rotary" else "absolute",
        "emb_layer_norm_before": config.embedding_norm,
        "token_dropout": config.token_dropout,
        "is_folding_model": False,
    }


def encoder_config(
    family: Family, fields: ConfigFields, folder: epath.Path, vocabulary_file: str | None
) -> EncoderConfig:
    """The architecture that a config.json in `folder` describes.

    Raises UserError that names the field which is missing or cannot be expressed here.
    """
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
    shared: dict[str, Any] = {ours: fields.get(*field) for ours, field in SHARED.items()}
    shared["vocabulary"] = text
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
