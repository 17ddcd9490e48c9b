"""Benchmarks of image questions: each layout in the files people have, each rule by hand, runs that are killed."""

import io
import json
import os
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_judge import say, server

from modalities.rows import AT_ONCE, count, find, rows
from modalities.vision.benchmarks import LAYOUTS, questions
from xmodal_opd import lmms, report
from xmodal_opd.cli import main
from xmodal_opd.models import folder_of
from xmodal_opd.scoring.benchmarks import Verdict, score
from xmodal_opd.scoring.endpoint import asker
from xmodal_opd.scoring.rules import RULES, edit_distance, mmmu_said, relaxed
from xmodal_opd.serving import Failure
from xmodal_opd.statistics import shares, wilson_interval
from xmodal_opd.types import SampleError


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 90, 30)).save(out, format="PNG")
    return out.getvalue()


def cell(shade: int = 0) -> dict[str, Any]:
    """An image as parquet files of a hub keep it."""
    return {"bytes": png(shade), "path": f"{shade}.png"}


# ---- records of each layout


def mathvista(pid: int, **changed: Any) -> dict[str, Any]:
    fields = {
        "pid": str(pid),
        "question": "Which is it?",
        "query": "Hint: Give the letter.\nQuestion: Which is it?\nChoices:\n(A) 3/11\n(B) 8/11",
        "choices": ["3/11", "8/11"],
        "precision": None,
        "answer": "8/11",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {"task": "figure question answering", "skills": ["arithmetic reasoning"]},
    }
    return {**fields, **changed}


NUMBER = {"choices": None, "question_type": "free_form", "query": "Hint: Give it.\nQuestion: How much?"}
INTEGER = {**NUMBER, "answer": "14", "answer_type": "integer"}
FLOAT = {**NUMBER, "answer": "1.2", "answer_type": "float", "precision": 1.0}
LIST = {**NUMBER, "answer": "[2007, 2008]", "answer_type": "list"}


def mathverse(index: int, **changed: Any) -> dict[str, Any]:
    question = "How large is the angle?\nChoices:\nA:40°\nB:140°"
    fields = {
        "sample_index": str(index),
        "problem_index": "1",
        "problem_version": "Text Dominant",
        "question": question,
        "answer": "B",
        "question_type": "multi-choice",
        "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": f"Give the letter.\nQuestion: {question}",
        "question_for_eval": question,
    }
    return {**fields, **changed}


def mmstar(index: int, **changed: Any) -> dict[str, Any]:
    fields = {"index": index, "question": "Which?\nOptions: A: a cat, B: a dog", "image": cell(index), "answer": "B"}
    return {**fields, "category": "math", "l2_category": "geometry", "meta_info": {"source": "none"}, **changed}


def mmmu(number: int, **changed: Any) -> dict[str, Any]:
    fields = {
        "id": f"validation_Art_Theory_{number}",
        "question": "What does <image 1> show beside <image 2>?",
        "options": "['a red box', '<image 2>', \"a fox's tail\"]",
        "answer": "C",
        "question_type": "multiple-choice",
        **{f"image_{n}": cell(n) if n < 3 else None for n in range(1, 8)},
    }
    return {**fields, **changed}


def chartqa(number: int, **changed: Any) -> dict[str, Any]:
    return {"image": cell(number), "query": f"How many {number}?", "label": ["14"], "human_or_machine": 1, **changed}


def parquet(path: Path, records: list[dict[str, Any]], group: int = 3) -> Path:
    """Written as from a hub: several row groups."""
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=group)
    return path


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def samples(name: str, source: Path | str) -> list[dict[str, Any]]:
    return [read() for _, read in questions(name, find(str(source)))]


def asked(sample: dict[str, Any]) -> list[dict[str, str]]:
    return sample["views"]["student"][0]["content"]


def test_every_layout_has_its_rules_and_the_other_way_round():
    assert LAYOUTS.keys() == RULES.keys()


def test_mathvista_asks_the_query_it_ships_from_parquet_and_from_its_own_json(tmp_path):
    hub = [mathvista(i, image=f"images/{i}.png", decoded_image=cell(i)) for i in (1, 2)]
    first, second = samples("mathvista", parquet(tmp_path / "testmini-00000-of-00001.parquet", hub))
    assert (first["__key__"], second["__key__"]) == ("1", "2") and second["media"] == {"image_1": png(2)}
    assert asked(first) == [{"type": "image", "image": "image_1"}, {"type": "text", "text": hub[0]["query"]}]
    assert first["answer"] == "8/11" and first["meta"]["task"] == "figure question answering"
    assert first["meta"]["doc"]["choices"] == ["3/11", "8/11"]

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7.png").write_bytes(png(7))
    (tmp_path / "testmini.json").write_text(json.dumps({"7": mathvista(7, image="images/7.png")}))
    assert samples("mathvista", tmp_path / "testmini.json")[0]["media"] == {"image_1": png(7)}


