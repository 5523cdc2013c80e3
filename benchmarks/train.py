"""Training speed on this machine: ours as a run does it, and `transformers`, in alternation.

    python benchmarks/train.py --fasta proteins.fasta.gz [--model full|small] [--json OUT.json]
    python benchmarks/train.py --fasta proteins.fasta.gz --profile
    python benchmarks/train.py --fasta proteins.fasta.gz --model small --rows 2 --accuracy 200

Real sequences cut at 510 residues, the same architecture (erf GELU), dropout, clipping and AdamW.
Ours: packed rows of 512 tokens from a folder that `esm1nv prepare` made, the input stream and all.
The rival: SDPA, fused AdamW, (a) batches in random order, padded to their longest, (b) batches of
like length; as many residues a step as ours. Each computes with bf16 operands and in fp32.
Residues are counted, never padding or specials. Each program has a process of its own, as its users
give it, for one's freed memory would break up the other's; the first round warms up. Rounds
alternate, so that a busy machine is busy for all: trust the ratios. Needs the extra `bench`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import stream_config
from esm1nv_jax.data.prepare import Preparation, prepare
from esm1nv_jax.data.source import open_split
from esm1nv_jax.training import run_data, sharding, step, train
from esm1nv_jax.training.run_config import RunConfig

CUT = 510
MODELS = {"full": dict(), "small": dict(layers=5, width=256, heads=4, ffn=1024)}
CONFIGS = Path(__file__).parents[1] / "configs"


def config_of(model: str, dtype: str, rows: int, folder: str = "sample"):
    """`pretrain_small` with rows of 512 tokens."""
    config = config_file.load(CONFIGS / "pretrain_small.py", f"hf,max_length={CUT},batch={rows}")
    with config.unlocked():
        config.data.path = folder
        config.model.update(**MODELS[model])
        config.compute.dtype = dtype
        config.optimizer.warmup = 10
    return config


class Ours:
    """The loop of `train.run` without its log: batches ahead, metrics one step late."""

    def __init__(self, config, count: Callable[[dict], int]):
        run = RunConfig.from_config_dict(config)
        mesh = sharding.make_mesh(jax.local_devices())
        data = run_data.open_data(run)
        self.settings = run.step_config(mesh.devices.flat[0], data.objective, data.tuning)
        stream = stream_config(run, run.global_rows(data.train.lengths, mesh.size))
        if data.initial is None:
            self.state = jax.jit(step.create_state, static_argnums=0)(self.settings)
        else:
            start = jax.jit(step.state_from_params, static_argnums=0)
            self.state = start(self.settings, sharding.place_state(data.initial, mesh))
        began = time.perf_counter()
        self.step, _ = step.compile_steps(self.settings, mesh, stream.rows, stream.row_length)
        self.compiled_in = time.perf_counter() - began
        self.batches = train.training_batches(data.train, stream, self.settings.objective, mesh)
        self.count = count

    def run(self, steps: int) -> int:
        """What so many steps saw, as `count` has it."""
        seen, pending = 0, None
        for _ in range(steps):
            batch, arrays = next(self.batches)
            seen += self.count(batch)
            self.state, values = self.step(self.state, arrays)
            if pending is not None:
                pending.fetch()
            pending = values
        pending.fetch()
        jax.block_until_ready(self.state)
        return seen


def residues_of(batch) -> int:
    return int(np.count_nonzero(batch["tokens"] >= tokenizer.FIRST_RESIDUE))


def accuracy(folder: str, model: str, rows: int, steps: int) -> None:
    """Prints how far bf16 strays from fp32, on the same batches from the same start."""
    losses, gradients = {}, {}
    for dtype in ("bfloat16", "float32"):
        ours = Ours(config_of(model, dtype, rows, folder), residues_of)
        _, arrays = next(ours.batches)

        def loss(params, batch, settings=ours.settings):
            return step.batch_sums(settings, params, batch, None)["loss"]

        found = jax.tree.leaves(jax.jit(jax.grad(loss))(ours.state.params, arrays))
        gradients[dtype] = np.concatenate([np.ravel(x) for x in found]).astype(np.float64)
        seen = []
        for _ in range(steps):
            ours.state, values = ours.step(ours.state, arrays)
            values = values.fetch()
            seen.append(values["loss"] / values["num_targets"])
            _, arrays = next(ours.batches)
        losses[dtype] = np.array(seen)
        ours.batches.close()
    bf16, fp32 = losses.values()
    a, b = gradients.values()
    apart = np.abs(bf16 - fp32) / fp32
    print(
        f"{model} model, {steps} steps of the same batches: losses in bf16 and fp32 differ "
        f"by {apart.mean():.1e} on average, {apart.max():.1e} at most; mean of the last 20: "
        f"{bf16[-20:].mean():.4f} and {fp32[-20:].mean():.4f}; cosine of the first gradients "
        f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):.6f}"
    )


def rival(config, folder: str, grouped: bool) -> Callable[[int], int]:
    import rivals

    settings = RunConfig.from_config_dict(config)
    source = open_split(folder, "train")
    texts = [source[i]["sequence"][:CUT] for i in range(min(len(source), 4000))]
    ids = [tokenizer.residue_ids(text) for text in texts]
    size = round(config.batch.rows * 512 / (2 + statistics.mean(map(len, ids))))
    trainer = rivals.Trainer(settings.model, settings.optimizer, config.compute.dtype != "float32")
    make = rivals.grouped_batches if grouped else rivals.random_batches
    batches = make(ids, size, seed=0)

    def run(steps: int) -> int:
        residues = 0
        for _ in range(steps):
            batch = next(batches)
            residues += sum(map(len, batch))
            trainer.train_step(batch)
        return residues

    return run


OURS, RANDOM, GROUPED = "ours", "transformers (a)", "transformers (b)"
RIVALS = {"transformers": (RANDOM, GROUPED), "a": (RANDOM,), "b": (GROUPED,), "none": ()}


def serve(pipe: Connection, program: str, model: str, dtype: str, rows: int, folder: str) -> None:
    """In a process of its own: makes as many steps as it is asked for, until it hears 0."""
    config = config_of(model, dtype, rows, folder)
    if program == OURS:
        command.keep_freed_memory()  # as esm1nv_jax.main does
        ours = Ours(config, residues_of)
        run, end = ours.run, ours.batches.close
    else:
        run, end = rival(config, folder, program == GROUPED), lambda: None
    while steps := pipe.recv():
        began = time.perf_counter()
        residues = run(steps)
        pipe.send(residues / (time.perf_counter() - began))
    end()


@contextlib.contextmanager
def running(serve: Callable[..., None], *arguments):
    """A function from steps to a rate: what `serve(pipe, *arguments)` sends, in a process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=serve, args=(there, *arguments), daemon=True)
    worker.start()
    there.close()

    def run(steps: int) -> float:
        here.send(steps)
        return here.recv()

    yield run
    here.send(0)
    worker.join()


