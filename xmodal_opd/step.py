"""One training step: collect answers and scores, judge the whole step once, then turn micro-batches into loss."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor

from xmodal_opd import dist, models, schema
from xmodal_opd.build import Parts
from xmodal_opd.collect import Step, pieces, sample
from xmodal_opd.encoders import encoded_once
from xmodal_opd.hidden import head
from xmodal_opd.metrics import over_ranks
from xmodal_opd.objective import Term, name_of_piece
from xmodal_opd.objective import rows as take
from xmodal_opd.objective.order import order, sides
from xmodal_opd.scoring.forward import Side, divergence, divergence_from, divergence_of_both, token_logp
from xmodal_opd.scoring.mismatch import corrected
from xmodal_opd.scoring.outcomes import shaping
from xmodal_opd.teachers import by_teacher
from xmodal_opd.types import Judged, Pair, Scores

Reading = tuple[str, str, tuple[str, float] | None]  # a model, the view it reads, and (view, alpha) of its contrast


def train_step(
    parts: Parts, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None = None
) -> dict[str, float]:
    """Sample, judge, backward and update on `pairs`; returns the step's metrics, those of all ranks together.

    following: the next step's pairs, for a sampler that is asked for them in advance.
    """
    with encoded_once(parts.models.values(), parts.adapter):
        step, metrics = sample(parts, pairs, number, following)
        metrics = over_ranks(dist.gather(metrics)) | learn(parts, step, number)
    if "ema" in parts.models:
        models.update_ema(parts.models["ema"], parts.student, parts.recipe.engine.ema_rate)
    began = time.monotonic()
    parts.sampler.sync()
    return metrics | ({} if parts.sampler.exact else {"sync_time": time.monotonic() - began})


@dataclass(frozen=True)
class Verdict:
    """The terms as they are in this step, what each says of the whole of it, and what is worth knowing about that."""

    terms: Mapping[str, Term]
    judged: Mapping[str, Judged]
    metrics: dict[str, float]


def judged(parts: Parts, step: Step, number: int) -> Verdict:
    """Judge the whole step, once for all its updates."""
    terms = {name: term.at(number, parts.recipe.train.steps) for name, term in parts.terms.items()}
    found = {name: judge_term(parts, term, parts.recipe.objective[name].sampling, step) for name, term in terms.items()}
    return Verdict(terms, found, corrections(parts, terms, step) | orders(parts, terms, step))


def learn(parts: Parts, step: Step, number: int) -> dict[str, float]:
    """Judge the step, and update on each of its minibatches; the metrics of all ranks together."""
    verdict, sums, told = judged(parts, step, number), [], []
    for rows in minibatches(step, parts.recipe.train.minibatches):
        sums.append(backward(parts, step, verdict, rows))
        told.append(parts.engine.step(number))
    return over_ranks(dist.gather(verdict.metrics | added_up(sums))) | of_updates(told)


def minibatches(step: Step, count: int) -> list[list[int]]:
    """This rank's rows in each of `count` parts of the step, dealt out by the numbers drawn for answers, so the parts
    are the same on any number of ranks. What was sampled together is learnt apart."""
    if count == 1:
        return [list(range(len(step.rollouts)))]
    places = step.everyone.scores["draw"].argsort().argsort()[step.mine].tolist()
    return [[row for row, place in enumerate(places) if place % count == part] for part in range(count)]


def backward(parts: Parts, step: Step, verdict: Verdict, rows: Sequence[int] | None = None) -> dict[str, float]:
    """Add up the gradient of some of this rank's rows (None: all) piece by piece; returns loss and mean divergence of
    each term. The gradient is as large as that of the whole step, however many minibatches share its rows."""
    rows, sums = range(len(step.rollouts)) if rows is None else rows, dict[str, float]()
    for piece in pieces(parts, [step.rollouts[row] for row in rows]):
        loss = parts.engine.run(partial(micro_loss, parts, verdict, step, [rows[place] for place in piece], sums))
        parts.engine.backward(loss * parts.recipe.train.minibatches)
    return sums | {"loss": sum(value for name, value in sums.items() if name.startswith("loss/"))}


def added_up(sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of minibatches, of which one may have no rows of a term that another has."""
    return {name: sum(some.get(name, 0.0) for some in sums) for name in dict.fromkeys(chain.from_iterable(sums))}


