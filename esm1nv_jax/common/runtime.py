"""What a command that computes sets up before jax is imported: compiled programs and freed memory
are kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
from glob import glob
from pathlib import Path

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def set_up() -> None:
    """Call it before jax is imported and before threads are there."""
    keep_compiled_programs()
    keep_freed_memory()


def keep_compiled_programs() -> None:
    """A second start finds the first one's programs in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(cache / "esm1nv_jax" / f"programs-{_processor()}")
    )
    # Seconds. Below this a program is compiled about as fast as it is found.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """A name for what programs for this CPU may contain: hosts that share a home may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return "any"
    kind = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, where no accelerator is.

    XLA's CPU backend frees the gigabyte that an update works in and asks for it again. By default
    each of its pages goes back to the kernel and comes again, cleared, by a page fault. Elsewhere
    than in glibc it does nothing.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(map(glob, _ACCELERATORS)):
        return
    libc.mallopt(_ARENA_MAX, 1)  # memory that one thread has freed serves the others
    libc.mallopt(_MMAP_MAX, 0)  # large blocks are kept like small ones
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never give back
    libc.mallopt(_TOP_PAD, 64 << 20)
