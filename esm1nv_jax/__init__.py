"""ESM-1nv in JAX: pretrain, average, evaluate and serve a protein language model."""

__version__ = "0.1.0"
__all__ = ["load"]  # noqa: F822  `load` is imported when it is first used


def __getattr__(name: str):
    """`load` is imported when it is asked for, so that importing the package stays fast."""
    if name == "load":
        from esm1nv_jax.inference.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
