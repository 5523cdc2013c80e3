"""`esm1nv plan`: what the configured step would do on chips that are not here.

It compiles the very step that training runs, for the chip and the number of devices named, and
reads memory, kernels and collectives out of the program.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from esm1nv_jax.common import arguments, metrics_log
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.planning import chips, plan_report
from esm1nv_jax.planning.plan_report import Plan

SAMPLED_ROWS, SAMPLED_DEVICES = 16_384, 64  # whose mean is the load of a device
VARIANTS = {
    "remat": ("compute.remat", ("none", "dots", "block")),
    "attention": ("compute.attention", ("auto", "xla")),
    "row_length": ("data.row_length", (1152, 1536, 2048)),
}
SAVING = (  # changes that save memory, tried in this order where a plan does not fit
    {"batch.microbatches": 2},
    {"batch.microbatches": 4},
    {"compute.remat": "block"},
    {"batch.microbatches": 4, "compute.remat": "block"},
)


class DoesNotFit(UserError):
    """The compiler refuses a program that needs more memory than the device has."""


def plan(config, chip_name: str, hosts: int = 1, per_host: int = 1) -> Plan:
    """Compiles the step of `config` for `hosts` x `per_host` chips and reads it.

    Raises UserError where the target's compiler is not installed or the config is wrong, DoesNotFit
    where the compiler itself finds too little memory.
    """
    from esm1nv_jax.data.source import SAMPLE, open_split
    from esm1nv_jax.planning import roofline
    from esm1nv_jax.planning.hlo import Program
    from esm1nv_jax.training import sharding
    from esm1nv_jax.training.memory import check_memory
    from esm1nv_jax.training.metrics import training_flops
    from esm1nv_jax.training.run_config import RunConfig

    chip = chips.chip(chip_name)
    devices = chips.devices(chip, hosts, per_host)
    run = RunConfig.from_config_dict(config)
    settings = run.step_config(devices[0])
    source = open_split(run.data.path or SAMPLE, "train")
    rows = run.global_rows(source.lengths, len(devices))
    check_memory(settings, rows // len(devices), run.data.row_length, chip.memory)
    load = stream_load(run, source, rows // len(devices), len(devices))

    mesh = sharding.make_mesh(devices)
    state, compiled, seconds = compile_step(settings, mesh, rows, run.data.row_length)
    program = Program(compiled.as_text())
    step = roofline.Step(
        attention=settings.compute.attention,
        heads=settings.model.heads,
        head_size=settings.model.width // settings.model.heads,
        dropout=settings.model.attention_dropout,
        microbatches=settings.microbatches,
        hosts=hosts,
        per_host=per_host,
    )
    slow, expected, fast = (
        roofline.estimate(program, chip, efficiency, load, step)
        for efficiency in (chip.low, chip.low.mean(chip.high), chip.high)
    )
    memory = memory_of(compiled, program, state)
    useful = training_flops(settings.model, load.tokens, load.squares, load.selected)
    mfu = useful / expected.seconds / chip.flops
    return Plan(
        chip=chip.name,
        hosts=hosts,
        devices=len(devices),
        attention=settings.compute.attention,
        remat=settings.compute.remat,
        microbatches=settings.microbatches,
        rows=rows // len(devices),
        row_length=run.data.row_length,
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
            for t in expected.kernels
            if t.kernel.kind == "collective"
        ],
        kernels=sorted(
            (
                {"phase": phase, "kind": kind} | total
                for (phase, kind), total in expected.by_class().items()
            ),
            key=lambda total: -float(total["seconds"]),
        ),
        bytes_per_token=sum(t.kernel.bytes for t in expected.kernels) / load.slots,
        seconds=expected.seconds,
        fastest=fast.seconds,
        slowest=slow.seconds,
        exposed=expected.exposed,
        mfu=mfu,
        residues_per_second=load.residues * len(devices) / expected.seconds,
        sequences_per_step=load.sequences * len(devices),
        busiest_device=load.slowest,
        days=run.steps * expected.seconds / 86400,
        device_hours=run.steps * expected.seconds / 3600 * len(devices),
        data=run.data.path or f"{SAMPLE} (config.data.path is empty)",
        efficiencies={
            "low": dataclasses.asdict(chip.low),
            "high": dataclasses.asdict(chip.high),
            "source": chip.source,
        },
        compile_seconds=seconds,
        miscounted=miscounted(program, useful, max(mfu, useful / fast.seconds / chip.flops)),
    )


def miscounted(program, useful: float, mfu: float) -> str:
    """Why a program cannot have been read rightly, or an empty text."""
    if program.uncounted_loops:
        return f"iterations of {len(program.uncounted_loops)} loops of the program are not known"
    if mfu > 1:
        return f"the program was misread, for it would reach an MFU of {mfu:.0%}"
    attention = bool(program.of_kind("attention"))  # its products are not in the text
    if not attention and sum(k.flops for k in program.kernels) < 0.9 * useful:
        return "fewer products were found in the program than the step needs"
    return ""


def stream_load(run, source, rows: int, devices: int):
    """The `roofline.Load` of a device with `rows` rows: the mean over many rows of the stream."""
    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.data.pipeline import train_dataset
    from esm1nv_jax.model.kernels.flash_gpu import Blocks
    from esm1nv_jax.planning.roofline import load_of, mean_load

    batches = iter(train_dataset(source, stream_config(run, rows)))
    sampled = max(min(SAMPLED_DEVICES, SAMPLED_ROWS // rows), 2)
    loads = [load_of(b, run.masking.rate, Blocks()) for b in itertools.islice(batches, sampled)]
    return mean_load(loads, devices)


def compile_step(settings, mesh, rows: int, row_length: int):
    """(abstract state, the compiled step, seconds it took), without allocating anything."""
    import jax

    from esm1nv_jax.training import step

    state = step.abstract_state(settings, mesh)
    batch = step.abstract_batch(settings, mesh, rows, row_length)
    start = time.perf_counter()
    try:
        compiled = step.jit_steps(settings, mesh)[0].lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"does not fit: {str(error).splitlines()[0][:200]}") from None
    return state, compiled, time.perf_counter() - start


def memory_of(compiled, program, state) -> dict[str, float]:
    """Bytes by kind; their sum is the peak."""
    import jax

    parameters, optimizer = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    stats = compiled.memory_analysis()
    inputs = stats.argument_size_in_bytes - parameters - optimizer
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    activations = min(program.saved_activations(), stats.temp_size_in_bytes)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch": max(inputs, 0) + max(outputs, 0),
        "activations": activations,
        "temporaries": stats.temp_size_in_bytes - activations,
    }


def changed(config, changes: dict[str, Any]):
    """A locked copy of `config` with other values of some fields."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy.lock()


