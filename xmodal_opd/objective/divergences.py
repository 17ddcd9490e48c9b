"""How far the student p is from the teacher q at one token.

`DIVERGENCES` compare whole distributions: log-probabilities over the last axis in, one value per token out, at least
zero, and zero at p = q, but for `hard_ce`. `SAMPLED` estimate from the sampled token alone: its log p and log q in, one
value out. Masking, weighting, temperature, chunks and averages happen elsewhere, once. Gradients are in the student's
logits. `gaussian_reverse_kl` is for policies without a vocabulary, whose actions are continuous: no recipe names it.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs = Float[Tensor, "*tokens V"]
PerToken = Float[Tensor, "*tokens"]
Means = Float[Tensor, "*tokens D"]


def forward_kl(p: LogProbs, q: LogProbs) -> PerToken:
    """KL(q‖p) = Σ q (log q − log p): covers the teacher's modes. Gradient p − q. Hinton et al., arXiv:1503.02531."""
    return (q.exp() * (q - p)).sum(-1)


def reverse_kl(p: LogProbs, q: LogProbs) -> PerToken:
    """KL(p‖q) = Σ p (log p − log q): seeks the teacher's modes. Gradient p·(d − D). CORD, arXiv:2601.16547 Eq. 2."""
    return forward_kl(q, p)


def jeffreys(p: LogProbs, q: LogProbs, *, alpha: float = 0.5) -> PerToken:
    """α KL(q‖p) + (1−α) KL(p‖q): forward at alpha=1, reverse at alpha=0."""
    return alpha * forward_kl(p, q) + (1 - alpha) * reverse_kl(p, q)


def jsd(p: LogProbs, q: LogProbs, *, beta: float = 0.5) -> PerToken:
    """β KL(q‖m) + (1−β) KL(p‖m), m = βq + (1−β)p. Generalised JSD of GKD, arXiv:2306.13649.

    beta=0 is the forward KL(q‖p) and beta=1 the reverse KL(p‖q), the limits of JSD/β and JSD/(1−β): the JSD itself
    tends to 0 at both ends, so a small beta is a weak loss, not a forward KL.
    """
    if beta in (0, 1):
        return forward_kl(p, q) if beta == 0 else reverse_kl(p, q)
    m = log_mix(q, p, beta)
    return beta * forward_kl(m, q) + (1 - beta) * forward_kl(m, p)


def skew_forward_kl(p: LogProbs, q: LogProbs, *, alpha: float = 0.1) -> PerToken:
    """KL(q ‖ αq + (1−α)p), 0 ≤ α < 1. DistiLLM, arXiv:2402.03898."""
    return forward_kl(log_mix(q, p, alpha), q)


def skew_reverse_kl(p: LogProbs, q: LogProbs, *, alpha: float = 0.1) -> PerToken:
    """KL(p ‖ αp + (1−α)q), 0 ≤ α < 1. DistiLLM, arXiv:2402.03898."""
    return forward_kl(log_mix(p, q, alpha), p)


def total_variation(p: LogProbs, q: LogProbs) -> PerToken:
    """½ Σ |p − q|. f-DISTILL, arXiv:2307.15190."""
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def hellinger(p: LogProbs, q: LogProbs) -> PerToken:
    """½ Σ (√p − √q)² = 1 − Σ √(pq), the squared Hellinger distance; bounded where a KL is not."""
    return ((p / 2).exp() - (q / 2).exp()).square().sum(-1) / 2


def hard_ce(p: LogProbs, q: LogProbs) -> PerToken:
    """−log p(argmax q), the cross-entropy with the teacher's choice: DAgger, and Hard-CE in VLA-OPD, arXiv:2603.26666.

    No divergence: it is the forward KL from all mass on that choice, whose entropy is 0, so nothing could be subtracted
    that is not 0 already. At p = q it is −log max q, with a gradient that goes on towards certainty.
    """
    return -p.gather(-1, q.argmax(-1, keepdim=True))[..., 0]


def topk_forward_kl(p: LogProbs, q: LogProbs, *, k: int = 20, by: str = "teacher", rest: str = "bucket") -> PerToken:
    """KL(q‖p) on the k likeliest tokens of `by`, "teacher" (arXiv:2306.13649 as practised) or "student".

    The mass outside them: rest="bucket" is one more token, "renormalise" is forgotten by both sides, "drop" leaves the
    truncated sum Σ_K q (log q − log p), whose gradient at p = q is not zero: it pulls mass into the support.
    """
    return forward_kl(*on_support(p, q, k, by, rest))


