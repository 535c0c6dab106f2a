"""Everything wrong with a data folder, to the last truncated recording; nothing stops at the first problem.

The deep check decodes every image and recording the way training will, within bounds that hold before a pixel or a
sample is decoded, so that what passes here cannot surprise a round.
"""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Final

from fedfuse_client.data.cells import RowCheck
from fedfuse_client.data.info import find_manifest, read_info
from fedfuse_client.data.manifest import scan
from fedfuse_client.data.rows import Problem, ProblemCode
from fedfuse_shared import limits
from fedfuse_shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import soundfile

MAX_PROBLEMS: Final = 10_000
"""Most problems that are listed."""
IMAGE_FORMATS: Final = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
"""Formats, in Pillow's names, that are opened: each decoder left out is one that cannot be attacked."""
UNSCALED: Final = ("I", "F")
"""Pillow's modes whose pixels have no largest value, so that nothing says what is white."""
AUDIO_FORMATS: Final = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
"""Formats, in libsndfile's names, that are decoded."""

_MAX_SAMPLES: Final = int(limits.MAX_AUDIO_SECONDS * 48_000 * 2)
"""Most samples of one recording over all channels: the longest one in stereo at 48 kHz."""
# Resampling by n/d builds a filter of n x d taps; a rate without a common factor with the model's (16 kHz, say) would
# take gigabytes. Every rate in use is a multiple of 25 Hz.
_RATES: Final = range(4_000, 192_001, 25)
_BLOCK: Final = 2**16  # samples decoded at once
_UNKNOWN_RIFF_SIZE: Final = 0xFFFFFFFF  # written by programs that stream a WAV file and do not go back


