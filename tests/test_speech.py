"""Speech synthesis, audio files and effects."""

import ctypes
import io
import random
import shlex
import sys

import numpy as np
import pytest
import soundfile

from modalities.audio import speech
from modalities.audio.media import decode, encode, read, resample
from modalities.audio.speech import (
    Voice,
    add_noise,
    change_speed,
    command_speech,
    random_voice,
    reverberate,
    speak,
    trim,
)
from xmodal_opd.types import SampleError

RATE = 16_000


def tone(hertz=440.0, seconds=0.5, rate=RATE, peak=0.5):
    return (peak * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pitch(wave, rate=RATE):
    return np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave)


def file_bytes(wave, rate, form="WAV", subtype=None):
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


# ---- espeak-ng


@pytest.mark.parametrize("name", ["en-us+m1", "en-gb+f2", "en-029+m3", "en-gb-scotland+linda", "en-us"])
def test_the_same_words_sound_the_same_whatever_was_said_before(name):
    voice = Voice(name, rate=190, pitch=40)
    first, rate = speak("What is four plus seven?", voice)
    for other in ("Something else, and longer than before.", "Oh."):
        speak(other, Voice("en-us+f4", pitch=80))
        again, _ = speak("What is four plus seven?", voice)
        assert np.array_equal(first, again)
    assert first.dtype == np.float32 and rate == 22050 and 0.1 < np.abs(first).max() <= 1


def test_a_long_path_for_temporary_files_changes_nothing(tmp_path, monkeypatch):
    usual, _ = speak("seven", Voice("en-gb+f2"))
    (tmp_path / ("long" * 15)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 15)))
    assert np.array_equal(speak("seven", Voice("en-gb+f2"))[0], usual)


def test_voice_rate_and_pitch_are_heard():
    text = "seven plus eight minus two"
    lengths = [len(speak(text, Voice("en-us+m3", rate=rate))[0]) for rate in (120, 180, 240)]
    assert lengths[0] > 1.3 * lengths[1] > 1.5 * lengths[2]
    waves = [speak(text, voice)[0] for voice in (Voice("en-us+m3"), Voice("en-gb+m3"), Voice("en-us+m3", pitch=80))]
    assert len({wave.tobytes() for wave in waves}) == 3


def test_every_listed_voice_speaks_and_no_speaker_is_in_both_splits():
    train, test = speech.voices("train"), speech.voices("test")
    assert len(train) >= 30 and len(test) >= 10
    assert not {name.split("+")[1] for name in train} & {name.split("+")[1] for name in test}
    waves = {name: speak("nine", Voice(name))[0].tobytes() for name in train + test}
    assert len(set(waves.values())) == len(waves)


def test_random_voices_follow_the_seed_and_the_split():
    draws = [[random_voice(random.Random(seed), "test") for _ in range(2)] for seed in range(20)]
    assert all(a == b for a, b in draws) and len({a for a, _ in draws}) > 10
    assert {a.name for a, _ in draws} <= set(speech.voices("test"))
    assert random_voice(random.Random(0), "train", accents=["en-us"]).name.startswith("en-us+")


def test_little_silence_is_left_at_the_ends():
    wave, rate = speak("table. ...", Voice("en-us+m3"))  # espeak-ng ends this in 0.3 s of silence
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    assert loud[0] <= 0.05 * rate and len(wave) - 1 - loud[-1] <= 0.05 * rate
    pause = np.zeros(2 * RATE, np.float32)
    padded = np.concatenate([pause, tone(), pause, tone(), pause])
    assert len(trim(padded, RATE)) == pytest.approx(2 * 8000 + 2 * RATE + 2 * 800, abs=4)  # the pause inside stays
    assert len(trim(pause, RATE)) == len(pause)


@pytest.mark.parametrize(
    "text", ["A: table. B: horse.", "A. table B. horse.", "A) table B) horse.", "(A) table (B) horse."]
)
def test_option_letters_are_read_as_letters(text):
    assert "ˈeɪ" in phonemes(speech.spoken(text)) and "ɐ" not in phonemes(speech.spoken(text))


def test_the_article_stays_an_article_and_signs_become_words():
    assert "ɐ tˈeɪbəl" in phonemes(speech.spoken("What is a table?"))
    assert speech.spoken("3 - 4 * x / 2") == "3 minus 4 times x divided by 2"
    assert speech.spoken("well-known and/or - so") == "well-known and/or minus so"


def phonemes(text):
    """What espeak-ng makes of a text."""
    with speech._LOCK, speech._engine() as (library, _, _):
        speech._choose(library, Voice("en-us"))
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest, found = ctypes.c_char_p(text.encode()), []
        while rest.value:
            found.append(library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2).decode())
    return " ".join(found)


@pytest.mark.parametrize("text", ["", " ", "...", "?!"])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(SampleError, match="nothing to speak"):
        speak(text)


@pytest.mark.parametrize("name", ["en-us+nobody", "xx", "xx+m1"])
def test_an_unknown_voice_is_answered_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"no voice {name!r}.*en-us, en-gb.* with m1".replace("+", r"\+")):
        speak("hello", Voice(name))
    with pytest.raises(ValueError, match="no voices for split 'valid'; have: train, test"):
        speech.voices("valid")


