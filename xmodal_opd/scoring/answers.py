"""Final answers: find them in free text, tell whether two are the same. Text in, text or bool out.

Run as a program, this file compares mathematics with `math-verify`; `maths_equal` starts it.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SMALL = {word: value for value, word in enumerate(["zero", *ONES, *TEENS])} | {w: 10 * i for i, w in enumerate(TENS, 2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4}
PARTS |= {"fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}
NO_NUMBER = ("the", "this", "that", "which", "each", "every", "any", "no", "other", "only", "same", "first", "last")
LONGEST = 100  # characters of a number that is read: Python refuses thousands of digits, and no answer has so many
TAIL = 4000  # characters: the final answer stands at the end, and the time to find it stays bounded
GLYPHS = str.maketrans({"\u2212": "-", "\u2019": "'", "\u00a0": " ", "\u202f": " ", "\u2044": "/"})


def _any(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")\b"


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d*\.\d+|\d+)"
_BELOW_100 = rf"(?:{_any(TENS)}(?:[\s-]+{_any(ONES)})?|{_any(['zero', *ONES, *TEENS])})"
_BELOW_1000 = rf"(?:(?:{_BELOW_100}|\ba)\s+hundred\b(?:(?:\s+and)?\s+{_BELOW_100})?|{_BELOW_100}|hundred\b)"
_SCALE = _any([*SCALES])
_CARDINAL = rf"(?:(?:(?:{_BELOW_1000}|a)\s+)?{_SCALE}(?:,?\s+(?:and\s+)?{_BELOW_1000}(?:\s+{_SCALE})?)*|{_BELOW_1000})"
_PRONOUN = "".join(rf"(?<!\b{word}\s)" for word in NO_NUMBER)
_NUMBER = re.compile(
    rf"(?P<mixed>\b\d+\s+\d+/\d+)|(?P<ratio>{_DIGITS}\s*/\s*\d+)|(?P<digits>{_DIGITS})(?:\s+(?P<scale>{_SCALE}))?"
    # "the one" is a pronoun
    rf"|(?:(?!one\b)|{_PRONOUN})\b(?P<words>{_CARDINAL})"
    rf"(?:\s+point(?P<point>(?:[\s-]+{_any(['zero', *ONES])})+)|[\s-]+(?P<part>{_any([*PARTS])}))?",
    re.IGNORECASE,
)
# a minus sign, not a subtraction: glued to its number and to nothing before, or a word that follows no number
_SIGN = re.compile(
    r"(?:(?:^|(?<=[\s(\[=:,$]))-|(?:^|(?<=[=:(])|(?<=[=:(]\s))-\s+|\b(?:minus|negative)\s+)$", re.IGNORECASE
)
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


class Number(NamedTuple):
    """A number found in a text: where, and its value."""

    start: int
    end: int
    value: Fraction


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
    return bool(same and same == normal(b)) or _same_number(a, b)


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


def numbers(text: str) -> Iterator[Number]:
    """The numbers of a text in order: 1,234.5 · -3 · 3/4 · 1 1/2 · 5 million · twenty-one · minus three point one."""
    end = 0
    for found in _NUMBER.finditer(text):
        sign, value = _SIGN.search(text, max(end, found.start() - 12), found.start()), _value(found)
        if sign and end and sign[0].lower().startswith("minus") and not text[end : sign.start()].strip():
            sign = None  # "five minus three"
        if value is not None:
            yield Number((sign or found).start(), found.end(), -value if sign else value)
        end = found.end()


def maths_equal(pairs: Sequence[tuple[str, str]], seconds: float = 2.0) -> list[bool | None]:
    """Mathematical equality of (answer, reference) pairs by `math-verify`; None where it took longer than `seconds`.

    Runs in a child process, in whose main thread a signal can end it: the library has no other limit, and without one
    a tower of powers written by a model stops the run for good. Seconds are the processor's: a busy machine is no harm.
    """
    if not pairs:
        return []
    limit = 120 + 5 * seconds * len(pairs)  # for what the child's own limit misses
    command = [sys.executable, "-P", str(Path(__file__)), str(seconds)]
    try:
        done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, timeout=limit)
        lines, error = done.stdout.split(), done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        lines, error = (late.stdout or b"").decode().split(), ""
    if error and not lines:
        raise RuntimeError(f"math-verify did not start: {error.strip().splitlines()[-1]}")
    verdicts = [{"1": True, "0": False}.get(line) for line in lines]
    return verdicts + [None] * (len(pairs) - len(verdicts))


def without_thoughts(text: str) -> str:
    """The text without <think>…</think>, without all that follows a thought that does not end, and without all before
    the end of one that the prompt began."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).rpartition("</think>")[2]


