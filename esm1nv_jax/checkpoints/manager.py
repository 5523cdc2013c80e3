"""Checkpoints of a run: Orbax's `CheckpointManager`, with checksums and a fall-back on top.

Step n is the folder `checkpoints/n` with four items: `params`, `optimizer` (all other state of a
training step), `data_state` (of the input stream) and `metadata` (config, code version, layout).
Every device holds the whole state, so process 0 alone writes and no save waits for another host.
Orbax renames a step into place; then `checksums.json`, one SHA-256 for every file, is renamed into
it. A step without checksums does not count: it was cut short, and the next start deletes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.checkpoints.step_folder import BEST, CHECKSUMS, DAMAGED, EARLIER, FOLDER, steps
from esm1nv_jax.common import files
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError, check_choices

UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of the folders that Orbax has not yet renamed
ON_ERROR = ("continue", "stop")
_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO)
_ORBAX = os.path.dirname(ocp.__file__)

# Orbax logs every file, and a traceback beside each exception that it raises. Other users of absl's
# logger are left alone.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.CRITICAL or not record.pathname.startswith(_ORBAX)
)
# When a disk is full half way, the save fails with its first array; of all others asyncio logs, and
# tensorstore's threads raise, that nobody asks for them any more.
logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())


def _hide_late_arrays(hook):
    def unraisablehook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return unraisablehook


sys.unraisablehook = _hide_late_arrays(sys.unraisablehook)


class SaveError(OSError):
    """A checkpoint could not be written; the older ones are whole. The message says why."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and what to do when a checkpoint cannot be written."""

    every: int  # steps
    minutes: float  # since the last save; 0: steps alone decide
    keep: int  # newest checkpoints
    keep_every: int  # steps: their multiples are kept, too; 0: none
    on_error: str  # "continue" or "stop"

    def __post_init__(self):
        for name, least in {"every": 1, "minutes": 0, "keep": 1, "keep_every": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"checkpoint.{name}={value} must be at least {least}")
        check_choices("checkpoint", self, on_error=ON_ERROR)


