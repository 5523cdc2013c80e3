"""The folder of a run: held by one live run, and by one config for its life."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from esm1nv_jax import configuration
from esm1nv_jax.errors import UserError
from esm1nv_jax.training.settings import MAY_CHANGE

CONFIG, LOCK = "config.json", "run.lock"


@contextlib.contextmanager
def hold(workdir: str):
    """Makes the folder and holds it against any other live run; yields its path.

    On a local or shared file system the hold is a file lock, which a killed process cannot leave
    behind. Object stores (`gs://`) have none: there nothing stops two runs in one place.
    """
    folder = epath.Path(workdir)
    remote = "://" in str(workdir)
    if not remote:
        folder = epath.Path(os.path.abspath(os.path.expanduser(str(workdir))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if remote:
            yield folder
            return
        lock = open(folder / LOCK, "a+")  # noqa: SIM115, closed below
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"workdir {workdir} cannot be written ({reason}); choose another with --workdir=DIR"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"workdir {workdir} is in use by a live run ({lock.read().strip() or 'unknown'}); "
                "stop it, or choose another with --workdir=DIR"
            ) from None
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        lock.flush()
        yield folder


def settle(folder: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new run's folder, or checks it against the run that lives there.

    Raises UserError that names each field in which a run already there differs, unless it may.
    """
    path = folder / CONFIG
    if path.exists():
        try:
            old = configuration.flat(json.loads(path.read_text()))
        except ValueError:
            raise UserError(f"{path} is not readable as JSON; is {folder} a run?") from None
        changed = differing(old, configuration.flat(config.to_dict()))
        if changed:
            shown = "; ".join(f"{name}: {a!r} there, {b!r} here" for name, a, b in changed)
            raise UserError(
                f"workdir {folder} holds another run, which differs in {shown}; "
                "choose another with --workdir=DIR"
            )
    path.write_text(configuration.to_json(config))


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of all fields that matter and are not the same."""
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)
    ]
