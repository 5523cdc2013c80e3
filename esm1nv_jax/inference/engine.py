"""Sequences to hidden states and logits: rows laid out, computed, and taken apart again.

Everything that embeds goes through `encode`, so that a protein's numbers are the same in a file, in
Python and in an evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import row_shapes as rows_lib
from esm1nv_jax.inference.row_shapes import Packed, Shapes
from esm1nv_jax.inference.windows import windows
from esm1nv_jax.model import encoder
from esm1nv_jax.model.encoder import Compute, EncoderConfig

IN_FLIGHT = 2  # batches dispatched before the first is fetched: the device never waits for the host
SPECIALS = 2  # <s> and </s> around every window
KINDS = ("mean", "per_residue", "cls", "logits")


@dataclasses.dataclass(frozen=True)
class Want:
    """What to give back: some of KINDS, for these layers; `dtype` is what leaves the device."""

    kinds: tuple[str, ...] = ("mean", "per_residue")
    layers: tuple[int, ...] = (-1,)
    dtype: str = "float32"  # of per_residue, cls and logits; means are taken in fp32 first

    def fields(self) -> list[str]:
        """Names of the arrays, such as `mean_-1`; `logits` belong to no layer."""
        layered = [k for k in KINDS if k in self.kinds and k != "logits"]
        names = [f"{kind}_{layer}" for kind in layered for layer in self.layers]
        return names + ["logits"] * ("logits" in self.kinds)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on devices: replicated parameters, and how rows are spread over the devices."""

    config: EncoderConfig
    compute: Compute
    params: dict
    rows: jax.sharding.Sharding
    shapes: Shapes


@functools.partial(jax.jit, static_argnames=("config", "compute", "want"))
def _run(params, batch, config: EncoderConfig, compute: Compute, want: Want):
    """One batch. Slots S are the sequences of a row. Returns fp32 sums over owned residues
    [B, S, D], `<s>` [B, S, D], hidden states [B, T, D] and logits [B, T, V], as wanted."""
    out = encoder.forward(
        config,
        params,
        batch["tokens_BT"],
        batch["segment_ids_BT"],
        batch["positions_BT"],
        compute=compute,
        hidden_layers=want.layers,
    )
    found = {}
    for layer, x_BTD in out.hidden.items():
        if "mean" in want.kinds:
            slots = jnp.arange(batch["starts_BS"].shape[1])
            owned_BST = (batch["slot_BT"][:, None] == slots[:, None]).astype(jnp.float32)
            found[f"mean_{layer}"] = jnp.einsum(
                "BST,BTD->BSD", owned_BST, x_BTD, precision=jax.lax.Precision.HIGHEST
            )
        if "cls" in want.kinds:
            found[f"cls_{layer}"] = jnp.take_along_axis(
                x_BTD, batch["starts_BS"][..., None], axis=1
            ).astype(want.dtype)
        if "per_residue" in want.kinds:
            found[f"per_residue_{layer}"] = x_BTD.astype(want.dtype)
    if "logits" in want.kinds:
        found["logits"] = out.logits[..., : tokenizer.VOCABULARY].astype(want.dtype)
    return found


@dataclasses.dataclass(frozen=True)
class _Segments:
    """What stands in rows: one element for each window of each sequence."""

    owner: np.ndarray  # which sequence
    start: np.ndarray  # the window's first residue
    residues: np.ndarray
    first: np.ndarray  # the residues taken from this window: first..last-1 of the sequence
    last: np.ndarray

    @classmethod
    def of(cls, lengths: Sequence[int], limit: int) -> _Segments:
        table = [
            (i, w.start, w.stop - w.start, w.first, w.last)
            for i, length in enumerate(lengths)
            for w in windows(int(length), limit)
        ]
        return cls(*np.array(table, np.int64).reshape(-1, 5).T)


