"""Token sequences to hidden states, logits and log-probabilities: the one way through the encoder.

Rows are planned (`row_shapes`), filled, sent ahead of the device, computed (`forward_pass`) and
taken apart again. Embedding, scoring, evaluation, probes and the Python API all compute here,
so that a protein's numbers are the same in a file, in Python and in an evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import SPECIALS
from esm1nv_jax.inference.forward_pass import OutputSpec, forward, forward_at_once
from esm1nv_jax.inference.loaded_model import DeviceModel, attention_bytes
from esm1nv_jax.inference.row_shapes import RowBatch, pack_rows, pad_rows, split_into_windows
from esm1nv_jax.model import heads

IN_FLIGHT = 2  # batches dispatched before the first is fetched: the device never waits for the host
PROJECTED = 128  # pooled proteins that a head reads at once: one shape, so the same bits for each


class MemoryExhausted(UserError):
    """The device has no memory for a batch."""


NOTHING_ELSE = OutputSpec((), ())


def run_batches(
    model: DeviceModel,
    batches: Iterable[tuple[dict[str, np.ndarray], Any]],
    outputs: OutputSpec = NOTHING_ELSE,
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """(results on the host, context) of every (arrays for `forward`, context), in order.

    While a batch is computed the next one is prepared and dispatched. Raises MemoryExhausted.
    """
    waiting: collections.deque = collections.deque()
    longest = 0

    def exhausted() -> MemoryExhausted:
        return MemoryExhausted(
            f"rows of {longest:,} tokens do not fit into the memory of the device; read fewer at "
            f"once, as with --max-residues {longest // 2}"
        )

    run: Callable = forward if model.platform == "cpu" else forward_at_once
    if model.run_blocks is not None:
        run = functools.partial(forward, run_blocks=model.run_blocks)
    try:
        for arrays, context in batches:
            if (length := arrays["tokens_BT"].shape[1]) > longest:
                longest = length
                needed = attention_bytes(model.config, length)
                if model.platform == "cpu" and needed > command.machine_memory():
                    raise exhausted()  # a machine that swaps, or ends the process, says nothing
            batch = jax.device_put(arrays, model.row_sharding)
            results = run(model.params, batch, model.config, model.compute, outputs)
            waiting.append((results, context))
            if len(waiting) == IN_FLIGHT:
                results, context = waiting.popleft()
                yield jax.device_get(results), context
        for results, context in waiting:
            yield jax.device_get(results), context
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise exhausted() from None


class Segments(NamedTuple):
    """Where items stand in a batch; each int64 [k], an element an item, in the order of rows."""

    item: np.ndarray
    row: np.ndarray
    slot: np.ndarray  # from 0 in each row
    start: np.ndarray  # column of its first token


def fill_rows(
    batch: RowBatch, tokens: Sequence[np.ndarray], rows: int
) -> tuple[dict[str, np.ndarray], Segments]:
    """The tokens of a planned batch as arrays [rows, T] for `forward`, and where they stand."""
    T = batch.length
    item = np.concatenate([np.array(row, np.int64) for row in batch.rows])
    row = np.repeat(np.arange(len(batch.rows)), [len(row) for row in batch.rows])
    sizes = np.array([len(tokens[i]) for i in item], np.int64)
    slot = np.arange(len(item)) - np.searchsorted(row, row)
    before = np.cumsum(sizes) - sizes
    start = before - before[np.searchsorted(row, row)]
    flat = spans(row * T + start, sizes)
    arrays = {name: np.zeros((rows, T), np.int32) for name in ("segment_ids_BT", "positions_BT")}
    arrays["tokens_BT"] = np.full((rows, T), tokenizer.PAD, np.int32)
    arrays["tokens_BT"].flat[flat] = np.concatenate([tokens[i] for i in item])
    arrays["segment_ids_BT"].flat[flat] = np.repeat(slot + 1, sizes)
    arrays["positions_BT"].flat[flat] = spans(np.zeros_like(sizes), sizes)
    return arrays, Segments(item, row, slot, start)


def spans(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ..., `counts[0]` integers; then those from first[1]; and so on."""
    shift = first - (np.cumsum(counts) - counts)
    return np.arange(int(counts.sum())) + np.repeat(shift, counts)


@dataclasses.dataclass(frozen=True)
class LogProbQuery:
    """Log-probabilities wanted at `columns` of `tokens`, ids with specials, `<mask>` in place.

    `context` comes back with the result.
    """

    tokens: np.ndarray
    columns: Sequence[int] | np.ndarray
    context: Any = None


def run_queries(
    model: DeviceModel, queries: Iterable[LogProbQuery], columns: int = 1
) -> Iterator[tuple[LogProbQuery, np.ndarray]]:
    """Each query with its log-probabilities, float32 [its columns, vocabulary]; in any order.

    Each stands alone in a row whose length follows from its own. No query has more than `columns`
    columns: they fix the shape, so that a protein takes one compilation. Queries are drawn as they
    are needed, so any number of them takes little memory.
    """

    def batches():
        pending: dict[int, list[LogProbQuery]] = {}
        for query in queries:
            T = model.shapes.length(len(query.tokens))
            pending.setdefault(T, []).append(query)
            if len(pending[T]) == model.shapes.rows(T):
                yield batch(T, pending.pop(T))
        for T, some in pending.items():
            yield batch(T, some)

    def batch(T: int, some: list[LogProbQuery]):
        plan = RowBatch(T, [[i] for i in range(len(some))])
        B = model.shapes.rows(T)
        arrays, _ = fill_rows(plan, [query.tokens for query in some], B)
        arrays["prediction_positions_BM"] = np.zeros((B, 1 << (columns - 1).bit_length()), np.int32)
        for row, query in zip(arrays["prediction_positions_BM"], some, strict=False):
            row[: len(query.columns)] = query.columns
        return arrays, some

    for results, some in run_batches(model, batches()):
        for query, log_probs in zip(some, results["log_probs"], strict=False):
            yield query, log_probs[: len(query.columns)]


