"""A `.nemo` file of NeMo 1.x: ESM-1nv as NVIDIA released it, or another MegatronBertModel.

It is a tar, plain or compressed, of model_config.yaml, model_weights.ckpt (a file of `torch.save`)
and the SentencePiece model of its tokenizer. Members are read by name into memory, each up to a
limit, and nothing is unpacked onto the disk.
"""

from __future__ import annotations

import dataclasses
import io
import lzma
import posixpath
import tarfile
import zlib
from typing import Any

import numpy as np
import yaml
from etils import epath
from google.protobuf import empty_pb2, message, unknown_fields

from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.interchange import tensor_names, tokenizer_files, tool_files, torch_file
from esm1nv_jax.interchange.tensor_names import Family
from esm1nv_jax.interchange.tool_files import ConfigFields
from esm1nv_jax.model.encoder import parameter_count
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.lora import FUSED

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
MAX_TEXT = 2**20  # bytes of a config or a tokenizer
MAX_MEMBERS = 10_000
MAX_COMPRESSION = 100  # of weights, which no program compresses so; of zeros it is a thousand
HEADER_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
CLASSES = ("ESM1nvModel", "MegatronBertModel")
FUSED_QKV = "self_attention.query_key_value"
# What NeMo's model may do otherwise, and this one does not.
FIXED: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "mcore_bert": False,
    "position_embedding_type": "learned_absolute",
    "embedding_token_dropout": False,
    "normalize_attention_scores": True,
    "share_embeddings_and_output_weights": True,
}
MEGATRON = Family(
    architecture="MegatronBertModel",
    config_name=CONFIG,
    modules={
        "final_norm": "language_model.encoder.final_layernorm",
        "lm_head/dense": "lm_head.dense",
        "lm_head/layer_norm": "lm_head.layernorm",
    },
    layers="language_model.encoder.layers",
    block_modules={name: f"{FUSED_QKV}.{name}" for name in FUSED}
    | {
        "attention_norm": "input_layernorm",
        "out_proj": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "fc1": "mlp.dense_h_to_4h",
        "fc2": "mlp.dense_4h_to_h",
    },
    token_embedding="language_model.embedding.word_embeddings.weight",
    position_embedding="language_model.embedding.position_embeddings.weight",
    lm_head_bias="lm_head.bias",
    decoder="lm_head.decoder",
    ignored=r"language_model\.pooler\..*|binary_head\..*",
    token_types="language_model.embedding.tokentype_embeddings.weight",
)


def read(path: str) -> Weights:
    """Weights of a `.nemo` file.

    Raises UserError that names what is missing, unknown, damaged, or cannot be expressed here.
    """
    try:
        with (
            files.open_weights(epath.Path(path)) as file,
            tarfile.open(fileobj=file, mode="r:*", tarinfo=_Member) as archive,
        ):
            return _read(archive, path, epath.Path(path).stat().length)
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or no tar"
        raise UserError(
            f"{path} cannot be read as a .nemo file ({reason}); fetch it again"
        ) from None


