"""Every backend that a CPU can run against NumPy in fp64; who may be used where."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import attention
from esm1nv_jax.model.kernels import flash_gpu
from esm1nv_jax.model.kernels.flash_gpu import Blocks, flash_attention, visited_blocks
from tests.model import attention_reference as reference
from tests.model.compiling import UNOPTIMIZED, inexact_products

B, T, N, H = 4, 140, 2, 16
ROW_KEYS = np.array([7, 123456789, 2**32 - 1, 0], np.uint32)
SMALL = Blocks(queries=64, keys=32, backward=32)
UNEVEN = Blocks(queries=32, keys=64, backward=64)


def segments(*rows: list[int], length=T) -> np.ndarray:
    """Rows of segments of the lengths given, numbered from 1, padded with 0."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        filled = np.repeat(np.arange(len(lengths)) + 1, lengths)
        row[: len(filled)] = filled
    return ids


# Ragged with one-token segments; one that fills the row; nothing but padding; an odd number.
LAYOUT = segments([50, 1, 1, 67, 3], [T], [], [1] * 33 + [66])


def inputs(seed=0, shape=(B, T, 3, N, H)):
    random = np.random.default_rng(seed)
    return (
        random.normal(size=shape).astype(np.float32),
        random.normal(size=(*shape[:2], *shape[3:])).astype(np.float32),
    )


def run(name, qkv, ids, g, rate=0.0, keys=ROW_KEYS):
    """Output and gradient of a backend, in NumPy."""
    keys = jnp.asarray(keys[: len(qkv)]) if rate else None
    return tuple(np.asarray(x) for x in compiled(name, rate)(qkv, jnp.asarray(ids), g, keys))


@functools.cache
def compiled(name, rate):
    """One program for all layouts of a shape."""
    options = {} if name == "xla" else UNOPTIMIZED

    @functools.partial(jax.jit, compiler_options=options)
    def both(qkv, ids, g, keys):
        if name == "xla":
            arguments = {"dtype": jnp.float32}
            function = attention.attention
        else:
            blocks = {"pallas": SMALL, "pallas uneven": UNEVEN}[name]
            arguments = {"blocks": blocks, "interpret": True}
            function = flash_attention
        out, pull = jax.vjp(
            functools.partial(
                function, segment_ids_BT=ids, rate=rate, row_keys_B=keys, **arguments
            ),
            qkv,
        )
        return out, pull(g)[0]

    return both


BACKENDS = ("xla", "pallas", "pallas uneven")


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients_equal_the_reference(name, rate):
    qkv, g = inputs()
    expected = reference.attention(qkv, LAYOUT, g, rate, ROW_KEYS)
    for found, right in zip(run(name, qkv, LAYOUT, g, rate), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=5e-6)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_products_in_fp32_ask_for_fp32(name):
    qkv, g = inputs()
    assert not inexact_products(compiled(name, 0.3).lower(qkv, LAYOUT, g, ROW_KEYS))


def test_heads_of_other_sizes():
    """24 as in ESM-2 35M: zeros fill a head, and its scores are divided by the root of 24."""
    qkv, g = inputs(6, (1, 60, 3, N, 24))
    ids = segments([20, 33], length=60)
    expected = reference.attention(qkv, ids, g, 0.3, ROW_KEYS)
    for found, right in zip(run("pallas", qkv, ids, g, 0.3), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=5e-6)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_what_is_dropped_is_that_of_the_reference_bit_by_bit(name):
    """Of equal probabilities, with unit vectors for values and for the gradient."""
    length, size = 60, 64
    qkv = np.zeros((1, length, 3, N, size), np.float32)
    qkv[0, :, 2] = np.eye(length, size)[:, None]
    out, grad = run(name, qkv, segments([length], length=length), qkv[:, :, 2], 0.3)
    at = np.arange(length)
    for n in range(N):
        kept = reference.kept(ROW_KEYS[0], n, at[:, None], at[None], length, 0.3)
        np.testing.assert_array_equal(out[0, :, n, :length] != 0, kept)
        np.testing.assert_array_equal(grad[0, :, 2, n, :length].T != 0, kept)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_padding_gives_nothing_and_gets_no_gradient(name):
    qkv, g = inputs()
    qkv[LAYOUT == 0] = 1e4  # whatever stands there
    for found in run(name, qkv, LAYOUT, g, 0.3):
        assert np.all(np.isfinite(found))
        assert np.all(found[LAYOUT == 0] == 0)