def test_mathverse_finds_its_pictures_beside_it_or_in_images_and_has_versions_without(tmp_path):
    (tmp_path / "images" / "v").mkdir(parents=True)
    (tmp_path / "images" / "v" / "1.png").write_bytes(png())
    records = [mathverse(1, image="v/1.png"), mathverse(2, image="", problem_version="Text Only")]
    (tmp_path / "testmini.json").write_text(json.dumps(records))
    seen, read = samples("mathverse", tmp_path / "testmini.json")
    assert seen["media"] == {"image_1": png()} and seen["meta"]["task"] == "Text Dominant"
    assert asked(read) == [{"type": "text", "text": records[1]["query_wo"]}] and read["media"] == {}
    assert read["meta"]["doc"]["question"] == records[1]["question_for_eval"]


def test_files_of_a_hubs_cache_are_links_to_elsewhere(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    (snapshot / "images").mkdir(parents=True)
    for name, content in {"images/7.png": png(7), "a.json": json.dumps([mathvista(7, image="images/7.png")])}.items():
        blob = blobs / Path(name).stem
        blob.write_bytes(content if isinstance(content, bytes) else content.encode())
        (snapshot / name).symlink_to(blob)
    assert samples("mathvista", snapshot / "a.json")[0]["media"] == {"image_1": png(7)}


def test_mmstar_has_its_options_in_the_question(tmp_path):
    record = mmstar(0, question="At <image 1>: A: a, B: b")
    (sample,) = samples("mmstar", parquet(tmp_path / "mmstar.parquet", [record]))
    assert [p["type"] for p in asked(sample)] == ["text", "image", "text"]
    assert asked(sample)[2]["text"] == ": A: a, B: b\nAnswer with the letter of the right option."


def test_mmmu_puts_each_image_where_its_tag_stands_and_reads_options_written_as_text(tmp_path):
    open_question = mmmu(2, question="Name <image 1>.", options="[]", question_type="open", answer="['1/2', '0.5']")
    choice, free = samples("mmmu", parquet(tmp_path / "validation.parquet", [mmmu(1), open_question]))
    assert asked(choice) == [
        {"type": "text", "text": "What does "},
        {"type": "image", "image": "image_1"},
        {"type": "text", "text": " show beside "},
        {"type": "image", "image": "image_2"},
        {"type": "text", "text": "?\nA. a red box\nB. "},
        {"type": "text", "text": "(image 2)"},
        {"type": "text", "text": "\nC. a fox's tail\nAnswer with the letter of the right option."},
    ]
    assert choice["meta"]["task"] == "Art_Theory" and choice["meta"]["doc"]["options"][2] == "a fox's tail"
    assert free["answer"] == "1/2 | 0.5" and free["meta"]["doc"]["answer"] == ["1/2", "0.5"]
    assert list(choice["media"]) == ["image_1", "image_2"]


def test_chartqa_is_read_in_its_repositorys_form_and_in_two_of_hubs(tmp_path):
    (tmp_path / "test" / "png").mkdir(parents=True)
    (tmp_path / "test" / "png" / "166.png").write_bytes(png(5))
    for who in ("human", "augmented"):
        record = {"imgname": "166.png", "query": f"by {who}?", "label": "62"}
        (tmp_path / "test" / f"test_{who}.json").write_text(json.dumps([record]))
    own = samples("chartqa", tmp_path / "test")
    assert [s["meta"]["task"] for s in own] == ["augmented", "human"] and own[0]["media"] == {"image_1": png(5)}
    assert own[0]["__key__"] == "test_augmented:1" and own[0]["answer"] == "62"

    hub = samples("chartqa", parquet(tmp_path / "a.parquet", [chartqa(1, human_or_machine=0), chartqa(2)]))
    assert [s["meta"]["task"] for s in hub] == ["human", "augmented"] and hub[1]["meta"]["doc"]["answer"] == ["14"]
    other = [{"image": cell(), "question": "How?", "answer": "3", "type": "human_test"}]
    assert samples("chartqa", parquet(tmp_path / "b.parquet", other))[0]["meta"]["task"] == "human"


def test_records_are_read_in_order_over_files_row_groups_and_a_pattern(tmp_path):
    for subject in ("Art", "Music"):
        (tmp_path / subject).mkdir()
        many = [mmmu(i, id=f"validation_{subject}_{i}") for i in range(AT_ONCE + 3)]
        parquet(tmp_path / subject / "validation-00000-of-00001.parquet", many, group=AT_ONCE - 1)
    found = find(f"{tmp_path}/*/validation-*.parquet")
    assert count(found) == 2 * (AT_ONCE + 3)
    keys = [row.fields["id"] for row in rows(found)]
    assert keys == [f"validation_{s}_{i}" for s in ("Art", "Music") for i in range(AT_ONCE + 3)]
    jsonl = lines(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2}])
    jsonl.write_text(jsonl.read_text() + "\n")
    assert count([jsonl]) == 2 and [row.number for row in rows([jsonl])] == [1, 2]


