"""What every command does around its work: options, exit status, and what is set up before jax."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import NoReturn

from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
KEEP = "ESM1NV_KEEP_FREED_MEMORY"  # in the environment: 0, never; 1, whatever the size
THREADS = 64  # a small training run on two cores takes 36
KEPT_SHARE = 0.2  # of the memory of the machine, that a program may work in
# Device files of GPUs (/dev/dxg: under Windows) and TPUs.
_ACCELERATORS = "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*"
_CUDA = "jax_cuda12_plugin jax_cuda13_plugin jax_plugins.xla_cuda12 jax_plugins.xla_cuda13".split()


class Parser(argparse.ArgumentParser):
    """`argparse` with an example in `--help`, one-line errors and no abbreviated options.

    Options are documented with hyphens; `--all_singles` is read as `--all-singles`. A value may
    begin with a negative number: `--layers -1,6`.
    """

    def __init__(self, verb: str, description: str, example: str):
        super().__init__(
            prog=f"esm1nv {verb}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-\d[\d.,eE+-]*$")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        args = sys.argv[1:] if args is None else args
        hyphens = {name.replace("_", "-"): name for name in self._option_string_actions}

        def registered(argument: str) -> str:
            name, equals, value = argument.partition("=")
            known = hyphens.get(name.replace("_", "-")) if name.startswith("--") else None
            return known + equals + value if known else argument

        end = list(args).index("--") if "--" in args else len(args)
        return super().parse_known_args([*map(registered, args[:end]), *args[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n". Raises UserError for another text."""
    if text is None:
        return None
    numbers = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if numbers is None:
        raise UserError(f"--shard={text} is not i/n, such as 1/4")
    return int(numbers[1]), int(numbers[2])


def parse_integers(name: str, words: list[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, words))
    except ValueError:
        raise UserError(f"--{name}={','.join(words)} is not a list of integers") from None


def run(verb: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Calls a verb's `main`; a user's mistake becomes one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the locale cannot show is escaped, never fatal
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_names(argv)
        return verb(argv) or 0
    except UserError as error:
        from esm1nv_jax.common.console import console  # rich: `--help` does without

        console.print("error: " + str(error).replace("\n", " "))
        return EXIT_USER
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 0


def _check_names(argv: list[str]) -> None:
    """Raises UserError for a name that Orbax, TensorStore, HDF5 and Matplotlib cannot take."""
    try:
        names = [*argv, os.getcwd()]
    except FileNotFoundError:
        raise UserError("the current folder was deleted; go to another one") from None
    for name in names:
        try:
            os.fsencode(name).decode()
        except UnicodeDecodeError:
            raise UserError(
                f"{name!a} is not UTF-8; rename that file or folder, or name it by a link"
            ) from None


def set_up() -> None:
    """For a command that computes. Call it before jax is imported and before threads are there."""
    if sys.stderr.isatty() and not {"-h", "--help"} & set(sys.argv):
        print("starting JAX", file=sys.stderr)  # which takes seconds
    hide_unusable_plugins()
    keep_compiled_programs()
    keep_freed_memory()
    check_machine()


def check_machine(cpu_info: str = "/proc/cpuinfo") -> None:
    """Raises UserError where XLA would abort: it has no message for what it does not get."""
    if sys.platform.startswith("linux") and not has_accelerator() and not os.path.exists(cpu_info):
        raise UserError(
            f"there is no {cpu_info}, from which JAX learns what the CPU can do: mount /proc"
        )
    enough = threading.Event()
    threads = [threading.Thread(target=enough.wait, daemon=True) for _ in range(THREADS)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise UserError(
            f"cannot start the {THREADS} threads that JAX takes; raise the limits on processes and "
            "memory (ulimit -u, ulimit -v)"
        ) from None
    finally:
        enough.set()
        for thread in started:
            thread.join()


def has_accelerator() -> bool:
    return any(map(glob, _ACCELERATORS))


def hide_unusable_plugins() -> None:
    """Keeps JAX from loading its CUDA plug-in where there is no GPU.

    The extra `plan` installs it without CUDA's libraries, and JAX would print a traceback.
    """
    if not sys.platform.startswith("linux") or has_accelerator() or "jax" in sys.modules:
        return
    for name in _CUDA:
        sys.modules[name] = None  # type: ignore[assignment]  # such an import fails

    def other(record: logging.LogRecord) -> bool:
        return "jax_plugins.xla_cuda" not in record.getMessage()

    logging.getLogger("jax._src.xla_bridge").addFilter(other)


def cache_folder() -> Path | None:
    """This package's folder in the user's cache; None where there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esm1nv_jax"
    except RuntimeError:  # no HOME, and the user is in no list: a container
        return None


def keep_compiled_programs() -> None:
    """Lets a second start find the first one's programs in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    Where there is no home folder nothing is kept.
    """
    cache = cache_folder()
    if cache is None:
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / f"programs-{_processor()}"))
    # Seconds. Below this a program is compiled about as fast as it is found.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """Names the kind of CPU that programs are compiled for: hosts that share a home may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return "any"
    kind = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, where no accelerator is.

    XLA's CPU backend frees the gigabyte that a step works in and asks for it again. By default each
    of its pages goes back to the kernel and comes again, cleared, by a page fault. Does nothing
    without glibc, or with ESM1NV_KEEP_FREED_MEMORY=0.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or has_accelerator() or os.environ.get(KEEP) == "0":
        return
    libc.mallopt(_ARENA_MAX, 1)  # memory that one thread has freed serves the others
    libc.mallopt(_MMAP_MAX, 0)  # large blocks are kept like small ones
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never give back
    libc.mallopt(_TOP_PAD, 64 << 20)


def keeps(working_bytes: float) -> bool:
    """Whether freed memory is kept while a program runs that works in so many bytes.

    Blocks of many sizes leave gaps, so that a process which keeps them comes to hold three times
    the bytes that a step works in, and no more (docs/performance.md).
    """
    wish = os.environ.get(KEEP)
    fits = working_bytes <= KEPT_SHARE * machine_memory()
    return not has_accelerator() and wish != "0" and (wish == "1" or fits)


def machine_memory(groups: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> int:
    """Return the bytes of memory that this process may take: those of the machine, or what Linux
    allows to one of the groups that it runs in, as a container or a job of Slurm."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # not Linux
        for line in Path(groups).read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):  # of cgroups in version 2, or in version 1
                continue
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            innermost = Path(mount, controllers, group.lstrip("/"))
            for folder in (innermost, *innermost.parents):
                with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                    sizes.append(int((folder / name).read_text(encoding="utf-8")))
    return min(sizes)


def usable_cores() -> int:
    """Cores of the CPU that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def return_freed_memory() -> None:
    """Undoes `keep_freed_memory`: freed blocks of 32 MiB and more go back to the kernel."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 1 << 16)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
