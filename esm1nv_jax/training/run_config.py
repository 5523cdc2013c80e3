"""The configuration of a run: frozen, validated, and built once from a config file.

It has the groups and fields of the config file, so that `config.optimizer.peak_lr` here is
`--config.optimizer.peak_lr` on the command line; only `RunConfig.from_config_dict` knows
`ml_collections`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from esm1nv_jax.checkpoints.manager import CheckpointConfig
from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError, check_choices
from esm1nv_jax.data.packing import rows_for, stream_config
from esm1nv_jax.model import attention
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels import token_backend
from esm1nv_jax.model.kernels.matmul import multiplies_bf16
from esm1nv_jax.model.masking import MaskingConfig, recipe
from esm1nv_jax.training.objective import MaskedLM, Objective
from esm1nv_jax.training.optimizer import OptimizerConfig, resolve_shares
from esm1nv_jax.training.step import StepConfig
from esm1nv_jax.training.tuning import FinetuneConfig, Tuning

REDUCE_DTYPES = ("float32", "bfloat16")

MINIMUM = {  # that a field may be
    "steps": 1,
    "data.workers": 0,
    "batch.rows": 0,
    "batch.sequences_per_device": 1,
    "batch.microbatches": 1,
    "evaluation.every": 1,
    "evaluation.sequences": 0,
    "skip_nonfinite": 0,
    "cluster.start_timeout": 1,
    "cluster.stall_timeout": 1,
    "log.every": 1,
}

MAXIMUM = {"steps": 2**31 - 1, "optimizer.horizon": 2**31 - 1, "data.workers": 1000}  # int32 steps

# Fields that the arrays of a run's state follow from, so that no other run takes it over.
OF_STATE = ("model.", "finetune.", "optimizer.kind")
# Fields that change neither what a run learns nor the questions that validation asks: they may
# differ between the starts of one run, and between runs that `compare` takes for one recipe. The
# data set is identified by its content, not by its path.
IRRELEVANT_TO_LEARNING = (
    "steps",
    "minutes",
    "platform",
    "profile",
    "log.",
    "cluster.",
    "checkpoint.",
    "evaluation.every",
    "compute.remat",
    "compute.attention",
    "batch.microbatches",
    "data.path",
    "data.workers",
    "finetune.patience",
    "finetune.test",
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str
    max_residues: int
    crop: str
    row_length: int
    packed: bool
    sample: str
    block: int
    workers: int


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    rows: int
    sequences_per_device: int
    microbatches: int


@dataclasses.dataclass(frozen=True)
class MaskingChoice:
    """A named masking recipe, and the share of residues that are predicted; a `final_rate` that is
    not 0 is reached, linearly, at the end of the optimizer's horizon."""

    recipe: str
    rate: float
    final_rate: float = 0.0

    def config(self) -> MaskingConfig:
        return recipe(self.recipe, self.rate, self.final_rate)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """How the step is computed; the fields of the config's group `compute`."""

    dtype: str
    attention: str
    remat: str
    reduce_dtype: str
    deterministic: bool
    residual_dtype: str = "float32"

    def __post_init__(self):
        check_choices("compute", self, reduce_dtype=REDUCE_DTYPES)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Timeouts in seconds."""

    start_timeout: float
    stall_timeout: float


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run is made of, beside its folder and the devices it finds."""

    seed: int
    steps: int
    minutes: float
    platform: str
    init_from: str
    fork_from: str
    data: DataConfig
    batch: BatchConfig
    masking: MaskingChoice
    model: EncoderConfig
    compute: PrecisionConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    skip_nonfinite: int
    cluster: ClusterConfig
    log: LogConfig
    profile: str
    finetune: FinetuneConfig | None = None  # of pretraining there is no such group

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> RunConfig:
        """Validate a config file's values and freeze them.

        Raises UserError that names the field, the value found and what is allowed.
        """
        for name, value in config_file.flat(config).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name}={value} is not a finite number")
            if name in MINIMUM and value < MINIMUM[name]:
                raise UserError(f"{name}={value} must be at least {MINIMUM[name]}")
            if name in MAXIMUM and value > MAXIMUM[name]:
                raise UserError(f"{name}={value} must be at most {MAXIMUM[name]}")
        nested = config.to_dict()
        if "optimizer" in nested and "steps" in nested:
            nested["optimizer"] = resolve_shares(nested["optimizer"], nested["steps"])
        return _build(cls, nested, "")

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed={self.seed} must lie in 0..2**63 - 1")
        if not self.minutes >= 0:
            raise UserError(f"minutes={self.minutes} must be at least 0; 0 is no limit")
        if self.init_from and self.fork_from:
            raise UserError("init_from and fork_from exclude each other; take one")
        if self.finetune and self.fork_from:
            raise UserError("fork_from is for pretraining; a fine-tuned run begins by init_from")
        if self.finetune:
            self.finetune.tuning.check(self.model)
        if self.finetune and not self.init_from and self.finetune.method != "full":
            raise UserError(
                f"finetune.method={self.finetune.method} needs a model; set init_from, or train "
                "from scratch by method=full"
            )
        if self.data.max_residues + 2 > self.model.positions:
            raise UserError(
                f"data.max_residues={self.data.max_residues} needs {self.data.max_residues + 2} "
                f"positions with <s> and </s>, model.positions={self.model.positions}; "
                f"set data.max_residues to at most {self.model.positions - 2}"
            )
        _ = self.profile_steps  # raises UserError
        self.masking.config()  # raises UserError
        ComputeConfig(  # raises UserError
            dtype=self.compute.dtype,
            remat=self.compute.remat,
            residual_dtype=self.compute.residual_dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested dictionaries of JSON values."""
        values = dataclasses.asdict(self)
        if self.finetune is None:
            del values["finetune"]
        return json.loads(json.dumps(values))

    def flat(self) -> dict[str, Any]:
        """Return every field under its dotted name."""
        return config_file.flat(self.to_dict())

    @property
    def profile_steps(self) -> tuple[int, int]:
        """The first and the last step to trace; (0, 0) for none. Raises UserError for no range."""
        if not self.profile:
            return 0, 0
        match = re.fullmatch(r"(\d+)-(\d+)", self.profile)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(
                f"profile={self.profile!r} names no steps; give the first and the last, such as "
                "--config.profile=20-24"
            )
        return first, last

    def step_config(
        self, device: jax.Device, objective: Objective | None = None, tuning: Tuning | None = None
    ) -> StepConfig:
        """Return what the training step is made of on this kind of device.

        By default the objective is masked language modelling, and all parameters are trained.

        Raises UserError where the attention backend that the config names does not run there.
        """
        spec = attention.AttentionSpec(
            platform=device.platform,
            capability=float(getattr(device, "compute_capability", 0)),
            dtype=self.compute.dtype,
            packed=self.data.packed,
            rate=self.model.attention_dropout,
            head_size=self.model.width // self.model.heads,
            row_length=self.data.row_length,
        )
        compute = ComputeConfig(
            dtype=self.compute.dtype,
            remat=self.compute.remat,
            residual_dtype=self.compute.residual_dtype,
            attention=attention.select_backend(self.compute.attention, spec),
            # A CPU computes faster in fp32 what an accelerator is too slow to read and write in it.
            activation_dtype="float32" if device.platform == "cpu" else self.compute.dtype,
            emulate_bfloat16=not multiplies_bf16(device.platform),
            token_kernels=token_backend(spec.platform, spec.capability),
            chip=device.device_kind if device.platform != "cpu" else "",
        )
        return StepConfig(
            seed=self.seed,
            model=self.model,
            compute=compute,
            objective=objective or MaskedLM(self.masking.config(), self.optimizer.horizon),
            optimizer=self.optimizer,
            microbatches=self.batch.microbatches,
            reduce_dtype=self.compute.reduce_dtype,
            deterministic=self.compute.deterministic,
            nonfinite_allowed=self.skip_nonfinite,
            tuning=tuning,
        )

    def global_rows(self, lengths: np.ndarray, num_devices: int) -> int:
        """Return the rows of a global batch: as given, or from the sequences per device."""
        rows = self.batch.rows
        if not rows:
            one_row = stream_config(self, rows=1)  # for the layout of a row
            batch = self.batch
            rows = rows_for(lengths, batch.sequences_per_device, one_row, batch.microbatches)
            rows *= num_devices
        multiple = num_devices * self.batch.microbatches
        if rows % multiple:
            raise UserError(
                f"batch.rows={rows} is not a multiple of {num_devices} devices x "
                f"{self.batch.microbatches} microbatches; take {rows + -rows % multiple}"
            )
        return rows


def flat_with_defaults(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recorded config under their dotted names, those that an older version
    did not have with the values that it meant."""
    fields = config_file.flat(nested)
    defaults = {
        f"{group}.{field.name}": field.default
        for group, kind in (
            ("compute", PrecisionConfig),
            ("masking", MaskingChoice),
            ("model", EncoderConfig),
            ("optimizer", OptimizerConfig),
        )
        for field in dataclasses.fields(kind)
        if group in nested and field.default is not dataclasses.MISSING
    }
    return defaults | fields


def changes_learning(field: str) -> bool:
    """Return whether a dotted field changes what a run learns or is asked in validation."""
    return not field.startswith(IRRELEVANT_TO_LEARNING)


def _build(kind: type, values: Mapping[str, Any], prefix: str):
    """Build a frozen dataclass, and those inside it, from nested dictionaries of its fields."""
    fields = {
        name: next(iter(typing.get_args(hint)), hint)  # of `X | None`, X
        for name, hint in typing.get_type_hints(kind).items()
    }
    optional = {f.name for f in dataclasses.fields(kind) if f.default is None}
    for name in values:
        if name not in fields:
            group = f"config.{prefix[:-1]}" if prefix else "config"
            raise UserError(
                f"config has no field config.{prefix}{name}; {group} has {', '.join(fields)}"
            )
    for name in fields:
        if name not in values and name not in optional:
            raise UserError(
                f"config has no field config.{prefix}{name}; build it on "
                "configs/pretrain_small.py by esm1nv_jax.common.config_file.parent, which has "
                "them all"
            )
    return kind(
        **{
            name: _build(fields[name], value, f"{prefix}{name}.")
            if dataclasses.is_dataclass(fields[name])
            else value
            for name, value in values.items()
        }
    )
