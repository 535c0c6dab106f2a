"""Synthetic speech by eSpeak NG, for scenarios only.

eSpeak NG is GPL-3 and lives in the extra ``simulation``; nothing outside the scenarios imports this module. The
library keeps its state in C globals, so one lock serves the whole process.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

RATE: Final = 22_050
"""Sampling rate of what eSpeak NG synthesises (Hz)."""
VARIANTS: Final = (
    "Denis", "Diogo", "Henrique", "Hugo", "adam", "announcer",
    "benjamin", "david", "michel", "miguel", "mike2", "shelby",
)  # fmt: skip
"""Voices without flutter: in the others pitch wavers by a counter that runs on from one word to the next for as long
as the process lives, and no two runs would give the same bytes."""

# espeak-ng/speak_lib.h
_OUTPUT_SYNCHRONOUS: Final = 2
_INITIALIZE_DONT_EXIT: Final = 0x8000
_CHARS_UTF8: Final = 1
_POSITION_CHARACTER: Final = 1
_PARAMETER_RATE: Final = 1
_PARAMETER_PITCH: Final = 3
_PARAMETER_RANGE: Final = 4
_EE_OK: Final = 0

_LOCK: Final = threading.Lock()
_CALLBACK: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks, and how."""

    language: str
    """eSpeak NG's name of the language, such as ``fr``."""
    variant: str
    """One of ``VARIANTS``."""
    speed: int
    """Words per minute, 80 to 450."""
    pitch: int
    """0 to 100; 50 is the variant's own."""
    pitch_range: int
    """0 (monotone) to 100."""


class _Engine:
    """The one eSpeak NG of this process; used under ``_LOCK`` only."""

    def __init__(self) -> None:
        try:
            import espeakng_loader  # noqa: PLC0415 - GPL-3, and only in the extra

            self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
            data: str = espeakng_loader.get_data_path()
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"synthetic speech needs eSpeak NG ({error})", advice="pip install 'fedfuse[simulation]'"
            ) from error
        rate = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data.encode(), _INITIALIZE_DONT_EXIT)
        if rate != RATE:
            raise ConfigError(
                f"eSpeak NG did not start with its data in {data} (it answered {rate})",
                advice="reinstall espeakng-loader",
            )
        self._heard = bytearray()
        self._callback = _CALLBACK(self._listen)  # held here: C keeps no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _listen(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._heard += ctypes.string_at(samples, 2 * count)
        return 0

    def speak(self, text: str, voice: Voice) -> npt.NDArray[np.float32]:
        library, name = self._library, f"{voice.language}+{voice.variant}"
        results = [
            library.espeak_SetVoiceByName(name.encode()),
            library.espeak_SetParameter(_PARAMETER_RATE, voice.speed, 0),
            library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0),
            library.espeak_SetParameter(_PARAMETER_RANGE, voice.pitch_range, 0),
        ]
        self._heard.clear()
        encoded = text.encode() + b"\0"
        results.append(
            library.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded)), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
            )
        )
        results.append(library.espeak_Synchronize())
        if any(result != _EE_OK for result in results) or not self._heard:
            raise ConfigError(
                f"eSpeak NG cannot speak as {name} (it answered {results})",
                advice="reinstall espeakng-loader",
            )
        return np.frombuffer(bytes(self._heard), np.int16).astype(np.float32) / np.float32(2**15)


@cache
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: Voice) -> npt.NDArray[np.float32]:
    """Return a text as spoken, ``(samples,)`` in -1 to 1 at ``RATE`` Hz: the same on every call and in every thread.

    Raises:
        ConfigError: eSpeak NG is not installed, does not start, or has no such voice.
    """
    with _LOCK:
        return _engine().speak(text, voice)