class RunCheckpoints:
    """The checkpoints of a run in `checkpoints/`, and the best one in `best/`.

    A save copies the state to the host and returns; writing, checksums and deletion of old steps go
    on in a thread. What failed there is reported by the next `check`, `save` or `wait`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig,
        strict: bool = False,
        metric: str = "loss_mask",
        maximize: bool = False,
    ):
        """The best checkpoint is that of the lowest `metric`, or of the highest if `maximize`.

        Raises UserError, if `strict`, where the best checkpoint is damaged.
        """
        self.best_metric, self._sign = metric, -1 if maximize else 1
        self.workdir, self.config, self.strict = epath.Path(workdir), config, strict
        self._clock = _EveryMinutes(config.minutes, time.monotonic())
        save = policies.AnySavePolicy([policies.FixedIntervalPolicy(config.every), self._clock])
        keep = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        # The best lives apart: it takes no place among the `keep` newest, and `average --last N`
        # never counts a step out of their rhythm.
        self._managers = {
            FOLDER: _open(self.workdir / FOLDER, save, policies.AnyPreservationPolicy(keep)),
            BEST: _open(self.workdir / BEST, save, policies.LatestN(1)),
        }
        # One thread, so that a checkpoint is there only once the best of its step is: a run that
        # resumes from it does not validate again.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writes: dict[str, Future] = {}
        self.best_step, self._best = 0, float("inf")  # `_best` times the sign is the metric
        self._saved_bests = [self._best]  # on process 0; the last is on disk, or being written
        if jax.process_index() == 0:
            with files.writing(self.workdir):
                self.workdir.mkdir(parents=True, exist_ok=True)
            for folder in self._managers:
                steps(self.workdir, folder)  # raises UserError where it cannot be read
                with files.writing(self.workdir / folder):
                    _delete_unfinished(self.workdir / folder)
            if not steps(self.workdir):  # the run begins, now perhaps from other data or weights
                for step in steps(self.workdir, BEST):
                    console.print(
                        f"best/{step} of {self.workdir} is of an earlier start, which left no "
                        "checkpoint; it is set aside"
                    )
                    _set_aside(self.workdir / BEST / str(step), EARLIER)
            if (best := self.latest_valid_step(BEST)) is not None:
                value = step_folder.read_metadata(self.workdir, best, BEST)[metric]
                self.best_step, self._best = best, self._sign * value
                self._saved_bests.append(self._best)

    def should_save(self, step: int) -> bool:
        """Whether the policy asks for a checkpoint after `step`, by steps or by the clock."""
        return self._managers[FOLDER].should_save(step)

    def save(self, step: int, params, optimizer, data_state: dict, metadata: dict) -> None:
        """Starts to write a checkpoint, unless there is one of `step`.

        `params` and `optimizer` are trees of arrays, which may be donated once this returns;
        `data_state` and `metadata` are for JSON. Only process 0 writes.
        """
        self._clock.last = time.monotonic()
        self._start(FOLDER, step, params, optimizer, data_state, metadata)

    def save_if_best(
        self, value: float, step: int, params, optimizer, data_state: dict, metadata: dict
    ) -> None:
        """As `save`, into `best/`, where the `value` of the metric is the best of the run."""
        self._report(BEST)
        if self._sign * value < self._best:
            self.best_step, self._best = step, self._sign * value
        # Not of `_best`, which all processes share: this one alone knows of a save that failed.
        if self._sign * value < self._saved_bests[-1]:
            self._saved_bests.append(self._sign * value)
            metadata = metadata | {self.best_metric: value}
            self._start(BEST, step, params, optimizer, data_state, metadata)

    def broadcast_best(self, broadcast: Callable[[Callable[[], str]], str]) -> None:
        """Takes over which step is the best, and how good, from process 0, which has read it."""
        best = broadcast(lambda: json.dumps((self.best_step, self._best)))
        self.best_step, self._best = json.loads(best)

    def check(self) -> None:
        """Reports a save that failed, waiting for none; raises SaveError if the config says so."""
        for folder, write in list(self._writes.items()):
            if write.done():
                self._report(folder)

    def wait(self) -> None:
        """Waits until all that was saved is on disk. Raises SaveError for what could not be."""
        writes, self._writes = self._writes, {}
        failed = [error for write in writes.values() if (error := write.exception())]
        if failed and all(isinstance(error, SaveError) for error in failed):
            reasons = "; ".join(map(str, failed))
            raise SaveError(f"{reasons}; {self._newest()}; mend that and start again")
        for error in failed:
            raise error

    def latest_valid_step(self, folder: str = FOLDER) -> int | None:
        """The newest step whose files are as they were written; None where there is no step.

        Reports newer ones and renames them to `STEP.damaged`, so that they can be made anew. For
        process 0. Raises UserError where every checkpoint is damaged, or, if `strict`, the newest.
        """
        valid, damaged = None, []
        for step in reversed(steps(self.workdir, folder)):
            if not (errors := step_folder.verify(self.workdir, step, folder)):
                valid = step
                break
            name = f"checkpoint {step}" if folder == FOLDER else f"{folder}/{step}"
            message = f"{name} of {self.workdir} is damaged: {'; '.join(errors)}"
            if self.strict:
                raise UserError(
                    f"{message}; check all with `esm1nv doctor {self.workdir}`, or leave out "
                    "--strict to set it aside"
                )
            console.print(f"{message}; it is set aside")
            damaged.append(self.workdir / folder / str(step))
        if damaged and valid is None and folder == FOLDER:
            raise UserError(
                f"all {len(damaged)} checkpoints of {self.workdir} are damaged; see `esm1nv doctor "
                f"{self.workdir}`, restore them from a copy, or choose another --workdir=DIR"
            )
        for path in damaged:
            _set_aside(path, DAMAGED)
        self._managers[folder].reload()
        return valid

    def _start(self, folder: str, step: int, params, optimizer, data_state, metadata) -> None:
        self._report(folder)
        if jax.process_index() or step_folder.is_finished(self.workdir / folder / str(step)):
            return
        # NumPy, because of arrays on all devices Orbax would write this process's part alone.
        params, optimizer = jax.tree.map(_copy_to_host, (params, optimizer))
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            data_state=ocp.args.JsonSave(data_state),
            metadata=ocp.args.JsonSave(metadata),
        )
        size = sum(x.nbytes for x in jax.tree.leaves((params, optimizer)))
        self._writes[folder] = self._thread.submit(self._write, folder, step, items, size)

    def _write(self, folder: str, step: int, items: ocp.args.Composite, size: int) -> None:
        path, manager = self.workdir / folder, self._managers[folder]
        try:
            # Not a new workdir, where this one was deleted or moved.
            path.mkdir(parents=files.is_remote(path), exist_ok=True)
            _delete_unfinished(path)  # first, so that a full disk has room
            _check_free_space(path, size)
            if (path / str(step)).exists():  # the manager would delete it
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            manager.reload()
            manager.save(step, args=items, force=True)
        except Exception as error:  # tensorstore raises many kinds; the run decides what to do
            with contextlib.suppress(OSError):
                _delete_unfinished(path)  # it takes room on a full disk
            raise SaveError(
                f"checkpoint {step} could not be written to {path}: {_reason(error)}"
            ) from None

    def _report(self, folder: str) -> None:
        """Waits for the write into `folder` and reports its failure as the config says."""
        try:
            if folder in self._writes:
                self._writes.pop(folder).result()
        except SaveError as error:
            if folder == BEST:
                self._saved_bests.pop()
            newest = self._newest()
            if self.config.on_error == "stop":
                raise SaveError(f"{error}; {newest}; mend that and start again") from None
            console.print(f"{error}; {newest}; training goes on and saves again when next due")

    def _newest(self) -> str:
        valid = steps(self.workdir)
        return f"the newest whole one is {valid[-1]}" if valid else "there is none yet"


def restore_from(
    workdir: epath.Path, step: int, folder: str, params, optimizer
) -> tuple[Any, Any, dict]:
    """(params, optimizer, data_state) of a step of any run, for every process.

    `params` and `optimizer` are trees of `jax.ShapeDtypeStruct` with the shardings to make.
    Raises UserError where the checkpoint holds other arrays.
    """
    workdir = files.absolute(workdir)  # Orbax refuses others
    manager = _open(workdir / folder, policies.FixedIntervalPolicy(1), policies.LatestN(1))
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        optimizer=ocp.args.StandardRestore(optimizer),
        data_state=ocp.args.JsonRestore(),
    )
    try:
        restored = manager.restore(step, args=items)
    except (KeyError, ValueError) as error:  # of items, names or shapes: bytes were verified
        raise UserError(
            f"checkpoint {step} of {workdir} was saved by another version or model: "
            f"{' '.join(str(error).split())[:200]}; take one of this model, or another "
            "--workdir=DIR"
        ) from None
    return restored["params"], restored["optimizer"], restored["data_state"]


@dataclasses.dataclass
class _EveryMinutes(policies.SaveDecisionPolicy):
    """Saves when `minutes` have passed since `last`, the start of the run or of its last save.

    Orbax's ContinuousCheckpointingPolicy saves after the first step, and, while saves fail, after
    every step.
    """

    minutes: float
    last: float  # of time.monotonic()

    def should_save(self, step, previous_steps, *, context) -> bool:
        return bool(self.minutes) and time.monotonic() - self.last >= 60 * self.minutes


@dataclasses.dataclass
class _ChecksumsFirst(policies.PreservationPolicy):
    """Writes the checksums of the new step before the manager deletes old ones.

    The manager asks its policy between the two. Otherwise a run that keeps one checkpoint could be
    killed when it has none (tests/checkpoints: test_old_steps_stay_until_the_new_one_counts).
    """

    path: epath.Path
    policy: policies.PreservationPolicy

    def should_preserve(self, checkpoints, *, context) -> Sequence[bool]:
        step_folder.write_checksums(self.path / str(checkpoints[-1].step))
        kept = self.policy.should_preserve(checkpoints, context=context)
        for checkpoint, keep in zip(checkpoints, kept, strict=True):
            if not keep:  # so that a deletion cut short leaves no step that looks whole
                (self.path / str(checkpoint.step) / CHECKSUMS).unlink()
        return kept


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leaves JAX's preemption service to the training loop.

        Each process has to ask it once a step. Orbax asks again on process 0 alone, with a step
        that has passed, which could make the processes stop at different steps.
        """
        return False