def require_maths() -> None:
    """Raises ImportError when `math-verify` is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("`maths: true` needs math-verify, which is not installed: pip install 'xmodal-opd[maths]'")


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
    ends += [m.end() for m in _BARE_MARKER.finditer(text) if option(m[1]) or _only_number(m[1]) is not None]
    tail = text[max(ends) :].strip() if ends else ""
    cut = _CLAUSE_END.search(tail)
    tail = (tail[: cut.start()] if cut else tail).strip(" \t\"'“”.")
    if "=" in tail and _only_number(tail.rpartition("=")[2]) is not None:
        tail = tail.rpartition("=")[2].strip()  # "3 * 7 = 21"
    return tail or None


def _guess(text: str, like: str | None) -> str:
    """The option a text is, else the later of its last option letter and last number, else the text; if like `like`."""
    letters = like is None or option(like) is not None
    if letters and (whole := option(text)):
        return whole[0]
    found = [*_MENTION.finditer(text)] or [*_CAPITAL.finditer(text if like else "")]
    last = [(m.end(), m["letter"]) for m in found[-1:] if letters]
    if like is None or _quantity(like):
        last += [(n.end, text[n.start : n.end]) for n in [*numbers(text)][-1:]]
    return max(last)[1] if last else _stated(text, like)


def _stated(text: str, like: str | None) -> str:
    """What a single sentence says something is, where a word is looked for: the capital of France is "Paris"."""
    found = _STATED.match(text) if like and not _STATED.match(like) else None
    return found[1] if found else text


def _same_number(a: str, b: str) -> bool:
    """42 = "42 apples", but "42 apples" is not "42 pears", nor is 1 = x - 1."""
    first, second = _quantity(a), _quantity(b)
    return bool(first and second and first[0] == second[0] and not (first[1] and second[1]))


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """(number, words) of a text that has one number and otherwise only words, or None."""
    found = [*numbers(text)]
    before, after = (text[: found[0].start], text[found[0].end :]) if len(found) == 1 else ("=", "")
    glued = before[-1:].isalnum() or after[:1].isalnum()
    if glued or re.search(r"[-+*/=^<>\\(){}|_]", before + after):
        return None
    return found[0].value, f"{before} {after}".strip(" \t\n.,;:!?%€£")


def _only_number(text: str) -> Fraction | None:
    """The number a text consists of, or None."""
    value, words = _quantity(text) or (None, "")
    return None if words else value


def _value(found: re.Match[str]) -> Fraction | None:
    part = found.groupdict()
    if len(found[0]) > LONGEST or re.search(r"/\s*0+$", found[0]):
        return None
    if part["mixed"]:
        whole, ratio = part["mixed"].split()
        return int(whole) + Fraction(ratio)
    if part["ratio"]:
        top, bottom = part["ratio"].replace(",", "").split("/")
        return Fraction(top.strip()) / int(bottom)
    if part["digits"]:
        return Fraction(part["digits"].replace(",", "")) * SCALES.get((part["scale"] or "").lower(), 1)
    value = Fraction(_cardinal(re.findall(r"[a-z]+", part["words"].lower())))
    if part["point"]:
        digits = re.findall(r"[a-z]+", part["point"].lower())
        value += Fraction(int("".join(str(SMALL[d]) for d in digits)), 10 ** len(digits))
    return value / PARTS[part["part"].lower()] if part["part"] else value


def _cardinal(words: Sequence[str]) -> int:
    total = current = 0
    for word in words:
        if word in SCALES:
            total, current = total + (current or 1) * SCALES[word], 0
        else:
            current = (current or 1) * 100 if word == "hundred" else current + SMALL.get(word, 0)
    return total + current


def _ratio(found: re.Match[str]) -> str:
    return f"{found[1] or found[3]}/{found[2] or found[4]}"


class _TookTooLong(BaseException):
    """Not an Exception: the library swallows those."""


def _stop(*_: object) -> None:
    raise _TookTooLong


def _compare_maths(seconds: float) -> None:
    """Child process: JSON pairs (answer, reference) from stdin; a line 1, 0 or - (took too long) for each."""
    signal.signal(signal.SIGPROF, _stop)
    for pair in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            given, gold = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=0) for text in pair)
            line = str(int(verify(gold, given, timeout_seconds=0)))
            signal.setitimer(signal.ITIMER_PROF, 0)
        except _TookTooLong:
            line = "-"
        print(line, flush=True)


if __name__ == "__main__":
    # only the LaTeX reader: the library's reader of plain expressions ends in sympy's `eval`
    from math_verify import LatexExtractionConfig, parse, verify

    _compare_maths(float(sys.argv[1]))
