"""Training in the process of the test."""

import subprocess

import pytest

from esm1nv_jax import main
from esm1nv_jax.common import command
from esm1nv_jax.training import sharding
from tests.training import processes


@pytest.fixture
def train_here(monkeypatch, capfd):
    """Runs `esm1nv train` in this process, on one device: a start takes seconds."""
    devices_of = sharding.devices_of
    monkeypatch.setattr(sharding, "devices_of", lambda platform: devices_of(platform)[:1])
    monkeypatch.setattr(command, "set_up", lambda: None)

    def run(*options, config=processes.TINY):
        status = command.run(main.main, [f"--config={config}", *options])
        return subprocess.CompletedProcess(options, status, *capfd.readouterr())

    return run
