"""Tables with named columns: CSV, TSV and Parquet files; those of proteins as FASTA."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.compression import regular_file, temporary_file, text_lines

MAX_BYTES = 1 << 30  # about what a table takes that is held in memory
_COMPRESSED = (".gz", ".bgz", ".zst", ".zstd", ".xz")
csv.field_size_limit(1 << 25)  # characters, as `text_lines` allows a line; 131,072 by default

Row = tuple[int, list[str]]  # line number, fields


def delimiter_of(path: str | Path) -> str:
    """What divides the fields of a table: tabs in a file named `.tsv`."""
    return "\t" if _suffix(path) == ".tsv" else ","


def open_csv(path: str) -> tuple[list[str], Iterator[Row]]:
    """Reads the header of a CSV file in UTF-8, plain or compressed, divided by `delimiter_of`;
    its rows are read one by one.

    Returns the names of the columns, and (line number, fields) of each row that is not blank;
    white space around names and fields is removed. Raises UserError, also while rows are read.
    """
    lines, delimiter = text_lines(path, "a CSV file"), delimiter_of(path)
    # A quote that nothing closes would swallow rows in silence. Of TSV, whose writers may not know
    # of quotes, they are seen by their tabs.
    is_tsv = delimiter == "\t"
    reader = csv.reader(lines, skipinitialspace=True, delimiter=delimiter, strict=not is_tsv)

    def rows() -> Iterator[Row]:
        width = 0
        try:
            for row in filter(any, reader):
                width = width or len(row)
                if len(row) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, the header has {width}"
                    )
                if is_tsv and any("\n" in field and "\t" in field for field in row):
                    raise csv.Error("a field of several lines with tabs")
                yield reader.line_num, [field.strip() for field in row]
        except csv.Error as error:
            advice = "is it CSV, and each quote closed?"
            raise UserError(f"{path}, line {reader.line_num}: {error}; {advice}") from None

    table = rows()
    _, columns = next(table, (1, []))
    if not columns:
        raise UserError(f"{path} is empty; give a CSV file with names of columns in its first line")
    return columns, table


def _suffix(name: str | Path) -> str:
    """The suffix of a file's name, without that of a compression."""
    path = Path(name)
    return Path(path.stem if path.suffix in _COMPRESSED else path).suffix


def read_csv(path: str) -> tuple[list[str], list[Row]]:
    """The same with all rows in a list. Raises UserError where they are too many for that."""
    columns, rows = open_csv(path)
    size, table = 0, []
    for row in rows:
        table.append(row)
        size += sum(len(field) + 64 for field in row[1])
        if size > MAX_BYTES:
            raise UserError(
                f"{path} takes more than {MAX_BYTES >> 20} MiB of memory; give it in smaller parts"
            )
    return columns, table


COLUMNS = ("id", "sequence")  # of a table of proteins
_SUFFIXES = (".csv", ".tsv", ".parquet")
_PARQUET = b"PAR1"
_BATCH = 1 << 14  # rows of Parquet read at once


def parse_columns(text: str) -> tuple[str, str]:
    """The names of the columns of ids and of sequences in `id,sequence`."""
    names = tuple(name.strip() for name in text.split(","))
    if len(names) != 2 or not all(names):
        raise UserError(f"--columns={text} is not ID,SEQUENCE, such as accession,sequence")
    return names[0], names[1]


def protein_file(
    name: str, folder: Path | None = None, columns: tuple[str, str] = COLUMNS
) -> tuple[Path, IO[bytes] | None]:
    """As `regular_file`; of a CSV, TSV or Parquet file with named columns, a copy as FASTA of two
    lines a row. Raises UserError for a table without these columns, and for an id that FASTA cannot
    hold; sequences are judged where the FASTA is read."""
    path, copy = regular_file(name, folder)
    is_parquet = False
    with contextlib.suppress(OSError), open(path, "rb") as file:  # who reads it says what is wrong
        is_parquet = file.read(4) == _PARQUET
    if not is_parquet and not _is_table(name):
        return path, copy
    rows = _read_parquet(path, name, columns) if is_parquet else _read_columns(path, name, columns)
    with temporary_file(name, folder) as fasta:
        for number, (identifier, sequence) in enumerate(rows, 1):
            text = "".join(sequence.split())
            if len(identifier.split()) != 1 or text[:1] in (">", ";"):
                what = f"id {identifier!r} is not one word"
                if text[:1] in (">", ";"):
                    what = f"{text[:20]!r} is no sequence"
                raise UserError(f"{name}, row {number}: {what}; fix it, or name other --columns")
            fasta.write(f">{identifier.strip()}\n{text}\n".encode())
    return Path(fasta.name), fasta


def _is_table(name: str) -> bool:
    return _suffix(name) in _SUFFIXES


def input_name(name: str) -> str:
    """What messages that name a line of FASTA call an input file."""
    if name == "-":
        return "standard input"
    return f"{name} (two lines a row)" if _is_table(name) else name


def _read_columns(path: Path, name: str, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    names, rows = open_csv(str(path))
    _check_columns(name, names, columns)
    at = [names.index(column) for column in columns]
    return ((fields[at[0]], fields[at[1]]) for _, fields in rows)


def _read_parquet(path: Path, name: str, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{name} is Parquet, which needs pyarrow: pip install pyarrow")
    import pyarrow as pa  # optional, and slow to import
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(name, file.schema_arrow.names, columns)
            for batch in file.iter_batches(_BATCH, columns=list(columns)):
                texts = (batch[column].cast(pa.string()).to_pylist() for column in columns)
                for identifier, sequence in zip(*texts, strict=True):
                    yield identifier or "", sequence or ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be read as Parquet: {reason}") from None


def _check_columns(name: str, names: list[str], columns: tuple[str, str]) -> None:
    if missing := [column for column in columns if column not in names]:
        raise UserError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(names)}: name those of "
            "ids and sequences by --columns=ID,SEQUENCE"
        )
    check_unique(name, names, columns)


def check_unique(name: str, names: list[str], columns: Iterable[str]) -> None:
    """Raises UserError where one of `columns` stands twice in the `names` of a file."""
    if twice := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{name} has two columns {twice[0]!r}; rename one")