# ---- files that are of no use


def refused(tmp_path: Path, name: str, content: str | list[dict[str, Any]], layout: str = "chartqa") -> str:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        (parquet if path.suffix == ".parquet" else lines)(path, content)
    with pytest.raises(ValueError) as error:
        list(questions(layout, find(str(path))))
    return str(error.value)


def test_files_of_another_form_are_refused_in_a_sentence(tmp_path):
    assert "there is no record in" in refused(tmp_path, "empty.jsonl", "")
    assert "line 2 of" in refused(tmp_path, "torn.jsonl", '{"query": "?", "label": "1", "image": ""}\n{"query')
    assert "cannot be read as parquet" in refused(tmp_path, "no.parquet", "PAR1 but not")
    assert "record 1 of" in refused(tmp_path, "list.json", "[1, 2]") and "is int" in refused(tmp_path, "n.json", "[1]")
    assert "is none of .parquet, .jsonl, .json" in refused(tmp_path, "a.tsv", "x")
    told = refused(tmp_path, "other.parquet", [mmstar(1)], "mathvista")
    assert "has no 'pid', as mathvista has (has: index, question" in told and "it is of the layout mmstar" in told
    assert "layouts: mathvista, mathverse, mmstar, mmmu, chartqa" in refused(tmp_path, "x.jsonl", [{"x": 1}], "mmmu")
    twice = refused(tmp_path, "twice.parquet", [mmstar(1), mmstar(1)], "mmstar")
    assert "has the index '1', which was there before" in twice
    with pytest.raises(ValueError, match="there is no file"):
        find(str(tmp_path / "gone.parquet"))
    for split in ("dev", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", [mmmu(1)])
    with pytest.raises(ValueError, match=r"holds the splits dev, test; name one, such as '.*/test-\*'"):
        for other in ("twice", "other", "no"):
            (tmp_path / f"{other}.parquet").unlink()
        find(str(tmp_path))


def test_an_image_may_stand_in_a_json_record_itself(tmp_path):
    code = b64encode(png()).decode()
    for image in ({"bytes": code}, f"data:image/png;base64,{code}"):
        (sample,) = samples("mathvista", lines(tmp_path / "m.jsonl", [mathvista(1, image=image)]))
        assert list(sample["media"].values()) == [png()]


def test_records_that_are_of_no_use_are_named(tmp_path):
    cases = [
        ("mmmu", mmmu(1, answer="?"), "has no answer; of many benchmarks' test splits none are published"),
        ("mathvista", mathvista(1, image="a.png", answer=""), "its image 'a.png' is not beside it"),
        ("mathvista", mathvista(1, image="../secret.png"), "its image '../secret.png' is not beside it"),
        ("mathvista", mathvista(1, image=""), "it has no image"),
        (
            "mathvista",
            mathvista(1, image="iVBO/" * 1000),
            "its image is 5000 characters of text; bytes in base64 stand behind",
        ),
        ("mathvista", mathvista(1, image="i", choices=[]), "it asks for a choice among 0 options"),
        ("mathvista", mathvista(1, image="i", metadata={}), "cannot be read: it has no 'task'"),
        ("mmmu", mmmu(1, options="['a', "), "its list of options is none"),
        ("mmmu", mmmu(1, question="See <image 4>."), "its text speaks of <image 4>, which it does not have"),
    ]
    (tmp_path / "secret.png").write_bytes(png())
    inside = tmp_path / "inside"
    inside.mkdir()
    for layout, record, message in cases:
        path = parquet(inside / "m.parquet", [record]) if layout == "mmmu" else lines(inside / "m.jsonl", [record])
        with pytest.raises(SampleError) as error:
            samples(layout, path)
        assert message in str(error.value) and "record 1 of" in str(error.value)


# ---- rules, each expected value by hand


def verdicts(name: str, doc: dict[str, Any], **expected: tuple[Any, str, str]) -> None:
    for response, told in expected.items():
        assert score(name, [response], [doc])[0] == Verdict(*told), response


MULTI = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"], "query": "?"}


@pytest.mark.parametrize(
    ("doc", "response", "expected"),
    [
        # a bare choice, integer or float is read by the published rule
        (MULTI | {"answer": "8/11"}, "8/11", (True, "8/11", "rule")),
        (INTEGER, "14", (True, "14", "rule")),
        (INTEGER, "<think>7 and 7</think><answer> 14 </answer>", (True, "14", "rule")),
        (INTEGER, "seven and seven, so 14 or 15</think>14", (True, "14", "rule")),  # the prompt began the thought
        (INTEGER, " 14\n", (True, "14", "rule")),
        (FLOAT, "1.23", (True, "1.23", "rule")),  # one decimal: 1.2
        (FLOAT, "1.26", (False, "1.26", "rule")),  # 1.3
        (FLOAT, "nan", (False, "nan", "rule")),
        (MULTI | {"answer": "8/11"}, 'So. The answer is "8/11".', (True, "8/11", "rule")),
        (MULTI | {"answer": "3/11"}, "", (True, "", "rule")),  # as published: the nearest choice to nothing
        # what the published evaluation asks a model for
        (MULTI | {"answer": "8/11"}, "The correct answer is (B) 8/11.", (True, "B", "quick")),
        (MULTI | {"answer": "8/11"}, "B", (True, "B", "quick")),
        (MULTI | {"answer": "8/11"}, "It must be 8/11, not more", (True, "8/11", "quick")),
        (MULTI | {"answer": "8/11"}, "<think>A? (A)</think>\\boxed{B}", (True, "B", "quick")),
        (INTEGER, "The number missing in the sequence is 14.", (True, "14.0", "quick")),
        (INTEGER, "fourteen", (True, "14.0", "quick")),
        (INTEGER, "I cannot tell.", (False, "", "quick")),
        (FLOAT, "Luca needs $1.2 to buy 2.", (False, "2.0", "quick")),
        (FLOAT, "answer: 1.2", (True, "1.2", "quick")),
        (LIST, "Between them: [2007, 2008]", (True, "[2007, 2008]", "quick")),
        (LIST, "2007 and 2008", (False, "", "quick")),
    ],
)
def test_mathvista(doc: dict[str, Any], response: str, expected: tuple[Any, str, str]):
    assert score("mathvista", [response], [doc]) == [Verdict(*expected)]


def test_the_nearest_choice_is_nearest_by_edit_distance():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("flaw", "lawn"))] == [3, 2, 2]
    doc = MULTI | {"choices": ["Monday", "Sunday", "Friday"], "answer": "Sunday"}
    assert score("mathvista", ["sundae"], [doc])[0].correct  # 2 and 1 of case from Sunday; further from the others
    numbers = MULTI | {"choices": ["2", "102"], "answer": "102"}
    assert score("mathvista", ["It is 102 degrees"], [numbers])[0].correct


