"""Spoken questions as WebDataset shards: built-in tasks, written questions, or recordings."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from modalities.audio.media import Wave, check, decode, encode, resample
from modalities.audio.records import Spoken, audio_draft, file_name, task_draft, text_draft
from modalities.audio.speech import (
    ACCENTS,
    add_noise,
    change_speed,
    command_speech,
    installed,
    random_voice,
    reverberate,
    speak,
    voices,
)
from modalities.prepare import Drafts, Range, bounded, contents, known, read_drafts, record_bytes, within, write_drafts
from modalities.records import opened
from modalities.tasks import FAMILIES, questions
from xmodal_opd.types import SampleError

READERS = {"text": text_draft, "audio": audio_draft}
LIMITS = {"speed": (0.1, 10), "reverb": (0, 60), "noise_snr": (-100, 100)}


@dataclass(frozen=True)
class Sound:
    """How every sample is made to sound; all of it goes into the index."""

    seed: int = 0
    split: str = "train"  # whose voices
    accents: Sequence[str] = ACCENTS
    command: str | None = None  # a speech command instead of the built-in voices
    speed: Range = None
    reverb: Range = None  # seconds
    noise_snr: Range = None  # dB
    rate: int = 16_000  # Hz


def prepare(
    folder: str | Path,
    kind: str = "tasks",
    file: str | Path | None = None,
    *,
    count: int = 2000,
    families: Sequence[str] = tuple(FAMILIES),
    instruction: str = "",
    per_shard: int = 256,
    workers: int | None = None,
    progress: bool = True,
    **sound: Any,
) -> dict[str, Any]:
    """Make shards in `folder`, or keep those that are there when the settings are the same; returns their index.

    kind: "tasks" (`count` questions of `families`), "text" or "audio" (records of a JSON-lines `file`; see
    `modalities.audio.records`). `sound`: fields of `Sound`. `workers`: processes, by default one for each core; the
    bytes do not depend on it. Raises ValueError as `write_shards` does, and for settings that make no sense.
    """
    options = Sound(**sound)
    voices(options.split, options.accents)
    bounded(options, LIMITS)
    drafts = _tasks(options, count, families, instruction) if kind == "tasks" else _lines(kind, file, instruction)
    base = Path(file).parent if file else Path()
    files = [source for draft in drafts if isinstance(draft, Spoken) for source in draft.audio]
    spoken = kind != "audio" and not options.command
    return write_drafts(
        folder,
        kind,
        drafts,
        partial(render, options, base),
        asdict(options) | contents(files, base, "audio"),
        ready=installed if spoken else tuple,
        per_shard=per_shard,
        workers=workers,
        progress=progress,
    )


# ---- what to ask


def _tasks(options: Sound, count: int, families: Sequence[str], instruction: str) -> Drafts:
    known(families, FAMILIES, count)
    asked = islice(questions(options.seed, options.split, families), count)
    return [task_draft(question, options.split, instruction) for question in asked]


def _lines(kind: str, file: str | Path | None, instruction: str) -> Drafts:
    if kind not in READERS or file is None:
        raise ValueError(f"kind is tasks, or {' or '.join(READERS)} with a file of records; got {kind!r} and {file}")
    return read_drafts(file, READERS[kind], instruction)


# ---- how it sounds


def render(options: Sound, base: Path, job: tuple[int, Spoken | str]) -> dict[str, bytes] | str:
    """Files of one sample, or why it is refused; a pure function of its arguments."""
    number, draft = job
    if isinstance(draft, str):
        return draft
    rng = random.Random(f"{options.seed} {number}")
    try:
        waves, voice = _waves(options, base, draft, rng)
        waves = [_effects(options, check(wave, "its audio"), rng) for wave in waves]
    except SampleError as error:
        return f"{draft.where}: {error}"
    seconds = round(sum(map(len, waves)) / options.rate, 3)
    audio = {file_name(i): encode(wave, options.rate) for i, wave in enumerate(waves)}
    return {"json": record_bytes(draft, {**voice, "seconds": seconds}), **audio}


def _waves(options: Sound, base: Path, draft: Spoken, rng: random.Random) -> tuple[list[Wave], dict[str, Any]]:
    if draft.audio:
        return [decode(opened(source, base, "audio"), options.rate) for source in draft.audio], {}
    if options.command:
        wave, rate = command_speech(options.command, draft.speech)
        return [resample(wave, rate, options.rate)], {"voice": options.command}
    voice = random_voice(rng, options.split, options.accents)
    wave, rate = speak(draft.speech, voice)
    return [resample(wave, rate, options.rate)], {"voice": voice.name}


def _effects(options: Sound, wave: Wave, rng: random.Random) -> Wave:
    noise = np.random.default_rng(rng.getrandbits(64))
    if options.speed is not None:
        wave = change_speed(wave, within(options.speed, rng))
    if options.reverb is not None:
        wave = reverberate(wave, options.rate, within(options.reverb, rng), noise)
    if options.noise_snr is not None:
        wave = add_noise(wave, within(options.noise_snr, rng), noise)
    return wave