class _Member(tarfile.TarInfo):
    """A member, or a header before it, which `tarfile` reads whole whatever its size."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in HEADER_TYPES and member.size > MAX_TEXT):
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file")
        return member


def _read(archive: tarfile.TarFile, path: str, size: int) -> Weights:
    members: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(archive):
        members[posixpath.normpath(member.name)] = member
        if number >= MAX_MEMBERS:
            raise UserError(f"{path} has more than {MAX_MEMBERS:,} members; it is no .nemo file")

    def content(name: str, limit: int) -> bytes:
        member = members.get(name)
        if member is None or not member.isfile():
            raise UserError(
                f"{path} has no file {name}; a .nemo file of NeMo 1.x holds it (of a distributed "
                "checkpoint, or one split for model parallelism, make a single one with NeMo first)"
            )
        if member.size > limit:
            raise UserError(
                f"{path}: {name} has {member.size:,} bytes, more than the {limit:,} that this "
                "model can need"
            )
        stream = archive.extractfile(member)
        data = stream.read() if stream else b""
        if len(data) != member.size:
            raise UserError(f"{path} is truncated in {name}; fetch it again")
        return data

    fields = _config_fields(content(CONFIG, MAX_TEXT), f"{path}: {CONFIG}")
    tokenizer = ConfigFields(fields.get("tokenizer", dict), f"{fields.source}: tokenizer")
    tokenizer.choice("library", ("sentencepiece",), None, "one token a residue")
    # `nemo:` and a hash before the name, or in older files the path it had.
    name = posixpath.basename(tokenizer.get("model", str).removeprefix("nemo:"))
    tokens = _sentence_pieces(content(name, MAX_TEXT), f"{path}: {name}")
    config = _encoder_config(fields, " ".join(tokens))
    # Eight bytes a parameter, and names. Of one layer, for the config may mean a billion.
    count = config.layers * parameter_count(dataclasses.replace(config, layers=1))
    weights = content(WEIGHTS, min(8 * count + 2**24, MAX_COMPRESSION * size))
    source = f"{path}: {WEIGHTS}"
    state = torch_file.read_table(io.BytesIO(weights), source)
    return tensor_names.to_weights(
        MEGATRON, config, _split(state, fields, config, source), source, path
    )


def _config_fields(content: bytes, source: str) -> ConfigFields:
    try:
        # A text of one line may repeat a part of it a billion times; NeMo writes none that does.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content)):
            raise ValueError("it has aliases")
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{source} is not YAML ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} is not a table of fields")
    fields = ConfigFields(values, source)
    target = fields.get("target", str, CLASSES[0])
    if target.rpartition(".")[2] not in CLASSES:
        raise UserError(f"{source}: target is {target!r}; there are {', '.join(CLASSES)}")
    for name, value in FIXED.items():
        fields.choice(name, (value,), value, "this is a BERT of one device")
    return fields


def _encoder_config(fields: ConfigFields, tokens: str) -> EncoderConfig:
    width, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    fields.choice("kv_channels", (None, width // max(heads, 1)), None, "heads share the width")
    fused = fields.get("bias_gelu_fusion", bool, True)  # its kernel has the tanh form
    return EncoderConfig(
        layers=fields.get("num_layers", int),
        width=width,
        heads=heads,
        ffn=fields.get("ffn_hidden_size", int),
        positions=fields.get("max_position_embeddings", int),
        norm="pre",
        ffn_activation="gelu_tanh" if fused else "gelu_erf",
        head_activation="gelu_erf",
        dropout=fields.get("hidden_dropout", float, 0.1),
        attention_dropout=fields.get("attention_dropout", float, 0.1),
        norm_epsilon=fields.get("layernorm_epsilon", float, 1e-5),
        vocabulary=tokens,
    )


def _sentence_pieces(content: bytes, source: str) -> list[str]:
    """The tokens by id: field 1 of a SentencePiece model is a piece, whose field 1 is its text."""

    def values(data: bytes) -> list[bytes]:
        fields = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(data))
        return [f.data for f in fields if f.field_number == 1 and isinstance(f.data, bytes)]

    try:
        return [values(piece)[0].decode("utf-8") for piece in values(content)]
    except (message.DecodeError, IndexError, ValueError):
        raise UserError(f"{source} is not a model of SentencePiece; fetch the file again") from None


def _split(state, fields: ConfigFields, config: EncoderConfig, source: str) -> dict:
    """The tensors of `MEGATRON`: query, key and value apart, rows of the vocabulary's padding off.

    The rows of the fused product are [heads, 3, head size]; with `megatron_legacy`, [3, heads, head
    size].
    """
    legacy = fields.get("megatron_legacy", bool, False)
    # `module` is the wrapper of training with `megatron_amp_O2`.
    split = {
        name.removeprefix("model.").removeprefix("module."): tool_files.to_float32(value)
        for name, value in state.items()
    }
    N, H, D = config.heads, config.head_size, config.width
    for i in range(config.layers):
        for kind, shape in (("weight", (3 * D, D)), ("bias", (3 * D,))):
            name = f"{MEGATRON.layers}.{i}.{FUSED_QKV}"
            fused = split.pop(f"{name}.{kind}", None)
            if fused is None or fused.shape != shape:
                found = "missing" if fused is None else f"of shape {fused.shape}"
                raise UserError(
                    f"{source}: tensor {name}.{kind} is {found}; {CONFIG} means {shape}"
                )
            by_head = fused.reshape((3, N, H, -1) if legacy else (N, 3, H, -1))
            parts = np.moveaxis(by_head, 0 if legacy else 1, 0)
            for part, values in zip(FUSED, parts, strict=True):
                split[f"{name}.{part}.{kind}"] = values.reshape(D, *shape[1:])
    tokens = len(vocabulary(config.vocabulary).tokens)
    for name in (MEGATRON.token_embedding, MEGATRON.lm_head_bias):
        rows = split[name].shape[:1] if name in split else ()
        if rows and tokens <= rows[0] <= tokens + tokenizer_files.MAX_UNUSED_ROWS:
            split[name] = split[name][:tokens]
    if not fields.get("bert_binary_head", bool, True):
        split[MEGATRON.token_types] = np.zeros((1, D), np.float32)
    return split
