"""One training step: sample, score, judge the whole step once, then turn micro-batches into loss."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from xmodal_opd import dist, models
from xmodal_opd.background import later, now
from xmodal_opd.build import STUDENT, Parts
from xmodal_opd.encoders import encoded_once
from xmodal_opd.evaluate import is_right
from xmodal_opd.metrics import over_ranks, reward_metrics
from xmodal_opd.objective import Term
from xmodal_opd.objective import rows as take
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.rollout.ahead import Ahead
from xmodal_opd.scoring.forward import (
    divergence,
    divergence_from,
    divergence_of_both,
    statistics,
    token_logp,
)
from xmodal_opd.scoring.judge import judge
from xmodal_opd.scoring.mismatch import corrected, mismatch, trainer_logp
from xmodal_opd.scoring.served import Source, ask_teachers
from xmodal_opd.teachers import Told, heard, served_scores, wanted
from xmodal_opd.tokens import cut, token_batch
from xmodal_opd.types import Judged, Pair, Rollout, Scores, TokenBatch


@dataclass(frozen=True)
class Step:
    """This rank's rollouts in one order, the same as numbers, and the numbers of all ranks: what is judged."""

    rollouts: list[Rollout]
    sampling: list[str]  # which sampling each came from
    batch: TokenBatch
    everyone: TokenBatch
    samplings: list[str]  # of the rows of `everyone`
    mine: slice  # the rows of `everyone` that are `batch`
    told: Told

    def rows(self, sampling: str) -> Tensor:
        """Where the answers of one sampling stand among those of all ranks."""
        rows = [r for r, name in enumerate(self.samplings) if name == sampling]
        return torch.tensor(rows, device=self.everyone.mask.device)

    def tokens(self, sampling: str) -> int:
        return int(self.everyone.mask[self.rows(sampling)].sum())


def gathered(rollouts: list[Rollout], sampling: list[str], batch: TokenBatch, told: Told | None = None) -> Step:
    """The step of all ranks, from this rank's part of it."""
    everyone, mine = dist.gather_step(batch)
    samplings = [name for some in dist.gather(sampling) for name in some]
    return Step(rollouts, sampling, batch, everyone, samplings, mine, told or {})


def train_step(
    parts: Parts, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None = None
) -> dict[str, float]:
    """Sample, judge, backward and update on `pairs`; returns the step's metrics, those of all ranks together.

    following: the next step's pairs, for a sampler that is asked for them in advance.
    """
    with encoded_once(parts.models.values(), parts.adapter):
        step, metrics = sample(parts, pairs, number, following)
        metrics |= backward(parts, step, number)
    metrics = over_ranks(dist.gather(metrics))
    metrics |= parts.engine.step(number)
    if "ema" in parts.models:
        models.update_ema(parts.models["ema"], parts.student, parts.recipe.engine.ema_rate)
    began = time.monotonic()
    parts.sampler.sync()
    return metrics | ({} if parts.sampler.exact else {"sync_time": time.monotonic() - began})


def backward(parts: Parts, step: Step, number: int) -> dict[str, float]:
    """Judge the whole step, then add up its gradient piece by piece; returns loss and mean divergence of each term."""
    terms = {name: term.at(number, parts.recipe.train.steps) for name, term in parts.terms.items()}
    judged = {
        name: judge_term(parts, term, parts.recipe.objective[name].sampling, step) for name, term in terms.items()
    }
    sums = corrections(parts, terms, step)
    for piece in pieces(parts, step.rollouts):
        parts.engine.backward(parts.engine.run(partial(micro_loss, parts, terms, judged, step, piece, sums)))
    return sums | {"loss": sum(value for name, value in sums.items() if name.startswith("loss/"))}


