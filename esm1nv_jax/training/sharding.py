"""One mesh, one axis: every device holds all parameters and its own rows of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esm1nv_jax.common.errors import UserError

DATA = "data"
PLATFORMS = ("auto", "cpu", "gpu", "tpu")


def devices_of(platform: str) -> list[jax.Device]:
    """Return all devices of a platform, over all processes. Raises UserError where none is."""
    if platform not in PLATFORMS:
        raise UserError(f"platform={platform!r} is unknown; there are {', '.join(PLATFORMS)}")
    try:
        return jax.devices() if platform == "auto" else jax.devices(platform)
    except RuntimeError:
        raise UserError(
            f"platform={platform}: found 0 such devices, only {jax.default_backend()}; use "
            "--config.platform=auto, or install the extra for it (see README, Installation)"
        ) from None


def make_mesh(devices) -> Mesh:
    """Return a mesh of these devices along the axis `data`."""
    # Auto axes: with Explicit ones an embedding look-up by data-sharded ids is a type error.
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def sharding(mesh: Mesh, kind: str) -> NamedSharding:
    """Return where arrays live. `kind` is 'state' (parameters, optimizer state, scalars: whole on
    every device) or 'batch' (rows split over the devices, in order)."""
    return NamedSharding(mesh, {"state": PartitionSpec(), "batch": PartitionSpec(DATA)}[kind])


def local_rows(mesh: Mesh, rows: int) -> slice:
    """Return the rows of a global batch that this process's devices hold."""
    mine = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    per_device = rows // mesh.devices.size
    return slice(mine[0] * per_device, (mine[-1] + 1) * per_device)


def place_on_devices(
    batch: Mapping[str, np.ndarray], names: Iterable[str], mesh: Mesh
) -> dict[str, jax.Array]:
    """Return the global batch on the devices, from the rows that this process has made."""
    by_rows = sharding(mesh, "batch")
    with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step that is meant
        return {
            name: jax.make_array_from_process_local_data(by_rows, np.ascontiguousarray(batch[name]))
            for name in names
        }


def place_state(tree, mesh: Mesh):
    """Return host arrays replicated over all devices of all processes, without communication."""
    replicated = sharding(mesh, "state")
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, replicated, lambda index: x[index]), tree
    )
