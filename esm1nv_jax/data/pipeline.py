"""The input stream, from a data set to batches, made of Grain's pieces.

    range -> plan a window -> rebatch its rows -> read this process's rows -> arrays -> prefetch

What a global batch contains follows from (data set, StreamConfig, state) and nothing else. Every
process plans all rows, from lengths alone, and reads the sequences of its own. The state names a
row, so it is the same in every process, and holds for any number of processes, of workers and of
rows in a batch: `{"parent": {"next_index": window}, "batch_idx": row of the window}`.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import grain
import numpy as np
from absl import flags

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fill import Batch, ReadRows, batch_of, read_rows
from esm1nv_jax.data.packing import (
    EvaluationWindows,
    PackedWindow,
    StreamConfig,
    TrainingWindows,
    gather_rows,
)
from esm1nv_jax.data.source import Source

State = dict[str, Any]  # of a Grain iterator; JSON
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a run, saved


def train_dataset(
    source: Source, config: StreamConfig, rows: slice = slice(None), workers: int = 0
) -> grain.IterDataset:
    """Rows `rows` of the global batches of training, without end.

    The rows of an epoch's last window are followed by those of the next epoch's first, in the same
    batch if it is not full, so every example comes exactly once in each epoch. The Grain iterator
    that `iter` gives has the state described above; its `set_state` raises UserError for one that
    does not fit the data set.

    workers: processes that read; with 0 this process does. Each plans all rows and reads every n-th
    batch: batches and states are the same. Raises UserError where the split is empty, or where
    `config.sample` needs clusters and there are none.
    """
    wanted = _wanted(source, config, rows)
    plan = TrainingWindows(source, config)
    read = functools.partial(_read, source, config, wanted)
    return _TrainDataset(_planned(plan, sys.maxsize, config.rows), plan, read, workers)


def evaluation_batches(
    source: Source, config: StreamConfig, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Iterates over rows `rows` of the global batches that hold every sequence once, in a fixed
    order.

    Empty rows fill up the last batch. Masks and crops depend on the sequences alone.
    """
    wanted = _wanted(source, config, rows)
    plan = EvaluationWindows(source, config)
    read = functools.partial(_read, source, config, wanted, evaluation=True)
    return iter(_planned(plan, len(plan), config.rows).map(read).map(batch_of))


def prefetch(
    dataset: grain.IterDataset, state: State | None = None, ahead: int = 4
) -> grain.DatasetIterator:
    """Iterates over `dataset` from `state` on, in a thread that is up to `ahead` elements ahead.

    The iterator's state is that of the elements taken. An exception of the dataset is raised by
    `next`, after the elements before it. `close` ends the thread, and the workers of the dataset.
    """
    ahead_of_caller = grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=ahead
    )
    iterator = iter(ahead_of_caller)
    if state is not None:
        iterator.set_state(state)
    return iterator


def _wanted(source: Source, config: StreamConfig, rows: slice) -> slice:
    """The rows of a global batch that this process reads, with both ends given."""
    if len(source.lengths) == 0:
        raise UserError("the split holds no sequence; prepare the data set with a larger one")
    if len(source.lengths) > 2**31 - 1:  # example ids are int32
        raise UserError(f"a split holds at most 2**31 - 1 sequences, found {len(source.lengths):,}")
    start, stop, step = rows.indices(config.rows)
    if step != 1:
        raise ValueError(f"a process reads consecutive rows, found {rows}")
    return slice(start, max(start, stop))


def _planned(plan: Callable[[int], PackedWindow], windows: int, rows: int) -> grain.IterDataset:
    """Batches of `rows` planned rows, across the ends of windows; the last may have fewer."""
    planned = grain.MapDataset.range(windows).map(plan).map(_rows_of)
    in_order = planned.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return grain.experimental.RebatchIterDataset(in_order, batch_size=rows)


