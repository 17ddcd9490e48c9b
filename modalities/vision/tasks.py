"""Questions about pictures made without limit: rendered text, charts, figures and sums of handwritten digits. Each has
the text that stands for its picture and its worked answer; numbers lie in 0..20 and are said in words.

Split by instance: for rendered text that of the text question, else the numbers in order of size, so that no picture
of held-out numbers is seen in training, whatever their order, labels or wording.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modalities.tasks import FAMILIES, ONES, held_out, stream

LABELS = (  # of charts: words the text questions know too, short, so that three fit side by side
    ("horse", "tiger", "camel", "rabbit", "lizard"),
    ("grape", "melon", "cherry", "banana"),
    ("flute", "piano", "drum", "guitar", "violin"),
    ("silver", "purple", "orange", "yellow"),
)
POLYGONS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
SHAPES = ("circle", "square", "triangle")
MOST = len(ONES) - 1


@dataclass(frozen=True)
class Scene:
    task: str
    instance: str  # the unit of the split
    picture: Mapping[str, Any]  # what `draw` needs, as plain data: "kind", and what that kind is made of
    shown: str  # the text that stands for the picture where a teacher reads
    prompt: str  # the question beside the picture; "" when it is in the picture
    response: str  # the worked answer; ends in "answer: X"
    answer: str

    @property
    def question(self) -> str:
        """All of it in text: what the teacher reads."""
        return "\n".join(filter(None, (self.shown, self.prompt)))


def rendered(rng: random.Random) -> Scene:
    """One of the text questions as an image of its words."""
    q = FAMILIES[rng.choice(sorted(FAMILIES))](rng)
    return Scene("rendered", q.instance, {"kind": "text", "text": q.prompt}, q.prompt, "", q.response, q.answer)


def digits(rng: random.Random) -> Scene:
    """A sum of two or three handwritten digits; every value on the way lies in 0..20. Held out as a text question, or
    asked there, it is so here too."""
    while True:
        terms = [rng.randint(0, 9) for _ in range(rng.choice((2, 3)))]
        signs = [rng.choice("+-") for _ in terms[1:]]
        said = " ".join([ONES[terms[0]], *(f"{_SAID[s]} {ONES[t]}" for s, t in zip(signs, terms[1:], strict=True))])
        signed = sorted(zip(["+", *signs], terms, strict=True))
        instance = f"digits {' '.join(f'{sign}{term}' for sign, term in signed)}"
        fits = all(0 <= total <= MOST for total in _totals(terms, signs))
        if fits and held_out(instance) == held_out(said):
            break
    picture = {"kind": "sum", "terms": terms, "signs": signs}
    return _scene("digits", instance, picture, f"What is {said}?", "", *_worked(terms, signs))


# ---- charts


def charts(rng: random.Random) -> Scene:
    """A bar or line chart of two or three values, and a question about one or two of them."""
    values = rng.sample(range(MOST + 1), rng.randint(2, 3))
    labels = rng.sample(rng.choice(LABELS), len(values))
    table = dict(zip(labels, values, strict=True))
    kind = rng.choice(("bars", "line"))
    prompt, worked, answer = rng.choice((_value, _extreme, _difference, _together))(rng, table)
    picture = {"kind": kind, "labels": labels, "values": values}
    instance = f"charts {' '.join(map(str, sorted(values)))}"
    shown = f"chart: {', '.join(f'{label} {ONES[value]}' for label, value in table.items())}."
    return _scene("charts", instance, picture, shown, prompt, worked, answer)


def _value(rng: random.Random, table: dict[str, int]) -> tuple[str, str, str]:
    label = rng.choice(list(table))
    return f"What is the value of {label}?", f"{label} is {ONES[table[label]]}", ONES[table[label]]


def _extreme(rng: random.Random, table: dict[str, int]) -> tuple[str, str, str]:
    which = rng.choice(("smallest", "largest"))
    ranked = sorted(table, key=lambda label: table[label])
    answer = ranked[0 if which == "smallest" else -1]
    return f"Which one is the {which}?", ", ".join(f"{label} {ONES[table[label]]}" for label in ranked), answer


def _difference(rng: random.Random, table: dict[str, int]) -> tuple[str, str, str]:
    less, more = sorted(rng.sample(list(table), 2), key=lambda label: table[label])
    return f"How much more is {more} than {less}?", *_worked([table[more], table[less]], "-")


def _together(rng: random.Random, table: dict[str, int]) -> tuple[str, str, str]:
    """The sum of two values, or where no two have one in 0..20, the value of one."""
    pairs = [(a, b) for a in table for b in table if a != b and table[a] + table[b] <= MOST]
    if not pairs:
        return _value(rng, table)
    a, b = rng.choice(pairs)
    return f"How much are {a} and {b} together?", *_worked([table[a], table[b]], "+")


# ---- figures


def geometry(rng: random.Random) -> Scene:
    """A figure with labelled sides, or a few shapes: a perimeter, a missing side, how many corners or shapes."""
    return rng.choice((_rectangle, _triangle, _missing, _corners, _shapes))(rng)


def _rectangle(rng: random.Random) -> Scene:
    """Perimeter of a rectangle or a square."""
    long = rng.randint(1, MOST // 2 - 1)
    short = rng.randint(1, min(long, MOST // 2 - long))
    half, whole = ONES[short + long], ONES[2 * (short + long)]
    name = f"a square with side {ONES[short]}" if short == long else f"a rectangle with {_sides((long, short))}"
    picture = {"kind": "polygon", "sides": [long, short, long, short], "labels": [str(long), str(short), "", ""]}
    worked = f"{ONES[long]} plus {ONES[short]} is {half}, {half} plus {half} is {whole}"
    instance = f"geometry rectangle {short} {long}"
    return _scene("geometry", instance, picture, f"{name}.", "What is the perimeter?", worked, whole)


def _triangle(rng: random.Random) -> Scene:
    sides = _three_sides(rng)
    picture = {"kind": "polygon", "sides": sides, "labels": [str(side) for side in sides]}
    shown = f"a triangle with {_sides(sides)}."
    return _scene("geometry", _of(sides), picture, shown, "What is the perimeter?", *_worked(sides, "++"))


def _missing(rng: random.Random) -> Scene:
    """The third side of a triangle whose perimeter is given."""
    *known, _ = sides = _three_sides(rng)
    picture = {"kind": "polygon", "sides": sides, "labels": [*map(str, known), "?"]}
    shown = f"a triangle with {_sides(known)} and a missing side."
    prompt = f"The perimeter is {ONES[sum(sides)]}. How long is the missing side?"
    return _scene("geometry", _of(sides), picture, shown, prompt, *_worked([sum(sides), *known], "--"))


def _corners(rng: random.Random) -> Scene:
    """All corners of two or three polygons."""
    names = rng.choices(sorted(POLYGONS), k=rng.choice((2, 3)))
    corners = [POLYGONS[name] for name in names]
    shown = f"{_listed([f'a {name}' for name in names])}."
    worked, answer = _worked(corners, "+" * (len(names) - 1))
    return _drawn(names, shown, "How many corners are there?", worked, answer)


def _shapes(rng: random.Random) -> Scene:
    """How many shapes there are of one kind, or of all kinds."""
    kinds = rng.sample(SHAPES, rng.choice((2, 3)))
    counts = [rng.randint(1, 3) for _ in kinds]
    said = [f"{ONES[n]} {kind}{'s' * (n > 1)}" for n, kind in zip(counts, kinds, strict=True)]
    which = rng.randrange(len(kinds) + 1)
    if which == len(kinds):
        prompt, worked, answer = "How many shapes are there?", *_worked(counts, "+" * (len(kinds) - 1))
    else:
        prompt, worked, answer = f"How many {kinds[which]}s are there?", said[which], ONES[counts[which]]
    drawn = [kind for n, kind in zip(counts, kinds, strict=True) for _ in range(n)]
    rng.shuffle(drawn)
    return _drawn(drawn, f"{_listed(said)}.", prompt, worked, answer)


def _drawn(shapes: Sequence[str], shown: str, prompt: str, worked: str, answer: str) -> Scene:
    picture = {"kind": "shapes", "shapes": shapes}
    return _scene("geometry", f"geometry {' '.join(sorted(shapes))}", picture, shown, prompt, worked, answer)


def _three_sides(rng: random.Random) -> list[int]:
    """Of a triangle that can be drawn, with a perimeter in 0..20 and no angle too thin for a label."""
    while True:
        sides = [rng.randint(2, 9) for _ in range(3)]
        if sum(sides) <= MOST and 2 * max(sides) <= sum(sides) - 2:
            return sides


def _of(sides: Sequence[int]) -> str:
    return f"geometry triangle {' '.join(map(str, sorted(sides)))}"


def _sides(sides: Sequence[int]) -> str:
    return f"sides {_listed([ONES[side] for side in sides])}"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


# ---- worked answers

_SAID = {"+": "plus", "-": "minus"}


def _totals(terms: Sequence[int], signs: Sequence[str]) -> list[int]:
    """Every value on the way of a sum, the first term among them."""
    totals = [terms[0]]
    for sign, term in zip(signs, terms[1:], strict=True):
        totals.append(totals[-1] + (term if sign == "+" else -term))
    return totals


def _worked(terms: Sequence[int], signs: Sequence[str]) -> tuple[str, str]:
    """(a sum step by step, its result): "three plus four is seven, seven minus two is five", "five"."""
    totals = [ONES[total] for total in _totals(terms, signs)]
    steps = zip(totals, signs, terms[1:], totals[1:], strict=False)
    return ", ".join(f"{x} {_SAID[sign]} {ONES[term]} is {y}" for x, sign, term, y in steps), totals[-1]


def _scene(
    task: str, instance: str, picture: Mapping[str, Any], shown: str, prompt: str, worked: str, answer: str
) -> Scene:
    return Scene(task, instance, picture, shown, prompt, f"{worked}. answer: {answer}", answer)


# ---- the stream

SCENES: dict[str, Callable[[random.Random], Scene]] = {f.__name__: f for f in (rendered, charts, geometry, digits)}


def scenes(seed: int, split: str, families: Sequence[str] = tuple(SCENES)) -> Iterator[Scene]:
    """An endless stream of scenes of one split, a pure function of its arguments; the families take turns."""
    return stream(SCENES, seed, split, families)
