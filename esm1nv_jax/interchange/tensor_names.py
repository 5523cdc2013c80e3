"""Which tensor of `transformers` is which parameter here. One table for both directions.

Linear layers are [outputs, inputs] there and [inputs, outputs] here; query, key and value are three
there and one product here; vocabulary rows stand in the order of the model's own ids there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from esm1nv_jax.checkpoints.model_folder import flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import PAD
from esm1nv_jax.data.vocabulary import vocabulary
from esm1nv_jax.model import encoder


@dataclasses.dataclass(frozen=True)
class Family:
    """The names of one architecture. Outer and inner modules: ours to theirs."""

    model_type: str
    architecture: str
    stem: str
    outer: dict[str, str]
    inner: dict[str, str]
    token_embedding: str
    position_embedding: str
    head_bias: str
    decoder: str  # names of the output matrix and its bias, which must be the tied ones
    left_out: str  # a regular expression of tensors that a masked-LM here has no use for


_INNER = {
    "qkv": "attention.self",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
ESM = Family(
    model_type="esm",
    architecture="EsmForMaskedLM",
    stem="esm",
    outer={
        "final_norm": "esm.encoder.emb_layer_norm_after",
        "embedding_norm": "esm.embeddings.layer_norm",
        "lm_head/dense": "lm_head.dense",
        "lm_head/layer_norm": "lm_head.layer_norm",
    },
    inner=_INNER | {"attention_norm": "attention.LayerNorm", "ffn_norm": "LayerNorm"},
    token_embedding="esm.embeddings.word_embeddings.weight",
    position_embedding="esm.embeddings.position_embeddings.weight",
    head_bias="lm_head.bias",
    decoder="lm_head.decoder",
    left_out=r"esm\.(contact_head|pooler)\..*|.*\.position_ids",
)
BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    stem="bert",
    outer={
        "embedding_norm": "bert.embeddings.LayerNorm",
        "lm_head/dense": "cls.predictions.transform.dense",
        "lm_head/layer_norm": "cls.predictions.transform.LayerNorm",
    },
    inner=_INNER | {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"},
    token_embedding="bert.embeddings.word_embeddings.weight",
    position_embedding="bert.embeddings.position_embeddings.weight",
    head_bias="cls.predictions.bias",
    decoder="cls.predictions.decoder",
    left_out=r"bert\.pooler\..*|.*\.position_ids|cls\.(?!predictions\.).*",
)
FAMILIES = {family.model_type: family for family in (ESM, BERT)}
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
FREQUENCY = "rotary_embeddings.inv_freq"  # ends the name, whichever module holds it
_QKV = ("query", "key", "value")


def modules(family: Family, config: encoder.EncoderConfig) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of every LayerNorm and linear layer, qkv as one."""
    for ours, theirs in family.outer.items():
        if family is BERT or ours != "embedding_norm" or config.embedding_norm:
            yield ours, theirs
    for i in range(config.layers):
        for ours, theirs in family.inner.items():
            yield f"blocks/{i}/{ours}", f"{family.stem}.encoder.layer.{i}.{theirs}"


def to_theirs(
    family: Family, config: encoder.EncoderConfig, leaves: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Tensors of `transformers` from leaves such as `blocks/0/qkv/kernel`, or their gradients.

    Linear, and one to one but for rows of the vocabulary and of positions that nothing reads.
    """
    rows = list(vocabulary(config.vocabulary).rows)
    found = {
        family.token_embedding: leaves["token_embedding/embedding"][rows],
        family.head_bias: leaves["lm_head/bias"][rows],
    }
    if config.position_kind == "learned":
        before = first_position(family, config)
        table = np.asarray(leaves["position_embedding/embedding"])
        found[family.position_embedding] = np.pad(table, ((before, 0), (0, 0)))
    for ours, theirs in modules(family, config):
        if ours.endswith("qkv"):
            kernels = np.split(leaves[f"{ours}/kernel"], 3, axis=1)
            biases = np.split(leaves[f"{ours}/bias"], 3)
            for part, kernel, bias in zip(_QKV, kernels, biases, strict=True):
                found |= {f"{theirs}.{part}.weight": kernel.T, f"{theirs}.{part}.bias": bias}
        else:
            norm = f"{ours}/scale" in leaves
            weight = leaves[f"{ours}/scale"] if norm else leaves[f"{ours}/kernel"].T
            found |= {f"{theirs}.weight": weight, f"{theirs}.bias": leaves[f"{ours}/bias"]}
    return found


def to_ours(
    family: Family, config: encoder.EncoderConfig, tensors: dict[str, np.ndarray], where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(leaves by our names, names of tensors left out that hold anything), inverse of `to_theirs`.

    Raises UserError that names the first tensor which is missing, unknown or of a wrong shape.
    """
    tensors = {_modern(name): value for name, value in tensors.items()}
    special = _take_special(family, config, tensors, where)
    left_out = sorted(name for name in tensors if re.fullmatch(family.left_out, name))
    shapes = {  # our shapes without memory behind them, named as theirs
        name: np.broadcast_to(np.float32(0), leaf.shape)
        for name, leaf in flatten(encoder.abstract(config)).items()
    }
    expected = to_theirs(family, config, shapes)
    for name in sorted((expected.keys() | tensors.keys()) - set(left_out)):
        if name not in tensors:
            raise UserError(
                f"{where}: tensor {name} is missing; a {family.architecture} with "
                f"{config.layers} layers has it"
            )
        if name not in expected:
            raise UserError(
                f"{where}: tensor {name} is unknown in a {family.architecture} with "
                f"{config.layers} layers; config.json or weights belong to another model"
            )
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tensors[name].shape}, config.json means "
                f"{expected[name].shape}"
            )
        if tensors[name].dtype != np.float32:
            raise UserError(
                f"{where}: tensor {name} is of dtype {tensors[name].dtype}; a parameter must be of "
                "floats (is the model quantized?)"
            )
    lost = [name for name in left_out if not name.endswith("position_ids") and tensors[name].any()]
    return special | _joined(family, config, tensors), lost