def of_updates(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the engine said of a step's updates: the mean; `skipped` is 1 if one was."""
    return {name: (max if name == "skipped" else fmean)([values[name] for values in told]) for name in told[0]}


def judge_term(parts: Parts, term: Term, on: str, step: Step) -> Judged:
    """The term's verdict on this rank's rows: on those of its sampling, judged among those of all ranks; zero on all
    others. Rewards only where a judge gave some: a row that none was asked for is not one that the judge could not
    decide."""
    rows = step.rows(on)
    batch = take(step.everyone, rows)
    if on not in parts.judged:
        batch = replace(batch, scores=Scores({k: v for k, v in batch.scores.items() if k != "reward"}))
    verdict = term.judge(batch)
    zeros, width = torch.zeros_like(step.everyone.student_logp), step.batch.mask.shape[1]
    return Judged(*(zeros.index_copy(0, rows, x)[step.mine, :width] for x in (verdict.weight, verdict.advantage)))


def corrections(parts: Parts, terms: Mapping[str, Term], step: Step) -> dict[str, float]:
    """How many tokens of each term the weights against a mismatch hold back, and how far APO's factors go."""
    out: dict[str, float] = {}
    for name, term in terms.items():
        batch = take(step.everyone, step.rows(parts.recipe.objective[name].sampling))
        out |= {f"{what}/{name}": mean for what, mean in shaping(term, batch).items()}
        for weight in term.row_weights:
            out |= {f"{what}/{name}": share for what, share in corrected(weight, batch).items()}
    return out


def orders(parts: Parts, terms: Mapping[str, Term], step: Step) -> dict[str, float]:
    """Whether the log-ratio to its teacher puts right answers above wrong ones, for each policy term on one."""
    out: dict[str, float] = {}
    for name, term in terms.items():
        on = parts.recipe.objective[name].sampling
        ratios = [piece for piece in term.advantages if name_of_piece(piece) == "teacher_logratio"]
        if ratios and on in parts.judged:
            batch = take(step.everyone, step.rows(on))
            adv = torch.zeros_like(batch.student_logp)
            for ratio in ratios:
                adv = ratio(batch, adv)
            out |= {f"order/{what}/{name}": value for what, value in order(sides(batch, adv)).items()}
    return out


def micro_loss(parts: Parts, verdict: Verdict, step: Step, piece: Sequence[int], sums: dict[str, float]) -> Tensor:
    """Loss of some rows of the step; adds each term's share, and its mean divergence, to `sums`."""
    terms = verdict.terms
    use = {name: [r for r in piece if step.sampling[r] == parts.recipe.objective[name].sampling] for name in terms}
    hidden = hidden_states(parts, terms, step, use)
    total = torch.zeros((), device=parts.student.device)
    for name, rows in use.items():
        if not rows:
            continue
        index = torch.tensor(rows, device=total.device)
        batch = take(step.batch, index)
        per_token = values(parts, name, terms[name], hidden, step, rows, batch.mask)
        loss = terms[name].loss(batch, take(verdict.judged[name], index), per_token)
        sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + float(loss.detach())
        if terms[name].divergence:
            tokens = step.tokens(parts.recipe.objective[name].sampling)
            sums[f"distill/{name}"] = sums.get(f"distill/{name}", 0.0) + float(per_token.detach().sum()) / tokens
        total = total + loss
    return total + idle(parts, hidden, piece)


def idle(parts: Parts, hidden: Mapping[Reading, tuple[dict[int, int], Tensor]], piece: Sequence[int]) -> Tensor | float:
    """Zero, with a gradient of zero for all that other ranks train in this piece and this one has no rows for: ranks
    reduce the same gradients."""
    unused = [states.sum() for places, states in hidden.values() if not places]
    return sum(unused, 0.0) if piece else sum(unused, head(parts.student)[:0].sum())


def taught(parts: Parts, name: str, term: Term, step: Step, rows: Sequence[int]) -> dict[Reading, list[int]]:
    """Who teaches this term, and which of the rows; nobody a policy term."""
    if term.divergence is None:
        return {}
    teacher = parts.recipe.objective[name].teacher
    shared = by_teacher(teacher, {r: step.rollouts[r] for r in rows})
    return {(*source, teacher.against): some for source, some in shared.items()}


def hidden_states(
    parts: Parts, terms: Mapping[str, Term], step: Step, use: Mapping[str, list[int]]
) -> dict[Reading, tuple[dict[int, int], Tensor]]:
    """Each reading run once over all rows that need it: {row: place}, hidden states. With gradient where a
    term trains through it; a term that only learns from it detaches. Ranks run the same ones, without rows too."""
    rows: dict[Reading, dict[int, int]] = {}
    trained: set[Reading] = set()
    for name, mine in use.items():
        spec = parts.recipe.objective[name]
        seen = [((schema.STUDENT, spec.view, None), mine, True)]
        seen += [
            (t, some, not spec.teacher.stop_gradient)
            for t, some in taught(parts, name, terms[name], step, mine).items()
        ]
        for source, some, moves in (one for one in seen if one[0][0] in parts.models):
            if moves and (some or parts.responses.together):
                trained.add(source)
            places = rows.setdefault(source, {})
            for row in some:
                places.setdefault(row, len(places))
    return {
        source: (
            places,
            parts.responses.contrasted(
                parts.models[source[0]], [step.rollouts[r] for r in places], *source[1:], grad=source in trained
            ),
        )
        for source, places in rows.items()
        if places or parts.responses.together
    }


def values(
    parts: Parts,
    name: str,
    term: Term,
    hidden: Mapping[Reading, tuple[dict[int, int], Tensor]],
    step: Step,
    rows: Sequence[int],
    mask: Tensor,
) -> Tensor:
    """Per token [b, T], with gradient: the divergence of a distillation term, or log p for a policy term."""
    student = (schema.STUDENT, parts.recipe.objective[name].view, None)
    if term.divergence is None:
        some = [step.rollouts[r] for r in rows]
        return token_logp(parts.student, states(hidden, student, rows), some, mask, parts.responses.among)
    place, told = {row: i for i, row in enumerate(rows)}, dict[int, Tensor]()
    for teacher, some in taught(parts, name, term, step, rows).items():
        if some:
            own, here = (parts.student, states(hidden, student, some)), mask[[place[r] for r in some]]
            told |= zip(some, compared(parts, name, term, own, teacher, hidden, step, some, here), strict=True)
    return torch.stack([told[row] for row in rows])


def states(hidden: Mapping[Reading, tuple[dict[int, int], Tensor]], source: Reading, rows: Sequence[int]) -> Tensor:
    """Hidden states [b, T, H] of some rows of the step."""
    places, of_all = hidden[source]
    return of_all[[places[r] for r in rows]]


def compared(
    parts: Parts,
    name: str,
    term: Term,
    own: Side,
    teacher: Reading,
    hidden: Mapping[Reading, tuple[dict[int, int], Tensor]],
    step: Step,
    rows: Sequence[int],
    mask: Tensor,
) -> Tensor:
    """The divergence [b, T] of a distillation term on the rows of one teacher."""
    rollouts, stop = [step.rollouts[r] for r in rows], parts.recipe.objective[name].teacher.stop_gradient
    among = parts.responses.among
    assert term.divergence is not None
    if (served := teacher[:2]) in step.told:
        said = [signal for row in rows if not isinstance(signal := step.told[served][row], str)]  # all: see `heard`
        return divergence_from(term.divergence, term.sampled, own, said, rollouts, mask, among or parts.vocab)
    other = parts.models[teacher[0]], states(hidden, teacher, rows)
    if not term.sampled:
        return (divergence if stop else divergence_of_both)(term.divergence, own, other, mask, among or parts.vocab)
    with torch.set_grad_enabled(not stop):
        logq = token_logp(*other, rollouts, mask, among)
    return term.divergence(token_logp(*own, rollouts, mask, among), logq)
