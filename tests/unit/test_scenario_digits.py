"""The embedded scenario `digits`: real images each once, gaps and skew as stated, the same bytes for a seed."""

import csv
import hashlib
import itertools
import subprocess
import sys
import threading
import tomllib
from collections import Counter

import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.datasets import load_digits

from fedfuse_client.data.check import check_folder
from fedfuse_client.data.manifest import load_dataset
from fedfuse_shared.errors import ConfigError
from fedfuse_simulations.scenarios import SCENARIOS
from fedfuse_simulations.scenarios.digits import write
from fedfuse_simulations.scenarios.sentences import LANGUAGES, number_word, sentence
from fedfuse_simulations.scenarios.speech import VARIANTS, Voice, speak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("scenario") / "digits"
    SCENARIOS["digits"].write(target, seed=7)
    return target


@pytest.fixture(scope="module")
def dataset(folder):
    return load_dataset(folder)


def test_it_has_no_problems(folder):
    assert check_folder(folder) == []
    assert sorted(path.name for path in folder.parent.iterdir()) == ["digits"]


def test_every_image_of_scikit_learn_is_used_once(dataset):
    real = load_digits()
    expected = Counter(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(real.images, real.target, strict=True)
    )
    used = [record for record in dataset.records if record.image is not None]
    written = Counter(
        (np.asarray(Image.open(dataset.folder / record.image)).tobytes(), record.label) for record in used
    )
    assert len({record.image for record in used}) == len(used) == 1797
    assert written == expected


def test_a_fifth_of_each_modality_is_missing_and_never_all(dataset):
    for modality in ("text", "image", "audio"):
        missing = sum(getattr(record, modality) is None for record in dataset.records) / len(dataset.records)
        assert 0.17 < missing < 0.23, modality
    assert all(r.text or r.image or r.audio for r in dataset.records)


def test_half_of_each_sites_test_records_are_complete(dataset):
    assert dataset.sites() == LANGUAGES
    for site in LANGUAGES:
        test = dataset.select(site, "test")
        assert 2 * sum(bool(r.text and r.image and r.audio) for r in test) >= len(test)


def test_a_fifth_of_each_class_at_each_site_is_held_out(dataset):
    for site in LANGUAGES:
        for label in range(10):
            cell = [record for record in dataset.select(site) if record.label == label]
            held_out = sum(record.split == "test" for record in cell)
            assert abs(held_out - len(cell) / 5) <= 0.5


def test_classes_are_skewed_but_mildly(dataset):
    shares = np.array(
        [np.bincount([r.label for r in dataset.select(site)], minlength=10) for site in LANGUAGES],
        dtype=float,
    )
    shares /= shares.sum(axis=1, keepdims=True)
    assert shares.min() > 0.01
    assert 0.12 < shares.max() < 0.3


def test_neither_position_nor_name_gives_the_class_away(dataset):
    for site in LANGUAGES:
        records = dataset.select(site)
        labels = [record.label for record in records]
        runs = sum(first == second for first, second in itertools.pairwise(labels))
        assert runs < 0.25 * len(labels)
        splits = [record.split == "test" for record in records]
        assert 0.05 < np.mean(splits[: len(splits) // 2]) < 0.35
    for record in dataset.records:
        number = record.id.removeprefix(f"{record.site}-")
        assert {p.stem for p in (record.image, record.audio) if p} <= {number}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fedfuse_simulations.scenarios import SCENARIOS;"
        "SCENARIOS['digits'].write(Path(sys.argv[1]), seed=int(sys.argv[2]))"
    )
    for seed in (7, 8):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(seed)), str(seed)], check=True)
    assert digest(tmp_path / "7") == digest(folder)
    assert digest(tmp_path / "8") != digest(folder)


