"""Arguments of a training step, without their content."""

import jax
import jax.numpy as jnp

from esm1nv_jax.training import sharding, step


def arguments(settled, mesh, rows: int, row_length: int):
    """(state, batch) as shapes that know their sharding."""
    whole, split = (sharding.sharding(mesh, kind) for kind in ("state", "batch"))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(lambda: step.create_state(settled)),
    )
    kinds = {"mask_bits": jnp.uint32}
    batch = {
        name: jax.ShapeDtypeStruct((rows, row_length), kinds.get(name, jnp.int32), sharding=split)
        for name in step.ON_DEVICE
    }
    return state, batch