CHOICES = "Find the angle.\nChoices:\nA:40°\nB:140°"


@pytest.mark.parametrize(
    ("doc", "response", "expected"),
    [
        ({"question_type": "multi-choice", "answer": "B"}, "B", (True, "B", "rule")),
        ({"question_type": "multi-choice", "answer": "B"}, "Hence the answer is B: 140°.", (True, "B: 140", "quick")),
        ({"question_type": "multi-choice", "answer": "B"}, "The answer is 140°.", (True, "140", "quick")),
        ({"question_type": "multi-choice", "answer": "B"}, "The answer is 40.", (False, "40", "quick")),
        ({"question_type": "free-form", "answer": "14.8 cm"}, "x = 14.8", (True, "14.8", "quick")),
        ({"question_type": "free-form", "answer": "\\frac{1}{2}"}, "so \\boxed{1/2}", (True, "1/2", "quick")),
        ({"question_type": "free-form", "answer": "5"}, "", (False, "", "rule")),
    ],
)
def test_mathverse(doc: dict[str, Any], response: str, expected: tuple[Any, str, str]):
    assert score("mathverse", [response], [doc | {"question": CHOICES}]) == [Verdict(*expected)]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", (True, "B", "rule")),
        ("b: a dog", (True, "B", "rule")),
        ("(B) a dog", (True, "B", "rule")),
        ("Option B", (True, "B", "rule")),
        ("The answer is B.", (True, "B", "rule")),
        ("Both", (True, "B", "rule")),  # as published: the first character
        ("A dog, so B", (False, "A", "rule")),
        ("It is B", (False, "", "rule")),  # no place where the published rule looks
        ("It is not A.\nAnswer: B", (True, "B", "quick")),
        ("**B**", (True, "B", "quick")),
        ("", (False, "", "rule")),
    ],
)
def test_mmstar(response: str, expected: tuple[Any, str, str]):
    assert score("mmstar", [response], [{"answer": "B"}]) == [Verdict(*expected)]


