"""A model in memory: its parameters, what its record says of its training, and what it can do."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from esm1nv_jax.checkpoints.model_folder import NO_LM_HEAD
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.packing import SPECIALS
from esm1nv_jax.inference.api_types import residue_ids
from esm1nv_jax.inference.device_model import DeviceModel, place
from esm1nv_jax.model import contact_head
from esm1nv_jax.model.encoder import ComputeConfig, EncoderConfig
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.masking import MaskingConfig, recipe

# Of operands of matrix products; what int8 leaves to XLA is fp32 (`onnx_blocks`).
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "float32"}
# Attention scores [heads, T, T] of the longest row, in fp32, and how often they are held at once:
# on a CPU, 3.05 GiB for scores of one.
SCORES_BYTES, COPIES = 1 << 30, 3


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Parameters, architecture and where they came from."""

    config: EncoderConfig
    params: dict  # jax arrays of the encoder; for `apply`
    provenance: dict[str, Any]
    precision: str = "fp32"
    max_residues: int | None = None  # read at once, instead of what `longest` would choose
    head: HeadConfig | None = None  # of a fine-tuned model
    head_params: dict | None = None
    contact_head_params: dict | None = None

    @property
    def longest(self) -> int:
        """Residues read at once: as many as the positions hold, training has used, and attention
        scores of a gigabyte allow."""
        room = self.config.positions - SPECIALS
        if self.max_residues is not None:
            return min(room, self.max_residues)
        affordable = math.isqrt(SCORES_BYTES // (4 * self.config.heads)) - SPECIALS
        return min(room, self._data.get("max_residues") or room, affordable)

    def check_fits(self, residues: int, name: str) -> None:
        """Raises UserError where a protein `name` of so many residues is read at once, because
        `max_residues` asks for it, and the machine has no memory for that. On accelerators it
        depends on the kernel; there the engine reports what does not fit."""
        if jax.local_devices()[0].platform != "cpu":
            return
        at_once = min(residues, self.longest)
        needed = COPIES * 4 * self.config.heads * (at_once + SPECIALS) ** 2
        available = command.machine_memory()
        if needed > available:
            enough = math.isqrt(available // (2 * COPIES * 4 * self.config.heads)) - SPECIALS
            raise UserError(
                f"{name} has {residues:,} residues: to read {at_once:,} at once takes "
                f"{needed / 2**30:,.0f} GiB and the machine has {available / 2**30:,.0f}; give "
                f"--max-residues {enough} or fewer, to read it in windows"
            )

    @property
    def prefixes_only(self) -> bool:
        """Whether training is known to have seen nothing but the beginnings of long proteins."""
        return self._data.get("crop") == "prefix"

    @property
    def _data(self) -> dict:
        """How sequences were cropped in training, where it is known."""
        return (self.provenance.get("config") or {}).get("data") or {}

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the names and values of the encoder's parameters."""
        return _digest(self.params)

    @functools.cached_property
    def head_digest(self) -> str:
        return _digest(self.head_params or {})

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(dtype=PRECISIONS[self.precision])

    @functools.cached_property
    def on_devices(self) -> DeviceModel:
        """The model on all devices of this host; on a CPU, on the first one."""
        devices = jax.local_devices()
        return self.to_devices(devices[:1] if devices[0].platform == "cpu" else devices)

    def to_devices(self, devices: Sequence[jax.Device]) -> DeviceModel:
        """The model on these devices, over which the rows of a batch are spread."""
        heads = {"head": self.head_params, contact_head.NAME: self.contact_head_params}
        heads = {name: params for name, params in heads.items() if params is not None}
        longest = self.longest + SPECIALS
        int8 = self.precision == "int8"
        return place(self.config, self.compute, self.params, heads, longest, devices, int8)

    @property
    def sees_wrong_residues_only(self) -> bool:
        """Whether in training a visible residue at a predicted position was always a wrong one, so
        that predictions at visible positions mean nothing."""
        trained = self.masking
        if trained is None:
            return False
        return trained.mask + trained.random >= 1 and not trained.may_repeat

    @property
    def masking(self) -> MaskingConfig | None:
        """How training corrupted its input, where it is known."""
        masking = (self.provenance.get("config") or {}).get("masking") or {}
        return recipe(masking["recipe"]) if "recipe" in masking else None

    def require_head(self) -> HeadConfig:
        """The head's config. Raises UserError where the model has none."""
        if self.head is None:
            raise UserError(
                "this model predicts no labels, for it was not fine-tuned on any; make one that "
                "does: esm1nv finetune --checkpoint MODEL --csv FILE --task TASK --out RUN"
            )
        return self.head

    def require_lm_head(self) -> None:
        """Raises UserError where the model came without a masked-LM head."""
        if self.provenance.items() >= NO_LM_HEAD.items():
            raise UserError(
                "this model came without a masked-LM head and predicts no residues; take the model "
                "that it was fine-tuned from"
            )

    def check_mode(self, mode: str, force: bool = False) -> None:
        """Raises UserError where a mode of scoring means nothing for this model."""
        self.require_lm_head()
        instead = {"wt-marginals": "masked-marginals", "one-pass": "pseudo-perplexity"}
        if mode in instead and self.sees_wrong_residues_only and not force:
            raise UserError(
                f"{mode}: this model was trained without unchanged targets, so what it predicts at "
                f"visible residues means nothing; take {instead[mode]} (or force it)"
            )

    def read_whole(self, sequence: str | bytes, name: str = "the sequence") -> np.ndarray:
        """Token ids of the residues. Raises UserError where they are more than `longest`."""
        ids = residue_ids(sequence, name)
        if len(ids) > self.longest:
            raise UserError(
                f"{name} has {len(ids):,} residues, and the model reads {self.longest:,} at once; "
                "cut it into domains"
            )
        return ids


def _digest(params: dict) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()
