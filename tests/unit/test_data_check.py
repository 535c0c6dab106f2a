"""The deep check finds what training would trip over, and finds nothing in good folders."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from support.data_folder import rows, write_folder, write_manifest

from fedfuse_client.data.check import check_folder, iter_problems
from fedfuse_client.data.manifest import ProblemCode

DATA = Path(os.environ.get("FEDFUSE_DATA", Path(__file__).parents[2].parent / "shared/data"))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def found(folder, *, deep=True):
    return [(problem.row, problem.column, problem.code) for problem in check_folder(folder, deep=deep)]


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def tone(seconds=1.0, rate=16_000):
    return 0.5 * np.sin(np.arange(int(seconds * rate)) / 10)


@pytest.mark.data
@pytest.mark.parametrize("name", ["digits", pytest.param("stamps", marks=pytest.mark.slow)])
def test_the_real_data_sets_have_no_problems(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"there is no {DATA / name}; set FEDFUSE_DATA")
    assert check_folder(DATA / name) == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".webp", ".tiff"])
def test_an_image_of_each_format_passes_whole_and_fails_when_cut(folder, suffix):
    records = rows()
    records[1]["image"] = f"images/x{suffix}"
    path = folder / records[1]["image"]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    write_manifest(folder, records)
    assert found(folder) == []
    cut(path, 0.6)
    assert found(folder) == [(3, "image", ProblemCode.UNREADABLE)]
    assert found(folder, deep=False) == []


def test_a_flipped_byte_in_an_image_is_found(folder):
    path = folder / "images/2.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert found(folder) == [(4, "image", ProblemCode.UNREADABLE)]


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"]
)
def test_what_is_no_image(folder, content):
    (folder / "images/0.png").write_bytes(content)
    code = ProblemCode.UNREADABLE if content else ProblemCode.EMPTY
    assert found(folder) == [(2, "image", code)]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_a_recording_of_each_format_passes_whole_and_fails_when_cut(folder, suffix):
    records = rows()
    records[1]["audio"] = f"audio/x{suffix}"
    path = folder / records[1]["audio"]
    soundfile.write(path, tone(), 16_000)
    write_manifest(folder, records)
    assert found(folder) == []
    cut(path, 0.6)
    ((row, column, code),) = found(folder)
    assert (row, column) == (3, "audio")
    assert code in {ProblemCode.UNREADABLE, ProblemCode.EMPTY}
    assert found(folder, deep=False) == []


def test_samples_that_are_no_numbers(folder):
    samples = tone()
    samples[5000] = np.nan
    soundfile.write(folder / "audio/0.wav", samples, 16_000, subtype="FLOAT")
    assert found(folder) == [(2, "audio", ProblemCode.NOT_FINITE)]


def test_no_samples_at_all(folder):
    soundfile.write(folder / "audio/0.wav", np.zeros(0), 16_000)
    assert found(folder) == [(2, "audio", ProblemCode.EMPTY)]


@pytest.mark.parametrize("rate", [44_099, 1, 3_975, 192_025])
def test_a_sampling_rate_nobody_uses(folder, rate):
    soundfile.write(folder / "audio/0.wav", tone(), rate)
    assert found(folder) == [(2, "audio", ProblemCode.BAD_RATE)]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_usual_sampling_rates(folder, rate):
    soundfile.write(folder / "audio/0.wav", tone(), rate)
    assert found(folder) == []


def test_a_format_that_is_not_listed(folder):
    soundfile.write(folder / "audio/0.wav", tone(), 16_000, format="AIFF")
    assert found(folder) == [(2, "audio", ProblemCode.UNREADABLE)]


def test_a_streamed_wav_with_no_length_passes(folder):
    """FFmpeg writing to a pipe cannot know the length and leaves it all ones."""
    path = folder / "audio/0.wav"
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    assert found(folder) == []


def test_bad_cells_do_not_keep_good_files_from_being_opened(folder):
    records = rows()
    records[0]["label"] = "cow"
    write_manifest(folder, records)
    cut(folder / "images/0.png", 0.5)
    assert found(folder) == [(2, "label", ProblemCode.UNKNOWN_CLASS), (2, "image", ProblemCode.UNREADABLE)]


def test_a_file_shared_by_rows_is_opened_once(folder):
    records = rows()
    for record in records:
        record["image"] = "images/0.png"
    write_manifest(folder, records)
    cut(folder / "images/0.png", 0.5)
    assert found(folder) == [(2, "image", ProblemCode.UNREADABLE)]


def test_progress_counts_every_file(folder):
    calls = []
    list(iter_problems(folder, progress=lambda done, total: calls.append((done, total))))
    assert calls == [(done, 8) for done in range(1, 9)]
