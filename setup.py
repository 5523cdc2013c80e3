"""Packaging. Ranges hold on Python 3.11 to 3.13; constraints.txt pins what was tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = (ROOT / "esm1nv_jax/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "(.+)"', PACKAGE)[1]  # it stands there alone

EXTRAS = {
    # Embedding files as Parquet and HDF5.
    "embed": ["pyarrow>=17", "h5py>=3.11"],
    # --precision int8, on a CPU without VNNI, or without OpenVINO.
    "int8": ["onnx>=1.17", "onnxruntime>=1.20"],
    # Embedding on a CPU with AVX-512, or int8 with VNNI: faster than XLA.
    "openvino": ["openvino>=2025.0"],
    # Structures as PDB and mmCIF, for the precision of contacts.
    "structures": ["biopython>=1.83"],
    # notebooks/inference.ipynb.
    "notebook": ["h5py>=3.11", "scikit-learn>=1.5", "jupyterlab>=4"],
    # What benchmarks/ compares with.
    "bench": ["torch>=2.4", "transformers>=4.44", "peft>=0.17", "accelerate>=1.1"],
    # The engines of benchmarks/embed.py --rivals.
    "bench-engines": ["onnx>=1.16", "onnxruntime>=1.20", "openvino>=2025.0", "nncf>=2.14"],
    # Biopython reads structures, and FASTA independently; scikit-learn, nbclient and ipykernel run
    # the notebook.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "biopython>=1.83",
        "pyarrow>=17",
        "h5py>=3.11",
        "scikit-learn>=1.5",
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "onnx>=1.17",
        "onnxruntime>=1.20",
        "openvino>=2025.0",
        "pyyaml>=6",  # launch/jobset.yaml
    ],
    # Linter, formatter, types, import rules, and the hook that runs them before a commit.
    "dev": ["ruff>=0.17", "mypy>=2.4", "import-linter>=2.17", "pre-commit>=4"],
    # With them the tests compare with transformers, peft and fair-esm, on random and real weights.
    "interchange-test": [
        "torch>=2.6",
        "transformers>=5",
        "peft>=0.18",
        "antiberty==0.1.3",
        "fair-esm==2.0.0",
    ],
    # Drivers from 580, and from 525. They exclude each other.
    "cuda13": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    # Compilers for chips that are absent: of jax's own version, without any CUDA library. For GPUs
    # cuda13 and cuda12 have them, too.
    "plan": ["jax[cuda13-local]", "jax[tpu]"],
    "tpu": ["jax[tpu]"],
    # By which JAX finds the processes of a job of Kubernetes.
    "k8s": ["jax[k8s]"],
}

setup(
    name="esm1nv_jax",
    version=VERSION,
    description="Pretrain, average, evaluate and serve ESM-1nv, a protein language model, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["esm1nv_jax", "esm1nv_jax.*"]),
        # Found by name, `--config=quickstart`, from outside a clone.
        "esm1nv_jax.configs",
        "esm1nv_jax.configs.ablations",
    ],
    package_dir={"esm1nv_jax.configs": "configs"},
    package_data={"esm1nv_jax.data": ["sample/*.fasta.gz"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "ml-collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "array_record>=0.8.6",
        "absl-py>=2.3",
        "PyYAML>=6",
        "protobuf>=5",
        "etils[epath]>=1.12",
        "numpy>=2.0",
        "rich>=14",
        "tensorboardX>=2.6.4",
        "matplotlib>=3.9",
        "safetensors>=0.5",
        "isal>=1.7",
        "backports.zstd>=1.0; python_version < '3.14'",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["esm1nv=esm1nv_jax.cli:main"]},
)
