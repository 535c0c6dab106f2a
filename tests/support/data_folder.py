"""Small data folders made of real files, right in every respect until a test spoils one."""

import csv
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

COLUMNS = ("id", "site", "split", "label", "text", "image", "audio")
INFO = """\
name = "animals"
task = "classification"
classes = ["cat", "dog"]
modalities = ["text", "image", "audio"]
record = "One animal: its picture, its voice and a line about it."
"""
Row = dict[str, str]


def write_image(path: Path, *, size: tuple[int, int] = (8, 8), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_audio(path: Path, *, seconds: float = 0.25, rate: int = 8000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate))
    soundfile.write(path, samples, rate)
    return path


def rows(count: int = 4) -> list[Row]:
    """Return sound rows; ``write_folder`` makes the files they name."""
    return [
        {
            "id": f"r{index}",
            "site": "lyon" if index % 2 else "turin",
            "split": "test" if index % 4 == 3 else "train",
            "label": "dog" if index % 3 else "cat",
            "text": f"animal number {index}",
            "image": f"images/{index}.png",
            "audio": f"audio/{index}.wav",
        }
        for index in range(count)
    ]


def write_manifest(folder: Path, records: list[Row]) -> Path:
    path = folder / "manifest.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    return path


def write_folder(folder: Path, records: list[Row] | None = None) -> Path:
    """Write a data folder; paths that rows name, and that sound rows have, get real files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.toml").write_text(INFO, encoding="utf-8")
    for index in range(len(records or rows())):
        write_image(folder / f"images/{index}.png", seed=index)
        write_audio(folder / f"audio/{index}.wav", seed=index)
    write_manifest(folder, rows() if records is None else records)
    return folder
