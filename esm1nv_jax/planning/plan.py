"""`esm1nv plan`: what the configured step would do on chips that are not here.

It compiles the very step that training runs, for the chip and the number of devices named, and
reads memory, kernels and collectives out of the program.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from esm1nv_jax.common import arguments, metrics_log
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.planning import chips

SPARE = 0.10  # of a device's memory that should stay free
ADVICE = (
    "try --config.batch.microbatches=2, then 4, or fewer --config.batch.sequences_per_device, "
    "or --config.compute.remat=block"
)
LEFT_OUT = (
    "An estimate of this compiled program, not a measurement. Left out: XLA's autotuning (a live "
    "chip may choose other kernels and fusions), workspaces of cuDNN and cuBLAS, buffers of NCCL, "
    "the CUDA context (about 1 GiB together), input, evaluation, checkpoints and stragglers."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes in bytes, of one device; times in seconds, of one update."""

    chip: str
    hosts: int
    devices: int
    attention: str
    remat: str
    microbatches: int
    rows: int
    row_length: int
    memory: dict[str, float]
    peak: float
    budget: float
    collectives: list[dict[str, Any]]
    kernels: list[dict[str, Any]]
    bytes_per_token: float
    seconds: float
    exposed: float
    mfu: float
    residues_per_second: float
    sequences_per_update: float
    days: float
    device_hours: float
    data: str
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget * (1 - SPARE)


def plan(config, chip_name: str, hosts: int = 1, per_host: int = 1) -> Plan:
    """Compiles the step of `config` for `hosts` x `per_host` chips and reads it.

    Raises UserError where the target's compiler is not installed or the config is wrong.
    """
    import jax

    from esm1nv_jax.data.pipeline import Place, train_batches
    from esm1nv_jax.data.source import SAMPLE, open_split
    from esm1nv_jax.data.stream_config import stream_config
    from esm1nv_jax.model.kernels.flash_gpu import Blocks
    from esm1nv_jax.planning.hlo import Program
    from esm1nv_jax.planning.roofline import estimate, load_of
    from esm1nv_jax.training import sharding, step
    from esm1nv_jax.training.metrics import training_flops
    from esm1nv_jax.training.run_config import RunConfig

    chip = chips.chip(chip_name)
    devices = chips.devices(chip, hosts, per_host)
    run_config = RunConfig.from_config_dict(config)
    settled = run_config.step_config(devices[0])
    source = open_split(config.data.path or SAMPLE, "train")
    rows = run_config.global_rows(source.lengths, len(devices))
    stream = stream_config(run_config, rows)
    batch, _ = next(train_batches(source, stream, Place(), slice(0, rows // len(devices))))
    load = load_of(batch, run_config.masking.rate, Blocks())

    mesh = sharding.make_mesh(devices)
    state, compiled, seconds = compile_step(settled, mesh, rows, config.data.row_length, step)
    program = Program(compiled.as_text())
    found = estimate(
        program,
        chip,
        load,
        settled.model.heads,
        settled.model.attention_dropout,
        settled.microbatches,
        hosts,
        per_host,
    )
    memory = memory_of(compiled, program, state, jax)
    useful = training_flops(settled.model, load.tokens, load.squares, load.selected)
    return Plan(
        chip=chip.name,
        hosts=hosts,
        devices=len(devices),
        attention=settled.compute.attention,
        remat=settled.compute.remat,
        microbatches=settled.microbatches,
        rows=load.rows,
        row_length=load.row_length,
        memory=memory,
        peak=sum(memory.values()),
        budget=chip.memory,
        collectives=[
            {
                "kind": re.sub("-start$", "", t.kernel.opcode),
                "bytes": t.kernel.bytes,
                "asynchronous": t.kernel.asynchronous,
                "seconds": t.seconds,
                "dtype": t.kernel.shape.lstrip("(").split("[")[0],
            }
            for t in found.kernels
            if t.kernel.kind == "collective"
        ],
        kernels=[
            {"phase": phase, "kind": kind} | metrics_log
            for (phase, kind), metrics_log in sorted(
                found.classes().items(), key=lambda item: -item[1]["seconds"]
            )
        ],
        bytes_per_token=sum(t.kernel.bytes for t in found.kernels) / load.places,
        seconds=found.seconds,
        exposed=found.exposed,
        mfu=useful / found.seconds / chip.flops,
        residues_per_second=load.residues * len(devices) / found.seconds,
        sequences_per_update=load.sequences * len(devices),
        days=config.steps * found.seconds / 86400,
        device_hours=config.steps * found.seconds / 3600 * len(devices),
        data=config.data.path or f"{SAMPLE} (config.data.path is empty)",
        compile_seconds=seconds,
    )


def compile_step(settled, mesh, rows: int, row_length: int, step):
    """(abstract state, the compiled update, seconds it took), without allocating anything."""
    import jax

    state = step.abstract_state(settled, mesh)
    batch = step.abstract_batch(settled, mesh, rows, row_length)
    start = time.perf_counter()
    try:
        compiled = step.jit_steps(settled, mesh)[0].lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"does not fit, says the compiler: {first[:200]}; {ADVICE}") from None
    return state, compiled, time.perf_counter() - start


def memory_of(compiled, program, state, jax) -> dict[str, float]:
    """Bytes by kind; their sum is the peak."""
    parameters, optimizer = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    stats = compiled.memory_analysis()
    arguments_size = stats.argument_size_in_bytes
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    activations = min(program.kept(), stats.temp_size_in_bytes)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch": max(arguments_size - parameters - optimizer, 0) + max(fresh, 0),
        "activations": activations,
        "temporaries": stats.temp_size_in_bytes - activations,
    }


VARIANTS = {
    "remat": ("compute.remat", ("none", "dots", "block")),
    "attention": ("compute.attention", ("auto", "xla")),
    "row_length": ("data.row_length", (1152, 1536, 2048)),
}


def compared(config, field: str) -> list[tuple[str, Any]]:
    """(what is changed, config) for each value of a field."""
    if field not in VARIANTS:
        raise UserError(f"--compare={field} is unknown; there are {', '.join(VARIANTS)}")
    name, values = VARIANTS[field]
    group, _, leaf = name.partition(".")
    found = []
    for value in values:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed[group][leaf] = value
        found.append((f"{field}={value}", changed.lock()))
    return found


def measured(workdir: str) -> dict[str, float]:
    """Median figures of the training lines of a run: seconds_per_step, mfu where it is known."""
    if not (Path(workdir) / metrics_log.FILE).is_file():
        raise UserError(
            f"--against {workdir} holds no {metrics_log.FILE}; name the folder of a run"
        )
    lines = metrics_log.read(workdir)
    lines = [line for line in lines if line["kind"] == "train"][1:]  # the first one compiled
    if not lines:
        raise UserError(f"{workdir} has fewer than two lines of training; let the run go on")
    names = ("seconds_per_step", "tokens_per_second", "mfu")
    return {
        name: statistics.median(line[name] for line in lines) for name in names if name in lines[0]
    }


def config_of(workdir: str):
    from ml_collections import config_dict

    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"--against {workdir} holds no config.json; name the folder of a run")
    return config_dict.ConfigDict(json.loads(path.read_text())).lock()


