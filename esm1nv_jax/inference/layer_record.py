"""The layer of a model that probes chose on validation: printed, plotted, kept beside the model and
named by `embed`.

The record is `layers.json` in a run or in the folder of a model: for each set of parameters and
architecture, by their digest, and each task the layer that was chosen and the score of every layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import files
from esm1nv_jax.common.console import console, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import BLUE, new_figure

FILE = "layers.json"
PLOTS = (".png", ".svg", ".pdf")  # endings of the plot


def path_of(checkpoint: str) -> epath.Path:
    """Where the record of a model stands: in its run, or in its folder."""
    folder = epath.Path(checkpoint)
    is_model = (folder / model_folder.DESCRIPTION).exists()
    step = None if is_model else model_folder.find_step(checkpoint)
    return (step.run if step else folder) / FILE


def read(checkpoint: str, digest: str) -> dict[str, dict[str, Any]]:
    """By task what was chosen for the model of this digest: `layer`, `metric`, and `curve`, scores
    by layer; empty where nothing is recorded."""
    try:
        record = json.loads(path_of(checkpoint).read_text(encoding="utf-8"))[digest]
        return {
            str(task): {
                "layer": int(choice["layer"]),
                "metric": str(choice["metric"]),
                "curve": {int(layer): float(x) for layer, x in choice["curve"].items()},
            }
            for task, choice in record.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(checkpoint: str, digest: str, task: str, choice: dict[str, Any]) -> None:
    """Adds a choice, as `read` returns it, to the record. A place that cannot be written is
    reported, and that is all."""
    path = path_of(checkpoint)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    record = record if isinstance(record, dict) else {}
    others = record.get(digest)
    record[digest] = (others if isinstance(others, dict) else {}) | {task: choice}
    try:
        with files.writing(path):
            files.write_atomically(path, json.dumps(record, indent=1))
        console.print(f"{path}: layer {choice['layer']} for {task}")
    except UserError as error:
        console.print(f"not recorded: {error}")


def print_recommended(checkpoint: str, digest: str, layers: Sequence[int]) -> None:
    """Says which layer the record of a model recommends, where it is none of `layers`."""
    for task, choice in read(checkpoint, digest).items():
        layer, curve = choice["layer"], choice["curve"]
        if layer not in layers:
            asked = [f"layer {k} {curve[k]:.3f}" for k in layers if k in curve]
            against = f", {', '.join(asked)}" if asked else ""
            console.print(
                f"probes of {task} recommend --layers {layer}: validation {choice['metric']} "
                f"{curve.get(layer, float('nan')):.3f}{against}"
            )


def print_curve(results: dict[str, Any]) -> None:
    """The score of each layer on the validation split."""
    layers = results["layers"]
    title = f"linear head on each layer of this encoder: validation {layers['metric']}"
    table = numbers_table(title, "layer", layers["metric"], names=0)
    for layer, value in layers["curve"].items():
        style = "bold" if layer == layers["layer"] else ""
        table.add_row(str(layer), f"{value:.4f}", style=style)
    stdout.print(table)
    stdout.print(f"chosen on validation: layer {layers['layer']}; the test split follows")


def plot_curve(path: str, results: dict[str, Any]) -> None:
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
