"""A folder of `transformers` (EsmForMaskedLM or BertForMaskedLM), read and written without it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints.model_folder import flatten, unflatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import BOS, EOS, MASK, PAD
from esm1nv_jax.data.vocabulary import vocabulary
from esm1nv_jax.interchange import model_card, tensor_names, tensors, tokenizer_files
from esm1nv_jax.model import esm2
from esm1nv_jax.model.encoder import EncoderConfig

if TYPE_CHECKING:
    from esm1nv_jax.checkpoints.model_folder import Weights

CONFIG, PROVENANCE = "config.json", "provenance.json"
# Rows of the embedding's padding: nothing reads them, but with them the way back is bit-exact.
PADDING = "vocabulary_padding.safetensors"
BERT_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def is_one(folder: epath.Path) -> bool:
    """Whether a config.json of `transformers` lies there (a run has one of its own)."""
    try:
        return "model_type" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read(path: str, vocabulary_file: str | None = None) -> tuple[dict, EncoderConfig, dict]:
    """(params, config, provenance) of a folder as `save_pretrained` writes it.

    Args:
      path: holds config.json, the weights, and tokenizer.json or vocab.txt.
      vocabulary_file: the tokens, where the folder has none.

    Raises UserError that names what is missing, unknown, or cannot be expressed here.
    """
    folder = epath.Path(path)
    try:
        description = json.loads((folder / CONFIG).read_text())
        model_type = description.get("model_type")
    except OSError:
        raise UserError(f"{folder} has no {CONFIG}; give a folder of save_pretrained") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is not a JSON object ({error})") from None
    if not isinstance(model_type, str) or model_type not in tensor_names.FAMILIES:
        raise UserError(
            f"{folder / CONFIG}: model_type is {model_type!r}; "
            f"{', '.join(tensor_names.FAMILIES)} can be converted (EsmForMaskedLM, BertForMaskedLM)"
        )
    family = tensor_names.FAMILIES[model_type]
    found = tensors.read(folder)
    fields = _Fields(description, str(folder / CONFIG))
    config = _config(family, fields, folder, vocabulary_file)
    if config.position_kind == "rotary" and not any(
        n.endswith(tensor_names.FREQUENCY) for n in found
    ):
        base = fields.get("rope_theta", float, esm2.ROPE_THETA)
        found[tensor_names.FREQUENCY] = esm2.rope_frequencies(config.width // config.heads, base)
    leaves, left_out = tensor_names.to_ours(family, config, found, str(folder))
    if broken := [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        raise UserError(
            f"{folder}: what becomes {broken[0]} holds NaN or infinity ({len(broken)} such of "
            f"{len(leaves)}), and the model predicts nothing; get other weights"
        )
    provenance: dict[str, Any] = {
        "converted_from": str(folder),
        "architecture": family.architecture,
        "tensors_left_out": left_out,
    }
    licence = model_card.licence_of(folder)
    provenance |= {"licence": licence} if licence else {}
    try:
        if (folder / PROVENANCE).exists():
            provenance = json.loads((folder / PROVENANCE).read_text()) | provenance
        if (folder / PADDING).exists():
            _restore_padding(folder / PADDING, config, leaves)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: {PROVENANCE} or {PADDING} is damaged ({error}); the model does not need "
            "them, remove them or export it again"
        ) from None
    return unflatten(leaves), config, provenance


def write(path: str, weights: Weights, approximated: str = "") -> None:
    """Writes a folder that AutoModelForMaskedLM and AutoTokenizer open; config.json comes last.

    `approximated` goes into the model card: what differs from the model here, and by how much.
    Raises UserError where `unexpressible(weights.model)` says anything.
    """
    reason = unexpressible(weights.model)
    if reason:
        raise UserError(reason)
    config, leaves = weights.model, flatten(weights.params)
    family, description = describe(config)
    found = tensor_names.to_theirs(family, config, leaves)
    if family is tensor_names.ESM:
        # Without one `transformers` would make it up at random at every start.
        found["esm.contact_head.regression.weight"] = np.zeros(
            (1, config.layers * config.heads), np.float32
        )
        found["esm.contact_head.regression.bias"] = np.zeros(1, np.float32)
    else:
        found[tensor_names.TOKEN_TYPES] = np.zeros((2, config.width), np.float32)
    if config.position_kind == "rotary":
        for i in range(config.layers):  # where transformers 4 looks for it, and 5 too
            name = f"esm.encoder.layer.{i}.attention.self.{tensor_names.FREQUENCY}"
            found[name] = leaves["rotary_frequency"]
    found = {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}

    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / tensors.SAFE).write_bytes(save_safetensors(found, metadata={"format": "pt"}))
    padding = _padding(config, leaves)
    if any(np.any(rows) for rows in padding.values()):
        (folder / PADDING).write_bytes(save_safetensors(padding))
    tokenizer_files.write(folder, config)
    (folder / PROVENANCE).write_text(json.dumps(weights.provenance, indent=1))
    card = model_card.text(weights, family.architecture, approximated)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(description, indent=2))


def unexpressible(config: EncoderConfig) -> str | None:
    """What of this architecture neither EsmForMaskedLM nor BertForMaskedLM has, or None."""
    if config.norm == "post" and (config.position_kind == "rotary" or config.token_dropout):
        return (
            "model.norm='post' with rotary positions or token dropout is no architecture of "
            "transformers; only norm='pre' can be converted with them"
        )
    fix = (
        "train with --config=configs/pretrain_small.py:hf, or convert with --approximate, which "
        "prints the difference"
    )
    activations = {config.ffn_activation, config.head_activation}
    if config.norm == "pre" and activations != {"gelu_erf"}:
        where = "ffn" if config.ffn_activation != "gelu_erf" else "head"
        return (
            f"model.{where}_activation='gelu_tanh' cannot be converted exactly: EsmForMaskedLM "
            f"has 'gelu_erf' only; {fix}"
        )
    if config.norm == "post" and len(activations) > 1:
        return (
            f"model.ffn_activation={config.ffn_activation!r} and model.head_activation="
            f"{config.head_activation!r} cannot be converted exactly: BertForMaskedLM has one for "
            f"both; {fix}"
        )
    return None


def nearest(config: EncoderConfig) -> EncoderConfig:
    """The architecture that `--approximate` converts to: the erf form of GELU throughout."""
    near = dataclasses.replace(config, ffn_activation="gelu_erf", head_activation="gelu_erf")
    reason = unexpressible(near)
    if reason:
        raise UserError(reason)
    return near


def describe(config: EncoderConfig) -> tuple[tensor_names.Family, dict[str, Any]]:
    """The architecture of `transformers` that this is, and its config.json."""
    family = tensor_names.ESM if config.norm == "pre" else tensor_names.BERT
    known = vocabulary(config.vocabulary)
    description: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
    if family is tensor_names.BERT:
        tanh = config.ffn_activation == "gelu_tanh"
        return family, description | {
            "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
            "type_vocab_size": 2,
        }
    return family, description | {
        "position_embedding_type": "rotary" if config.position_kind == "rotary" else "absolute",
        "emb_layer_norm_before": config.embedding_norm,
        "token_dropout": config.token_dropout,
        "is_folding_model": False,
    }


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Fields of a config.json, each with its type."""

    values: dict[str, Any]
    where: str

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The field as `kind`; absent or null where `default` is None is an error."""
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "missing" if value is None else f"{value!r}"
            raise UserError(f"{self.where}: {name} is {found}; it must be of type {kind.__name__}")
        return value

    def only(self, name: str, allowed: tuple, default: Any, why: str) -> Any:
        value = self.values.get(name, default)
        value = default if value is None else value
        if value not in allowed:
            raise UserError(
                f"{self.where}: {name}={value!r} is not supported here ({why}); there are "
                f"{', '.join(map(repr, allowed))}"
            )
        return value


def _config(family: tensor_names.Family, fields: _Fields, folder, vocabulary_file) -> EncoderConfig:
    kinds = ("absolute", "rotary") if family is tensor_names.ESM else ("absolute",)
    kind = fields.only("position_embedding_type", kinds, "absolute", "no relative positions here")
    for name in ("is_decoder", "add_cross_attention", "is_folding_model"):
        fields.only(name, (False,), False, "this is an encoder with a masked-LM head")
    size = fields.get("vocab_size", int)
    text = tokenizer_files.read(folder, size, vocabulary_file, fields.values)
    known = vocabulary(text)
    pad = fields.get("pad_token_id", int, 0 if family is tensor_names.BERT else None)
    if pad != known.own_id(PAD):
        raise UserError(
            f"{fields.where}: pad_token_id is {pad}, the vocabulary's padding token has id "
            f"{known.own_id(PAD)}; they must agree, for positions are counted by it"
        )
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
    rows = fields.get("max_position_embeddings", int)
    if family is tensor_names.BERT:
        act = fields.only("hidden_act", tuple(BERT_ACTIVATIONS), "gelu", "other activation")
        activation = BERT_ACTIVATIONS[act]
        return EncoderConfig(
            norm="post",
            positions=rows,
            ffn_activation=activation,
            head_activation=activation,
            **shared,
        )
    mask = fields.values.get("mask_token_id")
    if mask is not None and mask != known.own_id(MASK):
        raise UserError(
            f"{fields.where}: mask_token_id is {mask}, the vocabulary's mask token has id "
            f"{known.own_id(MASK)}; they must agree"
        )
    return EncoderConfig(
        norm="pre",
        positions=rows if kind == "rotary" else rows - pad - 1,
        position_kind="rotary" if kind == "rotary" else "learned",
        embedding_norm=fields.get("emb_layer_norm_before", bool, False),
        token_dropout=fields.get("token_dropout", bool, False),
        ffn_activation="gelu_erf",
        head_activation="gelu_erf",
        **shared,
    )


def _padding(config: EncoderConfig, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    unread = ~vocabulary(config.vocabulary).predicted()
    return {
        name: np.ascontiguousarray(leaves[name][unread], np.float32)
        for name in ("token_embedding/embedding", "lm_head/bias")
    }


def _restore_padding(path: epath.Path, config: EncoderConfig, leaves: dict) -> None:
    """Puts the unread rows back, if they are of this shape: a folder may have been edited."""
    unread = ~vocabulary(config.vocabulary).predicted()
    for name, rows in load_safetensors(path.read_bytes()).items():
        if name in leaves and rows.shape == leaves[name][unread].shape:
            leaves[name][unread] = rows
