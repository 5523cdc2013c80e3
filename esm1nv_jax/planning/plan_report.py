"""Shows a plan: to a person as tables, to a program as a dictionary."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from esm1nv_jax.planning.plan import ADVICE, LEFT_OUT, SPARE, Plan
from esm1nv_jax.planning.roofline import ATTENTION_EFFICIENCY, EFFICIENCY

GIB, MB = 2**30, 1e6
console = Console(highlight=False, soft_wrap=True)  # a plan is output, no progress


def as_dict(plan: Plan | str) -> dict[str, Any]:
    """Every figure of a plan, or {'refused': reason}."""
    if isinstance(plan, str):
        return {"refused": plan}
    return dataclasses.asdict(plan) | {
        "fits": plan.fits,
        "efficiency": EFFICIENCY,
        "attention_efficiency": ATTENTION_EFFICIENCY,
        "note": LEFT_OUT,
    }


def verdict(plan: Plan) -> str:
    return "fits" if plan.fits else f"does not; {ADVICE}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def show(plan: Plan, flags: str, measured: dict[str, float] | None) -> None:
    places = plan.rows * plan.row_length
    console.print(
        f"step       {plan.devices} x {plan.chip} on {plan.hosts} host(s); attention by "
        f"{plan.attention}, remat {plan.remat}, {plan.microbatches} microbatch(es)\n"
        f"batch      {plan.rows} rows of {plan.row_length} tokens a device, "
        f"{plan.sequences_per_update:,.0f} sequences an update; lengths from {plan.data}\n"
        f"compiled   in {plan.compile_seconds:.0f} s, XLA_FLAGS={flags or 'none'}"
    )
    table = _table("Memory of one device", "", "GiB")
    for kind, size in plan.memory.items():
        table.add_row(kind, f"{size / GIB:.2f}")
    table.add_row("peak", f"{plan.peak / GIB:.2f}", style="bold")
    table.add_row("the device has", f"{plan.budget / GIB:.2f}")
    console.print(table)
    console.print(f"with {SPARE:.0%} to spare: {verdict(plan)}")

    table = _table("Kernels", "", "number", "bytes/token", "MFLOP/token", "ms", "share")
    for k in plan.kernels:
        if k["kind"] == "collective":
            continue
        table.add_row(
            f"{k['phase']} {k['kind']}",
            f"{k['kernels']:.0f}",
            f"{k['bytes'] / places:,.0f}",
            f"{k['flops'] / places / 1e6:.1f}",
            f"{k['seconds'] * 1e3:.2f}",
            f"{k['seconds'] / plan.seconds:.1%}",
        )
    console.print(table)
    total = sum(c["bytes"] for c in plan.collectives)
    overlap = sum(c["asynchronous"] for c in plan.collectives)
    kinds = sorted({f"{c['kind']} of {c['dtype']}" for c in plan.collectives})
    console.print(
        f"collectives  {len(plan.collectives)} ({', '.join(kinds) or 'none'}), "
        f"{total / MB:.0f} MB, {overlap} may overlap with compute; "
        f"{plan.exposed * 1e3:.2f} ms are not overlapped"
    )
    console.print(
        f"estimate     {plan.seconds * 1e3:.1f} ms an update, MFU {plan.mfu:.1%}, "
        f"{plan.residues_per_second:,.0f} residues/s, {plan.bytes_per_token:,.0f} bytes/token; "
        f"{plan.days:,.1f} days, {plan.device_hours:,.0f} device-hours for all steps\n"
        f"             at {EFFICIENCY:.0%} of the peaks of products and of memory, "
        f"{ATTENTION_EFFICIENCY:.0%} inside attention"
    )
    if measured:
        seconds = measured["seconds_per_step"]
        console.print(
            f"measured     {seconds * 1e3:.1f} ms an update: {seconds / plan.seconds:.2f} times "
            f"the estimate; {measured['tokens_per_second']:,.0f} residues/s"
            + (f", MFU {measured['mfu']:.1%}" if "mfu" in measured else "")
        )
    console.print(LEFT_OUT)


def show_comparison(plans: list[tuple[str, Plan | str]]) -> None:
    table = _table("", "", "peak GiB", "", "ms", "MFU", "residues/s", "bytes/token")
    for name, plan in plans:
        if isinstance(plan, str):
            table.add_row(name, "", plan)
            continue
        table.add_row(
            name,
            f"{plan.peak / GIB:.2f}",
            "fits" if plan.fits else "does not fit",
            f"{plan.seconds * 1e3:.1f}",
            f"{plan.mfu:.1%}",
            f"{plan.residues_per_second:,.0f}",
            f"{plan.bytes_per_token:,.0f}",
        )
    console.print(table)
    console.print(LEFT_OUT)
