"""Reads the tensor files of a Hugging Face folder, and never runs what is in them."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, deserialize

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError

SAFE_TORCH = (2, 6)  # before it, `weights_only=True` could be circumvented
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
        files = _shards(folder, name)
        if not files:
            continue
        for file in files:
            if not (folder / file).exists():
                raise UserError(
                    f"{folder / file} is missing, {name}.index.json names it; fetch it again"
                )
        tensors: dict[str, np.ndarray] = {}
        for file in files:
            tensors |= read(folder / file)
        return {key: _to_float32(value) for key, value in tensors.items()}
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
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path} is a pickle, which only PyTorch reads safely: pip install torch, or save the "
            f"model as {SAFETENSORS}"
        )
    import torch  # optional, and slow to import

    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise UserError(
            f"{path} is a pickle, and torch {torch.__version__} can be made to run one "
            "(CVE-2025-32434): pip install 'torch>=2.6'"
        )
    try:
        # Without `weights_only` a pickle can run any program; there is no option to allow it.
        weights = io.BytesIO(files.read_weights(path))
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors and is refused ({reason}); ask its author for "
            f"{SAFETENSORS}"
        ) from None
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "empty"
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from None
    tensors = content.items() if isinstance(content, dict) else ()
    if not tensors or not all(isinstance(value, torch.Tensor) for _, value in tensors):
        raise UserError(
            f"{path} is not a table of tensors by name; ask its author for {SAFETENSORS}"
        )
    return {
        str(key): (value.float() if value.is_floating_point() else value).numpy()
        for key, value in tensors
    }


def _to_float32(value: np.ndarray) -> np.ndarray:
    other_floats = (np.float16, ml_dtypes.bfloat16, np.float64)
    return value.astype(np.float32) if value.dtype in other_floats else value
