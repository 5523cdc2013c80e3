"""Checkpoints of a run: all of Orbax, behind a few plain functions.

A checkpoint of step n is the folder `checkpoints/n` with four items: `params`, `optimizer` (all
other state of an update), `place` (in the data) and `config`. Every device holds the whole state,
so process 0 alone writes, in the background, and no save can hang on another host. Orbax makes the
step appear by rename; then `checksums.json`, one SHA-256 for every file, is renamed into it. A step
without checksums does not exist: it was cut short, and the next start of the run removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from esm1nv_jax.checkpoints import checksums
from esm1nv_jax.common.errors import UserError

ITEMS = ("params", "optimizer", "place", "config")
FOLDER, BEST = "checkpoints", "best"
CHECKSUMS = checksums.NAME
UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's mark in the names of what it is still writing
_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO)

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every file; errors are raised


class SaveError(OSError):
    """A checkpoint could not be written; the older ones are whole. Says where and why."""


class Checkpoints:
    """The checkpoints of one run, or its best ones (`folder=BEST`).

    keep: the newest so many stay; keep_every: so does every step that it divides, unless 0.
    Saving copies to the host and returns; writing, checksums and removal go on behind it, one at
    a time. A save that failed is told by the next call of `save`, `wait` or `close`.
    """

    def __init__(
        self, workdir: epath.PathLike, keep: int, keep_every: int = 0, folder: str = FOLDER
    ):
        self.folder = epath.Path(workdir) / folder
        self.keep, self.keep_every = keep, keep_every
        self.seconds = 0.0  # that the last save took, in the background
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None

    def steps(self) -> list[int]:
        return _steps(self.folder)

    def save(self, step: int, params, optimizer, place: dict, config: dict) -> None:
        """Replaces nothing: a step that is there already is left as it is.

        `params` and `optimizer` are trees of arrays; they may be donated once this returns. Only
        process 0 writes. Raises SaveError where the save before this one failed.
        """
        self.wait()
        if jax.process_index() or step in self.steps():
            return
        state = jax.tree.map(_on_host, (params, optimizer))
        self._thread = threading.Thread(
            target=self._write, args=(step, *state, place, config), name=f"checkpoint {step}"
        )
        self._thread.start()

    def _write(self, step: int, params, optimizer, place: dict, config: dict) -> None:
        began = time.perf_counter()
        try:
            self.clean()  # first, so that a full disk has room
            self._look_for_room(params, optimizer)
            with _orbax() as writer:
                writer.save(
                    self.folder / str(step),
                    args=ocp.args.Composite(
                        params=ocp.args.StandardSave(params),
                        optimizer=ocp.args.StandardSave(optimizer),
                        place=ocp.args.JsonSave(place),
                        config=ocp.args.JsonSave(config),
                    ),
                )
            checksums.write(self.folder / str(step))
            self.retire()
        except Exception as error:  # tensorstore raises many kinds; the run decides what to do
            self._failure = SaveError(
                f"checkpoint {step} could not be written to {self.folder}: {_reason(error)}"
            )
            with contextlib.suppress(OSError):
                self.clean()  # what was half written takes room on a full disk
        self.seconds = time.perf_counter() - began

    def _look_for_room(self, *trees) -> None:
        """Raises OSError before Orbax begins: half way it would print a page for every array."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if remote(self.folder):
            return
        leaves = jax.tree.leaves(trees)
        needed = 1.1 * sum(x.nbytes for x in leaves) + 4096 * len(leaves)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)} ({free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} "
                "needed)",
            )

    def retire(self) -> None:
        """Removes all but the steps to keep. Steps without checksums neither count nor go."""
        steps = self.steps()
        for step in steps[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                # Without its checksums first: a removal cut short leaves no step that looks whole.
                (self.folder / str(step) / CHECKSUMS).unlink()
                (self.folder / str(step)).rmtree()

    def clean(self) -> None:
        """Removes what a killed save left: steps half written, and steps without checksums."""
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            unfinished = path.name.isdigit() and not (path / CHECKSUMS).exists()
            if path.is_dir() and (unfinished or UNFINISHED in path.name):
                path.rmtree()

    def set_aside(self, after: int) -> None:
        """Renames steps later than `after`, which were found damaged: they are made anew."""
        for step in self.steps():
            if step > after:
                aside = self.folder / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self.folder / str(step)).rename(aside)

    def restore(self, step: int, params, optimizer) -> tuple[Any, Any, dict]:
        """(params, optimizer, place), laid out as the abstract trees given (shapes, shardings)."""
        with _orbax() as reader:
            args = ocp.args.Composite(
                params=ocp.args.StandardRestore(_host_shapes(params)),
                optimizer=ocp.args.StandardRestore(_host_shapes(optimizer)),
                place=ocp.args.JsonRestore(),
            )
            found = reader.restore(self.folder / str(step), args=args)
        return (
            jax.tree.map(_laid_out, found["params"], params),
            jax.tree.map(_laid_out, found["optimizer"], optimizer),
            found["place"],
        )

    def wait(self) -> None:
        """Until what was saved is on disk. Raises SaveError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises SaveError where a save is over and failed; waits for nothing."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    close = wait


def newest_good(
    workdir: epath.PathLike, strict: bool, tell: Callable[[str], None], folder: str = FOLDER
) -> int | None:
    """The newest step whose files are all as they were written; None where the run has no step.

    `tell` hears of each newer one that is damaged. Raises UserError where every step is damaged,
    or, if `strict`, the newest.
    """
    found = _steps(epath.Path(workdir) / folder)
    for step in reversed(found):
        wrong = verify(workdir, step, folder)
        if not wrong:
            return step
        message = f"checkpoint {step} of {workdir} is damaged: {'; '.join(wrong)}"
        if strict:
            raise UserError(
                f"{message}; look with `esm1nv doctor {workdir}`, or leave out --strict to fall "
                "back to the newest good one"
            )
        tell(f"{message}; falling back to an older one")
    if found:
        raise UserError(
            f"all {len(found)} checkpoints of {workdir} are damaged; see `esm1nv doctor {workdir}`,"
            " restore them from a copy, or begin anew with another --workdir=DIR"
        )
    return None


def verify(workdir: epath.PathLike, step: int, folder: str = FOLDER, item: str = "") -> list[str]:
    """What is wrong with a checkpoint, a phrase each; empty where every file is as it was written.

    Reads every byte, or only those of one item (`params`).
    """
    return checksums.wrong(epath.Path(workdir) / folder / str(step), item)


def remote(path: epath.Path) -> bool:
    """Whether a path lies in an object store."""
    return "://" in str(path)


def abstract(tree, sharding):
    """Shapes and dtypes of `tree`, to be restored with `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def steps(workdir: str | epath.Path, folder: str = FOLDER) -> list[int]:
    """The steps whose finished checkpoints a run's folder holds, ascending."""
    return _steps(epath.Path(workdir) / folder)


def read_params(workdir: str | epath.Path, step: int, folder: str = FOLDER) -> dict:
    """The parameters of one checkpoint, on the host, as NumPy arrays."""
    alone = _alone()
    with ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as reader:
        item = epath.Path(workdir) / folder / str(step) / "params"
        if not remote(item):
            item = item.absolute()  # Orbax finds no metadata under a relative path
        shapes = reader.metadata(item).item_metadata
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), dict(shapes))
        return reader.restore(item, args=ocp.args.StandardRestore(target))


def read_config(workdir: str | epath.Path, step: int, folder: str = FOLDER) -> dict:
    """The resolved config that a checkpoint was made with, and what else was saved beside it."""
    item = epath.Path(workdir) / folder / str(step) / "config"
    return json.loads((item / "metadata").read_text())


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    found = (path for path in folder.iterdir() if path.name.isdigit())
    return sorted(int(path.name) for path in found if (path / CHECKSUMS).exists())


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process saves or reads by itself, without waiting for any other."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )


def _orbax() -> ocp.Checkpointer:
    """Each part must be told that this process is alone: any one left out waits for the others."""
    alone = _alone()
    tree, text = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handler = ocp.CompositeCheckpointHandler(
        params=tree(multiprocessing_options=alone),
        optimizer=tree(multiprocessing_options=alone),
        place=text(multiprocessing_options=alone),
        config=text(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=alone,
            # Made in the background, they would be announced to a coordinator and waited for.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        ),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _on_host(x) -> np.ndarray:
    """A copy: on a CPU `device_get` may only be a view, of a buffer that is donated next."""
    return np.array(jax.device_get(x))


def _host_shapes(tree):
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def _laid_out(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


def _reason(error: Exception) -> str:
    """Why a save failed, without the trail of what tensorstore was doing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    told = [os.strerror(code) for code in _DISK_ERRORS if os.strerror(code) in text]
    return told[0] if told else text[:300]
