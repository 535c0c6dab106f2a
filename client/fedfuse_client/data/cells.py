"""What a row's cells must be for a record to be made of them.

What is read was put together by somebody else's script, so nothing is taken on trust:

1. a record has an id of its own, a site, a split, a class of ``dataset.toml``, and at least one modality;
2. a path is relative, written with ``/``, and stays inside the folder also after symbolic links are followed;
3. every file named is a regular file of 1 to ``limits.MAX_FILE`` bytes (``check`` also opens it);
4. no cell but text may start like a spreadsheet formula, because operators open manifests in spreadsheets.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Final, Literal

from pydantic import TypeAdapter, ValidationError

from fedfuse_client.data.info import INFO, DatasetInfo
from fedfuse_client.data.rows import COLUMNS, MODALITIES, Cells, Problem, ProblemCode
from fedfuse_shared import limits
from fedfuse_shared.config.base import SiteName

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["train", "test"]

_MAX_ID: Final = 200  # characters
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
_SITE: Final = TypeAdapter[str](SiteName)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the manifest; paths are relative to the folder, None is a missing modality."""

    row: int
    """Row number in the manifest: a spreadsheet's (the header is 1), or the line of a JSON Lines file."""
    id: str
    site: str
    split: Split
    label: int
    """Index into ``DatasetInfo.classes``."""
    text: str | None
    image: Path | None
    audio: Path | None


