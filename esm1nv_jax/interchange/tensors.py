"""Reads the tensor files of a Hugging Face folder, and never runs what is in them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, deserialize

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import torch_file

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
# `safetensors.numpy` does not read bfloat16, so the names of dtypes are looked up here.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """All tensors by name, floats as fp32. Whole or in shards; safetensors before pickles.

    Raises UserError where there is none, or where a file is damaged or not only tensors.
    """
    for name, read in ((SAFETENSORS, read_safetensors), (PICKLE, _read_pickle)):
        shards = _shards(folder, name)
        if not shards:
            continue
        for file in shards:
            if not (folder / file).exists():
                raise UserError(
                    f"{folder / file} is missing, {name}.index.json names it; fetch it again"
                )
        tensors: dict[str, np.ndarray] = {}
        for file in shards:
            tensors |= read(folder / file)
        return {key: to_float32(value) for key, value in tensors.items()}
    raise UserError(
        f"{folder} has a config.json but no weights: neither {SAFETENSORS} nor {PICKLE}"
    )


def _shards(folder: epath.Path, name: str) -> list[str]:
    if (folder / name).exists():
        return [name]
    index = folder / f"{name}.index.json"
    if not index.exists():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of shards; fetch the folder again") from None
    outside = [file for file in shards if "/" in str(file) or "\\" in str(file)]
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is not in the folder")
    return shards


def read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of one file, as they are. Raises UserError where it is damaged."""
    try:
        views = deserialize(files.read_weights(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
    for name, view in views:
        if view["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} is of dtype {view['dtype']}; there are {', '.join(DTYPES)}"
            )
    return {
        name: np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])
        for name, view in views
    }


def _read_pickle(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with files.open_weights(path) as file:
            return torch_file.read_table(file, str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None


def to_float32(value: np.ndarray) -> np.ndarray:
    """Floats of any size as fp32, anything else as it is."""
    other_floats = (np.float16, ml_dtypes.bfloat16, np.float64)
    return value.astype(np.float32) if value.dtype in other_floats else value
