"""How a response lays out its reasoning and its answer. Text in, text or bool out."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xmodal_opd.scoring.answers import plain, same_answers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANSWER = re.compile(r"\banswer:", re.IGNORECASE)
LETTERS = set("abcdef")


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
    """For each (answer, gold): the same by rule or as a letter? None where `math-verify` took too long."""
    same = same_answers(pairs, maths)
    return [s if s is None else s or same_letter(*pair) for s, pair in zip(same, pairs, strict=True)]


def same_letter(answer: str, gold: str) -> bool:
    """Whether the gold is a letter from a to f that occurs in the answer, in a word or alone, and no other does."""
    return LETTERS & set(answer.lower()) == {plain(gold).lower()}


LAYOUTS = {"tags": Layout(is_tagged, tagged_answer), "marker": Layout(is_marked, marked_answer)}
