"""Audio files and bytes <-> waveforms (float32 numpy [samples], mono)."""

import base64
import io
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torchaudio.transforms import Resample

from xmodal_opd.types import SampleError

Wave = NDArray[np.float32]

SILENCE = 1e-4  # a peak below this is a dead microphone, not a quiet one


def decode(source: bytes | str | Path, rate: int) -> Wave:
    """Bytes or file (wav, flac, mp3, ogg; any rate and channels) -> mono waveform [samples] at `rate` Hz.

    Raises SampleError for audio that is unreadable, empty, silent or not a number.
    """
    return resample(*read(source), rate)


def read(source: bytes | str | Path) -> tuple[Wave, int]:
    """As `decode`, at the file's own rate: (waveform, rate in Hz)."""
    what = f"audio of {len(source)} bytes" if isinstance(source, bytes) else f"audio file {source}"
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        reason = str(error).split(": ")[-1].strip(" .")
        known = f"it cannot be decoded as wav, flac, mp3 or ogg ({reason})"
        missing = not isinstance(source, bytes) and not Path(source).exists()
        raise SampleError(f"{what}: {'no such file' if missing else known}") from None
    return check(samples.mean(axis=1).astype(np.float32), what), rate


def check(wave: Wave, what: str) -> Wave:
    """The waveform itself, or SampleError when no one could hear anything in it."""
    if not len(wave):
        raise SampleError(f"{what} is empty: it has no samples")
    if not np.isfinite(wave).all():
        raise SampleError(f"{what} holds values that are not numbers (NaN or infinity)")
    if np.abs(wave).max() < SILENCE:
        raise SampleError(f"{what} is silent: its peak is {np.abs(wave).max():.1e}, below {SILENCE:g}")
    return wave


def resample(wave: Wave, source: int, target: int) -> Wave:
    """[samples] at `source` Hz -> [samples * target / source], rounded up, at `target` Hz."""
    if source == target:
        return wave
    with torch.inference_mode():
        return _resampler(source, target)(torch.from_numpy(wave)).numpy()


@cache
def _resampler(source: int, target: int) -> Resample:
    return Resample(source, target)  # its kernel costs more than a second of speech


def blank(wave: Wave) -> Wave:
    """Silence of the same length."""
    return np.zeros_like(wave)


def degraded(wave: Wave) -> Wave:
    """A tenth of the rate, and back by repeating samples: the length stays, and of 16 kHz what lies below 800 Hz. Our
    extension to sound of what VA-OPD, arXiv:2605.21924, does to images."""
    return np.repeat(resample(wave, 10, 1), 10)[: len(wave)]


def encode(wave: Wave, rate: int) -> bytes:
    """A 16-bit FLAC file; a peak above 1 is scaled down, never clipped."""
    peak = float(np.abs(wave).max(initial=0.0))
    out = io.BytesIO()
    soundfile.write(out, wave / peak if peak > 1 else wave, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def data_url(wave: Wave, rate: int) -> str:
    """A waveform at `rate` Hz for a request, as it is: WAV of 32-bit floats, so that a server hears not a bit less."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
    return f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"
