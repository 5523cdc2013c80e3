"""The blocks of an encoder by ONNX Runtime on a CPU, with int8 operands of matrix products.

Each row of activations (a token) and each column of a kernel has its own scale, so that a protein's
numbers do not depend on its neighbours: `quantize_dynamic` of ONNX Runtime has one scale for a
whole batch. Sums of products are exact integers, the same on every CPU. Embeddings, attention,
LayerNorm, residuals and what follows the blocks stay fp32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.encoder_config import EncoderConfig

OPSET, IR_VERSION = 21, 10
OWN_DOMAIN = "com.microsoft"  # of operators that ONNX Runtime adds to the standard's
MASKED_SCORE = -1e30  # exp of it less any real score is exactly 0 in fp32
LEVELS = 127  # of an activation on each side of 128; of a kernel, see `quantize_kernel`
TINY = 1e-30  # instead of the scale of zeros

# (x_BTD, segment_ids_BT, (cos, sin) or None, layers) to the last block's output and those of layers
RunBlocks = Callable[[jax.Array, jax.Array, tuple | None, Sequence[int]], tuple]


def check(config: EncoderConfig) -> None:
    """Raises UserError where int8 is not to be had: of this architecture, or on this machine."""
    take = "take --precision fp32 or bf16"
    for name, value in {"bias_kv": True, "norm_kind": "rmsnorm"}.items():
        if getattr(config, name) == value:
            raise UserError(f"--precision int8 is not for models with {name}={value!r}; {take}")
    if (platform := jax.default_backend()) != "cpu":
        raise UserError(
            f"--precision int8 computes on a CPU, and JAX has a {platform}; {take}, or set "
            "JAX_PLATFORMS=cpu"
        )
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--precision int8 needs {package}: pip install -e '.[int8]', or {take}"
            )


def compile_blocks(config: EncoderConfig, blocks: dict, int8: bool = True) -> RunBlocks:
    """The blocks with these parameters, in int8 or, for comparison, in fp32."""
    graph = _Graph(int8)
    segment_ids = "segment_ids"
    queries, keys = (
        graph.op("Unsqueeze", segment_ids, graph.constant([1, axis], np.int64)) for axis in (3, 2)
    )
    zero, masked = graph.constant(0), graph.constant(MASKED_SCORE)
    mask = graph.op("Where", graph.op("Equal", queries, keys), zero, masked)
    rotary = config.position_kind == "rotary"
    x, outputs = "x", []
    for i in range(config.layers):
        block = jax.device_get(blocks[str(i)])
        x = _block(graph, config, block, x, mask, ("cos", "sin") if rotary else None)
        outputs.append(x)
    session = graph.session(["x", *(["cos", "sin"] if rotary else [])], [segment_ids], outputs)

    def run(x_BTD, segment_ids_BT, rope, layers):
        inputs = {"x": np.asarray(x_BTD), segment_ids: np.asarray(segment_ids_BT)}
        if rope is not None:
            B, T = segment_ids_BT.shape
            rope = [np.asarray(value).reshape(B, 1, T, -1) for value in rope]
            inputs |= dict(zip(("cos", "sin"), rope, strict=True))
        wanted = [layer for layer in layers if layer > 0]
        names = [outputs[layer - 1] for layer in wanted]
        *hidden, last = session.run([*names, outputs[-1]], inputs)
        return last, dict(zip(wanted, hidden, strict=True))

    return run


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


class _Graph:
    """Nodes in the order of the computation, and constants; a name is a tensor."""

    def __init__(self, int8: bool):
        self.int8 = int8
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.quantized: dict[str, tuple[str, str]] = {}

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

    def session(self, floats: Sequence[str], integers: Sequence[str], outputs: Sequence[str]):
        """What computes `outputs`. Kernels are no part of the model, which is at most 2 GiB."""
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        def tensors(names: Sequence[str], kind):
            return [helper.make_tensor_value_info(name, kind, None) for name in names]

        initializers, large = [], {}
        for name, value in self.constants.items():
            if value.ndim <= 1:  # ONNX infers shapes from some of them
                initializers.append(numpy_helper.from_array(value, name))
                continue
            tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor.external_data.add(key="location", value="memory")
            initializers.append(tensor)
            large[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        inputs = tensors(floats, TensorProto.FLOAT) + tensors(integers, TensorProto.INT32)
        graph = helper.make_graph(
            self.nodes, "blocks", inputs, tensors(outputs, TensorProto.FLOAT), initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OWN_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Threads that wait by spinning would take time from what XLA computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_external_initializers([*large], [*large.values()])
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _block(graph: _Graph, config: EncoderConfig, params: dict, x: str, mask: str, rope) -> str:
    """As `model.block.Block`."""
    D, N, H = config.width, config.heads, config.head_size

    def linear(name: str, x: str, columns: slice = slice(None)) -> str:
        bias = params[name].get("bias")
        return graph.linear(
            x, params[name]["kernel"][:, columns], None if bias is None else bias[columns]
        )

    def norm(name: str, x: str) -> str:
        return graph.layer_norm(x, params[name], config.norm_epsilon)

    def heads_of(part: int, x: str) -> str:
        """Queries, keys or values [B, N, T, H]."""
        y = linear("qkv", x, slice(part * D, (part + 1) * D))
        if config.qk_norm and part < 2:
            y = norm("qk"[part] + "_norm", y)
        y = graph.op("Reshape", y, graph.constant([0, 0, N, H], np.int64))
        y = graph.op("Transpose", y, perm=[0, 2, 1, 3])
        return _rotate(graph, y, *rope) if rope and part < 2 else y

    def attention(x: str) -> str:
        q, k, v = (heads_of(part, x) for part in range(3))
        q = graph.op("Mul", q, graph.constant(H**-0.5))
        scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = graph.op("Softmax", graph.op("Add", scores, mask))
        y = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return linear("out_proj", graph.op("Reshape", y, graph.constant([0, 0, D], np.int64)))

    def ffn(x: str) -> str:
        y = linear("fc1", x)
        if config.ffn_activation == "swiglu":
            gate, value = graph.op("Split", y, outputs=2, axis=-1, num_outputs=2)
            y = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), value)
        else:
            tanh = config.ffn_activation == "gelu_tanh"
            y = graph.op("Gelu", y, approximate="tanh" if tanh else "none")
        return linear("fc2", y)

    for branch, name in ((attention, "attention_norm"), (ffn, "ffn_norm")):
        y = branch(norm(name, x) if config.norm == "pre" else x)
        if config.branch_scale != 1:
            y = graph.op("Mul", y, graph.constant(config.branch_scale))
        x = graph.op("Add", x, y)
        x = x if config.norm == "pre" else norm(name, x)
    return x


def _rotate(graph: _Graph, x: str, cos: str, sin: str) -> str:
    first, second = graph.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    a = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
    b = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
    return graph.op("Concat", a, b, axis=-1)
