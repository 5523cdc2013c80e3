"""A graph for ONNX Runtime on a CPU, with int8 operands of matrix products.

Each row of activations (a token) and each column of a kernel has its own scale, so that a protein's
numbers do not depend on its neighbours: `quantize_dynamic` of ONNX Runtime has one scale for a
whole batch. Sums of products are exact integers, the same on every CPU. Embeddings, attention,
LayerNorm, residuals and what follows the blocks stay fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esm1nv_jax.common.command import usable_cores
from esm1nv_jax.inference.block_graph import TINY

OPSET, IR_VERSION = 21, 10
OWN_DOMAIN = "com.microsoft"  # of operators that ONNX Runtime adds to the standard's
LEVELS = 127  # of an activation on each side of 128; of a kernel, see `quantize_kernel`


def quantize_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [K, N] and scales fp32 [N].

    Elements of one sign in rows 2 i and 2 i + 1 of a column add up to at most 128. AVX2 adds their
    products with two activations (at most 255) in 16 bits, and would saturate above that.
    """
    K, N = kernel.shape
    pairs = np.pad(kernel, ((0, K % 2), (0, 0))).reshape(-1, 2, N)
    largest = np.maximum(*(np.maximum(sign * pairs, 0).sum(1).max(0) for sign in (1, -1)))
    scale = np.maximum(largest, TINY).astype(np.float32) / LEVELS
    return np.rint(kernel / scale).astype(np.int8), scale


class OnnxGraph:
    """Nodes in the order of the computation, and constants; a name is a tensor. Linear layers are
    in int8 or, for comparison, in fp32."""

    def __init__(self, int8: bool = True):
        self.int8 = int8
        self.nodes: list = []
        self.inputs: dict[str, type] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.quantized: dict[str, tuple[str, str]] = {}

    def input(self, name: str, rank: int, dtype=np.float32) -> str:
        self.inputs[name] = dtype
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes):
        """Adds a node; the name of its output, or names of several."""
        from onnx import helper  # optional

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value, dtype=np.float32) -> str:
        value = np.asarray(value, dtype, order="C")
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    def linear(self, x: str, kernel: np.ndarray, bias: np.ndarray | None) -> str:
        if self.int8:
            levels, step = self._quantize(x)
            kernel_levels, scale = quantize_kernel(kernel)
            weights = [
                self.constant(kernel_levels, np.int8),
                self.constant(1),
                self.constant(scale),
            ]
            offset = self.constant(LEVELS + 1, np.uint8)
            y = self.op("MatMulIntegerToFloat", levels, *weights, offset, domain=OWN_DOMAIN)
            y = self.op("Mul", y, step)
        else:
            y = self.op("MatMul", x, self.constant(kernel))
        return y if bias is None else self.op("Add", y, self.constant(bias))

    def _quantize(self, x: str) -> tuple[str, str]:
        """x as uint8 around 128, and what a level is worth in each row."""
        if x not in self.quantized:
            largest = self.op("ReduceMax", self.op("Abs", x), self.constant([-1], np.int64))
            largest = self.op("Max", largest, self.constant(TINY))
            scaled = self.op("Mul", x, self.op("Div", self.constant(LEVELS), largest))
            offset = self.constant(LEVELS + 1, np.uint8)
            levels = self.op("QuantizeLinear", scaled, self.constant(1), offset)
            self.quantized[x] = levels, self.op("Mul", largest, self.constant(1 / LEVELS))
        return self.quantized[x]

    def layer_norm(self, x: str, params: dict, epsilon: float) -> str:
        names = [self.constant(params[name]) for name in ("scale", "bias") if name in params]
        return self.op("LayerNormalization", x, *names, epsilon=epsilon)

    def compile(self, outputs: Sequence[str]):
        """As `Graph.compile`. Kernels are no part of the ONNX model, which is at most 2 GiB."""
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        def tensor(name: str, dtype=np.float32):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            return helper.make_tensor_value_info(name, kind, None)

        initializers, large = [], {}
        for name, value in self.constants.items():
            if value.ndim <= 1:  # ONNX infers shapes from some of them
                initializers.append(numpy_helper.from_array(value, name))
                continue
            external = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
            external.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
            external.external_data.add(key="location", value="memory")
            initializers.append(external)
            large[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        inputs = [tensor(name, dtype) for name, dtype in self.inputs.items()]
        graph = helper.make_graph(
            self.nodes, "blocks", inputs, [tensor(name) for name in outputs], initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OWN_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        # Threads that wait by spinning would take time from what XLA computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_external_initializers([*large], [*large.values()])
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda inputs, wanted: session.run([outputs[i] for i in wanted], inputs)
