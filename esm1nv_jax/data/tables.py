"""Tables with named columns: CSV files, row by row or as a whole."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.compression import text_lines

MAX_BYTES = 1 << 30  # about what a table takes that is held in memory

Row = tuple[int, list[str]]  # line number, fields


def open_csv(path: str) -> tuple[list[str], Iterator[Row]]:
    """Reads the header of a CSV file in UTF-8, plain or compressed; its rows are read one by one.

    Returns the names of the columns, and (line number, fields) of each row that is not blank;
    white space around names and fields is removed. Raises UserError, also while rows are read.
    """
    reader = csv.reader(text_lines(path, "a CSV file"), skipinitialspace=True)

    def rows() -> Iterator[Row]:
        try:
            for row in reader:
                if any(row):
                    yield reader.line_num, [field.strip() for field in row]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; is it CSV?") from None

    def checked(columns: list[str], table: Iterator[Row]) -> Iterator[Row]:
        for line, fields in table:
            if len(fields) != len(columns):
                raise UserError(
                    f"{path}, line {line}: {len(fields)} fields, the header has {len(columns)}"
                )
            yield line, fields

    table = rows()
    _, columns = next(table, (1, []))
    if not columns:
        raise UserError(f"{path} is empty; give a CSV file with names of columns in its first line")
    return columns, checked(columns, table)


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