def encode(
    placed: Placed, ids: Sequence[np.ndarray], want: Want, limit: int, deterministic: bool = False
) -> dict[str, np.ndarray]:
    """Embeds sequences of token ids (uint8, without specials), each of at least one residue.

    Those longer than `limit` residues are read in windows. With `deterministic` a sequence stands
    alone in its row, whose length is a function of its own.

    Returns, under the names of `want.fields()`: `mean_*` and `cls_*` [sequences, D],
    `per_residue_*` [all residues, D] and `logits` [all residues, vocabulary], the residues of all
    sequences one after another.
    """
    lengths = np.array([len(i) for i in ids], np.int64)
    segments = _Segments.of(lengths, limit)
    layout, shapes = rows_lib.alone, placed.shapes
    if not deterministic:
        layout, shapes = rows_lib.packed, shapes.for_work(segments.residues + SPECIALS)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    found: dict[str, np.ndarray] = {}
    waiting: collections.deque = collections.deque()
    for batch in layout(segments.residues + SPECIALS, shapes):
        arrays, places = _lay(batch, segments, ids, shapes, deterministic, offsets)
        on_device = jax.device_put(arrays, placed.rows)
        out = _run(placed.params, on_device, placed.config, placed.compute, want)
        waiting.append((out, places))
        if len(waiting) == IN_FLIGHT:
            _collect(found, *waiting.popleft(), lengths)
    while waiting:
        _collect(found, *waiting.popleft(), lengths)
    for layer in want.layers:
        if f"mean_{layer}" in found:
            found[f"mean_{layer}"] /= lengths[:, None].astype(np.float32)
    return {name: found[name] for name in want.fields() if name in found}


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the numbers of a batch belong."""

    owner: np.ndarray  # [segments] sequence,
    row: np.ndarray  # its row
    slot: np.ndarray  # and its slot
    starts_sequence: np.ndarray  # bool: the window holds the sequence's first residue
    token: np.ndarray  # [owned residues] place in the flattened batch,
    residue: np.ndarray  # place among all residues


def _lay(batch: Packed, segments: _Segments, ids, shapes: Shapes, alone: bool, offsets):
    """The arrays of a batch, and where its numbers belong."""
    B, T = shapes.rows(batch.length), batch.length
    S = 1 if alone else shapes.slots(T)
    tokens_BT = np.full((B, T), tokenizer.PAD, np.int32)
    segment_ids_BT = np.zeros((B, T), np.int32)
    positions_BT = np.zeros((B, T), np.int32)
    slot_BT = np.full((B, T), -1, np.int32)
    starts_BS = np.zeros((B, S), np.int32)
    owner, row_of, slot_of, token, residue = [], [], [], [], []
    for row, items in enumerate(batch.rows):
        at = 0
        for slot, item in enumerate(items):
            i, start = segments.owner[item], segments.start[item]
            n, first, last = segments.residues[item], segments.first[item], segments.last[item]
            here = slice(at, at + n + 2)
            tokens_BT[row, at] = tokenizer.BOS
            tokens_BT[row, at + 1 : at + 1 + n] = ids[i][start : start + n]
            tokens_BT[row, at + 1 + n] = tokenizer.EOS
            segment_ids_BT[row, here] = slot + 1
            positions_BT[row, here] = np.arange(n + 2)
            taken = at + 1 + first - start
            slot_BT[row, taken : taken + last - first] = slot
            starts_BS[row, slot] = at
            owner.append(i)
            row_of.append(row)
            slot_of.append(slot)
            token.append(np.arange(taken, taken + last - first) + row * T)
            residue.append(np.arange(first, last) + offsets[i])
            at += n + 2
    arrays = {
        "tokens_BT": tokens_BT,
        "segment_ids_BT": segment_ids_BT,
        "positions_BT": positions_BT,
        "slot_BT": slot_BT,
        "starts_BS": starts_BS,
    }
    items = np.concatenate([np.array(r, np.int64) for r in batch.rows])
    return arrays, _Places(
        np.array(owner),
        np.array(row_of),
        np.array(slot_of),
        segments.start[items] == 0,
        np.concatenate(token),
        np.concatenate(residue),
    )


def _collect(found: dict[str, np.ndarray], out: dict, places: _Places, lengths) -> None:
    """Waits for a batch and puts its numbers where they belong."""
    for name, value in jax.device_get(out).items():
        kind = name.rpartition("_")[0] or name
        if kind in ("mean", "cls"):
            if name not in found:
                found[name] = np.zeros((len(lengths), value.shape[-1]), value.dtype)
            if kind == "mean":  # a long sequence adds up over its windows, in their order
                np.add.at(found[name], places.owner, value[places.row, places.slot])
            else:
                first = places.starts_sequence
                found[name][places.owner[first]] = value[places.row[first], places.slot[first]]
        else:
            if name not in found:
                found[name] = np.empty((int(lengths.sum()), value.shape[-1]), value.dtype)
            found[name][places.residue] = value.reshape(-1, value.shape[-1])[places.token]
