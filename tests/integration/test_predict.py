"""A run's model used: one record classified, other rows scored; from the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_folder import write_audio, write_image
from support.small_federation import INFO, SITES, SmallFederation, write_data

from fedfuse_client.data.manifest import load_dataset
from fedfuse_client.data.tensors import RecordTensors
from fedfuse_shared.cli import main
from fedfuse_shared.models import load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    federation = SmallFederation(tmp_path_factory.mktemp("federation"), {"rounds": 5})
    federation.run()
    return federation.home


@pytest.fixture
def fedfuse(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedfuse", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def refused(outcome):
    """Return the one line a refusal consists of."""
    code, printed, errors = outcome
    assert code == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    return line


def test_predictions_are_those_the_run_was_scored_with(run, fedfuse):
    dataset = load_dataset(run.root.parent / "data")
    rows = [r for r in dataset.records if r.text and r.image][:3]
    rows += [r for r in dataset.records if r.text is None][:1]
    rows += [r for r in dataset.records if r.image is None][:1]
    assert len(rows) == 5
    model, _ = load_model(run.model_file)
    batch = RecordTensors(dataset.folder, rows, model.config).batch(range(len(rows)))
    with torch.no_grad():
        logits = model(batch["text"], batch["image"], batch["audio"], batch["present"])
    for row, wanted in zip(rows, logits.softmax(dim=1).tolist(), strict=True):
        given = {"--text": row.text, "--image": row.image and dataset.folder / row.image}
        options = [part for name, value in given.items() if value is not None for part in (name, value)]
        code, printed, _ = fedfuse("predict", run.root, *options, "--json")
        assert code == 0
        found = json.loads(printed)
        assert found["modalities"] == [name[2:] for name, value in given.items() if value is not None]
        assert list(found["probabilities"]) == ["0", "1"]
        assert list(found["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
        assert found["class"] == str(int(np.argmax(wanted)))


def test_the_table_names_every_class_and_what_was_shown(run, fedfuse):
    code, printed, _ = fedfuse("predict", run.root, "--text", "round and nothing else")
    assert code == 0
    assert "From text" in printed
    assert {"0", "1"} <= {line.split()[1] for line in printed.splitlines() if line.startswith("│")}


def test_a_record_with_nothing_is_bad_usage(run, fedfuse):
    assert "give --text, --image or --audio" in refused(fedfuse("predict", run.root))


def test_a_modality_the_model_does_not_read_is_refused(run, fedfuse, tmp_path):
    recording = write_audio(tmp_path / "a.wav")
    line = refused(fedfuse("predict", run.root, "--audio", recording))
    assert "reads no audio; it reads text, image" in line


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_file_that_cannot_be_used_is_named(run, fedfuse, tmp_path, content):
    path = tmp_path / "seven.png"
    if content is not None:
        path.write_bytes(content)
    assert "seven.png: " in refused(fedfuse("predict", run.root, "--text", "round", "--image", path))
    assert str(tmp_path) in refused(fedfuse("predict", run.root, "--image", tmp_path))


@pytest.mark.parametrize("text", ["", "  \n", "\udcff"])
def test_a_text_that_is_none_is_refused(run, fedfuse, text):
    assert refused(fedfuse("predict", run.root, "--text", text)).startswith("error: --text: is ")


def test_a_folder_without_a_model_is_refused(fedfuse, tmp_path):
    assert f"{tmp_path}: holds no model" in refused(fedfuse("predict", tmp_path, "--text", "x"))


def test_a_damaged_model_is_refused(run, fedfuse, tmp_path):
    model = tmp_path / "model" / "model.safetensors"
    model.parent.mkdir()
    raw = bytearray(run.model_file.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    assert "other weights than its card states" in refused(fedfuse("predict", tmp_path, "--text", "x"))


def evaluated(outcome):
    code, printed, errors = outcome
    assert code == 0, errors
    return json.loads(printed)


def test_a_run_is_scored_on_another_folder_of_the_same_classes(run, fedfuse, tmp_path):
    other = write_data(tmp_path / "other", rows_per_site=12)
    scores = evaluated(fedfuse("evaluate", run.root, "--data", other, "--json"))
    assert scores["all_rows"]["rows"] == sum(r.split == "test" for r in load_dataset(other).records)
    own = evaluated(fedfuse("evaluate", run.root, "--json"))
    assert own["all_rows"]["rows"] == len(SITES) * 10
    assert own == evaluated(fedfuse("evaluate", run.root, "--data", run.root.parent / "data", "--json"))


def test_a_folder_of_other_classes_is_refused(run, fedfuse, tmp_path):
    other = write_data(tmp_path / "other", rows_per_site=4)
    (other / "dataset.toml").write_text(INFO.replace('["0", "1"]', '["1", "0"]'))
    assert "has other classes than the model" in refused(fedfuse("evaluate", run.root, "--data", other))


def test_a_spoilt_row_is_named_before_anything_is_scored(run, fedfuse, tmp_path):
    other = write_data(tmp_path / "other", rows_per_site=4)
    write_image(other / "images/0.png", size=(9000, 9000))
    line = refused(fedfuse("evaluate", run.root, "--data", other, "--json"))
    assert f"{Path(other) / 'manifest.csv'} row 2 column image" in line