def alternated(serve, programs: dict[str, tuple], rounds: int, steps: int):
    """Rates of each program, round by round in turn; `programs` are arguments of `serve` by name.

    Raises UserError where one of them ends by itself.
    """
    with contextlib.ExitStack() as stack:
        run = {name: stack.enter_context(running(serve, *a)) for name, a in programs.items()}
        rates: dict[str, list[float]] = {name: [] for name in programs}
        try:
            for round_ in range(rounds + 1):  # the first warms up
                for name in programs:
                    rate = run[name](steps)
                    rates[name] += [rate] if round_ else []
        except EOFError:
            raise UserError(
                "a program ended; is pip install -e '.[bench]' done, and is there memory for all?"
            ) from None
    return rates


def profile(ours: Ours, steps: int) -> list[tuple[str, float]]:
    """The ten costliest operations: (name in the program and where it comes from, share)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours.run(steps)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    spent: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    spent[stats["hlo_op"]] += event.duration_ns
    total = sum(spent.values())
    origin = origins(ours.step.as_text())
    return [(f"{name} {origin.get(name, '')}", ns / total) for name, ns in spent.most_common(10)]


def origins(program: str) -> dict[str, str]:
    """Operation to the line of Python that it was made from, of a compiled program's text."""
    import re

    found = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", program, re.MULTILINE):
        shape = rest.split("{")[0].split(" ")[0]
        where = re.search(r'op_name="([^"]*)"', rest)
        found[name] = f"{shape} {where[1][-90:] if where else ''}"
    return found


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Training speed.", "python benchmarks/train.py --fasta F")
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--rival", choices=RIVALS, default="transformers", help="a or b: only that")
    parser.add_argument("--model", choices=sorted(MODELS), default="full")
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens, in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each program in a round")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--profile", action="store_true", help="the ten costliest operations, only")
    parser.add_argument("--accuracy", type=int, metavar="STEPS", help="of bf16, instead of speed")
    parser.add_argument("--json", help="write the figures here, too")
    args = parser.parse_args(argv)
    dtypes = args.dtypes.split(",")

    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/data"
        prepare(Preparation((args.fasta,), folder, 100, 100, workers=2))
        if args.accuracy:
            accuracy(folder, args.model, args.rows, args.accuracy)
            return
        if args.profile:
            for dtype in dtypes:
                ours = Ours(config_of(args.model, dtype, args.rows, folder), residues_of)
                ours.run(2)
                print(f"{dtype}: compiled in {ours.compiled_in:.1f} s")
                for name, share in profile(ours, args.steps):
                    print(f"  {100 * share:5.1f} %  {name}")
                ours.batches.close()
            return
        rates = {}
        for dtype in dtypes:
            programs = {
                name: (name, args.model, dtype, args.rows, folder)
                for name in (OURS, *RIVALS[args.rival])
            }
            rates[dtype] = alternated(serve, programs, args.rounds, args.steps)
    print(f"\n{args.model} model, residues/s, median of {args.rounds} rounds (least to most)")
    for dtype, of_programs in rates.items():
        ours = statistics.median(of_programs[OURS])
        for name, rate in of_programs.items():
            middle = statistics.median(rate)
            print(
                f"{dtype:<9} {name:<17} {middle:8,.0f}   ({min(rate):,.0f} to {max(rate):,.0f})"
                + ("" if name == OURS else f"   ours to it: {ours / middle:.2f}")
            )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"model": args.model, "rates": rates}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    import sys

    command.keep_freed_memory()  # as esm1nv_jax.main does
    sys.exit(command.run(main, sys.argv[1:]))
