"""`esm1nv plan`: what the configured step would do on chips that are not here.

It compiles the very step that training runs, for the chip and the number of devices named, and
reads memory, kernels and collectives out of the program.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

from esm1nv_jax.common import command, metrics_log
from esm1nv_jax.common.console import console, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.planning import chips

PROCESS = 0.9 * chips.GIB  # VmHWM of a process that has compiled a step, on Linux
SPARE = 0.10  # of a device's memory that should stay free
VARIANTS = {
    "remat": ("compute.remat", ("none", "dots", "block")),
    "attention": ("compute.attention", ("auto", "xla")),
    "row_length": ("data.row_length", (1152, 1536, 2048)),
}
SAVING: tuple[
    dict[str, Any], ...
] = (  # changes that save memory, tried in this order where a plan does not fit
    {"batch.microbatches": 2},
    {"batch.microbatches": 4},
    {"compute.remat": "block"},
    *({"batch.microbatches": n, "compute.remat": "block"} for n in (4, 16, 64)),
)
LEFT_OUT = (
    "An estimate of this compiled program, not a measurement. Left out: XLA's autotuning (a live "
    "chip may choose other kernels and fusions), workspaces of cuDNN and cuBLAS, buffers of NCCL, "
    "the CUDA context (about 1 GiB together), input, evaluation and checkpoints."
)

Plan = dict[str, Any]


class DoesNotFit(UserError):
    """The compiler refuses a program that needs more memory than the device has."""


def plan(config, chip_name: str, hosts: int = 1, per_host: int = 1) -> Plan:
    """Compiles the step of `config` for `hosts` x `per_host` chips and reads it.

    Returns sizes in bytes, of one device, and times in seconds, of one step: `seconds` at the mean
    of the chip's efficiencies, `fastest` and `slowest` at the highest and lowest; `exposed`, of
    collectives that nothing overlaps. `busiest_device` is the expected attention work of the
    busiest device over that of the mean one; `miscounted` says why times are not to be believed.

    Raises UserError where the target's compiler is not installed or the config is wrong, DoesNotFit
    where the compiler itself finds too little memory.
    """
    import jax

    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.data.source import SAMPLE, open_split
    from esm1nv_jax.planning import roofline
    from esm1nv_jax.planning.hlo import Program
    from esm1nv_jax.training import sharding
    from esm1nv_jax.training.metrics import objective_flops
    from esm1nv_jax.training.run_config import RunConfig
    from esm1nv_jax.training.run_data import masked_lm, open_data
    from esm1nv_jax.training.step import check_memory

    chip = chips.chip(chip_name, config.compute.dtype)
    devices = chips.devices(chip, hosts, per_host)
    run = RunConfig.from_config_dict(config)
    data = None
    if run.finetune is None:
        source = open_split(run.data.path or SAMPLE, "train")
        settings = run.step_config(devices[0], masked_lm(run, source))
    else:
        data = open_data(run)
        source = data.train
        settings = run.step_config(devices[0], data.objective, data.tuning)
    model, compute = settings.model, settings.compute
    global_rows, count = run.global_rows(source.lengths, len(devices)), len(devices)
    mesh = sharding.make_mesh(devices)
    check_memory(settings, stream_config(run, global_rows), mesh, chip.memory)
    rows = global_rows // count
    load = roofline.stream_load(run, source, rows, count, compute.chip)

    console.print(f"compiling for {count} x {chip.name}")  # which takes a while
    state, compiled, seconds = compile_step(settings, mesh, global_rows, run.data.row_length)
    program = Program(compiled.as_text())
    step = roofline.Step(model, compute.attention, settings.microbatches, hosts, per_host)
    slow, expected, fast = (
        roofline.estimate(program, chip, efficiency, load, step)
        for efficiency in (chip.low, chip.low.mean(chip.high), chip.high)
    )
    memory = roofline.memory_of(compiled, program, state)
    if chip.platform == "cpu":
        memory |= process_memory(memory)
        if data is not None and data.initial is not None:
            sizes = (leaf.nbytes for leaf in jax.tree.leaves(data.initial))
            memory["base model, on the host"] = sum(sizes)
    peak = sum(memory.values())
    work = load.tokens, load.squares, load.selected
    useful = objective_flops(settings.objective, model, *work, settings.tuning)
    return {
        "chip": chip.name,
        "hosts": hosts,
        "devices": count,
        "attention": compute.attention,
        "token_kernels": compute.token_kernels,
        "remat": compute.remat,
        "microbatches": settings.microbatches,
        "rows": rows,
        "row_length": run.data.row_length,
        "memory": memory,
        "peak": peak,
        "budget": chip.memory,
        "fits": fits(peak, chip.memory),
        "collectives": expected.collectives(),
        "kernels": expected.by_class(),
        "bytes_per_token": sum(kernel.bytes for kernel, _ in expected.kernels) / load.slots,
        "seconds": expected.seconds,
        "fastest": fast.seconds,
        "slowest": slow.seconds,
        "exposed": expected.exposed,
        "mfu": useful / expected.seconds / chip.flops,
        "residues_per_second": load.residues * count / expected.seconds,
        "sequences_per_step": load.sequences * count,
        "busiest_device": load.slowest,
        "days": run.steps * expected.seconds / 86400,
        "device_hours": run.steps * expected.seconds / 3600 * count,
        "data": run.data.path or f"{SAMPLE} (config.data.path is empty)",
        "efficiencies": {
            "low": dataclasses.asdict(chip.low),
            "high": dataclasses.asdict(chip.high),
            "source": chip.source,
        },
        "compile_seconds": seconds,
        "miscounted": roofline.miscounted(program, useful, useful / fast.seconds / chip.flops),
        "note": LEFT_OUT,
    }


def fits(peak: float, budget: float) -> bool:
    return peak <= budget * (1 - SPARE)


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


def process_memory(memory: dict[str, float]) -> dict[str, float]:
    """Bytes that a training process on a CPU takes beside those of its step."""
    working = memory["activations"] + memory["temporaries"]
    return {
        # The best and the newest may be written at the same time.
        "copies for checkpoints": 2 * (memory["parameters"] + memory["optimizer"]),
        # At most: runs were seen to hold one or two more than they use.
        "freed, but kept": 2 * working if command.keeps(working) else 0,
        "Python, JAX, compiler": PROCESS,
    }


def attempt(config, changes: dict[str, Any], target: tuple[str, int, int]) -> Plan:
    """A plan of `config` with other values of some fields, or {"refused": why there is none}."""
    name = " ".join(f"--config.{field}={value}" for field, value in changes.items())
    console.print(f"compiling {name}")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    try:
        return {"variant": name} | plan(config.lock(), *target)
    except UserError as error:
        return {"variant": name, "refused": str(error)}


def advice(config, target: tuple[str, int, int]) -> str:
    """The first change of SAVING that fits, each compiled to see."""
    for changes in SAVING:
        smaller = attempt(config, changes, target)
        if smaller.get("fits"):
            return f"{smaller['variant']} fits, in {smaller['peak'] / chips.GIB:.1f} GiB"
    return (
        "nor does it with 64 microbatches and compute.remat=block: take fewer rows, by "
        "--config.batch.sequences_per_device or --config.batch.rows, or shorter ones"
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
    there = config_of(workdir)
    model = there.model.to_dict()
    if model != config.model.to_dict():
        fields = sorted(k for k in model if model[k] != config.model.get(k))
        raise UserError(f"--against {workdir} has another model: {', '.join(fields)} differ")
    trained = [c.finetune.method if c.get("finetune") else "pretraining" for c in (there, config)]
    if trained[0] != trained[1]:
        raise UserError(
            f"--against {workdir} is a run of {trained[0]}, the plan is of {trained[1]}"
        )
    return {
        name: statistics.median(line[name] for line in lines[1:])  # the first one compiled
        for name in ("seconds_per_step", "tokens_per_second", "mfu")
        if all(name in line for line in lines[1:])  # not those of one of two kinds of device alone
    }


def beside_measured(p: Plan) -> str:
    """Return a line on the run of --against, and on how it compares where its steps are as long."""
    run = p["measured"]
    mfu = f", MFU {run['mfu']:.1%}" if "mfu" in run else ""
    planned = p["residues_per_second"] * p["seconds"]
    there = run["tokens_per_second"] * run["seconds_per_step"]
    times = f"{run['seconds_per_step'] / p['seconds']:.2f} times the estimate"
    if not 0.8 < there / planned < 1.25:  # another batch, or another number of devices
        times = f"not comparable, with {there:,.0f} residues a step, the plan's has {planned:,.0f}"
    return (
        f"measured     {run['seconds_per_step'] * 1e3:.1f} ms a step: {times}; "
        f"{run['tokens_per_second']:,.0f} residues/s{mfu}"
    )


def config_of(workdir: str):
    """The config of a run, locked, with what an older version did not record. Raises UserError
    where it has none."""
    from ml_collections import config_dict

    from esm1nv_jax.training.run_config import flat_with_defaults

    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"--against {workdir} holds no config.json; name the folder of a run")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        config = config_dict.ConfigDict(recorded)
        config.update_from_flattened_dict(flat_with_defaults(recorded))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); name the folder of a whole run"
        ) from None
    return config.lock()


def print_plan(p: Plan) -> None:
    """Tables of memory and kernels, and the estimate of time."""
    stdout.print(
        f"step       {p['devices']} x {p['chip']} on {p['hosts']} host(s); attention by "
        f"{p['attention']}, remat {p['remat']}, {p['microbatches']} microbatch(es)\n"
        f"batch      {p['rows']} rows of {p['row_length']} tokens a device, "
        f"{p['sequences_per_step']:,.0f} sequences a step; lengths from {p['data']}\n"
        f"compiled   in {p['compile_seconds']:.0f} s, XLA_FLAGS={p['flags'] or 'none'}"
    )
    table = numbers_table("Memory of one device", "", "GiB")
    for kind, size in (*p["memory"].items(), ("peak", p["peak"]), ("the device has", p["budget"])):
        table.add_row(kind, f"{size / chips.GIB:.2f}", style="bold" if kind == "peak" else "")
    stdout.print(table)
    verdict = "fits" if p["fits"] else f"does not fit; {p['advice']}"
    stdout.print(f"with {SPARE:.0%} to spare: {verdict}")
    if p["miscounted"]:
        stdout.print(f"no estimate of time: {p['miscounted']}")
        return
    slots = p["rows"] * p["row_length"]
    table = numbers_table("Kernels", "", "number", "bytes/token", "MFLOP/token", "ms", "share")
    for k in p["kernels"]:
        if k["kind"] != "collective":
            table.add_row(
                f"{k['phase']} {k['kind']}",
                f"{k['kernels']:.0f}",
                f"{k['bytes'] / slots:,.0f}",
                f"{k['flops'] / slots / 1e6:.1f}",
                f"{k['seconds'] * 1e3:.2f}",
                f"{k['seconds'] / p['seconds']:.1%}",
            )
    stdout.print(table)
    total = sum(c["bytes"] for c in p["collectives"])
    overlap = sum(c["asynchronous"] for c in p["collectives"])
    kinds = sorted({f"{c['kind']} of {c['dtype']}" for c in p["collectives"]})
    low, high, source = p["efficiencies"].values()
    shares = ", ".join(f"{name} {low[name]:.0%} to {high[name]:.0%}" for name in low)
    stdout.print(
        f"collectives  {len(p['collectives'])} ({', '.join(kinds) or 'none'}), "
        f"{total / 1e6:.0f} MB, {overlap} may overlap with compute; "
        f"{p['exposed'] * 1e3:.2f} ms are not overlapped\n"
        f"estimate     {p['seconds'] * 1e3:.1f} ms a step ({p['fastest'] * 1e3:.0f} to "
        f"{p['slowest'] * 1e3:.0f}), MFU {p['mfu']:.1%}, "
        f"{p['residues_per_second']:,.0f} residues/s, {p['bytes_per_token']:,.0f} bytes/token; "
        f"{p['days']:,.1f} days, {p['device_hours']:,.0f} device-hours for all steps\n"
        f"             the busiest device has {p['busiest_device'] - 1:.0%} more attention than "
        f"the mean\nefficiency   {shares}; {source}"
    )
    if "measured" in p:
        stdout.print(beside_measured(p))
    stdout.print(LEFT_OUT)


def print_comparison(plans: list[Plan]) -> None:
    """One line a variant."""
    table = numbers_table("", "", "peak GiB", "", "ms", "MFU", "residues/s", "bytes/token")
    for p in plans:
        if "refused" in p:
            table.add_row(p["variant"], "", p["refused"])
            continue
        times: tuple[str, ...] = (f"{p['seconds'] * 1e3:.1f}", f"{p['mfu']:.1%}")
        times += (f"{p['residues_per_second']:,.0f}", f"{p['bytes_per_token']:,.0f}")
        verdict = "fits" if p["fits"] else "does not fit"
        shown = ("",) * 4 if p["miscounted"] else times
        table.add_row(p["variant"], f"{p['peak'] / chips.GIB:.2f}", verdict, *shown)
    stdout.print(table)
    stdout.print(LEFT_OUT)


def main(argv: list[str]) -> int:
    parser = command.Parser(
        "plan",
        "Compile the configured step for chips that are not here; show memory, kernels and time.",
        "esm1nv plan --config=configs/pretrain_small.py --chip a100-80gb --hosts 22 "
        "--devices-per-host 8",
    )
    names = (*chips.CHIPS, chips.THIS_CPU)
    parser.add_argument("--config", metavar="FILE[:ARGS]", help="a config file")
    add = parser.add_argument
    add("--chip", default=names[0], choices=names, help="to compile for (default: %(default)s)")
    add("--hosts", type=int, default=1, metavar="N", help="of the run (default: %(default)s)")
    per_host = "chips of each host (default: %(default)s)"
    add("--devices-per-host", type=int, default=1, metavar="N", help=per_host)
    parser.add_argument("--compare", metavar="FIELDS", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--against", metavar="WORKDIR", help="a run: measured beside predicted")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options, overrides = parser.parse_known_args(argv)
    if not options.config and not options.against:
        raise UserError("name a config: --config=configs/pretrain_small.py")
    if min(options.hosts, options.devices_per_host) < 1:
        raise UserError("--hosts and --devices-per-host must be at least 1")
    fields = options.compare.split(",") if options.compare else []
    if unknown := [field for field in fields if field not in VARIANTS]:
        raise UserError(f"--compare={unknown[0]} is unknown; there are {', '.join(VARIANTS)}")

    from esm1nv_jax.common import config_file

    # Before a config is read, for that of fine-tuning opens its model.
    flags = chips.prepare_environment(options.chip)
    if options.config:
        config = config_file.from_option(options.config, overrides)
    else:
        config = config_file.override(config_of(options.against), overrides)
    result: dict[str, Any] = {"flags": flags}
    if options.against:
        result["measured"] = measured(options.against, config)
    target = (options.chip, options.hosts, options.devices_per_host)
    if fields:
        changes = [{VARIANTS[f][0]: value} for f in fields for value in VARIANTS[f][1]]
        plans = [attempt(config, change, target) for change in changes]
        print(json.dumps(plans, indent=1)) if options.json else print_comparison(plans)
        return 0
    try:
        result |= plan(config, *target)
    except DoesNotFit as error:
        raise UserError(f"{error}; {advice(config, target)}") from None
    if not result["fits"]:
        result["advice"] = advice(config, target)
    print(json.dumps(result, indent=1)) if options.json else print_plan(result)
    return 0
