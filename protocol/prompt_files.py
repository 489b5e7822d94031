"""Prompt files: text, JSON, CSV and parquet, read to the cells of one column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import ModelError
from protocol.paths import read_prompts, read_text

USUAL_COLUMNS = ("prompt", "prompts", "caption", "text")
"""Where prompts stand if nobody says so, in order of preference, upper case or lower."""


def read_cells(file: Path, column: str | None = None) -> Sequence[Any]:
    """Returns the cells of a file's column of prompts, one a row. Raises ModelError."""
    suffixes = file.name.lower().removesuffix(".gz").rsplit(".", 1)
    match suffixes[-1]:
        case "jsonl" | "ndjson" | "json":
            return _json_cells(file, column)
        case "csv":
            return _csv_cells(file, column, ",")
        case "tsv":
            return _csv_cells(file, column, "\t")
        case "parquet":
            return _parquet_cells(file, column)
    return read_prompts(str(file))


def _json_cells(file: Path, column: str | None) -> list[Any]:
    """Of objects a line or in one list; strings may stand in their place, as if they were in the column `text`."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        rows = _parse_json(file, text, 1)
    else:
        rows = [_parse_json(file, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    objects = [row if isinstance(row, dict) else {"text": row} for row in rows]
    if not objects:
        return []
    name = pick_column(column, list(dict.fromkeys(key for row in objects for key in row)), str(file))
    return [row.get(name) for row in objects]


def _parse_json(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"the prompt file {file}, line {getattr(error, 'lineno', 1) + line - 1}, is not JSON: {error}",
            expected='an object a line, such as {"prompt": "a cat"}, or a list of them',
            do="mend the line",
        ) from None


def _csv_cells(file: Path, column: str | None, delimiter: str) -> list[Any]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""), delimiter=delimiter)
        name = pick_column(column, list(reader.fieldnames or ()), str(file))
        return [row[name] for row in reader]
    except csv.Error as error:
        raise ModelError(f"the prompt file {file} cannot be read: {error}", do="mend it, or save it as JSONL") from None


def _parquet_cells(file: Path, column: str | None) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            name = pick_column(column, table.schema_arrow.names, str(file))
            cells: list[Any] = table.read(columns=[name]).column(name).to_pylist()
            return cells
    except (pyarrow.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the prompt file {file} cannot be read: {reason}", expected="a parquet file") from None


def pick_column(wanted: str | None, found: Sequence[str], place: str) -> str:
    """Returns the wanted column, or the usual one that is there. Raises ModelError, which names those there."""
    usual = (name for word in USUAL_COLUMNS for name in found if name.lower() == word)
    chosen = next(usual, None) if wanted is None else wanted
    if chosen is not None and chosen in found:
        return chosen
    raise ModelError(
        f"{place} has no column {wanted}" if wanted else f"it is not clear which column of {place} holds prompts",
        value=list(found),
        expected="one of these, in prompts.column or as the last part of a hub: name",
        do="name the column" if found else "give a file whose first row names its columns",
    )
