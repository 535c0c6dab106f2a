"""Whatever sound records are written, in any format, the same are read."""

import csv
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_folder import COLUMNS, INFO, write_audio, write_image

from fedfuse_client.data.check import check_folder
from fedfuse_client.data.manifest import load_dataset

ids = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30).filter(
    lambda text: text[0] not in "=+-@"
)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=200).filter(
    lambda text: not text.isspace()
)
rows = st.fixed_dictionaries(
    {
        "id": ids,
        "site": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
        "split": st.sampled_from(["train", "test"]),
        "label": st.sampled_from(["cat", "dog"]),
        "text": texts,
        "image": st.sampled_from(["", "a.png", "pictures/é b,c.png"]),
        "audio": st.sampled_from(["", 'sounds/"q".wav']),
    }
).filter(lambda row: row["text"] or row["image"] or row["audio"])
tables = st.lists(rows, min_size=1, max_size=20, unique_by=lambda row: row["id"])


def write_csv(path, records):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path)


@pytest.fixture(scope="module")
def files():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dataset.toml").write_text(INFO)
        write_image(folder / "a.png")
        write_image(folder / "pictures/é b,c.png")
        write_audio(folder / 'sounds/"q".wav')
        yield folder


@pytest.mark.parametrize(
    ("suffix", "write"), [("csv", write_csv), ("jsonl", write_jsonl), ("parquet", write_parquet)]
)
@given(records=tables)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(files, suffix, write, records):
    path = files / f"manifest.{suffix}"
    write(path, records)
    try:
        dataset = load_dataset(files)
        problems = check_folder(files, deep=False)
    finally:
        path.unlink()
    assert problems == []
    read = [
        {
            "id": r.id,
            "site": r.site,
            "split": r.split,
            "label": dataset.info.classes[r.label],
            "text": r.text or "",
            "image": "" if r.image is None else r.image.as_posix(),
            "audio": "" if r.audio is None else r.audio.as_posix(),
        }
        for r in dataset.records
    ]
    assert read == records


@given(
    content=st.binary(max_size=400)
    | st.text(max_size=200).map(lambda text: f"id,site,split,label\n{text}".encode())
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_no_bytes_at_all_break_the_check(files, suffix, content):
    path = files / f"manifest.{suffix}"
    path.write_bytes(content)
    try:
        assert check_folder(files)
    finally:
        path.unlink()
