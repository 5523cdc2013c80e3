"""The folder of a run: locked by one live run, bound to one config for its life; its logs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.common import files
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import huggingface
from esm1nv_jax.training.distributed import Watchdog
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_config import OF_STATE, RunConfig, changes_learning, flat_with_defaults

CONFIG, DATA, LOCK, NONCE = "config.json", "data.json", "run.lock", ".nonce"
OTHER_DATA = (
    "the {} split is not the one this run began with; set config.data.path to the same data "
    "set, or choose another --workdir=DIR"
)
NONCE_TIMEOUT = 30.0  # seconds; a network file system may show a new file so much later


@contextlib.contextmanager
def lock_workdir(workdir: str, group: ProcessGroup) -> Iterator[epath.Path]:
    """Create the folder, lock it against any other live run, and yield its path on every process.

    Process 0 holds a file lock, which a killed process cannot leave behind. Object stores
    (`gs://`) have none: there nothing stops two runs in one place. The other processes go on only
    once they have read there what process 0 has just written.
    """
    run_dir = epath.Path(workdir)
    if not files.is_remote(run_dir):
        run_dir = epath.Path(os.path.abspath(os.path.expanduser(str(workdir))))
    if any(character in str(run_dir) for character in "[*?"):
        # Orbax looks for the parts of a checkpoint by a pattern, finds none and saves it empty.
        raise UserError(
            f"workdir {run_dir} has one of [ * ? in its path, where no checkpoint can be written; "
            "choose another with --workdir=DIR"
        )
    if (run_dir / model_folder.DESCRIPTION).exists() or huggingface.is_hf_folder(run_dir):
        raise UserError(
            f"workdir {run_dir} holds a model, which every command would open instead of the run; "
            "choose another with --workdir=DIR"
        )
    with contextlib.ExitStack() as stack:
        if group.is_primary:
            stack.enter_context(_locked(run_dir))
        check_shared(run_dir, group)
        yield run_dir


def check_shared(run_dir: epath.Path, group: ProcessGroup) -> None:
    """Raise UserError on a process that does not see, in `run_dir`, what process 0 writes there."""
    if group.size == 1:
        return
    file = run_dir / NONCE

    def write() -> str:
        nonce = secrets.token_hex(8)
        with files.writing(file):
            file.write_text(nonce)
        return nonce

    nonce = group.broadcast("workdir", write)
    deadline = time.monotonic() + NONCE_TIMEOUT
    while not (file.exists() and file.read_text() == nonce):
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {run_dir} on {group.host} is not the folder that process 0 sees under "
                "that name; give --workdir=DIR on a file system that all hosts share"
            )
        time.sleep(0.2)
    group.barrier("workdir")
    if group.is_primary:
        file.unlink()


@contextlib.contextmanager
def _locked(run_dir: epath.Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if files.is_remote(run_dir):
            lock = None
        else:
            lock = open(run_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, closed below
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"workdir {run_dir} cannot be written ({reason}); choose another with --workdir=DIR"
        ) from None
    if lock is None:
        yield
        return
    with lock:
        if files.try_lock(lock.fileno(), f"workdir {run_dir}") is False:
            lock.seek(0)
            raise UserError(
                f"workdir {run_dir} is in use by a live run ({lock.read().strip() or 'unknown'}); "
                "stop it, or choose another with --workdir=DIR"
            )
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        job = os.environ.get("SLURM_JOB_ID")
        of_job = f" of Slurm job {job}" if job else ""
        text = f"process {os.getpid()} on {socket.gethostname()}{of_job} since {now}"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without
            os.write(lock.fileno(), text.encode())
        yield


def write_or_check_config(
    run_dir: epath.Path, config: RunConfig, fingerprints: dict[str, str]
) -> None:
    """Write the config into a new run's folder, or check it against the run that is there.

    `fingerprints` of the data, by split, are written beside it, for `esm1nv compare`.

    Raises UserError that names every field whose change would change what the run learns, or where
    the training data are not those of the run's checkpoints; the folder then stays as it was.
    """
    path = run_dir / CONFIG
    if path.exists():
        try:
            previous = flat_with_defaults(json.loads(path.read_text()))
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} is not readable as JSON; remove it if {run_dir} is a run and the command "
                "the one it began with, or choose another with --workdir=DIR"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); choose another with --workdir=DIR"
            ) from None
        changed = differing_fields(previous, config.flat())
        if changed:
            listed = "; ".join(f"{name}: {a!r} there, {b!r} here" for name, a, b in changed)
            names = [name for name, _, _ in changed]
            fork = f", with --config.fork_from={run_dir} to go on from its state"
            no_fork = config.finetune or any(name.startswith(OF_STATE) for name in names)
            raise UserError(
                f"workdir {run_dir} holds another run, which differs in {listed}; choose another "
                f"with --workdir=DIR{'' if no_fork else fork}"
            )
    if not step_folder.steps(run_dir) or not (run_dir / DATA).exists():
        with files.writing(run_dir / DATA):
            files.write_atomically(run_dir / DATA, json.dumps(fingerprints, indent=1))
    else:
        recorded = {"train": ""}
        with contextlib.suppress(ValueError):
            recorded = json.loads((run_dir / DATA).read_text())
        for split in recorded.keys() & fingerprints.keys():
            if recorded[split] != fingerprints[split]:
                raise UserError(OTHER_DATA.format("training" if split == "train" else split))
    with files.writing(path):
        files.write_atomically(path, json.dumps(config.to_dict(), indent=1, sort_keys=True))


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, old value, new value) of every field that changes what is learned."""
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and changes_learning(name)
    ]


class LogFile(io.TextIOWrapper):
    """A file that cannot end the run: lines for which the disk has no room are lost."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


@contextlib.contextmanager
def open_host_log(run_dir: epath.Path, group: ProcessGroup, watchdog: Watchdog) -> Iterator[TextIO]:
    """Open the log of this host, `logs/HOST.log`, to which all its processes append.

    Stacks go there, and a line of metrics from each process; what processes other than 0 would
    print goes there too, for one of them is enough on a terminal.
    """
    folder = run_dir / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = files.open_append(folder / f"{group.host}.log")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another --workdir=DIR"
        ) from None
    with LogFile(file, encoding="utf-8", errors="backslashreplace", write_through=True) as log:
        log_line(log, f"process {group.index} of {group.size} starts, pid {os.getpid()}")
        watchdog.log_to(log)
        if not group.is_primary:
            console.file = log
        try:
            yield log
        finally:
            watchdog.log_to(sys.stderr)
            console._file = None  # sys.stderr, whatever it is by then


def log_line(log: TextIO, text: str) -> None:
    """Append a line with the time to the log of this host."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=log, flush=True)
