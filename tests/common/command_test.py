"""Options and messages of the command line, whatever the text in them."""

import argparse
import errno
import io
import os
import re
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from esm1nv_jax.common import command, console
from esm1nv_jax.common.errors import UserError

HOSTILE = "a[/x] [red]b[/red] :train: \x1b[31mc\x1b[0m \x07\x9b\u202ed"
SHOWN = r"a[/x] [red]b[/red] :train: \x1b[31mc\x1b[0m \x07\x9b\u202ed"


def parser() -> command.Parser:
    made = command.Parser("verb", "Does something.", "esm1nv verb --max-residues 5")
    made.add_argument("--max-residues", type=int)
    made.add_argument("--old_form")
    made.add_argument("--layers", nargs="+")
    made.add_argument("rest", nargs="*")
    return made


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max_residues", "5"], {"max_residues": 5}),
        (["--max_residues=5"], {"max_residues": 5}),
        (["--max-residues=5"], {"max_residues": 5}),
        (["--old-form=a_b"], {"old_form": "a_b"}),
        (["--old_form", "--max_residues", "5"], None),
        (["--layers", "-1", "0", "-1,6"], {"layers": ["-1", "0", "-1,6"]}),
        (["--", "--max_residues"], {"rest": ["--max_residues"]}),
    ],
)
def test_underscores_are_hyphens(argv, expected):
    if expected is None:
        with pytest.raises(UserError, match="--old_form: expected one argument"):
            parser().parse_args(argv)
        return
    found = vars(parser().parse_args(argv))
    assert {name: found[name] for name in expected} == expected


def test_what_is_not_an_option_of_ours_stays_as_it_is():
    found, rest = parser().parse_known_args(["--config.data.max_residues=5", "--max_residue"])
    assert rest == ["--config.data.max_residues=5", "--max_residue"]
    assert isinstance(found, argparse.Namespace)


def written(write, width=200):
    made = console.PlainConsole(stderr=True)
    made.file, made.width = io.StringIO(), width
    write(made)
    return made.file.getvalue()


def test_text_from_outside_is_shown_as_it_is():
    assert written(lambda c: c.print(HOSTILE)) == SHOWN + "\n"
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    assert written(lambda c: c.print(table)).count(SHOWN) == 3
    assert written(lambda c: c.print(Text("bold", style="bold"))) == "bold\n"


def test_a_progress_bar_shows_text_as_it_is(monkeypatch):
    made = console.PlainConsole(stderr=True)
    made.file, made.width, made._force_terminal = io.StringIO(), 200, True
    monkeypatch.setattr(console, "console", made)
    with console.bar("[red]work", 10, "[/x]") as task:
        task.update(5, HOSTILE)
    shown = made.file.getvalue()
    assert "[red]work" in shown and "[/x]" in shown and SHOWN in shown.replace("\x1b[0m", "")


@pytest.mark.parametrize(("width", "total"), [(80, 1_000_000), (80, None), (200, 1_000_000)])
def test_a_narrow_terminal_loses_the_end_of_the_note_and_nothing_else(monkeypatch, width, total):
    made = console.PlainConsole(stderr=True)
    made.file, made.width, made._force_terminal = io.StringIO(), width, True
    monkeypatch.setattr(console, "console", made)
    note = "loss 2.812  perplexity 16.64 (<mask> 17.20)  12,345 tokens/s"
    with console.bar("training", total, "steps", start=500_000) as task:
        task.update(600_000, note)
    line = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", made.file.getvalue()))[-2]
    assert re.match(r"training [━╸╺]{6}[━╸╺ ]+ 600,000(/1,000,000)? steps 0:00:0\d left ", line), (
        line
    )
    assert (note if width == 200 else "loss 2.812") in line and len(line) <= width


def test_an_error_is_one_printable_line(capsys):
    def verb(argv):
        raise UserError(f"no id {HOSTILE}\nin it")

    assert command.run(verb, []) == 2
    assert capsys.readouterr().err == f"error: no id {SHOWN} in it\n"


SHOW = """
import sys
from esm1nv_jax.common import command, console
def verb(argv):
    for _ in range(3):
        console.console.print("17.06 \\u00b1 0.05 log")
        console.stdout.print("17.06 \\u00b1 0.05 \\udcff result")
    print("\\u00b1 plain")
sys.exit(command.run(verb, []))
"""


def show(**options):
    env = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "PYTHONUTF8")}
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", SHOW], env=env | ascii_only, stdin=subprocess.DEVNULL, **options
    )


def test_names_that_are_not_utf8_and_folders_that_are_gone_are_one_line(
    tmp_path, monkeypatch, capsys
):
    called = []
    latin1 = os.fsdecode(b"caf\xe9")
    assert command.run(called.append, ["doctor", latin1]) == 2
    assert capsys.readouterr().err.startswith(r"error: 'caf\udce9' is not UTF-8; rename")
    folder = tmp_path / latin1
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert command.run(called.append, ["doctor", "run"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    folder.rmdir()
    assert command.run(called.append, ["doctor", "run"]) == 2
    assert "the current folder was deleted" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert command.run(called.append, ["doctor", "protein-\u03b1"]) == 0 and len(called) == 1


def test_a_locale_without_utf8_shows_escapes():
    job = show(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert out.splitlines() == [r"17.06 \xb1 0.05 \udcff result"] * 3 + [r"\xb1 plain"]
    assert err.splitlines() == [r"17.06 \xb1 0.05 log"] * 3


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_reader_that_left_is_no_failure(stream):
    read, write = os.pipe()
    os.close(read)
    other = {"stderr": "stdout", "stdout": "stderr"}[stream]
    job = show(**{stream: write, other: subprocess.PIPE}, text=True)
    os.close(write)
    out, err = job.communicate()
    assert job.returncode == 0
    if stream == "stderr":
        assert len(out.splitlines()) == 4
    else:
        assert "Traceback" not in err


def test_results_that_find_no_room_are_one_line():
    with open("/dev/full", "w", encoding="utf-8") as full:
        job = show(stdout=full, stderr=subprocess.PIPE, text=True)
        err = job.communicate()[1]
    assert job.returncode == 2
    assert (
        err.splitlines()[-1]
        == f"error: standard output cannot be written: {os.strerror(errno.ENOSPC)}"
    )