def pieces(parts: Parts, rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Rows in micro-batches, as many on every rank: one that has fewer adds empty ones and goes through the motions."""
    some = list(cut(rollouts, parts.recipe.engine.micro_tokens, parts.responses.share))
    return some + [[]] * (max(dist.gather(len(some))) - len(some))


# ---- sampling and scoring, without gradient


def sample(
    parts: Parts, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None = None
) -> tuple[Step, dict[str, float]]:
    """The step's rollouts with all their scores, and what is worth knowing about them."""
    answers, age = answered(parts, pairs, number, following)
    references = answers.pop("(reference)", None)
    rollouts = [r for some in answers.values() for r in some]
    sampling = [name for name, some in answers.items() for _ in some]
    judging = (later if parts.judge_apart else now)(rewards_of, parts, answers, references)
    asking = (later if parts.served else now)(ask_teachers, parts.served, wanted(parts, sampling), rollouts)
    batch = with_trainer_logp(parts, token_batch(rollouts), rollouts, sampling)
    local = local_scores(parts, rollouts, batch.mask)
    rewards, failures = judging.result()
    told = asking.result()
    scores = Scores(batch.scores | local | served_scores(parts, told, batch.mask), reward=rewards)
    batch = dist.to(replace(batch, scores=scores), parts.student.device)
    step = gathered(*heard(rollouts, sampling, batch, told))
    apart = {} if parts.sampler.exact else mismatch(step.everyone)
    lost = {"teacher_failures": float(len(rollouts) - len(step.rollouts))} if parts.served else {}
    return step, describe(parts, answers, rewards, failures) | age | apart | lost


def answered(
    parts: Parts, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None
) -> tuple[dict[str, list[Rollout]], dict[str, float]]:
    """The answers of every sampling and how many updates old they are; those to the following pairs are then begun."""
    samplings = parts.samplings | ({} if parts.reference is None else {"(reference)": parts.reference})
    first = parts.recipe.train.seed * 1_000_003 + (dist.rank() << 40)
    answers = parts.sampler.generate(pairs, samplings, first + number * 4099)
    if not isinstance(parts.sampler, Ahead):
        return answers, {}
    age = {"rollout/age": float(parts.sampler.age)}
    if following is not None:
        parts.sampler.begin(following, samplings, first + (number + 1) * 4099)
    return answers, age


def with_trainer_logp(
    parts: Parts, batch: TokenBatch, rollouts: Sequence[Rollout], sampling: Sequence[str]
) -> TokenBatch:
    """The sampler's log-probs as the score `sampler_logp`, and as `student_logp` the trainer's own: the very same where
    the trainer samples, else from a forward over all answers."""
    scores = Scores(batch.scores, sampler_logp=batch.student_logp)
    if parts.sampler.exact:
        return replace(batch, scores=scores)
    views = [parts.samplings[name].view for name in sampling]
    cutter = partial(pieces, parts)
    logp = parts.engine.run(lambda: trainer_logp(parts.student, parts.responses, rollouts, views, batch.mask, cutter))
    return replace(batch, student_logp=logp, scores=scores)


def rewards_of(
    parts: Parts, answers: Mapping[str, list[Rollout]], references: Sequence[Rollout] | None
) -> tuple[Tensor, Counter[str]]:
    """Rewards [B], NaN where none was asked for or the judge could not decide; and how often it could not, and why."""
    rewards: list[float] = []
    failures: Counter[str] = Counter()
    for name, rollouts in answers.items():
        if parts.judge is None or name not in parts.judged:
            rewards += [float("nan")] * len(rollouts)
            continue
        texts = None if references is None else [own_answer(references[r.group]) for r in rollouts]
        values, failed = judge(parts.judge, rollouts, texts)
        rewards += [float("nan") if v is None else v for v in values]
        failures.update(failed)
    return torch.tensor(rewards), failures


def own_answer(reference: Rollout) -> str | None:
    """What the judge compares with: an answer that was cut off reaches no conclusion."""
    return reference.text if reference.finished else None


@torch.no_grad()
def local_scores(parts: Parts, rollouts: Sequence[Rollout], mask: Tensor) -> dict[str, Tensor]:
    """NAME_logp and NAME_entropy [B, T] of every local scorer, and NAME_divergence = KL(student || NAME) if asked."""
    out: dict[str, Tensor] = {}
    scorers = {name: scorer for name, scorer in parts.recipe.scoring.items() if scorer.model in parts.models}
    if not scorers:
        return out
    for piece in pieces(parts, rollouts):
        some, here = [rollouts[r] for r in piece], mask[piece].to(parts.student.device)
        for name, scorer in scorers.items():
            model = parts.models[scorer.model]
            hidden = parts.responses.hidden(model, some, scorer.view)
            values: dict[str, Tensor] = {}
            if scorer.divergence:
                own = (parts.student, parts.responses.hidden(parts.student, some, "student"))
                values["divergence"] = divergence(reverse_kl, own, (model, hidden), here, parts.vocab)
            values |= zip(("logp", "entropy"), statistics(model, hidden, some, here), strict=True)
            for kind, value in values.items():
                out.setdefault(f"{name}_{kind}", torch.zeros(mask.shape))[piece] = value.float().cpu()
    return out


def describe(
    parts: Parts, answers: Mapping[str, list[Rollout]], rewards: Tensor, failures: Counter[str]
) -> dict[str, float]:
    """Metrics of the samples alone, under the names TRL uses where it has one."""
    every = [r for some in answers.values() for r in some]
    own = [r for name, some in answers.items() if parts.samplings[name].view == "student" for r in some]
    gold = [is_right(r.pair, r, parts.right) for r in own if r.pair.answer is not None]
    groups = [(i, r.group) for i, name in enumerate(answers) for r in answers[name]]
    tokens = [logp for r in every for logp in r.logps]
    return {
        "completions/mean_length": sum(len(r.tokens) for r in every) / len(every),
        "completions/clipped_ratio": sum(not r.finished for r in every) / len(every),
        "entropy": -sum(tokens) / len(tokens),  # of the sampled tokens: unbiased only at temperature 1
        "num_tokens": float(len(tokens)),
        **({"student_accuracy": sum(gold) / len(gold)} if gold else {}),
        **reward_metrics(rewards.tolist(), [hash(g) for g in groups]),
        **({"judge_failures": float(failures.total())} if parts.judge else {}),
        **{f"judge_failures/{reason}": float(count) for reason, count in failures.items()},
    }


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
    """How many tokens of each term the weights against a mismatch hold back."""
    out: dict[str, float] = {}
    for name, term in terms.items():
        batch = take(step.everyone, step.rows(parts.recipe.objective[name].sampling))
        for weight in term.row_weights:
            out |= {f"{what}/{name}": share for what, share in corrected(weight, batch).items()}
    return out


# ---- the forward with gradient


def micro_loss(
    parts: Parts,
    terms: Mapping[str, Term],
    judged: Mapping[str, Judged],
    step: Step,
    piece: Sequence[int],
    sums: dict[str, float],
) -> Tensor:
    """Loss of some rows of the step; adds each term's share, and its mean divergence, to `sums`."""
    use = {name: [r for r in piece if step.sampling[r] == parts.recipe.objective[name].sampling] for name in terms}
    hidden = hidden_states(parts, terms, step, use)
    total = torch.zeros((), device=parts.student.device)
    for name, rows in use.items():
        if not rows:
            continue
        index = torch.tensor(rows, device=total.device)
        batch = take(step.batch, index)
        per_token = values(parts, name, terms[name], hidden, step, rows, batch.mask)
        loss = terms[name].loss(batch, take(judged[name], index), per_token)
        sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + float(loss.detach())
        if terms[name].divergence:
            tokens = step.tokens(parts.recipe.objective[name].sampling)
            sums[f"distill/{name}"] = sums.get(f"distill/{name}", 0.0) + float(per_token.detach().sum()) / tokens
        total = total + loss
    return total + idle(parts, hidden, piece)


def idle(parts: Parts, hidden: Mapping[Source, tuple[dict[int, int], Tensor]], piece: Sequence[int]) -> Tensor | float:
    """Zero, with a gradient of zero for all that other ranks train in this piece and this one has no rows for: ranks
    reduce the same gradients."""
    unused = [states.sum() for places, states in hidden.values() if not places]
    return sum(unused, 0.0) if piece else sum(unused, models.head(parts.student)[:0].sum())


def sources(parts: Parts, name: str, term: Term) -> tuple[Source, Source | None]:
    """What the student sees in this term, and who teaches it."""
    spec = parts.recipe.objective[name]
    return (STUDENT, spec.view), (spec.teacher.model, spec.teacher.view) if term.divergence else None


def hidden_states(
    parts: Parts, terms: Mapping[str, Term], step: Step, use: Mapping[str, list[int]]
) -> dict[Source, tuple[dict[int, int], Tensor]]:
    """Each (model, view) run once over all rows that need it: {row: place}, hidden states. With gradient where a
    term trains through it; a term that only learns from it detaches. Ranks run the same ones, without rows too."""
    rows: dict[Source, dict[int, int]] = {}
    trained: set[Source | None] = set()
    for name, mine in use.items():
        student, teacher = sources(parts, name, terms[name])
        moving = {student} if parts.recipe.objective[name].teacher.stop_gradient else {student, teacher}
        trained |= moving if mine or parts.responses.together else set()
        for source in (s for s in (student, teacher) if s and s[0] in parts.models):
            places = rows.setdefault(source, {})
            for row in mine:
                places.setdefault(row, len(places))
    return {
        source: (
            places,
            parts.responses.hidden(
                parts.models[source[0]], [step.rollouts[r] for r in places], source[1], grad=source in trained
            ),
        )
        for source, places in rows.items()
        if places or parts.responses.together
    }


def values(
    parts: Parts,
    name: str,
    term: Term,
    hidden: Mapping[Source, tuple[dict[int, int], Tensor]],
    step: Step,
    rows: Sequence[int],
    mask: Tensor,
) -> Tensor:
    """Per token [b, T], with gradient: the divergence of a distillation term, or log p for a policy term."""
    rollouts = [step.rollouts[r] for r in rows]

    def of(source: Source) -> Tensor:
        places, states = hidden[source]
        return states[[places[r] for r in rows]]

    student, teacher = sources(parts, name, term)
    if term.divergence is None or teacher is None:
        return token_logp(parts.student, of(student), rollouts, mask)
    if teacher in step.told:
        said = [signal for row in rows if not isinstance(signal := step.told[teacher][row], str)]  # all: see `heard`
        own = parts.student, of(student)
        return divergence_from(term.divergence, term.sampled, own, said, rollouts, mask, parts.vocab)
    sides = (parts.student, of(student)), (parts.models[teacher[0]], of(teacher))
    stop = parts.recipe.objective[name].teacher.stop_gradient
    if not term.sampled:
        return (divergence if stop else divergence_of_both)(term.divergence, *sides, mask, parts.vocab)
    with torch.set_grad_enabled(not stop):
        logq = token_logp(*sides[1], rollouts, mask)
    return term.divergence(token_logp(*sides[0], rollouts, mask), logq)
