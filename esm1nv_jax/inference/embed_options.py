"""What is asked of `esm1nv embed`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import formats

KINDS = ("mean", "per_residue", "cls", "logits")
PRECISIONS = ("fp32", "bf16")
DTYPES = ("float32", "float16")
LONG = ("window", "truncate", "error")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be embedded and how. `shard` is (i, n): the i-th of n jobs, from 1."""

    checkpoint: str
    fasta: str
    out: str
    include: tuple[str, ...] = ("mean",)
    layers: tuple[int, ...] = (-1,)
    precision: str = "fp32"
    dtype: str = "float32"
    long: str = "window"
    deterministic: bool = False
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    on_error: str = "stop"

    def __post_init__(self):
        formats.choose(Path(self.out))
        for name, found, allowed in (
            ("include", self.include, KINDS),
            ("precision", (self.precision,), PRECISIONS),
            ("dtype", (self.dtype,), DTYPES),
            ("long", (self.long,), LONG),
            ("on_error", (self.on_error,), ("stop", "skip")),
        ):
            unknown = [value for value in found if value not in allowed]
            if unknown or not found:
                shown = unknown[0] if unknown else ""
                raise UserError(f"--{name}={shown} is unknown; there are {', '.join(allowed)}")
        for name in ("include", "layers"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"--{name} names one twice: {getattr(self, name)}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            i, n = self.shard
            raise UserError(f"--shard={i}/{n} is not i/n with i from 1 to n, such as 1/4")
