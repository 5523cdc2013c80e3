"""A plan, and how it is shown: to a person as tables, to a program as a dictionary."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

GIB, MB = 2**30, 1e6
SPARE = 0.10  # of a device's memory that should stay free
LEFT_OUT = (
    "An estimate of this compiled program, not a measurement. Left out: XLA's autotuning (a live "
    "chip may choose other kernels and fusions), workspaces of cuDNN and cuBLAS, buffers of NCCL, "
    "the CUDA context (about 1 GiB together), input, evaluation and checkpoints."
)
console = Console(highlight=False, soft_wrap=True)  # stdout: a plan is output, not progress


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes in bytes, of one device; times in seconds, of one step."""

    chip: str
    hosts: int
    devices: int
    attention: str
    remat: str
    microbatches: int
    rows: int  # a device
    row_length: int
    memory: dict[str, float]
    peak: float
    budget: float
    collectives: list[dict[str, Any]]
    kernels: list[dict[str, Any]]
    bytes_per_token: float
    seconds: float  # expected
    fastest: float  # at the highest efficiencies
    slowest: float  # at the lowest
    exposed: float  # of collectives that nothing overlaps
    mfu: float
    residues_per_second: float
    sequences_per_step: float  # the mean of the stream
    busiest_device: float  # expected attention work of the busiest device over the mean device's
    days: float
    device_hours: float
    data: str
    efficiencies: dict[str, Any]
    compile_seconds: float
    miscounted: str = ""  # why the times are not to be believed
    advice: str = ""  # for what does not fit: what was compiled, and fits

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget * (1 - SPARE)


def as_dict(plan: Plan | str) -> dict[str, Any]:
    """Every figure of a plan, or {'refused': reason}."""
    if isinstance(plan, str):
        return {"refused": plan}
    return dataclasses.asdict(plan) | {"fits": plan.fits, "note": LEFT_OUT}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def print_plan(plan: Plan, flags: str, measured: dict[str, float] | None) -> None:
    console.print(
        f"step       {plan.devices} x {plan.chip} on {plan.hosts} host(s); attention by "
        f"{plan.attention}, remat {plan.remat}, {plan.microbatches} microbatch(es)\n"
        f"batch      {plan.rows} rows of {plan.row_length} tokens a device, "
        f"{plan.sequences_per_step:,.0f} sequences a step; lengths from {escape(plan.data)}\n"
        f"compiled   in {plan.compile_seconds:.0f} s, XLA_FLAGS={escape(flags) or 'none'}"
    )
    table = _table("Memory of one device", "", "GiB")
    for kind, size in plan.memory.items():
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_row("peak", f"{plan.peak / GIB:.2f}", style="bold")
    table.add_row("the device has", f"{plan.budget / GIB:.2f}")
    console.print(table)
    verdict = "fits" if plan.fits else f"does not fit; {plan.advice}"
    console.print(f"with {SPARE:.0%} to spare: {verdict}")
    if plan.miscounted:
        console.print(f"no estimate of time: {plan.miscounted}")
        return
    _print_times(plan)
    if measured:
        seconds = measured["seconds_per_step"]
        mfu = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
        console.print(
            f"measured     {seconds * 1e3:.1f} ms a step: {seconds / plan.seconds:.2f} times the "
            f"estimate; {measured['tokens_per_second']:,.0f} residues/s{mfu}"
        )
    console.print(LEFT_OUT)


def _print_times(plan: Plan) -> None:
    slots = plan.rows * plan.row_length
    table = _table("Kernels", "", "number", "bytes/token", "MFLOP/token", "ms", "share")
    for k in plan.kernels:
        if k["kind"] == "collective":
            continue
        table.add_row(
            f"{k['phase']} {k['kind']}",
            f"{k['kernels']:.0f}",
            f"{k['bytes'] / slots:,.0f}",
            f"{k['flops'] / slots / 1e6:.1f}",
            f"{k['seconds'] * 1e3:.2f}",
            f"{k['seconds'] / plan.seconds:.1%}",
        )
    console.print(table)
    total = sum(c["bytes"] for c in plan.collectives)
    overlap = sum(c["asynchronous"] for c in plan.collectives)
    kinds = sorted({f"{c['kind']} of {c['dtype']}" for c in plan.collectives})
    low, high = plan.efficiencies["low"], plan.efficiencies["high"]
    shares = ", ".join(f"{name} {low[name]:.0%} to {high[name]:.0%}" for name in low)
    console.print(
        f"collectives  {len(plan.collectives)} ({', '.join(kinds) or 'none'}), "
        f"{total / MB:.0f} MB, {overlap} may overlap with compute; "
        f"{plan.exposed * 1e3:.2f} ms are not overlapped\n"
        f"estimate     {plan.seconds * 1e3:.1f} ms a step ({plan.fastest * 1e3:.0f} to "
        f"{plan.slowest * 1e3:.0f}), MFU {plan.mfu:.1%}, "
        f"{plan.residues_per_second:,.0f} residues/s, {plan.bytes_per_token:,.0f} bytes/token; "
        f"{plan.days:,.1f} days, {plan.device_hours:,.0f} device-hours for all steps\n"
        f"             the busiest device has {plan.busiest_device - 1:.0%} more attention than "
        f"the mean\nefficiency   {shares}; {plan.efficiencies['source']}"
    )


def print_comparison(plans: list[tuple[str, Plan | str]]) -> None:
    table = _table("", "", "peak GiB", "", "ms", "MFU", "residues/s", "bytes/token")
    for name, plan in plans:
        if isinstance(plan, str):
            table.add_row(name, "", escape(plan))
            continue
        memory = (f"{plan.peak / GIB:.2f}", "fits" if plan.fits else "does not fit")
        times = (
            f"{plan.seconds * 1e3:.1f}",
            f"{plan.mfu:.1%}",
            f"{plan.residues_per_second:,.0f}",
            f"{plan.bytes_per_token:,.0f}",
        )
        table.add_row(name, *memory, *(times if not plan.miscounted else ("",) * 4))
    console.print(table)
    console.print(LEFT_OUT)
