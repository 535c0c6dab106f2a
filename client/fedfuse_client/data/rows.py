"""Rows of a manifest in any of its three formats, as plain cells; bounded, and never past the first bad byte unsaid.

A row number is what the operator sees: the record number in a spreadsheet for CSV (the header is 1), the line number
for JSON Lines, the position from 1 for Parquet. Bytes that are not UTF-8 survive as lone surrogates, so that the
check of the cells can name the column.
"""

from __future__ import annotations

import codecs
import csv
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import IO

REQUIRED: Final = ("id", "site", "split", "label")
MODALITIES: Final = ("text", "image", "audio")
COLUMNS: Final = (*REQUIRED, *MODALITIES)

# JSON writes one character in at most 12 bytes (two \uXXXX); the rest is for ids, paths and quotes.
_MAX_ROW: Final = 12 * limits.MAX_TEXT + 2**16
# The shortest row of a CSV manifest ("a,b,test,c,d,,"): Parquet may not claim more rows than fit a CSV of full size.
_MIN_ROW: Final = 14
_PARQUET_BATCH: Final = 256

Cells = dict[str, str]
"""One value for each of ``COLUMNS``; empty where there is none."""


class ProblemCode(StrEnum):
    """What kind of problem it is, for programs; people read the message."""

    MISSING_FILE = "missing-file"
    AMBIGUOUS_MANIFEST = "ambiguous-manifest"
    BAD_INFO = "bad-info"
    TOO_LARGE = "too-large"
    EMPTY = "empty"
    MISSING_COLUMN = "missing-column"
    UNKNOWN_COLUMN = "unknown-column"
    MALFORMED_ROW = "malformed-row"
    NOT_UTF8 = "not-utf-8"
    NUL = "nul"
    BLANK = "blank"
    FORMULA = "formula"
    BAD_ID = "bad-id"
    DUPLICATE_ID = "duplicate-id"
    BAD_SITE = "bad-site"
    UNKNOWN_SPLIT = "unknown-split"
    UNKNOWN_CLASS = "unknown-class"
    TEXT_TOO_LONG = "text-too-long"
    NO_MODALITY = "no-modality"
    UNDECLARED_MODALITY = "undeclared-modality"
    BAD_PATH = "bad-path"
    ESCAPE = "path-escapes"
    NOT_A_FILE = "not-a-file"
    UNREADABLE = "unreadable"
    IMAGE_TOO_LARGE = "image-too-large"
    AUDIO_TOO_LONG = "audio-too-long"
    BAD_RATE = "bad-rate"
    TOO_MANY = "too-many"
    NOT_FINITE = "not-finite"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a data folder: where, what, and what to do about it."""

    row: int | None
    """Manifest row (see the module); None where the whole file is meant."""
    column: str | None
    code: ProblemCode
    message: str
    file: str
    """Name of the file to mend, relative to the folder."""

    @property
    def where(self) -> str:
        """Return file, row and column as a person looks them up."""
        row = "" if self.row is None else f" row {self.row}"
        column = "" if self.column is None else f" column {self.column}"
        return f"{self.file}{row}{column}"


class _RowError(Exception):
    """A row cannot be taken apart; the next one may be."""


class _Lines:
    """Physical lines of a file, with a bound on the bytes of one record, which may span lines in CSV."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._used = 0
        self._at_start = True
        self.taken = 0
        """Lines the record has taken so far."""

    def begin_record(self) -> None:
        self._used = self.taken = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_ROW)
        if not line:
            raise StopIteration
        if self._at_start:
            line = line.removeprefix(codecs.BOM_UTF8)  # Excel's "CSV UTF-8"
            self._at_start = False
        self._used += len(line)
        self.taken += 1
        if self._used >= _MAX_ROW:
            while not line.endswith(b"\n") and (line := self._file.readline(_MAX_ROW)):
                pass
            raise _RowError(f"is longer than {_MAX_ROW} bytes")
        return line.decode("utf-8", "surrogateescape")


def read_rows(path: Path) -> Iterator[tuple[int, Cells] | Problem]:
    """Yield ``(row, cells)`` for every row that can be taken apart and a Problem for every one that cannot.

    Raises:
        OSError: the file cannot be read.
        ConfigError: a Parquet manifest and no pyarrow.
    """
    return _READERS[path.suffix](path)


def _malformed(path: Path, row: int | None, message: str) -> Problem:
    return Problem(row, None, ProblemCode.MALFORMED_ROW, message, path.name)


