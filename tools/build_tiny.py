#!/usr/bin/env python
"""Build the small default model from nothing: a few-million-parameter Qwen2.5-Omni thinker that answers questions well
as text and as clean speech, and some as clean pictures: the only speech and pictures it meets here. Background noise is
new to it, and so are turned and blurred pictures. That, and how little it saw, is the gap a first run closes.

    python tools/build_tiny.py xmodal_opd/assets/tiny --seed 0

Lessons, from one seed: questions as text; hearing, by CTC; spoken questions with their answers; then those of sight;
`tools/tiny/` has them all. Each is a pure function of the one before and the seed, and is kept in --work, so that a
stopped build goes on.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def held_out(adapter, seed: int) -> dict[str, list]:
    """What the accuracies after each lesson are of: 300 questions as text and as clean speech; 300 scenes as text, as
    the clean pictures of these lessons, and as the worn ones of a recipe's test."""
    from modalities.vision.draw import random_look
    from modalities.vision.tasks import SCENES
    from tools.tiny.lessons import example
    from tools.tiny.media import clean, clips, pictures
    from tools.tiny.sight import looked

    spoken = clips("test", seed + 9999, 300)
    asked = {
        "text": [(q.task, example(adapter, q)[0], q.answer) for q, _ in spoken],
        "audio": [(q.task, example(adapter, q, wave)[0], q.answer) for q, wave in spoken],
    }
    looks = {"clean": clean, "worn": lambda rng: random_look(rng, "test")}
    for name, look in looks.items():
        drawn = pictures(seed + 9998, "test", 300, tuple(SCENES), look)
        asked["scenes"] = [(s.task, looked(adapter, s)[0], s.answer) for s, _, _ in drawn]
        asked[name] = [(s.task, looked(adapter, s, image)[0], s.answer) for s, _, image in drawn]
    return asked


def lessons(from_base: bool) -> dict[str, Callable[[Any, Any, int], None]]:
    """By name, in their order; a base has been through those of text and speech."""
    from tools.tiny import hearing, sight

    spoken = {"text": hearing.learn_text, "hearing": hearing.learn_to_hear, "answering": hearing.learn_to_answer}
    seen = {
        "words": sight.learn_words,
        "reading": sight.learn_to_read,
        "reading well": sight.learn_to_read_well,
        "scenes": sight.learn_scenes,
        "figures": sight.learn_figures,
        "charts": sight.learn_charts,
        "looking": sight.learn_to_look,
    }
    return seen if from_base else spoken | seen


def build(folder: Path, work: Path, seed: int, base: Path | None) -> None:
    """Teach what is not yet kept in `work`, and write the model with its processor to `folder`."""
    from modalities.chat import ChatAdapter
    from modalities.tasks import questions
    from tools.tiny.lessons import REPEAT, accuracy, save, teach
    from tools.tiny.model import make_model, make_processor, make_tokenizer
    from xmodal_opd.models import load_model, load_processor

    asked = itertools.islice(questions(seed, "train"), 20000)
    words = f"user\nassistant\n{REPEAT} {{0.prompt}} {{0.response}}"
    tokenizer = load_processor(str(base)).tokenizer if base else make_tokenizer(words.format(q) for q in asked)
    processor, model = make_processor(tokenizer), make_model(tokenizer, seed)
    if base:
        kept = load_model(str(base)).state_dict()
        model.load_state_dict({k: v for k, v in kept.items() if not k.startswith("visual.")}, strict=False)
    adapter = ChatAdapter(processor, 512)
    tests = held_out(adapter, seed)
    found = lambda: {view: accuracy(model, adapter, some) for view, some in tests.items()}  # noqa: E731
    teach(model, adapter, lessons(base is not None), work, seed, found)
    save(model, processor, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where finished lessons are kept")
    parser.add_argument("--base", type=Path, help="a folder built before, to go on from after the lessons of speech")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    build(arguments.folder, arguments.work, arguments.seed, arguments.base)


if __name__ == "__main__":
    main()
