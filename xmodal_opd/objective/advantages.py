"""Advantage shapers: (batch, advantage so far) -> advantage, both [B, T]. A recipe lists them in order.

A response the judge could not decide has a NaN reward, and NaN is how it travels: `reward` lets it through, the group
statistics below skip it, and `Term.judge` ends it, once for every chain: no weight, no advantage, not counted as a
response. It is never a zero reward. Pieces that only ask who is right (`margin_shift`, `margin_mask`) leave such a
response the advantage it has.

Group statistics are over responses, not tokens: each counts once however long it is, with the mean of its tokens'
advantages as its value. A response without tokens does not count. A robot's response is its episode, see `groups.py`;
`discount` looks no further than a decision.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from xmodal_opd.objective.groups import correct, counts, group_statistics, group_sum, leaders, summed, tokens
from xmodal_opd.objective.order import Direction, Mode, left_out, margin, sides
from xmodal_opd.types import TokenBatch

Advantage = Float[Tensor, "B T"]


def reward(batch: TokenBatch, adv: Advantage, *, scale: float = 1.0) -> Advantage:
    """Add scale · r to every token of the response. Reads scores["reward"] [B]; NaN means undecided, see above."""
    return adv + scale * batch.scores["reward"][:, None]


def constant(batch: TokenBatch, adv: Advantage, *, value: float = 1.0) -> Advantage:
    """Add `value`: with `reinforce`, SFT on whatever was sampled. CORD, arXiv:2601.16547 Eq. 12."""
    return adv + value


def group_center(batch: TokenBatch, adv: Advantage) -> Advantage:
    """A − mean of the group; 0 for a group of one. CORD, arXiv:2601.16547 Eq. 9; Dr. GRPO, arXiv:2503.20783."""
    mean, _, _ = group_statistics(batch, adv)
    return adv - mean


def group_normalize(batch: TokenBatch, adv: Advantage, *, eps: float = 1e-6) -> Advantage:
    """(A − mean)/(std + eps), std unbiased; a group of one has mean 0, std 1. GRPO, arXiv:2402.03300."""
    mean, std, count = group_statistics(batch, adv)
    return torch.where(count > 1, adv - mean, adv) / (torch.where(count > 1, std, 1) + eps)


def leave_one_out(batch: TokenBatch, adv: Advantage) -> Advantage:
    """A − mean of the others = G/(G−1) (A − mean); a group of one has no others and keeps A. RLOO, arXiv:2402.14740."""
    mean, _, count = group_statistics(batch, adv)
    return torch.where(count > 1, count / (count - 1).clamp(min=1) * (adv - mean), adv)


def teacher_logratio(batch: TokenBatch, adv: Advantage, *, scale: float = 1.0, scorer: str = "teacher") -> Advantage:
    """Add scale · (log q − log p) of the sampled token. VLA-OPD, arXiv:2603.26666 Eq. 6; Uni-OPD, arXiv:2605.03677.

    Reads scores["<scorer>_logp"] [B, T]. ExOPD (arXiv:2602.12125) lists it twice: teacher by λ, reference by 1 − λ.
    """
    return adv + scale * (batch.scores[f"{scorer}_logp"] - batch.student_logp)


def kl_baseline(batch: TokenBatch, adv: Advantage, *, scale: float = 1.0, scorer: str = "teacher") -> Advantage:
    """Add scale · KL(p‖q), minus the mean of `teacher_logratio`: less variance, no bias. vOPD, arXiv:2605.07865.

    Reads scores["<scorer>_divergence"] [B, T], the reverse KL at the moment of sampling; give both pieces one scale.
    """
    return adv + scale * batch.scores[f"{scorer}_divergence"]


def margin_shift(
    batch: TokenBatch, adv: Advantage, *, delta: float = 0.4, mode: Mode = "mean", direction: Direction = "spread"
) -> Advantage:
    """Bring the margin m of right over wrong answers in each mixed group to δ: λ = max(0, δ − m) is added to the tokens
    of the right ones (lift), taken from the wrong ones (down), or half and half (spread). Uni-OPD, arXiv:2605.03677.

    Reads scores["reward"] [B]; `order.py` says what is right, mixed, and m. The paper: spread δ = 0.4 for text, lift 0
    for multimodal domains.
    """
    who = sides(batch, adv)
    shift = (delta - margin(who, mode)).clamp(min=0).nan_to_num(0)
    up, down = {"spread": (0.5, 0.5), "lift": (1.0, 0.0), "down": (0.0, 1.0)}[direction]
    shift = shift * (up * who.right.double() - down * who.wrong.double())
    return adv + shift[leaders(batch), None].to(adv.dtype)


def margin_mask(
    batch: TokenBatch, adv: Advantage, *, delta: float = 0.4, mode: Mode = "mean", rho: float = 0.25
) -> Advantage:
    """0 on the answers of mixed groups that greedily go, the lowest right or the highest wrong one, until the margin is
    δ or a share ρ of either side is left; they still count as answers. Uni-OPD, arXiv:2605.03677, instead of a shift.
    """
    gone = left_out(sides(batch, adv), mode, delta, rho)[leaders(batch)]
    return torch.where(gone[:, None], 0, adv)


def teacher_confidence(
    batch: TokenBatch, adv: Advantage, *, scale: float = 0.2, scorer: str = "teacher", limit: float = 2.0
) -> Advantage:
    """Add scale · clip(mean_t log q, −limit, 0) to correct responses: less for those the teacher would not have given.

    The reward A of OPOD, arXiv:2607.20918, over all tokens of the response, where the paper has those of its answer
    (reconstruction). Reads scores["reward"] [B] and scores["<scorer>_logp"] [B, T]; before the group's statistics.
    """
    total = summed(batch, torch.where(batch.mask, batch.scores[f"{scorer}_logp"], 0).sum(1))
    mean = total / tokens(batch).clamp(min=1)
    return adv + (scale * mean.clamp(-limit, 0) * correct(batch))[:, None].to(adv.dtype)


def discount(batch: TokenBatch, adv: Advantage, *, gamma: float = 1.0) -> Advantage:
    """Σ_{s≥t} γ^(s−t) A_s: a token also answers for what follows it. MiniLLM, arXiv:2306.08543."""
    counted = torch.where(batch.mask, adv, 0)
    total, out = torch.zeros_like(adv[:, :1]), []
    for column in reversed(counted.split(1, dim=1)):
        total = column + gamma * total
        out.append(total)
    return torch.cat(out[::-1], 1) if out else adv


def clip(batch: TokenBatch, adv: Advantage, *, limit: float = 5.0) -> Advantage:
    """Clamp to ±limit."""
    return adv.clamp(-limit, limit)


def stcr(
    batch: TokenBatch, adv: Advantage, *, base: float = 1.00001, of: Literal["wrong", "negative"] = "wrong"
) -> Advantage:
    """ω A: answers that are wrong and longer than the right ones of their group weigh more. APO, arXiv:2506.21655.

    ω = 2 − base^−δ where δ = L − mean length of the correct > 0, else 1; 1 where the group has none. Of the wrong, as
    in the paper's code, also those that the format lifts above the mean; of="negative": only where A < 0.
    Reads scores["reward"].
    """
    right, length = correct(batch) & counts(batch), tokens(batch)
    number = group_sum(batch, right, right)
    excess = length - group_sum(batch, length, right) / (number + 1e-9)
    longer = (counts(batch) & ~right & (number > 0) & (excess > 0))[:, None]
    omega = (2 - base ** -excess[:, None]).to(adv.dtype)
    return torch.where(longer & (adv < 0) if of == "negative" else longer, omega * adv, adv)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        reward,
        constant,
        group_center,
        group_normalize,
        leave_one_out,
        teacher_logratio,
        kl_baseline,
        teacher_confidence,
        margin_shift,
        margin_mask,
        discount,
        clip,
        stcr,
    )
}
