"""A manifest is read as written, or refused with the file, row and column to mend."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_folder import COLUMNS, INFO, rows, write_audio, write_folder, write_image, write_manifest

from fedfuse_client.data.check import check_folder
from fedfuse_client.data.manifest import ProblemCode, content_digest, load_dataset
from fedfuse_shared import limits
from fedfuse_shared.errors import DataError


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def found(folder, *, deep=False):
    return [(problem.row, problem.column, problem.code) for problem in check_folder(folder, deep=deep)]


def spoil(folder, index, **cells):
    """Write the manifest with some cells of one row changed (row number: index + 2)."""
    records = rows()
    records[index] |= cells
    write_manifest(folder, records)


def test_records_are_read_as_written(folder):
    spoil(folder, 1, text="", audio="")
    dataset = load_dataset(folder)
    assert dataset.sites() == ("turin", "lyon")
    assert dataset.info.classes == ("cat", "dog")
    first, second = dataset.records[:2]
    assert (first.row, first.id, first.site, first.split, first.label) == (2, "r0", "turin", "train", 0)
    assert (first.text, first.image, first.audio) == (
        "animal number 0",
        Path("images/0.png"),
        Path("audio/0.wav"),
    )
    assert (second.row, second.label, second.text, second.audio) == (3, 1, None, None)


def test_records_are_selected_by_site_and_split(folder):
    dataset = load_dataset(folder)
    assert [r.id for r in dataset.select("lyon")] == ["r1", "r3"]
    assert [r.id for r in dataset.select(split="train")] == ["r0", "r1", "r2"]
    assert [r.id for r in dataset.select("lyon", "test")] == ["r3"]
    assert dataset.select() == dataset.records


@pytest.mark.parametrize(
    ("cells", "column", "code"),
    [
        ({"id": ""}, "id", ProblemCode.BAD_ID),
        ({"id": "x" * 201}, "id", ProblemCode.BAD_ID),
        ({"id": "two\nlines"}, "id", ProblemCode.BAD_ID),
        ({"id": "r0"}, "id", ProblemCode.DUPLICATE_ID),
        ({"site": ""}, "site", ProblemCode.BAD_SITE),
        ({"site": "saint étienne"}, "site", ProblemCode.BAD_SITE),
        ({"split": "validation"}, "split", ProblemCode.UNKNOWN_SPLIT),
        ({"split": "Train"}, "split", ProblemCode.UNKNOWN_SPLIT),
        ({"label": ""}, "label", ProblemCode.UNKNOWN_CLASS),
        ({"label": "cow"}, "label", ProblemCode.UNKNOWN_CLASS),
        ({"label": " dog"}, "label", ProblemCode.UNKNOWN_CLASS),
        ({"text": "a" * (limits.MAX_TEXT + 1)}, "text", ProblemCode.TEXT_TOO_LONG),
        ({"text": " \t "}, "text", ProblemCode.BLANK),
        ({"image": "images/none.png"}, "image", ProblemCode.MISSING_FILE),
        ({"audio": "images/0.png/x.wav"}, "audio", ProblemCode.MISSING_FILE),
        ({"audio": "audio"}, "audio", ProblemCode.NOT_A_FILE),
        ({"text": "", "image": "", "audio": ""}, None, ProblemCode.NO_MODALITY),
    ],
)
def test_a_bad_cell_is_named_by_row_and_column(folder, cells, column, code):
    spoil(folder, 2, **cells)
    assert found(folder) == [(4, column, code)]
    with pytest.raises(DataError, match=r"manifest\.csv row 4"):
        load_dataset(folder)


def test_the_longest_text_is_read(folder):
    spoil(folder, 0, text="é" * limits.MAX_TEXT)
    assert load_dataset(folder).records[0].text == "é" * limits.MAX_TEXT


def test_every_problem_is_listed_in_row_order(folder):
    records = rows()
    records[0] |= {"label": "cow", "split": "dev"}
    records[2] |= {"id": "r1", "image": "images/none.png"}
    records[3] |= {"site": ""}
    write_manifest(folder, records)
    assert found(folder) == [
        (2, "split", ProblemCode.UNKNOWN_SPLIT),
        (2, "label", ProblemCode.UNKNOWN_CLASS),
        (4, "id", ProblemCode.DUPLICATE_ID),
        (4, "image", ProblemCode.MISSING_FILE),
        (5, "site", ProblemCode.BAD_SITE),
    ]


def test_a_modality_the_data_set_does_not_declare_is_refused(folder):
    (folder / "dataset.toml").write_text(INFO.replace('"text", "image", "audio"', '"text", "image"'))
    assert found(folder) == [(row, "audio", ProblemCode.UNDECLARED_MODALITY) for row in (2, 3, 4, 5)]


def test_a_column_of_a_modality_that_is_nowhere_may_be_left_out(folder):
    (folder / "dataset.toml").write_text(INFO.replace('"text", "image", "audio"', '"text"'))
    (folder / "manifest.csv").write_text("label,id,text,site,split\ncat,a,purrs,lyon,train\n")
    assert [(r.id, r.text, r.image) for r in load_dataset(folder).records] == [("a", "purrs", None)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [(None, None, ProblemCode.EMPTY)]),
        (b"id,site,split,label,text\n", [(None, None, ProblemCode.EMPTY)]),
        (b"id,site,split,text\na,lyon,train,x\n", [(1, "label", ProblemCode.MISSING_COLUMN)]),
        (b"id,site,split,label,txt\n", [(1, None, ProblemCode.UNKNOWN_COLUMN)]),
        (b"id,site,split,label,text,text\n", [(1, "text", ProblemCode.UNKNOWN_COLUMN)]),
        (b"id,site,split,label,text\na,lyon,train,cat\n", [(2, None, ProblemCode.MALFORMED_ROW)]),
        (b'id,site,split,label,text\na,lyon,train,cat,"x\n', [(2, None, ProblemCode.MALFORMED_ROW)]),
        (
            b'id,site,split,label,text\na,lyon,train,cat,"x"y\nb,b,test,cat,z',
            [(2, None, ProblemCode.MALFORMED_ROW)],
        ),
    ],
)
def test_a_table_that_is_not_one(folder, content, expected):
    (folder / "manifest.csv").write_bytes(content)
    assert found(folder) == expected


def test_utf_16_is_no_manifest(folder):
    (folder / "manifest.csv").write_bytes("id,site,split,label,text\na,lyon,train,cat,x\n".encode("utf-16"))
    assert {code for _, _, code in found(folder)} == {ProblemCode.MISSING_COLUMN, ProblemCode.UNKNOWN_COLUMN}


def test_bytes_that_are_not_utf8_are_found_in_their_cell(folder):
    latin1 = "id,site,split,label,text\na,lyon,train,cat,café\nb,lyon,train,cat,ok\n".encode("latin-1")
    (folder / "manifest.csv").write_bytes(latin1)
    assert found(folder) == [(2, "text", ProblemCode.NOT_UTF8)]


def test_what_excel_writes_is_read(folder):
    """Excel's "CSV UTF-8": a byte order mark, CRLF, line breaks inside quotes, a blank line at the end."""
    text = '\ufeffid,site,split,label,text\r\na,lyon,train,cat,"two\nlines, ""quoted"""\r\nb,lyon,test,dog,é\r\n\r\n'
    (folder / "manifest.csv").write_bytes(text.encode())
    records = load_dataset(folder).records
    assert [(r.row, r.text) for r in records] == [(2, 'two\nlines, "quoted"'), (3, "é")]


