"""ONNX Runtime and OpenVINO on our own export: fp32, bf16 (OpenVINO alone), and their own int8.

The model is exported as by `esm1nv convert --to hf`, opened by `transformers`, and written as ONNX
for any number of rows and tokens. Needs the extra `bench-engines`, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from esm1nv_jax.common.command import usable_cores

THREADS = usable_cores()
Hidden = Callable[[np.ndarray, np.ndarray], np.ndarray]  # int64 tokens, mask [B, T]: fp32 [B, T, D]


def export(hf_folder: Path, path: Path) -> None:
    """Writes the last hidden state of the model in `hf_folder` as ONNX."""
    import torch
    from transformers import EsmModel

    model = EsmModel.from_pretrained(
        hf_folder, add_pooling_layer=False, attn_implementation="eager"
    ).eval()

    class LastHidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state

    tokens = torch.ones((2, 16), dtype=torch.int64)
    axes = {0: "rows", 1: "length"}
    torch.onnx.export(
        LastHidden().eval(),
        (tokens, tokens),
        str(path),
        input_names=["tokens", "mask"],
        output_names=["hidden"],
        dynamic_axes={"tokens": axes, "mask": axes, "hidden": axes},
        dynamo=False,
    )


def onnx_runtime(path: Path, int8: bool) -> Hidden:
    """A function that runs the model by ONNX Runtime, with all of its own fusions."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if int8:
        path, source = path.with_suffix(".int8.onnx"), path
        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda tokens, mask: session.run(None, {"tokens": tokens, "mask": mask})[0]


def openvino(path: Path, kind: str) -> Hidden:
    """A function that runs the model by OpenVINO, `kind` being fp32, bf16 or int8."""
    # Not `import openvino`, which reports itself, and then does NNCF.
    from esm1nv_jax.inference.openvino_blocks import openvino

    core = openvino.Core()
    model = core.read_model(path)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    if kind == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    compiled = core.compile_model(model, "CPU", config)
    return lambda tokens, mask: compiled({"tokens": tokens, "mask": mask})[0]
