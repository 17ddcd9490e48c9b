"""Questions about pictures: right answers, nothing held out seen in training, pictures that show what they say."""

import base64
import io
import itertools
import json
import random
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from modalities.tasks import CATEGORIES, ONES, held_out
from modalities.vision.draw import FONTS, PICTURES, SIZES, Look, draw, font, handwriting, random_look
from modalities.vision.media import decode
from modalities.vision.prepare import prepare
from modalities.vision.tasks import POLYGONS, SCENES, Scene, scenes
from tools import prepare_shards
from xmodal_opd import config, schema
from xmodal_opd.build.shards import prepare_shards as make_split
from xmodal_opd.data import Shards

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

    train, test = ({(s.picture["kind"], content(s)) for s in some(family, 500, split)} for split in ("train", "test"))
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


def test_a_lines_marks_are_whole_above_the_boxes_of_its_values():
    picture = {"kind": "line", "values": [12, 20, 4], "labels": ["a", "b", "c"]}
    image = np.asarray(PICTURES["line"](picture, Look(ink=(0, 0, 0), paper=(255, 255, 255)), SIZES["line"]), float)
    high, wide = image.shape[:2]
    for place, value in enumerate(picture["values"]):  # as the axes lie in the picture
        x = wide * (0.03 + 0.94 * (place + 0.6) / 3.2)
        y = high * (0.04 + 0.76 * (1 - value / 26))
        mark = image[round(y) - 1 : round(y) + 1, round(x) - 1 : round(x) + 1]
        assert mark.max() < 90, f"the mark of {value} is covered"


def test_fonts_and_handwriting_of_the_two_splits_are_disjoint():
    text = Scene("rendered", "", {"kind": "text", "text": "Which one is a fruit?"}, "", "", "", "")
    pages = {font: draw(text, Look(font=font)).tobytes() for fonts in FONTS.values() for font in fonts}
    assert not set(FONTS["train"]) & set(FONTS["test"]) and len(set(pages.values())) == len(pages)
    train, test = (
        {image.tobytes() for images in handwriting(split).values() for image in images} for split in ("train", "test")
    )
    assert len(test) > 300 and len(train) > 1300 and not train & test


@pytest.mark.parametrize("name", [name for fonts in FONTS.values() for name in fonts])
def test_every_font_has_every_letter(name):
    missing = bytes(font(name, 14).getmask("\u0378"))  # no one's letter
    said = {letter for family in ("rendered", "charts") for s in some(family, 200) for letter in str(s.picture)}
    assert not [letter for letter in said - {" "} if bytes(font(name, 14).getmask(letter)) in (missing, b"")]


