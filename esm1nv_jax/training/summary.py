"""What a run prints: how it begins, how it ended, and what went wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from esm1nv_jax.checkpoints.step_folder import FOLDER, steps
from esm1nv_jax.common import files, metrics_log
from esm1nv_jax.common.console import console, numbers_table
from esm1nv_jax.data.packing import StreamConfig, evaluation_stream, rows_for
from esm1nv_jax.data.pipeline import evaluation_batches
from esm1nv_jax.data.source import Source
from esm1nv_jax.interchange.hf_config import inexact_reason
from esm1nv_jax.model import baselines, masking
from esm1nv_jax.model.dropout import attention_rate
from esm1nv_jax.model.encoder import parameter_count
from esm1nv_jax.training import evaluation
from esm1nv_jax.training.monitor import NonfiniteStep
from esm1nv_jax.training.objective import MaskedLM
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.run_data import RunData
from esm1nv_jax.training.step import StepConfig

BASELINES = "baselines.json"  # in the folder of a run: perplexity of each at <mask>


def print_start(
    config: RunConfig,
    step_config: StepConfig,
    stream: StreamConfig,
    data: RunData,
    mesh: jax.sharding.Mesh,
    hosts: list[str],
    run_dir: epath.Path,
    step: int,
) -> None:
    """Print what the run consists of, before its first step."""
    model = config.model
    names = sorted(set(hosts))
    rows = stream.rows // mesh.size
    sequences = stream.rows * 1_000_000 / rows_for(data.train.lengths, 1_000_000, stream)
    console.print(
        f"model      {parameter_count(model):,} parameters: {model.layers} layers, "
        f"{model.width} wide, {model.heads} heads, {model.positions} positions\n"
        f"data       {config.data.path}: {len(data.train.lengths):,} training sequences\n"
        f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind} in {len(hosts)} process(es) "
        f"on {len(names)} host(s) ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})\n"
        f"batch      {stream.rows} rows of {stream.row_length} tokens, about {sequences:,.0f} "
        f"sequences; {rows} rows, about {sequences / mesh.size:,.1f} sequences a device: "
        f"{stream.rows * stream.row_length:,} tokens a step\n"
        f"{describe_objective(config, data)}; "
        f"matmuls in {config.compute.dtype}, attention by {step_config.compute.attention}\n"
        + describe_attention_rate(model.attention_dropout)
        + (f"export     {inexact}\n" if (inexact := inexact_reason(model)) else "")
        + f"workdir    {run_dir}"
        + (f"\nresuming   from step {step:,} of {config.steps:,}" if step else "")
    )


def describe_attention_rate(rate: float) -> str:
    """Return a line that names the rate of attention dropout, where another is used than asked."""
    used = attention_rate(rate)
    if used == rate:
        return ""
    return f"dropout    attention_dropout={rate:g} is {round(used * 256)}/256 = {used:.4f}\n"


def describe_objective(config: RunConfig, data: RunData) -> str:
    """Return what is learned, and of fine-tuning by how many trained parameters."""
    if config.finetune is None or data.task is None:
        text = f"masking    {config.masking.recipe}, {config.masking.rate:.0%} of residues"
        if config.masking.final_rate:
            return text + f", {config.masking.final_rate:.0%} at the end"
        own_rate = masking.RECIPES[config.masking.recipe].rate
        other = f" (the original's rate: {own_rate:.0%})"
        return text if config.masking.rate == own_rate else text + other
    task, counts = data.task, {"train": 0, "valid": 0, "test": 0}
    labels = ", ".join(f"{int(getattr(task, split).used.sum()):,} {split}" for split in counts)
    text = f"task       {task.name}: labels {labels}; "
    text += f"{len(task.classes)} classes; " if task.classes else ""
    if task.shared:
        text += f"{task.shared:,} sequences stand in more than one split; "
    cropped = int(np.sum(data.train.lengths > config.data.max_residues))
    if cropped:
        text += f"{cropped:,} training sequences are cropped; "
    return f"{text}method {config.finetune.method}"


def print_layout_change(before: dict[str, int] | None, now: dict[str, int]) -> None:
    """Print that a run resumes on other devices than those that wrote its checkpoint, if so."""
    if before in (None, now):
        return
    layouts = [
        f"{layout['rows']} rows on {layout['devices']} device(s) in {layout['processes']} "
        "process(es)"
        for layout in (before, now)
    ]
    console.print(
        f"changed    from {layouts[0]} to {layouts[1]}; the data stream resumes without a gap, "
        "the schedule by step"
    )


def print_stopped(step: int, run_dir: epath.Path) -> None:
    """Print that a signal ended the run at `step`."""
    console.print(f"saved step {step} in {run_dir}; the same command resumes from there")


def print_fork(path: str, anew: bool) -> None:
    """Print which run this one goes on from, and whether its data stream begins anew."""
    console.print(
        f"forked     from {path}; the data stream {'begins anew' if anew else 'goes on there'}"
    )


def print_results(
    config: RunConfig, stream: StreamConfig, data: RunData, run_dir: epath.Path
) -> None:
    """Print the table that compares model and baselines, where the files are, what to do next."""
    if data.task is not None:
        evaluation.print_results(data, run_dir)
        return
    validated = [line for line in metrics_log.read(run_dir) if line["kind"] == "validation"]
    if not validated:  # a full disk took them
        console.print(
            f"{run_dir / metrics_log.FILE} holds no validation metrics; make them with "
            f"esm1nv evaluate --checkpoint {run_dir} --data {config.data.path}"
        )
        return
    baseline = baseline_perplexities(config, stream, data.train, data.validation)
    with contextlib.suppress(OSError):  # a full disk: two lines of a plot, no reason to fail
        files.write_atomically(run_dir / BASELINES, json.dumps(baseline, indent=1))
    title = "Perplexity on held-out sequences (lower is better)"
    table = numbers_table(title, "", "all selected", "<mask> only")

    def add_model(name: str, metrics: dict[str, float], style: str = "") -> None:
        values = (f"{metrics[key]:.2f}" for key in ("perplexity", "perplexity_mask"))
        table.add_row(name, *values, style=style)

    if validated[0]["step"] == 0 or config.fork_from:
        known = config.init_from or config.fork_from
        add_model("before this run" if known else "untrained model", validated[0])
    table.add_row("unigram: residue frequencies", "", f"{baseline['unigram']:.2f}")
    table.add_row("composition of each protein", "", f"{baseline['composition']:.2f}")
    add_model(f"this model, step {validated[-1]['step']:,}", validated[-1], "bold")
    console.print(table)
    perplexity = validated[-1]["perplexity_mask"]
    if perplexity < 0.99 * baseline["composition"]:  # less is within the noise of a small sample
        verdict = "below the composition baseline: it has learned from context"
    elif perplexity < baseline["unigram"]:
        verdict = "below the unigram baseline, not clearly below composition"
    else:
        verdict = "not below the unigram baseline yet: train longer"
    console.print(f"On <mask> positions this model is {verdict}.")
    more = f"steps={2 * max(config.steps, validated[-1]['step'])}"
    if config.minutes and validated[-1]["step"] < config.steps:
        more = f"minutes={2 * config.minutes:g}"
    console.print(
        f"\ncheckpoints  {run_dir / 'checkpoints'}\n"
        f"metrics      {run_dir / metrics_log.FILE}, TensorBoard: {run_dir / 'tensorboard'}\n"
        f"continue     the same command with --config.{more}"
    )


def baseline_perplexities(
    config: RunConfig, stream: StreamConfig, train_source: Source, validation_source: Source
) -> dict[str, float]:
    """Return the perplexity of predictors that know only composition, on the same positions."""
    unigram = baselines.unigram(baselines.count_residues(train_source, baselines.UNIGRAM_PROTEINS))
    nats, positions = {"unigram": 0.0, "composition": 0.0}, 0
    objective = MaskedLM(config.masking.config())
    jitted_targets = jax.jit(MaskedLM.targets, static_argnums=(0, 1))
    for batch in evaluation_batches(validation_source, evaluation_stream(stream)):
        arrays = {name: batch[name] for name in objective.batch_dtypes}
        masked = jax.device_get(jitted_targets(objective, config.model, arrays))
        rows, entries = np.nonzero(masked.is_masked_BM)
        columns = masked.prediction_positions_BM[rows, entries]
        targets = masked.targets_BM[rows, entries]
        nats["composition"] += baselines.composition_nats(
            unigram, masked.inputs_BT, batch["segment_ids"], rows, columns, targets
        ).sum()
        nats["unigram"] += baselines.unigram_nats(unigram, targets).sum()
        positions += len(targets)
    return {name: float(np.exp(total / (positions or np.nan))) for name, total in nats.items()}


def dump_nonfinite_batch(run_dir: epath.Path, error: NonfiniteStep) -> None:
    """Write what is needed to replay a nonfinite step, and print where it is."""
    process, batch = jax.process_index(), error.batch
    folder = run_dir / "nonfinite" / str(error.step)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"batch_{process}.npz").open("wb") as file:
        np.savez_compressed(file, **batch)
    examples: list[Any] = np.unique(batch["example_ids"][batch["segment_ids"] > 0]).tolist()
    (folder / f"examples_{process}.json").write_text(json.dumps(examples))
    saved = steps(run_dir)
    newest = f"checkpoint {saved[-1]} in {run_dir / FOLDER}" if saved else "none saved yet"
    listed = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
    console.print(
        f"step {error.step} is not finite: loss {error.metrics['loss']}, gradient norm "
        f"{error.metrics['gradient_norm']}; parameters are as they were before it\n"
        f"examples  {listed}\n"
        f"batch     {folder} (replay it with JAX_DEBUG_NANS=True and the same command)\n"
        f"last good {newest}"
    )
