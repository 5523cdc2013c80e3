"""Files that `evaluate` reads and writes: masks, classes, and the metrics of a run."""

import errno
import json

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import HtmlReport
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.inference import evaluation_report, fixed_masks, perplexity
from esm1nv_jax.inference.evaluate import evaluate_model, read_groups
from esm1nv_jax.model.masking import recipe

PROTEINS = [("a", b"MKJVAXL*GS"), ("b", b"ACDEFGHIKL")]


def test_unknown_letters_of_a_file_of_masks_are_those_of_the_fasta(model, tmp_path):
    path = str(tmp_path / "m.jsonl")
    first = evaluate_model(model, MemorySource(PROTEINS), pseudo=True, masks_out=path)
    masks = fixed_masks.read_masks(path)
    again = evaluate_model(model, masks.source, mask_file=masks, pseudo=True)
    assert again["pseudo_perplexity"] == first["pseudo_perplexity"]


def test_a_byte_order_mark_is_no_part_of_the_first_id(model, tmp_path):
    groups, masks = tmp_path / "g.tsv", tmp_path / "m.jsonl"
    groups.write_text("a\tnear\nb\tfar\n", encoding="utf-8-sig")
    assert read_groups(str(groups)) == {"a": "near", "b": "far"}
    evaluate_model(model, MemorySource(PROTEINS), masks_out=str(masks))
    masks.write_text(masks.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert len(fixed_masks.read_masks(str(masks)).masks) == 2


def test_only_what_the_masks_are_written_to_is_said_to_refuse_them(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no space left to write /dev/full"):
        evaluate_model(model, MemorySource(PROTEINS), masks_out="/dev/full")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fixed_masks, "evaluation_batches", fail)
    with pytest.raises(OSError, match="Input/output error"):
        evaluate_model(model, MemorySource(PROTEINS), masks_out=str(tmp_path / "m.jsonl"))


def test_masks_appear_when_they_are_complete(model, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("of before")
    source = MemorySource(PROTEINS * 400)
    stream = perplexity.evaluation_stream(model, 0)
    drawn = fixed_masks.draw_masks(source, stream, recipe("card"), model.config.vocabulary)
    written = fixed_masks.write_masks(str(path), source, drawn, np.ones(25))
    next(written)
    written.close()
    assert path.read_text() == "of before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p\tA\nq\tA\np\tB\n", "line 3: 'p' is in class 'B', and in 'A' above"),
        ("p\tA\tB\n", "is not id<TAB>class"),
    ],
)
def test_an_id_is_in_one_class(tmp_path, text, said):
    (tmp_path / "g.tsv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_groups(str(tmp_path / "g.tsv"))


@pytest.mark.parametrize("names", [("loss", "accuracy"), ("loss", "perplexity_mask")])
def test_learning_curves_are_those_of_pretraining(tmp_path, names):
    """A fine-tuned run records no perplexity; validation has lines of other metrics."""
    lines = [{"kind": kind, "step": 1} for kind in ("train", "validation", "hosts")]
    lines += [{"kind": "train", "step": 2, **dict.fromkeys(names, 2.0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = HtmlReport("a run")
    evaluation_report._plot_learning_curves(report, {"run": str(tmp_path)})
    assert ("<svg" in report.to_html()) == ("perplexity_mask" in names)
