"""Which tensor of another tool is which parameter here: by one table, in the tool's own module, for
both directions.

Linear layers are [outputs, inputs] there and [inputs, outputs] here; query, key and value are three
there and one product here; vocabulary rows stand in the order of the model's own ids there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np

from esm1nv_jax.checkpoints.model_folder import Weights, flatten, unflatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import PAD, vocabulary
from esm1nv_jax.model import encoder
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.lora import FUSED


@dataclasses.dataclass(frozen=True)
class Family:
    """The tensor names of one architecture. `modules` and `block_modules`: ours to theirs."""

    architecture: str
    config_name: str  # where its config stands, for messages
    modules: dict[str, str]
    layers: str  # the list of blocks
    block_modules: dict[str, str]
    token_embedding: str
    position_embedding: str
    lm_head_bias: str
    decoder: str  # the output matrix and its bias, which must be the tied ones where it is tied
    ignored: str  # a regular expression of tensors that a masked LM here has no use for
    contact_head: str = "esm.contact_head.regression"
    token_types: str = ""
    frequency: str = ""  # ends the name of the rotary frequencies, whichever module holds them
    positions_after_padding: bool = False  # position 0 is the row after that of the padding id


# Linear layers that are columns of one here: (layer here, which part, of how many).
PARTS = {name: ("qkv", i, 3) for i, name in enumerate(FUSED)}
PARTS |= {"gate": ("fc1", 0, 2), "up": ("fc1", 1, 2)}


def module_names(family: Family, config: EncoderConfig) -> Iterator[tuple[str, str]]:
    """(ours, theirs) of every LayerNorm and linear layer; query, key and value are three."""
    for ours, theirs in family.modules.items():
        if ours != "embedding_norm" or config.embedding_norm or config.norm == "post":
            yield ours, theirs
    for i in range(config.layers):
        for ours, theirs in family.block_modules.items():
            yield f"blocks/{i}/{ours}", f"{family.layers}.{i}.{theirs}"


def to_tensors(
    family: Family, config: EncoderConfig, params: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Tensors of a family from parameters such as `blocks/0/qkv/kernel`, or their gradients.

    Linear, and one to one but for rows of the vocabulary and of positions that nothing reads.
    """
    rows = list(vocabulary(config.vocabulary).rows)
    tensors = {
        family.token_embedding: params["token_embedding/embedding"][rows],
        family.lm_head_bias: params["lm_head/bias"][rows],
    }
    if config.position_kind == "learned":
        unread = first_position(family, config)
        table = np.asarray(params["position_embedding/embedding"])
        tensors[family.position_embedding] = np.pad(table, ((unread, 0), (0, 0)))
    if not config.tied_head:
        tensors[f"{family.decoder}.weight"] = params["lm_head/decoder/embedding"][rows]
    for i in range(config.layers if config.bias_kv else 0):
        for letter, bias in zip("kv", params[f"blocks/{i}/bias_kv"], strict=True):
            tensors[f"{family.layers}.{i}.self_attn.bias_{letter}"] = bias[None, None]
    for ours, theirs in module_names(family, config):
        path, _, name = ours.rpartition("/")
        layer, index, parts = PARTS.get(name, (name, 0, 1))
        here = f"{path}/{layer}" if path else layer
        for kind, there in (("scale", "weight"), ("kernel", "weight"), ("bias", "bias")):
            if f"{here}/{kind}" in params:
                split = np.split(params[f"{here}/{kind}"], parts, axis=-1)
                tensors[f"{theirs}.{there}"] = split[index].T
    return tensors


