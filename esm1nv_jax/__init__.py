"""ESM-1nv in JAX: pretrain, average, evaluate and serve a protein language model."""

__version__ = "0.1.0"
