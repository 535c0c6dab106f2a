"""What a hostile data folder may try: to reach other files, exhaust memory, fool a terminal or a spreadsheet."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import soundfile
from support.data_folder import rows, write_audio, write_folder, write_image, write_manifest

from fedfuse_client.data.check import MAX_PROBLEMS, check_folder
from fedfuse_client.data.manifest import ProblemCode, load_dataset
from fedfuse_shared import limits
from fedfuse_shared.errors import DataError


@pytest.fixture
def folder(tmp_path):
    write_image(tmp_path / "outside/secret.png")
    return write_folder(tmp_path / "data")


def attack(folder, **cells):
    """Return what the check says of one row with these cells, after seeing that loading refuses it too."""
    records = rows()
    records[0] |= cells
    write_manifest(folder, records)
    with pytest.raises(DataError, match="row 2"):
        load_dataset(folder)
    return [(problem.row, problem.column, problem.code) for problem in check_folder(folder)]


@pytest.mark.parametrize(
    "path", ["../outside/secret.png", "images/../../outside/secret.png", "images/../images/0.png"]
)
def test_a_path_that_climbs(folder, path):
    assert attack(folder, image=path) == [(2, "image", ProblemCode.ESCAPE)]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "//host/share/x.png", "C:/x.png", "C:\\x.png", "\\\\host\\x.png", "images\\0.png"]
)
def test_a_path_that_is_absolute_or_means_something_else_elsewhere(folder, path):
    assert attack(folder, image=path) == [(2, "image", ProblemCode.BAD_PATH)]


def test_a_link_to_a_file_outside(folder):
    (folder / "images/link.png").symlink_to(folder.parent / "outside/secret.png")
    assert attack(folder, image="images/link.png") == [(2, "image", ProblemCode.ESCAPE)]


def test_a_link_to_a_directory_outside(folder):
    (folder / "images/more").symlink_to(folder.parent / "outside")
    assert attack(folder, image="images/more/secret.png") == [(2, "image", ProblemCode.ESCAPE)]


def test_a_chain_of_links_that_ends_outside(folder):
    (folder / "inner").symlink_to(folder / "images")
    (folder / "images/more").symlink_to(folder.parent / "outside")
    (folder / "a.png").symlink_to(folder / "inner/more/secret.png")
    assert attack(folder, image="a.png") == [(2, "image", ProblemCode.ESCAPE)]


def test_a_link_within_the_folder_is_allowed(folder):
    (folder / "images/link.png").symlink_to("0.png")
    records = rows()
    records[1]["image"] = "images/link.png"
    write_manifest(folder, records)
    assert check_folder(folder) == []


def test_a_loop_of_links(folder):
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    assert attack(folder, image="a.png") == [(2, "image", ProblemCode.UNREADABLE)]


def test_a_pipe_is_not_opened(folder):
    os.mkfifo(folder / "images/pipe.png")
    assert attack(folder, image="images/pipe.png") == [(2, "image", ProblemCode.NOT_A_FILE)]


def test_a_pipe_in_place_of_the_manifest_is_not_opened(folder):
    (folder / "manifest.csv").unlink()
    os.mkfifo(folder / "manifest.csv")
    assert [p.code for p in check_folder(folder)] == [ProblemCode.MISSING_FILE]


def test_a_file_of_a_gigabyte(folder):
    with (folder / "images/huge.png").open("wb") as file:
        file.truncate(limits.MAX_FILE + 1)
    assert attack(folder, image="images/huge.png") == [(2, "image", ProblemCode.TOO_LARGE)]


def test_a_manifest_beyond_its_bound(folder):
    with (folder / "manifest.csv").open("r+b") as file:
        file.truncate(limits.MAX_MANIFEST + 1)
    assert [p.code for p in check_folder(folder)] == [ProblemCode.TOO_LARGE]


@pytest.mark.parametrize("column", ["id", "site", "label", "text", "image", "audio"])
def test_nul(folder, column):
    assert attack(folder, **{column: "a\0b"}) == [(2, column, ProblemCode.NUL)]


@pytest.mark.parametrize("column", ["id", "site", "label", "image", "audio"])
@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t="])
def test_a_spreadsheet_formula(folder, column, start):
    assert attack(folder, **{column: f"{start}HYPERLINK(0)"}) == [(2, column, ProblemCode.FORMULA)]


def test_messages_hold_nothing_a_terminal_obeys(folder):
    records = rows()
    escape = "\x1b]0;owned\x07\u202e"
    records[0] |= {
        "id": escape,
        "site": escape,
        "split": escape,
        "label": escape,
        "image": escape,
        "audio": f"/{escape}",
    }
    write_manifest(folder, records)
    messages = [problem.message for problem in check_folder(folder)]
    assert len(messages) == 6
    assert all(message.isprintable() for message in messages)


# --- memory -----------------------------------------------------------------------------------------------


def png(width, height, data):
    """Return a PNG whose header claims a size, with any image data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def codes_within(folder, megabytes):
    """Return the codes found by a process that may take only so much memory beyond what it starts with."""
    code = f"""
import resource, sys
from pathlib import Path
import numpy, soundfile, PIL.Image
from fedfuse_client.data.check import check_folder
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {megabytes} * 2**20,) * 2)
print(*[problem.code for problem in check_folder(Path(sys.argv[1]))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("size", [(20_000, 20_000), (8_000, 7_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_unpacks_to_gigabytes(folder, size):
    """20,000 x 20,000 pixels are 1.2 GB; 8,000 x 7,000 lie below the size at which Pillow itself would warn."""
    (folder / "images/0.png").write_bytes(png(*size, zlib.compress(bytes(2**24))))
    assert codes_within(folder, 100) == [ProblemCode.IMAGE_TOO_LARGE]


def test_a_recording_of_two_hours(folder):
    path = write_audio(folder / "audio/0.wav", rate=8000)
    with path.open("r+b") as file:
        length = 2 * 3600 * 8000 * 2
        file.truncate(44 + length)  # a hole: it takes no room on the disk
        file.seek(4)
        file.write(struct.pack("<I", 36 + length))
        file.seek(40)
        file.write(struct.pack("<I", length))
    assert soundfile.info(path).duration == 7200
    assert codes_within(folder, 100) == [ProblemCode.AUDIO_TOO_LONG]


def test_a_header_that_claims_two_hours(folder):
    path = folder / "audio/0.wav"
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 36 + 2 * 3600 * 8000 * 2)
    content[40:44] = struct.pack("<I", 2 * 3600 * 8000 * 2)
    path.write_bytes(content)
    assert codes_within(folder, 100) == [ProblemCode.UNREADABLE]


def test_silence_packed_into_a_small_file(folder):
    """Ten minutes fit the bound in seconds; at 192 kHz on eight channels they are 3.7 GB of samples."""
    path = folder / "audio/0.flac"
    with soundfile.SoundFile(path, "w", 192_000, 8, "PCM_16") as file:
        for _ in range(65):
            file.write(np.zeros((192_000, 8)))
    assert path.stat().st_size < 2**22
    records = rows()
    records[0]["audio"] = "audio/0.flac"
    write_manifest(folder, records)
    assert codes_within(folder, 100) == [ProblemCode.AUDIO_TOO_LONG]


@pytest.mark.parametrize(
    "content",
    [b'a,lyon,train,cat,"' + b"x\n" * 2**22, b'"\n",' * 2**22, b"x" * 2**24 + b"\nb,lyon,train,cat,ok\n"],
    ids=["cell", "cells", "line"],
)
def test_a_row_without_end(folder, content):
    (folder / "manifest.csv").write_bytes(b"id,site,split,label,text\n" + content)
    assert codes_within(folder, 100) == [ProblemCode.MALFORMED_ROW]


def test_millions_of_bad_rows(folder):
    """The list ends, and says that it does."""
    (folder / "manifest.csv").write_bytes(b"id,site,split,label,text\n" + b"x\n" * 2**22)
    assert codes_within(folder, 100) == [ProblemCode.MALFORMED_ROW] * MAX_PROBLEMS + [ProblemCode.TOO_MANY]
