"""The package as a wheel installs it, away from any clone."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.training.processes import ROOT


@pytest.mark.slow
def test_configs_are_found_where_there_is_no_clone(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("esm1nv_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "-w", str(tmp_path), str(source)], check=True, timeout=300)
    (made,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(made).extractall(tmp_path / "site")
    shutil.rmtree(source)
    train = ["train", "--config=quickstart:steps=1", f"--workdir={tmp_path / 'run'}"]
    for command in (["config", "configs/quickstart.py"], ["config", "ablations/padded"], train):
        done = subprocess.run(
            [sys.executable, "-m", "esm1nv_jax", *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