def test_without_the_engine_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(speech, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'xmodal-opd\[speech\]'"):
        speak("hello")


# ---- any command


def python(code):
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


WRITE = "import sys,numpy,soundfile;soundfile.write(sys.argv[1],numpy.full((800*len({text}),2),.1),8000)"


def test_a_command_gets_the_text_as_one_argument_or_on_standard_input():
    text = "it's $HOME; `ls` {out} -v"
    for command in (
        python(WRITE.format(text="sys.argv[2]")) + " {out} {text}",
        python(WRITE.format(text="sys.stdin.read()")) + " {out}",
    ):
        wave, rate = command_speech(command, text)
        assert rate == 8000 and len(wave) == 800 * len(text) and np.allclose(wave, 0.1, atol=1e-3)


def test_a_text_that_looks_like_an_option_is_not_one():
    parse = "import argparse;p=argparse.ArgumentParser();[p.add_argument(n) for n in 'ot'];t=p.parse_args().t.strip();"
    wave, _ = command_speech(python(parse + WRITE.format(text="t")) + " {out} {text}", "--help")
    assert len(wave) == 800 * len("--help")


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("say {text}", ValueError, "needs {out}"),
        ("no-such-program {out}", ValueError, "'no-such-program' was not found"),
        (python("import sys; sys.exit('no model')") + " {out}", SampleError, "ended with code 1: no model"),
        (python("pass") + " {out}", SampleError, "wrote no readable audio file"),
        (python("import time; time.sleep(9)") + " {out}", SampleError, "took more than 0.2 s"),
    ],
)
def test_a_command_that_fails_says_how(command, error, message):
    with pytest.raises(error, match=message):
        command_speech(command, "hello", timeout=0.2 if "sleep" in command else 60)


# ---- effects


def test_noise_has_the_asked_ratio_and_follows_the_seed():
    wave = tone()
    noisy = [add_noise(wave, 10.0, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert 10 * np.log10(np.mean(wave**2) / np.mean((noisy[0] - wave) ** 2)) == pytest.approx(10, abs=0.2)
    assert np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], noisy[2])


def test_reverberation_leaves_a_tail_and_the_loudness():
    wave = tone()
    wet = reverberate(wave, RATE, 0.3, np.random.default_rng(0))
    assert len(wet) == len(wave) + 0.3 * RATE - 1 and wet.dtype == np.float32
    assert np.sum(wet**2) == pytest.approx(np.sum(wave**2), rel=1e-4)
    tail = [np.mean(wet[len(wave) + at : len(wave) + at + 800] ** 2) for at in (0, 2000)]
    assert tail[0] > 5 * tail[1] > 0


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_speed_changes_length_and_pitch_and_not_the_loudness(factor):
    fast = change_speed(tone(400), factor)
    assert len(fast) == round(8000 / factor) and pitch(fast) == pytest.approx(400 * factor, abs=3)
    assert np.abs(fast).max() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="positive"):
        change_speed(tone(), 0)


# ---- files


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_comes_out_mono_at_the_asked_rate(form, channels, tmp_path):
    sound = np.stack([tone(rate=44_100)] * channels, 1)
    data = file_bytes(sound, 44_100, form)
    wave = decode(data, RATE)
    assert wave.dtype == np.float32 and wave.ndim == 1 and len(wave) == pytest.approx(8000, abs=5)
    assert pitch(wave) == pytest.approx(440, abs=3) and np.abs(wave).max() == pytest.approx(0.5, abs=0.05)
    (tmp_path / "x").write_bytes(data)
    assert np.array_equal(decode(tmp_path / "x", RATE), wave)


def test_flac_gives_back_what_went_in_to_16_bits_and_never_clips():
    wave = tone(peak=0.9)
    back, rate = read(encode(wave, RATE))
    assert rate == RATE and np.abs(back - wave).max() < 1 / 2**15
    loud, _ = read(encode(3 * wave, RATE))
    assert np.allclose(loud, wave / 0.9, atol=1e-3)


def test_resampling_filters_what_the_new_rate_cannot_hold():
    assert np.abs(resample(tone(7000, rate=RATE), RATE, 8000)[200:-200]).max() < 0.02


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "audio of 0 bytes: it cannot be decoded as wav, flac, mp3 or ogg"),
        (b"hello" * 100, "cannot be decoded"),
        (file_bytes(np.zeros(0), RATE), "is empty: it has no samples"),
        (file_bytes(np.zeros(999), RATE), "is silent: its peak is 0.0"),
        (file_bytes(np.array([0.5, np.nan]), RATE, subtype="FLOAT"), "not numbers"),
        (encode(tone(), RATE)[:500], "cannot be decoded|is empty"),
        ("nowhere.wav", "audio file nowhere.wav: no such file"),
    ],
    ids=["nothing", "words", "empty", "silent", "not numbers", "cut off", "nowhere"],  # the bytes have the time in them
)
def test_audio_that_cannot_be_used_is_refused_with_the_reason(data, message):
    with pytest.raises(SampleError, match=message):
        decode(data, RATE)