def test_two_manifests_are_one_too_many(folder):
    (folder / "manifest.jsonl").write_text("")
    assert found(folder) == [(None, None, ProblemCode.AMBIGUOUS_MANIFEST)]


@pytest.mark.parametrize(
    ("name", "code"), [("dataset.toml", ProblemCode.MISSING_FILE), ("manifest.csv", ProblemCode.MISSING_FILE)]
)
def test_a_missing_file_is_named(folder, name, code):
    (folder / name).unlink()
    assert found(folder) == [(None, None, code)]
    with pytest.raises(DataError, match=name):
        load_dataset(folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"dataset\.toml"):
        load_dataset(tmp_path / "none")


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ('["cat", "dog"]', '["cat"]', "classes"),
        ('["cat", "dog"]', '["cat", "cat"]', None),
        ('["cat", "dog"]', "[1, 2]", "classes.0"),
        ('["cat", "dog"]', '["cat", "=dog"]', "classes.1"),
        ('["cat", "dog"]', r'["cat", "d\u001bog"]', "classes.1"),
        ('"text", "image"', '"text", "smell"', "modalities.1"),
        ('"classification"', '"regression"', "task"),
        ('name = "animals"', "", "name"),
        ('"One animal: ', r'"One animal\u001b[2J: ', "record"),
        ('name = "animals"', "name = ", None),
        ('name = "animals"', f"name = {'[' * 50_000}", None),
    ],
)
def test_what_dataset_toml_may_not_say(folder, before, after, place):
    assert before in INFO
    (folder / "dataset.toml").write_text(INFO.replace(before, after))
    problems = check_folder(folder, deep=False)
    assert {(p.file, p.row, p.code) for p in problems} == {("dataset.toml", None, ProblemCode.BAD_INFO)}
    assert place in {p.column for p in problems}
    with pytest.raises(DataError, match=r"dataset\.toml"):
        load_dataset(folder)


