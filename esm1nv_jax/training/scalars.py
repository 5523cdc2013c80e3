"""The figures of a batch on their way from the devices to the host."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scalars:
    """Scalars by name in one fp32 array [names].

    One array of the program for all: a host makes and fetches an array for each output of each
    device after every update, and two dozen of them took it milliseconds.
    """

    values: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(scalars: dict[str, jax.Array]) -> Scalars:
        values = jnp.stack([scalar.astype(jnp.float32) for scalar in scalars.values()])
        return Scalars(values, tuple(scalars))

    def fetched(self) -> dict[str, float]:
        """Waits for the device and copies them to the host."""
        return dict(zip(self.names, jax.device_get(self.values).tolist(), strict=True))
