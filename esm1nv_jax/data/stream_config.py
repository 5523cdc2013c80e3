"""What a stream is, and a place in it."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from esm1nv_jax.common.errors import UserError

SPECIALS = 2  # <s> and </s> around every sequence, cropped or not


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the next batch starts: row `row` of window `window` of epoch `epoch`, all from 0."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def __post_init__(self):
        if min(self.epoch, self.window, self.row) < 0:
            raise ValueError(f"a place is three numbers from 0, found {self}")


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What a stream is, beside its data set.

    rows: rows in a global batch, over all hosts. row_length: tokens in a row.
    max_residues: longer sequences are cropped to a window of so many residues.
    crop: where the window lies: 'prefix' as the original, or 'random', anew in every epoch.
    packed: several sequences in a row; else one.
    sample: 'all' examples in an epoch, or 'one_per_group', another member of each in every epoch.
    block: see `Order`; 1 unless reading at random is dear.
    """

    seed: int
    rows: int
    row_length: int
    max_residues: int
    crop: str = "prefix"
    packed: bool = True
    sample: str = "all"
    block: int = 1

    def __post_init__(self):
        for name in ("rows", "row_length", "max_residues", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if self.max_residues + SPECIALS > self.row_length:
            raise UserError(
                f"a row of {self.row_length} tokens holds {self.row_length - SPECIALS} residues"
                f" between <s> and </s>; max_residues is {self.max_residues}"
            )
        if self.crop not in ("prefix", "random"):
            raise UserError(f"crop must be 'prefix' or 'random', found {self.crop!r}")
        if self.sample not in ("all", "one_per_group"):
            raise UserError(f"sample must be 'all' or 'one_per_group', found {self.sample!r}")


def stream_config(config: ConfigDict, rows: int) -> StreamConfig:
    """The stream that the config of a run asks for, of `rows` rows a batch."""
    data = config.data
    return StreamConfig(
        seed=config.seed,
        rows=rows,
        row_length=data.row_length,
        max_residues=data.max_residues,
        crop=data.crop,
        packed=data.packed,
        sample=data.sample,
        block=data.block,
    )
