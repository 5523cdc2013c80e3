"""What is read out of compiled programs, compared with programs whose figures are known."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.planning.chips import Chip, Efficiency
from esm1nv_jax.planning.hlo import Kernel, Program, size
from esm1nv_jax.planning.plan import compile_step
from esm1nv_jax.planning.roofline import Load, Step, attention_seconds, estimate, miscounted
from esm1nv_jax.training import sharding
from esm1nv_jax.training.run_config import RunConfig


def program(function, *shapes) -> Program:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def test_sizes_of_shapes():
    assert size("f32[3,5]{1,0}") == 60
    assert size("(bf16[8], (pred[4], s32[]))") == 16 + 4 + 4


def test_flops_and_bytes_of_a_product():
    result = program(lambda a, b: a @ b, (64, 256), (256, 32))
    assert sum(k.flops for k in result.kernels) == 2 * 64 * 256 * 32
    assert sum(k.bytes for k in result.of_kind("gemm")) == 4 * (64 * 256 + 256 * 32 + 64 * 32)


# As a live GPU prints a product that its autotuning gave to cuBLASLt.
CUBLAS = """
ENTRY %main (a: bf16[64,256], b: bf16[256,32]) -> bf16[64,32] {
  %a = bf16[64,256]{1,0} parameter(0)
  %b = bf16[256,32]{1,0} parameter(1)
  %c = (bf16[64,32]{1,0}, s8[0]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(train_step)/jit(shmap_body)/transpose(jvp(Encoder))/fc1/dot_general" \
source_file="/a/folder/with/a/rather/long/path/esm1nv_jax/model/kernels/matmul.py"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = bf16[64,32]{1,0} get-tuple-element(%c), index=0
}
"""


def test_a_product_of_cublas_is_one():
    (product,) = Program(CUBLAS).of_kind("gemm")
    assert product.flops == 2 * 64 * 256 * 32


OVERLAPPED = """
ENTRY %main (x: f32[1000]) -> f32[10] {
  %x = f32[1000]{0} parameter(0)
  %a = f32[1000]{0} multiply(%x, %x)
  %b = f32[1000]{0} all-reduce-start(%a), replica_groups={{0,1,2,3}}
  %c = f32[1000]{0} negate(%a)
  %d = f32[1000]{0} all-reduce-done(%b)
  %e = f32[1000]{0} add(%d, %d)
  %p = (f32[1000]{0}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%e)
  ROOT %f = f32[10]{0} slice(%e), slice={[0:10]}
}
"""
EXACT = Efficiency(1.0, 1.0, 1.0)
# A kernel of 8,000 bytes takes 1 s.
CHIP = Chip("c", "gpu", 1e3, 8e3, 1e9, EXACT, EXACT, "", link=1e3, network=250.0)
MODEL = EncoderConfig(layers=1, width=128, heads=2, ffn=64, positions=66)
LOAD = Load(4, 64, 200, 190, 5, 9_000, 30, tiles_forward=11_000, tiles_backward=13_000)


def test_an_operand_is_read_once_and_of_a_slice_its_part():
    kernels = {kernel.name: kernel.bytes for kernel in Program(OVERLAPPED).kernels}
    assert kernels == {"a": 8_000, "b": 4_000, "c": 8_000, "e": 8_000, "p": 8_000, "f": 80}


@pytest.mark.parametrize(("hosts", "per_host", "seconds"), [(1, 4, 6), (2, 2, 12), (1, 1, 0)])
def test_an_all_reduce_takes_what_no_kernel_hides(hosts, per_host, seconds):
    """A ring moves the array twice, all but the share of one device; `c` runs meanwhile."""
    step = Step(MODEL, "xla", 1, hosts, per_host)
    found = estimate(Program(OVERLAPPED), CHIP, EXACT, LOAD, step)
    assert found.exposed == pytest.approx(max(seconds - 1, 0))
    assert found.seconds == pytest.approx(4.01 + max(seconds - 1, 0))
    text = OVERLAPPED.replace("{{0,1,2,3}}", '{{0,1,2,3}}, backend_config={"is_sync":true}')
    found = estimate(Program(text), CHIP, EXACT, LOAD, step)
    assert found.exposed == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("backend", "name", "phase", "products", "scores"),
    [  # forward q k and p v; backward also dp, dv, dq, dk, and by some kernels some of it twice
        ("cudnn", "fmha", "forward", 2, 9_000),
        ("cudnn", "fmha", "backward", 5, 9_000),
        ("pallas", "flash_forward", "backward", 2, 11_000),
        ("pallas", "flash_backward", "backward", 7, 13_000),
        ("pallas_tpu", "flash_backward", "backward", 5, 13_000),
        ("splash", "splash_mha_dq_no_residuals", "backward", 3, 4 * 64**2),
        ("splash", "splash_mha_dkv_no_residuals", "backward", 4, 4 * 64**2),
    ],
)
def test_products_of_attention(backend, name, phase, products, scores):
    kernel = Kernel("k", "custom-call", "attention", phase, f"jit(f)/{name}/call", "", 0, 0, 0)
    found = attention_seconds(kernel, CHIP, LOAD, Step(MODEL, backend, 1, 1, 1))
    assert found == pytest.approx(scores * 2 * products * 2 * 64 / 1e3)
    three = Program(OVERLAPPED)
    three.kernels = [dataclasses.replace(kernel, times=3)]  # of four microbatches
    total = estimate(three, CHIP, EXACT, LOAD, Step(MODEL, backend, 4, 1, 1)).seconds
    assert total == pytest.approx(found * 3 / 4)


def looped_program():
    def looped(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=7)[0]

    return jax.jit(looped).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    assert sum(k.flops for k in Program(looped_program()).kernels) == 7 * 2 * 64**3


def test_a_loop_without_a_number_of_iterations_is_reported():
    text = re.sub(r'"known_trip_count":\{"n":"7"\}', '"known_trip_count":{}', looped_program())
    text = text.replace("direction=LT", "direction=NE")
    result = Program(text)
    assert len(result.uncounted_loops) == 1
    assert "iterations" in miscounted(result, useful=1.0, mfu=0.1)


def test_an_impossible_utilization_is_refused():
    result = Program(looped_program())
    assert "245%" in miscounted(result, useful=1.0, mfu=2.45)
    assert "fewer products" in miscounted(result, useful=8 * 2 * 64**3, mfu=0.5)
    assert miscounted(result, useful=7 * 2 * 64**3, mfu=0.5) == ""


# As TPUs print programs: products are convolutions, loops state no number of iterations, one
# instruction may take several lines, and S(1) is memory on the chip.
TPU = """\
%body (p.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.1, %one)
  %w.1 = bf16[4,4]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y.1 = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%x.1, %w.1), dim_labels=bf_io->bf
  ROOT %t.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%next, %y.1)
}

