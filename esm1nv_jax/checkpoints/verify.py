"""`esm1nv doctor`: reads every byte of a run's checkpoints and says which are whole."""

from __future__ import annotations

import dataclasses

from etils import epath

from esm1nv_jax.checkpoints import manager
from esm1nv_jax.common import arguments
from esm1nv_jax.common.errors import UserError

EXIT_DAMAGED = 1


@dataclasses.dataclass(frozen=True)
class Finding:
    """One folder among a run's checkpoints. `wrong` is empty where it is whole."""

    name: str  # as under the run's folder: checkpoints/1500, best/1200
    wrong: list[str]
    counts: bool = True  # False for leftovers, which no start of the run looks at


def examine(workdir: epath.PathLike) -> list[Finding]:
    """Every checkpoint of a run, the best one included, and what killed saves left behind.

    Raises UserError where the folder holds no run.
    """
    run, found = epath.Path(workdir), []
    for folder in (manager.FOLDER, manager.BEST):
        if not (run / folder).exists():
            continue
        whole = manager.steps(run, folder)
        found += [Finding(f"{folder}/{step}", manager.verify(run, step, folder)) for step in whole]
        for path in sorted((run / folder).iterdir()):
            if path.name.isdigit() and int(path.name) in whole:
                continue
            why = "set aside as damaged" if "damaged" in path.name else "a save was cut short"
            found.append(Finding(f"{folder}/{path.name}", [why], counts=False))
    if not found:
        raise UserError(f"{workdir} holds no checkpoints; give the --workdir of a run")
    return found


def main(argv: list[str]) -> int:
    parser = arguments.Parser(
        "doctor",
        "Read every byte of a run's checkpoints and say which are whole. Changes nothing.\n"
        "Exit status: 0 all are whole, 1 some are damaged.",
        "esm1nv doctor runs/first",
    )
    parser.add_argument("workdir", help="the folder of a run")
    options = parser.parse_args(argv)
    found = examine(options.workdir)
    width = max(len(finding.name) for finding in found)
    for finding in found:
        if not finding.counts:
            verdict = f"leftover, may be removed: {finding.wrong[0]}"
        else:
            verdict = f"DAMAGED: {'; '.join(finding.wrong)}" if finding.wrong else "whole"
        print(f"{finding.name:<{width}}  {verdict}")
    damaged = [finding for finding in found if finding.counts and finding.wrong]
    steps = [f for f in found if f.counts and f.name.startswith(f"{manager.FOLDER}/")]
    good = [finding.name for finding in steps if not finding.wrong]
    if damaged:
        goes_on = f"a start of the run goes on from {good[-1]}" if good else "none can be used"
        print(f"{len(damaged)} damaged; {goes_on}")
        return EXIT_DAMAGED
    print(f"all {len(found) - sum(not f.counts for f in found)} whole")
    return 0
