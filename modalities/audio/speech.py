"""Text -> speech: espeak-ng inside the process, or any command line; and effects on waveforms.

A waveform is a float32 numpy array [samples], mono, in -1..1. The same arguments give the same bytes.
"""

import _ctypes
import ctypes
import math
import random
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from xmodal_opd.types import SampleError

try:
    import espeakng_loader
except ModuleNotFoundError:
    espeakng_loader = None

Wave = NDArray[np.float32]

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-029")
VARIANTS = {
    "train": (  # of the bundled speakers, those that say the same bytes twice
        *("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f4"),
        *("adam", "aunty", "benjamin", "boris", "david", "edward", "grandma", "ian"),
        *("michel", "pablo", "quincy", "rob", "shelby", "steph", "travis", "victor", "zac"),
    ),
    "test": ("m7", "m8", "f3", "linda"),  # speakers never heard in training
}
LANGUAGES = {"en-gb": "en"}  # the bundled data know British English by this name only

_SYNCHRONOUS, _DONT_EXIT, _UTF8, _RATE, _PITCH, _RANGE = 2, 0x8000, 1, 1, 3, 4
_BUFFER = 5000  # ms of speech between calls back into Python
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_UNLOAD: Any = getattr(_ctypes, "dlclose", None) or getattr(_ctypes, "FreeLibrary", None)  # posix, Windows
_LOCK = threading.Lock()  # espeak is a singleton in C


@dataclass(frozen=True)
class Voice:
    """One speaker: espeak-ng voice name ("en-us+m3"), words a minute, and pitch and its liveliness from 0 to 100."""

    name: str = "en-us+m3"
    rate: int = 175
    pitch: int = 50
    range: int = 50


# ---- voices


def voices(split: str, accents: Sequence[str] = ACCENTS) -> list[str]:
    """Names of the voices of a split; no speaker is in both "train" and "test"."""
    if split not in VARIANTS:
        raise ValueError(f"no voices for split {split!r}; have: {', '.join(VARIANTS)}")
    return [f"{accent}+{variant}" for accent in accents for variant in VARIANTS[split]]


def random_voice(
    rng: random.Random,
    split: str,
    accents: Sequence[str] = ACCENTS,
    rates: tuple[int, int] = (160, 230),
    pitches: tuple[int, int] = (35, 65),
) -> Voice:
    """A voice of the split with a random rate (words a minute) and pitch."""
    return Voice(rng.choice(voices(split, accents)), rng.randint(*rates), rng.randint(*pitches))


# ---- espeak-ng


def speak(text: str, voice: Voice | None = None) -> tuple[Wave, int]:
    """`text` -> (waveform [samples], rate in Hz), with silence at the ends cut to 50 ms. A few ms an utterance.

    Raises SampleError when the text has nothing to pronounce, ValueError for an unknown voice, and
    ModuleNotFoundError naming the extra when the engine is not installed.
    """
    voice = voice or Voice()
    data = spoken(text).encode()
    with _LOCK, _engine() as (library, rate, chunks):
        _choose(library, voice)
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    samples = np.frombuffer(b"".join(chunks), np.int16)
    if not np.any(samples):
        raise SampleError(f"nothing to speak in the text {text[:80]!r}: it has no letters or digits")
    return trim((samples / 32768).astype(np.float32), rate), rate


def spoken(text: str) -> str:
    """How a text is to be read: option letters as letters ("A) cat" is not "a cat"), arithmetic signs as words."""
    text = re.sub(r"\(?\b([A-Z])[.):]+(?=\s|$)", r"\1:", text.replace("\0", " "))
    for sign, word in ((r"[-−]", "minus"), (r"\*", "times"), ("/", "divided by")):
        text = re.sub(rf"(?<=[\w)]) {sign} (?=[\w(])", f" {word} ", text)
    return text


@contextmanager
def _engine() -> Iterator[tuple[ctypes.CDLL, int, list[bytes]]]:
    """A freshly loaded engine: flutter and noise carry over from one utterance to the next and cannot be reset."""
    path, data = installed()
    library, chunks = ctypes.CDLL(path), []

    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = _CALLBACK(collect)  # must outlive the calls
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS, _BUFFER, data.encode(), _DONT_EXIT)
        if rate <= 0:
            raise RuntimeError(f"espeak-ng could not start with the voices in {data}; reinstall espeakng-loader")
        library.espeak_SetSynthCallback(callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        yield library, rate, chunks
    finally:
        library.espeak_Terminate()
        _UNLOAD(library._handle)


def installed() -> tuple[str, str]:
    """(library, folder of voices) of espeak-ng. Raises ModuleNotFoundError naming the extra to install."""
    if espeakng_loader is None:
        raise ModuleNotFoundError("speech synthesis needs espeak-ng: pip install 'xmodal-opd[speech]'")
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _choose(library: ctypes.CDLL, voice: Voice) -> None:
    language, _, variant = voice.name.partition("+")
    language = LANGUAGES.get(language, language)
    # an unknown variant is passed over in silence by the engine
    known = not variant or Path(installed()[1], "voices", "!v", variant).exists()
    plus = f"+{variant}" if variant else ""
    if not known or not (_by_file(library, language, plus) or _by_name(library, language + plus)):
        have = f"{', '.join(ACCENTS)} with {', '.join(v for split in VARIANTS.values() for v in split)}"
        raise ValueError(f"espeak-ng has no voice {voice.name!r}; write language+variant, for example {have}")
    for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.range)):
        library.espeak_SetParameter(parameter, value, 0)