def topk_reverse_kl(p: LogProbs, q: LogProbs, *, k: int = 20, by: str = "student", rest: str = "bucket") -> PerToken:
    """KL(p‖q) on the k likeliest tokens of `by`, "student" or "teacher". SDPO, arXiv:2601.20802; arXiv:2605.11182.

    The mass outside them: rest="bucket" is one more token, "renormalise" is forgotten by both sides, "drop" leaves the
    truncated sum Σ_K p (log p − log q). Differentiated as it stands that sum carries the gradient of Σ_K p, which
    drains mass out of the support even at p = q; here its log p is a constant, which removes exactly that part.
    """
    p, q = on_support(p, q, k, by, rest)
    return (p.exp() * (p.detach() - q)).sum(-1) if rest == "drop" else reverse_kl(p, q)


def topk_jsd(
    p: LogProbs, q: LogProbs, *, k: int = 20, by: str = "student", rest: str = "bucket", beta: float = 0.5
) -> PerToken:
    """`jsd` on the k likeliest tokens of `by`, with the rest as a "bucket" or "renormalise". SDPO, arXiv:2601.20802."""
    if rest == "drop":
        raise ValueError("topk_jsd takes rest='bucket' or 'renormalise': a truncated JSD is not a divergence")
    return jsd(*on_support(p, q, k, by, rest), beta=beta)


def on_support(p: LogProbs, q: LogProbs, k: int, by: str, rest: str) -> tuple[Tensor, Tensor]:
    """Both rows on the k likeliest tokens of `by`: [.., k], or [.., k+1] with the bucket of all other mass."""
    if by not in ("student", "teacher") or rest not in ("bucket", "renormalise", "drop"):
        raise ValueError(f"by={by!r}, rest={rest!r}: by is student or teacher; rest is bucket, renormalise or drop")
    if k >= p.shape[-1]:
        return p, q
    index = (p if by == "student" else q).topk(k, dim=-1).indices
    if rest == "bucket":
        return with_bucket(p, index), with_bucket(q, index)
    top_p, top_q = p.gather(-1, index), q.gather(-1, index)
    return (top_p, top_q) if rest == "drop" else (top_p.log_softmax(-1), top_q.log_softmax(-1))


def with_bucket(logp: LogProbs, index: Tensor) -> Tensor:
    outside = logp.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)  # exact where 1 − Σ top would cancel
    return torch.cat([logp.gather(-1, index), outside], -1)


def log_mix(a: LogProbs, b: LogProbs, weight: float) -> LogProbs:
    """log(w·eᵃ + (1−w)·eᵇ) in log space, 0 ≤ w < 1."""
    return torch.logaddexp(a + math.log(weight), b + math.log(1 - weight)) if weight else b


def k1(logp: PerToken, logq: PerToken) -> PerToken:
    """log p − log q. Unbiased for KL(p‖q) as a number; as a loss its expected gradient is ZERO: use it in rewards."""
    return logp - logq


def k2(logp: PerToken, logq: PerToken) -> PerToken:
    """½ (log p − log q)². Biased as a number; as a loss its expected gradient is that of the reverse KL(p‖q)."""
    return (logp - logq).square() / 2


def k3(logp: PerToken, logq: PerToken) -> PerToken:
    """q/p − 1 − log(q/p). Unbiased for KL(p‖q), ≥ 0; as a loss its expected gradient is that of the FORWARD KL(q‖p)."""
    return (logq - logp).expm1() - (logq - logp)


def one_sided(logp: PerToken, logq: PerToken) -> PerToken:
    """relu(log q − log p): a loss only where the teacher is ahead, with gradient −∇log p there. OPOD, arXiv:2607.20918.

    No divergence: it is 0 wherever the student is ahead, and its mean need not fall to 0 as p nears q.
    """
    return (logq - logp).relu()  # clamp has a slope at 0 as well, where the teacher is not ahead


def gaussian_reverse_kl(p: Means, q: Means, std: Means | float) -> PerToken:
    """KL(N(p, σ²) ‖ N(q, σ²)) = Σ (p − q)² / 2σ² of two means with one σ. Gradient (p − q)/σ². Flow-DPPO,
    arXiv:2606.11025 Eq. 14.

    Means [.., D] of the student and the teacher for each step, of an action or of its denoising; one value per step,
    which is what a `Term` masks, weighs and averages as it does tokens. Over D numbers it is the sum; the paper's code
    takes their mean, so its thresholds are for this by D.
    """
    return ((p - q) / std).square().sum(-1) / 2


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        forward_kl,
        reverse_kl,
        jeffreys,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        hellinger,
        hard_ce,
        topk_forward_kl,
        topk_reverse_kl,
        topk_jsd,
    )
}
SAMPLED: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (k1, k2, k3, one_sided)}