def _column_problems(path: Path, header: list[str], wanted: tuple[str, ...]) -> list[Problem]:
    """Return what is wrong with the column names; a misspelt one is both unknown and missing."""
    problems = [
        Problem(1, name, ProblemCode.MISSING_COLUMN, f"there is no column {name}; add it", path.name)
        for name in wanted
        if name not in header
    ]
    for index, name in enumerate(header):
        if name not in COLUMNS:
            message = f"column {name[:40]!r} is not one of {', '.join(COLUMNS)}; rename or remove it"
            problems.append(Problem(1, None, ProblemCode.UNKNOWN_COLUMN, message, path.name))
        elif name in header[:index]:
            message = f"column {name} occurs twice; remove one"
            problems.append(Problem(1, name, ProblemCode.UNKNOWN_COLUMN, message, path.name))
    return problems


def _read_csv(path: Path) -> Iterator[tuple[int, Cells] | Problem]:
    """Yield the rows of an RFC 4180 file; the header may leave out modalities the data set does not have."""
    with path.open("rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        row = 0
        while True:
            row += 1
            lines.begin_record()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, _RowError) as error:
                # Past an open quotation mark nobody can tell where the next row begins.
                lost = header is None or lines.taken > 1
                rest = "; a quotation mark may be open: the rows after it were not read" if lost else ""
                yield _malformed(path, row, f"is not valid CSV: {error}{rest}")
                if lost:
                    return
                continue
            if header is None:
                header = cells
                if problems := _column_problems(path, header, REQUIRED):
                    yield from problems
                    return
            elif len(cells) == len(header):
                yield row, dict.fromkeys(COLUMNS, "") | dict(zip(header, cells, strict=True))
            elif cells:  # a blank line is nothing
                yield _malformed(path, row, f"has {len(cells)} cells, the header has {len(header)}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) != len({key for key, _ in pairs}):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _json_cells(line: str) -> Cells:
    """Return the cells of one line.

    Raises:
        _RowError: it is not an object of texts under the names of ``COLUMNS``.
    """
    try:
        value = json.loads(line, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _RowError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _RowError("is not a JSON object")
    cells = dict.fromkeys(COLUMNS, "")
    for key, cell in value.items():
        if key not in COLUMNS:
            raise _RowError(f"has the key {key[:40]!r}, which is not one of {', '.join(COLUMNS)}")
        if cell is not None and not isinstance(cell, str):
            raise _RowError(f"has a {type(cell).__name__} under {key}; write a text in quotes, or null")
        cells[key] = cell or ""
    return cells


def _read_jsonl(path: Path) -> Iterator[tuple[int, Cells] | Problem]:
    """Yield the rows of a file with one JSON object a line; an absent key is an empty cell."""
    with path.open("rb") as file:
        lines = _Lines(file)
        row = 0
        while True:
            row += 1
            lines.begin_record()
            try:
                line = next(lines)
                if line.strip():
                    yield row, _json_cells(line)
            except StopIteration:
                return
            except _RowError as error:
                yield _malformed(path, row, str(error))


def _read_parquet(path: Path) -> Iterator[tuple[int, Cells] | Problem]:
    """Yield the rows of a Parquet file whose columns are all strings; null is an empty cell."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - 50 MB that only this format needs
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        _raise_no_pyarrow(path)
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            meta, schema = file.metadata, file.schema_arrow
            problems = _column_problems(path, schema.names, REQUIRED)
            problems += [
                _malformed(path, None, f"column {field.name[:40]!r} is {str(field.type)[:40]}, not string")
                for field in schema
                if not _is_text(pa.types, field.type)
            ]
            size = sum(meta.row_group(index).total_byte_size for index in range(meta.num_row_groups))
            if size > limits.MAX_MANIFEST or meta.num_rows > limits.MAX_MANIFEST // _MIN_ROW:
                message = (
                    f"unpacks to {meta.num_rows} rows of {size} bytes, at most {limits.MAX_MANIFEST} bytes"
                )
                problems.append(Problem(None, None, ProblemCode.TOO_LARGE, message, path.name))
            if problems:
                yield from problems
                return
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for values in batch.to_pylist():
                    row += 1
                    yield row, {name: values.get(name) or "" for name in COLUMNS}
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # Arrow reports bad bytes as OSError too
        yield _malformed(path, row + 1 if row else None, f"is not valid Parquet: {str(error)[:200]!r}")


def _is_text(types: Any, kind: Any) -> bool:
    """Return whether a column holds strings, categories that are strings (pandas), or nothing at all."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))


def _raise_no_pyarrow(path: Path) -> NoReturn:
    raise ConfigError(
        "a Parquet manifest needs pyarrow", who=str(path), advice="pip install 'fedfuse[site]'"
    ) from None


_READERS: Final[dict[str, Callable[[Path], Iterator[tuple[int, Cells] | Problem]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
MANIFESTS: Final = tuple(f"manifest{suffix}" for suffix in _READERS)
