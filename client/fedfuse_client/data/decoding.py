"""One record's files, decoded within bounds: text as it is, images to RGB, recordings to a log-mel spectrogram.

Headers are checked before anything is unpacked, within the bounds of ``check``, so that what passes there is read
here; and whatever a file does to its decoder ends in a DataError that names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from torchaudio.functional import melscale_fbanks, resample
from torchvision.transforms.v2 import functional as transforms

from fedfuse_client.data.check import IMAGE_FORMATS, UNSCALED, header_fault, truncation_fault
from fedfuse_shared import limits
from fedfuse_shared.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from fedfuse_shared.config.model import AudioInput, ImageInput

_BLOCK: Final = 2**16  # samples unpacked at once
_WINDOW: Final = 0.032  # seconds a spectrum is taken over
_HOP: Final = 0.01  # seconds between spectra
_LOWEST: Final = 60.0  # Hz; below it is hum
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
    """Return an image as RGB ``(3, size, size)`` in [0, 1], aspect kept, borders continued, white where transparent.

    Raises:
        DataError: unreadable, not an image of 8 or 16 bits, or larger than ``limits.MAX_IMAGE_PIXELS``.
    """
    _check_size(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if not 0 < image.width * image.height <= limits.MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{image.width}x{image.height} pixels are not between 1 and {limits.MAX_IMAGE_PIXELS}",
                    who=str(path),
                )
            pixels = transforms.pil_to_tensor(_to_rgb(ImageOps.exif_transpose(image), path))
    except DataError:
        raise
    except Exception as problem:  # Pillow's decoders raise whatever a file makes them raise
        raise DataError(f"cannot be read as an image ({_reason(problem)})", who=str(path)) from problem
    return _fit(pixels, wanted.size)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would cut everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in UNSCALED:
        raise DataError(f"has pixels of mode {image.mode}", who=str(path), advice="save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    white = Image.new("RGBA", clear.size, "white")
    white.alpha_composite(clear)
    return white.convert("RGB")


def _fit(pixels: Tensor, size: int) -> Tensor:
    """Return ``(3, height, width)`` bytes as ``(3, size, size)`` in [0, 1]."""
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    shape = [max(1, round(height * scale)), max(1, round(width * scale))]
    scaled = transforms.resize(pixels, shape, antialias=True).to(torch.float32) / 255
    down, across = size - shape[0], size - shape[1]
    border = (across // 2, across - across // 2, down // 2, down - down // 2)
    return functional.pad(scaled[None], border, mode="replicate")[0]


def decode_audio(path: Path, wanted: AudioInput) -> Tensor:
    """Return a recording's log-mel spectrogram ``(mels, frames)``, silence at its ends cut (natural log of power).

    Time is stretched or squeezed to the wanted frames. The loudest cell is 0 and none is below -13.8 (-60 dB), so the
    level of the recording does not matter; a silent one is -13.8 throughout.

    Raises:
        DataError: unreadable, not audio, truncated, empty, not finite, too long, or of a rate no recording has.
    """
    size = _check_size(path)
    try:
        with path.open("rb") as raw:
            fault = truncation_fault(raw.read(12), size)
        if fault is not None:
            raise DataError(fault[1], who=str(path))
        with soundfile.SoundFile(path) as file:
            rate, channels, length = file.samplerate, file.channels, file.frames
            if (fault := header_fault(file.format, length, rate, channels)) is not None:
                raise DataError(fault[1], who=str(path))
            blocks = file.blocks(max(1, _BLOCK // channels), frames=length, dtype="float64", always_2d=True)
            samples = np.concatenate([block.mean(axis=1) for block in blocks] or [np.zeros(0)])
    except (soundfile.SoundFileError, OSError, ValueError) as problem:
        raise DataError(f"cannot be read as audio ({_reason(problem)})", who=str(path)) from problem
    if samples.size < length:
        raise DataError(f"is truncated: {samples.size} of {length} samples are there", who=str(path))
    if not np.isfinite(samples).all():
        raise DataError("holds samples that are not finite", who=str(path))
    return log_mel(samples, rate, wanted)


def log_mel(
    samples: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rate: int, wanted: AudioInput
) -> Tensor:
    """Return the log-mel spectrogram of mono samples ``(n,)`` at ``rate`` Hz; see :func:`decode_audio`.

    The rate is a multiple of 25 Hz, as the wanted one is: without a common factor the resampling filter would take
    gigabytes.
    """
    loudest = np.abs(samples).max()
    wave = torch.from_numpy(samples / loudest if loudest > 0 else samples).to(torch.float32)
    wave = resample(wave, rate, wanted.sample_rate)
    size, hop = round(_WINDOW * wanted.sample_rate), round(_HOP * wanted.sample_rate)
    wave = functional.pad(wave, (0, max(0, size - wave.numel())))
    spectrum = torch.stft(wave, size, hop, window=torch.hann_window(size), center=False, return_complex=True)
    power = spectrum.abs().square()
    banks = melscale_fbanks(power.shape[0], _LOWEST, wanted.sample_rate / 2, wanted.mels, wanted.sample_rate)
    mel = _trim(banks.T @ power)
    cells = torch.log(mel / mel.max().clamp(min=1e-20) + _FLOOR)
    return functional.interpolate(cells[None], size=wanted.frames, mode="linear", align_corners=False)[0]


def _trim(mel: Tensor) -> Tensor:
    loudness = mel.sum(dim=0)
    sound = torch.nonzero(loudness > loudness.max() * _TRIM).flatten()
    return mel[:, int(sound[0]) : int(sound[-1]) + 1] if sound.numel() else mel


def _check_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"cannot be read ({_reason(problem)})", who=str(path)) from problem
    if not 0 < size <= limits.MAX_FILE:
        raise DataError(f"{size} bytes are not between 1 and {limits.MAX_FILE}", who=str(path))
    return size


def _reason(problem: Exception) -> str:
    return str(problem)[:200] or type(problem).__name__
