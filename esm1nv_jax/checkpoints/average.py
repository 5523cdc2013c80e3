"""The mean of checkpoints, as ESM-1nv was released: of the last 47 of its run.

Members are added leaf by leaf in fp64, in the order of (run, step), so that neither the order of
arguments nor rounding can matter; memory holds the sum and one leaf, whatever the number of
members. Each member's parameters are checked against their checksums before they are added, while
the member before it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints import manager, model_folder
from esm1nv_jax.checkpoints.lazy_reader import Leaves
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
    """Members in order: of each run the steps named, or the `last` (0: all) of every so manyth.

    `every` counts back from the newest. Raises UserError where a run has fewer than asked for.
    """
    if last < 0 or every < 1:
        raise UserError(f"--last {last} and --every {every} must be 1 or more")
    chosen: list[Member] = []
    for run in sorted({_resolved(run) for run in runs}):
        there = manager.steps(run)
        if not there:
            raise UserError(f"{run} holds no finished checkpoint; is it the --workdir of a run?")
        if steps:
            missing = sorted(set(steps) - set(there))
            if missing:
                raise UserError(
                    f"{run} has no checkpoint {', '.join(map(str, missing))}; it has {_few(there)}"
                )
            found = sorted(set(steps))
        else:
            found = there[::-1][::every][: last or None][::-1]
            if len(found) < last:
                raise UserError(
                    f"{run} has {len(found)} checkpoints"
                    + (f" when one in {every} is taken" if every > 1 else "")
                    + f", --last {last} were asked for; take --last {len(found)}, or train with "
                    f"--config.checkpoint.keep={last * every}"
                )
        chosen += [Member(run, step) for step in found]
    return chosen


def average(
    members: list[Member], tell: Callable[[Member], None] = lambda member: None
) -> model_folder.Weights:
    """The mean of the members' parameters, fp32. `tell` hears of each member that was added.

    Raises UserError that names the member, and the field or leaf, where one is damaged or not of
    the same model as the first.
    """
    if not members:
        raise UserError("an average of no checkpoints was asked for; name at least one")
    members = sorted(set(members))
    opened = _open_alike(members)
    sums: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(1) as beside:  # hashing and reading release the interpreter's lock
        checks = [beside.submit(manager.verify, m.run, m.step, item="params") for m in members]
        try:
            for member, leaves, check in zip(members, opened, checks, strict=True):
                if wrong := check.result():
                    raise UserError(f"{member} is damaged: {'; '.join(wrong)}; leave it out")
                for name in leaves.shapes:
                    value = leaves.read(name)
                    if name in sums:
                        sums[name] += value
                    else:
                        sums[name] = value.astype(np.float64)
                tell(member)
        finally:
            beside.shutdown(wait=False, cancel_futures=True)
    params = model_folder.unflatten(
        {name: (total / len(members)).astype(np.float32) for name, total in sums.items()}
    )
    model = _model(members[0])
    model_folder.check(params, model, str(members[0]))
    return model_folder.Weights(params, model, _provenance(members))


def _open_alike(members: list[Member]) -> list[Leaves]:
    """Every member opened, none read; all of one architecture, leaf for leaf."""
    first, model, opened = members[0], _model(members[0]), []
    for member in members:
        mine = _model(member)
        for field in dataclasses.fields(model):
            a, b = getattr(model, field.name), getattr(mine, field.name)
            if a != b:
                raise UserError(
                    f"{member} has model.{field.name}={b}, {first} has {a}; only checkpoints of "
                    "one model can be averaged"
                )
        try:
            leaves = Leaves(member.run, member.step)
        except Exception as error:  # tensorstore raises many kinds
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{member} cannot be read ({reason}); leave it out") from None
        shapes = opened[0].shapes if opened else leaves.shapes
        for name in sorted(shapes.keys() | leaves.shapes.keys()):
            if shapes.get(name) != leaves.shapes.get(name):
                raise UserError(
                    f"{member}: parameter {name} has shape {leaves.shapes.get(name, '(none)')}, "
                    f"{first} has {shapes.get(name, '(none)')}"
                )
        opened.append(leaves)
    return opened


def _model(member: Member) -> encoder.EncoderConfig:
    try:
        description = manager.read_config(member.run, member.step)
        return encoder.EncoderConfig(**description["config"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{member} has no readable config ({error}); leave it out") from None


def _provenance(members: list[Member]) -> dict:
    """Where an average comes from. A member's digest is that of its file of checksums, which holds
    the digest of every other of its files."""
    rows, data = [], set()
    for member in members:
        step = epath.Path(member.run) / manager.FOLDER / str(member.step)
        digest = hashlib.sha256((step / manager.CHECKSUMS).read_bytes()).hexdigest()
        rows.append({"run": member.run, "step": member.step, "sha256": digest})
        try:
            data.add(json.loads((step / "place" / "metadata").read_text()).get("data", ""))
        except (OSError, ValueError) as error:
            raise UserError(f"{member} cannot be read ({error}); leave it out") from None
    made_by = manager.read_config(members[-1].run, members[-1].step)
    return {
        "run": members[-1].run,
        "steps": [member.step for member in members],
        "members": rows,
        "data": sorted(data),
        "averaged_by": __version__,
    } | made_by


def _resolved(run: str) -> str:
    """One name for one run, however it was written, so that the order of members is fixed."""
    path = epath.Path(run)
    if not path.exists():
        raise UserError(f"run {run} does not exist; give the --workdir of a training run")
    return str(path) if "://" in run else str(path.resolve())


def _few(steps: list[int]) -> str:
    shown = list(map(str, steps))
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