class _CellError(Exception):
    """A cell cannot be believed."""

    def __init__(self, code: ProblemCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class RowCheck:
    """Turns cells into records; remembers ids, and where directories lead."""

    def __init__(self, folder: Path, info: DatasetInfo, manifest: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self._root = folder.resolve()
        self._classes = {name: index for index, name in enumerate(info.classes)}
        self._modalities = frozenset(info.modalities)
        self._ids: dict[str, int] = {}
        self._sites: set[str] = set()
        self._inside: dict[Path, bool] = {}
        self.files: dict[tuple[str, Path], int] = {}
        """Every file named that may be opened, by modality and path, and the first row that names it."""

    def check(self, row: int, cells: Cells) -> Iterator[Record | Problem]:
        """Yield the record of a row, or everything wrong with it."""
        values: dict[str, str] = {}
        sound = True
        for column in COLUMNS:
            try:
                values[column] = self._cell(row, column, cells[column])
            except _CellError as error:
                sound = False
                yield Problem(row, column, error.code, str(error), self.manifest)
        if not any(cells[column] for column in MODALITIES):
            message = f"has neither {', '.join(MODALITIES[:-1])} nor {MODALITIES[-1]}; fill in one or remove the row"
            yield Problem(row, None, ProblemCode.NO_MODALITY, message, self.manifest)
        elif sound:
            yield self._record(row, values)

    def _record(self, row: int, values: Cells) -> Record:
        return Record(
            row=row,
            id=values["id"],
            site=values["site"],
            split="train" if values["split"] == "train" else "test",
            label=self._classes[values["label"]],
            text=values["text"] or None,
            image=Path(values["image"]) if values["image"] else None,
            audio=Path(values["audio"]) if values["audio"] else None,
        )

    def _cell(self, row: int, column: str, cell: str) -> str:
        _check_characters(column, cell)
        match column:
            case "id":
                self._check_id(row, cell)
            case "site":
                self._check_site(cell)
            case "split":
                if cell not in {"train", "test"}:
                    raise _CellError(ProblemCode.UNKNOWN_SPLIT, f"{_quote(cell)} is neither train nor test")
            case "label":
                if cell not in self._classes:
                    raise _CellError(
                        ProblemCode.UNKNOWN_CLASS, f"{_quote(cell)} is not among the classes of {INFO}"
                    )
            case _:
                self._check_modality(row, column, cell)
        return cell

    def _check_id(self, row: int, cell: str) -> None:
        if not cell or len(cell) > _MAX_ID or not cell.isprintable():
            raise _CellError(
                ProblemCode.BAD_ID, f"an id is 1 to {_MAX_ID} printable characters, not {_quote(cell)}"
            )
        first = self._ids.setdefault(cell, row)
        if first != row:
            raise _CellError(ProblemCode.DUPLICATE_ID, f"{_quote(cell)} is already the id of row {first}")

    def _check_site(self, cell: str) -> None:
        if cell in self._sites:
            return
        try:
            _SITE.validate_python(cell)
        except ValidationError:
            rule = "letters, digits, dots, hyphens and underscores, at most 63, the first a letter or digit"
            raise _CellError(ProblemCode.BAD_SITE, f"a site's name is {rule}, not {_quote(cell)}") from None
        self._sites.add(cell)

    def _check_modality(self, row: int, column: str, cell: str) -> None:
        if cell and column not in self._modalities:
            raise _CellError(
                ProblemCode.UNDECLARED_MODALITY, f"{INFO} does not list {column} among its modalities"
            )
        if column == "text" and len(cell) > limits.MAX_TEXT:
            message = f"is {len(cell)} characters long, at most {limits.MAX_TEXT}; shorten it"
            raise _CellError(ProblemCode.TEXT_TOO_LONG, message)
        if column != "text" and cell:
            path = Path(_relative(cell))
            if (column, path) not in self.files:
                self._check_file(path)
                self.files[column, path] = row

    def _check_file(self, path: Path) -> None:
        target, name = self.folder / path, _quote(str(path))
        try:
            status = target.lstat()
            inside = self._leads_inside(target.parent)
            if stat.S_ISLNK(status.st_mode):
                status = target.stat()
                inside = inside and target.resolve(strict=True).is_relative_to(self._root)
        except (FileNotFoundError, NotADirectoryError):
            raise _CellError(ProblemCode.MISSING_FILE, f"there is no file {name}") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
            raise _CellError(ProblemCode.UNREADABLE, f"{name} cannot be found: {error}") from None
        if not inside:
            raise _CellError(
                ProblemCode.ESCAPE, f"{name} leads out of the folder by a symbolic link; copy the file in"
            )
        if not stat.S_ISREG(status.st_mode):
            raise _CellError(ProblemCode.NOT_A_FILE, f"{name} is not a regular file")
        if not 0 < status.st_size <= limits.MAX_FILE:
            code = ProblemCode.TOO_LARGE if status.st_size else ProblemCode.EMPTY
            raise _CellError(code, f"{name} is {status.st_size} bytes long, not 1 to {limits.MAX_FILE}")

    def _leads_inside(self, parent: Path) -> bool:
        """Return whether a directory lies in the folder once links are followed (a look-up per directory)."""
        if parent not in self._inside:
            self._inside[parent] = parent.resolve(strict=True).is_relative_to(self._root)
        return self._inside[parent]


def _check_characters(column: str, cell: str) -> None:
    """Refuse what no cell may hold.

    Raises:
        _CellError: bytes that are not UTF-8, NUL, nothing but white space, or the start of a formula.
    """
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise _CellError(ProblemCode.NOT_UTF8, "is not UTF-8; save the manifest as UTF-8") from None
    if "\0" in cell:
        raise _CellError(ProblemCode.NUL, "holds a NUL character")
    if cell.isspace():
        raise _CellError(ProblemCode.BLANK, "holds nothing but white space; leave it empty")
    if column != "text" and cell.startswith(_FORMULA):
        raise _CellError(ProblemCode.FORMULA, f"{_quote(cell)} starts like a spreadsheet formula; rename it")


def _relative(cell: str) -> PurePosixPath:
    """Return a path as written.

    Raises:
        _CellError: it is absolute, climbs, or is written in a way that means different things on different systems.
    """
    path = PurePosixPath(cell)
    if path.is_absolute() or PureWindowsPath(cell).drive:
        raise _CellError(ProblemCode.BAD_PATH, f"{_quote(cell)} is absolute; write it relative to the folder")
    if ".." in path.parts:
        raise _CellError(ProblemCode.ESCAPE, f"{_quote(cell)} climbs with ..; write it from the folder down")
    if "\\" in cell:
        raise _CellError(ProblemCode.BAD_PATH, f"{_quote(cell)} is written with backslashes; write / instead")
    if not cell.isprintable():
        raise _CellError(ProblemCode.BAD_PATH, f"{_quote(cell)} holds control characters; rename the file")
    return path


def _quote(cell: str) -> str:
    """Return the start of a cell in quotes, with nothing a terminal would obey."""
    return repr(cell if len(cell) <= 80 else f"{cell[:79]}…")
