"""The folder of a step: whether it counts, whether its files are as written, and what it holds.

And `esm1nv doctor`, which verifies every step of a run.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import tensorstore
from etils import epath
from flax import traverse_util

from esm1nv_jax.common import command, files
from esm1nv_jax.common.console import stdout
from esm1nv_jax.common.errors import UserError

FOLDER, BEST = "checkpoints", "best"
CHECKSUMS = "checksums.json"
DAMAGED, EARLIER = "damaged", "earlier"  # ends of the names of steps that are set aside
EXIT_DAMAGED = 1
_LEFTOVERS = {DAMAGED: "set aside as damaged", EARLIER: "of a start that left no checkpoint"}
FOREIGN = (".nfs", "._", ".DS_Store")  # NFS and macOS put such files anywhere, and remove them


def steps(workdir: epath.PathLike, folder: str = FOLDER) -> list[int]:
    """The steps whose finished checkpoints a run's folder holds, ascending.

    A step without checksums was cut short and does not count. Raises UserError where the folder
    cannot be listed.
    """
    path = epath.Path(workdir) / folder
    try:
        numbered = [entry for entry in path.iterdir() if entry.name.isdecimal()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return sorted(int(entry.name) for entry in numbered if is_finished(entry))


def is_finished(path: epath.Path) -> bool:
    """Whether the folder of a step has checksums, or cannot be read: that one is damaged."""
    try:
        return any(entry.name == CHECKSUMS for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def verify(
    workdir: epath.PathLike, step: int, folder: str = FOLDER, items: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; empty where every file is as it was written.

    Reads every byte, or only those of some items, such as `params`. Files that were not written
    with the checkpoint are no damage.
    """
    path = epath.Path(workdir) / folder / str(step)
    try:
        expected = json.loads((path / CHECKSUMS).read_text())["sha256"]
        records = {name: (entry["bytes"], entry["digest"]) for name, entry in expected.items()}
    except FileNotFoundError:
        return [f"no {CHECKSUMS}: it was never finished"]
    except OSError as error:
        return [f"{CHECKSUMS} cannot be read: {error.strerror or error}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{CHECKSUMS} cannot be read: it is not what was written"]
    errors = []
    for name, (size, digest) in records.items():
        if items and name.partition("/")[0] not in items:
            continue
        try:
            actual_size, actual_digest = _digest(path / name)
        except FileNotFoundError:
            errors.append(f"{name} is missing")
        except OSError as error:
            errors.append(f"{name} cannot be read: {error.strerror or error}")
        else:
            if actual_size != size:
                errors.append(f"{name} has {actual_size} bytes, {size} were written")
            elif actual_digest != digest:
                errors.append(f"{name} has other bytes than were written")
    return errors


def write_checksums(path: epath.Path) -> None:
    """Makes a step count: one SHA-256 for each of its files, put there by rename."""
    records = {}
    for file in _files(path):
        size, digest = _digest(file)
        records[str(file.relative_to(path))] = {"bytes": size, "digest": digest}
    files.write_atomically(path / CHECKSUMS, json.dumps({"sha256": records}, indent=1))


def read_metadata(workdir: epath.PathLike, step: int, folder: str = FOLDER) -> dict:
    """The config, code version and layout that made a checkpoint; of the best, its loss, too."""
    return _read_json(epath.Path(workdir) / folder / str(step) / "metadata")


def read_data_state(workdir: epath.PathLike, step: int) -> dict:
    """The state of the input stream in a checkpoint."""
    return _read_json(epath.Path(workdir) / FOLDER / str(step) / "data_state")


def read_params(workdir: epath.PathLike, step: int, folder: str = FOLDER) -> dict:
    """The parameters of a checkpoint, on the host, as NumPy arrays."""
    arrays = open_params(workdir, step, folder)
    read = {name: np.asarray(array.read().result()) for name, array in arrays.items()}
    return traverse_util.unflatten_dict(read, sep="/")


def open_params(
    workdir: epath.PathLike, step: int, folder: str = FOLDER
) -> dict[str, tensorstore.TensorStore]:
    """The parameters of a checkpoint, opened but not read, under names such as `final_norm/scale`.

    Raises OSError or ValueError where the files are not a checkpoint's. For the 44M parameters of
    ESM-1nv, Orbax's restore takes 0.6 to 0.8 CPU-seconds, reading array by array 0.3.
    """
    item = epath.Path(workdir) / folder / str(step) / "params"
    tree = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    paths = [[key["key"] for key in leaf["key_metadata"]] for leaf in tree]
    base = str(item) if files.is_remote(item) else f"file://{os.path.abspath(item)}"
    context = tensorstore.Context()

    def begin(path: list[str]) -> tensorstore.Future:
        store = {"driver": "ocdbt", "base": f"{base}/", "path": ".".join(path) + "/"}
        spec = {"driver": "zarr", "kvstore": store}
        return tensorstore.open(spec, context=context, open=True, read=True)

    opening = {"/".join(path): begin(path) for path in paths}
    return {name: opening[name].result() for name in sorted(opening)}


def _read_json(item: epath.Path) -> dict:
    return json.loads((item / f"{item.name}.json").read_text())


def _files(path: epath.Path) -> list[epath.Path]:
    """Every file that was written below a folder, in order."""
    found = []
    for entry in sorted(path.iterdir()):
        if not entry.name.startswith(FOREIGN):
            found += _files(entry) if entry.is_dir() else [entry]
    return found


def _digest(file: epath.Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def main(argv: list[str]) -> int:
    parser = command.Parser(
        "doctor",
        "Read every byte of a run's checkpoints and report which are whole. Changes nothing.\n"
        "Exit status: 0 all are whole, 1 some are damaged.",
        "esm1nv doctor runs/first",
    )
    parser.add_argument("workdir", help="the folder of a run")
    workdir = parser.parse_args(argv).workdir

    verdicts: dict[str, str] = {}  # by name, such as checkpoints/1500
    for folder in (FOLDER, BEST):
        path, finished = epath.Path(workdir) / folder, steps(workdir, folder)
        for step in finished:
            errors = verify(workdir, step, folder)
            verdicts[f"{folder}/{step}"] = f"DAMAGED: {'; '.join(errors)}" if errors else "whole"
        for entry in sorted(path.iterdir()) if path.exists() else ():  # what no start reads
            number, _, mark = entry.name.partition(".")
            if number.isdecimal() and (mark or int(number) not in finished):
                reason = _LEFTOVERS.get(mark, "a save was cut short")
                verdicts[f"{folder}/{entry.name}"] = f"leftover, may be removed: {reason}"
    if not verdicts:
        raise UserError(f"{workdir} holds no checkpoints; give the --workdir of a run")

    width = max(map(len, verdicts))
    for name, verdict in verdicts.items():
        stdout.print(f"{name:<{width}}  {verdict}")
    whole = [name for name, verdict in verdicts.items() if verdict == "whole"]
    damaged = sum(verdict.startswith("DAMAGED") for verdict in verdicts.values())
    if not damaged:
        stdout.print(f"all {len(whole)} whole")
        return 0
    valid = [name for name in whole if name.startswith(f"{FOLDER}/")]
    resumed = f"a start of the run goes on from {valid[-1]}" if valid else "none can be used"
    stdout.print(f"{damaged} damaged; {resumed}")
    return EXIT_DAMAGED
