"""How the processes of a run start, and how they end together."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from esm1nv_jax.checkpoints.manager import SaveError
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError
from esm1nv_jax.training.launcher import initialize_arguments
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.watchdog import Watchdog, abort_message

LOST_AFTER = 18  # seconds without a heartbeat, then a process counts as lost
# Seconds; then JAX itself aborts, should the watchdog fail to act. It counts from a heartbeat that
# was sent up to half of this before a peer fell silent: half must be well above LOST_AFTER.
JAX_HEARTBEAT_TIMEOUT = 60
# Faults of the environment, whose message is complete without a traceback.
ENVIRONMENT_ERRORS = (TimeoutError, SaveError)


@contextlib.contextmanager
def join(start_timeout: float, stall_timeout: float) -> Iterator[tuple[ProcessGroup, Watchdog]]:
    """Start JAX on the cluster, if there is one, and watch the process while the body runs.

    An exception that leaves the body ends the whole run: with several processes this one publishes
    the reason and exits at once, since an orderly shutdown would wait for those that are gone.
    """
    arguments = initialize_arguments()
    if arguments is not None:
        _initialize(arguments, start_timeout)
    group = ProcessGroup(start_timeout)
    with Watchdog(group, max(start_timeout, stall_timeout), LOST_AFTER) as watchdog:
        try:
            yield group, watchdog
        except BaseException as error:
            if group.size > 1:
                _exit_group(group, error)
            if isinstance(error, ENVIRONMENT_ERRORS):
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            raise


def _initialize(arguments: dict[str, Any], start_timeout: float) -> None:
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(start_timeout),
            heartbeat_timeout_seconds=JAX_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=600,  # the others wait while process 0 summarises the run
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        print(
            f"the processes did not find each other in {start_timeout:.0f} s: "
            f"{str(error).splitlines()[0]}; look for one that did not start, and see "
            "docs/clusters.md",
            file=sys.stderr,
        )
        os._exit(1)


def _exit_group(group: ProcessGroup, error: BaseException) -> None:
    """End this process of several because of `error`, telling the others why."""
    status, reason = 1, f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        status, reason = EXIT_USER, str(error)
    elif isinstance(error, KeyboardInterrupt):
        status, reason = EXIT_INTERRUPTED, "Ctrl-C"
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    abort = group.abort_record()
    if abort is not None and abort["process"] != group.index:
        print(abort_message(abort), file=sys.stderr, flush=True)
        os._exit(abort["status"])
    if isinstance(error, (UserError, *ENVIRONMENT_ERRORS)):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    # An exception of a collective only says that a peer is gone, so that the cause is elsewhere.
    if any(word in str(error) for word in ("Gloo", "gloo", "NCCL", "coordination service")):
        print(
            f"process {group.index} on {group.host} lost its connection to a peer; the launcher "
            "names the one that died. Started again, the run resumes from its newest checkpoint",
            file=sys.stderr,
        )
    else:
        group.abort_all(status, reason)
    sys.stderr.flush()
    os._exit(status)
