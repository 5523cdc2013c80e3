"""Meta's `.pt` files: every layer and the logits of `fair-esm`, and every way to be wrong."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax import load
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import convert, fair_esm
from esm1nv_jax.interchange.loader import load_weights
from tests.interchange.packed import differences, proteins

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
esm = pytest.importorskip("esm", reason="pip install -e '.[interchange-test]'")

SIZES = {"layers": 3, "embed_dim": 48, "ffn_embed_dim": 192, "attention_heads": 4}
NAMES = {"esm1": "esm1_t3", "esm1b": "esm1b_t3", "esm1v": "esm1v_t3", "esm2": "esm2_t3"}


def build(kind: str):
    """A model of the package, in which no parameter is at its neutral value."""
    torch.manual_seed(0)
    if kind == "esm2":
        model = esm.ESM2(3, 48, 4, "ESM-1b", token_dropout=True)
    elif kind == "esm1":
        args = argparse.Namespace(arch="protein_bert_base", final_bias=True, **SIZES)
        model = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1"))
    else:
        args = argparse.Namespace(arch="roberta_large", max_positions=130, token_dropout=True)
        vars(args).update(SIZES, emb_layer_norm_before=kind == "esm1b")
        model = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1b"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.5 * parameter + 0.05 * torch.randn_like(parameter))
            if name.endswith("bias_k") or name.endswith("bias_v"):
                parameter.copy_(torch.randn_like(parameter))  # else they hardly matter
    return model.eval()


def content(kind: str) -> dict:
    """What a released file holds: the package's loader takes the prefixes off."""
    model = build(kind)
    outer, inner = "encoder", "encoder.sentence_encoder"
    if kind == "esm1":
        outer = inner = "decoder"
    state = {
        (f"{outer}.{k}" if k.startswith("lm_head") else f"{inner}.{k}"): v
        for k, v in model.state_dict().items()
        if not k.startswith("contact_head")
    }
    sizes = {f"{outer}_{k}": v for k, v in SIZES.items()}
    if kind == "esm2":
        cfg = argparse.Namespace(token_dropout=True, **sizes)
        return {"args": None, "cfg": {"model": cfg, "task": {"_name": "x"}}, "model": state}
    arch = "protein_bert_base" if kind == "esm1" else "roberta_large"
    args = argparse.Namespace(arch=arch, dropout=0.0, **sizes)
    if kind == "esm1":
        args.final_bias = True
    else:
        args.max_positions, args.token_dropout = 130, True
    return {"args": args, "model": state, "extra_state": {"epoch": 3}}


def save(kind: str, folder, edit=lambda data: None) -> str:
    data = content(kind)
    edit(data)
    path = folder / f"{NAMES[kind]}.pt"
    torch.save(data, path)
    return str(path)


def run(kind: str, path: str, sequences):
    """{sequence: (representations of every layer, logits)}, by the package, from the file.

    ESM-1 reads no end token, so that it has one position less.
    """
    data = torch.load(path, weights_only=False)
    contacts = {"contact_head.regression.weight": torch.zeros(1, 12)}
    contacts["contact_head.regression.bias"] = torch.zeros(1)
    regression = None if kind == "esm1v" else {"model": contacts}
    model, alphabet = esm.pretrained.load_model_and_alphabet_core(NAMES[kind], data, regression)
    named = [("", s.replace("_", "<mask>")) for s in sequences]
    _, _, ids = alphabet.get_batch_converter()(named)
    with torch.no_grad():
        out = model.eval()(ids, repr_layers=range(4))
    found = {}
    for i, sequence in enumerate(sequences):
        length = len(sequence) + 1 + alphabet.append_eos
        hidden = [out["representations"][layer][i, :length].numpy() for layer in range(4)]
        found[sequence] = hidden, out["logits"][i, :length].numpy()
    return found, alphabet.all_toks


@pytest.mark.parametrize("kind", NAMES)
def test_every_layer(kind, tmp_path):
    path, out = save(kind, tmp_path), str(tmp_path / "model")
    with pytest.raises(UserError, match=r"convert --from fair-esm \S+ --out MODEL"):
        load_weights(path)
    assert convert.main(["--from", "fair-esm", path, "--out", out]) == 0
    weights = load_weights(out)
    sequences = proteins(1, 50, 3, 40, 61, 1, masked=0.2)
    rows = [[sequences[0], sequences[3]], [sequences[1], sequences[2], sequences[4]]]
    there, tokens = run(kind, path, sequences)
    worst = differences(there, weights, rows, 128, tokens)
    assert worst.max() < 1e-5, worst


