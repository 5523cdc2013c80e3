"""A model on the devices of this host: its parameters, and how batches of rows are spread."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from esm1nv_jax.inference import onnx_blocks
from esm1nv_jax.inference.onnx_blocks import RunBlocks
from esm1nv_jax.inference.row_shapes import RowShapes
from esm1nv_jax.model import encoder
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels.matmul import multiplies_bf16

# Tokens in a batch on one device: enough to keep its matrix units full.
TOKENS_CPU, TOKENS_ACCELERATOR = 2_048, 32_768
# Parameters times tokens that a CPU computes while it compiles the programs of a shape: of ESM-1nv
# 465 tokens, 0.7 CPU-seconds of an AMD EPYC (Zen 3).
COMPILE_WORK = 2e10


@dataclasses.dataclass(frozen=True)
class DeviceModel:
    """A model on devices: replicated parameters, those of a head under "head", and how rows are
    spread over the devices."""

    config: EncoderConfig
    compute: ComputeConfig
    params: dict
    row_sharding: jax.sharding.Sharding
    shapes: RowShapes
    platform: str  # of the devices: cpu, gpu or tpu
    run_blocks: RunBlocks | None = None  # instead of `params["blocks"]`, which are not there then


def place(
    config: EncoderConfig,
    compute: ComputeConfig,
    params: dict,
    heads: dict,
    longest: int,
    devices: Sequence[jax.Device],
    int8: bool = False,
) -> DeviceModel:
    """The model on `devices`, with shapes for rows of up to `longest` tokens.

    `heads` are parameters that stay fp32 whatever `compute` says. With `int8` ONNX Runtime computes
    the blocks.
    """
    mesh = jax.make_mesh((len(devices),), ("rows",), (jax.sharding.AxisType.Auto,), devices=devices)
    platform = devices[0].platform
    compute = dataclasses.replace(compute, emulate_bfloat16=not multiplies_bf16(platform))
    if compute.dtype == "bfloat16":
        params = _kernels_in_bf16(params)
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if platform == "cpu":
        tokens, compile_tokens = TOKENS_CPU, COMPILE_WORK / encoder.parameter_count(config)
    else:  # programs take longer to compile and batches less to compute
        tokens, compile_tokens = TOKENS_ACCELERATOR, math.inf
    shapes = RowShapes.up_to(longest, tokens, len(devices), compile_tokens)
    run_blocks = None
    if int8:
        run_blocks = onnx_blocks.compile_blocks(config, params["blocks"])
        params = {name: value for name, value in params.items() if name != "blocks"}
    params = jax.device_put(params | heads, replicated)
    return DeviceModel(config, compute, params, sharded, shapes, platform, run_blocks)


def _kernels_in_bf16(params: dict) -> dict:
    """Kernels in bf16 once, instead of at every batch; everything else stays as it is."""

    def cast(path, leaf):
        return leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
