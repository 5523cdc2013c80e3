"""Files of other tools, checked as they are read: the fields of a config, which may be missing, of
another type or unknown here; and the tensors of a Hugging Face folder. Nothing in them is run."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable
from typing import Any

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
LARGEST = {int: 2**30, float: 2**63}  # what JAX and NumPy can compute with; a file may say more


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of another tool's config, each checked as it is read.

    values: by name. source: where they stand, for messages.
    """

    values: dict[str, Any]
    source: str

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The field as `kind`; absent or null where `default` is None is an error."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, int) and abs(value) > LARGEST.get(kind, math.inf):
            raise UserError(f"{self.source}: {name} is {shown(value)}, which no model has")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "missing" if value is None else shown(value)
            raise UserError(f"{self.source}: {name} is {found}; it must be of type {kind.__name__}")
        return value

    def choice(self, name: str, allowed: tuple, default: Any, why: str) -> Any:
        """The field, which must be one of `allowed`."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if value not in allowed:
            raise UserError(
                f"{self.source}: {name}={shown(value)} is not supported here ({why}); there are "
                f"{', '.join(map(repr, allowed))}"
            )
        return value


def shown(value: Any) -> str:
    """A value as messages show it: short, for a file may nest a list in itself a billion times."""
    if isinstance(value, int) and abs(value) > 2**63:
        return "beyond 2**63"
    return repr(value) if isinstance(value, (str, int, float)) else reprlib.repr(value)


def read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """All tensors by name, floats as fp32. Whole or in shards; safetensors before pickles.

    Raises UserError where there is none, or where a file is damaged or not only tensors.
    """
    for name, read in ((SAFETENSORS, read_safetensors), (PICKLE, read_torch)):
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
        shards = sorted(set(files.parse_json(index.read_text())["weight_map"].values()))
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


def read_torch(path: epath.Path, read: Callable = torch_file.read_table) -> Any:
    """What `read` makes of a file of `torch.save`; by default, tensors by name."""
    try:
        with files.open_weights(path) as file:
            return read(file, str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from None


def to_float32(value: np.ndarray) -> np.ndarray:
    """Floats of any size as fp32, anything else as it is."""
    other_floats = (np.float16, ml_dtypes.bfloat16, np.float64)
    return value.astype(np.float32) if value.dtype in other_floats else value
