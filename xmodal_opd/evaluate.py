"""The same held-out questions as the student sees them and as text: right or wrong, and how far the views differ."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedModel

from xmodal_opd import dist
from xmodal_opd.encoders import encoded_once
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.scoring.forward import Responses, divergence
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Sampler, Sampling

VIEWS = {"student": Sampling(temperature=0.0, view="student"), "text": Sampling(temperature=0.0, view="teacher")}
Right = Callable[[str, str], bool]


def evaluate(
    pairs: Sequence[Pair],
    model: PreTrainedModel,
    sampler: Sampler,
    responses: Responses,
    right: Right,
    *,
    batch: int,
    kl: bool = True,
) -> list[dict[str, Any]]:
    """One record per question: key, task, answer, both greedy answers and whether they are right, token KL.

    `token_kl` is the mean over the student's answer of KL(student view || text view) of the same model, in nats.
    """
    return [
        record
        for some in track(list(batched(pairs, batch)), "evaluating", transient=True)
        for record in evaluate_some(some, model, sampler, responses, right, kl)
    ]


def evaluate_some(
    pairs: Sequence[Pair], model: PreTrainedModel, sampler: Sampler, responses: Responses, right: Right, kl: bool
) -> Iterator[dict[str, Any]]:
    with encoded_once([model], responses.adapter):
        answers = sampler.generate(pairs, VIEWS, seed=0)
        gaps = view_kl(model, responses, answers["student"]) if kl else [None] * len(pairs)
    for pair, student, text, gap in zip(pairs, answers["student"], answers["text"], gaps, strict=True):
        yield {
            "key": pair.key,
            "task": str(pair.meta.get("task", "all")),
            "question": pair.meta.get("question", ""),
            "answer": pair.answer,
            "student": student.text,
            "text": text.text,
            "student_correct": is_right(pair, student, right),
            "text_correct": is_right(pair, text, right),
            "token_kl": gap,
        }


def is_right(pair: Pair, rollout: Rollout, right: Right) -> bool:
    """Raises ValueError for a question without an answer: nothing can be measured on it."""
    if pair.answer is None:
        raise ValueError(f"sample {pair.key!r} has no answer, so its accuracy cannot be measured; give it one")
    return right(rollout.text, pair.answer)


@torch.no_grad()
def view_kl(
    model: PreTrainedModel,
    responses: Responses,
    rollouts: Sequence[Rollout],
    other: PreTrainedModel | None = None,
    view: str = "teacher",
) -> list[float]:
    """Mean over each answer's tokens of KL(student view || `view`), in nats; the latter of another model where there is
    one."""
    mask, other = token_batch(rollouts).mask.to(model.device), other or model
    sides = [(who, responses.hidden(who, rollouts, seen)) for who, seen in ((model, "student"), (other, view))]
    per_token = divergence(reverse_kl, sides[0], sides[1], mask, responses.among)
    return (per_token.sum(1) / mask.sum(1)).tolist()


def share(pairs: Sequence[Pair]) -> list[Pair]:
    """This rank's questions: every world-th, as many on every rank. Some are asked twice where they do not divide."""
    count = math.ceil(len(pairs) / dist.world())
    return [pairs[(i * dist.world() + dist.rank()) % len(pairs)] for i in range(count)]


def joined(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The records of all ranks in the order of the `count` questions that `share` divided."""
    return [record for some in zip(*dist.gather(list(records)), strict=True) for record in some][:count]


def accuracies(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares right, and the mean token KL, for the metrics."""
    mean = lambda name: sum(float(r[name]) for r in records) / len(records)  # noqa: E731
    kl = {} if records[0]["token_kl"] is None else {"eval/token_kl": mean("token_kl")}
    return {"eval/student_accuracy": mean("student_correct"), "eval/text_accuracy": mean("text_correct"), **kl}


def write(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Per-question JSONL; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(r) + "\n" for r in records))
    aside.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
