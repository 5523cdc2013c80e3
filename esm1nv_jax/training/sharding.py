"""One mesh, one axis: every device holds all parameters and its own rows of the batch."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esm1nv_jax.common.errors import UserError

DATA = "data"
PLATFORMS = ("auto", "cpu", "gpu", "tpu")


def devices_of(platform: str) -> list[jax.Device]:
    """All devices of the platform asked for, over all processes."""
    if platform not in PLATFORMS:
        raise UserError(f"platform={platform!r} is unknown; there are {', '.join(PLATFORMS)}")
    try:
        return jax.devices() if platform == "auto" else jax.devices(platform)
    except RuntimeError:
        raise UserError(
            f"platform={platform}: found 0 such devices, only {jax.default_backend()}; use "
            f"--config.platform=auto, or install the extra for it (esm1nv_jax[cuda12] or [tpu])"
        ) from None


def make_mesh(devices) -> Mesh:
    # Auto axes: with Explicit ones an embedding look-up by data-sharded ids is a type error.
    return Mesh(np.asarray(devices), (DATA,), axis_types=(AxisType.Auto,))


def sharding(mesh: Mesh, kind: str) -> NamedSharding:
    """Where arrays live. `kind` is 'state' (parameters, optimiser, scalars: whole on every device)
    or 'batch' (rows split over the devices, in order)."""
    return NamedSharding(mesh, {"state": PartitionSpec(), "batch": PartitionSpec(DATA)}[kind])


def local_rows(mesh: Mesh, rows: int) -> slice:
    """The rows of a global batch that this process's devices hold."""
    size = mesh.devices.size
    mine = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]
    per_device = rows // size
    return slice(mine[0] * per_device, (mine[-1] + 1) * per_device)
