"""What `esm1nv probe` prints and plots."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from esm1nv_jax.common import files
from esm1nv_jax.common.console import count, stdout
from esm1nv_jax.common.html import BLUE, new_figure, plus_minus
from esm1nv_jax.inference.probe_features import TRAINED

PLOTS = (".png", ".svg", ".pdf")  # endings of the plot of layers


def print_results(results: dict[str, Any]) -> None:
    rows, counts, seeds = results["rows"], results["proteins"], results["seeds"]
    names = [n for n in ("accuracy", "macro_f1", "mcc", "spearman", "mse") if n in rows[0]]
    title = f"{results['task']}: {count(counts['test'], 'test protein')}"
    title += f", {counts['train']:,} to train on"
    title += f", mean ± standard error over {seeds} seeds" if seeds > 1 else ""
    table = Table(title=title, title_justify="left")
    for name in ("head", "features", *names):
        table.add_column(name, justify="left" if name in ("head", "features") else "right")
    for row in rows:
        cells = (plus_minus(row[n], row[f"{n}_se_seeds"], 3) for n in names)
        style = "bold" if row["features"] == TRAINED else ""
        table.add_row(row["head"], row["features"], *cells, style=style)
    stdout.print(table)
    for difference in results["differences"]:
        stdout.print(
            f"{difference['head']}: this encoder less the untrained, {difference['metric']} "
            f"{difference['difference']:+.4f} ± {difference['se']:.4f} (by protein"
            f"{' and seed' if seeds > 1 else ''}), "
            f"{difference['standard_errors']:+.1f} standard errors"
        )
    if results["published"] and not results.get("limit"):
        where, what, values = results["published"]
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        stdout.print(f"Published on this test set ({where}; {what}): {shown}")


def print_layers(results: dict[str, Any]) -> None:
    """The score of each layer on the validation split."""
    layers = results["layers"]
    title = f"linear head on each layer of this encoder: validation {layers['metric']}"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column(layers["metric"], justify="right")
    for layer, value in layers["curve"].items():
        style = "bold" if layer == layers["layer"] else ""
        table.add_row(str(layer), f"{value:.4f}", style=style)
    stdout.print(table)
    stdout.print(f"chosen on validation: layer {layers['layer']}; the test split follows")


def plot_layers(path: str, results: dict[str, Any]) -> None:
    """Draws the score of each layer on the validation split, in a format of PLOTS."""
    layers = results["layers"]
    curve, chosen = layers["curve"], layers["layer"]
    names = [str(layer) for layer in curve]
    figure, axes = new_figure()
    axes.plot(names, [*curve.values()], "o-", color=BLUE)
    axes.plot([str(chosen)], [curve[chosen]], "o", color=BLUE, markersize=10)
    axes.set_xlabel("layer (0: embeddings, -1: the last after its LayerNorm)")
    axes.set_ylabel(f"validation {layers['metric']}")
    axes.set_title(f"{results['task']}, linear head: layer {chosen} is chosen")
    with files.writing(path):
        figure.savefig(path, dpi=120)
