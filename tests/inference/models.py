"""A tiny model with weights large enough that a wrong attention or position would show."""

import jax
import numpy as np

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.model import encoder, heads
from tests.model.parameters import random_parameters

CONFIG = encoder.EncoderConfig(
    layers=2, width=32, heads=4, ffn=64, positions=66, dropout=0.0, attention_dropout=0.0
)
LETTERS = np.frombuffer(b"LASGVERTDIPKNFQYHMCW", np.uint8)


def make_model(path, recipe="card", config=CONFIG):
    """Writes a model folder with random weights and says where."""
    params = random_parameters(config, 7)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (x + rng.normal(0, 0.2, x.shape)).astype(np.float32), params)
    data = {"max_residues": config.positions - 2, "crop": "prefix"}
    provenance = {"config": {"data": data, "masking": {"recipe": recipe, "rate": 0.15}}}
    model_folder.write(str(path), model_folder.Weights(params, config, provenance))
    return str(path)


def make_tuned(path, head, base):
    """Writes the model of folder `base` with a head of random weights, and says where."""
    weights = model_folder.read(base)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        heads.abstract(head, weights.model.width),
    )
    provenance = weights.provenance | {"base": {"path": "models/first", "digest": "0"}}
    tuned = model_folder.Weights(weights.params | {"head": params}, weights.model, provenance, head)
    model_folder.write(str(path), tuned)
    return str(path)


def make_proteins(n, seed=0, longest=64):
    rng = np.random.default_rng(seed)
    return [
        (f"P{i:03d}", rng.choice(LETTERS, rng.integers(1, longest + 1)).tobytes().decode())
        for i in range(n)
    ]


def write_fasta(path, proteins):
    path.write_text("".join(f">{name} a protein\n{s}\n" for name, s in proteins))
    return str(path)
