"""Bad input to `fedfuse simulate`: one line that names file and row, exit 2, and nothing is written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import soundfile
from support.data_folder import write_audio, write_image, write_manifest
from support.small_federation import write_data

from fedfuse_client.store import SiteStore
from fedfuse_shared.cli import main
from fedfuse_shared.errors import StateError
from fedfuse_shared.files import is_disk_full

INFO = """\
name = "animals"
classes = ["cat", "dog"]
modalities = ["text", "image", "audio"]
record = "One animal: its picture, its voice and a line about it."
"""


def rows():
    return [
        {
            "id": f"r{index}",
            "site": ("lyon", "oslo", "turin")[index % 3],
            "split": "test" if index > 8 else "train",
            "label": ("cat", "dog")[index % 2],
            "text": f"animal number {index}",
            "image": f"images/{index}.png",
            "audio": f"audio/{index}.wav",
        }
        for index in range(12)
    ]


@pytest.fixture
def folder(tmp_path):
    """A sound data folder of three sites; the row of record n is n + 2."""
    data = tmp_path / "data"
    for index in range(12):
        write_image(data / f"images/{index}.png", seed=index)
        write_audio(data / f"audio/{index}.wav", seed=index)
    (data / "dataset.toml").write_text(INFO)
    write_manifest(data, rows())
    return data


@pytest.fixture
def fedfuse(monkeypatch, capsys):
    """Run the command line in this process; return its exit code, standard output and standard error."""

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


def change(index, **cells):
    def spoil(folder):
        table = rows()
        table[index].update(cells)
        write_manifest(folder, table)

    return spoil


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def lead_out(folder):
    (folder.parent / "secret.png").write_bytes((folder / "images/4.png").read_bytes())
    (folder / "images/4.png").unlink()
    (folder / "images/4.png").symlink_to("../../secret.png")


def bomb(folder):
    """20,000 x 20,000 pixels, one bit each, in some 50 kB."""

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    size = 20_000
    header = size.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(size * (1 + size // 8)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (folder / "images/3.png").write_bytes(png)


def two_hours(folder):
    minute = np.zeros(60 * 4000, dtype=np.int16)
    with soundfile.SoundFile(folder / "audio/5.wav", "w", 4000, 1, "PCM_U8") as sound:
        for _ in range(120):
            sound.write(minute)


def latin_1(folder):
    manifest = folder / "manifest.csv"
    manifest.write_bytes(manifest.read_bytes().replace(b"animal number 6", "Öchsle".encode("latin-1")))


def two_sites(folder):
    write_manifest(folder, [row for row in rows() if row["site"] != "oslo"])


def no_training_rows(folder):
    write_manifest(
        folder, [{**row, "split": "test" if row["site"] == "oslo" else row["split"]} for row in rows()]
    )


def no_test_rows(folder):
    write_manifest(folder, [row for row in rows() if row["split"] == "train"])


SPOILT = {
    "broken image": (
        replace("images/2.png", b"\x89PNG\r\n\x1a\n" + bytes(60)),
        "row 4 column image",
        "2.png",
    ),
    "truncated audio": (cut("audio/1.wav", 900), "row 3 column audio", "truncated"),
    "path outside": (change(0, image="../x.png"), "row 2 column image", "climbs"),
    "absolute path": (change(0, audio="/etc/passwd"), "row 2 column audio", "absolute"),
    "link outside": (lead_out, "row 6 column image", "out of the folder by a symbolic link"),
    "empty file": (replace("audio/7.wav", b""), "row 9 column audio", "0 bytes"),
    "missing file": (change(7, audio="audio/none.wav"), "row 9 column audio", "no file"),
    "wrong class": (change(5, label="cow"), "row 7 column label", "'cow'"),
    "image of 20,000 x 20,000": (bomb, "row 5 column image", "far too large"),
    "recording of two hours": (two_hours, "row 7 column audio", "7200 s"),
    "text that is not UTF-8": (latin_1, "row 8 column text", "not UTF-8"),
    "formula": (change(8, id="=1+1"), "row 10 column id", "formula"),
    "duplicate id": (change(4, id="r1"), "row 6 column id", "id of row 3"),
    "fewer than three sites": (two_sites, "manifest.csv: 2 sites", "at least 3"),
    "site without training rows": (no_training_rows, "manifest.csv: site oslo", "no training rows"),
    "no test rows": (no_test_rows, "manifest.csv", "no test rows"),
    "no manifest": (lambda folder: (folder / "manifest.csv").unlink(), "manifest.csv", "neither"),
    "bad dataset.toml": (replace("dataset.toml", b"classes = ["), "dataset.toml", "TOML"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_folder_is_refused_in_one_line_before_anything_is_written(folder, fedfuse, fault):
    spoil, place, said = SPOILT[fault]
    spoil(folder)
    out = folder.parent / "run"
    code, printed, errors = fedfuse("simulate", "--data", folder, "--out", out, "--json")
    assert code == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert place in line
    assert said in line
    assert not out.exists()


def test_the_other_problems_are_counted(folder, fedfuse):
    (folder / "images/2.png").write_bytes(b"x")
    (folder / "images/5.png").write_bytes(b"x")
    (folder / "images/6.png").write_bytes(b"x")
    code, _, errors = fedfuse("simulate", "--data", folder, "--out", folder.parent / "run")
    assert code == 2
    assert "row 4" in errors
    assert f"and 2 more; `fedfuse data check {folder}` lists every problem" in errors


SETTINGS = {
    "unknown": ("[privacy]\nepsilonn = 3\n", [], "privacy.epsilonn; did you mean epsilon?"),
    "not toml": ("epsilon: 3\n", [], "settings.toml: is not TOML"),
    "epsilon 0": ("", ["--epsilon", "0"], "privacy.epsilon"),
    "epsilon below 0": ("", ["--epsilon", "-1"], "privacy.epsilon"),
    "epsilon NaN": ("", ["--epsilon", "nan"], "privacy.epsilon"),
    "epsilon NaN in the file": ("[privacy]\nepsilon = nan\n", [], "privacy.epsilon"),
    "epsilon out of reach": ("", ["--epsilon", "1e-9"], "no noise multiplier"),
    "too many colluders": ("", ["--colluders", "3"], "the participants 3"),
    "scenario": ("", ["--scenario", "numbers"], "there is no scenario 'numbers'"),
    "fusion": ("", ["--fusion", "early"], "model.fusion"),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_wrong_setting_is_refused_in_one_line_before_anything_is_written(folder, fedfuse, fault):
    content, options, said = SETTINGS[fault]
    settings, out = folder.parent / "settings.toml", folder.parent / "run"
    settings.write_text(content)
    data = [] if fault == "scenario" else ["--data", folder]
    code, printed, errors = fedfuse("simulate", *data, "--config", settings, *options, "--out", out)
    assert code == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not out.exists()


def test_a_folder_in_use_is_left_as_it_is(folder, fedfuse):
    out = folder.parent / "run"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, _, errors = fedfuse("simulate", "--data", folder, "--out", out)
    assert code == 2
    assert "is not empty" in errors
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    code, _, errors = fedfuse("simulate", "--data", folder, "--out", out / "mine.txt")
    assert code == 2
    assert errors.startswith(f"error: {out}/mine.txt: is not a folder")


def test_an_empty_folder_stays_empty(folder, fedfuse):
    (folder / "images/2.png").write_bytes(b"x")
    out = folder.parent / "run"
    out.mkdir()
    assert fedfuse("simulate", "--data", folder, "--out", out)[0] == 2
    assert list(out.iterdir()) == []


# --- a full disk

SMALL = ("--rounds", "5", "--epsilon", "50")


def simulate(*arguments, **options):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from fedfuse_shared.cli import main; main()",
            "simulate",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, whose size can be changed."""
    path = tmp_path / "disk"
    path.mkdir()

    def resize(size, *, again=True):
        options = f"remount,size={size}" if again else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        return subprocess.run(command, check=again, capture_output=True).returncode == 0

    if shutil.which("mount") is None or not resize("1m", again=False):
        pytest.skip("a small disk cannot be mounted: needs root")
    yield path, resize
    subprocess.run(["umount", path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["100k", "500k", "900k"])
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(tmp_path, disk, size):
    path, resize = disk
    data = write_data(tmp_path / "data")
    resize(size)
    done = simulate("--data", data, *SMALL, "--out", path / "run")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: disk full: ")
    assert "--resume" in last
    assert not list(path.rglob("*.partial"))
    resize("40m")
    resumed = simulate("--resume", path / "run", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert '"audit":true' in resumed.stdout


def test_a_store_on_a_full_disk_is_whole_or_not_there(disk):
    path, _ = disk
    ballast, store = path / "ballast", path / "site" / "store.db"
    refusals = 0
    for room in range(0, 200, 4):  # KiB
        shutil.rmtree(store.parent, ignore_errors=True)
        store.parent.mkdir()
        free = shutil.disk_usage(path).free
        ballast.write_bytes(bytes(free - room * 1024))
        try:
            SiteStore.open(store, create=True).close()
        except StateError as problem:
            refusals += 1
            assert is_disk_full(problem), problem
        ballast.unlink()
        SiteStore.open(store, create=True).close()
    assert 0 < refusals < 50


@pytest.mark.slow
def test_a_file_over_the_limit_of_the_shell_leaves_no_folder(folder, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    done = simulate("--data", folder, *SMALL, "--out", tmp_path / "run", preexec_fn=limit)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: disk full: ")
    assert not (tmp_path / "run").exists()