def embed_sequences(
    model: DeviceModel,
    ids: Sequence[np.ndarray],
    outputs: OutputSpec,
    limit: int,
    deterministic: bool = False,
) -> dict[str, np.ndarray]:
    """Embeds sequences of token ids (uint8, without specials), each of at least one residue.

    Those longer than `limit` residues are read in windows. With `deterministic` a sequence stands
    alone in its row, whose length is a function of its own.

    Returns, under `outputs.names()`: `mean_*` and `cls_*` [sequences, D], `per_residue_*`
    [all residues, D] and `logits` [all residues, vocabulary], the residues of all sequences one
    after another. With `outputs.head` also `head`, its logits: fp32 [all residues, K], or
    [sequences, K] of a pool over the residues of all windows.
    """
    lengths = np.array([len(i) for i in ids], np.int64)
    windows = [(i, w) for i, n in enumerate(lengths) for w in split_into_windows(int(n), limit)]
    owner = np.array([i for i, _ in windows], np.int64)
    start, _, first, last = np.array([w for _, w in windows], np.int64).reshape(-1, 4).T
    specials = (tokenizer.BOS, tokenizer.EOS)
    tokens = [np.pad(ids[i][w.start : w.stop], 1, constant_values=specials) for i, w in windows]
    sizes = np.array([len(t) for t in tokens], np.int64)
    shapes = model.shapes if deterministic else model.shapes.for_work(sizes)
    offsets = np.cumsum(lengths) - lengths

    def batches():
        for plan in (pad_rows if deterministic else pack_rows)(sizes, shapes):
            rows = shapes.rows(plan.length)  # so many always, or bits would depend on neighbours
            if not deterministic:
                rows = shapes.fewest_rows(plan.length, len(plan.rows))
            arrays, at = fill_rows(plan, tokens, rows)
            owned = last[at.item] - first[at.item]
            column = at.start + SPECIALS // 2 + first[at.item] - start[at.item]
            token = spans(at.row * plan.length + column, owned)
            arrays["slot_BT"] = np.full_like(arrays["tokens_BT"], -1)
            arrays["slot_BT"].flat[token] = np.repeat(at.slot, owned)
            slots = 1 if deterministic else shapes.slots(plan.length)
            arrays["starts_BS"] = np.zeros((len(arrays["tokens_BT"]), slots), np.int32)
            arrays["starts_BS"][at.row, at.slot] = at.start
            yield arrays, (at, token, spans(offsets[owner[at.item]] + first[at.item], owned))

    merged: dict[str, np.ndarray] = {}
    for results, (at, token, residue) in run_batches(model, batches(), outputs):
        for name, value in results.items():
            by_protein = name.startswith(("mean", "cls"))
            items = len(windows) if name == "pool" else int(lengths.sum())
            shape = (len(ids) if by_protein else items, value.shape[-1])
            total = merged.setdefault(name, np.zeros(shape, value.dtype))
            if name == "pool":
                total[at.item] = value[at.row, at.slot]
            elif not by_protein:
                total[residue] = value.reshape(-1, value.shape[-1])[token]
            elif name.startswith("mean"):  # a long sequence adds up over its windows
                np.add.at(total, owner[at.item], value[at.row, at.slot])
            else:
                begins = start[at.item] == 0
                total[owner[at.item[begins]]] = value[at.row, at.slot][begins]
    for name, value in merged.items():
        if name.startswith("mean"):
            value /= lengths[:, None].astype(np.float32)
    results = {name: merged[name] for name in outputs.names() if name in merged}
    if outputs.head is not None and "pool" in merged:
        pools = merged["pool"]
        if outputs.head.pooling == "cls":  # the only <s> that a protein begins with
            pools, owner = pools[start == 0], owner[start == 0]
        merged["head"] = _project(model.params["head"], _pooled(pools, owner, len(ids)))
    return results | ({"head": merged["head"]} if "head" in merged else {})


def _pooled(pools: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """fp32 [n, D]: means over whole proteins from the pools of their windows [windows, D + 2]."""
    sums, weight = pools[:, :-2], pools[:, -2]
    log_scale = np.where(weight > 0, pools[:, -1], -np.inf)
    highest = np.full(n, -np.inf, np.float32)
    np.maximum.at(highest, owner, log_scale)
    factor = np.exp(log_scale - highest[owner])
    total = np.zeros((n, pools.shape[1] - 2), np.float32)
    weights = np.zeros(n, np.float32)
    np.add.at(total, owner, sums * factor[:, None])
    np.add.at(weights, owner, weight * factor)
    return total / weights[:, None]


def _project(params: dict, pooled: np.ndarray) -> np.ndarray:
    """Logits of a head on pooled states, in one shape, whatever else is there."""
    parts = []
    for begin in range(0, len(pooled), PROJECTED):
        part = pooled[begin : begin + PROJECTED]
        padded = np.pad(part, ((0, PROJECTED - len(part)), (0, 0)))
        parts.append(np.asarray(_project_on_device(params, padded))[: len(part)])
    return np.concatenate(parts)


_project_on_device = jax.jit(heads.project)