def test_lines_of_text_are_large_enough_to_read():
    for split, fonts in FONTS.items():
        for i, scene in enumerate(some("rendered", 40, split)):
            page = np.asarray(draw(scene, Look(font=fonts[i % len(fonts)], size=13)), float)
            inked = (np.abs(page - Look.paper).max(-1) > 90).any(1)
            heights = [int(rows.sum()) for rows in np.split(inked, len(inked) // 28) if rows.any()]
            assert heights and min(heights) >= 5, (scene, heights)  # of an x


# ---- shards


def shards(folder) -> list[dict]:
    return list(Shards(str(folder), shuffle=False).samples(epochs=1))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SETTINGS = {"count": 132, "per_shard": 33, "seed": 5, "families": ["digits", "geometry"], "blur": (0.2, 1.0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "out"
    prepare(folder, workers=1, progress=False, **SETTINGS)
    return folder


def test_a_sample_holds_the_picture_and_both_views(tmp_path):
    prepare(tmp_path / "out", count=8, split="test", instruction="Be brief.", workers=1, progress=False)
    for sample, scene in zip(shards(tmp_path / "out"), scenes(0, "test"), strict=False):
        image, *text = sample["views"]["student"][0]["content"]
        assert image == {"type": "image", "image": "question.png"}
        assert text[0]["text"].split("\n") == [*filter(None, [scene.prompt]), "Be brief."]
        assert sample["views"]["teacher"][0]["content"][0]["text"] == f"{scene.question}\nBe brief."
        assert (sample["answer"], sample["meta"]["response"]) == (scene.answer, scene.response)
        assert (sample["meta"]["task"], sample["meta"]["instance"]) == (scene.task, scene.instance)
        assert sample["meta"]["font"] in FONTS["test"] and sample["media"]["question.png"][:4] == b"\x89PNG"
        assert decode(sample["media"]["question.png"]).size == (sample["meta"]["width"], sample["meta"]["height"])


@pytest.mark.slow  # what deals records out to workers is tested by the spoken ones
def test_two_workers_write_the_same_bytes_as_one(made, tmp_path):
    prepare(tmp_path / "out", workers=2, progress=False, **SETTINGS)
    assert contents(tmp_path / "out") == contents(made)


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(made, tmp_path, monkeypatch):
    out, drawn = tmp_path / "out", []

    def stop_at(scene, look):
        drawn.append(scene)
        if len(drawn) == 70:
            raise KeyboardInterrupt
        return draw(scene, look)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modalities.vision.prepare.draw", stop_at)
        prepare(out, workers=1, progress=False, **SETTINGS)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(finished) == 2 and not (out / "index.json").exists()
    prepare(out, workers=1, progress=False, **SETTINGS)
    assert contents(out) == contents(made) and {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"families": ["maps"]}, "no task 'maps'; have: rendered, charts, geometry, digits"),
        ({"split": "valid"}, "no fonts for split 'valid'; have: train, test"),
        ({"jpeg": 100}, "jpeg is 100; it is a number from 1 to 95, or lowest and highest"),
        ({"blur": [1]}, r"blur is \[1\]; it is a number from 0 to 100, or lowest and highest"),
        ({"blur": (2, 1)}, r"blur is \(2, 1\); it is a number from 0 to 100"),
        ({"kind": "tasks"}, "kind is scenes, or images with a file of records; got 'tasks'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", **{"count": 1, "progress": False, **wrong})


# ---- people's own images


@pytest.fixture
def pictures(tmp_path):
    """a.png (64 x 32, red), b.jpg (32 x 64, blue) and c.gif (half a second of both colours)."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (32, 64), "blue").save(tmp_path / "b.jpg")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=500)
    return tmp_path


def prepared(folder, *records, **options):
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(folder / "out", "images", folder / "records.jsonl", workers=1, progress=False, **options)
    return shards(folder / "out")


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


ASKED = {"type": "text", "text": "What colour is it?"}
SEEN = user({"type": "image", "image": "question.png"}, ASKED)
READ = user({"type": "text", "text": "a red field\nWhat colour is it?"})
CAPTION = {"caption": "a red field", "answer": "red"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": user({"type": "image"}, ASKED), "images": ["a.png"], **CAPTION},
        {"prompt": user({"type": "image"}, ASKED), "images": [{"bytes": "INLINE", "path": None}], **CAPTION},
        {"prompt": user({"type": "image", "image": "a.png"}, ASKED), "text": "a red field", "answer": "red"},
        {"prompt": user({"type": "image_url", "image_url": {"url": "data:image/png;base64,INLINE"}}, ASKED), **CAPTION},
        {"prompt": user(ASKED), "images": "a.png", **CAPTION},
        {"messages": [{"role": "user", "content": "<image>What colour is it?"}], "images": ["a.png"], **CAPTION},
        {
            "messages": [
                {"role": "user", "content": "<image>What colour is it?"},
                {"role": "assistant", "content": "red"},
            ],
            "images": [{"path": "a.png"}],
            "transcript": ["a red field"],
        },
        {"image": "a.png", "prompt": "What colour is it?", **CAPTION},
        {"image": {"bytes": "INLINE"}, "instruction": "What colour is it?", **CAPTION},
        {"image": "a.png", "prompt": "What colour is it?", "messages": None, "images": None, "videos": None, **CAPTION},
        {"image": "a.png", "prompt": "What colour is it?", "teacher_messages": READ, "solution": "red"},
        {
            "image": "a.png",
            "prompt": "What colour is it?",
            "teacher_prompt": READ[0]["content"][0]["text"],
            "answer": "red",
        },
    ],
)
def test_every_form_of_record_gives_the_same_two_views(pictures, record):
    data = (pictures / "a.png").read_bytes()
    (sample,) = prepared(pictures, json.loads(json.dumps(record).replace("INLINE", base64.b64encode(data).decode())))
    assert sample["views"] == {"student": SEEN, "teacher": READ} and sample["answer"] == "red"
    assert sample["media"] == {"question.png": data}


def test_several_images_and_a_video_keep_their_places_and_their_bytes(pictures):
    said = "First <image> then <image> and <video> what is it?"
    record = {"prompt": said, "images": ["b.jpg", "a.png"], "videos": ["c.gif"], "text": ["one", "two", "three"]}
    (sample,) = prepared(pictures, record)
    content = sample["views"]["student"][0]["content"]
    assert [part.get("text", part.get(part["type"])) for part in content] == [
        "First", "question.jpeg", "then", "question2.png", "and", "question.gif", "what is it?",
    ]  # fmt: skip
    named = {"question.jpeg": "b.jpg", "question2.png": "a.png", "question.gif": "c.gif"}
    assert sample["media"] == {name: (pictures / file).read_bytes() for name, file in named.items()}
    said = sample["views"]["teacher"][0]["content"][0]["text"]
    assert said == "First\none\nthen\ntwo\nand\nthree\nwhat is it?"
    assert prepare_shards.measured("video", sample["media"]["question.gif"]).startswith("0.50 s, 32 x 32 pixels, ")


def test_a_gif_that_moves_and_one_that_stands_keep_their_bytes_and_a_records_own_source_stays(pictures):
    Image.new("RGB", (64, 32), "red").save(pictures / "still.gif")
    (sample,) = prepared(pictures, {"images": ["still.gif"], "videos": ["c.gif"], "text": ["x", "y"], "source": "web"})
    image, moving = sample["views"]["student"][0]["content"]
    assert sample["media"][image["image"]] == (pictures / "still.gif").read_bytes()
    assert sample["media"][moving["video"]] == (pictures / "c.gif").read_bytes()
    assert sample["meta"]["source"] == "web"


def test_grey_of_sixteen_bits_keeps_its_shades():
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)).save(out, "PNG")
    assert [pixel[0] for pixel in np.asarray(decode(out.getvalue()))[0]] == [0, 1, 128, 255]


def test_wear_changes_the_image_alone_and_makes_it_a_png(pictures):
    (sample,) = prepared(pictures, {"image": "b.jpg", **CAPTION}, texture=20, rotation=(5, 10), jpeg=(50, 60))
    (image,) = sample["views"]["student"][0]["content"]
    worn = decode(sample["media"][image["image"]])
    assert image["image"] == "question.png" and worn.size == (32, 64) and np.asarray(worn).std(0).max() > 10


def test_another_image_under_the_same_name_is_another_setting(pictures):
    record = {"image": "a.png", "prompt": "What?", **CAPTION}
    prepared(pictures, record)
    prepared(pictures, record)
    Image.new("RGB", (64, 32), "green").save(pictures / "a.png")
    with pytest.raises(ValueError, match=r"holds shards of other settings \(media: '\w+', now '\w+'\)"):
        prepared(pictures, record)


def test_grain_lies_on_images_of_any_size(pictures):
    Image.new("RGB", (7, 2), "grey").save(pictures / "tiny.png")
    (sample,) = prepared(pictures, {"image": "tiny.png", **CAPTION}, texture=20)
    pixels = np.asarray(decode(sample["media"]["question.png"]))
    assert pixels.shape == (2, 7, 3) and pixels.std() > 5


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "no.png", **CAPTION}, r"line 2: image file .*no\.png: no such file"),
        ({"image": "records.jsonl", **CAPTION}, "line 2: image of .* bytes cannot be decoded"),
        ({"videos": ["records.jsonl"], **CAPTION}, "line 2: video of .* bytes cannot be decoded"),
        ({"image": "a.png"}, "line 2: it has no text for the teacher view; add one of .*transcript, text, caption"),
        ({"prompt": "<image><image>", "images": ["a.png"], **CAPTION}, "names 1 image files and has 2 places for them"),
        ({"prompt": "<image>", "images": ["a.png"], "text": ["x", "y"]}, "'text' has 2 texts for 1 image or video"),
        ({"prompt": "What?", **CAPTION}, "it has no image and no video; name one"),
        ({"image": {"bytes": "%"}, **CAPTION}, "line 2: the bytes of its image are not base64"),
        (
            {"image": "/9j/" * 2000, **CAPTION},
            "its image is 8000 characters of text; bytes in base64 stand behind",
        ),
        ({"image": "a.png", "query": "What?", **CAPTION}, "what it asks is in 'query'; it is read in `prompt`"),
        (
            {"prompt": "<image>Where is <ref-object>?", "images": ["a.png"], "objects": {"ref": ["a cat"]}, **CAPTION},
            "line 2: it has <ref-object>, a place for one of its `objects`",
        ),
        (
            {"messages": [*SEEN, {"role": "assistant", "content": "At <bbox>"}], **CAPTION},
            "line 2: it has <bbox>, a place",
        ),
        ({"image": "a.png", **CAPTION, "answer": ["5", "five"]}, r"line 2: its answer is one text .*\['5', 'five'\]"),
        ({"image": "https://example.org/a.png", **CAPTION}, "is an address, https://example.org/a.png; download it"),
        ({"image": "a.png", "teacher_prompt": "<image>"}, "'teacher_prompt' holds image, and the teacher reads text"),
        ({"prompt": user({"type": "audio"}), **CAPTION}, "part of type 'audio' has no place in image shards"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_with_its_line(pictures, record, message):
    with pytest.raises(ValueError, match=rf"1 of 2 records cannot be used, more than 1%.*{message}"):
        prepared(pictures, {"image": "a.png", **CAPTION}, record)


def test_an_instruction_for_all_records_is_not_what_one_of_them_asks(pictures):
    asks = {"query": "What colour?", "images": ["a.png"], **CAPTION}
    (sample,) = prepared(pictures, {**asks, "instruction": "What colour is it?"}, instruction="Answer in one word.")
    assert sample["views"] == {"student": SEEN, "teacher": READ}
    shutil.rmtree(pictures / "out")
    with pytest.raises(ValueError, match="line 1: what it asks is in 'query'; it is read in `prompt` or `messages`"):
        prepared(pictures, asks, instruction="Answer in one word.")


# ---- the program and the recipe


def test_the_program_draws_shows_and_keeps_pictures(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_shards", *map(str, arguments)])
        prepare_shards.main()
        return capsys.readouterr().out

    options = ["--count", 2, "--families", "digits", "--split", "test", "--blur", "0:1", "--jpeg", 70, "--workers", 1]
    assert "2 samples in 1 shards" in run("scenes", tmp_path / "out", *options)
    settings = json.loads((tmp_path / "out" / "index.json").read_text())["settings"]
    assert (settings["kind"], settings["split"], settings["blur"], settings["jpeg"]) == ("scenes", "test", [0, 1], 70)
    said = run("inspect", tmp_path / "out", "-n", 1, "--save", tmp_path / "seen")
    assert "student: user: <question.png>" in said and "question.png: 168 x 56 pixels, png, " in said
    assert decode((tmp_path / "seen" / "00000000.question.png").read_bytes()).size == (168, 56)


def recipe(modality: str, **prepares) -> schema.Recipe:
    tree = {"name": "x", "modality": modality, "data": {"train": "a", "test": "b", "prepare": prepares}}
    tree |= {"rollout": {"samplings": {}}, "objective": {}}
    return schema.kind_of(tree).model_validate(tree)


def test_a_recipe_of_vision_prepares_scenes(tmp_path):
    data = recipe("vision", train=3, test=2, families=["geometry"], blur=[0.5, 1.0]).data
    assert isinstance(data.prepare, schema.Scenes)
    make_split(data.prepare, str(tmp_path / "test"), "test", data.prepare.test)
    settings = json.loads((tmp_path / "test" / "index.json").read_text())["settings"]
    assert settings["kind"] == "scenes" and settings["blur"] == [0.5, 1.0]
    assert [sample["meta"]["task"] for sample in shards(tmp_path / "test")] == ["geometry"] * 2


@pytest.mark.parametrize(("modality", "option"), [("vision", "accents=[en-us]"), ("audio", "blur=1")])
def test_a_recipe_takes_no_options_of_another_modality(tmp_path, modality, option):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: x\nmodality: {modality}\ndata: {{train: a, test: b}}\nrollout: {{samplings: {{}}}}\n")
    key = option.partition("=")[0]
    keys = {"vision": "blur, families, jpeg, rotation, seed", "audio": "accents, families, noise_snr, reverb, seed"}
    with pytest.raises(ValueError, match=f"unknown key 'data.prepare.{key}'; keys here: {keys[modality]}"):
        config.load(str(path), ["objective={}", f"data.prepare.{option}"])
