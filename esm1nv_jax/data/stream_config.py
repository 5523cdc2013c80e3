"""What an input stream is, beside its data set."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from esm1nv_jax.common.errors import UserError

SPECIALS = 2  # <s> and </s> around every sequence, cropped or not


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What an input stream is, beside its data set.

    rows: rows in a global batch, over all processes. row_length: tokens in a row.
    max_residues: longer sequences are cropped to so many residues.
    crop: 'prefix' keeps the first residues; 'random' keeps a window drawn anew in every epoch.
    packed: several sequences in a row; otherwise one.
    sample: 'all' examples in an epoch, or 'one_per_group', one member of each cluster.
    block: consecutive records that stay together in the shuffle (see `packing.EpochOrder`).
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
    """The stream that a run's config describes, with `rows` rows in a global batch."""
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


def evaluation_stream(config: StreamConfig) -> StreamConfig:
    """The stream that a run validates on: of a fixed seed, and prefixes of long sequences.

    So runs of any seed and crop, and `esm1nv evaluate`, are asked for the same residues.
    """
    return dataclasses.replace(config, seed=0, crop="prefix")


def rows_for(lengths: np.ndarray, sequences: int, config: StreamConfig) -> int:
    """The number of rows that hold about `sequences` sequences.

    Packed, it is round(sequences x mean tokens / row length); otherwise one row a sequence.
    `lengths` are those of the data set in residues, uncropped: [examples].
    """
    if not config.packed:
        return sequences
    mean = float(np.minimum(lengths, config.max_residues).mean()) + SPECIALS
    return max(1, round(sequences * mean / config.row_length))
