"""The notebook runs top to bottom, on data of the package alone."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("sklearn")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "inference.ipynb"


def test_stored_outputs_are_of_a_run_from_top_to_bottom():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    """On the model of ESM1NV_QUICKSTART where there is one; else it trains the quickstart."""
    monkeypatch.setenv("ESM1NV_SCRATCH", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("ESM1NV_LOCALISATION", raising=False)
    if "ESM1NV_QUICKSTART" in os.environ:
        monkeypatch.setenv("ESM1NV_MODEL", os.environ["ESM1NV_QUICKSTART"])
    book = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(book, timeout=1800, resources=resources).execute()
    text = "".join(o.get("text", "") for c in book.cells if "outputs" in c for o in c.outputs)
    assert "mean embedding" in text and text.rstrip().endswith("minutes")