@pytest.mark.parametrize(
    "name", [BACKENDS[0], pytest.param(BACKENDS[1], marks=pytest.mark.integration)]
)
def test_neighbours_change_nothing_bitwise(name):
    """The second of three segments, with other neighbours, with neighbours of other lengths."""
    (qkv, g), (others, _) = inputs(1), inputs(2)
    middle = slice(40, 100)
    layouts = [segments([40, 60, 40]), segments([40, 60, 7]), segments([3, 30, 7, 60, 20])]
    found = []
    for layout, around in zip(layouts, (qkv, others, others), strict=True):
        around, weight = around[:1].copy(), g[:1].copy()
        around[:, middle] = qkv[:1, middle]
        found.append([x[:, middle] for x in run(name, around, layout, weight, 0.3)])
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("length", [1, 65])
def test_rows_of_any_length(length):
    qkv, g = inputs(3, (1, length, 3, 1, H))
    ids = segments([length], length=length)
    expected = reference.attention(qkv, ids, g, 0.1, ROW_KEYS)
    for found, right in zip(run("pallas", qkv, ids, g, 0.1), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=5e-6)


def test_ids_in_any_order():
    """Blocks are skipped by ranges of ids; ids that do not ascend must still be right."""
    qkv, g = inputs(4)
    ids = np.random.default_rng(0).integers(0, 4, (B, T)).astype(np.int32) * 1000
    expected = reference.attention(qkv, ids, g, 0.3, ROW_KEYS)
    for found, right in zip(run("pallas", qkv, ids, g, 0.3), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=5e-6)


def test_bfloat16_is_as_near_as_its_rounding():
    qkv, g = inputs(5)
    expected = reference.attention(qkv, LAYOUT, g)
    for found, right in zip(
        run("pallas", jnp.asarray(qkv, jnp.bfloat16), LAYOUT, jnp.asarray(g, jnp.bfloat16)),
        expected,
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float64), right, atol=0.06)