def first_position(family: Family, config: encoder.EncoderConfig) -> int:
    """The row of position 0: ESM's count begins behind the padding id, BERT's at 0."""
    if family is BERT or config.position_kind == "rotary":
        return 0
    return 1 + vocabulary(config.vocabulary).own_id(PAD)


def _joined(family, config, tensors) -> dict[str, np.ndarray]:
    known = vocabulary(config.vocabulary)
    rows = list(known.rows)
    token_embedding = np.zeros((known.size, config.width), np.float32)
    head_bias = np.zeros(known.size, np.float32)
    token_embedding[rows] = tensors[family.token_embedding]
    head_bias[rows] = tensors[family.head_bias]
    found = {"token_embedding/embedding": token_embedding, "lm_head/bias": head_bias}
    if config.position_kind == "learned":
        table = tensors[family.position_embedding]
        found["position_embedding/embedding"] = table[first_position(family, config) :]
    for ours, theirs in modules(family, config):
        if ours.endswith("qkv"):
            weights, biases = (
                [tensors[f"{theirs}.{part}.{kind}"] for part in _QKV] for kind in ("weight", "bias")
            )
            found[f"{ours}/kernel"] = np.concatenate([weight.T for weight in weights], axis=1)
            found[f"{ours}/bias"] = np.concatenate(biases)
        else:
            weight = tensors[f"{theirs}.weight"]
            kernel = {f"{ours}/scale": weight} if weight.ndim == 1 else {f"{ours}/kernel": weight.T}
            found |= kernel | {f"{ours}/bias": tensors[f"{theirs}.bias"]}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def _modern(name: str) -> str:
    """`LayerNorm.gamma` and `.beta`, as some files have them, are `.weight` and `.bias`."""
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{old}"):
            return name.removesuffix(old) + new
    return name


def _take_special(family, config, tensors, where) -> dict[str, np.ndarray]:
    """Takes out of `tensors` what is no parameter of its own: tied copies, token types, angles."""
    embedding, bias = family.token_embedding, family.head_bias
    for tied, to in ((f"{family.decoder}.weight", embedding), (f"{family.decoder}.bias", bias)):
        copy = tensors.pop(tied, None)
        if copy is not None and not np.array_equal(copy, tensors.setdefault(to, copy)):
            raise UserError(
                f"{where}: {tied} differs from {to}; here the output matrix is the embedding "
                "(tied), so this model cannot be read"
            )
    found = {}
    if config.position_kind == "rotary":
        tensors.pop(family.position_embedding, None)  # in the files of ESM-2, never read
        # One for the model, one in each layer, or (transformers 5) one for layer `*`: all equal.
        names = [name for name in tensors if name.endswith(FREQUENCY)]
        angles = [tensors.pop(name) for name in names]
        head_size = config.width // config.heads
        for name, angle in zip(names, angles, strict=True):
            if angle.shape != (head_size // 2,) or not np.array_equal(angle, angles[0]):
                raise UserError(
                    f"{where}: tensor {name} must hold {head_size // 2} angles, the same in every "
                    f"layer; found shape {angle.shape}, or others than in {names[0]}"
                )
        found["rotary_frequency"] = angles[0]
    if family is BERT:
        types = tensors.pop(TOKEN_TYPES, None)
        positions = tensors.get(family.position_embedding)
        if types is None or types.ndim != 2 or types.shape[1] != config.width:
            shape = "missing" if types is None else f"of shape {types.shape}"
            raise UserError(
                f"{where}: tensor {TOKEN_TYPES} is {shape}; a BertForMaskedLM has "
                f"(token types, {config.width})"
            )
        if positions is not None and positions.shape[-1] == config.width:
            # One sequence is all of token type 0. Into the positions: the tokens are tied.
            tensors[family.position_embedding] = positions + types[0]
    return found