SUBJECT = {"question_type": "multiple-choice", "options": ["a red box", "a vase", "the fox"], "id": "v_Art_1"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("(A) is wrong, so (C).", (True, "C", "rule")),  # the last in brackets
        ("(A) or C ", (False, "A", "rule")),  # brackets before spaces
        ("A and then C", (True, "C", "rule")),  # the last between spaces
        ("C.", (True, "C", "rule")),  # punctuation at the ends is taken off
        ("What is shown here is clearly The Fox", (True, "C", "rule")),  # more than five words: an option's text
        ("I see a red box above the fox there", (True, "C", "rule")),  # the last of two
        ("\\boxed{C}", (True, "C", "quick")),
        ("**C**", (True, "C", "quick")),
        ("**C. the fox**", (True, "C", "quick")),
    ],
)
def test_mmmu_choices(response: str, expected: tuple[Any, str, str]):
    assert score("mmmu", [response], [SUBJECT | {"answer": "C"}]) == [Verdict(*expected)]


def test_mmmu_draws_an_option_where_none_is_named_the_same_one_every_time():
    ids = [SUBJECT | {"id": f"v_Art_{i}", "answer": "C"} for i in range(300)]
    drawn = score("mmmu", ["the fox"] * 300, ids)  # too few words to look for its text
    assert drawn == score("mmmu", ["no idea"] * 300, ids) and {v.how for v in drawn} == {"random"}
    assert all(70 < sum(v.extracted == letter for v in drawn) < 130 for letter in "ABC")


OPEN = {"question_type": "open", "id": "v_Math_1", "options": []}


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("6,000", "The total is $6,000.", True),
        ("6000", "so it is 6,000", True),
        ("0.5", "x = 0.499", True),  # two decimals
        ("0.5", "x = 0.49", False),
        (["1/2", "0.5"], "The probability is 1/2", True),
        ("300", "3e2", True),
        ("nitrogen", "The gas is Nitrogen gas", True),  # the answer stands in what was said
        ("c", "The vitamin is C", True),
        ("c", "Ascorbate", False),  # one character counts at the end of a word only
        ("7", "Therefore 7\nI checked 8 of them", True),  # ends of lines behind a mark
        ("8", "Therefore 7\nI checked 8 of them", False),
    ],
)
def test_mmmu_open_answers(answer: Any, response: str, right: bool):
    assert score("mmmu", [response], [OPEN | {"answer": answer}])[0] == Verdict(right, response, "rule")


def test_mmmu_reads_the_shortest_end_behind_a_mark():
    assert mmmu_said("So the final answer is 12 cm") == {"12 cm", 12.0}
    assert mmmu_said("We add. That is 3 + 4 = 7") == {7.0}  # "=" marks in the last line alone
    assert mmmu_said("a = 5\nb") == {"a = 5\nb", 5.0}


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("104.9", "100", True),
        ("95", "100", True),  # 5 % and no more
        ("94.9", "100", False),
        ("5%", "0.05", True),
        ("0", "0", True),
        ("0.0", "0", False),  # as published: no relative error of nothing, so the text
        ("yes", "Yes", True),
        ("Yes.", "Yes", False),
        ("-2", "2", False),
    ],
)
def test_chartqa_is_relaxed_for_numbers_and_exact_for_text(said: str, answer: str, right: bool):
    assert relaxed(said, answer) is right
    assert score("chartqa", [said], [{"answer": ["no such", answer]}])[0] == Verdict(right, said, "rule")


