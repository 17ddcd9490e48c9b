"""The rules of image-question benchmarks: what each reads in a response, as published; a quick rule of ours for where
that reads nothing or asks a model; and when an answer is right.

A doc is what the layout keeps of a question for its scoring; all have "answer".
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from xmodal_opd.scoring.answers import announced, equivalent, extract, option, plain
from xmodal_opd.scoring.quantities import numbers

Doc = Mapping[str, Any]
Reading = tuple[str, str]  # the answer, and how it was read
WANTED = """Below are a question and a response to it. Copy the final answer that the response gives, as {form}, and \
write nothing else. If it gives none, write: none.

Question:
{question}

Response:
{response}

Final answer:"""
FORMS = {"integer": "an integer", "float": "a decimal number", "list": "a Python list"}  # else an option's letter
TOLERANCE = 0.05  # ChartQA


@dataclass(frozen=True)
class Rules:
    """How one benchmark is scored."""

    read: Callable[[str, Doc], str | None]  # the published rule; None: it asks a model, or reads nothing
    guess: Callable[[str, Doc], Reading]  # what is done then without a model
    right: Callable[[str, Doc], bool]  # the answer that was read -> whether it is right
    asked: Callable[[str, Doc], str] | None = None  # the request to the model, where the publication asks one
    compared: bool = False  # the model also tells whether an answer that is written otherwise is the same


def letters(options: Sequence[Any]) -> str:
    return ascii_uppercase[: len(options)]


def answers_of(doc: Doc) -> list[Any]:
    """Its right answers: some questions have several."""
    return list(doc["answer"]) if isinstance(doc["answer"], list | tuple) else [doc["answer"]]


# ---- MathVista


def mathvista_read(response: str, doc: Doc) -> str | None:
    """A bare answer of its type, or The answer is "…". (the evaluation's quick extraction); else a model is asked."""
    if not response or (doc["question_type"] == "multi_choice" and response in doc["choices"]):
        return response
    kind = {"integer": int, "float": float}.get(doc["answer_type"])
    try:
        return str(kind(response)) if kind else _quoted(response)
    except ValueError:
        return _quoted(response)


def _quoted(response: str) -> str | None:
    found = re.search(r'The answer is "(.*)"\.', response)
    return found[1] if found else None


def mathvista_guess(response: str, doc: Doc) -> Reading:
    """The option, number or list that the response ends in."""
    said = announced(response) or response
    if doc["question_type"] == "multi_choice":
        return _choice(extract(response, like="A") or "", doc["choices"]), "quick"
    if doc["answer_type"] == "list":
        return (re.findall(r"\[[^\[\]]*\]", said) or [""])[-1], "quick"
    found = [*numbers(said)] or [*numbers(response)]
    return str(float(found[-1].value)) if found else "", "quick"


def _choice(said: str, choices: Sequence[str]) -> str:
    """The letter in front of an option ("B) 8/11"), else the choice whose text ends last in what was said."""
    if (found := option(said)) and found[0] in letters(choices):
        return found[0]
    folded = said.casefold()
    ends = {c: folded.rfind(c.casefold()) + len(c) for c in choices if c.casefold() in folded}
    return max(ends, key=lambda c: (ends[c], len(c)), default=said)


def mathvista_right(extraction: str, doc: Doc) -> bool:
    """Equal to the answer once it has the answer's form."""
    return mathvista_normal(extraction, doc) == str(doc["answer"])


def mathvista_normal(extraction: str, doc: Doc) -> str | None:
    """Options by letter or the nearest by edit distance (also of nothing, as published), numbers by their precision."""
    if doc["question_type"] == "multi_choice":
        found = re.search(r"\(([a-zA-Z])\)", extraction)
        said = found[1].upper() if found else extraction.strip()
        place = letters(doc["choices"]).find(said) if len(said) == 1 else -1
        return doc["choices"][place] if place >= 0 else min(doc["choices"], key=lambda c: edit_distance(said, c))
    try:
        if doc["answer_type"] == "integer":
            return str(int(float(extraction)))
        return str(round(float(extraction), int(doc["precision"]))) if doc["answer_type"] == "float" else extraction
    except (ValueError, OverflowError, TypeError):
        return None


def mathvista_asked(response: str, doc: Doc) -> str:
    form = FORMS.get(doc["answer_type"], "the letter of an option")
    return WANTED.format(form=form, question=doc["query"], response=response)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions, each of weight 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


# ---- MathVerse


def mathverse_read(response: str, doc: Doc) -> str | None:
    """A response that is the answer itself; the evaluation asks a model for all others."""
    return response if not response or response == str(doc["answer"]) else None


def mathverse_guess(response: str, doc: Doc) -> Reading:
    like = "A" if doc["question_type"] == "multi-choice" else str(doc["answer"])
    return extract(response, like=like) or "", "quick"


def mathverse_right(extraction: str, doc: Doc) -> bool:
    """The letter, the text of the option that has it, or the same answer written otherwise."""
    answer = str(doc["answer"]).strip()
    listed = dict(re.findall(r"^([A-H])[:.]\s*(.+?)\s*$", doc["question"], flags=re.MULTILINE))
    same = [letter for letter, text in listed.items() if equivalent(extraction, text)]
    return equivalent(extraction, answer) or (doc["question_type"] == "multi-choice" and same == [answer])


def mathverse_asked(response: str, doc: Doc) -> str:
    form = "it stands there (an option's letter, a number, an expression)"
    return WANTED.format(form=form, question=doc["question"], response=response)


# ---- MMStar


def mmstar_read(response: str, doc: Doc) -> str | None:
    """The first character, or the one after "(", "option " or "the answer is " at the start; case aside."""
    text = response.lower().replace("\n", " ")
    places = (text.removeprefix(start) for start in ("", "(", "option ", "the answer is "))
    return next((place[0].upper() for place in places if place[:1] in {*"abcd"}), None)


def announced_option(response: str, doc: Doc) -> Reading:
    """The option that a response announces, or is once Markdown and LaTeX are off: **B**."""
    found = option(announced(response) or plain(response))
    return (found[0], "quick") if found else ("", "rule")


def same_letter(extraction: str, doc: Doc) -> bool:
    return extraction.upper() in (str(answer).strip().upper() for answer in answers_of(doc))


# ---- MMMU


def mmmu_read(response: str, doc: Doc) -> str | None:
    """The last option in brackets; else the last between spaces; else, in more than five words, the last whose text is
    there. An open answer is read where it is compared."""
    if doc["question_type"] != "multiple-choice":
        return response
    for mark in ",.!?;:'":
        response = response.strip(mark)
    text = f" {response} "
    options = dict(zip(letters(doc["options"]), doc["options"], strict=True))
    found = _last(text, {letter: f"({letter})" for letter in options})
    found = found or _last(text, {letter: f" {letter} " for letter in options})
    spoken = {letter: option.lower() for letter, option in options.items()}
    return found or (_last(text.lower(), spoken) if len(text.split()) > 5 else None)


def _last(text: str, forms: Mapping[str, str]) -> str | None:
    places = {letter: text.rfind(form) for letter, form in forms.items()}
    best = max(places, key=lambda letter: places[letter], default=None)
    return best if best is not None and places[best] >= 0 else None


def mmmu_guess(response: str, doc: Doc) -> Reading:
    """An option announced or alone, else one at random that depends on the question alone."""
    found, how = announced_option(response, doc)
    options = letters(doc["options"])
    return (found, how) if found and found in options else (random.Random(str(doc["id"])).choice(options), "random")


def mmmu_right(extraction: str, doc: Doc) -> bool:
    """The letter; of an open question an answer that is a number among those said, or stands in what was said."""
    if doc["question_type"] == "multiple-choice":
        return same_letter(extraction, doc)
    wanted = [form for answer in answers_of(doc) for form in mmmu_forms(str(answer))]
    return any(
        any(isinstance(w, str) and w in said for w in wanted) if isinstance(said, str) else said in wanted
        for said in mmmu_said(extraction)
    )


MMMU_MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?e[+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?!e[+-]?\d+)(?![,\d])",
)


