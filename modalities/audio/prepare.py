"""Spoken questions as WebDataset shards: built-in tasks, written questions, or recordings."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from modalities.audio.media import Wave, check, decode, encode, resample
from modalities.audio.records import Draft, audio_draft, file_name, read_lines, task_draft, text_draft
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
from modalities.shards import write_shards
from modalities.tasks import FAMILIES, questions
from xmodal_opd.types import SampleError

Range = float | Sequence[float] | None  # one value, or lowest and highest
READERS = {"text": text_draft, "audio": audio_draft}


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
    base = Path(file).parent if file else Path()
    drafts = _tasks(options, count, families, instruction) if kind == "tasks" else _lines(kind, file, instruction)
    settings = {"kind": kind, "records": digest(drafts), "per_shard": per_shard, **asdict(options)}
    each = partial(render, options, base)

    def samples(numbers: Sequence[int]) -> Iterator[dict[str, bytes] | str]:
        if kind != "audio" and not options.command:
            installed()  # here, where a missing engine is one message and not one from each worker
        return _map(each, [(n, drafts[n]) for n in numbers], workers or os.cpu_count() or 1)

    return write_shards(folder, settings, len(drafts), samples, per_shard, progress)


def digest(drafts: Iterable[Draft | str]) -> str:
    """A name for the contents: the same questions, in the same order, in the same words."""
    plain = [draft if isinstance(draft, str) else asdict(draft) for draft in drafts]
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


# ---- what to ask


def _tasks(options: Sound, count: int, families: Sequence[str], instruction: str) -> list[Draft | str]:
    if unknown := [name for name in families if name not in FAMILIES]:
        raise ValueError(f"there is no task {unknown[0]!r}; have: {', '.join(FAMILIES)}")
    asked = islice(questions(options.seed, options.split, families), count)
    return [task_draft(question, options.split, instruction) for question in asked]


def _lines(kind: str, file: str | Path | None, instruction: str) -> list[Draft | str]:
    if kind not in READERS or file is None:
        raise ValueError(f"kind is tasks, or {' or '.join(READERS)} with a file of records; got {kind!r} and {file}")
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file of records {file}")
    lines = read_lines(Path(file).read_text("utf-8"), Path(file).name)
    return [_draft(kind, where, record, instruction) for where, record in lines]


def _draft(kind: str, where: str, record: Any, instruction: str) -> Draft | str:
    try:
        return f"{where}: {record}" if isinstance(record, str) else READERS[kind](record, where, instruction)
    except SampleError as error:
        return f"{where}: {error}"
    except (TypeError, KeyError, AttributeError) as error:
        return f"{where}: a field is not of the form it should have ({error!r})"


# ---- how it sounds


def render(options: Sound, base: Path, job: tuple[int, Draft | str]) -> dict[str, bytes] | str:
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
    meta = {**draft.meta, **voice, "source": draft.where, "seconds": seconds}
    views = {"student": draft.student, "teacher": draft.teacher}
    record = {"views": views, "answer": draft.answer, "meta": meta}
    audio = {file_name(i): encode(wave, options.rate) for i, wave in enumerate(waves)}
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **audio}


def _waves(options: Sound, base: Path, draft: Draft, rng: random.Random) -> tuple[list[Wave], dict[str, Any]]:
    if draft.audio:
        return [decode(base / path.removeprefix("file://"), options.rate) for path in draft.audio], {}
    if options.command:
        wave, rate = command_speech(options.command, draft.speech)
        return [resample(wave, rate, options.rate)], {"voice": options.command}
    voice = random_voice(rng, options.split, options.accents)
    wave, rate = speak(draft.speech, voice)
    return [resample(wave, rate, options.rate)], {"voice": voice.name}


def _effects(options: Sound, wave: Wave, rng: random.Random) -> Wave:
    noise = np.random.default_rng(rng.getrandbits(64))
    if options.speed is not None:
        wave = change_speed(wave, _within(options.speed, rng))
    if options.reverb is not None:
        wave = reverberate(wave, options.rate, _within(options.reverb, rng), noise)
    if options.noise_snr is not None:
        wave = add_noise(wave, _within(options.noise_snr, rng), noise)
    return wave


def _within(value: float | Sequence[float], rng: random.Random) -> float:
    return value if isinstance(value, (int, float)) else rng.uniform(*value)


# ---- in parallel


def _map(each: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> Iterator[Any]:
    workers = min(workers, 1 + len(jobs) // 128)  # a process takes seconds to start
    if workers == 1:
        yield from _alone(each, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_work) as pool:
        yield from pool.map(each, jobs, chunksize=16)


def _alone(each: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order
    try:
        yield from map(each, jobs)
    finally:
        torch.set_num_threads(threads)


def _begin_work() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed parent would leave its workers waiting on each other's pipes for ever
    if parent := parent_process():
        parent.join()
        os._exit(1)
