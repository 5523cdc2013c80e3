"""A run, top to bottom, in the order in which things happen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.data import pipeline
from esm1nv_jax.data.packing import StreamConfig, stream_config
from esm1nv_jax.data.source import Source
from esm1nv_jax.training import distributed, evaluation, process_group, sharding, summary
from esm1nv_jax.training.distributed import Watchdog
from esm1nv_jax.training.initial_state import checkpoint_items, find_fork, restore_or_initialize
from esm1nv_jax.training.monitor import NonfiniteStep, RunMonitor
from esm1nv_jax.training.objective import Objective
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.run_data import open_data
from esm1nv_jax.training.step import TrainState, check_memory, compile_steps
from esm1nv_jax.training.workdir import lock_workdir, open_host_log, write_or_check_config


def train(config: RunConfig, workdir: str, strict: bool = False) -> int:
    """Train as `config` says in the folder `workdir`, resuming the run that is there.

    With several processes each calls this. `strict` stops at a damaged checkpoint, where otherwise
    the run falls back to an older one.

    Returns the exit status: 0 when `config.steps` steps are done, `config.minutes` have passed or
    `config.finetune.patience` ends the run; 75 or 130 when a signal ended it early, saved; 1 when
    more than `config.skip_nonfinite` steps were not finite. Raises UserError where the config does
    not fit the data, the devices or the folder; nothing that the folder holds is lost.
    """
    with distributed.join(config.cluster) as (group, watchdog):
        return run(config, workdir, strict, group, watchdog)


def run(
    config: RunConfig, workdir: str, strict: bool, group: ProcessGroup, watchdog: Watchdog
) -> int:
    """Train in one process of `group`; see `train`."""
    mesh = sharding.make_mesh(sharding.devices_of(config.platform))
    _ = config.step_config(mesh.devices.flat[0])  # raises UserError before data are opened
    data = open_data(config, workdir)
    step_config = config.step_config(mesh.devices.flat[0], data.objective, data.tuning)
    objective = step_config.objective
    stream = stream_config(config, config.global_rows(data.train.lengths, mesh.size))
    check_memory(step_config, stream, mesh)
    fork = find_fork(config, workdir)
    hosts = watchdog.hosts = process_group.assert_equal_across_processes(
        group, mesh.size, config.flat(), " ".join(data.fingerprints.values())
    )

    with lock_workdir(workdir, group) as run_dir, open_host_log(run_dir, group, watchdog) as log:
        if group.is_primary:
            write_or_check_config(run_dir, config, data.fingerprints)
        checkpoints = RunCheckpoints(
            run_dir, config.checkpoint, strict, objective.best_metric, objective.maximize
        )
        layout = {"devices": mesh.size, "processes": group.size, "rows": stream.rows}
        metadata = {"config": config.to_dict(), "code": __version__, "layout": layout}
        metadata |= data.metadata

        watchdog.heartbeat("restoring the checkpoint")
        state, stream_state, saved_metadata = restore_or_initialize(
            config, step_config, mesh, checkpoints, data, fork, group
        )
        step = int(state.step)  # steps done
        if group.is_primary:
            summary.print_start(config, step_config, stream, data, mesh, hosts, run_dir, step)
            if fork:
                summary.print_fork(config.fork_from, anew=stream_state is None)
            summary.print_layout_change(saved_metadata.get("layout"), layout)
        watchdog.heartbeat("compiling")
        train_step, eval_step = compile_steps(step_config, mesh, stream.rows, stream.row_length)
        # Gloo's collectives wait half a minute for their peers; compile times may differ by more.
        # Until `monitor.start` the watchdog has the longer of the start and the stall timeout.
        group.barrier("compiled", watchdog.stall_timeout)

        monitor = RunMonitor(
            config, objective, run_dir, group, watchdog, log, mesh, step, saved_metadata
        )
        batches = training_batches(
            data.train, stream, objective, mesh, config.data.workers, stream_state
        )
        evaluate = functools.partial(
            evaluation.evaluate, objective, stream, mesh, eval_step, watchdog.heartbeat
        )
        validate = functools.partial(evaluate, data.validation)
        try:
            with monitor, contextlib.closing(batches), jax.transfer_guard("disallow"):
                if not saved_metadata:  # the run begins
                    if group.is_primary:  # results of an earlier one, perhaps of other data
                        for file in (evaluation.FILE, summary.BASELINES):
                            (run_dir / file).unlink(missing_ok=True)
                    monitor.write_validation(step, validate(state.all_params)[0])
                state, step, finished = training_loop(
                    config,
                    state,
                    step,
                    batches,
                    train_step,
                    validate,
                    monitor,
                    checkpoints,
                    data.train,
                    metadata,
                )
                watchdog.heartbeat("waiting until the last checkpoint is on disk")
                checkpoints.wait()  # a second SIGTERM must not end this
        except NonfiniteStep as error:
            checkpoints.wait()
            summary.dump_nonfinite_batch(run_dir, error)
            return 1
        group.barrier("saved", watchdog.stall_timeout)
        if finished:
            evaluation.test_once(data, state, mesh, group, evaluate, run_dir)
        watchdog.enabled = False
        stop_status = 0 if finished else monitor.stop_status
        if group.is_primary and stop_status:
            summary.print_stopped(step, run_dir)
        elif group.is_primary:
            summary.print_results(config, stream, data, run_dir)
        return stop_status


def training_loop(
    config: RunConfig,
    state: TrainState,
    step: int,
    batches: grain.DatasetIterator,
    train_step: Callable,
    validate: Callable[[dict], tuple[dict[str, float], Any]],
    monitor: RunMonitor,
    checkpoints: RunCheckpoints,
    source: Source,
    metadata: dict,
) -> tuple[TrainState, int, bool]:
    """Train from `step` on; evaluate and save when it is time.

    Returns the last state, its step, and whether the run is finished: else a signal stopped it.
    Raises NonfiniteStep one step late, when the state still is the one that met the bad batch.
    """
    monitor.start()
    pending = None  # a step whose metrics are not fetched yet
    finished = monitor.reached_limit(step) or out_of_patience(config, checkpoints, step)
    stop = finished
    while not stop:
        with monitor.waiting_for_batch(step + 1, state):
            batch, device_batch = next(batches)
        state, metrics = train_step(state, device_batch)
        step += 1
        # The metrics of the previous step are fetched while the device computes this one.
        if pending is not None:
            monitor.process_metrics(*pending)
        pending = (step, batch, metrics)
        checkpoints.check()
        finished = monitor.reached_limit(step)
        stop = monitor.should_stop(step) or finished  # all processes ask every step
        evaluate_now = step % config.evaluation.every == 0 or finished
        save_now = stop or checkpoints.should_save(step)
        if not (evaluate_now or save_now):
            continue
        monitor.process_metrics(*pending, last=finished)
        pending = None
        with monitor.pause():
            now = metadata | {"seconds": monitor.seconds}
            items = checkpoint_items(state, batches.get_state(), source, now)
            if evaluate_now:
                validation, _ = validate(state.all_params)
                monitor.write_validation(step, validation)
                checkpoints.save_if_best(validation[checkpoints.best_metric], step, *items)
                finished |= out_of_patience(config, checkpoints, step)
                stop |= finished
            if stop or save_now:
                monitor.heartbeat(f"saving step {step}")
                checkpoints.save(step, *items)
    if finished:  # if by patience, validation decided it after the metrics of the step
        monitor.write_train()
    return state, step, finished


def out_of_patience(config: RunConfig, checkpoints: RunCheckpoints, step: int) -> bool:
    """Return whether the last `finetune.patience` validations have not improved the metric."""
    patience = config.finetune.patience if config.finetune else 0
    return bool(patience) and step - checkpoints.best_step >= patience * config.evaluation.every


def training_batches(
    source: Source,
    stream: StreamConfig,
    objective: Objective,
    mesh: jax.sharding.Mesh,
    workers: int = 0,
    stream_state: pipeline.State | None = None,
) -> grain.DatasetIterator:
    """Return an endless iterator of (this process's rows, the global batch on the devices), which
    goes on from `stream_state` and is prefetched in a thread."""

    def place(batch: pipeline.Batch) -> tuple[pipeline.Batch, dict[str, jax.Array]]:
        return batch, sharding.place_on_devices(batch, objective.batch_dtypes, mesh)

    rows = sharding.local_rows(mesh, stream.rows)
    dataset = pipeline.train_dataset(source, stream, rows, workers)
    return pipeline.prefetch(dataset.map(place), stream_state)
