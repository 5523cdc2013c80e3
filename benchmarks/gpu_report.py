"""What `gpu.py` found, as tables in Markdown."""

from __future__ import annotations

KINDS = ("gemm", "attention", "reduction", "elementwise", "copy", "collective", "other")


def markdown(results: dict) -> str:
    """One page: a section for each part that recorded anything, and what was skipped."""
    device, parts = results["device"], results["parts"]
    flags = f"XLA_FLAGS `{device['flags'] or 'none'}`"
    lines = [f"# {device['kind']}", "", f"{results['seconds']:.0f} s, {flags}", ""]
    steps = {name: part for name, part in parts.items() if name.startswith(("step", "plan"))}
    if any(part["records"] for part in steps.values()):
        lines += ["## The step of the card", "", *step_table(steps), *class_table(steps)]
    for name, part in parts.items():
        if name not in steps and part["records"]:
            lines += [f"## {name}", "", *record_table(shortened(name, part["records"])), ""]
    ended = {name: part["status"] for name, part in parts.items() if part["status"] != "done"}
    lines += ["## Skipped or failed", ""]
    lines += [f"- {name}: {status}" for name, status in ended.items()]
    lines += [
        f"- **{name}, {record['name']}: wrong**"
        for name, part in parts.items()
        for record in part["records"]
        if record.get("good") is False or (name == record["name"] and record.get("equal") is False)
    ]
    lines += [
        f"- {name}, {record['name']}: {reason}"
        for name, part in parts.items()
        for record in part["records"]
        if (reason := record.get("error") or record.get("skipped") or record.get("reason"))
    ]
    return "\n".join(lines) + ("\n" if lines[-1] else "nothing\n")


def named(part: dict | None, name: str) -> dict:
    """A part's record of this name, or an empty one."""
    records = part["records"] if part else []
    return next((record for record in records if record["name"] == name), {})


def step_table(steps: dict) -> list[str]:
    """Measured steps beside the roofline of the same program, and `plan` beside the first."""
    fields = ("ms", "fastest_ms", "slowest_ms", "mfu", "residues_per_second", "peak_gib")
    rows = [("", "rows", "attention", *fields)]
    for name, part in steps.items():
        for which in ("plan",) if name == "plan" else ("measured", "roofline of this program"):
            if record := named(part, which):
                label = "esm1nv plan" if name == "plan" else f"{name}, {which}"
                values = [record.get(field) for field in ("rows", "attention", *fields)]
                rows.append((label, *values))
    return [*table(rows), ""]


def class_table(steps: dict) -> list[str]:
    """Milliseconds of a step by class of kernel: in the trace, by the roofline, by `plan`."""
    columns = {
        "trace": named(steps.get("step"), "profile"),
        "roofline of this program": named(steps.get("step"), "roofline of this program"),
        "esm1nv plan": named(steps.get("plan"), "plan"),
    }
    if not any(columns.values()):
        return []
    rows = [("kernels", *(f"{name}, ms" for name in columns), "kernels in the trace")]
    phases = ("forward", "backward", "optimizer", "unknown")
    for kind in KINDS:
        for phase in phases:
            found = [of_class(record, kind, phase) for record in columns.values()]
            if any(found):
                times = [k["ms"] if k else None for k in found]
                rows.append((f"{kind}, {phase}", *times, found[0]["kernels"] if found[0] else None))
    sums = [sum(k["ms"] for k in r.get("kernels", ())) or None for r in columns.values()]
    return [*table([*rows, ("**sum**", *sums, None)]), ""]


def of_class(record: dict, kind: str, phase: str) -> dict | None:
    kernels = record.get("kernels", ())
    return next((k for k in kernels if (k["kind"], k["phase"]) == (kind, phase)), None)


def shortened(name: str, records: list[dict]) -> list[dict]:
    """Of a sweep the ten fastest of each kind and the best; of others all that were measured."""
    records = [r for r in records if not {"error", "skipped", "reason"} & set(r)]
    if name != "blocks":
        return records
    kept = []
    for kind in ("forward", "both"):
        timed = [r for r in records if r["name"].startswith(f"{kind} (")]
        kept += sorted(timed, key=lambda r: r["ms"])[:10]
    return kept + [r for r in records if r["name"] == "best"]


def record_table(records: list[dict]) -> list[str]:
    """One row a record; records of other fields begin another table."""
    lines: list[str] = []
    rows: list[tuple] = []
    for record in records:
        header = ("", *(field for field in record if field != "name"))
        if not rows or rows[0] != header:
            lines += [*table(rows), ""] if rows else []
            rows = [header]
        rows.append(tuple(record.values()))
    return lines + (table(rows) if rows else [])


def table(rows: list[tuple]) -> list[str]:
    head, *body = [[cell(value) for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(cell(x) for x in value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