def main(argv: list[str]) -> int | None:
    parser = arguments.Parser(
        "plan",
        "Compile the configured step for chips that are not here; show memory, kernels and time.",
        "esm1nv plan --config=configs/pretrain_small.py --chip a100-80gb --hosts 22 "
        "--devices_per_host 8",
    )
    parser.add_argument("--config", metavar="FILE[:ARGS]", help="a config file")
    parser.add_argument("--chip", default="a100-80gb", help=", ".join((*chips.CHIPS, "this-cpu")))
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--devices_per_host", type=int, default=1)
    parser.add_argument("--compare", metavar="FIELDS", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--against", metavar="WORKDIR", help="a run: measured beside predicted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options, overrides = parser.parse_known_args(argv)
    if not options.config and not options.against:
        raise UserError("name a config: --config=configs/pretrain_small.py")
    if min(options.hosts, options.devices_per_host) < 1:
        raise UserError("--hosts and --devices_per_host must be at least 1")
    if options.chip != chips.THIS_CPU:
        chips.chip(options.chip)
    timings = measured(options.against) if options.against else None
    flags = chips.prepare_environment(options.chip)

    from esm1nv_jax.common import config_file
    from esm1nv_jax.planning import plan_report

    if options.config:
        path, _, arg = options.config.partition(":")
        config = config_file.load(path, arg)
    else:
        config = config_of(options.against)
    config = config_file.override(config, overrides)
    where = (options.chip, options.hosts, options.devices_per_host)
    if options.compare:
        fields = options.compare.split(",")
        plans = [attempt(*variant, where) for f in fields for variant in compared(config, f)]
        shown = [{"variant": name} | plan_report.as_dict(found) for name, found in plans]
    else:
        found = plan(config, *where)
        shown = plan_report.as_dict(found) | {"flags": flags}
        if timings:
            shown["measured"] = timings
    if options.json:
        print(json.dumps(shown, indent=1))
    elif options.compare:
        plan_report.show_comparison(plans)
    else:
        plan_report.show(found, flags, timings)
    return 0


def attempt(name: str, config, where: tuple[str, int, int]) -> tuple[str, Plan | str]:
    """A plan, or why there is none: one variant that is refused must not hide the others."""
    try:
        return name, plan(config, *where)
    except UserError as error:
        return name, str(error)
