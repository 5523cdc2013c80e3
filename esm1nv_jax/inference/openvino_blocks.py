"""A graph for OpenVINO on a CPU, with operands of matrix products in fp32, bf16 or int8.

In bf16 OpenVINO keeps what lies between products in bf16, too, residuals included. In int8 linear
layers alone have int8 operands: each column of a kernel has a scale, and so has each group of an
activation's columns, by itself, so that a protein's numbers do not depend on its neighbours. All
else is fp32.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import numpy as np

from esm1nv_jax.common.command import usable_cores
from esm1nv_jax.inference.block_graph import TINY

# OpenVINO reports every import to its makers over the network, by a process that it forks, which
# JAX's threads do not stand. It does not where this package of theirs is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402
from openvino import opset15 as ops  # noqa: E402

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
LEVELS = 127  # of int8, on each side of 0
# Columns of an activation that share a scale. With 32 a block takes 1.15 of the time, with all 768
# 1.2 (two cores of a Zen 5). Kernels of fewer rows are multiplied in fp32.
GROUP = 128
# By the names of ONNX.
OPERATIONS = {
    "Add": ops.add,
    "Concat": lambda *parts, axis: ops.concat(parts, axis),
    "Equal": ops.equal,
    "Gelu": lambda x, approximate: ops.gelu(x, {"none": "erf"}.get(approximate, approximate)),
    "MatMul": lambda a, b: ops.matmul(a, b, False, False),
    "Mul": ops.multiply,
    "Reshape": lambda x, shape: ops.reshape(x, shape, special_zero=True),
    "Sigmoid": ops.sigmoid,
    "Softmax": lambda x: ops.softmax(x, -1),
    "Split": lambda x, axis, num_outputs: ops.split(x, axis, num_outputs).outputs(),
    "Sub": ops.subtract,
    "Transpose": lambda x, perm: ops.transpose(x, perm),
    "Unsqueeze": ops.unsqueeze,
    "Where": ops.select,
}


class OpenVinoGraph:
    """Nodes of OpenVINO, computed in `precision`."""

    def __init__(self, precision: str):
        self.precision = precision
        self.inputs: list = []

    def input(self, name: str, rank: int, dtype=np.float32):
        self.inputs.append(ops.parameter([-1] * rank, dtype))
        self.inputs[-1].output(0).set_names({name})
        return self.inputs[-1]

    def constant(self, value, dtype=np.float32):
        return ops.constant(np.asarray(value, dtype, order="C"))

    def op(self, kind: str, *inputs, outputs: int = 1, **attributes):
        return OPERATIONS[kind](*inputs, **attributes)

    def linear(self, x, kernel: np.ndarray, bias: np.ndarray | None):
        if self.precision == "int8":
            y = ops.matmul(x, self._int8_kernel(kernel), False, True)
        else:
            y = self.op("MatMul", x, self.constant(kernel))
        return y if bias is None else self.op("Add", y, self.constant(bias))

    def _int8_kernel(self, kernel: np.ndarray):
        """[N, K], as OpenVINO knows a kernel that it may multiply in int8."""
        kernel_NK = np.asarray(kernel, np.float32).T
        largest_N1 = np.abs(kernel_NK).max(axis=1, keepdims=True)
        scale_N1 = np.maximum(largest_N1, TINY) / LEVELS
        levels_NK = self.constant(np.rint(kernel_NK / scale_N1), np.int8)
        return ops.multiply(ops.convert(levels_NK, np.float32), self.constant(scale_N1))

    def layer_norm(self, x, params: dict, epsilon: float):
        y = ops.mvn(x, self.constant([-1], np.int64), True, epsilon, "inside_sqrt")
        y = self.op("Mul", y, self.constant(params["scale"]))
        return self.op("Add", y, self.constant(params["bias"])) if "bias" in params else y

    def compile(self, outputs: Sequence):
        """As `Graph.compile`. A program for each set of outputs, since all of one are computed."""
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": usable_cores(),
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "ENABLE_CPU_PINNING": False,  # two programs would be pinned to the same cores
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,  # of activations, beside int8 kernels only
        }
        core, lock, thread = openvino.Core(), threading.Lock(), threading.local()
        programs: dict[tuple[int, ...], openvino.CompiledModel] = {}

        def run(inputs: dict[str, np.ndarray], wanted: tuple[int, ...]) -> list[np.ndarray]:
            with lock:
                if wanted not in programs:
                    model = openvino.Model([outputs[i] for i in wanted], self.inputs, "blocks")
                    programs[wanted] = core.compile_model(model, "CPU", options)
            requests = thread.__dict__.setdefault("requests", {})
            if wanted not in requests:
                requests[wanted] = programs[wanted].create_infer_request()
            return [*requests[wanted].infer(inputs, share_inputs=True).to_tuple()]

        return run
