"""Which engine computes the blocks: XLA, or on a CPU one that is faster in a precision."""

from __future__ import annotations

import argparse
import importlib.util

import jax

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.block_graph import Graph, RunBlocks, compile_blocks
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.matmul import cpu_features

# Of operands of matrix products; what int8 leaves to XLA is fp32.
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "float32"}
NAMES = {"xla": "XLA", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
CHOICES = {"precision": tuple(PRECISIONS), "engine": ("auto", *NAMES)}
COMPUTES = {"xla": ("fp32", "bf16"), "openvino": tuple(PRECISIONS), "onnxruntime": ("int8",)}
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxruntime")}
# With which OpenVINO is the fastest, as Linux names them: with AVX2 alone XLA is as fast.
INSTRUCTIONS = {
    "fp32": {"avx512f"},
    "bf16": {"avx512_bf16", "amx_bf16"},
    "int8": {"avx512_vnni", "avx_vnni"},
}
EXTRAS = {"openvino": "openvino", "onnxruntime": "int8"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `select_engine` reads."""
    kinds = "of matrix products (default fp32)"
    by = "of the blocks on a CPU (default auto: the fastest that is installed)"
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
    """The engine for one of CHOICES: a key of NAMES. auto is the fastest that can be had, as
    measured (docs/performance.md): OpenVINO where the CPU has instructions for the precision, else
    XLA, or ONNX Runtime for int8.

    Raises UserError for what cannot be had here.
    """
    if engine != "auto":
        if reason := _unsupported_reason(engine, precision, config):
            raise UserError(f"--engine {engine} {reason} take --engine auto")
        return engine
    fastest_first = ["openvino"] if has_instructions(precision) else []
    fastest_first.append("onnxruntime" if precision == "int8" else "xla")
    reasons = [_unsupported_reason(name, precision, config) for name in fastest_first]
    for name, reason in zip(fastest_first, reasons, strict=True):
        if not reason:
            return name
    raise UserError(f"--precision {precision} {reasons[0]} take --precision fp32 or bf16")


def has_instructions(precision: str) -> bool:
    """Whether OpenVINO is faster than XLA on this CPU in this precision."""
    return not INSTRUCTIONS[precision].isdisjoint(cpu_features())


def _unsupported_reason(engine: str, precision: str, config: EncoderConfig) -> str:
    """Why an engine cannot be had in this precision, for this architecture, or on this machine:
    words to be followed by "take ..."; empty if it can."""
    if precision not in (kinds := COMPUTES[engine]):
        return f"computes {' and '.join(kinds)} only, not {precision};"
    if engine == "xla":
        return ""
    for name, value in {"bias_kv": True, "norm_kind": "rmsnorm"}.items():
        if getattr(config, name) == value:
            return f"is not for models with {name}={value!r};"
    if (platform := jax.default_backend()) != "cpu":
        return f"computes on a CPU, and JAX has a {platform}: set JAX_PLATFORMS=cpu, or"
    if precision != "fp32" and engine == "openvino" and not has_instructions(precision):
        return f"would multiply in fp32, not {precision}, on this CPU;"
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
