"""Which engine computes the blocks: XLA, or on a CPU one that is faster in a precision."""

from __future__ import annotations

import argparse
import importlib.util

import jax

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.block_graph import Graph, RunBlocks, compile_blocks
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.matmul import multiplies_bf16

# Of operands of matrix products; what int8 leaves to XLA is fp32 (`onnx_blocks`).
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "float32"}
CHOICES = {"precision": tuple(PRECISIONS), "engine": ("auto", "xla", "openvino")}
NAMES = {"xla": "XLA", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
EXTRAS = {"onnxruntime": "int8", "openvino": "openvino"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `select_engine` reads."""
    kinds = "of matrix products (default fp32)"
    by = "of bf16 and fp32 on a CPU (default auto: OpenVINO for bf16, where it is installed)"
    for name, default, words in (("precision", "fp32", kinds), ("engine", "auto", by)):

        def known(value: str, name: str = name) -> str:
            try:
                check_names(**{name: value})
            except UserError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
            return value

        shown = f"{{{','.join(CHOICES[name])}}}"
        parser.add_argument(f"--{name}", type=known, default=default, metavar=shown, help=words)


def check_names(precision: str = "fp32", engine: str = "auto") -> None:
    """Raises UserError where one of them is unknown."""
    for option, value in (("precision", precision), ("engine", engine)):
        if value not in CHOICES[option]:
            known = ", ".join(CHOICES[option])
            raise UserError(f"{option} {value!r} is unknown; there are {known}")


def select_engine(engine: str, precision: str, config: EncoderConfig) -> str:
    """The engine for one of CHOICES: a key of NAMES. auto is OpenVINO for bf16, where it can be had
    and the CPU multiplies bf16; ONNX Runtime for int8; else XLA.

    Raises UserError for what cannot be had here.
    """
    if precision == "int8":
        if engine != "auto":
            raise UserError(
                f"--precision int8 is computed by ONNX Runtime, not by {NAMES[engine]}; leave "
                "--engine out, or take --precision fp32 or bf16"
            )
        if reason := _unsupported_reason("onnxruntime", config):
            raise UserError(f"--precision int8 {reason} take --precision fp32 or bf16")
        return "onnxruntime"
    if engine == "xla" or (engine == "auto" and precision == "fp32"):
        return "xla"
    reason = _unsupported_reason("openvino", config)
    if precision == "bf16" and not multiplies_bf16("cpu"):
        reason = reason or "would multiply in fp32 on this CPU;"
    if reason and engine == "openvino":
        raise UserError(f"--engine openvino {reason} take --engine xla")
    return "xla" if reason else "openvino"


def _unsupported_reason(engine: str, config: EncoderConfig) -> str:
    """Why another engine than XLA cannot be had for this architecture, or on this machine: words to
    be followed by "take ..."; empty if it can."""
    for name, value in {"bias_kv": True, "norm_kind": "rmsnorm"}.items():
        if getattr(config, name) == value:
            return f"is not for models with {name}={value!r};"
    if (platform := jax.default_backend()) != "cpu":
        return f"computes on a CPU, and JAX has a {platform}: set JAX_PLATFORMS=cpu, or"
    for package in PACKAGES[engine]:
        if importlib.util.find_spec(package) is None:
            return f"needs {package}: pip install -e '.[{EXTRAS[engine]}]', or"
    return ""


def blocks_by(engine: str, precision: str, config: EncoderConfig, blocks: dict) -> RunBlocks:
    """The blocks with these parameters, by another engine than XLA."""
    graph: Graph
    if engine == "onnxruntime":
        from esm1nv_jax.inference.onnx_blocks import OnnxGraph  # onnx is optional

        graph = OnnxGraph()
    else:
        from esm1nv_jax.inference.openvino_blocks import OpenVinoGraph  # openvino is optional

        graph = OpenVinoGraph(precision)
    return compile_blocks(config, blocks, graph)
