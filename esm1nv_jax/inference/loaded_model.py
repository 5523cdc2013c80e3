"""A model in memory and on devices: its parameters, what its record says of its training, what it
can do, and how batches of rows are spread over devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.checkpoints.model_folder import NO_LM_HEAD
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.packing import SPECIALS
from esm1nv_jax.inference.api_types import residue_ids
from esm1nv_jax.inference.block_graph import RunBlocks
from esm1nv_jax.inference.cpu_engines import PRECISIONS, blocks_by
from esm1nv_jax.inference.row_shapes import RowShapes
from esm1nv_jax.model import contact_head, encoder
from esm1nv_jax.model.encoder import ComputeConfig, EncoderConfig
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.kernels.matmul import multiplies_bf16
from esm1nv_jax.model.masking import MaskingConfig, recipe

# Modes of scoring that read visible residues, and those to take where these mean nothing.
INSTEAD = {"wt-marginals": "masked-marginals", "one-pass": "pseudo-perplexity"}
# Attention scores [heads, T, T] of the longest row, in fp32, and how often they are held at once:
# on a CPU, 3.05 GiB for scores of one.
SCORES_BYTES, COPIES = 1 << 30, 3
# Tokens in a batch on one device: enough to keep its matrix units full.
TOKENS_CPU, TOKENS_ACCELERATOR = 2_048, 32_768
# Parameters times tokens that a CPU computes while it compiles the programs of a shape: of ESM-1nv
# 465 tokens, 0.7 CPU-seconds of an AMD EPYC (Zen 3).
COMPILE_WORK = 2e10


@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """A model on devices: replicated parameters, those of heads under "head" and "contact_head",
    and how rows are spread over the devices."""

    config: EncoderConfig
    compute: ComputeConfig
    params: dict
    row_sharding: jax.sharding.Sharding
    shapes: RowShapes
    platform: str  # of the devices: cpu, gpu or tpu
    run_blocks: RunBlocks | None = None  # instead of `params["blocks"]`


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """Parameters, architecture and where they came from."""

    config: EncoderConfig
    # jax arrays of the encoder; for `apply`
    params: dict = dataclasses.field(repr=False)
    provenance: dict[str, Any] = dataclasses.field(repr=False)
    precision: str = "fp32"
    max_residues: int | None = None  # read at once, instead of what `longest` would choose
    head: HeadConfig | None = None  # of a fine-tuned model
    head_params: dict | None = dataclasses.field(default=None, repr=False)
    contact_head_params: dict | None = dataclasses.field(default=None, repr=False)
    engine: str = "xla"  # of the blocks, one of `cpu_engines.NAMES`

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made on devices, which each process makes for itself."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

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
        needed = attention_bytes(self.config, at_once + SPECIALS)
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
        """A hash of what the encoder computes: its parameters by name, and its architecture, for a
        converted model may have another activation around the same ones."""
        own, default = (
            vars(dataclasses.replace(config, dropout=0.0, attention_dropout=0.0))
            for config in (self.config, EncoderConfig())
        )
        return _digest(self.params, sorted(own.items() - default.items()))

    @functools.cached_property
    def head_digest(self) -> str:
        return _digest(self.head_params or {})

    @property
    def arithmetic(self) -> str:
        """What decides the numbers but for rounding in fp32, in which engines and CPUs differ."""
        own_way = self.engine == "openvino" and self.precision != "fp32"
        return self.precision + ", by OpenVINO" * own_way

    @functools.cached_property
    def with_attention_weights(self) -> Self:
        """The same model by XLA, which alone gives attention weights; int8 has none."""
        able = self.engine == "xla" or self.precision == "int8"
        return self if able else dataclasses.replace(self, engine="xla")

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(dtype=PRECISIONS[self.precision])

    @functools.cached_property
    def on_devices(self) -> DeviceModel:
        """The model on all devices of this host; on a CPU, on the first one."""
        devices = jax.local_devices()
        return self.to_devices(devices[:1] if devices[0].platform == "cpu" else devices)

    def to_devices(self, devices: Sequence[jax.Device]) -> DeviceModel:
        """The model on these devices, with shapes for rows of up to `longest` residues."""
        platform, axis_type = devices[0].platform, jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((len(devices),), ("rows",), (axis_type,), devices=devices)
        by_row, replicated = (
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
            for axes in (["rows"], [])
        )
        if platform == "cpu":
            tokens, compile_tokens = TOKENS_CPU, COMPILE_WORK / encoder.parameter_count(self.config)
        else:  # programs take longer to compile and batches less to compute
            tokens, compile_tokens = TOKENS_ACCELERATOR, math.inf
        shapes = RowShapes.up_to(self.longest + SPECIALS, tokens, len(devices), compile_tokens)
        emulate = not multiplies_bf16(platform)
        compute = dataclasses.replace(self.compute, emulate_bfloat16=emulate)
        params, run_blocks = self.params, None
        if self.engine != "xla":
            blocks = params["blocks"]
            run_blocks = blocks_by(self.engine, self.precision, self.config, blocks)
            params = {name: value for name, value in params.items() if name != "blocks"}
        if self.precision == "bf16":
            params = _kernels_in_bf16(params)
        heads = {"head": self.head_params, contact_head.NAME: self.contact_head_params}
        params = params | {name: of_head for name, of_head in heads.items() if of_head is not None}
        params = jax.device_put(params, replicated)
        return DeviceModel(self.config, compute, params, by_row, shapes, platform, run_blocks)

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
        instead, trained = INSTEAD.get(mode), self.masking
        if instead is None or trained is None or force:
            return
        # A visible residue at a predicted position was always a wrong one.
        if trained.mask + trained.random >= 1 and not trained.may_repeat:
            raise UserError(
                f"{mode}: this model was trained without unchanged targets, so what it predicts at "
                f"visible residues means nothing; take {instead} (or force it)"
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


def attention_bytes(config: EncoderConfig, tokens: int) -> int:
    """What the attention scores of a row take on a CPU."""
    return COPIES * 4 * config.heads * tokens**2


def _kernels_in_bf16(params: dict) -> dict:
    """Kernels in bf16 once, instead of at every batch; everything else stays as it is."""

    def cast(path, leaf):
        return leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _digest(params: dict, facts: Sequence[tuple[str, Any]] = ()) -> str:
    total = hashlib.blake2b(repr(facts).encode() if facts else b"", digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()
