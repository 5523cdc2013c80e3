"""Parameters for tests, drawn by NumPy: JAX would compile a program for every shape."""

import jax
import numpy as np

from esm1nv_jax.model import encoder, esm2


def random_parameters(config: encoder.EncoderConfig, seed: int = 0) -> dict:
    """Parameters distributed as those of `encoder.init`, with values of their own."""
    rng = np.random.default_rng(seed)
    branch_std = encoder.INIT_STD / (2 * config.layers) ** 0.5

    def draw(path, leaf):
        *_, layer, name = ("", *(key.key for key in path))
        if name == "rotary_frequency":
            return np.asarray(esm2.rope_frequencies(config.head_size))
        if name in ("kernel", "embedding"):
            std = branch_std if layer in ("out_proj", "fc2") else encoder.INIT_STD
            return std * rng.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, name == "scale", leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, encoder.abstract(config))
