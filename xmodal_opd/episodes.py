"""The same held-out start states, acted out by the student and by its teacher: success, steps, and how far the two
differ on what the student saw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import batched, groupby
from statistics import fmean
from typing import Any

from rich.progress import track
from transformers import PreTrainedModel

from xmodal_opd.evaluate import view_kl
from xmodal_opd.rollout.env import EnvSampler
from xmodal_opd.scoring.forward import Responses
from xmodal_opd.types import Pair, Rollout, Sampling

SIZE = 128  # decisions compared at a time


def evaluate(
    pairs: Sequence[Pair],
    sampler: EnvSampler,
    responses: Responses,
    teacher: tuple[PreTrainedModel, str],
    *,
    batch: int,
    kl: bool = True,
) -> list[dict[str, Any]]:
    """One record per start state: key, task, whether student and teacher (a model and the view it reads) succeed when
    they act greedily, in how many steps, and the token KL.

    "text" is the teacher's: where it is the student itself reading the state, it is the text view, as for questions.
    `token_kl` is the mean over the student's tokens of KL(student || teacher) where the student went, in nats.
    """
    return [
        record
        for some in track(list(batched(pairs, batch)), "acting", transient=True)
        for record in evaluate_some(some, sampler, responses, teacher, kl)
    ]


def evaluate_some(
    pairs: Sequence[Pair], sampler: EnvSampler, responses: Responses, teacher: tuple[PreTrainedModel, str], kl: bool
) -> Iterator[dict[str, Any]]:
    model, view = teacher
    student = played(sampler, pairs, "student", "student")
    alike = model is sampler.model and view == "student"  # then what it does is known
    text = student if alike else played(replace(sampler, model=model), pairs, view, "text")
    for pair, ours, theirs in zip(pairs, student, text, strict=True):
        yield {
            "key": pair.key,
            "task": pair.meta["task"],
            "student": told(ours),
            "text": told(theirs),
            "student_correct": ours[0].pair.meta["success"],
            "text_correct": theirs[0].pair.meta["success"],
            "student_steps": ours[0].pair.meta["steps"],
            "text_steps": theirs[0].pair.meta["steps"],
            "token_kl": fmean(gap(sampler, responses, teacher, ours)) if kl else None,
        }


def played(sampler: EnvSampler, pairs: Sequence[Pair], view: str, name: str) -> list[list[Rollout]]:
    """The decisions of one greedy episode from each start state."""
    every = sampler.generate(pairs, {name: Sampling(temperature=0.0, view=view)}, seed=0)[name]
    return [list(some) for _, some in groupby(every, key=lambda r: r.episode)]


def told(episode: Sequence[Rollout]) -> str:
    meta = episode[0].pair.meta
    return f"{'success' if meta['success'] else 'no success'} in {meta['steps']} steps"


def gap(
    sampler: EnvSampler, responses: Responses, teacher: tuple[PreTrainedModel, str], decisions: Sequence[Rollout]
) -> list[float]:
    """KL(student || teacher) of each decision, a mean over its tokens."""
    model, view = teacher
    return [
        value
        for some in batched(decisions, SIZE)
        for value in view_kl(sampler.model, responses, some, other=model, view=view)
    ]


def of_a_step(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Metrics of the episodes among a step's rollouts; nothing where there are none."""
    last = {(r.group, r.episode): r for r in rollouts if r.episode is not None}
    if not last:
        return {}
    ends = [r.pair.meta for r in last.values()]
    return {
        "episodes": float(len(ends)),
        "episode/success": fmean(float(meta["success"]) for meta in ends),
        "episode/steps": fmean(meta["steps"] for meta in ends),
        "environment_steps": float(sum(meta["steps"] for meta in ends)),
    }
