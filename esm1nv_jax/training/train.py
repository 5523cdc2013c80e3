"""A run, top to bottom, in the order in which things happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints import manager, model_folder
from esm1nv_jax.common import config_file
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.pipeline import Batch, Place, StreamConfig, evaluation_batches, train_batches
from esm1nv_jax.data.prefetch import Prefetch
from esm1nv_jax.data.source import Source, open_split
from esm1nv_jax.data.stream_config import stream_config
from esm1nv_jax.training import (
    host_metrics,
    metrics,
    process_group,
    sharding,
    step,
    summary,
    workdir,
)
from esm1nv_jax.training.checkpoint_policy import Saving
from esm1nv_jax.training.metrics_writer import Writer
from esm1nv_jax.training.preemption import Leaving
from esm1nv_jax.training.profiling import Profile
from esm1nv_jax.training.run_config import fitted, global_rows, step_config
from esm1nv_jax.training.watchdog import Watchdog


def train(config: ConfigDict, path: str, strict: bool = False) -> int:
    """Trains as `config` says, in the folder `path`, from where a run there left off.

    With several processes each calls this. `strict` stops at a damaged checkpoint, where otherwise
    the run falls back to an older one.

    Returns the exit status: 0 when `config.steps` updates are done; 75 or 130 when a signal ended
    the run early, saved; 1 when an update was not finite. Raises UserError before anything is
    written where the config is wrong.
    """
    settings = step_config(config)
    limits = config.cluster
    with process_group.join(limits.start_timeout, limits.stall_timeout) as (team, watchdog):
        return run(config, settings, path, strict, team, watchdog)


def run(
    config: ConfigDict,
    settings: step.StepConfig,
    path: str,
    strict: bool,
    team: process_group.Team,
    watchdog: Watchdog,
) -> int:
    """The run of one process of `team`."""
    mesh = sharding.make_mesh(sharding.devices_of(config.platform))
    settings = fitted(settings, config, mesh.devices.flat[0])
    source, held_out = open_data(config)
    stream = stream_config(config, global_rows(config, source.lengths, mesh.size))
    origin = open_origin(config, settings)
    fingerprints = f"{source.fingerprint} {held_out.fingerprint}"
    watchdog.hosts = process_group.agree(team, mesh.size, config_file.flat(config), fingerprints)

    with (
        workdir.hold(path, team) as run_folder,
        host_metrics.log(run_folder, team, watchdog) as log,
        contextlib.ExitStack() as at_the_end,
    ):
        if team.process == 0:
            workdir.settle(run_folder, config)
        saving = Saving(run_folder, config.checkpoint, strict)
        watchdog.beat("reading the checkpoint")
        state, place, before = first_state(
            settings, mesh, saving.checkpoints, source, origin, team, strict
        )
        watchdog.beat("compiling")
        update, evaluate = compiled(settings, mesh, state, stream)
        # A collective waits half a minute for its peers, and compiles may differ by more.
        team.together("compiled", watchdog.limit)
        done = int(state.step)
        layout = {"devices": mesh.size, "processes": team.processes, "rows": stream.rows}
        if team.process == 0:
            summary.show_start(
                config,
                settings,
                stream,
                source,
                mesh,
                run_folder,
                done,
                watchdog.hosts,
                before,
                layout,
            )

        writer = at_the_end.enter_context(Writer(run_folder, done, team.process == 0))
        window = metrics.Window(settings.model, mesh.devices.flat)
        clock = host_metrics.HostClock(team, mesh.local_devices[0])

        def validate() -> dict[str, float]:
            """Figures on held-out sequences: the same ones, masked alike, every time."""
            sums: dict[str, float] = {}
            for batch in validation(held_out, stream, mesh, config.evaluation.batches):
                watchdog.beat("evaluating")
                sums = metrics.add(sums, evaluate(state.params, batch).fetched())
            found = metrics.figures(sums)
            writer.write(done, "validation", found)
            return found

        def checkpoint_parts() -> tuple:
            where = {**vars(place), "data": source.fingerprint}
            made_by = {"config": config.to_dict(), "code": __version__, "layout": layout}
            return done, *in_parts(state), where, made_by

        def look_at(number: int, batch: Batch, values) -> bool:
            """Fetches the figures of update `number`; False where it was not finite."""
            with clock.waiting():
                values = values.fetched()
            if values["halted"]:
                summary.keep_evidence(run_folder, number, batch, values, saving.checkpoints)
                return False
            window.add(values)
            if number % config.log.every == 0 or number == config.steps:
                norms = ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")
                found = window.take() | {name: values[name] for name in (*norms, "nonfinite")}
                writer.write(number, "train", found)
                by_host = clock.take(batches.waited)
                writer.write(number, "hosts", by_host)
                host_metrics.note(log, number, by_host)
                task.note = summary.line(found)
            task.update(number, task.note)
            return True

        with (
            Leaving(team.processes) as leaving,
            Prefetch(placed_batches(source, stream, mesh, place)) as batches,
            bar("training", config.steps, "updates", team.process == 0, start=done) as task,
            Profile("" if team.process else config.profile, run_folder / "profile") as profile,
            jax.transfer_guard("disallow"),
        ):
            if done == 0:
                validate()
                window.start()
            watchdog.limit = config.cluster.stall_timeout
            pending, last = None, done >= config.steps
            while not last:
                watchdog.beat(f"waiting for the batch of update {done + 1}")
                profile.before(done + 1, state)
                batch, arrays, place = next(batches)
                watchdog.beat(f"at update {done + 1}")
                state, values = update(state, arrays)
                done += 1
                # Update n + 1 is on its way before the figures of update n are waited for.
                if pending is not None and not look_at(*pending):
                    return 1
                pending = (done, batch, values)
                saving.check()
                last = leaving.asked(done) or done == config.steps
                to_validate = done == config.steps or done % config.evaluation.every == 0
                to_save = last or saving.due(done)
                if to_validate or to_save:
                    if not look_at(*pending):
                        return 1
                    pending = None
                    with window.pause():
                        clock.probe()
                        if to_validate:
                            found = validate()
                            saving.save_if_best(found["loss_mask"], *checkpoint_parts())
                        if to_save:
                            watchdog.beat(f"saving update {done}")
                            saving.save(*checkpoint_parts())
        watchdog.beat("waiting until the last checkpoint is on disk")
        saving.close()
        team.together("saved", config.cluster.stall_timeout)
        watchdog.rest()
        if leaving.leaving and done < config.steps:
            if team.process == 0:
                console.print(
                    f"saved update {done} in {run_folder}; the same command goes on there"
                )
            return leaving.status
        if team.process == 0:
            summary.show_end(config, settings, stream, source, held_out, run_folder)
    return 0


def open_data(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the validation split."""
    if not config.data.path:
        raise UserError(
            "config.data.path is empty: make a data set with `esm1nv prepare --fasta "
            "uniref50.fasta.gz --out DIR` and add --config.data.path=DIR, or try "
            "--config.data.path=sample"
        )
    return open_split(config.data.path, "train"), open_split(config.data.path, "validation")


