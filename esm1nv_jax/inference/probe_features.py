"""What the heads of `esm1nv probe` are trained on: one-hot residues, or an encoder's states.

Embeddings are kept on disk between runs, so that a second probe of a model embeds nothing. One file
for each (model, proteins, kind of embedding), named by a digest of all that decides its content:
the array as NumPy writes it, then its SHA-256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.common.console import bar
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.labeled_data import Split, Task
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.probe_heads import LabeledFeatures
from esm1nv_jax.model import encoder

KINDS = ONE_HOT, UNTRAINED, TRAINED = "one-hot", "untrained encoder", "this encoder"
CHUNK = 256  # proteins embedded together
LIMIT = 10 << 30  # bytes of all files together; the least recently used are deleted first


def features(
    kind: str,
    model: Model,
    task: Task,
    seed: int,
    progress: bool = False,
    cache: EmbeddingCache | None = None,
    layer: int = -1,
    names: Sequence[str] = ("train", "valid", "test"),
) -> dict[str, LabeledFeatures]:
    """Features of the splits `names`, from `cache` where it has them. `seed` is that of the
    untrained encoder."""
    if kind == UNTRAINED:
        model = dataclasses.replace(model, params=encoder.init(model.config, seed))
    splits = {name: getattr(task, name) for name in names}
    if kind == ONE_HOT:
        return {n: LabeledFeatures(s, one_hot(s, task.per_residue)) for n, s in splits.items()}
    total = sum(len(sequence) for split in splits.values() for sequence in split.sequences)
    digest = model_digest(model) if cache else ""
    pooling = "per_residue" if task.per_residue else "mean"
    pooling += f"_{layer}" * (layer != -1)
    of_layer = f", layer {layer}" * (layer != -1)
    with bar(f"embed by {kind}{of_layer}", total, "residues", progress) as task_bar:

        def embedded(split: Split) -> np.ndarray:
            key = key_of(digest, split.sequences, pooling)
            if cache and (kept := cache.read(key)) is not None:
                task_bar.advance(sum(map(len, split.sequences)))
                return kept
            array = embeddings(model, split, task.per_residue, task_bar.advance, layer)
            if cache:
                cache.write(key, array)
            return array

        return {name: LabeledFeatures(split, embedded(split)) for name, split in splits.items()}


def one_hot(split: Split, per_residue: bool) -> np.ndarray:
    """float32 [k, 30]: of each residue, or their mean over a protein."""
    eye = np.eye(tokenizer.VOCABULARY, dtype=np.float32)
    if per_residue:
        return eye[tokenizer.residue_ids(b"".join(split.sequences))].astype(np.float16)
    return np.stack([eye[tokenizer.residue_ids(s)].mean(axis=0) for s in split.sequences])


def embeddings(
    model: Model,
    split: Split,
    per_residue: bool,
    on_progress: Callable[[int], None] = lambda residues: None,
    layer: int = -1,
) -> np.ndarray:
    """Hidden states of a layer, by default the last after the final LayerNorm: float16 [residues,
    D], or the mean over residues, float32 [proteins, D]."""
    kind, dtype = ("per_residue", "float16") if per_residue else ("mean", "float32")
    outputs = OutputSpec((kind,), (layer,), dtype)
    ids = [tokenizer.residue_ids(sequence) for sequence in split.sequences]
    parts = []
    for i in range(0, len(ids), CHUNK):
        some = ids[i : i + CHUNK]
        arrays = embed_sequences(model.on_devices, some, outputs, model.longest)
        parts.append(arrays[f"{kind}_{layer}"])
        on_progress(sum(map(len, some)))
    states = np.concatenate(parts)
    if not np.isfinite(states).all():
        raise UserError(
            f"hidden states of layer {layer} are not finite in {dtype}; leave the layer out by "
            "--layers, or check the checkpoint"
        )
    return states


class EmbeddingCache:
    """A folder of arrays by key. A disk that fails costs time, never a run."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    def read(self, key: str) -> np.ndarray | None:
        """Return the array of `key`; None where there is none, or none that is whole."""
        path = self.folder / f"{key}.npy"
        try:
            with open(path, "rb") as file:
                array = np.load(file, allow_pickle=False)
                if file.read() != _digest(array):
                    return None
            os.utime(path)  # used last
            return array
        except (OSError, ValueError, EOFError):
            return None

    def write(self, key: str, array: np.ndarray) -> None:
        """Keep an array, unless it is larger than the limit or the disk refuses it."""
        if array.nbytes > self.limit:
            return
        path = self.folder / f"{key}.npy"
        part = path.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                np.save(file, array)
                file.write(_digest(array))
            part.replace(path)
            self._delete_old()
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def _delete_old(self) -> None:
        status = {path: path.stat() for path in self.folder.iterdir()}
        total = sum(s.st_size for s in status.values())
        for path in sorted(status, key=lambda path: status[path].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= status[path].st_size


def model_digest(model: Model) -> str:
    """Return a digest of what a model computes: parameters, architecture, precision, crop."""
    facts = (__version__, model.config, model.arithmetic, model.longest, jax.default_backend())
    return hashlib.sha256(f"{facts} {model.digest}".encode()).hexdigest()


def key_of(model: str, sequences: Iterable[bytes], kind: str) -> str:
    """Return the key of one kind of embeddings of proteins by a model, given by its digest."""
    digest = hashlib.sha256(f"{model} {kind}".encode())
    for sequence in sequences:
        digest.update(sequence + b"\n")
    return digest.hexdigest()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()