def _rows_of(window: PackedWindow) -> dict[str, np.ndarray]:
    """The rows of a window, [rows], as references: Grain cuts and joins them at any row."""
    return {"window": np.full(window.rows, window, object), "row": np.arange(window.rows)}


def _read(
    source: Source, config: StreamConfig, wanted: slice, planned: dict, evaluation: bool = False
) -> ReadRows:
    window = gather_rows(planned["window"], planned["row"], wanted)
    return read_rows(source, config, window, wanted.stop - wanted.start, evaluation)


class _TrainDataset(grain.IterDataset):
    """Planned batches, read by this process or by workers; the state is that of the plan.

    Grain's own state behind `mp_prefetch` is one of each worker: it fits no other number of them.
    """

    def __init__(
        self,
        planned: grain.IterDataset,
        plan: TrainingWindows,
        read: Callable[[dict], ReadRows],
        workers: int,
    ):
        super().__init__(planned)
        self.planned, self.plan, self.read, self.workers = planned, plan, read, workers

    def __iter__(self) -> grain.DatasetIterator:
        return _TrainIterator(self)

    def from_state(self, state: State) -> grain.DatasetIterator:
        """Iterates over (rows of a batch, state after it) from `state` on."""
        read = _FromState(self.planned, state).map(functools.partial(_on_first, self.read))
        if self.workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its own ones as it starts a process
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self.workers)
            read = read.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(read)


class _TrainIterator(grain.DatasetIterator):
    def __init__(self, dataset: _TrainDataset):
        super().__init__()
        self._dataset = dataset
        self._state: State = iter(dataset.planned).get_state()
        self._rows: grain.DatasetIterator | None = None
        self._workers: list[BaseProcess] = []

    def __next__(self) -> Batch:
        if self._rows is None:
            before = multiprocessing.active_children()
            with _signals_blocked() if self._dataset.workers else contextlib.nullcontext():
                self._rows = self._dataset.from_state(self._state)
                rows, self._state = next(self._rows)
            self._workers = [p for p in multiprocessing.active_children() if p not in before]
        else:
            rows, self._state = next(self._rows)
        return batch_of(rows)

    def get_state(self) -> State:
        return self._state

    def set_state(self, state: State) -> None:
        self._stop()
        try:
            fits = 0 <= state["batch_idx"] <= self._dataset.plan(state["parent"]["next_index"]).rows
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError(f"{state} is no state of this input stream: is it another data set's?")
        self._state = state

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._rows is not None:
            # What they have read is not wanted, and Grain would wait 25 s for each to hand it over.
            for worker in self._workers:
                worker.kill()
            self._rows.close()
            self._rows = None


class _FromState(grain.IterDataset):
    """Elements from `state` on, each with the state after it; in a worker, every n-th of them."""

    def __init__(self, parent: grain.IterDataset, state: State):
        super().__init__(parent)
        self.state, self.every = state, slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Takes slice(i, None, n), by which Grain tells worker i of n its share."""
        self.every = sl

    def __iter__(self) -> grain.DatasetIterator:
        return _FromStateIterator(iter(self._parent), self.state, self.every)


class _FromStateIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, state: State, every: slice):
        super().__init__(parent)
        parent.set_state(state)
        self._skip, self._step = every.start, every.step

    def __next__(self) -> tuple[Any, State]:
        for _ in range(self._skip):
            next(self._parent)
        self._skip = self._step - 1
        return next(self._parent), self._parent.get_state()

    def get_state(self) -> State:
        return self._parent.get_state()

    def set_state(self, state: State) -> None:
        self._parent.set_state(state)


def _on_first(function: Callable[[Any], Any], pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return function(pair[0]), pair[1]


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks the signals that end a run, for this thread and what it starts: the workers.

    Ctrl-C and the signals of a scheduler reach the workers too, while the trainer still needs
    batches. It stops them itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    resource_tracker.ensure_running()  # as it starts it unblocks some, and it would do so later
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, workers: int) -> None:
    """Makes a worker end where its trainer was killed; it would wait for ever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
