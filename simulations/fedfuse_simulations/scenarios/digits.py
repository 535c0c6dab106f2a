"""The scenario ``digits``: real handwriting, synthetic speech, made-up sentences; six sites, a language each.

- image: scikit-learn's ``load_digits``, 1,797 images of 8x8 pixels from the UCI test set of Optical Recognition of
  Handwritten Digits (Alpaydin and Kaynak 1998, CC BY 4.0), each used in exactly one record.
- audio: the digit's word in the site's language **spoken by a synthesiser** (eSpeak NG) in twelve voices, with pitch,
  speed, pauses, level and background noise drawn anew. It is easier than human speech: results on it show that the
  pipeline works, not how well it recognises people.
- text: one of eight sentences of the site's language with the word in it, half of them with another number too.

The modalities of a record share its class and nothing else.
"""

from __future__ import annotations

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import tomli_w

from fedfuse_shared.errors import ConfigError
from fedfuse_simulations.scenarios.sentences import LANGUAGES, number_word, sentence
from fedfuse_simulations.scenarios.speech import RATE, VARIANTS, Voice, speak

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

MISSING: Final = 0.2
"""Share of records that lack a given modality."""
TEST: Final = 0.2
"""Share of each class at each site that is held out."""
CONCENTRATION: Final = 10.0
"""Of the Dirichlet distribution from which each class draws its shares among the sites: lower is more skewed."""

# Half the test records are kept complete, and no record loses all it has; the rest loses text and audio at this rate,
# so that both come out missing at MISSING.
_DROP: Final = 0.235
_INFO: Final = {
    "name": "digits-synthetic",
    "task": "classification",
    "classes": [str(digit) for digit in range(10)],
    "modalities": ["text", "image", "audio"],
    "record": "One digit seen three ways: a handwritten image, its word spoken by a synthesiser, and a made-up "
    "sentence that holds the word. The three share only the class.",
    "sites": list(LANGUAGES),
    "site_meaning": "language code",
    "synthetic_speech": True,
    "speech": "eSpeak NG, no human voice: easier than real speech",
    "text_origin": "eight sentence templates for each language, one sentence in ten with a typing error",
    "image_origin": "scikit-learn load_digits: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
    "image_format": "8x8 8-bit greyscale PNG",
    "audio_format": f"FLAC 16-bit mono {RATE} Hz",
    "missing": "empty cell; each modality is missing in a fifth of the records, never all three; "
    "at least half the test records are complete",
    "skew": f"each class is spread over the sites by a draw from a symmetric Dirichlet({CONCENTRATION:g})",
    "split": "80/20 within each class and site",
}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A record before its files are made; ``image`` is an index into load_digits."""

    site: str
    digit: int
    split: str
    image: int | None
    text: bool
    audio: bool


def write(folder: Path, *, seed: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the scenario's data folder, whole or not at all; the same seed gives the same bytes.

    Args:
        folder: Where to; its parent exists and it does not.
        seed: Seed of shares, split, gaps, sentences, voices and noise.
        progress: Called with the records written so far and the records there will be.

    Raises:
        ConfigError: the folder exists already, its parent does not, or a package is missing.
    """
    if folder.exists():
        raise ConfigError("exists already", who=str(folder), advice="name another folder or remove it")
    if not folder.parent.is_dir():
        raise ConfigError("is not a folder", who=str(folder.parent), advice="make it first")
    images, digits = _handwriting()
    # Data of a scenario is public and must be repeatable: a seeded generator is right here, and nowhere near privacy.
    generator = np.random.default_rng(seed)
    drafts = _draft(digits, generator)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        rows = _write_files(made, drafts, images, generator, progress)
        with (made / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "site", "split", "label", "text", "image", "audio"])
            writer.writeheader()
            writer.writerows(rows)
        (made / "dataset.toml").write_bytes(tomli_w.dumps({**_INFO, "seed": seed}).encode())
        made.rename(folder)


def _handwriting() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the images ``(1797, 8, 8)`` in 0 to 255 and their digits ``(1797,)``."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - a second to import
    except ImportError as error:
        raise ConfigError(
            "handwriting needs scikit-learn", advice="pip install 'fedfuse[simulation]'"
        ) from error
    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


