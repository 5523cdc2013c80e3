"""The mean of checkpoints, as ESM-1nv was released: of the last 47 of its run.

Members are added array by array in fp64, in the order of (run, step), so that neither the order of
arguments nor rounding can matter; memory holds the sum and one array, whatever the number of
members. Each member's parameters are checked against their checksums before they are added, while
the member before it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorstore
from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import encoder


@dataclasses.dataclass(frozen=True, order=True)
class Member:
    run: str
    step: int

    def __str__(self) -> str:
        return f"checkpoint {self.step} of {self.run}"


def select(
    runs: Iterable[str], last: int = 0, steps: tuple[int, ...] = (), every: int = 1
) -> list[Member]:
    """Members in order: of each run the given steps, or the `last` (0: all) of each `every`th.

    `every` counts back from the newest. The best checkpoint, which lives apart, is no member.
    Raises UserError where a run has fewer than asked for.
    """
    if last < 0 or every < 1:
        raise UserError(f"--last {last} and --every {every} must be 1 or more")
    members: list[Member] = []
    for run in sorted({_absolute(run) for run in runs}):
        saved = step_folder.steps(run)
        if not saved:
            raise UserError(f"{run} holds no finished checkpoint; is it the --workdir of a run?")
        if missing := sorted(set(steps) - set(saved)):
            raise UserError(
                f"{run} has no checkpoint {', '.join(map(str, missing))}; it has {_few(saved)}"
            )
        chosen = sorted(set(steps)) or saved[::-1][::every][: last or None][::-1]
        if not steps and len(chosen) < last:
            raise UserError(
                f"{run} has {len(chosen)} checkpoints"
                + (f" when one in {every} is taken" if every > 1 else "")
                + f", --last {last} were asked for; take --last {len(chosen)}, or train with "
                f"--config.checkpoint.keep={last * every}"
            )
        members += [Member(run, step) for step in chosen]
    return members


def average(
    members: list[Member], on_progress: Callable[[Member], None] = lambda member: None
) -> model_folder.Weights:
    """The mean of the members' parameters, fp32. Calls `on_progress` with each member added.

    Raises UserError that names the member, and the field or parameter, where one is damaged or not
    of the same model as the first.
    """
    if not members:
        raise UserError("an average of no checkpoints was asked for; name at least one")
    members = sorted(set(members))
    model, opened = _open_alike(members)
    sums: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(1) as thread:  # hashing and reading release the interpreter's lock
        checks = [
            thread.submit(step_folder.verify, m.run, m.step, items=("params",)) for m in members
        ]
        try:
            for member, arrays, check in zip(members, opened, checks, strict=True):
                if errors := check.result():
                    raise UserError(f"{member} is damaged: {'; '.join(errors)}; leave it out")
                for name, array in arrays.items():
                    value = np.asarray(array.read().result())
                    if name in sums:
                        sums[name] += value
                    else:
                        sums[name] = value.astype(np.float64)
                on_progress(member)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
    means = {name: (total / len(members)).astype(np.float32) for name, total in sums.items()}
    return model_folder.Weights(model_folder.unflatten(means), model, _provenance(members))


def _open_alike(
    members: list[Member],
) -> tuple[encoder.EncoderConfig, list[dict[str, tensorstore.TensorStore]]]:
    """The members' one architecture, and every member's parameters, opened but not read."""
    first, model, opened = members[0], _model(members[0]), []
    expected = dataclasses.asdict(model)
    for member in members:
        for name, value in dataclasses.asdict(_model(member)).items():
            if value != expected[name]:
                raise UserError(
                    f"{member} has model.{name}={value}, {first} has {expected[name]}; only "
                    "checkpoints of one model can be averaged"
                )
        try:
            opened.append(step_folder.open_params(member.run, member.step))
        except Exception as error:  # tensorstore raises many kinds
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{member} cannot be read ({reason}); leave it out") from None
        model_folder.check(opened[-1], model, str(member))
    return model, opened


def _model(member: Member) -> encoder.EncoderConfig:
    try:
        metadata = step_folder.read_metadata(member.run, member.step)
        return encoder.EncoderConfig(**metadata["config"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{member} has no readable config ({error}); leave it out") from None


def _provenance(members: list[Member]) -> dict:
    """Where an average comes from. A member's digest is that of its file of checksums, which holds
    the digest of every other of its files."""
    rows, data = [], set()
    for member in members:
        path = epath.Path(member.run) / step_folder.FOLDER / str(member.step)
        digest = hashlib.sha256((path / step_folder.CHECKSUMS).read_bytes()).hexdigest()
        rows.append({"run": member.run, "step": member.step, "sha256": digest})
        try:
            data.add(step_folder.read_data_state(member.run, member.step).get("data", ""))
        except (OSError, ValueError) as error:
            raise UserError(f"{member} cannot be read ({error}); leave it out") from None
    return {
        "run": members[-1].run,
        "steps": [member.step for member in members],
        "members": rows,
        "data": sorted(data),
        "averaged_by": __version__,
    } | step_folder.read_metadata(members[-1].run, members[-1].step)


def _absolute(run: str) -> str:
    """One name for one run, however it was written, so that the order of members is fixed."""
    path = epath.Path(run)
    if not path.exists():
        raise UserError(f"run {run} does not exist; give the --workdir of a training run")
    return str(path) if "://" in run else str(path.resolve())


def _few(steps: list[int]) -> str:
    names = list(map(str, steps))
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-3:]])
