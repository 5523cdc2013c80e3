"""Runs `esm1nv plan` in a process of its own: it sets the environment before JAX starts."""

import json
import os
import subprocess
import sys


def plan(*arguments: str):
    """Returns what `esm1nv plan ... --json` prints, parsed."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    completed = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "plan", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout)
