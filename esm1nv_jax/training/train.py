"""A run, top to bottom, in the order in which things happen."""

from __future__ import annotations

import contextlib
import functools
import os

import grain
import jax
from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints, restore_from
from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import pipeline
from esm1nv_jax.data.packing import StreamConfig, stream_config
from esm1nv_jax.data.source import Source
from esm1nv_jax.training import evaluation, memory, process_group, sharding, summary
from esm1nv_jax.training.host_metrics import open_host_log
from esm1nv_jax.training.monitor import NonfiniteStep, RunMonitor
from esm1nv_jax.training.objectives import Objective
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_config import RunConfig, changes_learning
from esm1nv_jax.training.run_data import RunData, open_data
from esm1nv_jax.training.step import (
    StepConfig,
    TrainState,
    abstract_state,
    compile_steps,
    create_state,
    state_from_params,
)
from esm1nv_jax.training.watchdog import Watchdog
from esm1nv_jax.training.workdir import lock_workdir, write_or_check_config


def train(config: RunConfig, workdir: str, strict: bool = False) -> int:
    """Train as `config` says in the folder `workdir`, resuming the run that is there.

    With several processes each calls this. `strict` stops at a damaged checkpoint, where otherwise
    the run falls back to an older one.

    Returns the exit status: 0 when `config.steps` steps are done or `config.minutes` have passed;
    75 or 130 when a signal ended the run early, saved; 1 when a step was not finite. Raises
    UserError, before anything is written, where the config does not fit the data or the devices.
    """
    timeouts = config.cluster
    with process_group.join(timeouts.start_timeout, timeouts.stall_timeout) as (group, watchdog):
        return run(config, workdir, strict, group, watchdog)


def run(
    config: RunConfig, workdir: str, strict: bool, group: ProcessGroup, watchdog: Watchdog
) -> int:
    """Train in one process of `group`; see `train`."""
    mesh = sharding.make_mesh(sharding.devices_of(config.platform))
    _ = config.step_config(mesh.devices.flat[0])  # raises UserError before data are opened
    data = open_data(config)
    step_config = config.step_config(mesh.devices.flat[0], data.objective, data.tuning)
    objective = step_config.objective
    stream = stream_config(config, config.global_rows(data.train.lengths, mesh.size))
    memory.check_memory(step_config, stream, mesh)
    fork = find_fork(config, workdir)
    watchdog.hosts = process_group.assert_equal_across_processes(
        group, mesh.size, config.flat(), " ".join(data.fingerprints.values())
    )

    with lock_workdir(workdir, group) as run_dir, open_host_log(run_dir, group, watchdog) as log:
        if group.is_primary:
            write_or_check_config(run_dir, config, data.fingerprints)
        best_by = objective.best_metric, objective.maximize
        checkpoints = RunCheckpoints(run_dir, config.checkpoint, strict, *best_by)
        layout = {"devices": mesh.size, "processes": group.size, "rows": stream.rows}
        metadata = {"config": config.to_dict(), "code": __version__, "layout": layout}
        metadata |= data.metadata

        watchdog.heartbeat("restoring the checkpoint")
        state, data_state, saved = restore_or_initialize(
            config, step_config, mesh, checkpoints, data, fork, group
        )
        step = int(state.step)  # steps done
        watchdog.heartbeat("compiling")
        train_step, eval_step = compile_steps(step_config, mesh, stream.rows, stream.row_length)
        if not command.keeps(train_step.memory_analysis().temp_size_in_bytes):
            command.return_freed_memory()
        # A collective waits half a minute for its peers, and compile times may differ by more.
        group.barrier("compiled", watchdog.stall_timeout)
        if group.is_primary:
            summary.print_start(
                config, step_config, stream, data, mesh, watchdog.hosts, run_dir, step
            )
            if fork and not saved:
                goes_on = "goes on there" if data_state is not None else "begins anew"
                console.print(f"forked     from {config.fork_from}; the data stream {goes_on}")
            summary.print_layout_change(saved.get("layout"), layout)

        monitor = RunMonitor(
            config, objective, run_dir, group, watchdog, log, mesh, step, saved.get("seconds", 0.0)
        )
        batches = training_batches(
            data.train, stream, objective, mesh, config.data.workers, data_state
        )
        validate = functools.partial(
            validation_metrics, objective, data.validation, stream, mesh, monitor, eval_step
        )
        try:
            with monitor, contextlib.closing(batches), jax.transfer_guard("disallow"):
                if step == 0 or (fork and not saved):
                    validate(state, step)
                monitor.start()
                pending = None
                finished = stop = monitor.finished(step) or out_of_patience(
                    config, checkpoints, step
                )
                while not stop:
                    with monitor.waiting_for_batch(step + 1, state):
                        batch, device_batch = next(batches)
                    state, metrics = train_step(state, device_batch)
                    step += 1
                    # The device works on this step while the metrics of the last are fetched.
                    if pending is not None:
                        monitor.process_metrics(*pending)
                    pending = (step, batch, metrics)
                    checkpoints.check()
                    finished = monitor.finished(step)
                    stop = monitor.should_stop(step) or finished
                    evaluate_now = step % config.evaluation.every == 0 or finished
                    save_now = stop or checkpoints.should_save(step)
                    if not (evaluate_now or save_now):
                        continue
                    monitor.process_metrics(*pending)
                    pending = None
                    with monitor.pause():
                        seconds = {"seconds": monitor.seconds}
                        items = checkpoint_items(
                            state, batches.get_state(), data.train, metadata | seconds
                        )
                        if evaluate_now:
                            value = validate(state, step)[objective.best_metric]
                            checkpoints.save_if_best(value, step, *items)
                            finished |= out_of_patience(config, checkpoints, step)
                            stop |= finished
                        if stop or save_now:
                            monitor.heartbeat(f"saving step {step}")
                            checkpoints.save(step, *items)
        except NonfiniteStep as error:
            checkpoints.wait()
            summary.dump_nonfinite_batch(run_dir, error)
            return 1
        watchdog.heartbeat("waiting until the last checkpoint is on disk")
        checkpoints.wait()
        group.barrier("saved", config.cluster.stall_timeout)
        if finished and data.test is not None:
            evaluation.test_once(data, state, stream, mesh, group, watchdog, eval_step, run_dir)
        watchdog.disable()
        stop_status = 0 if finished else monitor.stop_status
        if group.is_primary and stop_status:
            summary.print_stopped(step, run_dir)
        elif group.is_primary and data.task is not None:
            evaluation.print_results(data, run_dir)
        elif group.is_primary:
            summary.print_results(config, stream, data.train, data.validation, run_dir)
        return stop_status


