"""The figures of a run, as it keeps them: `metrics.jsonl` in its folder, a JSON object a line."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

FILE = "metrics.jsonl"


def read(run: epath.PathLike) -> list[dict[str, Any]]:
    """Every line in its order, but for those that a crash or a full disk has cut short.

    Raises OSError where there is no such file.
    """
    found = []
    for line in (epath.Path(run) / FILE).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and "kind" in line]
