"""A run, top to bottom, in the order in which things happen."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from esm1nv_jax import __version__
from esm1nv_jax.console import bar, console
from esm1nv_jax.data.dataset import Source, open_split
from esm1nv_jax.data.pipeline import Batch, Place, StreamConfig, evaluation_batches, train_batches
from esm1nv_jax.data.prefetch import Prefetch
from esm1nv_jax.errors import UserError
from esm1nv_jax.training import metrics, sharding, step, summary, workdir
from esm1nv_jax.training.leaving import Leaving
from esm1nv_jax.training.settings import fitted, global_rows, step_config, stream_config
from esm1nv_jax.weights import checkpoint, folder


def train(config: ConfigDict, path: str) -> int:
    """Trains as `config` says, in the folder `path`, from where a run there left off.

    Returns the exit status: 0 when `config.steps` updates are done; 75 or 130 when a signal ended
    the run early, saved; 1 when an update was not finite. Raises UserError before anything is
    written where the config is wrong.
    """
    settings = step_config(config)
    mesh = sharding.make_mesh(sharding.devices_of(config.platform))
    settings = fitted(settings, config, mesh.devices.flat[0])
    source, held_out = open_data(config)
    stream = stream_config(config, global_rows(config, source.lengths, mesh.size))
    origin = open_origin(config, settings)

    with workdir.hold(path) as run_folder:
        workdir.settle(run_folder, config)
        checkpoints = checkpoint.Checkpoints(
            run_folder, config.checkpoint.keep, config.checkpoint.keep_every
        )
        state, place = first_state(settings, mesh, checkpoints, source, origin)
        update, evaluate = step.compiled(settings, mesh)
        done = int(state.step)
        summary.show_start(config, settings, stream, source, mesh, run_folder, done)

        writer = metrics.Writer(run_folder, done, jax.process_index() == 0)
        window = metrics.Window(settings.model, mesh.devices.flat)

        def validate() -> None:
            """Figures on held-out sequences: the same ones, masked alike, every time."""
            sums: dict[str, float] = {}
            for batch in validation(held_out, stream, mesh, config.evaluation.batches):
                sums = metrics.add(sums, jax.device_get(evaluate(state.params, batch)))
            writer.write(done, "validation", metrics.figures(sums))

        def save() -> None:
            where = {**vars(place), "data": source.fingerprint}
            made_by = {"config": config.to_dict(), "code": __version__}
            checkpoints.save(done, *in_parts(state), where, made_by)

        def look_at(number: int, batch: Batch, values) -> bool:
            """Fetches the figures of update `number`; False where it was not finite."""
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            if values["halted"]:
                summary.keep_evidence(run_folder, number, batch, state.params, values, checkpoints)
                return False
            window.add(values)
            if number % config.log.every == 0 or number == config.steps:
                norms = ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")
                found = window.take() | {name: values[name] for name in norms}
                writer.write(number, "train", found)
                task.note = summary.line(found)
            task.update(number, task.note)
            return True

        with (
            Leaving() as leaving,
            Prefetch(placed_batches(source, stream, mesh, place)) as batches,
            bar("training", config.steps, "updates", start=done) as task,
            jax.transfer_guard("disallow"),
        ):
            if done == 0:
                validate()
                window.start()
            pending = None
            while done < config.steps and leaving.signal is None:
                batch, arrays, place = next(batches)
                state, values = update(state, arrays)
                done += 1
                # Update n + 1 is on its way before the figures of update n are waited for.
                if pending is not None and not look_at(*pending):
                    return 1
                pending = (done, batch, values)
                last = done == config.steps or leaving.signal is not None
                to_validate = done == config.steps or done % config.evaluation.every == 0
                to_save = last or done % config.checkpoint.every == 0
                if to_validate or to_save:
                    if not look_at(*pending):
                        return 1
                    pending = None
                    with window.pause():
                        if to_validate:
                            validate()
                        if to_save:
                            save()
        checkpoints.close()  # waits until what was saved is on disk
        writer.close()
        if leaving.signal is not None and done < config.steps:
            console.print(f"saved update {done} in {run_folder}; the same command goes on there")
            return leaving.status
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


def open_origin(config: ConfigDict, settings: step.StepConfig) -> folder.Weights | None:
    """Weights to start from, if `config.init_from` names any; they must fit the config's model."""
    if not config.init_from:
        return None
    origin = folder.read(config.init_from)
    folder.check(origin.params, settings.model, f"init_from={config.init_from}")
    return origin


def first_state(
    settings: step.StepConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: checkpoint.Checkpoints,
    source: Source,
    origin: folder.Weights | None,
) -> tuple[step.TrainState, Place]:
    """From the newest checkpoint; else from another model's weights; else fresh."""
    layout = sharding.sharding(mesh, "state")
    found = checkpoints.steps()
    if found:
        shapes = checkpoint.abstract(jax.eval_shape(lambda: step.create_state(settings)), layout)
        params, rest, place = checkpoints.restore(found[-1], *in_parts(shapes))
        if place.pop("data") != source.fingerprint:
            raise UserError(
                "the training split is not the one this run began with; set config.data.path to "
                "the same data set, or choose another --workdir=DIR"
            )
        return step.TrainState(params=params, **rest), Place(**place)
    if origin is not None:
        start = jax.jit(step.fresh_state, static_argnums=0, out_shardings=layout)
        return start(settings, jax.device_put(origin.params, layout)), Place()
    create = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)
    return create(settings), Place()


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
    return {
        name: jax.make_array_from_process_local_data(layout, np.ascontiguousarray(batch[name]))
        for name in step.ON_DEVICE
    }