%condition (p.2: (s32[], bf16[8,4])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %limit = s32[]{:T(128)} constant(26)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%three)
  %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) while(%t), condition=%condition, body=%body
  %splash = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} custom-call(%x), frontend_attributes={metadata={
"blocks":"128"
}}, metadata={op_name="jit(f)/jvp(splash)/splash_mha_fwd"}
  ROOT %sum = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%splash), replica_groups={{0,1}}
}
"""


def test_a_tpu_program_is_counted_whole():
    result = Program(TPU)
    assert result.uncounted_loops == []
    (product,) = result.of_kind("gemm")
    assert (product.times, product.flops) == (23, 23 * 2 * 8 * 4 * 4)
    assert product.bytes == 23 * 2 * (8 * 4 + 8 * 4)  # the operand on the chip costs nothing
    (attention,) = result.of_kind("attention")
    assert attention.phase == "forward"
    (collective,) = result.of_kind("collective")
    assert collective.bytes == 2 * 8 * 4


DILATED = "window={size=2x3 lhs_dilate=2x3}, dim_labels=01bf_01io->01bf"
PADDED = "window={size=2x3 stride=2x3 pad=1_1x2_2 rhs_reversal=1x1}, dim_labels=01bf_01io->01bf"
GRADIENT = "window={size=2}, dim_labels=0fb_0io->bf0"


@pytest.mark.parametrize(
    "left, right, out, attributes, flops",
    [  # a batch of 2 x 3 products of [5, 7] and [7, 11]; a sum over two dimensions; a plain product
        ("2,3,5,7", "2,3,7,11", "2,3,5,11", DILATED, 2 * 6 * 5 * 7 * 11),
        ("2,3,5,7", "2,3,7,11", "2,3,5,11", PADDED, 2 * 6 * 5 * 7 * 11),
        ("2,5,7", "2,5,11", "7,11,1", GRADIENT, 2 * 2 * 5 * 7 * 11),
        ("2,5,7", "7,11,1", "2,5,11", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 10 * 7 * 11),
    ],
)
def test_products_written_as_convolutions(left, right, out, attributes, flops):
    text = (
        f"ENTRY %main () -> f32[{out}] {{\n  %a = f32[{left}] parameter(0)\n"
        f"  %b = f32[{right}] parameter(1)\n"
        f"  ROOT %c = f32[{out}] convolution(%a, %b), {attributes}\n}}\n"
    )
    assert sum(k.flops for k in Program(text).kernels) == flops


@functools.cache
def tiny_step(microbatches=1) -> tuple[Program, int]:
    """The training step on 8 devices, and the bytes of its gradients in fp32."""
    config = config_file.load("tests/configs/tiny.py")
    with config.unlocked():
        config.batch.update(rows=16, microbatches=microbatches)
    mesh = sharding.make_mesh(jax.devices("cpu")[:8])
    settings = RunConfig.from_config_dict(config).step_config(mesh.devices.flat[0])
    state, compiled, _ = compile_step(settings, mesh, 16, config.data.row_length)
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    return Program(compiled.as_text()), parameters


@pytest.mark.integration
@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_step_reduces_each_gradient_once_and_gathers_nothing(microbatches):
    step, parameters = tiny_step(microbatches)
    collectives = step.of_kind("collective")
    assert {k.opcode.removesuffix("-start") for k in collectives} == {"all-reduce"}
    assert "bf16" not in " ".join(k.shape for k in collectives)
    total = sum(k.bytes for k in collectives)
    assert parameters <= total <= parameters + 1024  # and some scalars


def test_a_gather_would_be_seen():
    """What the test above relies on: rows that every device needs are an all-gather."""
    mesh = sharding.make_mesh(jax.devices("cpu")[:8])
    spread, whole = (sharding.sharding(mesh, kind) for kind in ("batch", "state"))
    function = jax.jit(lambda x: x * 2, in_shardings=spread, out_shardings=whole)
    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=spread)
    result = Program(function.lower(x).compile().as_text())
    assert [k.opcode for k in result.of_kind("collective")] == ["all-gather"]