def out_of_patience(config: RunConfig, checkpoints: RunCheckpoints, step: int) -> bool:
    """Return whether fine-tuning ends since so many validations have brought nothing better."""
    patience = config.finetune.patience if config.finetune else 0
    return bool(patience) and step - checkpoints.best_step >= patience * config.evaluation.every


def find_fork(config: RunConfig, workdir: str) -> tuple[epath.Path, int, str] | None:
    """Return (run, step, folder in it) of `config.fork_from`; it is whole and of this model.

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
    there = step_folder.read_metadata(run, step, folder)["config"]["model"]
    here = config.to_dict()["model"]
    if there != here:
        differing = ", ".join(name for name in here if here[name] != there.get(name))
        raise UserError(f"fork_from={config.fork_from} has another model: {differing} differ")
    return found


def restore_fork(
    config: RunConfig, fork: tuple[epath.Path, int, str], shapes: TrainState, source: Source
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
    fork: tuple[epath.Path, int, str] | None,
    group: ProcessGroup,
) -> tuple[TrainState, pipeline.State | None, dict]:
    """Return the state to start from, that of the data stream, and the metadata of the checkpoint.

    In order of precedence: this run's newest valid checkpoint, the step that it is forked from,
    pretrained parameters, random parameters. The metadata are empty but for the first. The last two
    start the data stream anew: its state is None.
    """
    replicated = sharding.sharding(mesh, "state")

    def choose() -> str:
        latest = checkpoints.latest_valid_step()
        return "" if latest is None else str(latest)

    chosen = group.broadcast("checkpoint", choose)
    checkpoints.best_step = int(group.broadcast("best", lambda: str(checkpoints.best_step)))
    shapes = abstract_state(step_config, mesh)
    create = jax.jit(state_from_params, static_argnums=0, out_shardings=replicated)
    if chosen:
        params, rest, data = checkpoints.restore(int(chosen), *split_state(shapes))
        if data["data"] != run_data.train.fingerprint:
            raise UserError(
                "the training split is not the one this run began with; set config.data.path to "
                "the same data set, or choose another --workdir=DIR"
            )
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


def training_batches(
    source: Source,
    stream: StreamConfig,
    objective: Objective,
    mesh: jax.sharding.Mesh,
    workers: int = 0,
    data_state: pipeline.State | None = None,
) -> grain.DatasetIterator:
    """Return an endless iterator of (this process's rows, the global batch on the devices), which
    goes on from `data_state` and is ahead of the caller in a thread."""

    def place(batch: pipeline.Batch) -> tuple[pipeline.Batch, dict[str, jax.Array]]:
        return batch, sharding.place_on_devices(batch, objective.batch_dtypes, mesh)

    rows = sharding.local_rows(mesh, stream.rows)
    dataset = pipeline.train_dataset(source, stream, rows, workers)
    return pipeline.prefetch(dataset.map(place), data_state)


def validation_metrics(
    objective: Objective,
    source: Source,
    stream: StreamConfig,
    mesh: jax.sharding.Mesh,
    monitor: RunMonitor,
    eval_step,
    state: TrainState,
    step: int,
) -> dict[str, float]:
    """Return and log metrics on held-out sequences: the same ones, masked alike, every time."""
    sums, outputs = evaluation.evaluate(
        objective, source, stream, mesh, monitor.heartbeat, eval_step, state.all_params
    )
    metrics = objective.metrics(sums, outputs)
    monitor.write_validation(step, metrics)
    return metrics
