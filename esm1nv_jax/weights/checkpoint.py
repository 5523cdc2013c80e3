"""Checkpoints of a run: all of Orbax, behind a few plain functions.

A checkpoint of step n is the folder `checkpoints/n` with four items: `params`, `optimizer` (all
other state of an update), `place` (in the data) and `config`. They are written in the background
and appear together, by rename.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

ITEMS = ("params", "optimizer", "place", "config")
FOLDER = "checkpoints"

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every file it writes


class Checkpoints:
    """The checkpoints of one run. Saving copies to the host and returns; writing goes on behind."""

    def __init__(self, workdir: epath.Path, keep: int | None = None, keep_every: int = 0):
        self.folder = epath.Path(workdir) / FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, item_names=ITEMS, options=options)

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, step: int, params, optimizer, place: dict, config: dict) -> None:
        """Replaces nothing: a step that is there already is left as it is."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                place=ocp.args.JsonSave(place),
                config=ocp.args.JsonSave(config),
            ),
        )

    def restore(self, step: int, params, optimizer) -> tuple[Any, Any, dict]:
        """(params, optimizer, place), laid out as the abstract trees given (shapes, shardings)."""
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
                place=ocp.args.JsonRestore(),
            ),
        )
        return found["params"], found["optimizer"], found["place"]

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def abstract(tree, sharding):
    """Shapes and dtypes of `tree`, to be restored with `sharding`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def steps(workdir: str | epath.Path) -> list[int]:
    """The steps whose checkpoints a run's folder holds, ascending."""
    folder = epath.Path(workdir) / FOLDER
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_params(workdir: str | epath.Path, step: int) -> dict:
    """The parameters of one checkpoint, on the host, as NumPy arrays."""
    with ocp.StandardCheckpointer() as reader:
        item = epath.Path(workdir) / FOLDER / str(step) / "params"
        shapes = reader.metadata(item).item_metadata
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(shapes))
        return jax.tree.map(jax.device_get, reader.restore(item, target))


def read_config(workdir: str | epath.Path, step: int) -> dict:
    """The resolved config that a checkpoint was made with."""
    import json

    folder = epath.Path(workdir) / FOLDER / str(step) / "config"
    return json.loads((folder / "metadata").read_text())
