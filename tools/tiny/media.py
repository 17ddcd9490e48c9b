"""Clips and pictures for the lessons, made by two processes, which import this file: nothing heavy at its top."""

import itertools
import random
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np

from modalities.audio.speech import random_voice, speak
from modalities.tasks import questions
from modalities.vision.draw import INKS, PAPERS, Look, draw
from modalities.vision.tasks import scenes

ACCENTS = ("en-us",)


def utterance(question_and_voice):
    """Waveform at 16 kHz; runs in worker processes."""
    import torch
    import torchaudio

    torch.set_num_threads(1)
    question, voice = question_and_voice
    wave, rate = speak(question.prompt, voice)
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000).numpy()


def clips(split: str, seed: int, count: int, pitches: tuple[int, int] = (35, 65)) -> list:
    """(question, waveform) pairs in random voices of the split."""
    rng = random.Random(seed)
    asked = list(itertools.islice(questions(seed, split), count))
    jobs = [(question, random_voice(rng, split, ACCENTS, pitches=pitches)) for question in asked]
    with get_context("spawn").Pool(2) as pool:
        return list(zip(asked, pool.map(utterance, jobs, chunksize=32), strict=True))


TYPEFACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold", "cmr10", "STIXGeneral")  # of those of training, five


def printed(rng: random.Random) -> Any:
    """Black on white, in the first two typefaces."""
    return Look(font=rng.choice(TYPEFACES[:2]), size=rng.randint(14, 16), seed=rng.getrandbits(32))


def clean(rng: random.Random) -> Any:
    """In any ink on any paper, but straight and sharp."""
    face, ink, paper = rng.choice(TYPEFACES), rng.choice(INKS), rng.choice(PAPERS)
    return Look(font=face, size=rng.randint(13, 17), ink=ink, paper=paper, seed=rng.getrandbits(32))


def picture(scene_and_look) -> Any:
    """Pixels [height, width, 3]; runs in worker processes."""
    return np.asarray(draw(*scene_and_look))


def pictures(seed: int, split: str, count: int, families: Sequence[str], look_of=clean) -> list[tuple]:
    """(scene, look, pixels) of `count` scenes."""
    rng = random.Random(seed)
    drawn = [(scene, look_of(rng)) for scene in itertools.islice(scenes(seed, split, families), count)]
    with get_context("spawn").Pool(2) as pool:
        pixels = pool.map(picture, drawn, chunksize=32)
    return [(*job, image) for job, image in zip(drawn, pixels, strict=True)]


def moved(image: Any, rng: random.Random) -> Any:
    """The picture a few pixels off its place."""
    return np.roll(image, (rng.randint(-4, 4), rng.randint(-5, 5)), (0, 1))