@pytest.mark.parametrize("kind", ["esm1", "esm1b", "esm2"])
def test_contacts_by_the_head_in_the_file_beside(kind, tmp_path):
    path = save(kind, tmp_path)
    names = "contact_head.regression.weight", "contact_head.regression.bias"
    values = torch.linspace(-20, 30, 12)[None], torch.tensor([-0.5])
    head = {"model": dict(zip(names, values, strict=True))}
    torch.save(head, path.replace(".pt", "-contact-regression.pt"))
    out = str(tmp_path / "model")
    convert.main(["--from", "fair-esm", path, "--out", out])
    data = torch.load(path, weights_only=False)
    there, alphabet = esm.pretrained.load_model_and_alphabet_core(NAMES[kind], data, head)
    [sequence] = proteins(1, 40)
    _, _, ids = alphabet.get_batch_converter()([("", sequence)])
    with torch.no_grad():
        expected = there.eval().predict_contacts(ids)[0].numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(load(out).contacts(sequence, "attention"), expected, atol=1e-5)


def test_esm1_at_far_positions(tmp_path):
    """Sines of angles in fp32: at position 1,000 these have errors of 6e-5 themselves."""
    path = save("esm1", tmp_path)
    sequences = proteins(2, 1000)
    there, tokens = run("esm1", path, sequences)
    worst = differences(there, fair_esm.read(path), [sequences], 1002, tokens)
    assert worst.max() < 1e-4, worst


def test_the_published_size_of_esm1(tmp_path):
    """43M parameters: of esm1_t6_43M_UR50S, without its contact head."""
    torch.manual_seed(0)
    sizes = {"layers": 6, "embed_dim": 768, "ffn_embed_dim": 3072, "attention_heads": 12}
    args = argparse.Namespace(arch="protein_bert_base", final_bias=True, **sizes)
    model = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1"))
    state = {f"decoder.{k}": v for k, v in model.state_dict().items()}
    vars(args).update({f"decoder_{k}": v for k, v in sizes.items()})
    torch.save({"args": args, "model": state}, tmp_path / "esm1.pt")
    weights = fair_esm.read(str(tmp_path / "esm1.pt"))
    assert weights.model.width == 768
    assert weights.params["blocks"]["5"]["bias_kv"].shape == (2, 768)


@pytest.mark.parametrize("kind", ["esm1b", "esm2"])
def test_an_exact_export_is_the_same_model(kind, tmp_path):
    path, model = save(kind, tmp_path), str(tmp_path / "model")
    convert.import_model(path, model, "fair-esm")
    assert convert.to_hf(model, str(tmp_path / "hf")) == ""
    sequences = proteins(3, 30, 9, masked=0.1)
    there, tokens = run(kind, path, sequences)
    worst = differences(there, load_weights(str(tmp_path / "hf")), [sequences], 64, tokens)
    assert worst.max() < 1e-5, worst


def test_embeddings_and_scores_of_esm1_are_those_of_the_package(tmp_path):
    """ESM-1 reads no end token, and the commands here give every sequence one."""
    path, model = save("esm1", tmp_path), str(tmp_path / "model")
    convert.import_model(path, model, "fair-esm")
    sequences = ["MKTAYIAKQRQISFV", "GSHMLED", "M_TAYIAKQRQISFV"]
    there, tokens = run("esm1", path, sequences)
    opened = load(model)
    embedded = opened.embed(sequences[:2])
    for i, sequence in enumerate(sequences[:2]):
        expected = there[sequence][0][-1][1:]
        np.testing.assert_allclose(embedded.per_residue[i], expected, atol=1e-5)
        np.testing.assert_allclose(embedded.mean[i], expected.mean(0), atol=1e-5)
    logits = there[sequences[2]][1][2].astype(np.float64)
    expected = logits[tokens.index("W")] - logits[tokens.index("K")]
    np.testing.assert_allclose(opened.score_variants(sequences[0], ["K2W"]), [expected], atol=1e-5)


@pytest.mark.integration
def test_esm1_can_be_fine_tuned_and_evaluated(tmp_path):
    """By the command lines: what is trained is read back, and predicts."""
    model, csv, run_dir = str(tmp_path / "model"), tmp_path / "labels.csv", tmp_path / "run"
    convert.import_model(save("esm1", tmp_path), model, "fair-esm")
    splits = ["train"] * 28 + ["valid"] * 6 + ["test"] * 6
    rows = zip(proteins(1, *[20] * 40), splits, strict=True)
    lines = ["sequence,label,split", *(f"{s},{s.count('A')},{split}" for s, split in rows)]
    csv.write_text("\n".join(lines))
    fasta, out = tmp_path / "some.fasta", tmp_path / "out.csv"
    fasta.write_text(">a\nMKTAYIAKQR\n")
    for command in (
        f"evaluate --checkpoint {model} --fasta {fasta}",
        f"finetune --checkpoint {model} --csv {csv} --task protein_regression --epochs 1 --batch 8 "
        f"--out {run_dir}",
        f"predict --checkpoint {run_dir} --fasta {fasta} --out {out}",
    ):
        argv = [sys.executable, "-m", "esm1nv_jax", *command.split()]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 2


