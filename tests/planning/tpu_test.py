"""Flash attention inside the training step, compiled for TPUs that are not here."""

import importlib.util

import pytest

from tests.planning.run_plan import plan

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
    ),
]
SMALL = "--config=configs/pretrain_small.py:width=128,layers=1,max_length=254"


@pytest.mark.parametrize("chip", ["tpu-v5e", "tpu-v6e", "tpu-v7"])
def test_the_step_of_packed_rows_with_dropout_compiles(chip):
    result = plan(SMALL, f"--chip={chip}", "--devices-per-host=8", "--config.batch.rows=64")
    assert result["attention"] == "pallas_tpu" and result["fits"]
    kernels = {(k["phase"], k["kind"]): k["kernels"] for k in result["kernels"]}
    assert kernels["forward", "attention"] == kernels["backward", "attention"] == 1
    assert {(c["kind"], c["dtype"]) for c in result["collectives"]} == {("all-reduce", "f32")}
    assert 0 < result["mfu"] < 1 and not result["miscounted"]


def test_memory_is_linear_in_the_length_of_rows():
    """Of as many tokens in rows of 512 and of 4,096: eight times the scores."""
    needed = []
    for length in (512, 4096):
        changes = [f"--config.data.row_length={length}", f"--config.batch.rows={2**14 // length}"]
        result = plan(SMALL, "--chip=tpu-v5e", *changes)
        assert result["attention"] == "pallas_tpu"
        needed.append(result["memory"]["activations"] + result["memory"]["temporaries"])
    assert needed[1] < 1.2 * needed[0]
