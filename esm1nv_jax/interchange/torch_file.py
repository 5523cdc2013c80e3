"""Reads a file of `torch.save` without torch, and never runs what is in it.

Such a file is a pickle, which is a program, with the numbers of its tensors beside it. Here the
program can only build dictionaries, lists, numbers, strings, objects without methods where it has
an `argparse.Namespace`, and descriptions of tensors. Any other class or function is refused by
name. NumPy then reads the numbers.
"""

from __future__ import annotations

import argparse
import collections
import functools
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from esm1nv_jax.common.errors import UserError

# Storage classes of torch by the dtype of their numbers.
STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6, which is no zip archive
DAMAGE = (
    *(OSError, EOFError, pickle.PickleError, zipfile.BadZipFile, struct.error, RuntimeError),
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError),
)


class _Tensor(NamedTuple):
    """A tensor in the storage `key`; offset and strides count elements."""

    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle names a class or function that is not allowed."""


def read(file: IO[bytes], source: str) -> Any:
    """The object that was saved: tensors as NumPy arrays, a Namespace as a dictionary.

    Args:
      file: binary and seekable, in either format of torch.save.
      source: the name of the file, for messages.

    Raises UserError where the file is damaged, or holds more than tensors and plain values.
    """
    try:
        start = file.read(2)
        size = file.seek(0, 2)
        file.seek(0)
        if start == b"PK":
            value, storage = _read_zip(file, size)
        else:
            value, storage = _read_legacy(file)
        return _to_arrays(value, storage, size)
    except _RefusedError as error:
        raise UserError(
            f"{source} holds more than tensors and is refused ({error}); ask its author for a file "
            "of tensors only, such as model.safetensors"
        ) from None
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{source} cannot be read ({reason}); fetch it again") from None


def read_table(file: IO[bytes], source: str) -> dict[str, np.ndarray]:
    """Tensors by name, which is all that a file of a `state_dict` holds; as `read`."""
    table = read(file, source)
    tensors = table if isinstance(table, dict) else {}
    if not tensors or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise UserError(
            f"{source} is not a table of tensors by name; ask its author for model.safetensors"
        )
    return {str(name): value for name, value in tensors.items()}


class _Unpickler(pickle.Unpickler):
    """Builds plain values and `_Tensor`s. `dtypes`: of the storages, by key."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.dtypes: dict[str, np.dtype] = {}
        # Made anew for each file, for a pickle may set attributes of what it is given.
        self.allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("argparse", "Namespace"): type("Namespace", (argparse.Namespace,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): (
                lambda key, offset, shape, strides, *_: _Tensor(key, offset, shape, strides)
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if (module, name) not in self.allowed:
            raise _RefusedError(f"it names {ascii(f'{module}.{name}')[1:-1]}"[:100])
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> str:
        kind, storage_class, key, *more = pid
        if kind != "storage" or any(more[2:]):  # of torch before 0.4, a part of another storage
            raise _RefusedError("it names something outside the file")
        self.dtypes[key] = STORAGES[storage_class]
        return key


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, np.dtype]]:
    """(value, dtypes of its storages) of the pickle that begins here."""
    start, entries = file.tell(), 0
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") and isinstance(argument, int):
            entries += 1
            # The memo is an array, and a pickle of ten bytes may ask for 64 GiB of it.
            if argument > 2 * entries + 1000:
                raise ValueError(f"entry {argument} of its memo comes after {entries}")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.dtypes


def _read_zip(file: IO[bytes], size: int) -> tuple[Any, Callable[[str], np.ndarray]]:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    records = archive.infolist()
    # Without compression, and where records do not overlap, all are no larger than the file.
    is_larger = sum(record.file_size for record in records) > size
    if len(names) != 1 or is_larger or any(record.compress_type for record in records):
        raise ValueError("it is a zip archive, but not of torch.save")
    value, dtypes = _unpickle(io.BytesIO(archive.read(names[0])))

    @functools.cache
    def storage(key: str) -> np.ndarray:
        name = names[0].removesuffix("data.pkl") + f"data/{key}"
        return np.frombuffer(archive.read(name), dtypes[key])

    return value, storage


def _read_legacy(file: IO[bytes]) -> tuple[Any, Callable[[str], np.ndarray]]:
    if _unpickle(file)[0] != LEGACY_MAGIC:
        raise ValueError("it is not a file of torch.save")
    for _ in range(2):  # version; sizes of C types
        _unpickle(file)
    value, dtypes = _unpickle(file)
    storages = {}
    for key in _unpickle(file)[0]:
        (count,) = struct.unpack("<Q", file.read(8))
        dtype = dtypes[key]
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return value, storages.__getitem__


def _to_arrays(value: Any, storage: Callable[[str], np.ndarray], size: int) -> Any:
    """The value with arrays for tensors, of a file of `size` bytes."""
    # Parts by identity, for a small pickle may hold one list a billion times.
    done: dict[int, Any] = {}
    numbers = 0

    def convert(value: Any) -> Any:
        nonlocal numbers
        if id(value) in done:
            return done[id(value)]
        result = value
        if isinstance(value, _Tensor):
            result = _to_array(value, storage(value.key))
            numbers += result.size
            if numbers > 2 * size:  # tied tensors share a storage, but not all with all
                raise ValueError("its tensors are many times larger than the file")
        elif isinstance(value, (dict, argparse.Namespace)):
            table = value if isinstance(value, dict) else vars(value)
            result = {key: convert(part) for key, part in table.items()}
        elif isinstance(value, (list, tuple)):
            result = [convert(part) for part in value]
        done[id(value)] = result
        return result

    return convert(value)


def _to_array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    _, offset, shape, strides = tensor
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        raise ValueError("offset, shape and strides of a tensor must be positive integers")
    end = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count > len(numbers) or (count and end > len(numbers)):
        raise ValueError(f"a tensor of shape {shape} is larger than its storage")
    in_bytes = [stride * numbers.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, in_bytes)
    return np.ascontiguousarray(view).reshape(shape)
