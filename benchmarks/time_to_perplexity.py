"""Wall-clock time to a validation perplexity: ours, and `transformers` at its best.

    python benchmarks/time_to_perplexity.py --fasta F [F ...] --out FOLDER [--seeds 3]

The same small architecture from the same initial weights (ours, converted), on the same proteins;
validated on the same proteins under the same masks, at `<mask>` positions only. The rival takes
batches of like length and fused AdamW; ours AdamW, too, or with `--recipe quickstart` what that
config has: Muon, and masks of 30 % at first, falling to 15 %. Both warm up over a twentieth of the
time and fall by a cosine to a tenth of the peak, which each chooses from its grid, in runs of
`--grid-minutes`. The rival has about `--minutes`, ours `--share` of what it took.
Compilation counts as time; evaluation does not, nor does what the rival reads into memory
before it begins. With several seeds, of initial weights and of the order of proteins, the two take
turns and the means over seeds are compared. Writes FOLDER/curves.json and FOLDER/curves.png; what
curves.json holds is not run again. Needs the extra `bench`.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
import rivals
import torch
from train import CONFIGS, Ours, config_of, residues_of

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.command import Parser
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import evaluation_stream, stream_config
from esm1nv_jax.data.pipeline import evaluation_batches
from esm1nv_jax.data.prepare import Preparation, prepare
from esm1nv_jax.data.source import open_split
from esm1nv_jax.interchange import convert
from esm1nv_jax.model import encoder, masking
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.matmul import multiplies_bf16
from esm1nv_jax.training import sharding
from esm1nv_jax.training.metrics import add_sums
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.step import compile_steps

HELD_OUT = 300
Curve = list[tuple[float, float]]  # (seconds, perplexity)


@dataclasses.dataclass(frozen=True)
class Run:
    peak: float  # learning rate
    steps: int
    evaluations: int = 2
    seed: int = 0


def configured(args, run: Run):
    config = config_of(args.model, args.dtype, args.rows)
    with config.unlocked():
        config.seed = run.seed
        config.model.update(dropout=0.0, attention_dropout=0.0)
        config.optimizer.update(
            peak_lr=run.peak,
            min_lr=run.peak / 10,
            warmup=max(1, run.steps // 20),
            constant=0,
            horizon=run.steps,
        )
    return config


def followed(
    train_step: Callable[[int], None], evaluate: Callable[[], float], run: Run, began: float
) -> Curve:
    """Makes the steps and evaluates now and then; the clock began at `began`."""
    curve, away = [], 0.0
    for step in range(run.steps):
        train_step(step)
        if (step + 1) * run.evaluations // run.steps > step * run.evaluations // run.steps:
            now = time.perf_counter()
            curve.append((now - began - away, evaluate()))
            away += time.perf_counter() - now
            print(f"  {curve[-1][0]:7.0f} s  perplexity {curve[-1][1]:.3f}", flush=True)
    return curve


def ours(args, data: str, run: Run) -> Curve:
    began = time.perf_counter()
    config = configured(args, run)
    with config.unlocked():
        config.data.path = data
        if args.recipe == "quickstart":
            recipe = config_file.load(CONFIGS / "quickstart.py")
            config.optimizer.update(kind=recipe.optimizer.kind, beta2=recipe.optimizer.beta2)
            config.masking = recipe.masking
    program = Ours(config, residues_of)
    mesh = sharding.make_mesh(jax.local_devices())
    held_out = open_split(data, "validation")
    stream = evaluation_stream(stream_config(config, args.rows))
    objective = program.settings.objective
    away = time.perf_counter()
    _, eval_step = compile_steps(program.settings, mesh, stream.rows, stream.row_length)
    began += time.perf_counter() - away  # the rival's evaluation is not compiled

    def evaluate() -> float:
        sums: dict[str, float] = {}
        for batch in evaluation_batches(held_out, stream):
            arrays = sharding.place_on_devices(batch, objective.batch_dtypes, mesh)
            sums = add_sums(sums, eval_step(program.state.params, arrays)[0].fetch())
        return objective.metrics(sums)["perplexity_mask"]

    curve = followed(lambda step: program.run(1), evaluate, run, began)
    program.batches.close()
    return curve


def theirs(args, data: str, run: Run) -> Curve:
    settings = RunConfig.from_config_dict(configured(args, run))
    start = initial_weights(args, run)
    trainer = rivals.Trainer(settings.model, settings.optimizer, args.dtype == "bfloat16", start)
    source = open_split(data, "train")
    ids = [tokenizer.residue_ids(source[i]["sequence"][:510]) for i in range(len(source))]
    size = round(args.rows * 512 / (2 + np.mean([len(i) for i in ids])))
    batches = rivals.grouped_batches(ids, size, seed=run.seed)
    asked = list(questions(args, data))
    began = time.perf_counter()

    def train_step(step: int) -> None:
        warm = min(1.0, step / settings.optimizer.warmup)
        done = step / run.steps
        trainer.train_step(next(batches), run.peak * warm * (0.55 + 0.45 * np.cos(np.pi * done)))

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

    return followed(train_step, evaluate, run, began)


def initial_weights(args, run: Run) -> str:
    """The folder that the rival starts from: what ours has at this seed, converted."""
    model, start = (f"{args.out}/{name}-{run.seed}" for name in ("model", "start"))
    if not Path(start).exists():
        config = configured(args, run)
        params = jax.device_get(encoder.init(EncoderConfig(**config.model), config.seed))
        provenance = {"config": config.to_dict()}
        weights = model_folder.Weights(params, EncoderConfig(**config.model), provenance)
        model_folder.write(model, weights)
        convert.to_hf(model, start)
    return start


def questions(args, data: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Our validation as padded batches: masked inputs, where `<mask>` stands, what stood there."""
    config = configured(args, Run(1e-3, 100))
    recipe = masking.recipe(config.masking.recipe, config.masking.rate)
    stream = evaluation_stream(stream_config(config, 8))
    rows = []
    for batch in evaluation_batches(open_split(data, "validation"), stream):
        masked = masking.mask(recipe, batch["tokens"], batch["segment_ids"], batch["mask_bits"])
        inputs = np.asarray(masked.inputs_BT)
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                asked = np.isin(
                    here, np.asarray(masked.prediction_positions_BM)[row][masked.is_masked_BM[row]]
                )
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


