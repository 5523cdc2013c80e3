"""ESM Cambrian, `EsmcForMaskedLM` of transformers: a pre-LN encoder with SwiGLU, normalized queries
and keys, biases in LayerNorms and the LM head only, an untied output matrix, and residual branches
multiplied by sqrt(36 / layers)."""

from __future__ import annotations

import math
from typing import Any

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange.tensor_names import Family
from esm1nv_jax.interchange.tool_files import ConfigFields
from esm1nv_jax.model import esm2
from esm1nv_jax.model.encoder_config import EncoderConfig

ESMC = Family(
    architecture="EsmcForMaskedLM",
    config_name="config.json",
    modules={
        "final_norm": "esmc.norm",
        "lm_head/dense": "lm_head.dense",
        "lm_head/layer_norm": "lm_head.layer_norm",
    },
    layers="esmc.layers",
    block_modules={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "out_proj": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "fc2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    token_embedding="esmc.embed_tokens.weight",
    position_embedding="",
    lm_head_bias="lm_head.decoder.bias",
    decoder="lm_head.decoder",
    ignored="",
    frequency="rotary_embeddings.inv_freq",
)
ROWS = 64  # of its embedding, for 33 tokens


def architecture(layers: int) -> dict[str, Any]:
    """The fields of EncoderConfig that every ESMC of so many layers has."""
    return {
        "norm": "pre",
        "norm_kind": "layernorm",
        "norm_epsilon": 1e-5,
        "bias": False,
        "qk_norm": True,
        "ffn_activation": "swiglu",
        "head_activation": "gelu_erf",
        "tied_head": False,
        "branch_scale": math.sqrt(36 / layers),
        "position_kind": "rotary",
        "embedding_norm": False,
        "token_dropout": False,
        "bias_kv": False,
        "bare_head": False,
    }


def is_esmc(config: EncoderConfig) -> bool:
    """Whether `EsmcForMaskedLM` computes this architecture."""
    return all(getattr(config, k) == v for k, v in architecture(config.layers).items())


def encoder_config(fields: ConfigFields, text: str) -> EncoderConfig:
    """The architecture that a config.json describes, with the vocabulary `text`.

    Raises UserError that names the field which has another value than any released ESMC.
    """
    layers, heads = fields.get("num_hidden_layers", int), fields.get("num_attention_heads", int)
    width = fields.get("hidden_size", int)
    if min(layers, heads) < 1:
        raise UserError(
            f"{fields.source}: num_hidden_layers={layers} and num_attention_heads={heads} must be "
            "at least 1"
        )
    fields.choice("hidden_act", ("silu",), "silu", "its FFN is SwiGLU")
    fields.choice("num_key_value_heads", (heads,), heads, "no grouped queries here")
    fields.choice("head_dim", (width // heads,), width // heads, "heads divide the width")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        fields.choice(name, (False,), False, "no released ESMC has it")
    kind = fields.values.get("rope_parameters") or {}
    if not isinstance(kind, dict) or kind.get("rope_type", "default") != "default":
        raise UserError(
            f"{fields.source}: rope_parameters={kind!r} is not supported here; rope_type must be "
            "'default'"
        )
    return EncoderConfig(
        layers=layers,
        width=width,
        heads=heads,
        ffn=fields.get("intermediate_size", int),
        positions=fields.get("max_position_embeddings", int),
        dropout=0.0,
        attention_dropout=fields.get("attention_dropout", float, 0.0),
        vocabulary=text,
        **architecture(layers),
    )


def rope_theta(fields: ConfigFields) -> float:
    """The base of the rotary frequencies, after `encoder_config` has checked their kind."""
    kind = fields.values.get("rope_parameters") or {}
    return ConfigFields(kind, fields.source).get("rope_theta", float, esm2.ROPE_THETA)


def to_fields(config: EncoderConfig) -> dict[str, Any]:
    """The fields of config.json that are not those of every folder."""
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "rope_parameters": {"rope_theta": esm2.ROPE_THETA, "rope_type": "default"},
    }
