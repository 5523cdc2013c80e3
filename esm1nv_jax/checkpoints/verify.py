"""`esm1nv doctor`: reads every byte of a run's checkpoints and reports which are whole."""

from __future__ import annotations

import dataclasses

from etils import epath

from esm1nv_jax.checkpoints.step_folder import BEST, FOLDER, steps, verify
from esm1nv_jax.common import arguments
from esm1nv_jax.common.console import stdout
from esm1nv_jax.common.errors import UserError

EXIT_DAMAGED = 1
LEFTOVERS = {".damaged": "set aside as damaged", ".orbax-checkpoint-tmp": "a save was cut short"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One folder among a run's checkpoints; `errors` is empty where it is whole."""

    name: str  # below the run's folder: checkpoints/1500, best/1200
    errors: list[str]
    leftover: bool = False  # no start of the run reads it


def verify_run(workdir: epath.PathLike) -> list[Result]:
    """Every checkpoint of a run, the best one included, and what killed saves left behind.

    Raises UserError where the folder holds no run, or cannot be read.
    """
    results = []
    for folder in (FOLDER, BEST):
        finished = steps(workdir, folder)
        results += [Result(f"{folder}/{n}", verify(workdir, n, folder)) for n in finished]
        path = epath.Path(workdir) / folder
        for entry in sorted(path.iterdir()) if path.exists() else ():
            reasons = [reason for mark, reason in LEFTOVERS.items() if mark in entry.name]
            if entry.name.isdecimal() and int(entry.name) not in finished:
                reasons = ["a save was cut short"]
            results += [Result(f"{folder}/{entry.name}", reasons[:1], True)] * bool(reasons)
    if not results:
        raise UserError(f"{workdir} holds no checkpoints; give the --workdir of a run")
    return results


def main(argv: list[str]) -> int:
    parser = arguments.Parser(
        "doctor",
        "Read every byte of a run's checkpoints and report which are whole. Changes nothing.\n"
        "Exit status: 0 all are whole, 1 some are damaged.",
        "esm1nv doctor runs/first",
    )
    parser.add_argument("workdir", help="the folder of a run")
    results = verify_run(parser.parse_args(argv).workdir)
    width = max(len(result.name) for result in results)
    for result in results:
        verdict = f"DAMAGED: {'; '.join(result.errors)}" if result.errors else "whole"
        if result.leftover:
            verdict = f"leftover, may be removed: {result.errors[0]}"
        stdout.print(f"{result.name:<{width}}  {verdict}")
    checked = [result for result in results if not result.leftover]
    damaged = [result for result in checked if result.errors]
    if not damaged:
        stdout.print(f"all {len(checked)} whole")
        return 0
    usable = [r.name for r in checked if not r.errors and r.name.startswith(f"{FOLDER}/")]
    resumed = f"a start of the run goes on from {usable[-1]}" if usable else "none can be used"
    stdout.print(f"{len(damaged)} damaged; {resumed}")
    return EXIT_DAMAGED
