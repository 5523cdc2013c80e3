"""The Python API against the encoder written again in NumPy, one sequence at a time."""

import concurrent.futures
import dataclasses
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from Bio.Seq import MutableSeq, Seq
from Bio.SeqRecord import SeqRecord

import esm1nv_jax
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import engine
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.row_shapes import split_into_windows
from esm1nv_jax.model import encoder
from tests.inference.models import make_proteins
from tests.model import reference
from tests.model.parameters import random_parameters


def literal(model, sequence, layer=-1):
    """(hidden states of the residues, of `<s>`, logits): one sequence, no padding, NumPy, fp64."""
    ids = sequence if isinstance(sequence, np.ndarray) else tokenizer.encode(sequence)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    hidden, logits = reference.forward(params, ids, model.config.heads)
    return hidden[layer][1:-1], hidden[layer][0], logits[1:-1]


@pytest.mark.parametrize("layer,deterministic", [(-1, False), (1, False), (-1, True)])
def test_embeddings_equal_those_of_each_protein_alone(model, layer, deterministic):
    sequences = [s for _, s in make_proteins(40)]
    found = model.embed(sequences, layer=layer, deterministic=deterministic)
    for i, sequence in enumerate(sequences):
        hidden, start, _ = literal(model, sequence, layer)
        assert found.per_residue[i].shape == (len(sequence), model.config.width)
        np.testing.assert_allclose(found.per_residue[i], hidden, atol=1e-5)
        np.testing.assert_allclose(found.mean[i], hidden.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.cls[i], start, atol=1e-5)


def test_logits_equal_those_of_each_protein_alone(model):
    sequences = [s for _, s in make_proteins(12)]
    for sequence, logits in zip(sequences, model.logits(sequences), strict=True):
        np.testing.assert_allclose(logits, literal(model, sequence)[2], atol=2e-5)


def test_a_long_protein_is_stitched_from_windows(model):
    sequence = "".join(s for _, s in make_proteins(9, seed=4))
    found = model.embed(["MKV", sequence], layer=-1)
    pieces = [
        literal(model, sequence[w.start : w.stop])[0][w.first - w.start : w.last - w.start]
        for w in split_into_windows(len(sequence), model.longest)
    ]
    assert len(pieces) > 3
    expected = np.concatenate(pieces)
    np.testing.assert_allclose(found.per_residue[1], expected, atol=1e-5)
    np.testing.assert_allclose(found.mean[1], expected.mean(axis=0), atol=1e-5)
    start = literal(model, sequence[: model.longest])[1]
    np.testing.assert_allclose(found.cls[1], start, atol=1e-5)


def test_deterministic_bits_do_not_depend_on_order_or_neighbours(model):
    sequences = [s for _, s in make_proteins(60, longest=150)]
    everything = model.embed(sequences, deterministic=True)
    order = np.random.default_rng(1).permutation(60)[:37]
    some = model.embed([sequences[i] for i in order], deterministic=True)
    for k, i in enumerate(order):
        assert some.per_residue[k].tobytes() == everything.per_residue[i].tobytes()
        assert some.mean[k].tobytes() == everything.mean[i].tobytes()


def test_deterministic_bits_do_not_depend_on_the_number_of_devices(model):
    """Rows spread over devices, for which attention is that of accelerators."""
    ids = [tokenizer.residue_ids(s.encode()) for _, s in make_proteins(50, longest=150)]
    found = []
    for n in (1, 2, 8):
        on_devices = model.to_devices(jax.local_devices()[:n])
        on_devices = dataclasses.replace(
            on_devices, compute=dataclasses.replace(on_devices.compute, attention="auto")
        )
        assert len(on_devices.params["token_embedding"]["embedding"].sharding.device_set) == n
        found.append(
            embed_sequences(on_devices, ids, OutputSpec(), model.longest, deterministic=True)
        )
    for other in found[1:]:
        for name, value in other.items():
            assert value.tobytes() == found[0][name].tobytes()
    np.testing.assert_allclose(
        found[0]["mean_-1"], model.embed([tokenizer.decode(i) for i in ids]).mean, atol=1e-5
    )


def test_fewer_rows_change_rounding_alone_and_no_deterministic_bit(model, monkeypatch):
    ids = [tokenizer.residue_ids(s.encode()) for _, s in make_proteins(4, longest=150)]
    outputs, usual = OutputSpec(("mean", "per_residue", "cls")), model.on_devices
    shapes = dataclasses.replace(usual.shapes, compile_tokens=1)
    fewer, computed, forward = dataclasses.replace(usual, shapes=shapes), [], engine.forward

    def counted(params, batch, *args):
        computed.append(batch["tokens_BT"].size)
        return forward(params, batch, *args)

    monkeypatch.setattr(engine, "forward", counted)
    for deterministic in (False, True):
        expected = embed_sequences(usual, ids, outputs, model.longest, deterministic)
        before, computed = sum(computed), []
        found = embed_sequences(fewer, ids, outputs, model.longest, deterministic)
        assert sum(computed) == before if deterministic else sum(computed) < 0.9 * before
        computed = []
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5)
            assert not deterministic or found[name].tobytes() == value.tobytes()


