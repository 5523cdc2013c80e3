"""The same numbers in `transformers`: every layer, logits, gradients; packed here, padded there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.interchange import convert, hf_config, tensor_names
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder
from tests.model.compiling import UNOPTIMIZED
from tests.model.parameters import random_parameters
from tests.model.rows import pack

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

from tests.interchange import packed, witness  # noqa: E402, needs both
from tests.interchange.packed import OUR_ID, columns, our_ids, proteins, run_packed  # noqa: E402

SMALL = ["esm", "esm1b", "esm2", "bert", "bert_tanh"]


def differences(model, kind, weights, sequences, rows, row_length):
    there = dict(zip(sequences, witness.run(model, kind, sequences), strict=True))
    return packed.differences(there, weights, rows, row_length, witness.tokens_of(kind))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_every_layer_from_there(kind, masked, tmp_path):
    model = witness.make(kind)
    weights = load_weights(witness.save(model, kind, tmp_path))
    sequences = proteins(1, 50, 3, 40, 61, 1, masked=masked)
    rows = [[sequences[0], sequences[3]], [sequences[1], sequences[2], sequences[4]]]
    worst = differences(model, kind, weights, sequences, rows, 128)
    assert worst.max() < 1e-5, worst


@pytest.mark.parametrize(
    "kind", ["esm2_8M", pytest.param("esm2_35M", marks=pytest.mark.integration)]
)
def test_esm2_at_the_shapes_of_its_smaller_models(kind, tmp_path):
    model = witness.make(kind)
    weights = load_weights(witness.save(model, kind, tmp_path))
    size = {"esm2_8M": 7.5e6, "esm2_35M": 33.5e6}[kind]
    assert abs(sum(p.numel() for p in model.parameters()) - size) < 0.1e6
    sequences = proteins(2, 120, 33, masked=0.12)
    worst = differences(model, kind, weights, sequences, [sequences], 160)
    assert worst.max() < (1e-5 if weights.model.layers <= 6 else 5e-5), worst


def test_letters_that_a_vocabulary_lacks_are_read_as_unknown(tmp_path):
    kind = "bert"
    model = witness.make(kind)
    weights = load_weights(witness.save(model, kind, tmp_path))
    sequences = ["MXKBZJL", "UOX"]
    rows = [sequences, []]
    worst = differences(model, kind, weights, sequences, rows, 128)
    assert worst.max() < 1e-5, worst
    logits = run_packed(weights, rows, 128)["UOX"][1]
    chance = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert chance[:, [OUR_ID[c] for c in "XBZUO"]].max() == 0
    np.testing.assert_allclose(chance[:, columns(witness.tokens_of(kind))].sum(-1), 1, rtol=1e-5)


def test_frequencies_of_the_file_are_used(tmp_path):
    """ESM-2's files hold the angles rounded to fp16: far along, they are others."""
    kind = "esm2"
    model = witness.make(kind)
    angles = model.esm.rotary_embeddings.inv_freq
    with torch.no_grad():
        angles.copy_((1.01 * angles).half().float())
    weights = load_weights(witness.save(model, kind, tmp_path))
    np.testing.assert_array_equal(weights.params["rotary_frequency"], angles.numpy())
    sequences = proteins(3, 900)
    assert differences(model, kind, weights, sequences, [sequences], 902).max() < 2e-5


