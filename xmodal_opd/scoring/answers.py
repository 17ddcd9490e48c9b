"""Final answers: find them in free text, tell whether two are the same. Text in, text or bool out."""

import re
from collections.abc import Sequence

from xmodal_opd.scoring.maths import maths_equal
from xmodal_opd.scoring.quantities import numbers, only_number, quantity, same_number

TAIL = 4000  # characters: the final answer stands at the end, and the time to find it stays bounded
GLYPHS = str.maketrans({"\u2212": "-", "\u2019": "'", "\u00a0": " ", "\u202f": " ", "\u2044": "/"})


_MARKER = re.compile(r"\banswer\b[^.,;\n:=]{0,60}?(?:\bis\b|\bbe\b|[:=])(?:\s*[:=])?|####", re.IGNORECASE)
_BARE_MARKER = re.compile(r"\banswer[ \t]+(?=(.{1,60}?)[.!]?[ \t]*$)", re.IGNORECASE | re.MULTILINE)  # "answer nine"
_CLAUSE_END = re.compile(
    r"(?:(?<=\w{3})|(?<=[\d)\]}]))[.!?](?=\s|$)|,?\s+\b(?:because|since|which)\b|\n", re.IGNORECASE
)
_OPTION = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?[(\[]?([A-J])"
    r"(?:[)\].:]+(?!\s*[A-Z]\.)(?!.*\b(?:so|hence|therefore|because|but)\b)\s*(.{0,80})|)$"
)
_MENTION = re.compile(r"\b(?:(?:[Oo]ption|[Cc]hoice)\s+[(\[]?|(?<=[(\[]))(?P<letter>[A-J])\b")
_CAPITAL = re.compile(r"\b(?P<letter>[B-HJ])\b")  # A and I are words
_STATED = re.compile(r"[^.!?\n]*\b(?:is|are)\s+([^.!?\n]{1,60})[.!]?$", re.IGNORECASE)  # one sentence
_LATEX = re.compile(r"[\\^_{}]|[\w)]\s*[-+*/=<>]\s*[\w(]|\d[a-z]|[(\[].*,.*[)\]]", re.IGNORECASE)


def extract(text: str, like: str | None = None) -> str | None:
    """The final answer a response gives, or None when it is empty.

    In this order: what a marker announces (`\\boxed{}`, "answer: X", "the answer is X", "#### X"); an option letter
    A-J; the last number, in digits or words; what a single sentence says something is, where a word is looked for; the
    whole text. `like` is the answer looked for: without a marker only an answer of its kind is guessed, so a year in a
    sentence is not taken for a place.
    """
    text = plain(text)
    return announced(text) or _guess(text, like) or None


def announced(text: str) -> str | None:
    """The answer behind the last marker of a response, or None."""
    return _boxed(text) or _after_marker(plain(text))


def same_answer(response: str, reference: str, maths: bool = False) -> bool | None:
    """Whether two responses end in the same answer; False when either gives none, None when mathematics timed out."""
    return same_answers([(response, extract(reference))], maths)[0]


def same_answers(pairs: Sequence[tuple[str, str | None]], maths: bool = False) -> list[bool | None]:
    """For each (response, answer): does the response reach it? With `maths`, `math-verify` may say yes too."""
    found = [(extract(response, like=answer), answer) for response, answer in pairs]
    same: list[bool | None] = [bool(a and b) and equivalent(str(a), str(b)) for a, b in found]
    if maths:
        left = {i: (a, b) for i, (a, b) in enumerate(found) if not same[i] and a and b and _LATEX.search(f"{a} {b}")}
        for i, equal in zip(left, maths_equal(list(left.values())), strict=True):
            same[i] = equal
    return same


def equivalent(a: str, b: str) -> bool:
    """Same answer up to case, articles, punctuation, option text, and the way a number is written."""
    a, b = plain(a), plain(b)
    first, second = option(a), option(b)
    if first and second:
        told = normal(first[1]), normal(second[1])
        return first[0] == second[0] and (told[0] == told[1] or not all(told))
    a, b = first[1] if first else a, second[1] if second else b
    same = normal(a)
    return bool(same and same == normal(b)) or same_number(a, b)


def option(text: str) -> tuple[str, str] | None:
    """(letter, text of the option) of "B", "(b)", "B) Paris" or "option B"; None for anything else."""
    text = text.strip()
    found = _OPTION.match(text.upper() if len(text) <= 3 else text)
    return (found[1], (found[2] or "").strip()) if found else None


def plain(text: str) -> str:
    """The end of a text, without the dress that Markdown and LaTeX put on a short answer."""
    text = text[-TAIL:].strip().translate(GLYPHS)
    text = re.sub(r"\\(?:left|right|displaystyle|[,!;:])(?![a-zA-Z])|\*\*|__|`|\\?\$|\\[()\[\]]|\^?\\circ|°", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}|\\[dt]?frac(\d)(\d)", _ratio, text)
    return text.replace("\\%", "%").replace("{,}", ",").strip()


def normal(text: str) -> str:
    """The text to compare: numbers as digits, no case, articles or punctuation, single spaces."""
    out, end = "", 0
    for number in numbers(text):
        out, end = f"{out}{text[end : number.start]} {number.value} ", number.end
    text = (out + text[end:]).casefold()
    text = re.sub(r"(?<=\w)-(?=[a-z])|[.,;:!?\"'“”‘%]|\b(?:a|an|the)\b(?=\s)", " ", text)
    return re.sub(r"\s*([-+*/=^<>(){}\[\]|])\s*", r"\1", " ".join(text.split()))


def without_thoughts(text: str) -> str:
    """The text without <think>…</think>, without all that follows a thought that does not end, and without all before
    the end of one that the prompt began."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).rpartition("</think>")[2]


def _boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}` whose braces close."""
    for start in [m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)][:-4:-1]:
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return plain(text[start:end]) or None
    return None


def _after_marker(text: str) -> str | None:
    ends = [m.end() for m in _MARKER.finditer(text)]
    ends += [m.end() for m in _BARE_MARKER.finditer(text) if option(m[1]) or only_number(m[1]) is not None]
    tail = text[max(ends) :].strip() if ends else ""
    cut = _CLAUSE_END.search(tail)
    tail = (tail[: cut.start()] if cut else tail).strip(" \t\"'“”.")
    if "=" in tail and only_number(tail.rpartition("=")[2]) is not None:
        tail = tail.rpartition("=")[2].strip()  # "3 * 7 = 21"
    return tail or None


def _guess(text: str, like: str | None) -> str:
    """The option a text is, else the later of its last option letter and last number, else the text; if like `like`."""
    letters = like is None or option(like) is not None
    if letters and (whole := option(text)):
        return whole[0]
    found = [*_MENTION.finditer(text)] or [*_CAPITAL.finditer(text if like else "")]
    last = [(m.end(), m["letter"]) for m in found[-1:] if letters]
    if like is None or quantity(like):
        last += [(n.end, text[n.start : n.end]) for n in [*numbers(text)][-1:]]
    return max(last)[1] if last else _stated(text, like)


def _stated(text: str, like: str | None) -> str:
    """What a single sentence says something is, where a word is looked for: the capital of France is "Paris"."""
    found = _STATED.match(text) if like and not _STATED.match(like) else None
    return found[1] if found else text


def _ratio(found: re.Match[str]) -> str:
    return f"{found[1] or found[3]}/{found[2] or found[4]}"
