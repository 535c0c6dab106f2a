"""Decoding within bounds, and records as tensors; every file is made here."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from fedfuse_client.data.cells import Record
from fedfuse_client.data.decoding import decode_audio, decode_image, decode_text
from fedfuse_client.data.tensors import RecordTensors, collate
from fedfuse_shared import limits
from fedfuse_shared.config.base import Modality
from fedfuse_shared.config.model import AudioInput, EncoderConfig, ImageInput, ModelConfig
from fedfuse_shared.errors import DataError

IMAGE, AUDIO = ImageInput(size=16), AudioInput()
SHADES = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
TIME = np.arange(8000) / 8000


def word(rate=8000, level=0.5):
    """Return a made-up word of two tones with silence around it."""
    time = np.arange(int(0.6 * rate)) / rate
    sound = np.where(time < 0.3, np.sin(2 * np.pi * 400 * time), np.sin(2 * np.pi * 1500 * time))
    return level * np.concatenate([np.zeros(rate // 5), sound, np.zeros(rate // 3)])


def saved(path, image, **options):
    image.save(path, **options)
    return path


def recorded(path, samples, rate=8000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


# --- images


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "L"), ("a.png", "RGB"), ("a.png", "P"), ("a.bmp", "L"), ("a.gif", "P")]
)
def test_every_pixel_format_gives_the_same_shades(tmp_path, name, mode):
    path = saved(tmp_path / name, Image.fromarray(SHADES).convert(mode))
    pixels = decode_image(path, IMAGE)
    assert pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels, torch.from_numpy(SHADES / 255).float().expand(3, 16, 16), atol=1e-6)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    path = saved(tmp_path / "scan.png", Image.fromarray(SHADES.astype(np.uint16) * 257))
    assert torch.allclose(decode_image(path, IMAGE)[0], torch.from_numpy(SHADES / 255).float(), atol=1e-6)


def test_transparent_parts_are_white(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = 255, 0, 0, 255
    pixels = decode_image(saved(tmp_path / "a.png", Image.fromarray(clear)), IMAGE)
    assert (pixels[:, :8] == torch.tensor([1.0, 0.0, 0.0])[:, None, None]).all()
    assert (pixels[:, 8:] == 1).all()


def test_aspect_is_kept_and_borders_are_continued(tmp_path):
    wide = np.zeros((8, 32), np.uint8)
    wide[4:] = 255
    pixels = decode_image(saved(tmp_path / "a.png", Image.fromarray(wide)), IMAGE)
    assert (pixels[:, :7] == 0).all()
    assert (pixels[:, 9:] == 1).all()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    upright = np.zeros((16, 16), np.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode_image(saved(tmp_path / "a.png", Image.fromarray(upright), exif=exif), IMAGE)
    assert (pixels[:, 8:] == 1).all()


def bomb():
    raw = io.BytesIO()
    Image.new("1", (9000, 9000)).save(raw, "PNG")
    return raw.getvalue()


def cut():
    raw = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)).save(raw, "PNG")
    return raw.getvalue()[:1500]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"not an image", "cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "cannot be read as an image"),
        (bomb(), "9000x9000 pixels"),
        (cut(), "cannot be read as an image"),
    ],
    ids=["empty", "text", "header", "postscript", "bomb", "cut"],
)
def test_a_bad_image_is_named_with_the_reason(tmp_path, content, said):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.png: .*{said}"):
        decode_image(path, IMAGE)


def test_floating_point_pixels_are_refused_with_advice(tmp_path):
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        decode_image(path, IMAGE)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        decode_image(tmp_path / "gone.png", IMAGE)


# --- recordings


def test_level_channels_and_surrounding_silence_do_not_matter(tmp_path):
    usual = decode_audio(recorded(tmp_path / "a.wav", word(), subtype="FLOAT"), AUDIO)
    assert usual.shape == (40, 48)
    assert usual.max() == pytest.approx(0, abs=1e-3)
    assert usual.min() >= np.log(1e-6) - 1e-3
    quiet = decode_audio(recorded(tmp_path / "b.wav", word(level=0.01), subtype="FLOAT"), AUDIO)
    stereo = decode_audio(
        recorded(tmp_path / "c.wav", np.stack([word()] * 2, axis=1), subtype="FLOAT"), AUDIO
    )
    padded = np.concatenate([np.zeros(800), word(), np.zeros(4000)])
    later = decode_audio(recorded(tmp_path / "d.wav", padded, subtype="FLOAT"), AUDIO)
    for other in (quiet, stereo, later):
        assert torch.allclose(usual, other, atol=0.05)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_recordings_at_other_rates_look_alike(tmp_path, rate):
    usual = decode_audio(recorded(tmp_path / "a.wav", word()), AUDIO)
    other = decode_audio(recorded(tmp_path / "b.wav", word(rate), rate), AUDIO)
    assert torch.corrcoef(torch.stack([usual.flatten(), other.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("rate", [3975, 8001, 44_101, 192_025, 383_999])
def test_a_rate_no_recording_has_is_refused_before_a_giant_filter_is_built(tmp_path, rate, monkeypatch):
    path = recorded(tmp_path / "a.wav", word(rate)[: rate // 2], rate)
    monkeypatch.setattr("fedfuse_client.data.decoding.resample", None)
    with pytest.raises(DataError, match=rf"a\.wav: .*{rate} Hz, not a multiple of 25 from 4000 to 192000"):
        decode_audio(path, AUDIO)


@pytest.mark.parametrize("rate", [4000, 11_025, 191_975, 192_000])
def test_every_rate_within_the_bounds_is_read(tmp_path, rate):
    assert decode_audio(recorded(tmp_path / "a.wav", word(rate), rate), AUDIO).shape == (40, 48)


def test_a_cut_recording_is_refused(tmp_path):
    path = recorded(tmp_path / "a.wav", word())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.wav: is truncated"):
        decode_audio(path, AUDIO)


def test_many_channels_count_against_the_same_bound_of_samples(tmp_path, monkeypatch):
    path = recorded(tmp_path / "a.wav", np.zeros((1000, 40)))
    assert decode_audio(path, AUDIO).shape == (40, 48)
    monkeypatch.setattr("fedfuse_client.data.check._MAX_SAMPLES", 39_999)
    with pytest.raises(DataError, match="with 40 channels"):
        decode_audio(path, AUDIO)


def test_what_the_check_of_the_folder_does_not_open_is_not_decoded(tmp_path):
    path = recorded(tmp_path / "a.au", word())
    with pytest.raises(DataError, match="is AU, not of the formats"):
        decode_audio(path, AUDIO)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_every_usual_container_is_read(tmp_path, suffix):
    assert decode_audio(recorded(tmp_path / f"a.{suffix}", word(16_000), 16_000), AUDIO).shape == (40, 48)


@pytest.mark.parametrize("samples", [np.zeros(4000), np.zeros(1), np.full(3, 1e-30), np.full(4000, 3e38)])
def test_silence_and_extremes_stay_finite(tmp_path, samples):
    mel = decode_audio(recorded(tmp_path / "a.wav", samples, subtype="FLOAT"), AUDIO)
    assert torch.isfinite(mel).all()


@pytest.mark.parametrize(
    ("samples", "rate", "said"),
    [
        (np.zeros(0), 8000, "holds no sound"),
        (np.array([0.0, np.nan]), 8000, "not finite"),
        (np.array([0.0, np.inf]), 8000, "not finite"),
        (np.zeros(601 * 4000), 4000, "601 s long"),
        (np.zeros(10), 500_000, "500000 Hz"),
    ],
)
def test_a_bad_recording_is_named_with_the_reason(tmp_path, samples, rate, said):
    path = recorded(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(DataError, match=rf"bad\.wav: .*{said}"):
        decode_audio(path, AUDIO)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"fLaC" + bytes(40), b"OggS" + bytes(100)])
def test_a_file_that_is_no_recording_is_refused(tmp_path, content):
    path = tmp_path / "bad.flac"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.flac"):
        decode_audio(path, AUDIO)


def test_a_text_over_the_limit_is_refused():
    assert decode_text("ok") == "ok"
    with pytest.raises(DataError, match="characters"):
        decode_text("x" * (limits.MAX_TEXT + 1))


# --- records as tensors

MODEL = ModelConfig(
    classes=("a", "b"),
    encoders={
        Modality.TEXT: EncoderConfig(name="hashed-words", width=16),
        Modality.IMAGE: EncoderConfig(name="oriented-gradients"),
        Modality.AUDIO: EncoderConfig(name="spectral-shape"),
    },
    image=IMAGE,
)


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "a.png", Image.fromarray(SHADES))
    recorded(tmp_path / "a.wav", word())
    (tmp_path / "bad.png").write_bytes(b"no image")
    return tmp_path


def record(row, label=0, text=None, image=None, audio=None):
    return Record(row, f"r{row}", "here", "train", label, text, image and Path(image), audio and Path(audio))


def test_records_become_features_with_zeros_where_a_modality_is_missing(folder):
    data = RecordTensors(
        folder,
        [record(2, 1, "one two", "a.png", "a.wav"), record(3, text="one"), record(4, image="a.png")],
        MODEL,
    )
    batch = data.batch([0, 1, 2])
    assert batch["present"].tolist() == [[True] * 3, [True, False, False], [False, True, False]]
    assert batch["label"].tolist() == [1, 0, 0]
    for column, name in enumerate(("text", "image", "audio")):
        assert ((batch[name].norm(dim=1) > 0.9) == batch["present"][:, column]).all()
    items = collate([data[index] for index in range(len(data))])
    for name, values in batch.items():
        assert torch.equal(items[name], values)


def test_each_file_is_decoded_once_and_only_when_asked_for(folder):
    data = RecordTensors(folder, [record(2, image="a.png"), record(3, image="bad.png")], MODEL)
    first = data.batch([0])
    (folder / "a.png").unlink()
    assert torch.equal(first["image"], data.batch([0])["image"])


def test_a_broken_record_is_an_error_when_loaded_and_left_out_when_drawn(folder, caplog):
    data = RecordTensors(folder, [record(2, text="x"), record(3, text="x", image="bad.png")], MODEL)
    with pytest.raises(DataError, match=r"bad\.png"):
        data.batch([0, 1])
    data = RecordTensors(folder, [record(2, text="x"), record(3, text="x", image="bad.png")], MODEL)
    with caplog.at_level(logging.WARNING):
        assert data.usable([1, 0, 1]) == [0]
        assert data.usable([1]) == []
    assert [r.getMessage() for r in caplog.records if "row 3 left out" in r.getMessage()] == [
        r.getMessage() for r in caplog.records
    ]
    assert len(caplog.records) == 1


def test_a_model_without_a_modality_does_not_open_its_files(folder):
    only_text = MODEL.model_copy(update={"encoders": {Modality.TEXT: MODEL.encoders[Modality.TEXT]}})
    batch = RecordTensors(folder, [record(2, text="x", image="bad.png")], only_text).batch([0])
    assert batch["present"].tolist() == [[True, False, False]]
    assert batch["image"].shape == (1, 0)
