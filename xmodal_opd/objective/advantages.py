"""Advantage shapers: (batch, advantage so far) -> advantage, both [B, T]. A recipe lists them in order.

A response the judge could not decide has a NaN reward, and NaN is how it travels: `reward` lets it through, the group
statistics below skip it, and `Term.judge` ends it, once for every chain: no weight, no advantage, not counted as a
response. It is never a zero reward.

Group statistics are over responses, not tokens: each counts once however long it is, with the mean of its tokens'
advantages as its value. A response without tokens does not count.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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


def unjudged(batch: TokenBatch) -> Bool[Tensor, " B"]:
    """Responses whose reward is NaN: the judge could not decide. None of them where no judge ran."""
    rewards = batch.scores.get("reward")
    return torch.zeros_like(batch.group, dtype=torch.bool) if rewards is None else rewards.isnan()


def group_statistics(batch: TokenBatch, adv: Advantage) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std (0 for one) and number of the decided responses in each response's group, each [B, 1]."""
    tokens = batch.mask.sum(1)
    value = torch.where(batch.mask, adv, 0).double().sum(1) / tokens.clamp(min=1)  # float32 would tell lengths apart
    decided = (tokens > 0) & ~value.isnan()
    group = batch.group.unique(return_inverse=True)[1]

    def total(x: Tensor) -> Tensor:
        sums = torch.zeros(len(group), dtype=torch.float64, device=group.device)
        return sums.index_add(0, group[decided], x[decided])[group]

    count = total(torch.ones_like(value))
    mean = total(value) / count.clamp(min=1)
    std = (total((value - mean).square()) / (count - 1).clamp(min=1)).sqrt()
    return mean[:, None].to(adv.dtype), std[:, None].to(adv.dtype), count[:, None].to(adv.dtype)


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
        discount,
        clip,
    )
}
