"""The folder of a run: held by one live run, and by one config for its life."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from typing import IO, Any

from etils import epath
from ml_collections import ConfigDict

from esm1nv_jax.checkpoints import checksums, manager
from esm1nv_jax.common import config_file
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.process_group import Team
from esm1nv_jax.training.run_config import MAY_CHANGE

CONFIG, LOCK, NONCE = "config.json", "run.lock", ".nonce"
NONCE_SECONDS = 30.0  # a network file system may show a new file so much later


@contextlib.contextmanager
def hold(workdir: str, team: Team):
    """Makes the folder and holds it against any other live run; yields its path on every process.

    Process 0 holds it, by a file lock, which a killed process cannot leave behind. Object stores
    (`gs://`) have none: there nothing stops two runs in one place. The other processes only go in
    once they have read there what process 0 has just written.
    """
    folder = epath.Path(workdir)
    if not manager.remote(folder):
        folder = epath.Path(os.path.abspath(os.path.expanduser(str(workdir))))
    with contextlib.ExitStack() as stack:
        if team.process == 0:
            stack.enter_context(_locked(folder))
        shared_by_all(folder, team)
        yield folder


def shared_by_all(folder: epath.Path, team: Team) -> None:
    """Raises UserError on a process that does not see, in `folder`, what process 0 writes there."""
    if team.processes == 1:
        return
    file = folder / NONCE

    def write() -> str:
        nonce = secrets.token_hex(8)
        file.write_text(nonce)
        return nonce

    nonce = team.announce("workdir", write)
    deadline = time.monotonic() + NONCE_SECONDS
    while not (file.exists() and file.read_text() == nonce):
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {folder} on {team.host} is not the folder that process 0 sees under that "
                "name; give --workdir=DIR on a file system that all hosts share"
            )
        time.sleep(0.2)
    team.together("workdir")
    if team.process == 0:
        file.unlink()


@contextlib.contextmanager
def _locked(folder: epath.Path):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = None if manager.remote(folder) else open(folder / LOCK, "a+")  # noqa: SIM115, see below
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"workdir {folder} cannot be written ({reason}); choose another with --workdir=DIR"
        ) from None
    if lock is None:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"workdir {folder} is in use by a live run ({lock.read().strip() or 'unknown'}); "
                "stop it, or choose another with --workdir=DIR"
            ) from None
        except OSError as error:  # a network file system without locks
            console.print(
                f"workdir {folder} cannot be locked ({error.strerror}): nothing stops "
                "another run from using it too"
            )
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        job = os.environ.get("SLURM_JOB_ID")
        of = f" of Slurm job {job}" if job else ""
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{of} since {now}")
        lock.flush()
        yield


def appending(path: epath.Path) -> IO[bytes]:
    """The file, to be appended to; without a buffer, where its disk is one of this host."""
    return path.open("ab") if manager.remote(path) else open(path, "ab", buffering=0)


def settle(folder: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new run's folder, or checks it against the run that lives there.

    Raises UserError that names each field in which a run already there differs, unless it may.
    """
    path = folder / CONFIG
    if path.exists():
        try:
            old = config_file.flat(json.loads(path.read_text()))
        except ValueError:
            raise UserError(
                f"{path} is not readable as JSON; remove it if {folder} is a run and the command "
                "the one it began with, or choose another with --workdir=DIR"
            ) from None
        changed = differing(old, config_file.flat(config.to_dict()))
        if changed:
            shown = "; ".join(f"{name}: {a!r} there, {b!r} here" for name, a, b in changed)
            raise UserError(
                f"workdir {folder} holds another run, which differs in {shown}; "
                "choose another with --workdir=DIR"
            )
    checksums.write_atomically(path, config_file.to_json(config))


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of all fields that matter and are not the same."""
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)
    ]
