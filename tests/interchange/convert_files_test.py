"""Folders of `transformers` that are read: every form of them, and every way to be wrong."""

import json
import os
import pickle

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import convert
from esm1nv_jax.interchange.loader import load_weights

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.interchange import witness  # noqa: E402


def change(path, edit):
    """Rewrites the weights of a folder."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


def leaves(path):
    return model_folder.flatten(load_weights(str(path)).params)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("kind", ["esm", "esm2", "bert"])
def test_older_and_other_files_give_the_same(kind, copy):
    """gamma and beta, tied copies, unread tensors, shards, pickles: as published files are."""
    path = copy(kind)
    whole = leaves(path)
    stem = "esm" if kind != "bert" else "bert"

    def older(tensors):
        for name in list(tensors):
            for new, old in (("weight", "gamma"), ("bias", "beta")):
                for have in (new, old):
                    if name.endswith(f"LayerNorm.{have}"):
                        tensors[name.removesuffix(have) + old] = tensors.pop(name)
        tensors[f"{stem}.embeddings.position_ids"] = torch.arange(9)[None]
        decoder = "lm_head.decoder.weight" if stem == "esm" else "cls.predictions.decoder.weight"
        tensors[decoder] = tensors[f"{stem}.embeddings.word_embeddings.weight"].clone()
        if kind == "esm2":
            angles = tensors.pop(next(n for n in tensors if n.endswith("inv_freq")))
            for i in range(3):
                name = f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
                tensors[name] = angles.clone()
            tensors["esm.embeddings.position_embeddings.weight"] = torch.ones(1026, 48)

    change(path, older)
    assert any(name.endswith("gamma") for name in load_file(path / "model.safetensors"))
    assert_same(leaves(path), whole)

    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(leaves(path), whole)
    (path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        load_weights(str(path))

    for file in (*parts, "model.safetensors.index.json"):
        (path / file).unlink(missing_ok=True)
    torch.save(tensors, path / "pytorch_model.bin")
    assert_same(leaves(path), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, copy):
    path = copy("esm")

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    change(path, halve)
    found = leaves(path)
    expected = load_file(path / "model.safetensors")["lm_head.dense.weight"].float().numpy().T
    np.testing.assert_array_equal(found["lm_head/dense/kernel"], expected)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}


class Bomb:
    """A pickle that runs a command when it is opened the careless way."""

    def __init__(self, witness_file):
        self.command = f"touch {witness_file}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_a_program_in_it_is_refused(copy, tmp_path, capsys):
    path = copy("esm")
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.bias": Bomb(tmp_path / "ran")}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors and is refused"):
        load_weights(str(path))
    bomb = pickle.dumps({"lm_head.bias": Bomb(tmp_path / "ran")})
    (path / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(UserError, match=r"refused|cannot be read"):
        load_weights(str(path))
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)  # it is a real one
    assert (tmp_path / "ran").exists()


def _pop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def _broken(name):
    return lambda tensors: tensors.update({name: tensors[name] / 0})


def _whole(name):
    return lambda tensors: tensors.update({name: tensors[name].to(torch.int32)})


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("esm", _pop("lm_head.dense.weight"), "lm_head.dense.weight is missing"),
        ("esm", _pop("esm.encoder.layer.2.output.dense.bias"), "layer.2.output.dense.bias is miss"),
        ("esm", _put("esm.encoder.layer.3.output.dense.bias", 48), "layer.3.*is unknown"),
        ("esm", _put("esm.embeddings.extra", 3), "esm.embeddings.extra is unknown"),
        ("esm", _put("lm_head.dense.weight", 48, 47), r"\(48, 47\), config.json means \(48, 48\)"),
        ("esm", _put("esm.embeddings.word_embeddings.weight", 29, 48), r"\(29, 48\).*\(30, 48\)"),
        ("esm", _put("lm_head.decoder.weight", 30, 48), "decoder.weight differs from"),
        ("esm", _whole("lm_head.dense.weight"), "lm_head.dense.weight is of dtype int32"),
        ("esm", _broken("esm.encoder.layer.1.output.dense.weight"), "blocks.*1.*fc2.* NaN"),
        ("esm2", _put("esm.rotary_embeddings.inv_freq", 6), "12 angles|6 angles"),
        ("bert", _pop("bert.embeddings.token_type_embeddings.weight"), "token_type.*missing"),
        ("bert", _put("bert.embeddings.token_type_embeddings.weight", 2, 47), r"of shape \(2, 47"),
        ("bert", _put("bert.embeddings.token_type_embeddings.weight", 0, 48), r"of shape \(0, 48"),
        ("bert", _put("cls.predictions.decoder.bias", 25), "decoder.bias differs from"),
    ],
)
def test_wrong_tensors_are_named(kind, edit, message, copy):
    path = copy(kind)
    change(path, edit)
    with pytest.raises(UserError, match=message) as error:
        load_weights(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("esm", {"model_type": "roberta"}, "model_type is 'roberta'; esm, bert"),
        ("esm", {"model_type": ["esm"]}, r"model_type is \['esm'\]"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key.*'absolute'"),
        ("esm", {"position_embedding_type": "relative_key_query"}, "relative_key_query"),
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("esm", {"is_folding_model": True}, "is_folding_model=True"),
        ("esm", {"hidden_size": None}, "hidden_size is missing"),
        ("esm", {"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ("esm", {"num_attention_heads": 5}, "heads=5 does not divide"),
        ("esm", {"pad_token_id": 1}, "pad_token_id is 1.*has id 3"),
        ("esm", {"mask_token_id": 9}, "mask_token_id is 9.*has id 4"),
        ("esm", {"vocab_size": 10**9}, "30 tokens, config.json says vocab_size=1000000000"),
        ("esm", {"architectures": "EsmForMaskedLM"}, "architectures is 'EsmForMaskedLM'"),
        ("esm", {"id2label": ["A", "B"]}, r"id2label is \['A', 'B'\]; it must be of type dict"),
        ("bert", {"num_hidden_layers": 10**6}, "tensors, too few for 1,000,000 layers"),
        ("esm", {"max_position_embeddings": 10**9}, r"config\.json means \(1000000000, 48\)"),
        ("esm", {"layer_norm_eps": float("nan")}, "norm_epsilon=nan must be above 0"),
        ("esm", {"vocab_size": 29}, "30 tokens, config.json says vocab_size=29"),
    ],
)
def test_wrong_fields_are_named(kind, fields, message, copy):
    path = copy(kind)
    witness.rewrite(path, **fields)
    with pytest.raises(UserError, match=message) as error:
        load_weights(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "prefix"), [("esm", "esm."), ("bert", "bert.")])
def test_an_encoder_without_a_masked_lm_head_is_called_one(kind, prefix, copy):
    path = copy(kind)
    name = f"{kind.capitalize()}Model"
    witness.rewrite(path, architectures=[name])
    load_weights(str(path))  # as its tensors are named, it has one
    tensors = load_file(path / "model.safetensors")
    bare = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(bare, path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} has no masked-LM head; read it by"):
        load_weights(str(path))


def test_wrong_folders_are_named(copy, tmp_path):
    path = copy("bert")
    vocabulary = path / "vocab.txt"
    text = vocabulary.read_text()
    for content, message in (
        (text.replace("W\n", "A\n"), "'A' twice"),
        (text.replace("W\n", "J\n"), "has no W"),
        (text.replace("[MASK]", "[M]"), "has no <mask>"),
    ):
        vocabulary.write_text(content)
        with pytest.raises(UserError, match=message):
            load_weights(str(path))
    vocabulary.unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.txt.*--voc"):
        load_weights(str(path))
    (tmp_path / "elsewhere.txt").write_text(text, encoding="utf-8-sig")
    assert convert.import_model(
        str(path), str(tmp_path / "m"), "hf", str(tmp_path / "elsewhere.txt")
    )
    (path / "model.safetensors").write_bytes(b"\x08" + 200 * b"\0")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights: neither model\.safetensors nor"):
        load_weights(str(path))
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no model"):
        load_weights(str(path))
    with pytest.raises(UserError, match="not a JSON object"):
        convert.import_model(str(path), str(tmp_path / "out"))
    (path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        convert.import_model(str(path), str(tmp_path / "out"))
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        convert.import_model(str(path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="does not exist"):
        convert.import_model(str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_without_a_token_take_part_in_the_softmax(copy):
    """Makers round vocab_size up; the probabilities there count those rows."""
    path = copy("esm")

    def widen(tensors):
        for name in ("esm.embeddings.word_embeddings.weight", "lm_head.bias"):
            tensors[name] = torch.cat([tensors[name], torch.ones(2, *tensors[name].shape[1:])])

    change(path, widen)
    witness.rewrite(path, vocab_size=32)
    weights = load_weights(str(path))
    assert weights.model.vocabulary.endswith("O <row_30> <row_31>")
    np.testing.assert_array_equal(weights.params["lm_head"]["bias"][29:33] == 1, [0, 1, 1, 0])


def test_known_vocabularies_need_no_file(copy):
    for kind in ("esm", "esm2"):
        path = copy(kind)
        with_file = leaves(path)
        (path / "vocab.txt").unlink()
        assert_same(leaves(path), with_file)