def _draft(digits: npt.NDArray[np.int64], generator: np.random.Generator) -> list[_Draft]:
    """Return the records in a random order within each site, so that position says nothing of the class."""
    drafts: list[_Draft] = []
    for digit in range(10):
        images = generator.permutation(np.flatnonzero(digits == digit))
        without = round(len(images) * MISSING / (1 - MISSING))
        shares = generator.dirichlet([CONCENTRATION] * len(LANGUAGES))
        ends = np.cumsum(shares)[:-1]
        imaged = np.split(images, np.round(ends * len(images)).astype(int))
        imageless = np.diff(np.round(np.concatenate([[0], ends, [1]]) * without).astype(int))
        for site, own, gaps in zip(LANGUAGES, imaged, imageless, strict=True):
            drafts += _cell(site, digit, [*map(int, own), *[None] * int(gaps)], generator)
    return [
        draft for site in LANGUAGES for draft in _shuffled([d for d in drafts if d.site == site], generator)
    ]


def _cell(site: str, digit: int, images: list[int | None], generator: np.random.Generator) -> list[_Draft]:
    """Return the records of one class at one site: which are held out, which are complete, what the others lack."""
    held_out = round(len(images) * TEST)
    complete = -(
        -held_out // 2
    )  # the list begins with those that have an image: they fill the test set's first half
    order = [*images[:complete], *_shuffled(images[complete:], generator)]
    drafts = []
    for index, image in enumerate(order):
        text = audio = True
        if index >= complete:
            text, audio = (generator.random(2) >= _DROP).tolist()
            while image is None and not (text or audio):
                text, audio = (generator.random(2) >= _DROP).tolist()
        drafts.append(_Draft(site, digit, "test" if index < held_out else "train", image, text, audio))
    return drafts


def _shuffled(items: list[Any], generator: np.random.Generator) -> list[Any]:
    return [items[index] for index in generator.permutation(len(items))]


def _write_files(
    folder: Path,
    drafts: list[_Draft],
    images: npt.NDArray[np.uint8],
    generator: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, str]]:
    """Write images and recordings and return the manifest's rows; ids and names are numbers within the site."""
    import soundfile  # noqa: PLC0415 - with Pillow, only needed here
    from PIL import Image  # noqa: PLC0415

    for site in LANGUAGES:
        (folder / "images" / site).mkdir(parents=True)
        (folder / "audio" / site).mkdir(parents=True)
    words = {(site, digit): number_word(digit, site) for site in LANGUAGES for digit in range(10)}
    rows: list[dict[str, str]] = []
    for number, draft in enumerate(drafts):
        row = {
            "id": f"{draft.site}-{number:04d}",
            "site": draft.site,
            "split": draft.split,
            "label": str(draft.digit),
        }
        if draft.text:
            row["text"] = sentence(draft.digit, draft.site, generator)
        if draft.image is not None:
            row["image"] = f"images/{draft.site}/{number:04d}.png"
            Image.fromarray(images[draft.image]).save(folder / row["image"])
        if draft.audio:
            row["audio"] = f"audio/{draft.site}/{number:04d}.flac"
            sound = _recording(words[draft.site, draft.digit], draft.site, generator)
            soundfile.write(folder / row["audio"], sound, RATE, subtype="PCM_16")
        rows.append(row)
        if progress is not None:
            progress(number + 1, len(drafts))
    return rows


def _recording(word: str, language: str, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a word as recorded in some room, ``(samples,)`` in -1 to 1: pauses around it, noise under it."""
    voice = Voice(
        language=language,
        variant=VARIANTS[generator.integers(len(VARIANTS))],
        speed=int(generator.integers(120, 200)),
        pitch=int(generator.integers(20, 81)),
        pitch_range=int(generator.integers(20, 81)),
    )
    spoken = speak(word, voice)
    before, after = (generator.uniform(0.03, 0.2, 2) * RATE).astype(int)
    sound: npt.NDArray[np.float64] = np.pad(spoken, (before, after)).astype(np.float64)
    power = np.mean(spoken**2)
    ratio = 10 ** (generator.uniform(10, 30) / 10)  # signal over noise: 10 to 30 dB
    sound += _noise(len(sound), generator) * np.sqrt(power / ratio)
    level = 10 ** (generator.uniform(-18, -1) / 20)  # peak: -18 to -1 dB of full scale
    sound *= level / np.abs(sound).max()
    return sound


def _noise(length: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return noise of unit power whose spectrum falls by 0 (hiss) to 6 (rumble) dB an octave, drawn anew."""
    size = (
        1 << (length - 1).bit_length()
    )  # a power of two: other lengths can make the transform ten times slower
    spectrum = np.fft.rfft(generator.standard_normal(size))
    tilt = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 20.0) ** -generator.uniform(0, 1)
    noise: npt.NDArray[np.float64] = np.fft.irfft(spectrum * tilt, size)[:length]
    return noise / float(np.sqrt(np.mean(noise**2)))