def test_other_keys_of_dataset_toml_are_left_alone(folder):
    (folder / "dataset.toml").write_text(INFO + '[counts]\nsites = ["lyon"]\n')
    assert load_dataset(folder).info.name == "animals"


# --- the other two formats --------------------------------------------------------------------------------


def as_jsonl(folder, lines):
    (folder / "manifest.csv").unlink()
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_parquet(folder, table):
    (folder / "manifest.csv").unlink()
    pq.write_table(table, folder / "manifest.parquet")


def test_json_lines_hold_the_same_records(folder):
    csv_records = load_dataset(folder).records
    as_jsonl(folder, [json.dumps(row) for row in rows()])
    records = load_dataset(folder).records
    assert [r.row for r in records] == [1, 2, 3, 4]
    assert [content_key(r) for r in records] == [content_key(r) for r in csv_records]


def test_parquet_holds_the_same_records(folder):
    csv_records = load_dataset(folder).records
    table = pa.Table.from_pylist(rows())
    labels = table["label"].combine_chunks().dictionary_encode()  # a pandas category
    as_parquet(folder, table.set_column(COLUMNS.index("label"), "label", labels))
    records = load_dataset(folder).records
    assert [r.row for r in records] == [1, 2, 3, 4]
    assert [content_key(r) for r in records] == [content_key(r) for r in csv_records]


def content_key(record):
    return (record.id, record.site, record.split, record.label, record.text, record.image, record.audio)


def test_null_is_a_missing_modality_in_json_lines_and_parquet(tmp_path):
    sparse = [
        {
            "id": "a",
            "site": "lyon",
            "split": "train",
            "label": "cat",
            "text": "x",
            "image": None,
            "audio": None,
        }
    ]
    for kind in ("jsonl", "parquet"):
        folder = write_folder(tmp_path / kind)
        if kind == "jsonl":
            as_jsonl(folder, [json.dumps(row) for row in sparse])
        else:
            as_parquet(folder, pa.Table.from_pylist(sparse))
        (record,) = load_dataset(folder).records
        assert (record.text, record.image, record.audio) == ("x", None, None)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"id": 3}',
        '{"id": "a", "id": "b"}',
        '{"id": "a", "patient": "x"}',
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_is_no_record_does_not_hide_the_next(folder, line):
    lines = [json.dumps(row) for row in rows()]
    lines[1] = line
    as_jsonl(folder, lines)
    assert found(folder) == [(2, None, ProblemCode.MALFORMED_ROW)]