def test_a_cpu_keeps_six_bytes_a_score():
    """The weights in fp32 and the dropped ones in bf16; of masks in fp32 it would be ten."""
    shape = (2, 256, 3, 4, 16)

    def temporary_bytes(layers):
        def loss(qkv):
            x = qkv
            for layer in range(layers):
                keys = jnp.arange(2, dtype=jnp.uint32) + layer
                ids = jnp.ones(shape[:2], jnp.int32)
                x = qkv + attention.attention(x, ids, jnp.bfloat16, 0.1, keys)[:, :, None]
            return jnp.sum(x**2)

        lowered = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(shape, jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores = 2 * 4 * 256 * 256
    assert (temporary_bytes(4) - temporary_bytes(2)) / 2 / scores < 7


def test_only_blocks_that_share_a_segment_are_visited():
    ids = jnp.asarray(segments([64, 64, 100, 28], length=320))  # the last block is padding
    low, high = visited_blocks(ids, 64, 64)
    assert low.tolist() == [[0, 1, 2, 2, 0]]
    assert high.tolist() == [[1, 2, 4, 4, 0]]


def case(**changes):
    return attention.AttentionSpec(
        **{
            "platform": "gpu",
            "capability": 8.0,
            "dtype": "bfloat16",
            "packed": True,
            "rate": 0.1,
            "head_size": 64,
            "row_length": 1152,
        }
        | changes
    )


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({}, "pallas"),
        ({"packed": False}, "pallas"),  # dropout
        ({"packed": False, "rate": 0.0}, "cudnn"),
        ({"packed": False, "rate": 0.0, "row_length": 1151}, "pallas"),
        ({"rate": 0.0}, "pallas"),
        ({"dtype": "float32"}, "xla"),
        ({"capability": 7.5}, "xla"),
        ({"head_size": 24}, "pallas"),
        ({"head_size": 192}, "xla"),
        ({"platform": "cpu", "capability": 0}, "xla"),
    ],
)
def test_auto_takes_the_first_that_is_fit(changes, chosen):
    assert attention.select_backend("auto", case(**changes)) == chosen


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("cudnn", {"rate": 0.0}, "mix packed"),
        ("cudnn", {"packed": False}, "no attention dropout"),
        ("splash", {}, "runs on tpu"),
        ("splash", {"platform": "tpu"}, "no attention dropout"),
        ("pallas", {"platform": "cpu"}, "runs on gpu"),
        ("pallas", {"dtype": "float32"}, "bfloat16"),
        ("pallas", {"capability": 7.0}, "compute capability 8.0"),
        ("pallas_tpu", {}, "runs on tpu"),
        ("pallas_tpu", {"platform": "tpu", "row_length": 32768}, "at most 16384"),
        ("flash3", {}, "unknown"),
    ],
)
def test_what_is_not_fit_is_refused_by_name(name, changes, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        attention.select_backend(name, case(**changes))
    assert name in str(refusal.value) and "xla" in str(refusal.value)


def test_what_cudnn_leaves_in_padding_is_not_used(monkeypatch):
    """A stand-in that writes NaN wherever cuDNN promises nothing."""

    @jax.custom_vjp
    def mixed(q, k, v):
        return jnp.where(real, q + k + v, jnp.nan)

    mixed.defvjp(lambda *qkv: (mixed(*qkv), ()), lambda _, g: (jnp.where(real, g, jnp.nan),) * 3)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: mixed(q, k, v))
    ids = segments([5], [7], length=8)
    real = ids[..., None, None] > 0
    qkv = jnp.ones((2, 8, 3, 1, 16), jnp.bfloat16)
    function = functools.partial(attention.attention, dtype=jnp.bfloat16, backend="cudnn")
    out, pull = jax.vjp(lambda x: function(x, jnp.asarray(ids)), qkv)
    (grad,) = pull(jnp.ones_like(out))
    for found in (out, grad):
        assert np.all(np.isfinite(found)) and not np.any(np.asarray(found)[ids == 0])


def test_a_chip_that_was_measured_has_tiles_of_its_own(monkeypatch):
    """Through the public function, as a training step calls it."""
    measured = Blocks(queries=64, keys=32, backward=32, backward_warps=8)
    monkeypatch.setitem(flash_gpu.MEASURED, "a chip", measured)
    taken = []
    monkeypatch.setattr(flash_gpu, "flash_attention", lambda *args: taken.append(args[-1]))
    qkv, ids = jnp.zeros((1, 128, 3, 1, 64)), jnp.ones((1, 128), jnp.int32)
    for chip in ("a chip", "another", ""):
        attention.attention(qkv, ids, jnp.bfloat16, backend="pallas", chip=chip)
    assert taken == [measured, Blocks(), Blocks()]
    for blocks in flash_gpu.MEASURED.values():
        assert all(size in (16, 32, 64, 128, 256) for size in dataclasses.astuple(blocks)[:3])


def test_dropout_is_never_left_out_in_silence():
    qkv = jnp.zeros((1, 128, 3, 1, 64), jnp.bfloat16)
    ids = jnp.ones((1, 128), jnp.int32)
    for name in ("cudnn", "splash"):
        with pytest.raises(ValueError, match="dropout"):
            attention.attention(qkv, ids, jnp.bfloat16, 0.1, jnp.zeros(1, jnp.uint32), backend=name)
