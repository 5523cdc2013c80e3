"""`.nemo` files: the numbers of an independent model of Megatron, and every way to be wrong."""

import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import ESM1NV
from esm1nv_jax.interchange import convert, nemo
from esm1nv_jax.interchange.loader import load_weights
from tests.interchange.packed import TOKENS, differences, proteins

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")

from tests.interchange import megatron_witness as megatron  # noqa: E402

LAYER = "language_model.encoder.layers.1"


@pytest.mark.parametrize(
    ("fields", "prefix", "mode"),
    [
        ({}, "model.", "w:"),
        ({"megatron_legacy": True}, "model.module.", "w:gz"),
        ({"bias_gelu_fusion": False, "bert_binary_head": True}, "model.", "w:gz"),
    ],
)
def test_every_layer(fields, prefix, mode, tmp_path):
    """Both orders of query, key and value, both prefixes, with and without the second head."""
    model = megatron.make(**fields)
    path = megatron.save(tmp_path / "esm1nv.nemo", megatron.members(model, prefix), mode)
    out = str(tmp_path / "model")
    assert convert.main(["--from", "nemo", path, "--out", out]) == 0
    weights = load_weights(out)
    assert weights.model.vocabulary == ESM1NV
    assert weights.provenance["architecture"] == "MegatronBertModel"
    sequences = proteins(1, 50, 3, 40, 61, 1, masked=0.2)
    rows = [[sequences[0], sequences[3]], [sequences[1], sequences[2], sequences[4]]]
    worst = differences(megatron.run(model, sequences), weights, rows, 128, TOKENS)
    assert worst.max() < 1e-5, worst


def test_the_released_size_is_that_of_the_config_here(tmp_path):
    """44M parameters: names and shapes of the released model, as its config file has them."""
    fields = {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}
    fields |= {"ffn_hidden_size": 3072, "max_position_embeddings": 512}
    model = megatron.make(**fields)
    path = megatron.save(tmp_path / "m.nemo", megatron.members(model, dtype=torch.float16))
    weights = nemo.read(path)
    assert sum(p.numel() for p in model.parameters()) == sum(
        leaf.size for leaf in model_folder.flatten(weights.params).values()
    )
    half = model.language_model.encoder.layers[5].mlp.dense_4h_to_h.weight.half().float()
    np.testing.assert_array_equal(
        weights.params["blocks"]["5"]["fc2"]["kernel"], half.detach().numpy().T
    )


def test_an_imported_model_works_in_the_other_commands(tmp_path, capsys):
    path = megatron.save(tmp_path / "m.nemo", megatron.members(megatron.make()))
    with pytest.raises(UserError, match=r"esm1nv convert --from nemo \S+ --out MODEL"):
        load_weights(path)
    model = str(tmp_path / "model")
    convert.import_model(path, model, "nemo")
    with pytest.raises(UserError, match=r"gelu_tanh.*EsmForMaskedLM"):
        convert.to_hf(model, str(tmp_path / "hf"))
    assert "approximate: gelu_erf" in convert.to_hf(model, str(tmp_path / "hf"), True)
    assert load_weights(str(tmp_path / "hf")).provenance["converted_from"] == str(tmp_path / "hf")


class Bomb:
    def __init__(self, witness_file):
        self.command = f"touch {witness_file}"

    def __reduce__(self):
        return os.system, (self.command,)


def _config(**fields):
    def edit(files):
        model = megatron.make()
        text = megatron.yaml.safe_dump(model.config | fields)
        files["model_config.yaml"] = text.encode()

    return edit


def _tokenizer(**fields):
    return _config(tokenizer=megatron.CONFIG["tokenizer"] | fields)


def _state(edit_state):
    def edit(files):
        state = torch.load(io.BytesIO(files["model_weights.ckpt"]))
        edit_state(state)
        content = io.BytesIO()
        torch.save(state, content)
        files["model_weights.ckpt"] = content.getvalue()

    return edit


def _put(name, *shape):
    return _state(lambda state: state.update({f"model.{name}": torch.ones(*shape)}))


def _pop(name):
    return _state(lambda state: state.pop(f"model.{name}"))


def _member(name, content):
    return lambda files: files.update({name: content})


def _without(name):
    return lambda files: files.pop(name)