def test_accelerators_compute_the_same_in_one_program(model, monkeypatch):
    sequences = [sequence for _, sequence in make_proteins(4)]
    expected = model.embed(sequences)
    monkeypatch.setattr(engine, "forward", engine.forward_at_once)
    np.testing.assert_allclose(model.embed(sequences).mean, expected.mean, atol=1e-5)


def test_one_row_a_residue_whatever_the_letters(model):
    found = model.embed(["mkv", "MKV", "MJ*-KV", "M<mask>V", "XBZUO"])
    assert [len(x) for x in found.per_residue] == [3, 3, 5, 3, 5]  # the gap is no residue
    np.testing.assert_allclose(found.per_residue[0], found.per_residue[1], atol=1e-5)


def test_no_sequences_and_empty_ones(model):
    assert model.embed([]).mean.shape == (0, model.config.width)
    assert model.logits([]) == []
    with pytest.raises(UserError, match="sequence 1 is empty"):
        model.embed(["MK", " "])
    for layer in (3, 1.0, True, "1", None):
        with pytest.raises(UserError, match=f"layer {layer!r} is unknown"):
            model.embed(["MK"], layer=layer)
    with pytest.raises(UserError, match="layer 9 is unknown"):
        model.apply(model.params, np.zeros((1, 4), np.int32), layers=(9,))


def test_what_is_no_list_of_texts_is_refused(model):
    class Frame(list):
        columns = ("id", "sequence")

    for given in (Frame(["id", "sequence"]), np.array("MK"), np.array([["MK"]])):
        with pytest.raises(UserError, match="give a list of texts, or one column"):
            model.embed(given)
    with pytest.raises(UserError, match="row 2: None is no text, such as A4G"):
        model.score_variants("MKV", ["K2R", None])
    with pytest.raises(UserError, match="top=0 must be at least 1"):
        model.fill_mask("M<mask>V", top=0)


def test_a_model_is_pickled_after_use_as_before(model):
    before = model.embed(["MKV"]).mean
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.embed(["MKV"]).mean, before)
    assert len(repr(model)) < 2000 and model != again and hash(model)


def test_one_text_is_no_list(model):
    for call in (model.embed, model.logits, lambda text: model.score_variants("MKV", text)):
        with pytest.raises(UserError, match="'M1A' is one text; give a list"):
            call("M1A")


def test_fill_mask_gives_probabilities_of_the_masked_residue(model):
    sequence = "MK<mask>VLR<mask>A"
    ids = tokenizer.encode("MKLVLRLA")
    ids[[3, 7]] = tokenizer.MASK
    logits = literal(model, ids)[2]
    found = model.fill_mask(sequence, top=20)
    assert [p.position for p in found] == [3, 7]
    for prediction in found:
        expected = reference.softmax(logits[prediction.position - 1, 5:25])
        assert abs(sum(p for _, p in prediction.residues) - 1) < 1e-5
        for letter, p in prediction.residues:
            assert abs(p - expected[tokenizer.RESIDUES.index(letter)]) < 1e-5
        assert [p for _, p in prediction.residues] == sorted(
            (p for _, p in prediction.residues), reverse=True
        )
    with pytest.raises(UserError, match="no <mask>"):
        model.fill_mask("MKV")


@pytest.mark.integration
def test_apply_works_under_jit_and_grad(model):
    ids = np.stack([tokenizer.encode("MKVLA"), tokenizer.encode("MRRLA")])
    out = jax.jit(lambda p, x: model.apply(p, x, layers=(-1,)).hidden[-1])(model.params, ids)
    np.testing.assert_allclose(out[1, 1:-1], model.embed(["MRRLA"]).per_residue[0], atol=1e-5)
    grads = jax.grad(lambda p: model.apply(p, ids).logits[..., 5].sum())(model.params)
    assert float(np.abs(grads["token_embedding"]["embedding"]).sum()) > 0


def test_threads_get_their_own_results(model):
    groups = [[s for _, s in make_proteins(6, seed=i)] for i in range(8)]
    alone = [model.embed(group) for group in groups]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model.embed, groups))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.mean, b.mean)


def test_bf16_is_near_fp32_and_is_not_fp32(model, model_path):
    sequences = [s for _, s in make_proteins(20)]
    rounded = esm1nv_jax.load(model_path, precision="bf16").embed(sequences)
    exact = model.embed(sequences)
    for a, b in zip(exact.per_residue, rounded.per_residue, strict=True):
        cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.99
    assert np.abs(exact.mean - rounded.mean).max() > 1e-4


def test_importing_the_package_imports_no_jax():
    code = "import esm1nv_jax, sys; assert 'jax' not in sys.modules; esm1nv_jax.load"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_no_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError):
            esm1nv_jax.load(str(path))
    with pytest.raises(UserError, match="fp32, bf16"):
        esm1nv_jax.load(str(tmp_path), precision="fp8")
    for path in ("", None, 3):
        with pytest.raises(UserError, match=f"checkpoint {path!r} is no path; give the folder of"):
            esm1nv_jax.load(path)