def test_a_lone_surrogate_is_not_text(folder):
    lines = [json.dumps(row) for row in rows()]
    lines[0] = lines[0].replace("animal number 0", "\\ud800")
    as_jsonl(folder, lines)
    assert found(folder) == [(1, "text", ProblemCode.NOT_UTF8)]


def test_parquet_columns_must_be_strings(folder):
    table = pa.Table.from_pylist(rows()).set_column(3, "label", pa.array([0, 1, 0, 1]))
    as_parquet(folder, table)
    assert found(folder) == [(None, None, ProblemCode.MALFORMED_ROW)]


@pytest.mark.parametrize("cut", [0, 4, 100, -8])
def test_a_damaged_parquet_file_is_one_problem(folder, cut):
    as_parquet(folder, pa.Table.from_pylist(rows()))
    path = folder / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    assert found(folder) == [(None, None, ProblemCode.MALFORMED_ROW)]


# --- content digests --------------------------------------------------------------------------------------


def test_a_record_is_recognised_under_another_name(folder, tmp_path):
    dataset = load_dataset(folder)
    other = tmp_path / "other"
    write_image(other / "pictures/dog.png", seed=1)
    write_audio(other / "sounds/dog.wav", seed=1)
    (other / "dataset.toml").write_text(INFO.replace('["cat", "dog"]', '["ant", "cat", "dog"]'))
    write_manifest(
        other,
        [
            rows()[1]
            | {"id": "x", "site": "oslo", "split": "test"}
            | {"image": "pictures/dog.png", "audio": "sounds/dog.wav"}
        ],
    )
    renamed = load_dataset(other)
    assert content_digest(renamed, renamed.records[0]) == content_digest(dataset, dataset.records[1])
    # Nor does the label: relabelling or renaming a class must not give a record a fresh budget.
    spoil(folder, 1, label="cat")
    relabelled = load_dataset(folder)
    assert content_digest(relabelled, relabelled.records[1]) == content_digest(dataset, dataset.records[1])


def test_any_change_of_content_changes_the_digest(folder):
    digests = set()
    variants = [
        {},
        {"text": "another"},
        {"text": ""},
        {"image": "images/0.png"},
        {"image": ""},
        {"audio": "audio/0.wav"},
        {"audio": ""},
        {"text": "", "image": ""},
    ]
    for cells in variants:
        spoil(folder, 1, **cells)
        dataset = load_dataset(folder)
        digests.add(content_digest(dataset, dataset.records[1]))
    assert len(digests) == len(variants)


def test_bytes_that_move_from_one_file_to_the_next_change_the_digest(folder):
    dataset = load_dataset(folder)
    digests = set()
    for image, audio in ((b"a", b"b\1c"), (b"a\1b", b"c"), (b"a", b"b\0c"), (b"a\1b\1c", b"d")):
        (folder / "images/0.png").write_bytes(image)
        (folder / "audio/0.wav").write_bytes(audio)
        digests.add(content_digest(dataset, dataset.records[0]))
    assert len(digests) == 4


def test_a_file_that_vanished_has_no_digest(folder):
    dataset = load_dataset(folder)
    (folder / "images/0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png"):
        content_digest(dataset, dataset.records[0])


def test_reading_a_manifest_loads_neither_numpy_nor_torch(folder):
    code = (
        "import sys; from pathlib import Path; from fedfuse_client.data.manifest import load_dataset;"
        "load_dataset(Path(sys.argv[1]));"
        "sys.exit(bool({'numpy', 'torch', 'pyarrow', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
