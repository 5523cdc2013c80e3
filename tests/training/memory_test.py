"""The lower bound of a step's memory, compared with what XLA allocates for it."""

import jax
import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.training import sharding
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.step import abstract_batch, abstract_state, jit_steps, least_memory


@pytest.mark.integration
@pytest.mark.parametrize("changes", [{}, {"compute.remat": "block", "batch.microbatches": 2}])
def test_the_bound_is_below_what_the_compiler_allocates_and_not_far(changes):
    config = config_file.load("tests/configs/tiny.py").unlock()
    config.update_from_flattened_dict({"model.width": 64, "model.ffn": 256} | changes)
    mesh = sharding.make_mesh(jax.devices("cpu")[:1])
    step_config = RunConfig.from_config_dict(config).step_config(mesh.devices.flat[0])
    shapes = abstract_state(step_config, mesh), abstract_batch(step_config, mesh, 32, 64)
    stats = jit_steps(step_config, mesh)[0].lower(*shapes).compile().memory_analysis()
    allocated = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    assert allocated / 20 < sum(least_memory(step_config, 32, 64)) < allocated


def test_parameters_of_the_full_model():
    config = RunConfig.from_config_dict(config_file.load("pretrain_small"))
    parameters, _ = least_memory(config.step_config(jax.devices("cpu")[0]), 1, 1152)
    assert 0.95 * 16 * 44_007_296 < parameters < 16 * 44_007_296