def test_the_same_parameters_in_another_architecture_are_another_model(model_path, tmp_path):
    """What one has computed is not taken for the work of the other."""
    weights, sequences = model_folder.read(model_path), ["MKTVRQ"]
    found = {}
    for name, change in (
        ("same", {}),
        ("training", {"dropout": 0.3, "attention_dropout": 0.2}),
        ("activation", {"ffn_activation": "gelu_erf"}),
        ("epsilon", {"norm_epsilon": 1e-2}),
        ("token_dropout", {"token_dropout": True}),
    ):
        config = dataclasses.replace(weights.model, **change)
        model_folder.write(str(tmp_path / name), dataclasses.replace(weights, model=config))
        other = esm1nv_jax.load(str(tmp_path / name))
        found[name] = other.digest, other.embed(sequences).mean
    for name, (digest, mean) in found.items():
        is_same = name in ("same", "training")
        assert (digest == found["same"][0]) == is_same == np.array_equal(mean, found["same"][1])


class Named(str):
    pass


def test_sequences_are_read_as_from_fasta(model):
    expected = model.embed(["MKTV"]).mean[0]
    for sequence in [
        "mk--tv",
        "MKTV**",
        " M K\tT\nV ",
        b"MKTV",
        bytearray(b"MK.TV"),
        Named("MKTV"),
    ]:
        found = model.embed([sequence])
        assert found.per_residue[0].shape[0] == 4
        np.testing.assert_allclose(found.mean[0], expected, atol=1e-6)
    assert model.embed(iter([Seq("MKTV"), SeqRecord(MutableSeq("MK-TV"), "a")])).mean.shape[0] == 2
    assert model.embed(np.array(["MKTV", "MA"])).mean.shape[0] == 2


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ("MK1TV", "sequence 1: character '1' at index 2 of"),
        ("MK[MASK]V", r"sequence 1: character '\[' at index 2 of"),
        ("<cls>MKTV<eos>", "sequence 1: character '<' at index 0 of"),
        ("M<mask>?", r"sequence 1: character '\?' at index 7 of"),
        ("MKÖV", "sequence 1: character '.xd6' at index 2 of"),
        (b"MK\xd6V", "sequence 1: character '.xd6' at index 2 of"),
        ("MK\x00V", r"sequence 1: character '.x00' at index 2 of"),
        ("", "sequence 1 is empty"),
        ("--*", "sequence 1 is empty"),
        (None, "sequence 1 is None, a NoneType"),
        (float("nan"), "sequence 1 is nan, a float"),
        (5, "sequence 1 is 5, a int"),
        (("a", "MKTV"), "sequence 1 is .*, a tuple"),
        (["MKTV"], "sequence 1 is .*, a list"),
    ],
)
def test_what_is_no_sequence_is_refused_with_its_index(model, sequence, expected):
    for call in (model.embed, model.logits):
        with pytest.raises(ValueError, match=expected):
            call(["MKTV", sequence])


@pytest.mark.parametrize(
    "sequences",
    [{"a": "MKTV"}, {"MKTV"}, Seq("MKTV"), SeqRecord(Seq("MKTV"), "a"), 5, None],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_list_is_refused(model, sequences):
    with pytest.raises(ValueError, match="give a list"):
        model.embed(sequences)


@pytest.mark.integration
def test_a_protein_of_thousands_of_residues_is_read_in_windows():
    """A row of 8,000 tokens would need gigabytes of attention scores."""
    config = encoder.EncoderConfig(layers=1, width=32, heads=16, ffn=32, positions=40_000)
    long = Model(config, random_parameters(config), {})
    assert 2_000 < long.longest < 4_200
    assert dataclasses.replace(long, max_residues=39_000).longest == 39_000
    found = long.embed(["MKTVRQERLK" * 800])
    assert found.per_residue[0].shape == (8_000, 32)


def test_the_residues_read_at_once_can_be_chosen(model_path, model):
    short = esm1nv_jax.load(model_path, max_residues=20)
    assert short.longest == 20 and model.longest == 64
    np.testing.assert_allclose(
        short.embed(["MKTVRQERLKSIVRALGMKTVRQERLKSIVRALG"]).cls[0],
        model.embed(["MKTVRQERLKSIVRALGMKT"]).cls[0],
        atol=1e-5,
    )
    for wrong in (0, 65):
        with pytest.raises(UserError, match="66 positions; give 1 to 64"):
            esm1nv_jax.load(model_path, max_residues=wrong)


@pytest.mark.parametrize("name", ["parameters.safetensors", "model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(model_path, tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 31\n"
    folder = shutil.copytree(model_path, tmp_path / "model")
    (folder / name).write_bytes(pointer)
    if name == "model.safetensors":  # a folder of transformers
        (folder / "model.json").unlink()
        (folder / "config.json").write_text('{"model_type": "esm", "vocab_size": 33}')
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        esm1nv_jax.load(str(folder))
