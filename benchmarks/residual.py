"""What a residual stream in bf16 costs in accuracy: one forward pass, at 6 and at 12 layers.

    python benchmarks/residual.py [--rows 2]

The width of ESM-1nv and bundled proteins in rows of 512 tokens, without dropout. Kernels are three
times those of the initialization, so that branches outgrow the embeddings, as after training.
Each form is compared with fp32 throughout: the last hidden states at real tokens, and the loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from embed import accuracy

from esm1nv_jax.common import config_file
from esm1nv_jax.data.packing import stream_config
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.data.source import SAMPLE, open_split
from esm1nv_jax.model import encoder
from esm1nv_jax.training.run_config import RunConfig

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain_small.py"
FORMS = {  # operands of products, residual stream
    "fp32": ("float32", "float32"),
    "bf16 residual": ("float32", "bfloat16"),
    "bf16 operands": ("bfloat16", "float32"),
    "both": ("bfloat16", "bfloat16"),
}


def outputs(layers: int, rows: int, dtype: str, residual_dtype: str):
    """Hidden states of real tokens [*, D], the loss, and the growth of the residual stream."""
    config = config_file.load(CONFIG, f"max_length=510,batch={rows}")
    with config.unlocked():
        config.model.layers = layers
        config.compute.update(dtype=dtype, residual_dtype=residual_dtype)
    run = RunConfig.from_config_dict(config)
    settings = run.step_config(jax.local_devices()[0])
    stream = stream_config(run, rows)
    batch = next(iter(train_dataset(open_split(SAMPLE, "train"), stream, slice(0, rows), 0)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x if path[-1].key == "kernel" else x, encoder.init(run.model, 0)
    )

    def forward(params, batch):
        sums, _ = settings.objective.loss_sums(
            settings.model, settings.compute, params, batch, None
        )
        names = ("tokens", "segment_ids", "positions")
        hidden = encoder.forward(
            settings.model,
            params,
            *(batch[name] for name in names),
            compute=settings.compute,
            hidden_layers=(0, layers, -1),
        ).hidden
        return hidden, sums["loss"] / sums["num_targets"]

    arrays = {name: batch[name] for name in settings.objective.batch_dtypes}
    hidden, loss = jax.device_get(jax.jit(forward)(params, arrays))
    growth = np.std(hidden[layers]) / np.std(hidden[0])
    return hidden[-1][batch["segment_ids"] > 0], float(loss), growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    rows = parser.parse_args().rows
    for layers in (6, 12):
        results = {name: outputs(layers, rows, *form) for name, form in FORMS.items()}
        right, right_loss, growth = results.pop("fp32")
        print(f"{layers} layers: the residual grows {growth:.1f} times, loss {right_loss:.5f}")
        for name, (x, loss, _) in results.items():
            cosine, difference = accuracy(x, right).values()
            print(
                f"  {name}: lowest cosine {cosine:.6f}, largest difference {difference:.1e}, "
                f"loss {loss - right_loss:+.1e}"
            )


if __name__ == "__main__":
    main()
