"""Wall-clock time to a validation perplexity: ours, and `transformers` at its best.

    python benchmarks/time_to_perplexity.py --fasta F [F ...] --out FOLDER [--minutes 20]

The same small architecture from the same initial weights (ours, converted), on the same proteins;
validated on the same proteins under the same masks, at `<mask>` positions only. The rival takes
batches of like length and fused AdamW. Both warm up over a twentieth of the time and fall by a
cosine to a tenth of the peak, which each chooses from one grid in runs of `--grid-minutes`. The
rival has `--minutes`, ours `--share` of them. Compilation counts as time; evaluation does not, nor
does what the rival reads into memory before it begins.
Writes FOLDER/curves.json and FOLDER/curves.png. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import rivals
import torch
from train import Ours, config_of

from esm1nv_jax import arguments, process
from esm1nv_jax.arguments import Parser
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.config import stream_config
from esm1nv_jax.data.dataset import open_split
from esm1nv_jax.data.pipeline import evaluation_batches
from esm1nv_jax.data.prepare import Preparation, prepare
from esm1nv_jax.model import masking
from esm1nv_jax.training import metrics, sharding, train
from esm1nv_jax.training.settings import step_config
from esm1nv_jax.weights import convert, folder

HELD_OUT, EVALUATIONS = 300, 8
Curve = list[tuple[float, float]]  # (seconds, perplexity)


def configured(args, peak: float, steps: int):
    config = config_of(args.model, args.dtype, args.rows)
    with config.unlocked():
        config.model.update(dropout=0.0, attention_dropout=0.0)
        config.optimizer.update(
            peak_lr=peak, min_lr=peak / 10, warmup=max(1, steps // 20), constant=0, horizon=steps
        )
    return config


def followed(
    update: Callable[[int], None], evaluate: Callable[[], float], steps: int, began: float
) -> Curve:
    """Makes `steps` updates and evaluates now and then; the clock began at `began`."""
    curve, away = [], 0.0
    for step in range(steps):
        update(step)
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            now = time.perf_counter()
            curve.append((now - began - away, evaluate()))
            away += time.perf_counter() - now
            print(f"  {curve[-1][0]:7.0f} s  perplexity {curve[-1][1]:.3f}", flush=True)
    return curve


def ours(args, data: str, peak: float, steps: int) -> Curve:
    began = time.perf_counter()
    config = configured(args, peak, steps)
    run = Ours(config, data)
    mesh = sharding.make_mesh(jax.local_devices())
    held_out, stream = open_split(data, "validation"), stream_config(config, args.rows)
    away = time.perf_counter()
    _, evaluated = train.compiled(run.settings, mesh, run.state, stream)
    began += time.perf_counter() - away  # the rival's evaluation is not compiled

    def evaluate() -> float:
        sums: dict[str, float] = {}
        for batch in train.validation(held_out, stream, mesh, 0):
            sums = metrics.add(sums, jax.device_get(evaluated(run.state.params, batch)))
        return metrics.figures(sums)["perplexity_mask"]

    curve = followed(lambda step: run.run(1), evaluate, steps, began)
    run.batches.close()
    return curve


def theirs(args, data: str, start: str, peak: float, steps: int) -> Curve:
    settings = step_config(configured(args, peak, steps))
    trainer = rivals.Trainer(settings.model, settings.optimizer, args.dtype == "bfloat16", start)
    source = open_split(data, "train")
    ids = [tokenizer.residue_ids(source[i]["sequence"][:510]) for i in range(len(source))]
    size = round(args.rows * 512 / (2 + np.mean([len(i) for i in ids])))
    batches = rivals.grouped_batches(ids, size, seed=0)
    asked = list(questions(args, data))
    began = time.perf_counter()

    def update(step: int) -> None:
        warm = min(1.0, step / settings.optimizer.warmup)
        done = step / steps
        trainer.update(next(batches), peak * warm * (0.55 + 0.45 * np.cos(np.pi * done)))

    @torch.inference_mode()
    def evaluate() -> float:
        trainer.model.eval()
        nats, count = 0.0, 0
        for tokens, wanted, targets in asked:
            logits = trainer.model(tokens, attention_mask=(tokens != tokenizer.PAD).long()).logits
            found = torch.nn.functional.cross_entropy(
                logits.float()[wanted], targets, reduction="sum"
            )
            nats, count = nats + float(found), count + len(targets)
        return float(np.exp(nats / count))

    return followed(update, evaluate, steps, began)


def questions(args, data: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Our validation as padded batches: masked inputs, where `<mask>` stands, what stood there."""
    config = configured(args, 1e-3, 100)
    recipe = step_config(config).masking
    rows = []
    for batch in evaluation_batches(open_split(data, "validation"), stream_config(config, 8)):
        masked = masking.mask(recipe, batch["tokens"], batch["segment_ids"], batch["mask_bits"])
        inputs = np.asarray(masked.inputs_BT)
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                asked = np.isin(here, np.asarray(masked.index_BM)[row][masked.masked_BM[row]])
                rows.append((inputs[row, here], asked, batch["tokens"][row, here]))
    rows.sort(key=lambda row: len(row[0]))
    for i in range(0, len(rows), 16):
        some = rows[i : i + 16]
        shape = len(some), len(some[-1][0])
        tokens = np.full(shape, tokenizer.PAD, np.int64)
        asked, targets = np.zeros(shape, bool), np.zeros(shape, np.int64)
        for k, parts in enumerate(some):
            for whole, part in zip((tokens, asked, targets), parts, strict=True):
                whole[k, : len(part)] = part
        yield torch.from_numpy(tokens), torch.from_numpy(asked), torch.from_numpy(targets[asked])