def test_chartqa_reads_an_announced_answer_at_the_end_of_more():
    docs = [{"answer": "14"}] * 3
    told = score("chartqa", ["It grows by 4 each year. The answer is 14", "The bars are 14", "answer: 20"], docs)
    expected = [(True, "14", "quick"), (False, "The bars are 14", "rule"), (False, "20", "quick")]
    assert told == [Verdict(*one) for one in expected]


# ---- a model that finds the answer, behind a real server


def test_a_model_reads_what_the_rule_does_not_and_compares_what_is_written_otherwise():
    def reply(seen, handler, body):
        question = body["messages"][0]["content"]
        say(handler, "1" if "1 or 0?" in question else "Answer: 0.50 m" if "half" in question else "none")

    with server(reply) as seen:
        ask = asker("eval.extractor", url=seen.url, model="m", api_key_env=None, timeout=30.0, retries=0,
                    concurrency=2, max_tokens=9)  # fmt: skip
        doc = {"question_type": "free-form", "question": "How long?", "answer": "50 cm"}
        told = score("mathverse", ["It is half a metre", "50 cm", "no"], [doc] * 3, ask)
        assert told == [Verdict(True, "0.50 m", "model"), Verdict(True, "50 cm", "rule"), Verdict(False, "", "model")]
        assert len(seen.bodies) == 3 and seen.bodies[0]["max_tokens"] == 9
        assert score("mathvista", ["14", "a dozen"], [INTEGER] * 2, ask) == [
            Verdict(True, "14", "rule"),
            Verdict(False, "", "model"),
        ]
        assert score("mmstar", ["B", "half"], [{"answer": "B"}] * 2, ask)[1].how == "rule" and len(seen.bodies) == 4


def test_a_model_that_fails_leaves_the_question_undecided_with_the_reason():
    told = score("mathvista", ["14", "fourteen"], [INTEGER] * 2, lambda asked: [Failure("timed out")] * len(asked))
    assert told == [Verdict(True, "14", "rule"), Verdict(None, "", "timed out")]


# ---- runs


def run(world: dict[str, Any], *words: str, longest: int = 4) -> int:
    """By the small default model: a random one may say line breaks alone, in which there is nothing to read."""
    model = ["model.name=default", f"rollout.max_tokens={longest}", "eval.batch=2"]
    return main(["eval", world["recipe"], *model, *words])


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    verse = [mathverse(i, image="1.png", problem_version=v) for i, v in enumerate(("Vision Only", "Text Lite"))]
    return {
        "mathvista": parquet(tmp_path / "a.parquet", [mathvista(i, decoded_image=cell(i)) for i in range(5)]),
        "mathverse": lines(tmp_path / "b.jsonl", verse),
        "mmstar": parquet(tmp_path / "c.parquet", [mmstar(i) for i in range(3)]),
        "mmmu": parquet(tmp_path / "d.parquet", [mmmu(i) for i in range(2)]),
        "chartqa": parquet(tmp_path / "e.parquet", [chartqa(i, human_or_machine=i % 2) for i in range(3)]),
    }


def test_all_benchmarks_are_answered_and_a_killed_run_goes_on(world, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    named = [word for name, path in files.items() for word in ("--benchmark", f"{name}={path}")]
    output = tmp_path / "answers.jsonl"
    words = [*named, "--limit", "3", "--output", str(output), "--lmms-eval", str(tmp_path / "lmms")]
    assert run(world, *words) == 0
    printed = capsys.readouterr().out
    whole = [json.loads(line) for line in output.read_text().splitlines()]
    counts = {name: sum(r["benchmark"] == name for r in whole) for name in files}
    assert counts == {"mathvista": 3, "mathverse": 2, "mmstar": 3, "mmmu": 2, "chartqa": 3}
    assert all(name in printed for name in [*files, "Vision Only", "augmented", "human", "Wilson"])
    assert "of 3 answers were read by quick rules" in printed and "n = 3" in printed
    assert {r["view"] for r in whole} == {"student"} and all(r["response"] is not None for r in whole)

    # killed while it wrote the fifth answer: four stay as they are, also one that a fresh run would not give
    kept = [json.dumps({**r, "response": "kept"}) for r in whole[:4]]
    output.write_text("\n".join([*kept, json.dumps(whole[4])[:40]]))
    assert run(world, *words) == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["response"] for r in again[:4]] == ["kept"] * 4 and again[4:] == whole[4:]

    capsys.readouterr()
    assert run(world, *words, longest=5) == 1
    assert "holds answers with max_tokens 4, and this run has 5; name another file" in capsys.readouterr().err
    assert run(world, *words, "model.max_pixels=3136") == 1
    assert "holds answers with max_pixels None, and this run has 3136" in capsys.readouterr().err
    samples = sorted((tmp_path / "lmms").glob("*_samples_*.jsonl"))
    assert {path.stem.partition("_samples_")[2] for path in samples} == set(files)


