"""Reasoning questions made without limit, each with its worked answer. Split by instance: a question whose numbers or
words are held out never appears in training, whatever its wording or voice."""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
CATEGORIES = {
    "an animal": ["horse", "rabbit", "monkey", "tiger", "camel", "lizard"],
    "a color": ["yellow", "purple", "orange", "silver", "scarlet", "turquoise"],
    "a fruit": ["banana", "cherry", "melon", "apricot", "coconut", "grape"],
    "a tool": ["hammer", "shovel", "needle", "scissors", "ladder", "chisel"],
    "a vehicle": ["tractor", "bicycle", "airplane", "submarine", "truck", "canoe"],
    "an instrument": ["violin", "trumpet", "piano", "guitar", "drum", "flute"],
}
HELD_OUT = 5  # one instance in five is for testing


@dataclass(frozen=True)
class Question:
    task: str
    instance: str  # what is asked, without its wording: the unit of the split
    prompt: str
    response: str  # the worked answer; ends in "answer: X"
    answer: str


def arithmetic(rng: random.Random) -> Question:
    """Two steps of addition and subtraction on 0..9; every value on the way lies in 0..20."""
    while True:
        a, b, c = (rng.randint(0, 9) for _ in range(3))
        first, second = (rng.choice(("plus", "minus")) for _ in range(2))
        x = a + b if first == "plus" else a - b
        y = x + c if second == "plus" else x - c
        if 0 <= x <= 20 and 0 <= y <= 20:
            break
    sum_ = f"{ONES[a]} {first} {ONES[b]} {second} {ONES[c]}"
    wording = rng.choice(("What is {}?", "How much is {}?", "Calculate {}."))
    worked = f"{ONES[a]} {first} {ONES[b]} is {ONES[x]}, {ONES[x]} {second} {ONES[c]} is {ONES[y]}. answer: {ONES[y]}"
    return Question("arithmetic", sum_, wording.format(sum_), worked, ONES[y])


def ordering(rng: random.Random) -> Question:
    """The smallest, middle or largest of three different numbers in 0..20."""
    numbers = rng.sample(range(len(ONES)), 3)
    kind = rng.choice(("smallest", "middle", "largest"))
    answer = ONES[sorted(numbers)[("smallest", "middle", "largest").index(kind)]]
    listed = ", ".join(ONES[n] for n in numbers[:2]) + f" or {ONES[numbers[2]]}"
    wording = rng.choice(("Which number is the {}: {}?", "Tell me the {} of {}."))
    worked = f"{', '.join(ONES[n] for n in sorted(numbers))}. answer: {answer}"
    return Question("ordering", f"{kind} {listed}", wording.format(kind, listed), worked, answer)


def choice(rng: random.Random) -> Question:
    """Three options with letters; one belongs to the category asked for."""
    kind, *others = rng.sample(sorted(CATEGORIES), 3)
    right = rng.choice(CATEGORIES[kind])
    options = [right, *(rng.choice(CATEGORIES[other]) for other in others)]
    rng.shuffle(options)
    letter = "ABC"[options.index(right)]
    listed = " ".join(f"{name}: {word}." for name, word in zip("ABC", options, strict=True))
    kinds = [next(k for k, words in CATEGORIES.items() if word in words) for word in options]
    wording = rng.choice(("Which one is {}? {}", "Find {}. {}"))
    sorted_out = [f"{k.split()[1]} {name}" for name, k in zip("ABC", kinds, strict=True)]
    worked = f"{', '.join(sorted_out)}, so {kind.split()[1]} {letter}. answer: {letter}"
    return Question("choice", f"{kind} {listed}", wording.format(kind, listed), worked, letter)


FAMILIES: dict[str, Callable[[random.Random], Question]] = {f.__name__: f for f in (arithmetic, ordering, choice)}


def held_out(instance: str) -> bool:
    return zlib.crc32(instance.encode()) % HELD_OUT == 0


class Asked(Protocol):
    @property
    def instance(self) -> str: ...


def split_of(question: Asked) -> str:
    """ "train" or "test", from the instance alone."""
    return "test" if held_out(question.instance) else "train"


def stream[Q: Asked](
    makers: Mapping[str, Callable[[random.Random], Q]], seed: int, split: str, families: Sequence[str]
) -> Iterator[Q]:
    """What the makers of these families make without end, of one split, a pure function of its arguments; the families
    take turns."""
    rng = random.Random(f"{seed} {split}")
    while True:
        for family in families:
            question = makers[family](rng)
            while split_of(question) != split:
                question = makers[family](rng)
            yield question


def questions(seed: int, split: str, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Question]:
    """An endless stream of questions of one split, a pure function of its arguments; the families take turns."""
    return stream(FAMILIES, seed, split, families)
