"""Served teachers in a step: which answers each reads, and what becomes of what it says and of its silence."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xmodal_opd.build import Parts
from xmodal_opd.objective import rows as take
from xmodal_opd.scoring.served import Answers, Source, ask_teachers
from xmodal_opd.types import Rollout, TokenBatch

Told = Mapping[Source, Answers]  # what served teachers say of this rank's rows


def wanted(parts: Parts, sampling: Sequence[str]) -> dict[Source, list[int]]:
    """The rows that every served teacher is asked about, under each view: all for a scorer, a term's own for a term."""
    rows: dict[Source, set[int]] = {}
    for scorer in parts.recipe.scoring.values():
        rows.setdefault((scorer.model, scorer.view), set()).update(range(len(sampling)))
    for term in parts.recipe.objective.values():
        mine = {r for r, name in enumerate(sampling) if name == term.sampling and term.divergence}
        rows.setdefault((term.teacher.model, term.teacher.view), set()).update(mine)
    return {source: sorted(some) for source, some in rows.items() if source[0] in parts.served and some}


def try_teachers(parts: Parts, rollouts: Sequence[Rollout]) -> None:
    """Before anything is measured: every served teacher answers on a few answers, under each view. Raises what it
    would in a step."""
    sources = {source for name in parts.samplings for source in wanted(parts, [name])}
    ask_teachers(parts.served, dict.fromkeys(sources, range(len(rollouts))), rollouts)


def served_scores(parts: Parts, told: Told, mask: Tensor) -> dict[str, Tensor]:
    """NAME_logp [B, T] of every scorer that is a served teacher; NaN where it said nothing."""
    served = {name: scorer for name, scorer in parts.recipe.scoring.items() if scorer.model in parts.served}
    out = {f"{name}_logp": torch.zeros(mask.shape) for name in served}
    for name, scorer in served.items():
        for row, said in told.get((scorer.model, scorer.view), {}).items():
            silent = isinstance(said, str)
            out[f"{name}_logp"][row, mask[row]] = torch.tensor(float("nan")) if silent else said.logp
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
