"""What a run tells a person: where it begins, how it goes, how it ended, what went wrong."""

from __future__ import annotations

import json

import jax
import numpy as np
from rich.table import Table

from esm1nv_jax.common import metrics_log as kept
from esm1nv_jax.common.console import console
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.pipeline import evaluation_batches, rows_for
from esm1nv_jax.model import baselines, masking
from esm1nv_jax.model.encoder import parameter_count

UNIGRAM_SAMPLE = 20_000  # training sequences from which the unigram baseline is counted


def show_start(
    config, settings, stream, source, mesh, run_folder, done: int, hosts, before, layout
) -> None:
    """One summary before the first update. `before` is the layout that a resumed run had."""
    model = settings.model
    kind = mesh.devices.flat[0].device_kind
    rows = stream.rows // mesh.size
    sequences = stream.rows * 1_000_000 / rows_for(source.lengths, 1_000_000, stream)
    console.print(
        f"model      {parameter_count(model):,} parameters: {model.layers} layers, "
        f"{model.width} wide, {model.heads} heads, {model.positions} positions\n"
        f"data       {config.data.path}: {len(source.lengths):,} sequences to learn from\n"
        f"devices    {mesh.size} x {kind} in {len(hosts)} process(es) on {len(set(hosts))} host(s) "
        f"({', '.join(sorted(set(hosts))[:4])}{', ...' if len(set(hosts)) > 4 else ''})\n"
        f"batch      {stream.rows} rows of {stream.row_length} tokens, about {sequences:,.0f} "
        f"sequences; {rows} rows, about {sequences / mesh.size:,.1f} sequences a device: "
        f"{stream.rows * stream.row_length:,} tokens an update\n"
        f"masking    {config.masking.recipe}, {config.masking.rate:.0%} of residues; "
        f"products in {settings.compute.dtype}, attention by {settings.compute.attention}\n"
        f"workdir    {run_folder}"
        + (f"\ngoing on   from update {done:,} of {config.steps:,}" if done else "")
    )
    if before and before != layout:
        shown = (
            f"{x['rows']} rows on {x['devices']} device(s) in {x['processes']} process(es)"
            for x in (before, layout)
        )
        console.print(
            f"changed    from {next(shown)} to {next(shown)}; the place in the data goes on "
            "without a gap, the schedule by update"
        )


def line(figures: dict[str, float]) -> str:
    """The end of the progress bar."""
    return (
        f"loss {figures['loss']:.3f}  perplexity {figures['perplexity']:.2f} "
        f"(<mask> {figures['perplexity_mask']:.2f})  {figures['tokens_per_second']:,.0f} tokens/s"
    )


def show_end(config, settings, stream, source, held_out, run_folder) -> None:
    """The table that compares like with like, where everything is, and what to type next."""
    validated = [line for line in kept.read(run_folder) if line["kind"] == "validation"]
    if not validated:  # a full disk took them
        console.print(
            f"{run_folder / kept.FILE} holds no figures of held-out sequences; make them with "
            f"esm1nv evaluate --checkpoint {run_folder} --data {config.data.path}"
        )
        return
    floor = floors(settings, stream, source, held_out, config.evaluation.batches)
    table = Table(title="Perplexity on held-out sequences (lower is better)", title_justify="left")
    table.add_column("")
    table.add_column("all selected", justify="right")
    table.add_column("<mask> only", justify="right")

    def model_row(name, figures, style=""):
        both = (f"{figures[k]:.2f}" for k in ("perplexity", "perplexity_mask"))
        table.add_row(name, *both, style=style)

    if validated[0]["step"] == 0:
        model_row("before this run" if config.init_from else "untrained model", validated[0])
    table.add_row("unigram: residue frequencies", "", f"{floor['unigram']:.2f}")
    table.add_row("composition of each protein", "", f"{floor['composition']:.2f}")
    model_row(f"this model, update {validated[-1]['step']:,}", validated[-1], "bold")
    console.print(table)
    reached = validated[-1]["perplexity_mask"]
    if reached < 0.99 * floor["composition"]:  # less is within the noise of a small sample
        verdict = "below the composition of each protein: it learns"
    elif reached < floor["unigram"]:
        verdict = "below the unigram floor, not clearly below composition: a smoke test"
    else:
        verdict = "not below the unigram floor yet: train longer"
    console.print(f"On <mask> positions this model is {verdict}.")
    done = max(config.steps, validated[-1]["step"])
    console.print(
        f"\ncheckpoints  {run_folder / 'checkpoints'}\n"
        f"figures      {run_folder / kept.FILE}, tensorboard --logdir {run_folder}\n"
        f"go on        the same command with --config.steps={2 * done}"
    )


def floors(settings, stream, source, held_out, batches: int) -> dict[str, float]:
    """Perplexity of predictors that know only composition, on the very same `<mask>` positions."""
    some = source.sequences(range(min(UNIGRAM_SAMPLE, len(source.lengths))))
    letters = tokenizer.residue_ids(b"".join(some))
    letters = letters[letters >= tokenizer.FIRST_RESIDUE] - tokenizer.FIRST_RESIDUE
    counts = np.bincount(letters, minlength=baselines.LETTERS)
    found = baselines.Baselines(baselines.unigram(counts))
    corrupt = jax.jit(masking.mask, static_argnums=0)
    for i, batch in enumerate(evaluation_batches(held_out, stream)):
        if batches and i == batches:
            break
        names = ("tokens", "segment_ids", "mask_bits")
        masked = jax.device_get(corrupt(settings.masking, *(batch[n] for n in names)))
        found.add(
            masked.inputs_BT,
            batch["segment_ids"],
            masked.index_BM,
            masked.targets_BM,
            masked.masked_BM,
        )
    return found.perplexities()


def keep_evidence(run_folder, number: int, batch, values, checkpoints) -> None:
    """Saves what is needed to replay an update that was not finite, and says where it is."""
    checkpoints.wait()
    evidence = run_folder / "nonfinite" / str(number)
    evidence.mkdir(parents=True, exist_ok=True)
    with (evidence / f"batch_{jax.process_index()}.npz").open("wb") as file:
        np.savez_compressed(file, **batch)
    examples = np.unique(batch["example_ids"][batch["segment_ids"] > 0])
    (evidence / f"examples_{jax.process_index()}.json").write_text(json.dumps(examples.tolist()))
    saved = checkpoints.steps()
    last = f"checkpoint {saved[-1]} in {checkpoints.folder}" if saved else "none saved yet"
    shown = ", ".join(map(str, examples[:8].tolist())) + (", ..." if len(examples) > 8 else "")
    console.print(
        f"update {number} is not finite: loss {values['loss']}, gradient norm "
        f"{values['gradient_norm']}; parameters are as they were before it\n"
        f"examples  {shown}\n"
        f"batch     {evidence} (replay it with JAX_DEBUG_NANS=True and the same command)\n"
        f"last good {last}"
    )