def from_tensors(
    family: Family, config: EncoderConfig, tensors: dict[str, np.ndarray], source: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(parameters by name, names of ignored tensors that are not zero): inverts `to_tensors`.

    Raises UserError that names the first tensor which is missing, unknown or of a wrong shape.
    """
    tensors = {_current_name(name): value for name, value in tensors.items()}
    frequency = _merge_derived(family, config, tensors, source)
    ignored = sorted(name for name in tensors if re.fullmatch(family.ignored, name))
    model, config_name = f"{family.architecture} with {config.layers} layers", family.config_name
    # Before `_expected`, which takes as long as the config means, and fails at a width of 2**30.
    if config.layers > len(tensors):
        raise UserError(
            f"{source}: there are {len(tensors):,} tensors, too few for {config.layers:,} layers; "
            f"{config_name} or weights belong to another model"
        )
    table = tensors.get(family.token_embedding)
    if table is not None and table.shape[1:] != (config.width,):
        raise UserError(
            f"{source}: tensor {family.token_embedding} has shape {table.shape}, {config_name} "
            f"means (tokens, {config.width})"
        )
    expected = _expected(family, config)
    for name in sorted((expected.keys() | tensors.keys()) - set(ignored)):
        if name not in tensors:
            raise UserError(f"{source}: tensor {name} is missing; {model} has it")
        if name not in expected:
            raise UserError(
                f"{source}: tensor {name} is unknown in {model}; {config_name} or weights belong "
                "to another model"
            )
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tensors[name].shape}, {config_name} means "
                f"{expected[name].shape}"
            )
        if tensors[name].dtype != np.float32:
            raise UserError(
                f"{source}: tensor {name} is of dtype {tensors[name].dtype}; a parameter must be "
                "of floats (is the model quantized?)"
            )
    params = frequency | _params(family, config, tensors)
    left_out = [n for n in ignored if not n.endswith("position_ids") and tensors[n].any()]
    return params, left_out


def to_weights(
    family: Family,
    config: EncoderConfig,
    tensors: dict[str, np.ndarray],
    source: str,
    path: str,
    contacts: dict[str, np.ndarray] | None = None,
) -> Weights:
    """The model of a file at `path` that holds an encoder and its masked-LM head.

    Raises UserError as `from_tensors` and `check_finite`; `source` is the file for messages.
    """
    params, left_out = from_tensors(family, config, tensors, source)
    check_finite(params, source)
    provenance = {
        "converted_from": path,
        "architecture": family.architecture,
        "tensors_left_out": left_out,
    }
    return Weights(unflatten(params), config, provenance, contact_head=contacts)


def check_finite(params: dict[str, np.ndarray], source: str) -> None:
    """Raises UserError that names the first parameter with NaN or infinity."""
    if nonfinite := [name for name, leaf in params.items() if not np.isfinite(leaf).all()]:
        raise UserError(
            f"{source}: what becomes {nonfinite[0]} holds NaN or infinity ({len(nonfinite)} such "
            f"of {len(params)}), and the model predicts nothing; get other weights"
        )


def fresh_lm_head(family: Family, config: EncoderConfig) -> dict[str, np.ndarray]:
    """Tensors of a masked-LM head that predicts all tokens alike, and can be trained."""
    encoder_name = family.layers.partition(".")[0] + "."
    return {
        name: np.full(like.shape, name.lower().endswith("norm.weight"), np.float32)
        for name, like in _expected(family, config).items()
        if not name.startswith(encoder_name)
    }


def _expected(family: Family, config: EncoderConfig) -> dict[str, np.ndarray]:
    """Tensors of a model, all zero, without memory behind them."""
    # `to_tensors` copies the table of positions, and a config may mean any size: here a small one.
    shapes = {
        name: np.broadcast_to(np.float32(0), leaf.shape)
        for name, leaf in flatten(
            encoder.abstract(dataclasses.replace(config, positions=3))
        ).items()
    }
    tensors = to_tensors(family, config, shapes)
    if config.position_kind == "learned":
        shape = config.positions + first_position(family, config), config.width
        tensors[family.position_embedding] = np.broadcast_to(np.float32(0), shape)
    return tensors


def first_position(family: Family, config: EncoderConfig) -> int:
    """The row of position 0."""
    if not family.positions_after_padding or config.position_kind == "rotary":
        return 0
    return 1 + vocabulary(config.vocabulary).own_id(PAD)


def _params(family, config, tensors) -> dict[str, np.ndarray]:
    known = vocabulary(config.vocabulary)
    rows = list(known.rows)
    by_token = {
        "token_embedding/embedding": family.token_embedding,
        "lm_head/bias": family.lm_head_bias,
    }
    if not config.tied_head:
        by_token["lm_head/decoder/embedding"] = f"{family.decoder}.weight"
    params = {}
    for ours, theirs in by_token.items():
        params[ours] = np.zeros((known.size, *tensors[theirs].shape[1:]), np.float32)
        params[ours][rows] = tensors[theirs]
    if config.position_kind == "learned":
        table = tensors[family.position_embedding]
        params["position_embedding/embedding"] = table[first_position(family, config) :]
    for ours, theirs in module_names(family, config):
        weight = tensors[f"{theirs}.weight"]
        params[f"{ours}/scale" if weight.ndim == 1 else f"{ours}/kernel"] = weight.T
        if f"{theirs}.bias" in tensors:
            params[f"{ours}/bias"] = tensors[f"{theirs}.bias"]
    for i in range(config.layers):
        for layer, kind in itertools.product(("qkv", "fc1"), ("kernel", "bias")):
            names = [f"blocks/{i}/{name}/{kind}" for name in PARTS if PARTS[name][0] == layer]
            if names[0] in params:
                parts = [params.pop(name) for name in names]
                params[f"blocks/{i}/{layer}/{kind}"] = np.concatenate(parts, axis=-1)
        if config.bias_kv:
            biases = [tensors[f"{family.layers}.{i}.self_attn.bias_{part}"] for part in "kv"]
            params[f"blocks/{i}/bias_kv"] = np.stack(biases)[:, 0, 0]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in params.items()}


def _current_name(name: str) -> str:
    """`LayerNorm.gamma` and `.beta`, as older files have them, are `.weight` and `.bias`."""
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{old}"):
            return name.removesuffix(old) + new
    return name


def _merge_derived(family, config, tensors, source) -> dict[str, np.ndarray]:
    """Removes from `tensors` what is no parameter of its own: copies of tied ones, token types,
    rotary frequencies. Returns the last as a parameter here."""
    copies = {f"{family.decoder}.bias": family.lm_head_bias}
    if config.tied_head:
        copies[f"{family.decoder}.weight"] = family.token_embedding
    for tied, to in copies.items():
        copy = tensors.pop(tied, None)
        if copy is not None and not np.array_equal(copy, tensors.setdefault(to, copy)):
            raise UserError(
                f"{source}: {tied} differs from {to}; here the output matrix is the embedding "
                "(tied), so this model cannot be read"
            )
    if family.token_types:
        types = tensors.pop(family.token_types, None)
        positions = tensors.get(family.position_embedding)
        if types is None or types.ndim != 2 or types.shape[1] != config.width or not len(types):
            shape = "missing" if types is None else f"of shape {types.shape}"
            raise UserError(
                f"{source}: tensor {family.token_types} is {shape}; a {family.architecture} has "
                f"(token types, {config.width})"
            )
        if positions is not None and positions.shape[-1:] == (config.width,):
            # A single sequence is all of token type 0. Into the positions, for tokens are tied.
            tensors[family.position_embedding] = positions + types[0]
    if config.position_kind != "rotary":
        return {}
    tensors.pop(family.position_embedding, None)  # in the files of ESM-2, never read
    # One for the model, one in each layer, or (transformers 5) one for layer `*`: all equal.
    names = [name for name in tensors if name.endswith(family.frequency)]
    frequencies = [tensors.pop(name) for name in names]
    size = config.head_size // 2
    if not names:
        raise UserError(
            f"{source}: no tensor {family.frequency} is there; {family.architecture} has it"
        )
    for name, frequency in zip(names, frequencies, strict=True):
        if frequency.shape != (size,) or not np.array_equal(frequency, frequencies[0]):
            raise UserError(
                f"{source}: tensor {name} must hold {size} angles, the same in every layer; it has "
                f"shape {frequency.shape}, or other values than {names[0]}"
            )
    return {"rotary_frequency": frequencies[0]}