PIECES = "0123abcd_protein_sequence_sentencepiece.model"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_config(target="nemo.x.MegatronGPTModel"), "MegatronGPTModel'; there are ESM1nvModel"),
        (_config(position_embedding_type="rope"), "position_embedding_type='rope'"),
        (_config(tensor_model_parallel_size=2), "tensor_model_parallel_size=2"),
        (_config(mcore_bert=True), "mcore_bert=True"),
        (_config(kv_channels=64), "kv_channels=64"),
        (_config(num_layers=None), "num_layers is missing"),
        (_config(num_layers="six"), "num_layers is 'six'"),
        (_config(num_layers=4), r"layers\.3\.self_attention\.query_key_value\.weight is missing"),
        (_config(num_layers=2), r"layers\.2\.\S+ is unknown in MegatronBertModel"),
        (_config(ffn_hidden_size=95), r"\(48, 96\), model_config\.yaml means \(48, 95\)"),
        (_config(bert_binary_head=True), "tokentype_embeddings.weight is missing"),
        (_tokenizer(library="megatron"), "library='megatron'"),
        (_tokenizer(model=None), "tokenizer: model is missing"),
        (_tokenizer(model="nemo:other.model"), "no file other.model"),
        (_member("model_config.yaml", b"{"), "is not YAML"),
        (_member("model_config.yaml", b"- 1"), "not a table of fields"),
        (_member("model_config.yaml", b"!!python/object/apply:os.system ['x']"), "is not YAML"),
        (_member("model_config.yaml", b"a: &a [1]\nb: *a"), r"is not YAML \(it has aliases"),
        (_member("model_config.yaml", b"a: !!int ''"), "is not YAML"),
        (_member("model_config.yaml", b"a: !!bool x"), "is not YAML"),
        (_member("model_config.yaml", b"a: !!timestamp x"), "is not YAML"),
        (_config(num_layers=10**6), r"layers\.3\.\S+query_key_value\.weight is missing"),
        (_config(max_position_embeddings=10**9), r"model_config\.yaml means \(1000000000, 48\)"),
        (_config(hidden_size=10**10), "hidden_size is 10000000000, which no model has"),
        (_config(layernorm_epsilon=float("nan")), "norm_epsilon=nan must be above 0"),
        (_member("model_config.yaml", b"#" * 2**21), "more than the 1,048,576"),
        (_without("model_weights.ckpt"), "no file model_weights.ckpt"),
        (_without("model_config.yaml"), "no file model_config.yaml"),
        (_without(PIECES), f"no file {PIECES}"),
        (_member(PIECES, b"\x0a\xff"), "not a model of SentencePiece"),
        (_member(PIECES, megatron.sentencepiece(TOKENS[:20])), r"20 tokens\) has no Y, H"),
        (_member("model_weights.ckpt", b"0" * 2**25), "more than the"),
        (_member("model_weights.ckpt", b"PK\x03\x04"), "cannot be read"),
        (_put(f"{LAYER}.self_attention.query_key_value.bias", 143), r"\(143,\).*\(144,\)"),
        (
            _put("language_model.embedding.word_embeddings.weight", 29, 48),
            r"\(29, 48\).*\(30, 48\)",
        ),
        (_put("lm_head.bias", ()), r"lm_head\.bias has shape \(\)"),
        (_put("language_model.embedding.position_embeddings.weight", ()), r"has shape \(\)"),
        (_pop("lm_head.dense.bias"), "lm_head.dense.bias is missing"),
        (_put("lm_head.extra", 3), "lm_head.extra is unknown"),
        (_state(lambda state: state.update({"model.lm_head.bias": torch.ones(128) / 0})), "NaN"),
        (_state(lambda state: state.update({"n": 3})), "not a table of tensors"),
        (_state(lambda state: state.update({"n": Bomb("/dev/null/x")})), "is refused .*system"),
    ],
)
def test_wrong_files_are_one_line(edit, message, tmp_path):
    files = megatron.members(megatron.make())
    edit(files)
    path = megatron.save(tmp_path / "m.nemo", files)
    with pytest.raises(UserError, match=message) as error:
        nemo.read(path)
    assert "\n" not in str(error.value)


def test_what_is_no_archive_is_one_line(tmp_path):
    path, files = tmp_path / "m.nemo", megatron.members(megatron.make())
    plain, zipped = (
        Path(megatron.save(tmp_path / f"of_{mode[2:]}", files, mode)).read_bytes()
        for mode in ("w:", "w:gz")
    )
    damaged = bytearray(lzma.compress(plain))
    damaged[len(damaged) // 2] ^= 255
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for data, message in (
        (b"", "cannot be read as a .nemo file"),
        (b"x" * 4096, "cannot be read as a .nemo file"),
        (pointer, "Git LFS pointer"),
        (zipped[:200], "cannot be read as a .nemo file"),
        (zipped[: len(zipped) // 2], "cannot be read as a .nemo file|truncated"),
        (plain[: len(plain) // 2], "cannot be read as a .nemo file"),
        (damaged, "cannot be read as a .nemo file"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            nemo.read(str(path))
        assert "\n" not in str(error.value)


def test_headers_do_not_fill_the_memory(tmp_path):
    """`tarfile` keeps all members it has met and reads headers whole; a gzip of both is small."""
    path = str(tmp_path / "m.nemo")
    with gzip.open(path, "wb", 1) as file:
        file.write(tarfile.TarInfo("a").tobuf() * (nemo.MAX_MEMBERS + 1))
    with pytest.raises(UserError, match="more than 10,000 members"):
        nemo.read(path)
    for kind, size in ((tarfile.XHDTYPE, 2**21), (tarfile.GNUTYPE_LONGNAME, 2**40)):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, size
        Path(path).write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**21))
        with pytest.raises(tarfile.ReadError, match="a header of"):
            tarfile.open(path, tarinfo=nemo._Member)  # noqa: SIM115  # it does not open
        with pytest.raises(UserError, match=r"cannot be read as a \.nemo file"):
            nemo.read(path)


def test_zeros_do_not_fill_the_memory(tmp_path):
    files = megatron.members(megatron.make())
    _config(hidden_size=2**20)(files)
    files["model_weights.ckpt"] = bytes(2**26)
    path = megatron.save(tmp_path / "m.nemo", files, "w:gz")
    with pytest.raises(UserError, match=r"model_weights\.ckpt has 67,108,864 bytes, more than the"):
        nemo.read(path)


def test_names_and_links_lead_nowhere(tmp_path):
    """A member that is a link, or whose name leaves the archive, is not followed."""
    (tmp_path / "secret").write_bytes(b"num_layers: 1")
    with tarfile.open(tmp_path / "m.nemo", "w") as archive:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
        outside = tarfile.TarInfo("../outside")
        outside.size = 3
        archive.addfile(outside, io.BytesIO(b"abc"))
    with pytest.raises(UserError, match=r"no file model_config\.yaml"):
        nemo.read(str(tmp_path / "m.nemo"))
    assert not (tmp_path.parent / "outside").exists()


def test_reading_does_not_import_torch(tmp_path):
    path = megatron.save(tmp_path / "m.nemo", megatron.members(megatron.make()))
    program = (
        f"import sys\nfrom esm1nv_jax.interchange import nemo\nnemo.read({path!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
