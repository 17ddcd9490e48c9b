"""How a response lays out its reasoning and its answer. Text in, text or bool out."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xmodal_opd.scoring.answers import equivalent, option, plain, same_answers
from xmodal_opd.scoring.quantities import numbers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"\banswer:", re.IGNORECASE)
LETTERS = set("abcdef")
MARKED_OPTION = re.compile(r"\b[A-J](?:[):]|\.\s)")  # one more, in the text of an option
BETWEEN = re.compile(r"[\s,;.|&]*(?:\b(?:or|and)\b)?\s*", re.IGNORECASE)  # the numbers of a list


class Layout(NamedTuple):
    """kept: whether a response has this layout. answer: what it then answers; of any response, the best guess."""

    kept: Callable[[str], bool]
    answer: Callable[[str], str]


def is_tagged(text: str) -> bool:
    """Each tag once, and `<think>…</think>` `<answer>…</answer>` in this order, neither empty, whatever is around."""
    once = all(text.count(tag) == 1 for tag in TAGS)
    return once and re.search(r"<think>.+</think>\s*<answer>.+</answer>", text, re.DOTALL) is not None


def tagged_answer(text: str) -> str:
    """What stands between the answer tags on one line, else after the last opening one, else all of it."""
    for line in text.split("\n"):
        inside, closed, _ = line.partition("<answer>")[2].partition("</answer>")
        if closed:
            return inside
    return text.rpartition("<answer>")[2].partition("</answer>")[0]


def is_marked(text: str) -> bool:
    """Some reasoning, then "answer:" once and one line behind it, which is the last."""
    parts = [part.strip() for part in ANSWER.split(text)]
    return len(parts) == 2 and all(parts) and "\n" not in parts[1]


def marked_answer(text: str) -> str:
    """What follows the last "answer:", else all of it."""
    return ANSWER.split(text)[-1]


def reached(pairs: Sequence[tuple[str, str]], maths: bool) -> list[bool | None]:
    """For each (answer, gold): the same? None where `math-verify` took too long.

    A gold that is a letter from a to f: as that letter, and no other. Any other gold: all of the answer by rule, else
    what the answer ends in, unless that is a list of numbers and the gold is one.
    """
    lettered = [plain(gold).lower() in LETTERS for _, gold in pairs]
    same: list[bool | None] = [
        same_letter(*pair) or named(pair[0]) == {plain(pair[1]).upper()} if letter else equivalent(*pair)
        for letter, pair in zip(lettered, pairs, strict=True)
    ]
    left = [i for i, letter in enumerate(lettered) if not (letter or same[i] or lists(*pairs[i]))]
    for i, told in zip(left, same_answers([pairs[i] for i in left], maths), strict=True):
        same[i] = told
    return same


def same_letter(answer: str, gold: str) -> bool:
    """Whether the gold is a letter from a to f that occurs in the answer, in a word or alone, and no other does."""
    return LETTERS & set(answer.lower()) == {plain(gold).lower()}


def named(answer: str) -> set[str]:
    """The options an answer names: the one in front of its text ("(B) Point C"), else all capitals from A to F that
    stand alone, else small letters, of which "a" is a word."""
    text = plain(answer)
    if (found := option(text)) and not MARKED_OPTION.search(found[1]):
        return {found[0]}
    return set(re.findall(r"\b[A-F]\b", text)) or {letter.upper() for letter in re.findall(r"\b[b-f]\b", text)}


def lists(answer: str, gold: str) -> bool:
    """Whether the gold has one number, and the last two of the answer differ with a comma, an "or" or the like alone
    between them: "1, 2, 3"."""
    text = plain(answer)
    last = [*numbers(text)][-2:]
    if len(last) < 2 or last[0].value == last[1].value or len([*numbers(gold)]) != 1:
        return False
    return BETWEEN.fullmatch(text, last[0].end, last[1].start) is not None


LAYOUTS = {"tags": Layout(is_tagged, tagged_answer), "marker": Layout(is_marked, marked_answer)}
