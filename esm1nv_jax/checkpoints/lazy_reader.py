"""The parameters of a checkpoint one leaf at a time, straight from the files that Orbax wrote.

Orbax restores a tree at a time and spends as long on bookkeeping as on reading: 0.6 to 0.8
CPU-seconds for the 44M parameters of ESM-1nv, against 0.3 when each leaf is read by tensorstore.
"""

from __future__ import annotations

import json

import numpy as np
import tensorstore
from etils import epath

from esm1nv_jax.checkpoints.manager import FOLDER


class Leaves:
    """The leaves of one checkpoint under names such as `blocks/0/qkv/kernel`, read when asked for.

    Raises OSError or ValueError where the files are not a checkpoint's.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        item = epath.Path(workdir) / FOLDER / str(step) / "params"
        tree = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
        paths = [[key["key"] for key in leaf["key_metadata"]] for leaf in tree]
        base = str(item) if "://" in str(item) else f"file://{item}"
        context = tensorstore.Context()

        def begin(path: list[str]) -> tensorstore.Future:
            store = {"driver": "ocdbt", "base": f"{base}/", "path": ".".join(path) + "/"}
            spec = {"driver": "zarr", "kvstore": store}
            return tensorstore.open(spec, context=context, open=True, read=True)

        opening = {"/".join(path): begin(path) for path in paths}
        self._stores = {name: opening[name].result() for name in sorted(opening)}
        self.shapes = {name: tuple(store.shape) for name, store in self._stores.items()}

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._stores[name].read().result())
