"""`evaluate --against`: two models asked the same, their difference paired by protein."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.model import encoder
from tests.model.parameters import random_parameters

CONFIG = encoder.EncoderConfig(layers=1, width=32, heads=2, ffn=64, positions=130)


def write(folder, params, config=CONFIG):
    model_folder.write(str(folder), model_folder.Weights(params, config, {}))
    return str(folder)


@pytest.fixture
def models(tmp_path):
    """A model, one that differs a little, and one that reads less."""
    params = jax.tree.map(lambda x: np.asarray(3 * x), random_parameters(CONFIG, 3))
    near = jax.tree.map(lambda x: x * np.float32(1.02), params)
    short = encoder.EncoderConfig(layers=1, width=32, heads=2, ffn=64, positions=66)
    return (
        write(tmp_path / "a", params),
        write(tmp_path / "b", near),
        write(tmp_path / "short", random_parameters(short, 3), short),
    )


def test_a_difference_is_that_of_the_losses_with_a_small_error(models, tmp_path, capsys):
    a, b, short = models
    fasta, out = tmp_path / "p.fasta", tmp_path / "out.json"
    rng = np.random.default_rng(0)
    fasta.write_text(
        "".join(
            f">p{i}\n{''.join(rng.choice(list('ACDEFGHIKLMNPQRSTVWY'), 90))}\n" for i in range(40)
        )
    )

    def evaluate(one, other):
        call = ["evaluate", f"--checkpoint={one}", f"--fasta={fasta}", f"--against={other}"]
        assert command.run(cli.dispatch, [*call, f"--json={out}"]) == 0
        return json.loads(out.read_text(encoding="utf-8"))

    results = evaluate(a, b)
    ours, theirs = results["overall"]["perplexity_mask"], results["against"]["perplexity_mask"]
    difference, error = (results["against"][x] for x in ("difference", "difference_se"))
    assert difference == pytest.approx(math.log(ours / theirs), rel=1e-5)
    # What is hard for both cancels: far less than the error of either.
    assert 0 < error < 0.2 * results["overall"]["perplexity_mask_se"] / ours
    assert results["by_group"] == {}
    assert f"{difference:.4f} ± {error:.4f} nats a residue" in capsys.readouterr().out
    swapped = evaluate(b, a)["against"]
    assert swapped["difference"] == pytest.approx(-difference)
    assert swapped["difference_se"] == pytest.approx(error)
    call = ["evaluate", f"--checkpoint={a}", f"--fasta={fasta}", f"--against={short}"]
    assert command.run(cli.dispatch, call) == 2
    assert "try --max-residues 64" in capsys.readouterr().err
    # In another order, or of fewer letters.
    tokens = CONFIG.vocabulary.split()
    for name, vocabulary in (("esm2", tokens[::-1]), ("few", tokens[:-1])):
        config = dataclasses.replace(CONFIG, vocabulary=" ".join(vocabulary))
        write(tmp_path / name, model_folder.read(b).params, config)
    assert evaluate(a, tmp_path / "esm2")["against"] == results["against"] | {
        "checkpoint": str(tmp_path / "esm2")
    }
    call = ["evaluate", f"--checkpoint={a}", f"--fasta={fasta}", f"--against={tmp_path / 'few'}"]
    assert command.run(cli.dispatch, call) == 2
    assert "WXBZUO, " in capsys.readouterr().err
