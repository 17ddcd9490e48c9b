"""Image-question benchmarks: what responses answer, by rule or by a model, and whether that is right.

Each benchmark has the published rule (`rules.py`). Where that rule asks a model to find the answer (MathVista,
MathVerse), or reads nothing in a response, there is a quick rule of ours in its place; `how` of a verdict tells which
one read the answer:

    rule    the published rule
    model   a model, as published; the request to it is our own wording
    quick   our rule, because no model is set, or because the published rule reads nothing and the response announces
            an answer ("answer: B", \\boxed{B}) or is one in Markdown (**B**)
    random  MMMU: an option drawn at random, the same one for a question every time

Thoughts in <think> are left out before, and of a response with <answer> only what that holds is read.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from xmodal_opd.scoring.answers import without_thoughts
from xmodal_opd.scoring.judge import comparison, verdict
from xmodal_opd.scoring.layouts import tagged_answer
from xmodal_opd.scoring.rules import RULES, Doc, Reading, Rules
from xmodal_opd.serving import Failure

Ask = Callable[[list[str]], list[str | Failure]]  # a model's replies, or why there is none


class Verdict(NamedTuple):
    """Whether a response is right (None: nobody could tell), the answer that was read, and how."""

    correct: bool | None
    extracted: str
    how: str


def score(name: str, responses: Sequence[str], docs: Sequence[Doc], ask: Ask | None = None) -> list[Verdict]:
    """The verdict on each response. What a model fails to tell is undecided, with the reason as `how`."""
    rules = RULES[name]
    said = [tagged_answer(without_thoughts(response)).strip() for response in responses]
    readings = (read_by_rule if ask is None or rules.asked is None else partial(read_by_model, ask))(rules, said, docs)
    verdicts = [
        Verdict(None, "", str(r)) if isinstance(r, Failure) else Verdict(rules.right(r[0], doc), *r)
        for r, doc in zip(readings, docs, strict=True)
    ]
    return compared_by_model(verdicts, docs, ask) if ask is not None and rules.compared else verdicts


def read_by_rule(rules: Rules, responses: Sequence[str], docs: Sequence[Doc]) -> list[Reading | Failure]:
    return [
        (found, "rule") if (found := rules.read(response, doc)) is not None else rules.guess(response, doc)
        for response, doc in zip(responses, docs, strict=True)
    ]


def read_by_model(ask: Ask, rules: Rules, responses: Sequence[str], docs: Sequence[Doc]) -> list[Reading | Failure]:
    """The published rule where it reads something, and the model where it does not."""
    found: list[Any] = [rules.read(response, doc) for response, doc in zip(responses, docs, strict=True)]
    todo = [i for i, reading in enumerate(found) if reading is None]
    wanted = [rules.asked(responses[i], docs[i]) for i in todo] if rules.asked else []
    told = dict(zip(todo, ask(wanted) if wanted else [], strict=True))
    by_model = {i: reply if isinstance(reply, Failure) else (reply_of(reply), "model") for i, reply in told.items()}
    return [by_model.get(i) or (reading, "rule") for i, reading in enumerate(found)]


def compared_by_model(verdicts: list[Verdict], docs: Sequence[Doc], ask: Ask) -> list[Verdict]:
    """The same verdicts, those that are wrong by writing alone asked for again."""
    todo = [i for i, told in enumerate(verdicts) if told.correct is False and told.extracted]
    wanted = [comparison(docs[i]["question"], verdicts[i].extracted, str(docs[i]["answer"])) for i in todo]
    out = list(verdicts)
    for i, reply in zip(todo, ask(wanted) if wanted else [], strict=True):
        same = None if isinstance(reply, Failure) else verdict(reply)
        how = str(reply) if isinstance(reply, Failure) else "reply is neither 1 nor 0" if same is None else "model"
        out[i] = Verdict(None if same is None else bool(same), verdicts[i].extracted, how)
    return out


def reply_of(reply: str) -> str:
    """A model's answer without what it says before it; nothing where it found none."""
    said = re.sub(r"^\s*(final|extracted)?\s*answer\s*:", "", without_thoughts(reply), flags=re.IGNORECASE).strip()
    return "" if said.strip(" .").casefold() in ("none", "null") else said
