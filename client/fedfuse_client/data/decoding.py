"""One record's files, decoded within bounds: text as it is, images to RGB, recordings to a log-mel spectrogram.

Headers are checked before anything is unpacked. Whatever is wrong with a file ends in a DataError with its name.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchaudio.functional import melscale_fbanks, resample
from torchvision.transforms import v2

from fedfuse_shared import limits
from fedfuse_shared.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from fedfuse_shared.config.model import AudioInput, ImageInput

_FORMATS: Final = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
_WINDOW: Final = 0.032  # seconds a spectrum is taken over
_HOP: Final = 0.01  # seconds between spectra
_LOWEST: Final = 60.0  # Hz: below it, hum
_TRIM: Final = 1e-4  # share of the loudest frame's energy (-40 dB) that counts as sound
_FLOOR: Final = 1e-6  # share of the loudest mel cell (-60 dB) below which all is silence


def decode_text(text: str) -> str:
    """Return a text cell.

    Raises:
        DataError: longer than ``limits.MAX_TEXT``.
    """
    if len(text) > limits.MAX_TEXT:
        raise DataError(f"text has {len(text)} characters, at most {limits.MAX_TEXT} are read")
    return text


def decode_image(path: Path, wanted: ImageInput) -> Tensor:
    """Return an image as RGB ``(3, size, size)`` in [0, 1], aspect kept, borders continued, on white where clear.

    Raises:
        DataError: unreadable, not an image, or larger than ``limits.MAX_IMAGE_PIXELS``.
    """
    _check_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > limits.MAX_IMAGE_PIXELS:
                    raise DataError(
                        f"{image.width}x{image.height} pixels are over {limits.MAX_IMAGE_PIXELS}", who=str(path)
                    )
                clear = image.convert("RGBA")
    except DataError:
        raise
    except Exception as problem:  # Pillow's decoders raise whatever the file makes them raise
        raise DataError(f"cannot be read as an image ({_reason(problem)})", who=str(path)) from problem
    flat = Image.new("RGBA", clear.size, "white")
    flat.alpha_composite(clear)
    pixels = v2.functional.pil_to_tensor(flat.convert("RGB")).to(torch.float32) / 255
    return _fit(pixels, wanted.size)


def _fit(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    shape = [max(1, round(height * scale)), max(1, round(width * scale))]
    scaled = v2.functional.resize(pixels, shape, antialias=True)
    down, across = size - shape[0], size - shape[1]
    border = (across // 2, across - across // 2, down // 2, down - down // 2)
    return functional.pad(scaled[None], border, mode="replicate")[0].clamp(0, 1)


def decode_audio(path: Path, wanted: AudioInput) -> Tensor:
    """Return a recording's log-mel spectrogram ``(mels, frames)``, silence at its ends cut, in nepers of power.

    Time is stretched or squeezed to the wanted frames. The loudest cell is 0 and nothing is below -13.8 (-60 dB), so
    the level of the recording does not matter; a silent one is all -13.8.

    Raises:
        DataError: unreadable, not audio, empty, not finite, or longer than ``limits.MAX_AUDIO_SECONDS``.
    """
    _check_size(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, length = file.samplerate, file.frames
            if not 0 < length <= rate * limits.MAX_AUDIO_SECONDS:
                raise DataError(
                    f"{length / rate:.1f} seconds are not between 0 and {limits.MAX_AUDIO_SECONDS:.0f}", who=str(path)
                )
            samples = file.read(length, dtype="float32", always_2d=True)
    except DataError:
        raise
    except (soundfile.SoundFileError, OSError, ValueError, ZeroDivisionError) as problem:
        raise DataError(f"cannot be read as audio ({_reason(problem)})", who=str(path)) from problem
    if not samples.size or not np.isfinite(samples).all():
        raise DataError("holds no samples, or samples that are not finite", who=str(path))
    return log_mel(torch.from_numpy(samples.mean(axis=1)), rate, wanted)


def log_mel(samples: Tensor, rate: int, wanted: AudioInput) -> Tensor:
    """Return the log-mel spectrogram of mono samples ``(n,)`` as :func:`decode_audio` describes it."""
    samples = resample(samples, rate, wanted.sample_rate)
    size, hop = round(_WINDOW * wanted.sample_rate), round(_HOP * wanted.sample_rate)
    samples = functional.pad(samples, (0, max(0, size - samples.numel())))
    spectrum = torch.stft(
        samples, size, hop, window=torch.hann_window(size), center=False, return_complex=True
    )
    power = spectrum.abs().square()
    banks = melscale_fbanks(power.shape[0], _LOWEST, wanted.sample_rate / 2, wanted.mels, wanted.sample_rate)
    mel = _trim(banks.T @ power)
    peak = mel.max().clamp(min=1e-20)
    cells = torch.log(mel / peak + _FLOOR)
    return functional.interpolate(cells[None], size=wanted.frames, mode="linear", align_corners=False)[0]


def _trim(mel: Tensor) -> Tensor:
    loud = mel.sum(dim=0)
    sound = torch.nonzero(loud > loud.max() * _TRIM).flatten()
    if not sound.numel():
        return mel
    return mel[:, int(sound[0]) : int(sound[-1]) + 1]


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"cannot be read ({_reason(problem)})", who=str(path)) from problem
    if not 0 < size <= limits.MAX_FILE:
        raise DataError(f"{size} bytes are not between 1 and {limits.MAX_FILE}", who=str(path))


def _reason(problem: Exception) -> str:
    return str(problem)[:200] or type(problem).__name__