def mmmu_said(response: str) -> set[str | float]:
    """What an open response may answer: the ends of its lines behind a mark (else all of it), and their numbers.

    The published code lowers the text before it cuts it at ". " and a capital, so that only line breaks cut; so here.
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    marked = [(line, MMMU_MARKS) for line in lines[:-1]] + [(lines[-1], (*MMMU_MARKS, "="))]
    ends = [end for line, marks in marked if (end := _shortest(line, marks)) and end not in {*",.!?;:'"}] or [text]
    found = [number for end in ends for pattern in MMMU_NUMBERS for number in re.findall(pattern, end)]
    return {form for said in (*ends, *found) for form in mmmu_forms(said)}


def _shortest(line: str, marks: Sequence[str]) -> str:
    """The shortest end of a line behind a mark; one that is empty gives way to the next."""
    shortest = ""
    for end in (line.split(mark)[-1].strip() for mark in marks if mark in line):
        shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def mmmu_forms(text: str) -> list[str | float]:
    """A number to two decimals; else lower case, and a single character only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# ---- ChartQA


def chartqa_read(response: str, doc: Doc) -> str | None:
    """The whole response, unless it announces an answer at the end of more."""
    return response if announced(response) is None else None


def chartqa_guess(response: str, doc: Doc) -> Reading:
    """All of it where that is right, else what it announces."""
    return (response, "rule") if chartqa_right(response, doc) else (announced(response) or response, "quick")


def chartqa_right(extraction: str, doc: Doc) -> bool:
    """Relaxed accuracy (arXiv:2203.10244 §5.1): numbers within 5 % of the answer, else the same text, case aside."""
    return any(relaxed(extraction, str(answer)) for answer in answers_of(doc))


def relaxed(said: str, answer: str) -> bool:
    number, wanted = _number(said), _number(answer)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= TOLERANCE
    return said.lower() == answer.lower()


def _number(text: str) -> float | None:
    """A percentage counts as a fraction."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


RULES: dict[str, Rules] = {
    "mathvista": Rules(mathvista_read, mathvista_guess, mathvista_right, mathvista_asked),
    "mathverse": Rules(mathverse_read, mathverse_guess, mathverse_right, mathverse_asked, compared=True),
    "mmstar": Rules(mmstar_read, announced_option, same_letter),
    "mmmu": Rules(mmmu_read, mmmu_guess, mmmu_right),
    "chartqa": Rules(chartqa_read, chartqa_guess, chartqa_right),
}