def alone(run: Callable[..., Curve], *arguments) -> Curve:
    """`run` in a process of its own, which keeps its freed memory: the rival, too, gains by it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=command.keep_freed_memory) as pool:
        return pool.submit(run, *arguments).result()


def best(follow: Callable[[Run], Curve], grid: list[float], seconds: float) -> tuple[float, float]:
    """(the best peak of the grid, steps a second), by short runs."""

    def rate_of(run: Run, curve: Curve) -> float:
        return run.steps * (1 - 1 / run.evaluations) / (curve[-1][0] - curve[0][0])

    rate = rate_of(first := Run(grid[0], 64), follow(first))
    if len(grid) == 1:
        return grid[0], rate
    steps = round(rate * seconds)
    lowest: dict[float, float] = {}
    for peak in grid:
        print(f"  peak {peak}:")
        curve = follow(run := Run(peak, steps))
        lowest[peak], rate = curve[-1][1], rate_of(run, curve)
    return min(lowest, key=lowest.get), rate


def mean(curves: list[Curve]) -> Curve:
    """Point by point, over seeds."""
    return [tuple(np.mean(points, axis=0).tolist()) for points in zip(*curves, strict=True)]


def share_of_time(theirs: Curve, ours: Curve) -> float:
    """Of the rival's whole time, what ours needed for its last perplexity; NaN: not reached."""
    seconds, target = theirs[-1]
    return next((s for s, p in ours if p <= target), np.nan) / seconds


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
    parser.add_argument("--dtype", default="bfloat16" if multiplies_bf16("cpu") else "float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--recipe", choices=("adamw", "quickstart"), default="adamw", help="ours")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--share", type=float, default=0.7, help="of its time, for ours")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--grid", default="1.5e-4,3e-4,6e-4,1.2e-3")
    parser.add_argument("--our-grid", help="of ours, if another, such as that of Muon")
    parser.add_argument("--grid-minutes", type=float, default=4)
    args = parser.parse_args(argv)
    out = Path(args.out)
    grids = {"transformers": args.grid, "ours": args.our_grid or args.grid}
    data = str(out / "data")
    if not Path(data).exists():
        prepare(Preparation(tuple(args.fasta), data, HELD_OUT, HELD_OUT, workers=2))
    runs = {
        "transformers": lambda run: alone(theirs, args, data, run),
        "ours": lambda run: alone(ours, args, data, run),
    }
    kept = out / "curves.json"
    found: dict[str, dict] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, follow in runs.items():
        if name not in found:
            print(f"{name}, grid:")
            grid = [float(peak) for peak in grids[name].split(",")]
            peak, rate = best(follow, grid, 60 * args.grid_minutes)
            found[name] = {"peak": peak, "rate": rate, "curves": []}
            kept.write_text(json.dumps(found, indent=1))
    for seed in range(args.seeds):
        seconds = 60 * args.minutes
        for name, follow in runs.items():
            peak, rate, done = found[name].values()
            if len(done) <= seed:
                run = Run(peak, round(seconds * rate), 16, seed)
                print(f"{name}, peak {peak}, {run.steps} steps, seed {seed}:")
                done.append(follow(run))
                kept.write_text(json.dumps(found, indent=1))
            seconds = args.share * done[seed][-1][0]
    by_seed = {name: found[name]["curves"][: args.seeds] for name in runs}
    curves = {name: mean(of_seeds) for name, of_seeds in by_seed.items()}
    target, share = curves["transformers"][-1], share_of_time(*curves.values())
    print(
        f"transformers: {target[1]:.3f} after {target[0]:.0f} s; ours reached that after "
        f"{share:.2f} of its time, {curves['ours'][-1][1]:.3f} at its end"
    )
    shares = [share_of_time(*pair) for pair in zip(*by_seed.values(), strict=True)]
    error = np.std(shares, ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
    print(
        f"by seed: {', '.join(f'{x:.2f}' for x in shares)}; mean {np.mean(shares):.2f} ± "
        f"{error:.2f} (standard error; nan: a seed did not reach it)"
    )
    plot(out / "curves.png", curves)


if __name__ == "__main__":
    import sys

    sys.exit(command.run(main, sys.argv[1:]))
