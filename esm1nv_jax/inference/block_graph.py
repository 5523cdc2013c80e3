"""The blocks of an encoder as the graph of another engine than XLA, for CPUs.

Embeddings and what follows the blocks stay with XLA. Graphs: `onnx_blocks`, `openvino_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from esm1nv_jax.model.encoder_config import EncoderConfig

MASKED_SCORE = -1e30  # exp of it less any real score is exactly 0 in fp32
TINY = 1e-30  # instead of the scale of zeros in int8
SEGMENT_IDS = "segment_ids"

# (x_BTD, segment_ids_BT, (cos, sin) or None, layers) to the last block's output and those of layers
RunBlocks = Callable[[jax.Array, jax.Array, tuple | None, Sequence[int]], tuple]
Tensor = Any  # of a graph that is being built


class Graph(Protocol):
    """Operations as ONNX names and defines them."""

    def input(self, name: str, rank: int, dtype=np.float32) -> Tensor: ...

    def constant(self, value, dtype=np.float32) -> Tensor: ...

    def op(self, kind: str, *inputs: Tensor, outputs: int = 1, **attributes) -> Any:
        """The result of an operation; a list, if it has several."""

    def linear(self, x: Tensor, kernel: np.ndarray, bias: np.ndarray | None) -> Tensor: ...

    def layer_norm(self, x: Tensor, params: dict, epsilon: float) -> Tensor: ...

    def compile(
        self, outputs: Sequence[Tensor]
    ) -> Callable[[dict[str, np.ndarray], tuple[int, ...]], list[np.ndarray]]:
        """A function of the inputs, and of which of `outputs` to compute; for several threads."""


def compile_blocks(config: EncoderConfig, blocks: dict, graph: Graph) -> RunBlocks:
    """The blocks with these parameters."""
    segment_ids = graph.input(SEGMENT_IDS, 2, np.int32)
    queries, keys = (
        graph.op("Unsqueeze", segment_ids, graph.constant([1, axis], np.int64)) for axis in (3, 2)
    )
    zero, masked = graph.constant(0), graph.constant(MASKED_SCORE)
    mask = graph.op("Where", graph.op("Equal", queries, keys), zero, masked)
    x, rope = graph.input("x", 3), None
    if config.position_kind == "rotary":
        rope = graph.input("cos", 4), graph.input("sin", 4)
    outputs = []
    for i in range(config.layers):
        x = _block(graph, config, jax.device_get(blocks[str(i)]), x, mask, rope)
        outputs.append(x)
    compiled = graph.compile(outputs)

    def run(x_BTD, segment_ids_BT, rope, layers):
        inputs = {"x": np.asarray(x_BTD), SEGMENT_IDS: np.asarray(segment_ids_BT)}
        if rope is not None:
            B, T = segment_ids_BT.shape
            rope = [np.asarray(value).reshape(B, 1, T, -1) for value in rope]
            inputs |= dict(zip(("cos", "sin"), rope, strict=True))
        wanted = [layer for layer in layers if layer > 0]
        *hidden, last = compiled(inputs, (*(layer - 1 for layer in wanted), config.layers - 1))
        return last, dict(zip(wanted, hidden, strict=True))

    return run


def _block(graph: Graph, config: EncoderConfig, params: dict, x, mask, rope):
    """As `model.block.Block`."""
    D, N, H = config.width, config.heads, config.head_size

    def linear(name: str, x, columns: slice = slice(None)):
        bias = params[name].get("bias")
        return graph.linear(
            x, params[name]["kernel"][:, columns], None if bias is None else bias[columns]
        )

    def norm(name: str, x):
        return graph.layer_norm(x, params[name], config.norm_epsilon)

    def heads_of(part: int, x):
        """Queries, keys or values [B, N, T, H]."""
        y = linear("qkv", x, slice(part * D, (part + 1) * D))
        if config.qk_norm and part < 2:
            y = norm("qk"[part] + "_norm", y)
        y = graph.op("Reshape", y, graph.constant([0, 0, N, H], np.int64))
        y = graph.op("Transpose", y, perm=[0, 2, 1, 3])
        return _rotate(graph, y, *rope) if rope and part < 2 else y

    def attention(x):
        q, k, v = (heads_of(part, x) for part in range(3))
        q = graph.op("Mul", q, graph.constant(H**-0.5))
        scores = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = graph.op("Softmax", graph.op("Add", scores, mask))
        y = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return linear("out_proj", graph.op("Reshape", y, graph.constant([0, 0, D], np.int64)))

    def ffn(x):
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


def _rotate(graph: Graph, x, cos, sin):
    first, second = graph.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    a = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
    b = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
    return graph.op("Concat", a, b, axis=-1)
