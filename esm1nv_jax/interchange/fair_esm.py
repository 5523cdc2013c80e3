"""A `.pt` file of Meta's package `fair-esm`: ESM-1, ESM-1b, ESM-1v or ESM-2.

It is a file of `torch.save` with the weights under `model`. The config is an `argparse.Namespace`
under `args`, or for ESM-2 under `cfg.model`. Names begin with the module that a model was trained
in (`encoder.`, `decoder.`), which says nothing here. The contact head of NAME.pt lies in a file of
its own, NAME-contact-regression.pt.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
from etils import epath

from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import ESM2, MASK, PAD, vocabulary
from esm1nv_jax.interchange import head_tensors, tensor_names, tool_files, torch_file
from esm1nv_jax.interchange.tensor_names import Family
from esm1nv_jax.interchange.tool_files import ConfigFields, shown
from esm1nv_jax.model.encoder_config import EncoderConfig

ESM1_TOKENS = (
    "<null_0> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> "
    "<cls> <mask> <sep>"
)
ARCHITECTURES = {"protein_bert_base": "ESM-1", "roberta_large": "ESM-1b"}  # by `args.arch`
MAX_POSITIONS = 2**16  # a table of sinusoids is made of them
ESM2_POSITIONS = 1026  # the longest it was trained on; rotary positions set no limit
ESM1B = Family(
    architecture="ESM-1b",
    config_name="args",
    modules={
        "embedding_norm": "emb_layer_norm_before",
        "final_norm": "emb_layer_norm_after",
        "lm_head/dense": "lm_head.dense",
        "lm_head/layer_norm": "lm_head.layer_norm",
    },
    layers="layers",
    block_modules={
        "attention_norm": "self_attn_layer_norm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out_proj": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    token_embedding="embed_tokens.weight",
    position_embedding="embed_positions.weight",
    lm_head_bias="lm_head.bias",
    decoder="lm_head",
    ignored=r".*version",
    contact_head="contact_head.regression",
    frequency="rot_emb.inv_freq",
    positions_after_padding=True,
)
FAMILIES = {
    "ESM-1": dataclasses.replace(
        ESM1B, architecture="ESM-1", modules={}, lm_head_bias="embed_out_bias", decoder="embed_out"
    ),
    "ESM-1b": ESM1B,
    "ESM-2": dataclasses.replace(ESM1B, architecture="ESM-2", config_name="cfg.model"),
}


def read(path: str) -> Weights:
    """Weights of a `.pt` file of `fair-esm`, and those of the contact head in a file beside it.

    Raises UserError that names what is missing, unknown, damaged, or cannot be expressed here.
    """
    content = _load(path)
    name, fields = _config_fields(content, path)
    family, state = FAMILIES[name], _state(content, path)
    regression = f"{path.removesuffix('.pt')}-contact-regression.pt"
    if epath.Path(regression).exists():
        state |= _state(_load(regression), regression)
    config = _encoder_config(name, fields, state)
    contacts = head_tensors.pop_contact_params(family, config, state, path)
    if name == "ESM-1":
        _convert_esm1(config, state)
    elif name == "ESM-1b":
        _clear_mask_row(config, state)
    return tensor_names.to_weights(family, config, state, path, path, contacts)


def _load(path: str) -> dict:
    content = tool_files.read_torch(epath.Path(path), torch_file.read)
    return content if isinstance(content, dict) else {}


def _state(content: dict, path: str) -> dict[str, np.ndarray]:
    """The tensors under `model`, floats as fp32, without the names of what trained them."""
    state = content.get("model")
    if not isinstance(state, dict) or not all(isinstance(x, np.ndarray) for x in state.values()):
        raise UserError(f"{path} has no table of tensors under `model`, as files of fair-esm have")
    trainer = re.compile(r"((encoder|decoder)\.)?(sentence_encoder\.)?")
    return {trainer.sub("", str(k), count=1): tool_files.to_float32(x) for k, x in state.items()}


def _config_fields(content: dict, path: str) -> tuple[str, ConfigFields]:
    """(architecture, fields without the prefix `encoder_` or `decoder_`)."""
    args, cfg = content.get("args"), content.get("cfg")
    if isinstance(args, dict) and "arch" in args:
        arch = args["arch"]
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise UserError(f"{path}: arch is {shown(arch)}; there are {', '.join(ARCHITECTURES)}")
        name, where = ARCHITECTURES[arch], "args"
    elif isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        name, where, args = "ESM-2", "cfg.model", cfg["model"]
    else:
        raise UserError(
            f"{path} has neither args.arch nor cfg.model; give a .pt file of a model of fair-esm"
        )
    prefix = "decoder_" if name == "ESM-1" else "encoder_"
    values = args | {str(key).removeprefix(prefix): x for key, x in args.items()}
    return name, ConfigFields(values, f"{path}: {where}")


def _encoder_config(name: str, fields: ConfigFields, state: dict) -> EncoderConfig:
    width = fields.get("embed_dim", int)
    shared: dict[str, Any] = {
        "layers": fields.get("layers", int),
        "width": width,
        "heads": fields.get("attention_heads", int),
        "ffn": 4 * width if name == "ESM-2" else fields.get("ffn_embed_dim", int),
        "dropout": fields.get("dropout", float, 0.0),
        "attention_dropout": fields.get("attention_dropout", float, 0.0),
        "token_dropout": fields.get("token_dropout", bool, False),
        "ffn_activation": "gelu_erf",
        "head_activation": "gelu_erf",
    }
    if name == "ESM-2":
        return EncoderConfig(
            positions=ESM2_POSITIONS, position_kind="rotary", vocabulary=ESM2, **shared
        )
    positions = fields.get("max_positions", int, 1024)
    if positions > MAX_POSITIONS:
        raise UserError(
            f"{fields.source}: max_positions is {positions:,}; it may be at most {MAX_POSITIONS:,}"
        )
    if name == "ESM-1":
        return EncoderConfig(
            positions=positions,
            norm_epsilon=1e-12,
            bias_kv=True,
            bare_head=True,
            tied_head=False,
            vocabulary=ESM1_TOKENS,
            **shared,
        )
    norm = any(key.startswith("emb_layer_norm_before.") for key in state)
    return EncoderConfig(positions=positions, embedding_norm=norm, vocabulary=ESM2, **shared)


def _clear_mask_row(config: EncoderConfig, state: dict) -> None:
    """As `fair-esm` does when it loads ESM-1b: under token dropout nothing has trained that row."""
    row = vocabulary(config.vocabulary).own_id(MASK)
    for name in (ESM1B.token_embedding, f"{ESM1B.decoder}.weight"):
        if name in state and state[name].ndim and len(state[name]) > row:
            state[name] = state[name].copy()
            state[name][row] = 0


def _convert_esm1(config: EncoderConfig, state: dict) -> None:
    """Makes tensors like ESM-1b's of those that ESM-1 has otherwise."""
    family = FAMILIES["ESM-1"]
    if family.token_embedding in state:
        state[family.token_embedding] = state[family.token_embedding] * np.float32(
            config.width**0.5
        )
    if "embed_out" in state:
        state[f"{family.decoder}.weight"] = state.pop("embed_out")
    state.setdefault(family.lm_head_bias, np.zeros(len(ESM1_TOKENS.split(" ")), np.float32))
    state.pop("embed_positions._float_tensor", None)  # it only has a dtype
    # Where the width is another's, `from_tensors` says so, and the table might be of any size.
    table = state.get(family.token_embedding)
    if table is not None and table.shape[1:] == (config.width,):
        state[family.position_embedding] = _sinusoids(config)
    else:
        shape = _position_rows(config), config.width
        state[family.position_embedding] = np.broadcast_to(np.float32(0), shape)


def _position_rows(config: EncoderConfig) -> int:
    return 1 + vocabulary(config.vocabulary).own_id(PAD) + config.positions


def _sinusoids(config: EncoderConfig) -> np.ndarray:
    """fp32 [rows, width]: sines, then cosines. The angles are products in fp32, as there: at
    position 1,000 their rounding is 6e-5."""
    half = config.width // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000) / max(half - 1, 1))
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.arange(_position_rows(config), dtype=np.float32)[:, None] * rates).astype(
        np.float64
    )
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, config.width % 2))).astype(np.float32)
