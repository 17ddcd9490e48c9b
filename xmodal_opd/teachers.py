"""Teachers in a step: which answers each reads; and of served ones, what becomes of what they say and of silence."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xmodal_opd import schema
from xmodal_opd.build import Parts
from xmodal_opd.objective import rows as take
from xmodal_opd.scoring.served import Answers, Source, ask_teachers, refuse_silence
from xmodal_opd.types import Rollout, TokenBatch

Told = Mapping[Source, Answers]  # what served teachers say of this rank's rows


def by_teacher(source: schema.Source, rollouts: Mapping[int, Rollout]) -> dict[Source, list[int]]:
    """The rows of every teacher that a source names, in the order of the recipe, those without rows as well."""
    rows: dict[Source, list[int]] = {teacher: [] for teacher in schema.teachers_of(source).values()}
    for row, rollout in rollouts.items():
        rows[schema.teacher_of(source, rollout.pair.meta)].append(row)
    return rows


def wanted(parts: Parts, rollouts: Sequence[Rollout], sampling: Sequence[str]) -> dict[Source, list[int]]:
    """The rows that every served teacher is asked about, under each view: all for a scorer, a term's own for a term;
    of a route those that it leads there."""
    everything, rows = dict(enumerate(rollouts)), dict[Source, set[int]]()
    asking: list[tuple[schema.Source, Mapping[int, Rollout]]] = [
        (scorer, everything) for scorer in parts.recipe.scoring.values()
    ]
    for term in parts.recipe.objective.values():
        mine = {r: rollouts[r] for r, name in enumerate(sampling) if name == term.sampling and term.divergence}
        asking.append((term.teacher, mine))
    for teacher, some in ((t, s) for source, mine in asking for t, s in by_teacher(source, mine).items()):
        rows.setdefault(teacher, set()).update(some)
    return {source: sorted(some) for source, some in rows.items() if source[0] in parts.served and some}


def try_teachers(parts: Parts, rollouts: Sequence[Rollout]) -> None:
    """Before anything is measured: every served teacher answers on a few answers, under each view that they have.
    Raises what it would in a step, and RuntimeError when one of them says nothing."""
    teachers = {t for source in schema.sources(parts.recipe) for t in schema.teachers_of(source).values()}
    rows = {t: [r for r, it in enumerate(rollouts) if t[1] in it.pair.views] for t in teachers if t[0] in parts.served}
    told = ask_teachers(parts.served, {teacher: some for teacher, some in rows.items() if some}, rollouts)
    for source, answers in told.items():
        refuse_silence({source: answers})


def served_scores(
    parts: Parts, rollouts: Sequence[Rollout], told: Told, mask: Tensor, local: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """NAME_logp [B, T] of every scorer that served teachers have a part in, the rest being `local`; NaN where they said
    nothing."""
    out: dict[str, Tensor] = {}
    for name, scorer in parts.recipe.scoring.items():
        rows = {t: some for t, some in by_teacher(scorer, dict(enumerate(rollouts))).items() if t[0] in parts.served}
        if not rows:
            continue
        logp = out[f"{name}_logp"] = local.get(f"{name}_logp", torch.zeros(mask.shape)).clone()
        for teacher, row in ((teacher, row) for teacher, some in rows.items() for row in some):
            said = told[teacher][row]
            logp[row, mask[row]] = torch.tensor(float("nan")) if isinstance(said, str) else said.logp
    return out


def heard(
    rollouts: list[Rollout], sampling: list[str], batch: TokenBatch, told: Told
) -> tuple[list[Rollout], list[str], TokenBatch, Told]:
    """The same without the answers that a teacher said nothing of: they are left out of every term.

    Raises RuntimeError when none is left.
    """
    lost = {row: said for answers in told.values() for row, said in answers.items() if isinstance(said, str)}
    if not lost:
        return rollouts, sampling, batch, told
    keep, reason = [row for row in range(len(rollouts)) if row not in lost], next(iter(lost.values()))
    if not keep:
        raise RuntimeError(f"teachers said nothing of any answer of the step ({reason}); the last checkpoint is good")
    print(f"{len(lost)} of {len(rollouts)} answers are left out: a teacher said nothing of them ({reason})", flush=True)
    place = {row: i for i, row in enumerate(keep)}
    told = {
        source: {place[row]: said for row, said in answers.items() if row in place} for source, answers in told.items()
    }
    batch = take(batch, torch.tensor(keep, device=batch.mask.device))
    return [rollouts[r] for r in keep], [sampling[r] for r in keep], batch, told
