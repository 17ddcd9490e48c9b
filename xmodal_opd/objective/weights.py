"""Token weights: which response tokens teach, and how much. Each returns [B, T], ≥ 0; those in a recipe multiply.

`STEP_WEIGHTS` may look at the whole step (quantiles, minima, maxima). `ROW_WEIGHTS` give a response a weight that
depends on that response alone, so a micro-batch may judge them: rows cut from the step keep their weights.
Called without gradient; values outside the mask are finite and meaningless.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_opd.objective.groups import (
    correct,
    difficulty,
    group_max,
    group_statistics,
    group_sum,
    leaders,
    means,
    tokens,
)
from xmodal_opd.objective.order import sides, surplus
from xmodal_opd.types import TokenBatch

Weights = Float[Tensor, "B T"]
Level = Literal["token", "sequence", "geometric"]


def student_entropy(batch: TokenBatch, *, keep: float = 0.2) -> Weights:
    """1 on the `keep` fraction of the step's tokens where the student is least sure, else 0. arXiv:2506.01939.

    Reads scores["student_entropy"] [B, T]. Tokens equal to the quantile are all kept.
    """
    entropy = batch.scores["student_entropy"]
    if not batch.mask.any():
        return torch.zeros_like(entropy)
    return (entropy >= torch.quantile(entropy[batch.mask], 1 - keep)).to(entropy.dtype)


def tip(batch: TokenBatch, *, keep: float = 0.5, scorer: str = "teacher") -> Weights:
    """Mean-one weight on the ⌊keep·T⌋ tokens of each response with the highest h + d − h·d. arXiv:2604.14084 Eq. 5.

    h: scores["student_entropy"], cut at its 98th percentile; d: scores["<scorer>_divergence"]; both scaled to [0, 1]
    over the step. With `reduction: token` the loss is the paper's mean over kept tokens. Below keep=0.5 the uncertain
    tokens crowd out the confidently wrong ones: `tip_confident` keeps those.
    """
    h, d = tip_axes(batch, scorer)
    return keep_per_response(h + d - h * d, batch.mask, keep)


def tip_confident(batch: TokenBatch, *, keep: float = 0.1, scorer: str = "teacher") -> Weights:
    """As `tip`, scored by d·(1 − h): confident and wrong, quadrant 3 of arXiv:2604.14084 (score reconstructed)."""
    h, d = tip_axes(batch, scorer)
    return keep_per_response(d * (1 - h), batch.mask, keep)


def dads(
    batch: TokenBatch,
    *,
    form: Literal["saturating", "exponential"] = "saturating",
    positive: Literal["advantage", "correct"] = "advantage",
) -> Weights:
    """κ = f(d) on positive responses, 1 on others: a hard prompt frees what succeeds on it. APO, arXiv:2506.21655.

    f(d) = 1 − exp(−e (1 − d)), or exp(−e d) ("exponential", which stands in the paper's code too, put out);
    f(0) = f(1) = 1; d: see `difficulty`. Positive: a reward above the group's mean, as in that code, so also a wrong
    answer in the right format among worse; or only a correct one. Reads scores["reward"]; an undecided response has 1.
    """
    d, reward = difficulty(batch)[:, None], batch.scores["reward"][:, None]
    f = 1 - (-math.e * (1 - d)).exp() if form == "saturating" else (-math.e * d).exp()
    above = reward > group_statistics(batch, reward.expand(batch.mask.shape))[0]
    shaped = (above if positive == "advantage" else correct(batch)[:, None]) & (d > 0) & (d < 1)
    return torch.where(shaped, f, 1).to(batch.student_logp.dtype).expand(batch.mask.shape)


def balance(batch: TokenBatch, *, ratio: Annotated[float, 0] = 1.0) -> Weights:
    """0 on right answers, or on wrong ones, that their group has too many of for right : wrong = `ratio` : 1, else 1.

    Uni-OPD, arXiv:2605.03677: chosen at random, by scores["draw"] [B]; they still count in the reduction and in what
    advantages know of the group. Groups that are all right or all wrong stay, but for ratio 0 (wrong answers only) and
    ∞ (right ones only). Reads scores["reward"] [B]; what is right is said in `order.py`.
    """
    if not ratio >= 0:
        raise ValueError(f"balance: ratio is {ratio}; give right answers for one wrong one: a number from 0, or .inf")
    left = surplus(sides(batch), batch.scores["draw"], ratio)[leaders(batch)]
    return torch.where(left[:, None], 0, torch.ones_like(batch.student_logp))


def media_rollouts(
    batch: TokenBatch, *, tau: float = 1.0, scorer: str = "teacher", without: str = "degraded"
) -> Weights:
    """G·softmax(z/τ) over each group of G answers, one weight an answer, 1 on average; z: how much its tokens need the
    media on average, less the group's mean, over the group's population std. VA-OPD, arXiv:2605.21924 Eq. 2–6.

    Reads what `media_tokens` reads. Where answers need the media alike, all weigh 1.
    """
    need = media_need(batch, scorer, without).double()
    counted, own = tokens(batch) > 0, means(batch, need)
    mean, std, count = (x[:, 0] for x in group_statistics(batch, need))
    spread = std * ((count - 1) / count.clamp(min=1)).clamp(min=0).sqrt()
    z = (own - mean) / spread.clamp(min=1e-6)
    share = ((z - group_max(batch, z, counted)) / tau).clamp(max=0).exp()  # 1 for the largest: nothing overflows
    total = group_sum(batch, share, counted).clamp(min=1)
    return (count * share / total)[:, None].to(batch.student_logp.dtype).expand_as(batch.student_logp)


def dual(batch: TokenBatch) -> Weights:
    """β of the response's kind of sample, from scores["dual"] [B], which `dual:` in a recipe makes. OPOD,
    arXiv:2607.20918."""
    return batch.scores["dual"][:, None].to(batch.student_logp.dtype).expand_as(batch.student_logp)


def top_kl(batch: TokenBatch, *, k: int = 20, alpha: float = 2.0) -> Weights:
    """α on the k largest divergences of each response, 1 elsewhere; all α when T ≤ k. CORD, arXiv:2601.16547 Eq. 4.

    Reads scores["divergence"] [B, T], which the loss fills in. Of equal values the earlier token is chosen.
    """
    divergence = batch.scores["divergence"]
    top = top_of_response(divergence, batch.mask, torch.full_like(batch.group, k))
    return 1 + (alpha - 1) * top.to(divergence.dtype)


def position_linear(batch: TokenBatch, *, beta: float = 2.0) -> Weights:
    """β − (β−1)·(t−1)/(T−1): β at the first token, 1 at the last, β when T = 1. CORD, arXiv:2601.16547 Eq. 5."""
    last = (batch.mask.sum(1, keepdim=True) - 1).clamp(min=1)
    return beta - (beta - 1) * places(batch) / last


def position_decay(batch: TokenBatch, *, half_life: float = 256.0) -> Weights:
    """2^(−t/half_life), t = 0 at the first token: early tokens fix the course of a response."""
    return 0.5 ** (places(batch) / half_life)


def prefix(batch: TokenBatch, *, tokens: int = 64) -> Weights:
    """1 on the first `tokens` tokens of a response, 0 after. Many Faces of OPD, arXiv:2605.11182, uses 2048."""
    return (places(batch) < tokens).to(batch.student_logp.dtype)


def media_tokens(
    batch: TokenBatch, *, keep: float = 0.2, share: float = 0.5, scorer: str = "teacher", without: str = "degraded"
) -> Weights:
    """`share` of an answer's weight on its ⌈keep·T⌉ tokens that need the media most, the rest on the others; 1 on
    average. VA-OPD, arXiv:2605.21924 Eq. 2–6: a token needs a = relu(log q(y|media) − log q(y|degraded media)).

    Reads scores["<scorer>_logp"] and scores["<without>_logp"] [B, T]. With `reduction: sequence_token_mean` the loss is
    share · mean of those + (1 − share) · mean of the others. An answer that needs no media weighs 1 throughout.
    """
    need, tokens = media_need(batch, scorer, without), batch.mask.sum(1, keepdim=True)
    count = (keep * tokens - 1e-4).ceil()  # 0.2 · 15 is a little over 3
    top = top_of_response(need, batch.mask, count[:, 0].long()).to(need.dtype)
    split = top * share * tokens / count.clamp(min=1) + (1 - top) * (1 - share) * tokens / (tokens - count).clamp(min=1)
    even = (count >= tokens) | (torch.where(batch.mask, need, 0).amax(1, keepdim=True) == 0)
    return torch.where(even, 1, split)


def gap_mask(batch: TokenBatch, *, limit: float = 10.0, scorer: str = "teacher") -> Weights:
    """0 on tokens with |log p − log q| ≥ `limit`, else 1; they still count in the reduction. Uni-OPD, arXiv:2605.03677.

    Reads scores["<scorer>_logp"] [B, T].
    """
    gap = batch.student_logp - batch.scores[f"{scorer}_logp"]
    return (gap.abs() < limit).to(gap.dtype)


def gate(batch: TokenBatch, *, score: str = "text_reward", above: float = 0.5) -> Weights:
    """1 on responses whose scores[score] [B] is over `above`, else 0; NaN is not. They still count in the reduction.

    RT-OPD, arXiv:2609.28778, distils where the teacher's own answer is right. Reconstruction: right is what the judge
    says of another sampling's answers to the question; scores["<sampling>_reward"] is their mean reward.
    """
    return (batch.scores[score] > above)[:, None].to(batch.student_logp.dtype).expand_as(batch.student_logp)


def tis(batch: TokenBatch, *, cap: float = 2.0, level: Level = "token") -> Weights:
    """min(ρ, C): importance weights for answers of a sampler that is not quite the trainer, truncated at `cap` = C.

    ρ = exp(student_logp − scores["sampler_logp"]) of the token; level: of the whole answer, Π ρ ("sequence", exact as
    C → ∞ but of high variance), or (Π ρ)^(1/T) ("geometric"). Truncation: IMPALA, arXiv:1802.01561 Eq. 1.
    """
    return sampling_ratio(batch, level).clamp(max=cap)


def mismatch_mask(batch: TokenBatch, *, low: float = 0.5, high: float = 5.0, level: Level = "token") -> Weights:
    """1 where low ≤ ρ ≤ high, else 0, with ρ of the token, the answer or its geometric mean as in `tis`.

    A masked token still counts in the reduction. On tokens and with `tis: {cap: .inf}` it is IcePop, arXiv:2510.18855,
    whose bounds are the defaults; on answers the masked importance sampling of verl and ms-swift. A geometric mean
    strays far less than a token: [0.99, 1.01] is then a usual window.
    """
    ratio = sampling_ratio(batch, level)
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


def sampling_ratio(batch: TokenBatch, level: Level) -> Weights:
    """ρ at each token, log ρ held within ±20; one value for a whole answer where `level` says so."""
    logs = torch.where(batch.mask, batch.student_logp - batch.scores["sampler_logp"], 0)
    if level != "token":
        tokens = batch.mask.sum(1, keepdim=True).clamp(min=1) if level == "geometric" else 1
        logs = (logs.sum(1, keepdim=True) / tokens).expand_as(logs)
    return logs.clamp(-20, 20).exp()


def media_need(batch: TokenBatch, scorer: str, without: str) -> Weights:
    """How much likelier the teacher finds each token with the media than without, at least 0."""
    return (batch.scores[f"{scorer}_logp"] - batch.scores[f"{without}_logp"]).clamp(min=0)


def tip_axes(batch: TokenBatch, scorer: str) -> tuple[Weights, Weights]:
    """Uncertainty and disagreement of each token, each scaled to [0, 1] over the step (log V cancels)."""
    h, d = batch.scores["student_entropy"], batch.scores[f"{scorer}_divergence"].clamp(min=0)
    if batch.mask.any():
        h = h.clamp(max=torch.quantile(h[batch.mask], 0.98).item())
    return min_max(h, batch.mask), min_max(d, batch.mask)


def min_max(value: Weights, mask: Bool[Tensor, "B T"]) -> Weights:
    if not mask.any():
        return torch.zeros_like(value)
    low, high = value[mask].aminmax()
    return ((value - low) / (high - low).clamp(min=torch.finfo(value.dtype).tiny)).clamp(0, 1)


def keep_per_response(score: Weights, mask: Bool[Tensor, "B T"], keep: float) -> Weights:
    kept = top_of_response(score, mask, (keep * mask.sum(1)).floor().long()).to(score.dtype)
    return kept * (mask.sum() / kept.sum().clamp(min=1))


def top_of_response(score: Weights, mask: Bool[Tensor, "B T"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B T"]:
    """True on the `count` highest scores of each response; ties go to the earlier token, padding is never chosen."""
    order = score.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < count[:, None]) & mask


def places(batch: TokenBatch) -> Weights:
    """0, 1, 2 … on the counted tokens of each response."""
    return (batch.mask.cumsum(1) - 1).clamp(min=0).to(batch.student_logp.dtype)


STEP_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (student_entropy, tip, tip_confident, dads, balance, media_rollouts, dual)
}
ROW_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (top_kl, position_linear, position_decay, prefix, media_tokens, gate, gap_mask, tis, mismatch_mask)
}
WEIGHTS: dict[str, Callable[..., Tensor]] = STEP_WEIGHTS | ROW_WEIGHTS