def check_folder(
    folder: Path, *, deep: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Return the problems of a data folder in the order of its rows; an empty list means it can be used.

    At ``MAX_PROBLEMS`` it stops and says so in the last: what goes wrong that often is one mistake in a script.

    Args:
        folder: The folder with ``dataset.toml`` and the manifest.
        deep: Also decode every image and recording.
        progress: Called with the files decoded so far and the files there are.

    Raises:
        DataError: there is no such folder.
        ConfigError: a package that reads Parquet, images or audio is not installed.
    """
    found = iter_problems(folder, deep=deep, progress=progress)
    problems = sorted(
        itertools.islice(found, MAX_PROBLEMS), key=lambda problem: (problem.row is not None, problem.row or 0)
    )
    if (another := next(found, None)) is not None:
        message = f"there are more than {MAX_PROBLEMS:,} problems; mend these and check again"
        problems.append(Problem(None, None, ProblemCode.TOO_MANY, message, another.file))
    return problems


def iter_problems(
    folder: Path, *, deep: bool = True, progress: Callable[[int, int], None] | None = None
) -> Iterator[Problem]:
    """Yield every problem of a data folder as it is found: first of the manifest, then of the files.

    Without a sound ``dataset.toml`` nothing says what a row may hold, and only its own problems are found.

    Raises:
        DataError: there is no such folder.
        ConfigError: a package that reads Parquet, images or audio is not installed.
    """
    if not folder.is_dir():
        raise DataError("is not a folder", who=str(folder), advice="name the folder that holds dataset.toml")
    info, manifest = read_info(folder), find_manifest(folder)
    for found in (info, manifest):
        if isinstance(found, tuple):
            yield from found
    if isinstance(info, tuple) or isinstance(manifest, tuple):
        return
    rows = RowCheck(folder, info, manifest)
    for entry in scan(rows):
        if isinstance(entry, Problem):
            yield entry
    if deep:
        yield from _file_problems(rows, progress)


def _file_problems(rows: RowCheck, progress: Callable[[int, int], None] | None) -> Iterator[Problem]:
    for done, ((column, path), row) in enumerate(rows.files.items(), start=1):
        fault = (_image_fault if column == "image" else _audio_fault)(rows.folder / path)
        if fault is not None:
            code, message = fault
            yield Problem(row, column, code, f"{str(path)!r} {message}", rows.manifest)
        if progress is not None:
            progress(done, len(rows.files))


def _image_fault(path: Path) -> tuple[ProblemCode, str] | None:
    """Return why an image cannot be used: of another format, too many pixels, truncated, or damaged."""
    try:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - only the deep check needs it
    except ImportError:
        raise _not_installed("Pillow") from None
    try:
        with warnings.catch_warnings():
            # The size is bounded below, and more tightly than where Pillow begins to warn.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > limits.MAX_IMAGE_PIXELS:
                    return _too_many_pixels(f"has {width} x {height} pixels")
                if image.mode in UNSCALED:
                    return (
                        ProblemCode.UNREADABLE,
                        f"has pixels of mode {image.mode}; save it with 8 or 16 bits",
                    )
                image.verify()
            with Image.open(path, formats=IMAGE_FORMATS) as image:  # verify leaves an image unusable
                image.load()
    except UnidentifiedImageError:
        return ProblemCode.UNREADABLE, f"is not an image of the formats {', '.join(IMAGE_FORMATS)}"
    except Image.DecompressionBombError:
        return _too_many_pixels("is far too large")
    except Exception as error:  # noqa: BLE001 - decoders raise almost anything on malformed bytes
        return ProblemCode.UNREADABLE, f"cannot be decoded: {_one_line(error)}"
    return None


def _too_many_pixels(what: str) -> tuple[ProblemCode, str]:
    return (
        ProblemCode.IMAGE_TOO_LARGE,
        f"{what}, at most {limits.MAX_IMAGE_PIXELS} pixels are decoded; scale it down",
    )


def _audio_fault(path: Path) -> tuple[ProblemCode, str] | None:
    """Return why a recording cannot be used: of another format, too long, truncated, damaged, or not finite."""
    try:
        import soundfile  # noqa: PLC0415 - only the deep check needs it
    except ImportError:
        raise _not_installed("soundfile") from None
    try:
        with path.open("rb") as raw:
            head = raw.read(12)
        with soundfile.SoundFile(path) as sound:
            return (
                header_fault(sound.format, sound.frames, sound.samplerate, sound.channels)
                or truncation_fault(head, path.stat().st_size)
                or _sample_fault(sound)
            )
    # soundfile's own errors are RuntimeErrors
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        return ProblemCode.UNREADABLE, f"cannot be decoded: {_one_line(error)}"


def header_fault(kind: str, frames: int, rate: int, channels: int) -> tuple[ProblemCode, str] | None:
    """Return why a recording with this header is not decoded: of another format, empty, too long, or an odd rate."""
    if kind not in AUDIO_FORMATS:
        return ProblemCode.UNREADABLE, f"is {kind}, not of the formats {', '.join(AUDIO_FORMATS)}"
    if frames <= 0:
        return ProblemCode.EMPTY, "holds no sound, or is truncated"
    if rate not in _RATES:
        rule = f"a multiple of {_RATES.step} from {_RATES[0]} to {_RATES[-1]}"
        return ProblemCode.BAD_RATE, f"has a sampling rate of {rate} Hz, not {rule}; resample it"
    if frames > limits.MAX_AUDIO_SECONDS * rate or frames * channels > _MAX_SAMPLES:
        length = f"is {frames / rate:.0f} s long at {rate} Hz with {channels} channels"
        bound = f"at most {limits.MAX_AUDIO_SECONDS:.0f} s and {_MAX_SAMPLES} samples are decoded; cut it"
        return ProblemCode.AUDIO_TOO_LONG, f"{length}, {bound}"
    return None


def truncation_fault(head: bytes, size: int) -> tuple[ProblemCode, str] | None:
    """Return whether a WAV file ends before its header says: libsndfile shortens it without a word."""
    claimed = int.from_bytes(head[4:8], "little")
    if head[:4] == b"RIFF" and claimed != _UNKNOWN_RIFF_SIZE and claimed + 8 > size:
        return ProblemCode.UNREADABLE, f"is truncated: {size} bytes long, its header says {claimed + 8}"
    return None


def _sample_fault(sound: soundfile.SoundFile) -> tuple[ProblemCode, str] | None:
    import numpy as np  # noqa: PLC0415 - soundfile has loaded it

    decoded = 0
    while len(block := sound.read(max(1, _BLOCK // sound.channels), dtype="float32", always_2d=True)):
        decoded += len(block)
        if not np.isfinite(block).all():
            return (
                ProblemCode.NOT_FINITE,
                f"holds a sample that is no number before {decoded / sound.samplerate:.2f} s",
            )
    if decoded < sound.frames:
        seconds, claimed = decoded / sound.samplerate, sound.frames / sound.samplerate
        return (
            ProblemCode.UNREADABLE,
            f"is truncated: {seconds:.2f} s decoded, its header says {claimed:.2f} s",
        )
    return None


def _not_installed(package: str) -> ConfigError:
    return ConfigError(
        f"opening the files needs {package}", advice="pip install 'fedfuse[site]', or check with --quick"
    )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]