def _by_name(library: ctypes.CDLL, name: str) -> bool:
    return library.espeak_SetVoiceByName(name.encode()) == 0


def _by_file(library: ctypes.CDLL, language: str, plus: str) -> bool:
    """By name the engine reads all its voice files, which doubles the time of an utterance; by file only the one, but
    from a lower-case path that fits, with the variant, its buffer of 40 bytes. False where it does not."""
    voice = _voice_files().get(language.lower())
    if voice is None:
        return False
    with tempfile.TemporaryDirectory(prefix="v") as folder:
        path = f"{shutil.copyfile(voice, Path(folder, 'v'))}{plus}".encode()
        return len(path) < 40 and library.espeak_SetVoiceByFile(path) == 0


@cache
def _voice_files() -> dict[str, Path]:
    return {path.name.lower(): path for path in Path(installed()[1], "lang").rglob("*") if path.is_file()}


# ---- any other engine


def command_speech(command: str, text: str, timeout: float = 120.0) -> tuple[Wave, int]:
    """Speech from a command line such as "piper -m voice.onnx -f {out}" -> (waveform, rate in Hz).

    No shell reads the command. {out} is the audio file it must write; {text} is one argument, and without it the
    text is written to standard input. Raises SampleError when the command fails or writes nothing readable.
    """
    if "{out}" not in command:
        raise ValueError(f"the speech command {command!r} needs {{out}}: the path of the audio file it writes")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "speech.wav")
        # a leading space keeps a text such as "-v" from being taken for an option
        safe = " " + text if text.startswith("-") else text
        parts = [_fill(part, safe, out) for part in shlex.split(command)]
        _run(parts, None if "{text}" in command else text, timeout)
        return _read(out, parts[0])


def _fill(part: str, text: str, out: Path) -> str:
    return str(out).join(piece.replace("{text}", text) for piece in part.split("{out}"))


def _run(parts: list[str], text: str | None, timeout: float) -> None:
    try:
        done = subprocess.run(parts, input=(text or "").encode(), capture_output=True, timeout=timeout)
    except FileNotFoundError:
        raise ValueError(f"the speech command {parts[0]!r} was not found; give its full path") from None
    except subprocess.TimeoutExpired:
        raise SampleError(f"the speech command {parts[0]!r} took more than {timeout:g} s") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()[-200:] or "no message"
        raise SampleError(f"the speech command {parts[0]!r} ended with code {done.returncode}: {reason}")


def _read(path: Path, program: str) -> tuple[Wave, int]:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise SampleError(f"the speech command {program!r} wrote no readable audio file: {error}") from None
    return trim(samples.mean(axis=1).astype(np.float32), rate), rate


# ---- pure functions on waveforms


def trim(wave: Wave, rate: int, keep: float = 0.05, threshold: float = 0.01) -> Wave:
    """Cut both ends to `keep` seconds around the first and last sample louder than `threshold` of the peak."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max(initial=0.0))
    if not len(loud):
        return wave
    margin = round(keep * rate)
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def add_noise(wave: Wave, snr_db: float, rng: np.random.Generator) -> Wave:
    """White noise at a signal-to-noise ratio in dB, measured over the whole waveform."""
    noise = rng.standard_normal(len(wave))
    scale = math.sqrt(float(np.mean(np.square(wave, dtype=np.float64))) / 10 ** (snr_db / 10))
    return (wave + scale * noise).astype(np.float32)


def reverberate(wave: Wave, rate: int, seconds: float, rng: np.random.Generator) -> Wave:
    """A room whose echo falls by 60 dB in `seconds`: convolution with decaying noise; same loudness, longer by it."""
    tail = max(1, round(seconds * rate))
    room = rng.standard_normal(tail) * 10 ** (-3 * np.arange(tail) / tail)
    room /= math.sqrt(float(np.sum(room**2)) or 1.0)
    room[0] += 1.0  # the direct sound, as loud as the echo
    size = len(wave) + tail - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)
    return (wet * _level(wave, wet)).astype(np.float32)


def _level(wave: NDArray[Any], wet: NDArray[Any]) -> float:
    """Factor that gives `wet` the energy of `wave`."""
    return math.sqrt(float(np.sum(np.square(wave, dtype=np.float64))) / (float(np.sum(wet**2)) or 1.0))


def change_speed(wave: Wave, factor: float) -> Wave:
    """Faster for factor > 1, pitch moving along: [samples] -> [samples / factor], band-limited."""
    if not factor > 0:
        raise ValueError(f"speed is a positive factor, got {factor}")
    size = max(1, round(len(wave) / factor))
    return (np.fft.irfft(np.fft.rfft(wave), size) * (size / len(wave))).astype(np.float32)