def test_weights_trained_anew_at_the_same_place_answer_anew(world, files, tmp_path, caplog):
    step, output = tmp_path / "step-000001", tmp_path / "answers.jsonl"
    shutil.copytree(folder_of("default"), step)
    words = ["--benchmark", f"mmstar={files['mmstar']}", "--output", str(output), "--checkpoint", str(step)]

    def said() -> list[str]:
        assert run(world, *words) == 0
        return [json.loads(line)["response"] for line in output.read_text().splitlines()]

    first = said()
    kept = [json.dumps({**json.loads(line), "response": "kept"}) + "\n" for line in output.read_text().splitlines()]
    output.write_text("".join(kept))
    assert said() == ["kept"] * 3
    (file,) = step.glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    assert said() == first and "kept" not in first
    assert "3 answers are of weights that are no longer there: asked anew" in caplog.text


def test_undecided_questions_are_asked_again_and_left_out_of_the_share(world, files, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    words = ["--benchmark", f"mathvista={files['mathvista']}", "--limit", "2", "--output", str(output)]
    dead = "eval.extractor={model: m, url: 'http://127.0.0.1:9/v1', retries: 0}"
    assert run(world, *words, dead) == 0
    printed = capsys.readouterr().out
    assert [json.loads(line)["correct"] for line in output.read_text().splitlines()] == [None, None]
    assert (
        "2 of 2 answers are undecided and left out (no connection (ConnectError): 2)" in printed and "none" in printed
    )
    assert run(world, *words) == 0
    assert {json.loads(line)["how"] for line in output.read_text().splitlines()} == {"quick"}
    assert run(world, *words, dead) == 1
    assert "holds answers with extractor None, and this run has 'm'" in capsys.readouterr().err


def test_blank_images_are_a_view_of_every_benchmark(world, files, tmp_path, capsys):
    output = tmp_path / "blank.jsonl"
    words = ["--benchmark", f"mmstar={files['mmstar']}", "--output", str(output)]
    assert run(world, *words, "--view", "blank") == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(answers) == 3 and {a["view"] for a in answers} == {"blank"}
    assert len({a["response"] for a in answers}) == 1  # the same question about nothing
    assert run(world, *words, "--view", "teacher") == 1
    assert "has no view 'teacher'; it has: student, blank, degraded" in capsys.readouterr().err


def test_broken_images_are_named_and_too_many_end_the_run_with_what_was_answered(world, tmp_path, capsys):
    broken = {"bytes": png()[:60], "path": None}
    path = parquet(tmp_path / "m.parquet", [mmstar(i, **({"image": broken} if i == 1 else {})) for i in range(3)])
    output = tmp_path / "answers.jsonl"
    assert run(world, "--benchmark", f"mmstar={path}", "--output", str(output)) == 1
    error = capsys.readouterr().err
    assert "1 of 3 questions of mmstar are broken, more than 1%" in error and "sample '1', image 'image_1'" in error
    assert [json.loads(line)["key"] for line in output.read_text().splitlines()] == ["0", "2"]


def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(world, files, tmp_path, capsys):
    cases = {
        ("--benchmark", "mathvsta=x"): "there is no layout 'mathvsta' of a benchmark; there are: mathvista, mathverse",
        ("--benchmark", "mmstar"): "--benchmark is NAME=PATH",
        ("--benchmark", f"mmstar={tmp_path / 'gone.parquet'}"): "there is no file",
        ("--benchmark", f"mathvista={files['mmstar']}"): "has no 'pid', as mathvista has",
        ("--view", "blank"): "--view is of --benchmark",
        ("--limit", "0"): "--limit is a number of questions from 1 on, not 0",
    }
    for words, message in cases.items():
        assert run(world, *words, "model.name=/nowhere", "--output", str(tmp_path / "x.jsonl")) == 1
        assert message in capsys.readouterr().err


def test_a_robots_recipe_is_asked_no_questions(files, tmp_path, capsys):
    words = ["--benchmark", f"mmstar={files['mmstar']}", "--output", str(tmp_path / "x.jsonl"), "model.name=/nowhere"]
    assert main(["eval", "vla_opd", *words]) == 1
    assert "vla_opd is a recipe of modality action, whose model answers with actions, and" in capsys.readouterr().err


def test_answers_to_questions_of_our_own_go_to_lmms_eval_too(world, tmp_path, capsys):
    folder = tmp_path / "lmms"
    assert run(world, "--limit", "4", "--output", str(tmp_path / "own.jsonl"), "--lmms-eval", str(folder)) == 0
    assert "arithmetic" in capsys.readouterr().out
    own = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    for side in ("student", "text"):
        (path,) = folder.glob(f"*_samples_tiny_{side}.jsonl")
        told = [json.loads(line) for line in path.read_text().splitlines()]
        assert [t["doc_id"] for t in told] == [0, 1, 2, 3] and all(t["input"].strip() for t in told)
        assert [t["filtered_resps"] for t in told] == [r[side] for r in own]
        assert [t["score"] for t in told] == [float(r[f"{side}_correct"]) for r in own]


def test_an_export_numbers_questions_by_their_place_whatever_was_asked_when(world, tmp_path):
    broken = {"image": {"bytes": png()[:60], "path": None}}
    path = parquet(tmp_path / "m.parquet", [mmstar(i, **(broken if i == 1 else {})) for i in range(101)])
    output, folder = tmp_path / "answers.jsonl", tmp_path / "lmms"
    words = ["--benchmark", f"mmstar={path}", "--output", str(output), "--lmms-eval", str(folder)]
    assert run(world, *words, "--limit", "1") == 0
    first = json.loads(output.read_text())
    asked_later = [0, *range(2, 100)]  # the last question's answer comes first, and the first one's after a stop
    output.write_text("".join(json.dumps({**first, "key": str(i)}) + "\n" for i in [100, *asked_later[1:]]))
    shutil.rmtree(folder)
    assert run(world, *words) == 0
    assert [json.loads(line)["key"] for line in output.read_text().splitlines()][-1] == "0"
    (written,) = folder.glob("*_samples_mmstar.jsonl")
    numbers = [(told["doc_id"], told["key"]) for told in map(json.loads, written.read_text().splitlines())]
    assert numbers == [(i, str(i)) for i in [*asked_later, 100]]


# ---- tables and exports


def answered(number: int, correct: bool | None, how: str = "rule") -> dict[str, Any]:
    told = {"benchmark": "chartqa", "key": f"k{number}", "task": "human", "question": "How?", "answer": "14"}
    return {**told, "response": f"r{number}", "correct": correct, "extracted": "14", "how": how}


def test_an_export_has_the_fields_of_lmms_eval(tmp_path):
    records = [answered(0, True), answered(1, None, "timed out"), answered(2, False, "quick")]
    samples, results = lmms.write(records, "mine", tmp_path, "20260101-000000", "folder/model")
    assert samples.name == "20260101-000000_samples_chartqa.jsonl" and results.name == "20260101-000000_results.json"
    first, second = (json.loads(line) for line in samples.read_text().splitlines())
    assert {k: first[k] for k in ("doc_id", "target", "input", "resps", "filtered_resps", "score")} == {
        "doc_id": 0, "target": "14", "input": "How?", "resps": ["r0"], "filtered_resps": "r0", "score": 1.0
    }  # fmt: skip
    assert second["doc_id"] == 2 and second["score"] == 0.0 and second["how"] == "quick"
    assert len(first["doc_hash"]) == 64 and first["doc_hash"] != second["doc_hash"] and first["token_counts"] == [None]
    # its comparison with a baseline takes the first number whose name holds "score"
    assert [next(v for k, v in line.items() if "score" in k.lower()) for line in (first, second)] == [1.0, 0.0]
    told = json.loads(results.read_text())
    assert told["results"] == {"chartqa": {"alias": "chartqa", "score,none": 0.5}}
    assert told["model_name"] == "folder/model" and told["n-samples"]["chartqa"] == {"original": 2, "effective": 2}


def test_wilson_intervals_by_hand():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    part = shares([answered(0, True), answered(1, False), answered(2, None)])
    assert part["questions"] == 2 and part["accuracy"] == 0.5


def test_the_table_tells_how_answers_were_read(capsys):
    report.print_benchmarks([answered(0, True), answered(1, False, "random"), answered(2, None, "timed out")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 answers named no option, and one was drawn, as published." in printed
    assert "1 of 3 answers are undecided and left out (timed out: 1); run again to ask again." in printed
    assert "50.0" in printed and "n = 2" in printed
