"""Numbers in text, in digits or words, and what they count."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
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


class Number(NamedTuple):
    """A number found in a text: where, and its value."""

    start: int
    end: int
    value: Fraction


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


def same_number(a: str, b: str) -> bool:
    """42 = "42 apples", but "42 apples" is not "42 pears", nor is 1 = x - 1."""
    first, second = quantity(a), quantity(b)
    return bool(first and second and first[0] == second[0] and not (first[1] and second[1]))


def quantity(text: str) -> tuple[Fraction, str] | None:
    """(number, words) of a text that has one number and otherwise only words, or None."""
    found = [*numbers(text)]
    before, after = (text[: found[0].start], text[found[0].end :]) if len(found) == 1 else ("=", "")
    glued = before[-1:].isalnum() or after[:1].isalnum()
    if glued or re.search(r"[-+*/=^<>\\(){}|_]", before + after):
        return None
    return found[0].value, f"{before} {after}".strip(" \t\n.,;:!?%€£")


def only_number(text: str) -> Fraction | None:
    """The number a text consists of, or None."""
    value, words = quantity(text) or (None, "")
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
