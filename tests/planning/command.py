"""Runs `esm1nv plan` in a process of its own: it sets the environment before JAX starts."""

import json
import os
import subprocess
import sys


def plan(*arguments: str):
    """What `esm1nv plan ... --json` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ended = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "plan", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)
