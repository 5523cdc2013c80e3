"""A checkpoint policy for tests."""

from esm1nv_jax.checkpoints.manager import CheckpointConfig


def checkpoint_config(**changes) -> CheckpointConfig:
    """A policy that never saves by itself, keeps what is saved, and stops where saving fails."""
    policy = {"every": 10**9, "minutes": 0, "keep": 100, "keep_every": 0, "on_error": "stop"}
    return CheckpointConfig(**policy | changes)
