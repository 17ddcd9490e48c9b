"""Right and wrong answers to the same prompt: what a teacher's return says of them, and whether it orders them so.

Uni-OPD, arXiv:2605.03677. The return G of an answer is the mean of its tokens' advantages. An answer is right when it
is `correct`; one the judge could not decide, without tokens, or whose return is NaN is neither right nor wrong. A group
is mixed when it has both. An episode is one answer, and stands at its first row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_opd.objective.groups import correct, counts, group_sum, means, once
from xmodal_opd.types import TokenBatch

Mode = Literal["mean", "min_max"]
Direction = Literal["spread", "lift", "down"]


@dataclass(frozen=True)
class Sides:
    """The answers of a step by verdict."""

    batch: TokenBatch
    right: Bool[Tensor, " B"]
    wrong: Bool[Tensor, " B"]
    value: Float[Tensor, " B"]  # G, in float64

    @property
    def group(self) -> Int[Tensor, " B"]:
        """The answers' groups, numbered from 0."""
        return self.batch.group.unique(return_inverse=True)[1]

    def of_group(self, side: Bool[Tensor, " B"], how: str) -> Float[Tensor, " B"]:
        """The mean, amin or amax of G over one side of each answer's group; NaN where that side is empty."""
        group, empty = self.group, torch.full_like(self.value, torch.nan)
        return empty.scatter_reduce(0, group[side], self.value[side], how, include_self=False)[group]

    def count(self, side: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
        """How many answers of each answer's group are on that side."""
        return group_sum(self.batch, side, side)


def sides(batch: TokenBatch, adv: Float[Tensor, "B T"] | None = None) -> Sides:
    """Who is right and who is wrong; G is of `adv`, or 0. Reads scores["reward"] [B]."""
    right = correct(batch)
    adv = torch.zeros_like(batch.student_logp) if adv is None else adv
    value = means(batch, adv)
    decided = counts(batch) & once(batch) & ~value.isnan()
    return Sides(batch, decided & right, decided & ~right, value)


def margin(of: Sides, mode: Mode) -> Float[Tensor, " B"]:
    """How far the right answers of each group lie above the wrong ones: between their means, or from the best wrong to
    the worst right one (arXiv:2605.03677 Eq. 9 to 11). NaN where the group is not mixed."""
    lower, upper = ("mean", "mean") if mode == "mean" else ("amin", "amax")
    return of.of_group(of.right, lower) - of.of_group(of.wrong, upper)


def left_out(of: Sides, mode: Mode, delta: float, rho: float) -> Bool[Tensor, " B"]:
    """The answers that `fewest` takes out of each mixed group."""
    group, out = of.group, torch.zeros_like(of.right)
    for number in group[of.right].unique().tolist():
        here = group == number
        worst, best = (here & of.right).nonzero()[:, 0], (here & of.wrong).nonzero()[:, 0]
        if len(best):
            worst, best = worst[of.value[worst].argsort()], best[of.value[best].argsort(descending=True)]
            a, b = fewest(of.value[worst].tolist(), of.value[best].tolist(), mode, delta, rho)
            out[worst[:a]] = out[best[:b]] = True
    return out


def fewest(right: Sequence[float], wrong: Sequence[float], mode: Mode, delta: float, rho: float) -> tuple[int, int]:
    """How many of the lowest `right` and the highest `wrong` returns, each sorted so, greedily go: whichever raises the
    margin more, if it does, until it is `delta` or max(1, ⌊rho · n⌋) of a side's n are left."""

    def gap(a: int, b: int) -> float:
        return fmean(right[a:]) - fmean(wrong[b:]) if mode == "mean" else right[a] - wrong[b]

    most = [len(side) - max(1, int(rho * len(side))) for side in (right, wrong)]
    a, b = 0, 0
    while gap(a, b) < delta:
        next_ones = [(x, y) for x, y in ((a + 1, b), (a, b + 1)) if x <= most[0] and y <= most[1]]
        chosen = max(next_ones, key=lambda at: gap(*at), default=(a, b))
        if gap(*chosen) <= gap(a, b):
            break
        a, b = chosen
    return a, b


def surplus(of: Sides, draw: Float[Tensor, " B"], ratio: float) -> Bool[Tensor, " B"]:
    """The answers to leave out so that right : wrong = ratio : 1 in every mixed group, chosen by the lowest `draw`; at
    ratio 0 all right answers, at ∞ all wrong ones, whatever the group."""
    if ratio in (0, torch.inf):
        return of.wrong if ratio else of.right
    rights, wrongs = of.count(of.right), of.count(of.wrong)
    most_right, most_wrong = (wrongs * ratio).floor(), (rights / ratio).floor()
    over = (rights > most_right) & (most_right >= 1)
    under = ~over & (wrongs > most_wrong) & (most_wrong >= 1)
    excess = torch.where(of.right & over, rights - most_right, torch.where(of.wrong & under, wrongs - most_wrong, 0))
    return rank(3 * of.group + 1 * of.right + 2 * of.wrong, draw) < excess


def rank(kind: Int[Tensor, " B"], value: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The place of each answer among those of its kind by `value`, from 0."""
    order = value.argsort(stable=True)
    order = order[kind[order].argsort(stable=True)]
    counts = kind.unique(return_counts=True)[1]
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.empty_like(kind).index_copy(0, order, torch.arange(len(kind), device=kind.device) - first)


def order(of: Sides) -> dict[str, float]:
    """What Uni-OPD reports: the shares of groups (with a decided answer) that are all right, all wrong, mixed and
    consistent (no wrong answer has a higher return than a right one), mixed and reversed; the share of all pairs of a
    right and a wrong answer to one prompt that are reversed; and the mean return of either side."""
    here = of.right | of.wrong
    if not here.any():
        return {}
    first = here & (rank(of.group, (~here).double()) == 0)  # one answer for each group
    gap, rights, wrongs = margin(of, "min_max")[first], of.count(of.right)[first], of.count(of.wrong)[first]
    pairs = (of.batch.group[:, None] == of.batch.group) & of.right[:, None] & of.wrong
    shares = {"all_right": wrongs == 0, "all_wrong": rights == 0, "consistent": gap >= 0, "reversed": gap < 0}
    out = {name: share.double().mean().item() for name, share in shares.items()}
    if pairs.any():
        out["pair_reversal"] = (of.value[:, None] < of.value)[pairs].double().mean().item()
    returns = {"return_right": of.value[of.right], "return_wrong": of.value[of.wrong]}
    return out | {name: value.mean().item() for name, value in returns.items() if len(value)}
