"""Whole ways through the commands: a trained model out, real antibody weights in, ESM-2 on."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta, tokenizer
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

from tests.interchange import witness  # noqa: E402
from tests.interchange.convert_parity_test import differences  # noqa: E402
from tests.model.parameters import random_parameters  # noqa: E402

TRASTUZUMAB = [
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDT"
    "AVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQH"
    "YTTPPTFGQGTKVEIK",
]
SMALL_RUN = (
    "--config.data.max_residues=62",
    "--config.data.row_length=64",
    "--config.log.every=5",
    "--config.evaluation.sequences=20",
    "--config.evaluation.every=100",
    "--config.batch.rows=8",
)


def run(*argv):
    assert cli.dispatch([str(word) for word in argv]) in (0, None)


@pytest.mark.integration
def test_a_trained_model_opens_there(tmp_path):
    run(
        "train",
        "--config=configs/quickstart.py:hf,steps=12",
        f"--workdir={tmp_path / 'run'}",
        *SMALL_RUN,
        "--config.model.width=48",
        "--config.model.heads=4",
        "--config.model.ffn=96",
        "--config.optimizer.warmup=2",
    )
    run("convert", "--to", "hf", "--checkpoint", tmp_path / "run", "--out", tmp_path / "there")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "there").eval()
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    sequences = [s.decode()[:60] for _, s in list(fasta.sample())[:4]]
    assert there(sequences[0])["input_ids"] == tokenizer.encode(sequences[0]).tolist()
    masked = [s[:5] + "_" + s[6:20] + "_" + s[21:] for s in sequences]
    for name in ("run", "there"):
        weights = load_weights(str(tmp_path / name))
        rows = [masked[:2], masked[2:]]
        worst = differences(model, "esm", weights, masked, rows, 128)
        assert worst.max() < 1e-5, (name, worst)
    fresh = encoder.init(weights.model, 0)
    moved = np.abs(
        weights.params["blocks"]["0"]["qkv"]["kernel"] - fresh["blocks"]["0"]["qkv"]["kernel"]
    ).max()
    assert moved > 1e-3  # it was trained
    card = (tmp_path / "there" / "README.md").read_text()
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    last = [f for f in figures if f["kind"] == "validation"][-1]
    assert f"{last['perplexity_mask']:.3f}" in card
    assert "Step 12" in card

    run("convert", "--from", "hf", tmp_path / "there", "--out", tmp_path / "back")
    before, after = (load_weights(str(tmp_path / n)).params for n in ("run", "back"))
    before, after = model_folder.flatten(before), model_folder.flatten(after)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.integration
def test_esm2_is_trained_on(tmp_path):
    """The trainer goes on with an ESM-2, in its architecture and its vocabulary, and back."""
    witness.save(witness.make("esm2"), "esm2", tmp_path / "esm2")
    run("convert", "--from", "hf", tmp_path / "esm2", "--out", tmp_path / "model")
    run(
        "train",
        f"--config=configs/continue_from.py:model={tmp_path / 'model'},steps=40,batch=8",
        f"--workdir={tmp_path / 'run'}",
        *SMALL_RUN,
        "--config.optimizer.peak_lr=0.003",
        "--config.data.path=sample",
        "--config.compute.dtype=float32",
    )
    before, after = (load_weights(str(tmp_path / name)) for name in ("model", "run"))
    assert after.model == before.model
    assert after.model.vocabulary.split(" ") == list(witness.ESM2_TOKENS)
    np.testing.assert_array_equal(
        after.params["rotary_frequency"], before.params["rotary_frequency"]
    )
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    first, last = (f["perplexity_mask"] for f in figures if f["kind"] == "validation")
    assert last < 0.8 * first, (first, last)
    run("convert", "--to", "hf", tmp_path / "run", "--out", tmp_path / "again")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval()
    sequences = ["MKT_LLVAGSWXJ", "MK"]
    assert differences(model, "esm2", after, sequences, [sequences], 32).max() < 1e-5


@pytest.mark.integration
def test_a_model_without_x_is_trained_on_sequences_with_x(tmp_path):
    """A target that the vocabulary lacks is never asked for: the loss stays finite."""
    import jax

    from esm1nv_jax.model.masking import recipe
    from esm1nv_jax.training.objective import MaskedLM
    from esm1nv_jax.training.optimizer import OptimizerConfig
    from esm1nv_jax.training.step import StepConfig, batch_sums
    from tests.model.rows import pack

    weights = load_weights(witness.save(witness.make("bert"), "bert", tmp_path))
    objective = MaskedLM(recipe("card", 1.0))
    config = StepConfig(0, weights.model, encoder.ComputeConfig(), objective, OptimizerConfig())
    batch = pack([[tokenizer.encode("MXKBZUOXL").astype(np.int32)]], 16)
    sums = jax.device_get(batch_sums(config, weights.params, batch, None))
    assert sums["num_targets"] == 3
    assert sums["loss"] / sums["num_targets"] < 20

    from esm1nv_jax.data.source import MemorySource
    from esm1nv_jax.inference.evaluate import evaluate_model
    from esm1nv_jax.inference.model import load

    model = load(str(tmp_path))
    found = evaluate_model(model, MemorySource([("a", b"MXKBZUOXLAAGW"), ("b", b"XXXXXXXXM")]))
    assert found["overall"]["perplexity"] < 1e3, found["overall"]


@pytest.fixture(scope="module")
def antiberty():
    """The folder of a real antibody model, 26M parameters; its package is not imported."""
    spec = importlib.util.find_spec("antiberty")
    if spec is None:
        pytest.skip("pip install antiberty==0.1.3")
    return Path(spec.submodule_search_locations[0]) / "trained_models"


@pytest.mark.integration
def test_antiberty(antiberty, tmp_path):
    """Real weights: each hidden state, and masked residues of an antibody are found again."""
    source = antiberty / "AntiBERTy_md_smooth"
    run(
        "convert",
        "--from",
        "hf",
        source,
        "--vocabulary",
        antiberty / "vocab.txt",
        "--out",
        tmp_path / "model",
    )
    weights = load_weights(str(tmp_path / "model"))
    assert {name.split(".")[1] for name in weights.provenance["tensors_left_out"]} == {
        "pooler",
        "species",
        "chain",
        "graft",
    }
    model = transformers.BertForMaskedLM.from_pretrained(source).eval()
    rng = np.random.default_rng(0)
    asked = ["".join("_" if rng.random() < 0.15 else c for c in s) for s in TRASTUZUMAB]
    worst = differences(model, "bert", weights, asked, [asked], 256)
    assert worst[:-1].max() < 1e-5, worst
    assert worst[-1] < 5e-5, worst  # logits, of up to 20

    from tests.interchange.convert_parity_test import run_packed

    found = run_packed(weights, [asked], 256)
    places = [
        (q, i, s[i])
        for q, s in zip(asked, TRASTUZUMAB, strict=True)
        for i, c in enumerate(q)
        if c == "_"
    ]
    right = sum(tokenizer.TOKENS[found[q][1][i + 1].argmax()] == answer for q, i, answer in places)
    assert len(places) == 36
    assert right >= 28, f"{right} of {len(places)}"  # 30 when this was written


def test_users_mistakes_are_one_line_and_status_2(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    model = encoder.EncoderConfig(layers=1, width=16, heads=2, ffn=32, positions=40)
    model_folder.write(
        str(tmp_path / "tanh"), model_folder.Weights(random_parameters(model), model, {})
    )
    calls = [
        (["--from", "hf", tmp_path / "empty"], "no config.json"),
        (["--from", "nemo", tmp_path / "tanh" / "model.json"], "cannot be read as a .nemo file"),
        (["--to", "hf", "--checkpoint", tmp_path / "tanh"], "gelu_tanh"),
    ]
    for argv, message in calls:
        words = [*map(str, argv), "--out", str(tmp_path / "out")]
        status = command.run(cli.dispatch, ["convert", *words])
        error = capfd.readouterr().err
        assert status == 2, error
        assert error.startswith("error: "), error
        assert message in error
        assert error.count("\n") == 1, error
    for argv, message in [
        (["--to", "hf", "--out", "x"], "name one model"),
        (["--to", "hf", "a", "--checkpoint", "b", "--out", "x"], "name one model"),
        (["--to", "onnx", "a", "--out", "x"], "onnx"),
        (["--from", "hf", "a", "--out", "x", "--approximate"], "--approximate goes with --to"),
        (["--to", "hf", "a", "--out", "x", "--vocabulary", "f"], "--vocabulary goes with --from"),
        (["--from", "nemo", "a", "--out", "x", "--vocabulary", "f"], "--vocabulary goes with"),
    ]:
        with pytest.raises(UserError, match=message):
            cli.dispatch(["convert", *argv])


def test_post_norm_with_rotary_is_no_architecture_there():
    from esm1nv_jax.interchange.hf_config import approximate_config, inexact_reason

    model = encoder.EncoderConfig(norm="post", position_kind="rotary", head_activation="gelu_tanh")
    assert "no architecture" in inexact_reason(model)
    with pytest.raises(UserError, match="no architecture"):
        approximate_config(model)
    assert inexact_reason(dataclasses.replace(model, position_kind="learned")) is None


def test_torch_is_not_imported_by_reading_and_writing(tmp_path):
    witness.save(witness.make("esm"), "esm", tmp_path / "there")
    script = (
        "import sys\n"
        "from esm1nv_jax.interchange import convert\n"
        f"convert.import_model({str(tmp_path / 'there')!r}, {str(tmp_path / 'here')!r})\n"
        f"convert.to_hf({str(tmp_path / 'here')!r}, {str(tmp_path / 'again')!r})\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