def open_origin(config: ConfigDict, settings: step.StepConfig) -> model_folder.Weights | None:
    """Weights to start from, if `config.init_from` names any; they must fit the config's model."""
    if not config.init_from:
        return None
    origin = model_folder.read(config.init_from)
    model_folder.check(origin.params, settings.model, f"init_from={config.init_from}")
    return origin


def first_state(
    settings: step.StepConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: manager.Checkpoints,
    source: Source,
    origin: model_folder.Weights | None,
    team: process_group.Team,
    strict: bool,
) -> tuple[step.TrainState, Place, dict | None]:
    """From the newest good checkpoint; else from another model's weights; else fresh.

    With the state come the place in the data and the layout that the checkpoint was made on.
    """
    layout = sharding.sharding(mesh, "state")
    run_folder = checkpoints.folder.parent

    def choose() -> str:
        found = manager.newest_good(run_folder, strict, console.print)
        if found is None:
            return ""
        checkpoints.set_aside(after=found)
        return str(found)

    chosen = team.announce("checkpoint", choose)
    if chosen:
        shapes = manager.abstract(jax.eval_shape(lambda: step.create_state(settings)), layout)
        params, rest, place = checkpoints.restore(int(chosen), *in_parts(shapes))
        if place.pop("data") != source.fingerprint:
            raise UserError(
                "the training split is not the one this run began with; set config.data.path to "
                "the same data set, or choose another --workdir=DIR"
            )
        before = manager.read_config(run_folder, int(chosen)).get("layout")
        return step.TrainState(params=params, **rest), Place(**place), before
    if origin is not None:
        start = jax.jit(step.fresh_state, static_argnums=0, out_shardings=layout)
        params = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, layout, lambda index: x[index]),
            origin.params,
        )
        return start(settings, params), Place(), None
    create = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)
    return create(settings), Place(), None


def compiled(
    settings: step.StepConfig, mesh: jax.sharding.Mesh, state: step.TrainState, stream: StreamConfig
):
    """(update, evaluation), compiled before anything else begins."""
    update, evaluate = step.compiled(settings, mesh)
    layout, shape = sharding.sharding(mesh, "batch"), (stream.rows, stream.row_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
        for name, dtype in step.ON_DEVICE.items()
    }
    return update.lower(state, batch).compile(), evaluate.lower(state.params, batch).compile()


def in_parts(state: step.TrainState) -> tuple[dict, dict]:
    """A state as two items of a checkpoint: the parameters, and all the rest."""
    rest = {"step": state.step, "opt_state": state.opt_state, "nonfinite": state.nonfinite}
    return state.params, rest


def placed_batches(
    source: Source, stream: StreamConfig, mesh: jax.sharding.Mesh, place: Place
) -> Iterator[tuple[Batch, dict[str, jax.Array], Place]]:
    """(this process's rows, the global batch on the devices, the place after it), without end."""
    rows = sharding.local_rows(mesh, stream.rows)
    for batch, after in train_batches(source, stream, place, rows):
        yield batch, on_devices(batch, mesh), after


def validation(
    source: Source, stream: StreamConfig, mesh: jax.sharding.Mesh, batches: int
) -> Iterator[dict[str, jax.Array]]:
    """The first `batches` global batches of held-out rows, or all of them where it is 0."""
    rows = sharding.local_rows(mesh, stream.rows)
    for i, batch in enumerate(evaluation_batches(source, stream, rows)):
        if batches and i == batches:
            return
        yield on_devices(batch, mesh)


def on_devices(batch: Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    layout = sharding.sharding(mesh, "batch")
    with jax.transfer_guard_host_to_device("allow"):  # this one transfer is meant
        return {
            name: jax.make_array_from_process_local_data(layout, np.ascontiguousarray(batch[name]))
            for name in step.ON_DEVICE
        }
