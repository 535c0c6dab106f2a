"""A data folder as its manifest describes it; ``load_dataset`` stops at the first problem, ``scan`` goes on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedfuse_client.data.cells import Record, RowCheck, Split
from fedfuse_client.data.info import DatasetInfo, find_manifest, read_info
from fedfuse_client.data.rows import Problem, ProblemCode, read_rows
from fedfuse_shared import limits
from fedfuse_shared.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Problem",
    "ProblemCode",
    "Record",
    "Split",
    "content_digest",
    "load_dataset",
    "scan",
]

_CHUNK: Final = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data folder whose manifest holds in full."""

    folder: Path
    info: DatasetInfo
    manifest: str
    """Name of the manifest's file."""
    records: tuple[Record, ...]

    def sites(self) -> tuple[str, ...]:
        """Return the sites in the order they first occur."""
        return tuple(dict.fromkeys(record.site for record in self.records))

    def select(self, site: str | None = None, split: Split | None = None) -> tuple[Record, ...]:
        """Return the records of a site, of a split, or of both, in manifest order."""
        return tuple(
            record for record in self.records if site in {None, record.site} and split in {None, record.split}
        )


def load_dataset(folder: Path) -> Dataset:
    """Return the data set in a folder; image and audio files must be there but are not opened.

    Raises:
        DataError: the first problem, with its file and row.
        ConfigError: a Parquet manifest and no pyarrow.
    """
    info, manifest = read_info(folder), find_manifest(folder)
    for found in (info, manifest):
        if isinstance(found, tuple):
            raise _refusal(folder, found[0])
    assert isinstance(info, DatasetInfo)
    assert isinstance(manifest, str)
    records: list[Record] = []
    for entry in scan(RowCheck(folder, info, manifest)):
        if isinstance(entry, Problem):
            raise _refusal(folder, entry)
        records.append(entry)
    return Dataset(folder, info, manifest, tuple(records))


def _refusal(folder: Path, problem: Problem) -> DataError:
    return DataError(
        problem.message,
        who=f"{folder / problem.where}",
        advice=f"`fedfuse data check {folder}` lists every problem",
    )


def content_digest(dataset: Dataset, record: Record) -> bytes:
    """Return a SHA-256 (32 bytes) over what a record holds: its text and the bytes of its files.

    Label, id, row, path, split and site do not enter, so the same record is recognised under another name. Every
    part is preceded by a byte that says whether it is there and by its length (8 bytes, big-endian).

    Raises:
        DataError: a file cannot be read or changes while it is read.
    """
    digest = hashlib.sha256(limits.LABEL_RECORD)
    text = None if record.text is None else record.text.encode()
    digest.update(b"\0" if text is None else b"\1" + len(text).to_bytes(8, "big") + text)
    for path in (record.image, record.audio):
        if path is None:
            digest.update(b"\0")
        else:
            _digest_file(digest, dataset.folder / path)
    return digest.digest()


def _digest_file(digest: hashlib._Hash, path: Path) -> None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limits.MAX_FILE:
                raise DataError(f"is {size} bytes long, at most {limits.MAX_FILE} are read", who=str(path))
            digest.update(b"\1" + size.to_bytes(8, "big"))
            seen = 0
            while chunk := file.read(_CHUNK):
                seen += len(chunk)
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", who=str(path)) from error
    if seen != size:
        raise DataError(
            "changed while it was read", who=str(path), advice="stop what writes to it and try again"
        )


def scan(rows: RowCheck) -> Iterator[Record | Problem]:
    """Yield, row by row, the record or everything wrong with it; image and audio files are not opened.

    Raises:
        ConfigError: a Parquet manifest and no pyarrow.
    """
    empty = True
    try:
        for entry in read_rows(rows.folder / rows.manifest):
            empty = False
            if isinstance(entry, Problem):
                yield entry
            else:
                yield from rows.check(*entry)
    except OSError as error:
        yield Problem(None, None, ProblemCode.UNREADABLE, f"cannot be read: {error.strerror}", rows.manifest)
    else:
        if empty:
            yield Problem(None, None, ProblemCode.EMPTY, "holds no records", rows.manifest)
