"""`esm1nv doctor`: reads every byte of a run's checkpoints and reports which are whole."""

from __future__ import annotations

from etils import epath

from esm1nv_jax.checkpoints.step_folder import BEST, FOLDER, steps, verify
from esm1nv_jax.common import arguments
from esm1nv_jax.common.console import stdout
from esm1nv_jax.common.errors import UserError

EXIT_DAMAGED = 1


def main(argv: list[str]) -> int:
    parser = arguments.Parser(
        "doctor",
        "Read every byte of a run's checkpoints and report which are whole. Changes nothing.\n"
        "Exit status: 0 all are whole, 1 some are damaged.",
        "esm1nv doctor runs/first",
    )
    parser.add_argument("workdir", help="the folder of a run")
    workdir = parser.parse_args(argv).workdir

    errors: dict[str, list[str]] = {}  # of checkpoints that count, such as checkpoints/1500
    verdicts: dict[str, str] = {}
    for folder in (FOLDER, BEST):
        finished = steps(workdir, folder)
        for name, step in ((f"{folder}/{step}", step) for step in finished):
            errors[name] = verify(workdir, step, folder)
            verdicts[name] = f"DAMAGED: {'; '.join(errors[name])}" if errors[name] else "whole"
        for name, reason in _leftovers(epath.Path(workdir) / folder, finished).items():
            verdicts[name] = f"leftover, may be removed: {reason}"
    if not verdicts:
        raise UserError(f"{workdir} holds no checkpoints; give the --workdir of a run")

    width = max(map(len, verdicts))
    for name, verdict in verdicts.items():
        stdout.print(f"{name:<{width}}  {verdict}")
    damaged = sum(map(bool, errors.values()))
    if not damaged:
        stdout.print(f"all {len(errors)} whole")
        return 0
    valid = [name for name, e in errors.items() if not e and name.startswith(f"{FOLDER}/")]
    resumed = f"a start of the run goes on from {valid[-1]}" if valid else "none can be used"
    stdout.print(f"{damaged} damaged; {resumed}")
    return EXIT_DAMAGED


def _leftovers(path: epath.Path, finished: list[int]) -> dict[str, str]:
    """What no start of the run reads, with the reason: set aside, or left by a killed save."""
    reasons = {}
    for entry in sorted(path.iterdir()) if path.exists() else ():
        step, _, mark = entry.name.partition(".")
        if step.isdecimal() and (mark or int(step) not in finished):
            reason = "set aside as damaged" if mark == "damaged" else "a save was cut short"
            reasons[f"{path.name}/{entry.name}"] = reason
    return reasons