def digest(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_recordings_are_neither_silent_nor_clipped_nor_long(dataset):
    by_word = {}
    for record in dataset.records:
        if record.audio is None:
            continue
        samples, rate = soundfile.read(dataset.folder / record.audio)
        assert rate == 22_050
        assert 0.2 < len(samples) / rate < 1.5
        assert 0.1 < np.abs(samples).max() < 0.95
        by_word.setdefault((record.site, record.label), []).append(samples.tobytes())
    assert len(by_word) == 60
    assert all(len(set(sounds)) == len(sounds) for sounds in by_word.values())


def test_sentences_vary_and_hold_no_numerals(dataset):
    for site in LANGUAGES:
        sentences = [record.text for record in dataset.select(site) if record.text]
        assert len(set(sentences)) > 0.5 * len(sentences)
        assert not any(character.isdigit() for text in sentences for character in text)


def test_it_says_that_the_speech_is_synthetic(folder):
    info = tomllib.loads((folder / "dataset.toml").read_text())
    assert info["synthetic_speech"] is True
    assert info["seed"] == 7
    assert "synthetic" in SCENARIOS["digits"].description


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "digits", seed=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_write_over_anything(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "there", seed=0)
    with pytest.raises(ConfigError, match="not a folder"):
        write(tmp_path / "none/digits", seed=0)


@pytest.mark.parametrize("module", ["espeakng_loader", "num2words", "sklearn.datasets"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module):
    from fedfuse_simulations.scenarios import speech

    monkeypatch.setitem(sys.modules, module, None)
    speech._engine.cache_clear()
    with pytest.raises(ConfigError, match=r"fedfuse\[simulation\]"):
        write(tmp_path / "digits", seed=0)
    assert list(tmp_path.iterdir()) == []


# --- words and voices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_ten_words_of_a_language_sound_different(language):
    words = [number_word(digit, language) for digit in range(10)]
    assert len(set(words)) == 10
    voice = Voice(language, "Denis", 160, 50, 50)
    assert len({speak(word, voice).tobytes() for word in words}) == 10


def test_voices_and_languages_sound_different_and_repeat_exactly():
    voices = [Voice(language, variant, 160, 50, 50) for language in LANGUAGES for variant in VARIANTS]
    first = [speak("no", voice).tobytes() for voice in voices]
    again = [speak("no", voice).tobytes() for voice in reversed(voices)]
    assert first == again[::-1]
    assert len(set(first)) >= len(VARIANTS) * (len(LANGUAGES) - 1)


def test_threads_do_not_mix_their_words():
    voices = [Voice(language, variant, 160, 50, 50) for language in LANGUAGES for variant in VARIANTS[:4]]
    alone = [speak("no", voice).tobytes() for voice in voices]
    heard = {}

    def talk(start):
        for index in range(start, start + len(voices)):
            heard[start, index] = speak("no", voices[index % len(voices)]).tobytes()

    threads = [threading.Thread(target=talk, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(sound == alone[index % len(voices)] for (_, index), sound in heard.items())
    assert len(heard) == 4 * len(voices)


def test_an_unknown_language_is_refused():
    with pytest.raises(ConfigError, match=r"cannot speak as xx-none\+Denis"):
        speak("no", Voice("xx-none", "Denis", 160, 50, 50))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_without_typing_error_holds_the_word(language):
    generator = np.random.default_rng(0)
    texts = [sentence(digit, language, generator).lower() for digit in range(10) for _ in range(30)]
    words = [number_word(digit, language) for digit in range(10) for _ in range(30)]
    held = sum(word in text for word, text in zip(words, texts, strict=True))
    assert held > 0.9 * len(texts)


def test_the_list_of_scenarios_loads_nothing_heavy():
    code = (
        "import sys, fedfuse_simulations.scenarios;"
        "sys.exit(bool({'numpy', 'sklearn', 'espeakng_loader', 'num2words'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_manifest_is_plain_csv(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "site", "split", "label", "text", "image", "audio"]
    assert len({row["id"] for row in rows}) == len(rows)
