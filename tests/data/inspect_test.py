"""What `esm1nv inspect` shows is what is there."""

from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.cli import dispatch
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import EXIT_USER
from esm1nv_jax.data import inspect, tokenizer
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.data.prepare import Preparation, prepare
from esm1nv_jax.data.source import open_split
from esm1nv_jax.model import masking
from tests.data.made_up import fasta, made_up

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_row_is_drawn_letter_by_letter():
    source = open_split("sample", "train")
    config = StreamConfig(seed=0, rows=4, row_length=512, max_residues=510)
    batch = next(iter(train_dataset(source, config)))
    text = inspect.row_text(batch, 0)
    ids = [i for i in dict.fromkeys(batch["example_ids"][0].tolist()) if i >= 0]
    whole = "".join(f"‹{s[:510].decode()}›" for s in source.sequences(ids))
    assert text.plain.rstrip("·") == whole
    hidden = inspect.masked_positions(batch, 0, 0.15)
    reverse = sum(span.end - span.start for span in text.spans if "reverse" in str(span.style))
    assert reverse == hidden.sum()
    for segment in range(1, batch["segment_ids"][0].max() + 1):
        here = batch["segment_ids"][0] == segment
        assert hidden[here].sum() == max(1, round(0.15 * (here.sum() - 2)))
    assert (batch["tokens"][0][hidden] >= tokenizer.FIRST_RESIDUE).all()


@pytest.mark.parametrize("name", masking.RECIPES)
def test_what_is_shown_masked_is_what_a_run_masks(name):
    config = StreamConfig(seed=0, rows=4, row_length=512, max_residues=510)
    batch = next(iter(train_dataset(open_split("sample", "train"), config)))
    recipe = masking.recipe(name)
    parts = (batch[part] for part in ("tokens", "segment_ids", "mask_bits"))
    masked = masking.mask(recipe, *parts)
    for row in range(4):
        index = masked.prediction_positions_BM[row][masked.is_target_BM[row]]
        assert (
            np.flatnonzero(inspect.masked_positions(batch, row, recipe.rate)).tolist()
            == index.tolist()
        )


def test_the_sample_is_shown(capsys):
    assert command.run(dispatch, ["inspect", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    lengths = np.asarray(open_split("sample", "train").lengths)
    assert "9,000" in shown and f"{lengths.sum():,}" in shown
    assert f"{((lengths >= 128) & (lengths < 192)).sum():,}" in shown


def test_ids_and_paths_are_shown_as_they_are(tmp_path, capsys):
    names = (b"[/x]", b"[red]a[/red]", b":smile:", b"[link=http://a]", b"\\[b")
    records = [(n, b"", s) for n, (_, _, s) in zip(names, made_up(5), strict=True)]
    (tmp_path / "odd.fasta").write_bytes(fasta([*records, *made_up(40, seed=1)]))
    folder = str(tmp_path / "[bold]set")
    prepare(Preparation((str(tmp_path / "odd.fasta"),), folder, 2, 2, workers=1))
    assert command.run(dispatch, ["inspect", folder, "--show", "64"]) == 0
    shown = capsys.readouterr().out
    train = open_split(folder, "train")
    assert "[bold]set: train" in shown
    assert sum(name.decode() in train.ids(range(len(train))) for name in names) >= 3
    assert all(name in shown for name in train.ids(range(len(train))))


def test_a_config_says_how_rows_are_cut(capsys):
    argv = ["inspect", f"--config={CONFIGS / 'pretrain_small.py'}:shipped"]
    assert command.run(dispatch, [*argv, "--config.data.path=sample", "--show=0"]) == 0
    shown = capsys.readouterr().out
    assert "of 512 tokens a batch" in shown and "the 10 % of residues to be predicted" in shown
    parts = ["--config.data.path=sample", "--show=0", "--config.batch.microbatches=64"]
    assert command.run(dispatch, [*argv, *parts]) == 0
    assert "256 of 512 tokens a batch" in capsys.readouterr().out  # 231, in 64 equal parts
    assert command.run(dispatch, argv) == EXIT_USER
    assert "names no data" in capsys.readouterr().err


HUGE = ["sample", f"--config={CONFIGS / 'quickstart.py'}", "--config.batch.rows=1000000000"]


@pytest.mark.parametrize("words", [["nowhere"], ["--split", "all"], ["--rows=7"], HUGE])
def test_mistakes(words, capsys):
    assert command.run(dispatch, ["inspect", *words]) == EXIT_USER
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
