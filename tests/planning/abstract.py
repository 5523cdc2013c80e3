"""Arguments of a training step, without their content."""

from esm1nv_jax.training import step


def arguments(settled, mesh, rows: int, row_length: int):
    """(state, batch) as shapes that know their sharding."""
    return step.abstract_state(settled, mesh), step.abstract_batch(settled, mesh, rows, row_length)
