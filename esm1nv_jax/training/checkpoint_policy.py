"""When a run saves, what it does when it cannot, and the best checkpoint, kept apart.

Process 0 alone saves (every device holds the whole state), so it alone looks at the clock.
"""

from __future__ import annotations

import dataclasses
import time

import jax
from etils import epath

from esm1nv_jax.checkpoints import manager
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError

ON_ERROR = ("continue", "stop")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps; the fields of the config's group `checkpoint`."""

    every: int
    minutes: float
    keep: int
    keep_every: int
    on_error: str

    def __post_init__(self):
        if self.on_error not in ON_ERROR:
            raise UserError(
                f"checkpoint.on_error={self.on_error!r} is unknown; there are {', '.join(ON_ERROR)}"
            )


class Saving:
    """The checkpoints of a run by the policy in `config.checkpoint`."""

    def __init__(self, run_folder: epath.Path, policy: CheckpointConfig, strict: bool = False):
        self.policy = policy
        self.checkpoints = manager.Checkpoints(run_folder, policy.keep, policy.keep_every)
        self.best = manager.Checkpoints(run_folder, 1, folder=manager.BEST)
        self.last = time.monotonic()
        self.lowest = float("inf")
        if jax.process_index() == 0:
            self._look_for_best(run_folder, strict)

    def _look_for_best(self, run_folder: epath.Path, strict: bool) -> None:
        for step in self.best.steps()[-1:]:
            wrong = manager.verify(run_folder, step, manager.BEST)
            if not wrong:
                made_by = manager.read_config(run_folder, step, manager.BEST)
                self.lowest = made_by["loss_mask"]
                return
            message = f"{manager.BEST}/{step} of {run_folder} is damaged: {'; '.join(wrong)}"
            if strict:
                raise UserError(f"{message}; leave out --strict to set it aside")
            console.print(f"{message}; set aside, the next validation makes another")
            self.best.set_aside(after=-1)

    def due(self, step: int) -> bool:
        """Whether the policy asks for a checkpoint after update `step`."""
        minutes = self.policy.minutes
        late = minutes and time.monotonic() - self.last >= 60 * minutes
        return bool(late) or step % self.policy.every == 0

    def save(self, step: int, params, optimizer, place: dict, made_by: dict) -> None:
        self.last = time.monotonic()
        self._try(lambda: self.checkpoints.save(step, params, optimizer, place, made_by))

    def save_if_best(
        self, loss_mask: float, step: int, params, optimizer, place: dict, made_by: dict
    ) -> None:
        """Keeps the state apart where its validation loss is the lowest so far."""
        if loss_mask < self.lowest:
            self.lowest = loss_mask
            made_by = made_by | {"loss_mask": loss_mask}
            self._try(lambda: self.best.save(step, params, optimizer, place, made_by))

    def check(self) -> None:
        """Tells of a save that failed behind the run's back."""
        for kept in (self.checkpoints, self.best):
            self._try(kept.check)

    def close(self) -> None:
        """Waits until what was saved is on disk. Raises SaveError where it could not be."""
        for kept in (self.checkpoints, self.best):
            kept.wait()

    def _try(self, action) -> None:
        try:
            action()
        except manager.SaveError as error:
            steps = self.checkpoints.steps()
            newest = f"the newest whole one is {steps[-1]}" if steps else "there is none yet"
            if self.policy.on_error == "stop":
                raise manager.SaveError(f"{error}; {newest}; make room and start again") from None
            console.print(f"{error}; {newest}; training goes on and saves again when next due")

    def describe_newest(self) -> str:
        """Return one phrase about the newest checkpoint, once it is on disk."""
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"checkpoint {steps[-1]} in {self.checkpoints.folder}" if steps else "none saved yet"
