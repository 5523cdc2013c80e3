"""The command line of every verb: its options, and a mistake as one line with exit status 2."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError


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


def run(verb: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Calls a verb's `main`; a user's mistake becomes one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the locale cannot show is escaped, never fatal
            stream.reconfigure(errors="backslashreplace")
    try:
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