@pytest.mark.parametrize("kind", ["esm", "esm1b", "esm2", "bert"])
def test_gradients(kind, tmp_path):
    """Of the mean cross-entropy at masked places: relative to the largest of each tensor."""
    model = witness.make(kind)
    weights = load_weights(witness.save(model, kind, tmp_path))
    answers = proteins(4, 50, 20, 33)
    asked = [s[:2] + "_" + s[3:9] + "_" + s[10:] for s in answers]

    inputs, mask = witness.ids(kind, asked)
    labels, _ = witness.ids(kind, answers)
    labels[inputs == labels] = -100
    model(input_ids=inputs, attention_mask=mask, labels=labels).loss.backward()

    batch = pack([[our_ids(s) for s in asked]], 128)
    targets = pack([[our_ids(s) for s in answers]], 128)["tokens"]

    def loss(params):
        logits = encoder.forward(
            weights.model, params, batch["tokens"], batch["segment_ids"], batch["positions"]
        ).logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(batch["tokens"] == 4, chosen, 0)) / (2 * len(asked))

    gradient = jax.jit(jax.grad(loss), compiler_options=UNOPTIMIZED)
    ours = model_folder.flatten(gradient(weights.params))
    family = hf_config.ESM if model.config.model_type == "esm" else hf_config.BERT
    ours = tensor_names.to_tensors(
        family, weights.model, {k: np.asarray(v) for k, v in ours.items()}
    )
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    if family is hf_config.BERT:
        theirs.pop(hf_config.BERT.token_types)  # the sum of the positions' gradients
    # The key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
    compared = {name for name in theirs if not name.endswith("key.bias")}
    assert compared == {name for name in ours if not name.endswith("key.bias")}
    for name in compared:
        size = np.abs(theirs[name]).max()
        assert size > 0, name
        assert np.abs(ours[name] - theirs[name]).max() < 1e-4 * size, name


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_model_from_here_opens_there_and_comes_back_bit_for_bit(norm, tmp_path):
    config = encoder.EncoderConfig(
        layers=2, width=48, heads=4, ffn=96, positions=70, norm=norm, ffn_activation="gelu_erf"
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x) + 0.05 * rng.standard_normal(x.shape).astype(np.float32),
        random_parameters(config),
    )
    weights = model_folder.Weights(params, config, {"run": "somewhere", "steps": [7]})
    model_folder.write(str(tmp_path / "model"), weights)
    assert convert.to_hf(str(tmp_path / "model"), str(tmp_path / "there")) == ""
    model, report = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "there", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model).__name__ == {"pre": "EsmForMaskedLM", "post": "BertForMaskedLM"}[norm]
    sequences = proteins(5, 60, 20, 9, masked=0.2)
    rows = [sequences[:1], sequences[1:]]
    worst = differences(model.eval(), "esm", weights, sequences, rows, 64)
    assert worst.max() < 1e-5, worst

    back = convert.import_model(str(tmp_path / "there"), str(tmp_path / "back"))
    assert back.model == config
    assert back.provenance["steps"] == [7]
    before = model_folder.flatten(params)
    after = model_folder.flatten(load_weights(str(tmp_path / "back")).params)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize("kind", SMALL)
def test_a_model_from_there_goes_back_as_it_was(kind, tmp_path):
    model = witness.make(kind)
    path = witness.save(model, kind, tmp_path / "there")
    convert.to_hf(path, str(tmp_path / "again"))
    again, report = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report.values()), report
    sequences = proteins(6, 40, 12, masked=0.1)
    for (hidden, logits), (hidden2, logits2) in zip(
        witness.run(model, kind, sequences), witness.run(again.eval(), kind, sequences), strict=True
    ):
        # BERT's token types are added to the positions first: another order of rounding.
        np.testing.assert_allclose(logits2, logits, atol=0 if kind.startswith("esm") else 1e-5)
        np.testing.assert_allclose(
            hidden2[-1], hidden[-1], atol=0 if kind.startswith("esm") else 1e-5
        )


def test_token_dropout_does_not_see_the_neighbours(tmp_path):
    """The share of `<mask>` is counted in each sequence, not in the row."""
    kind = "esm2"
    weights = load_weights(witness.save(witness.make(kind), kind, tmp_path))
    alone, neighbour = proteins(7, 30, masked=0.1)[0], proteins(8, 30, masked=0.6)[0]
    one = run_packed(weights, [[alone], []], 128)[alone][1]
    two = run_packed(weights, [[neighbour, alone], []], 128)[alone][1]
    np.testing.assert_allclose(one, two, atol=1e-5)
    model = dataclasses.replace(weights.model, token_dropout=False)
    off = dataclasses.replace(weights, model=model)
    assert np.abs(run_packed(off, [[alone], []], 128)[alone][1] - one).max() > 1e-2
