"""A step's answers, and all that is measured of them before the step is judged: no gradient here."""

import random
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from xmodal_opd import dist, duals, schema
from xmodal_opd.background import later, now
from xmodal_opd.build import Parts
from xmodal_opd.episodes import of_a_step
from xmodal_opd.evaluate import is_right
from xmodal_opd.metrics import reward_metrics
from xmodal_opd.objective import rows as take
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.rollout.ahead import Ahead
from xmodal_opd.rollout.demonstrated import Demonstrated
from xmodal_opd.scoring.forward import divergence, statistics
from xmodal_opd.scoring.judge import judge
from xmodal_opd.scoring.mismatch import likelihood, mismatch, trainer_logp
from xmodal_opd.scoring.outcomes import entropies, outcomes
from xmodal_opd.scoring.served import Source, ask_teachers
from xmodal_opd.teachers import Told, by_teacher, heard, served_scores, wanted
from xmodal_opd.tokens import cut, token_batch
from xmodal_opd.types import Pair, Rollout, Sampler, Scores, TokenBatch


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


def pieces(parts: Parts, rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Rows in micro-batches, as many on every rank: one that has fewer adds empty ones and goes through the motions."""
    some = list(cut(rollouts, parts.recipe.engine.micro_tokens, parts.responses.share))
    return some + [[]] * (max(dist.gather(len(some))) - len(some))


def sample(
    parts: Parts, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None = None
) -> tuple[Step, dict[str, float]]:
    """The step's rollouts with all their scores, and what is worth knowing about them."""
    sampler = parts.sampler_at(number)
    answers, age = answered(parts, sampler, pairs, number, following)
    references = answers.pop("(reference)", None)
    rollouts = [r for some in answers.values() for r in some]
    sampling = [name for name, some in answers.items() for _ in some]
    judging = (later if parts.judge_apart else now)(rewards_of, parts, answers, references)
    asking = (later if parts.served else now)(ask_teachers, parts.served, wanted(parts, rollouts, sampling), rollouts)
    batch = with_trainer_logp(parts, sampler, token_batch(rollouts), rollouts, sampling)
    local = local_scores(parts, rollouts, batch.mask)
    rewards, failures = judging.result()
    told = asking.result()
    drawn = draws(rollouts, sampling, parts.recipe.train.seed, number)
    served = served_scores(parts, rollouts, told, batch.mask, local)
    scores = Scores(batch.scores | local | served, reward=rewards, draw=drawn)
    scores |= question_rewards(rollouts, sampling, rewards, parts.judged)
    batch = dist.to(replace(batch, scores=scores), parts.student.device)
    step = gathered(*heard(rollouts, sampling, batch, told))
    step, betas = dually(parts, step)
    apart = {} if parts.sampler.exact else mismatch(step.everyone)
    apart |= likelihood(step.everyone) if isinstance(sampler, Demonstrated) else {}
    lost = {"teacher_failures": float(len(rollouts) - len(step.rollouts))} if parts.served else {}
    verdicts = outcomes(judged_rows(parts, step)) | entropies(step.everyone)
    return step, describe(parts, answers, rewards, failures) | verdicts | betas | age | apart | lost


def dually(parts: Parts, step: Step) -> tuple[Step, dict[str, float]]:
    """The step with the score `dual` [B] where the recipe has dual weights, which then move on; and what they were.
    Raises ValueError for a sample that is of no kind."""
    settings = parts.recipe.dual
    if settings is None:
        return step, {}
    mine = [schema.kind_in(settings, r.pair.meta) for r in step.rollouts]
    kinds = [kind for some in dist.gather(mine) for kind in some]
    state, rows = parts.memory.get("dual", {}), step.rows(settings.sampling)
    gaps = duals.ahead(take(step.everyone, rows), [kinds[r] for r in rows.tolist()], settings.scorer)
    parts.memory["dual"] = duals.updated(state, gaps, settings)
    beta = duals.weights(state, kinds).to(step.everyone.mask.device)
    everyone = replace(step.everyone, scores=Scores(step.everyone.scores, dual=beta))
    return replace(step, everyone=everyone), duals.described(state, gaps)


def judged_rows(parts: Parts, step: Step) -> TokenBatch:
    """The answers of all ranks that the judge saw; groups of two samplings are two groups."""
    order = sorted(parts.judged)
    kinds = torch.tensor([order.index(name) if name in parts.judged else -1 for name in step.samplings])
    kinds = kinds.to(step.everyone.group.device)
    batch = take(step.everyone, kinds >= 0)
    return replace(batch, group=batch.group * len(order) + kinds[kinds >= 0])


def answered(
    parts: Parts, sampler: Sampler, pairs: Sequence[Pair], number: int, following: Sequence[Pair] | None
) -> tuple[dict[str, list[Rollout]], dict[str, float]]:
    """The answers of every sampling and how many updates old they are; those to the following pairs are then begun."""
    samplings = parts.samplings | ({} if parts.reference is None else {"(reference)": parts.reference})
    first = parts.recipe.train.seed * 1_000_003 + (dist.rank() << 40)
    answers = sampler.generate(pairs, samplings, first + number * 4099)
    if not isinstance(sampler, Ahead):
        return answers, {}
    age = {"rollout/age": float(sampler.age)}
    if following is not None:
        sampler.begin(following, samplings, first + (number + 1) * 4099)
    return answers, age


def with_trainer_logp(
    parts: Parts, sampler: Sampler, batch: TokenBatch, rollouts: Sequence[Rollout], sampling: Sequence[str]
) -> TokenBatch:
    """The sampler's log-probs as the score `sampler_logp`, and as `student_logp` the trainer's own: the very same where
    the trainer samples, else from a forward over all answers."""
    scores = Scores(batch.scores, sampler_logp=batch.student_logp)
    if sampler.exact:
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


def once(rollouts: Sequence[Rollout], groups: Sequence[Hashable]) -> list[int]:
    """Rows of what has a reward of its own: every answer, and of a robot's episode the first decision."""
    found: dict[Hashable, int] = {}
    for row, (rollout, group) in enumerate(zip(rollouts, groups, strict=True)):
        found.setdefault((group, ("row", row) if rollout.episode is None else rollout.episode), row)
    return [*found.values()]


def question_rewards(
    rollouts: Sequence[Rollout], sampling: Sequence[str], rewards: Tensor, judged: Collection[str]
) -> dict[str, Tensor]:
    """NAME_reward [B] for every judged sampling NAME: the mean reward of its answers to the same question, NaN where
    the judge decided none of them."""
    groups = torch.tensor([r.group for r in rollouts])
    counted = torch.zeros(len(rollouts), dtype=torch.bool)
    counted[once(rollouts, [(s, r.group) for s, r in zip(sampling, rollouts, strict=True)])] = True
    out: dict[str, Tensor] = {}
    for name in judged:
        rows = torch.tensor([s == name for s in sampling]) & counted
        means = {g: rewards[rows & (groups == g)].nanmean() for g in groups.unique().tolist()}
        out[f"{name}_reward"] = torch.stack([means[r.group] for r in rollouts])
    return out


def own_answer(reference: Rollout) -> str | None:
    """What the judge compares with: an answer that was cut off reaches no conclusion."""
    return reference.text if reference.finished else None


def draws(rollouts: Sequence[Rollout], sampling: Sequence[str], seed: int, step: int) -> Tensor:
    """A uniform number [B] for each answer, by question and place in its group: the same on any number of ranks."""
    places: Counter[tuple[str, int]] = Counter()
    out: list[float] = []
    for rollout, name in zip(rollouts, sampling, strict=True):
        places[name, rollout.group] += 1
        place = places[name, rollout.group]
        out.append(random.Random(f"{seed} {step} {rollout.pair.key} {name} {place}").random())
    return torch.tensor(out)


@torch.no_grad()
def local_scores(parts: Parts, rollouts: Sequence[Rollout], mask: Tensor) -> dict[str, Tensor]:
    """NAME_logp and NAME_entropy [B, T] of every local scorer, and NAME_divergence = KL(student || NAME) if asked. Of
    one that is routed, every teacher fills the rows led to it; with served ones among them there is NAME_logp alone."""
    out: dict[str, Tensor] = {}
    local = {n: [t in parts.models for t, _ in schema.teachers_of(s).values()] for n, s in parts.recipe.scoring.items()}
    scorers = {name: scorer for name, scorer in parts.recipe.scoring.items() if any(local[name])}
    for piece in pieces(parts, rollouts) if scorers else ():
        for name, scorer in scorers.items():
            for teacher, rows in by_teacher(scorer, {row: rollouts[row] for row in piece}).items():
                if teacher[0] in parts.models and (rows or parts.responses.together):
                    some, here = [rollouts[r] for r in rows], mask[rows].to(parts.student.device)
                    for kind, value in measured(parts, scorer, teacher, some, here).items():
                        if kind == "logp" or all(local[name]):
                            out.setdefault(f"{name}_{kind}", torch.zeros(mask.shape))[rows] = value.float().cpu()
    return out


def measured(
    parts: Parts, scorer: schema.Scorer, teacher: Source, rollouts: Sequence[Rollout], mask: Tensor
) -> dict[str, Tensor]:
    """What one local teacher of a scorer says of some answers, each [b, T]."""
    model, view = parts.models[teacher[0]], teacher[1]
    hidden = parts.responses.contrasted(model, rollouts, view, scorer.against)
    values: dict[str, Tensor] = {}
    if scorer.divergence:
        own = (parts.student, parts.responses.hidden(parts.student, rollouts, "student"))
        values["divergence"] = divergence(reverse_kl, own, (model, hidden), mask, parts.responses.among or parts.vocab)
    told = statistics(model, hidden, rollouts, mask, parts.responses.among)
    return values | dict(zip(("logp", "entropy"), told, strict=True))


def describe(
    parts: Parts, answers: Mapping[str, list[Rollout]], rewards: Tensor, failures: Counter[str]
) -> dict[str, float]:
    """Metrics of the samples alone, under the names TRL uses where it has one."""
    every = [r for some in answers.values() for r in some]
    own = [r for name, some in answers.items() if parts.samplings[name].view == "student" for r in some]
    gold = [is_right(r.pair, r, parts.right) for r in own if r.pair.answer is not None]
    groups = [(i, r.group) for i, name in enumerate(answers) for r in answers[name]]
    first = once(every, groups)
    tokens = [logp for r in every for logp in r.logps]
    return {
        "completions/mean_length": sum(len(r.tokens) for r in every) / len(every),
        "completions/clipped_ratio": sum(not r.finished for r in every) / len(every),
        "num_tokens": float(len(tokens)),
        # of the sampled tokens: unbiased only at temperature 1, and none of what was not sampled
        **({"entropy": -sum(tokens) / len(tokens)} if any(tokens) else {}),
        **({"student_accuracy": sum(gold) / len(gold)} if gold else {}),
        **of_a_step(every),
        **reward_metrics(rewards[first].tolist(), [hash(groups[row]) for row in first]),
        **({"judge_failures": float(failures.total())} if parts.judge else {}),
        **{f"judge_failures/{reason}": float(count) for reason, count in failures.items()},
    }