def best(run: Callable[[float, int], Curve], grid: list[float], seconds: float) -> tuple:
    """(the best peak of the grid, updates a second), by short runs."""

    def rate_of(curve: Curve, steps: int) -> float:
        return steps * (1 - 1 / EVALUATIONS) / (curve[-1][0] - curve[0][0])

    rate = rate_of(run(grid[0], EVALUATIONS), EVALUATIONS)
    lowest: dict[float, float] = {}
    for peak in grid:
        print(f"  peak {peak}:")
        steps = max(EVALUATIONS, round(rate * seconds))
        curve = run(peak, steps)
        lowest[peak], rate = curve[-1][1], rate_of(curve, steps)
    return min(lowest, key=lowest.get), rate


def plot(path: Path, curves: dict[str, Curve]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*((s / 60, p) for s, p in curve), strict=True), marker="o", label=name)
    axes.set(xlabel="minutes", ylabel="validation perplexity at <mask>")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Time to a perplexity.", "time_to_perplexity.py --fasta F")
    parser.add_argument("--fasta", nargs="+", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="small")
    parser.add_argument("--dtype", default="float32", help="the faster on this CPU, for both")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--share", type=float, default=0.7, help="of the minutes, for ours")
    parser.add_argument("--grid", default="1e-3,2e-3,4e-3")
    parser.add_argument("--grid-minutes", type=float, default=2)
    args = parser.parse_args(argv)
    out, grid = Path(args.out), [float(peak) for peak in args.grid.split(",")]
    data, model, start = (str(out / name) for name in ("data", "model", "start"))
    prepare(Preparation(tuple(args.fasta), data, HELD_OUT, HELD_OUT, workers=2))
    settings = step_config(configured(args, 1e-3, 100))
    params = jax.device_get(train.step.create_state(settings).params)
    provenance = {"config": configured(args, 1e-3, 100).to_dict()}
    folder.write(model, folder.Weights(params, settings.model, provenance))
    convert.to_hf(model, start)

    runs = {
        "transformers": lambda peak, steps: theirs(args, data, start, peak, steps),
        "ours": lambda peak, steps: ours(args, data, peak, steps),
    }
    curves, chosen = {}, {}
    for name, run in runs.items():
        print(f"{name}, grid:")
        peak, rate = best(run, grid, 60 * args.grid_minutes)
        minutes = args.minutes * (args.share if name == "ours" else 1)
        print(f"{name}, peak {peak}, {minutes:.1f} minutes:")
        curves[name], chosen[name] = run(peak, round(60 * minutes * rate)), peak
    target = curves["transformers"][-1]
    reached = next((s for s, p in curves["ours"] if p <= target[1]), None)
    said = "not reached" if reached is None else f"{reached:.0f} s, {reached / target[0]:.2f} of it"
    print(f"transformers: {target[1]:.3f} after {target[0]:.0f} s; ours: {said}, "
          f"{curves['ours'][-1][1]:.3f} at its end")  # fmt: skip
    (out / "curves.json").write_text(json.dumps({"peaks": chosen, "curves": curves}, indent=1))
    plot(out / "curves.png", curves)


if __name__ == "__main__":
    import sys

    process.keep_freed_memory()
    sys.exit(arguments.run(main, sys.argv[1:]))
