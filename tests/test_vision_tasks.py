"""Questions about pictures: right answers, nothing held out seen in training, pictures that show what they say."""

import itertools
import random

import numpy as np
import pytest

from modalities.tasks import CATEGORIES, ONES, held_out
from modalities.vision.draw import FONTS, draw, handwriting, random_look
from modalities.vision.tasks import POLYGONS, SCENES, Scene, scenes

NUMBER = {word: number for number, word in enumerate(ONES)}


def some(family: str, count: int = 300, split: str = "train", seed: int = 0) -> list[Scene]:
    return list(itertools.islice(scenes(seed, split, [family]), count))


def calculated(scene: Scene) -> str:
    """The answer, from the picture and the question alone."""
    picture, prompt = scene.picture, scene.prompt
    match picture["kind"]:
        case "text":
            return _written(picture["text"])
        case "sum":
            total, *terms = picture["terms"]
            return ONES[total + sum(t if s == "+" else -t for s, t in zip(picture["signs"], terms, strict=True))]
        case "bars" | "line":
            return _charted(dict(zip(picture["labels"], picture["values"], strict=True)), prompt)
        case "polygon" if "?" in picture["labels"]:
            known = [int(label) for label in picture["labels"] if label != "?"]
            return ONES[NUMBER[prompt.split()[3].strip(".")] - sum(known)]
        case "polygon":
            return ONES[sum(picture["sides"])]
        case "shapes" if "corners" in prompt:
            return ONES[sum(POLYGONS[shape] for shape in picture["shapes"])]
        case "shapes":
            asked = prompt.split()[2].removesuffix("s")
            return ONES[sum(asked in (shape, "shape") for shape in picture["shapes"])]
    raise AssertionError(picture)


def _written(text: str) -> str:
    words = text.strip("?.").replace(",", "").replace(":", "").split()
    numbers = [NUMBER[word] for word in words if word in NUMBER]
    if "plus" in words or "minus" in words:
        signs = [1 if word == "plus" else -1 for word in words if word in ("plus", "minus")]
        return ONES[numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True))]
    if "A" in words:
        kind = next(kind for kind in CATEGORIES if kind in text)
        return next(words[i - 1] for i, word in enumerate(words) if word.strip(".") in CATEGORIES[kind])
    which = next(i for i, word in enumerate(("smallest", "middle", "largest")) if word in words)
    return ONES[sorted(numbers)[which]]


def _charted(table: dict[str, int], prompt: str) -> str:
    asked = [word.strip("?") for word in prompt.split() if word.strip("?") in table]
    if "together" in prompt:
        return ONES[sum(table[label] for label in asked)]
    if "more" in prompt:
        return ONES[table[asked[0]] - table[asked[1]]]
    return ONES[table[asked[0]]] if asked else (min if "smallest" in prompt else max)(table, key=lambda x: table[x])


@pytest.mark.parametrize("family", SCENES)
def test_worked_answers_are_right(family):
    for scene in some(family):
        assert scene.answer == calculated(scene), scene
        worked, _, answer = scene.response.partition(". answer: ")
        assert worked and answer == scene.answer
        for step in worked.split(", ") if "plus" in worked or "minus" in worked else ():
            a, sign, b, _, c = step.split()
            assert NUMBER[a] + (NUMBER[b] if sign == "plus" else -NUMBER[b]) == NUMBER[c], scene


@pytest.mark.parametrize("family", SCENES)
def test_what_is_held_out_is_never_seen_in_training_in_any_order(family):
    def content(scene):
        picture = {name: value for name, value in scene.picture.items() if name != "labels"}
        if scene.task in ("charts", "geometry"):
            return tuple(sorted(next(v for k, v in picture.items() if k != "kind")))
        signed = list(zip(["+", *picture["signs"]], picture["terms"], strict=True)) if scene.task == "digits" else ()
        return tuple(sorted(signed)) or scene.instance

    train, test = ({(s.picture["kind"], content(s)) for s in some(family, 1500, split)} for split in ("train", "test"))
    if family == "charts":
        train, test = ({numbers for _, numbers in half} for half in (train, test))
    assert len(test) >= 12 and len(train) > 2 * len(test) / 3 and not train & test


def test_the_stream_is_a_pure_function_and_families_take_turns():
    first, again = (list(itertools.islice(scenes(3, "train"), 40)) for _ in range(2))
    assert first == again and [scene.task for scene in first[:4]] == list(SCENES)
    assert first != list(itertools.islice(scenes(4, "train"), 40))


def test_a_sum_of_digits_is_held_out_where_the_same_question_in_text_is():
    for split in ("train", "test"):
        for scene in some("digits", 200, split):
            if len(scene.picture["terms"]) == 3:
                said = scene.shown.removeprefix("What is ").removesuffix("?")
                assert held_out(said) == (split == "test")


@pytest.mark.parametrize("family", SCENES)
def test_pictures_are_small_pure_and_show_ink(family):
    rng = random.Random(0)
    for scene in some(family, 8):
        look = random_look(rng, "train")
        image = draw(scene, look)
        assert image.mode == "RGB" and all(side % 28 == 0 and 56 <= side <= 224 for side in image.size)
        assert image.tobytes() == draw(scene, look).tobytes()
        distance = np.abs(np.asarray(image, float) - look.paper).max(-1)
        assert 0.005 < (distance > 90).mean() < 0.5


def test_fonts_and_handwriting_of_the_two_splits_are_disjoint():
    assert not set(FONTS["train"]) & set(FONTS["test"])
    train, test = (
        {image.tobytes() for images in handwriting(split).values() for image in images} for split in ("train", "test")
    )
    assert len(test) > 300 and len(train) > 1300 and not train & test