def _open(
    path: epath.Path, save: policies.SaveDecisionPolicy, keep: policies.PreservationPolicy
) -> ocp.CheckpointManager:
    """A manager that waits for no other process; whatever is not told so would."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    arrays, text = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = ocp.handlers.create_default_handler_registry(
        params=arrays(multiprocessing_options=alone),
        optimizer=arrays(multiprocessing_options=alone),
        data_state=text("data_state.json", multiprocessing_options=alone),
        metadata=text("metadata.json", multiprocessing_options=alone),
    )
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=False,  # on any process but 0 it would delete what 0 writes
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        multiprocessing_options=alone,
        save_decision_policy=save,
        preservation_policy=_ChecksumsFirst(path, keep),
    )
    return _Manager(path, options=options, handler_registry=handlers)


def _set_aside(path: epath.Path, mark: str) -> None:
    """Renames the folder of a step, so that it does not count and can be made anew."""
    aside = path.with_name(f"{path.name}.{mark}")
    with files.writing(path.parent):
        if aside.exists():
            aside.rmtree()
        path.rename(aside)


def _delete_unfinished(path: epath.Path) -> None:
    """Deletes what a killed or failed save left: half-written steps, steps without checksums."""
    for entry in path.iterdir() if path.exists() else ():
        unfinished = entry.name.isdecimal() and not step_folder.is_finished(entry)
        if entry.is_dir() and (unfinished or UNFINISHED in entry.name):
            entry.rmtree()


def _check_free_space(path: epath.Path, size: int) -> None:
    """Raises OSError before Orbax begins: half way it would print a page for every array."""
    if files.is_remote(path):
        return
    needed, free = 1.1 * size + 100_000, shutil.disk_usage(path).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)} ({free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} needed)",
        )


def _copy_to_host(x) -> np.ndarray:
    return np.array(jax.device_get(x))  # a CPU's may be a view of a buffer that is donated next


def _reason(error: Exception) -> str:
    """Why a save failed, without the trail of what tensorstore was doing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    known = [os.strerror(code) for code in _DISK_ERRORS if os.strerror(code) in text]
    return known[0] if known else text[:300]
