"""How every verb reads its arguments and answers a mistake: one line, exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError


class Parser(argparse.ArgumentParser):
    """`argparse` with an example in `--help`, one-line errors and no abbreviated options."""

    def __init__(self, verb: str, description: str, example: str):
        super().__init__(
            prog=f"esm1nv {verb}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(verb: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Calls a verb's `main`; a user's mistake becomes one line on stderr and status 2."""
    try:
        return verb(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 0