def variants(config, field: str) -> list[tuple[str, Any]]:
    """(what is changed, config) for each value of a field. Raises UserError on an unknown one."""
    if field not in VARIANTS:
        raise UserError(f"--compare={field} is unknown; there are {', '.join(VARIANTS)}")
    name, values = VARIANTS[field]
    return [(f"{field}={value}", changed(config, {name: value})) for value in values]


def attempt(name: str, config, target: tuple[str, int, int]) -> tuple[str, Plan | str]:
    """A plan, or why there is none: one variant that is refused must not hide the others."""
    console.print(f"compiling {name}", markup=False)
    try:
        return name, plan(config, *target)
    except UserError as error:
        return name, str(error)


def advice(config, target: tuple[str, int, int]) -> str:
    """The first change of SAVING that fits, each compiled to see."""
    for changes in SAVING:
        name = " ".join(f"--config.{field}={value}" for field, value in changes.items())
        _, smaller = attempt(name, changed(config, changes), target)
        if isinstance(smaller, Plan) and smaller.fits:
            return f"{name} fits, in {smaller.peak / chips.GIB:.1f} GiB"
    return (
        "nor does it with 4 microbatches and compute.remat=block: take fewer rows, by "
        "--config.batch.sequences_per_device or --config.batch.rows"
    )


def measured(workdir: str, config) -> dict[str, float]:
    """Medians over the training lines of a run of the same model: seconds a step, rates.

    Raises UserError where there is no such run.
    """
    if not (Path(workdir) / metrics_log.FILE).is_file():
        raise UserError(
            f"--against {workdir} holds no {metrics_log.FILE}; name the folder of a run"
        )
    lines = [line for line in metrics_log.read(workdir) if line["kind"] == "train"]
    if len(lines) < 2:
        raise UserError(f"{workdir} has fewer than two lines of training; let the run go on")
    model = config_of(workdir).model.to_dict()
    if model != config.model.to_dict():
        fields = sorted(k for k in model if model[k] != config.model.get(k))
        raise UserError(f"--against {workdir} has another model: {', '.join(fields)} differ")
    return {
        name: statistics.median(line[name] for line in lines[1:])  # the first one compiled
        for name in ("seconds_per_step", "tokens_per_second", "mfu")
        if name in lines[1]
    }


def config_of(workdir: str):
    """The config of a run, locked. Raises UserError where it has none."""
    from ml_collections import config_dict

    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"--against {workdir} holds no config.json; name the folder of a run")
    return config_dict.ConfigDict(json.loads(path.read_text(encoding="utf-8"))).lock()


def main(argv: list[str]) -> int:
    parser = arguments.Parser(
        "plan",
        "Compile the configured step for chips that are not here; show memory, kernels and time.",
        "esm1nv plan --config=configs/pretrain_small.py --chip a100-80gb --hosts 22 "
        "--devices-per-host 8",
    )
    parser.add_argument("--config", metavar="FILE[:ARGS]", help="a config file")
    parser.add_argument("--chip", default="a100-80gb", help=", ".join((*chips.CHIPS, "this-cpu")))
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--devices-per-host", type=int, default=1)
    parser.add_argument("--compare", metavar="FIELDS", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--against", metavar="WORKDIR", help="a run: measured beside predicted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options, overrides = parser.parse_known_args(argv)
    if not options.config and not options.against:
        raise UserError("name a config: --config=configs/pretrain_small.py")
    if min(options.hosts, options.devices_per_host) < 1:
        raise UserError("--hosts and --devices-per-host must be at least 1")
    if options.chip != chips.THIS_CPU:
        chips.chip(options.chip)

    from esm1nv_jax.common import config_file

    if options.config:
        config = config_file.from_option(options.config, overrides)
    else:
        config = config_file.override(config_of(options.against), overrides)
    timings = measured(options.against, config) if options.against else None
    flags = chips.prepare_environment(options.chip)
    target = (options.chip, options.hosts, options.devices_per_host)
    if options.compare:
        fields = options.compare.split(",")
        plans = [attempt(*v, target) for f in fields for v in variants(config, f)]
        if options.json:
            rows = [{"variant": name} | plan_report.as_dict(made) for name, made in plans]
            print(json.dumps(rows, indent=1))
        else:
            plan_report.print_comparison(plans)
        return 0
    try:
        made = plan(config, *target)
    except DoesNotFit as error:
        raise UserError(f"{error}; {advice(config, target)}") from None
    if not made.fits:
        made = dataclasses.replace(made, advice=advice(config, target))
    if options.json:
        extra = {"flags": flags} | ({"measured": timings} if timings else {})
        print(json.dumps(plan_report.as_dict(made) | extra, indent=1))
    else:
        plan_report.print_plan(made, flags, timings)
    return 0
