"""What a run starts from: its own newest checkpoint, another run's, other weights, or a seed."""

from __future__ import annotations

import functools
import os

import jax
from etils import epath

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints, restore_from
from esm1nv_jax.checkpoints.model_folder import StepPath
from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import pipeline
from esm1nv_jax.data.source import Source
from esm1nv_jax.training import sharding
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_config import OF_STATE, RunConfig, changes_learning, flat_with_defaults
from esm1nv_jax.training.run_data import RunData
from esm1nv_jax.training.step import (
    StepConfig,
    TrainState,
    abstract_state,
    create_state,
    state_from_params,
)
from esm1nv_jax.training.workdir import OTHER_DATA


def find_fork(config: RunConfig, workdir: str) -> StepPath | None:
    """Return the step that `config.fork_from` names; its checksums match, its model is this one.

    None where the config names none, or where this run has checkpoints of its own.
    """
    if not config.fork_from or step_folder.steps(os.path.expanduser(workdir)):
        return None
    found = model_folder.find_step(config.fork_from)
    if found is None:
        raise UserError(
            f"fork_from={config.fork_from} is no run with checkpoints and no step of one; for the "
            "weights of a model alone, take init_from"
        )
    model_folder.check_step(*found)
    run, step, folder = found
    recorded = step_folder.read_metadata(run, step, folder)["config"]
    if recorded.get("finetune"):
        raise UserError(
            f"fork_from={config.fork_from} was fine-tuned, and a fork goes on with pretraining; "
            "take the weights alone, by init_from"
        )
    there, here = flat_with_defaults(recorded), config.flat()
    if differing := [n for n in here if n.startswith(OF_STATE) and here[n] != there.get(n)]:
        listed = "; ".join(f"{n}: {there.get(n)!r} there, {here[n]!r} here" for n in differing)
        raise UserError(
            f"fork_from={config.fork_from} holds another state than this config has: {listed}; "
            "keep these fields, or take weights alone, by init_from"
        )
    return found


def restore_fork(
    config: RunConfig, fork: StepPath, shapes: TrainState, source: Source
) -> tuple[TrainState, pipeline.State | None]:
    """Return the state of the step that a run is forked from, and that of its data stream.

    The latter is None, so that the stream begins anew, where this run reads other data or in
    another order.
    """
    run, step, folder = fork
    params, rest, data = restore_from(run, step, folder, *split_state(shapes))
    there = config_file.flat(step_folder.read_metadata(run, step, folder)["config"])
    same_stream = data["data"] == source.fingerprint and all(
        there.get(name) == value
        for name, value in config.flat().items()
        if name == "seed" or (name.startswith("data.") and changes_learning(name))
    )
    return TrainState(params=params, **rest), data.get("stream", {}) if same_stream else None


def restore_or_initialize(
    config: RunConfig,
    step_config: StepConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: RunCheckpoints,
    run_data: RunData,
    fork: StepPath | None,
    group: ProcessGroup,
) -> tuple[TrainState, pipeline.State | None, dict]:
    """Return the state to start from, that of the data stream, and the metadata of the checkpoint.

    In order of precedence: this run's newest valid checkpoint, the step that it is forked from,
    pretrained parameters, random parameters. The metadata are {} except in the first case. The
    state of the data stream is None where it begins anew.
    """
    replicated = sharding.sharding(mesh, "state")

    def choose() -> str:
        latest = checkpoints.latest_valid_step()
        return "" if latest is None else str(latest)

    chosen = group.broadcast("checkpoint", choose)
    checkpoints.broadcast_best(functools.partial(group.broadcast, "best"))
    if chosen and not checkpoints.best_step:  # damaged: what is to be better counts from here
        checkpoints.best_step = int(chosen)
    shapes = abstract_state(step_config, mesh)
    create = jax.jit(state_from_params, static_argnums=0, out_shardings=replicated)
    if chosen:
        step = (checkpoints.workdir, int(chosen), step_folder.FOLDER)
        params, rest, data = restore_from(*step, *split_state(shapes))
        if data["data"] != run_data.train.fingerprint:
            raise UserError(OTHER_DATA.format("training"))
        saved = step_folder.read_metadata(checkpoints.workdir, int(chosen))
        frozen: dict = {}
        if step_config.tuning is not None and run_data.initial is not None:
            check_base(saved, run_data.metadata, checkpoints.workdir)
            _, frozen = step_config.tuning.split(run_data.initial, step_config.model)
            frozen = sharding.place_state(jax.device_get(frozen), mesh)
        state = TrainState(params=params, frozen=frozen, **rest)
        return state, data.get("stream", {}), saved
    if fork is not None:
        return *restore_fork(config, fork, shapes, run_data.train), {}
    if run_data.initial is not None:
        return create(step_config, sharding.place_state(run_data.initial, mesh)), None, {}
    create_random = jax.jit(create_state, static_argnums=0, out_shardings=replicated)
    return create_random(step_config), None, {}


def check_base(saved: dict, here: dict, run_dir: epath.Path) -> None:
    """Raise UserError where a fine-tuned run was begun from another base model."""
    before, now = saved["base"], here["base"]
    if before["digest"] != now["digest"]:
        raise UserError(
            f"{run_dir} was begun from {before['path']} with digest {before['digest'][:16]}; "
            f"{now['path']} now has {now['digest'][:16]}: put that model there again, or choose "
            "another --workdir=DIR"
        )


def split_state(state: TrainState) -> tuple[dict, dict]:
    """Return a state as two items of a checkpoint: the parameters, and all the rest."""
    rest = {"step": state.step, "opt_state": state.opt_state, "nonfinite": state.nonfinite}
    return state.params, rest


def checkpoint_items(
    state: TrainState, data_state: pipeline.State, source: Source, metadata: dict
) -> tuple[dict, dict, dict, dict]:
    """Return what a checkpoint holds: parameters, optimizer and counters, data state, metadata."""
    data = {"stream": data_state, "data": source.fingerprint}
    return *split_state(state), data, metadata
