"""Reads configs of other tools, whose fields may be missing, of another type, or unknown here."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from typing import Any

from esm1nv_jax.common.errors import UserError

LARGEST = {int: 2**30, float: 2**63}  # what JAX and NumPy can compute with; a file may say more


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of another tool's config, each checked as it is read.

    values: by name. source: where they stand, for messages.
    """

    values: dict[str, Any]
    source: str

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The field as `kind`; absent or null where `default` is None is an error."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, int) and abs(value) > LARGEST.get(kind, math.inf):
            raise UserError(f"{self.source}: {name} is {shown(value)}, which no model has")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "missing" if value is None else shown(value)
            raise UserError(f"{self.source}: {name} is {found}; it must be of type {kind.__name__}")
        return value

    def choice(self, name: str, allowed: tuple, default: Any, why: str) -> Any:
        """The field, which must be one of `allowed`."""
        value = self.values.get(name, default)
        value = default if value is None else value
        if value not in allowed:
            raise UserError(
                f"{self.source}: {name}={shown(value)} is not supported here ({why}); there are "
                f"{', '.join(map(repr, allowed))}"
            )
        return value


def shown(value: Any) -> str:
    """A value as messages show it: short, for a file may nest a list in itself a billion times."""
    if isinstance(value, int) and abs(value) > 2**63:
        return "beyond 2**63"
    return repr(value) if isinstance(value, (str, int, float)) else reprlib.repr(value)