def test_esm1_has_no_equal_in_transformers(tmp_path):
    convert.import_model(save("esm1", tmp_path), str(tmp_path / "model"), "fair-esm")
    with pytest.raises(UserError, match=r"bias_kv=True, model\.bare_head=True cannot"):
        convert.to_hf(str(tmp_path / "model"), str(tmp_path / "hf"), approximate=True)


class Bomb:
    def __reduce__(self):
        return os.system, ("exit",)


def _state(edit):
    return lambda data: edit(data["model"])


def _pop(name):
    return _state(lambda state: state.pop(name))


def _put(name, *shape):
    return _state(lambda state: state.update({name: torch.ones(*shape)}))


def _args(**fields):
    return lambda data: vars(data["args"]).update(fields)


ONE, TWO = "decoder.layers.1.self_attn", "encoder.sentence_encoder.layers.1.self_attn"


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("esm1b", _args(arch="msa_transformer"), "arch is 'msa_transformer'; there are protein_b"),
        ("esm1b", _args(arch=["x"]), r"arch is \['x'\]; there are"),
        ("esm1", _args(max_positions=10**8), "max_positions is 100,000,000; it may be at most"),
        ("esm1", _args(decoder_embed_dim=2**29), r"embed_tokens\.weight has shape \(35, 48\)"),
        ("esm1b", _args(encoder_layers=10**6), "tensors, too few for 1,000,000 layers"),
        ("esm1b", _args(encoder_attention_heads=10**5000), "attention_heads is beyond"),
        ("esm1b", _args(encoder_layers="x"), "args: layers is 'x'; it must be of type int"),
        ("esm1b", _args(encoder_layers=2), r"layers\.2\.\S+ is unknown in ESM-1b with 2 layers"),
        ("esm1b", _args(encoder_layers=4), r"layers\.3\.\S+ is missing"),
        ("esm1b", _args(max_positions=99), r"embed_positions\.weight has shape \(132, 48\)"),
        ("esm1b", lambda data: data.pop("args"), r"neither args\.arch nor cfg\.model"),
        ("esm1b", lambda data: data.pop("model"), "no table of tensors under `model`"),
        ("esm1b", lambda data: data["model"].update(n=1), "no table of tensors under `model`"),
        ("esm1b", lambda data: data.update(bomb=Bomb()), r"refused \(it names posix\.system\)"),
        ("esm1b", _put("encoder.lm_head.weight", 33, 48), "lm_head.weight differs from embed_tok"),
        ("esm2", lambda data: data["cfg"].pop("model"), r"neither args\.arch nor cfg\.model"),
        ("esm2", _pop(f"{TWO}.k_proj.bias"), r"layers\.1\.self_attn\.k_proj\.bias is missing"),
        ("esm2", _put(f"{TWO}.q_proj.weight", 48, 47), r"q_proj\.weight has shape \(48, 47\)"),
        ("esm2", _put(f"{TWO}.rot_emb.inv_freq", 5), "must hold 6 angles"),
        ("esm2", _state(lambda s: [s.pop(k) for k in list(s) if "inv_freq" in k]), "no tensor rot"),
        (
            "esm1b",
            _put("encoder.sentence_encoder.embed_tokens.weight", ()),
            r"has shape \(\)|differs",
        ),
        ("esm1", _pop("decoder.embed_out"), r"embed_out\.weight is missing"),
        ("esm1", _pop(f"{ONE}.bias_k"), r"layers\.1\.self_attn\.bias_k is missing"),
        (
            "esm1",
            _put(f"{ONE}.bias_v", 1, 1, 47),
            r"bias_v has shape \(1, 1, 47\), args means \(1, 1, 48\)",
        ),
        ("esm1", _put("decoder.embed_tokens.weight", 33, 48), r"\(33, 48\), args means"),
        ("esm1", _state(lambda s: s[f"{ONE}.bias_v"].fill_(np.nan)), "blocks/1/bias_kv holds NaN"),
    ],
)
def test_wrong_files_are_one_line(kind, edit, message, tmp_path):
    path = save(kind, tmp_path, edit)
    with pytest.raises(UserError, match=message) as error:
        fair_esm.read(path)
    assert "\n" not in str(error.value) and path in str(error.value)


def test_what_is_no_such_file_is_one_line(tmp_path):
    path = tmp_path / "esm2.pt"
    whole = Path(save("esm2", tmp_path)).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for data, message in (
        (pointer, "Git LFS pointer"),
        (whole[:5000], "cannot be read"),
        (b"", "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(message)) as error:
            fair_esm.read(str(path))
        assert "\n" not in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="neither args"):
        fair_esm.read(str(path))
    with pytest.raises(UserError, match=r"give a \.pt file of fair-esm"):
        convert.import_model(str(tmp_path / "none.pt"), str(tmp_path / "out"), "fair-esm")
