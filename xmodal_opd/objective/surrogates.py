"""Policy-gradient surrogates: (log ratio, advantage, mask) -> loss per token, all [B, T].

log ratio = log p now − log p at sampling, so r = exp(log ratio) is 1 on the first update, where every surrogate has the
gradient −A ∇log p. Values outside the mask are meaningless.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]


def reinforce(log_ratio: PerToken, adv: PerToken, mask: Mask) -> PerToken:
    """−A (log p − log p at sampling): the gradient −A ∇log p whatever the ratio. CORD, arXiv:2601.16547 Eq. 10."""
    return -adv * log_ratio


def importance(log_ratio: PerToken, adv: PerToken, mask: Mask) -> PerToken:
    """−r A, log r held within ±20."""
    return -ratio(log_ratio) * adv


def ppo_clip(
    log_ratio: PerToken, adv: PerToken, mask: Mask, *, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> PerToken:
    """−min(r A, clip(r, 1−low, 1+high) A). PPO, arXiv:1707.06347; high=0.28 is DAPO, arXiv:2503.14476.

    dual=c > 1 also bounds the loss of a negative advantage by c·|A|. Dual-clip PPO, arXiv:1912.09729.
    """
    loss = clipped(ratio(log_ratio), adv, low, high)
    return loss if dual is None else torch.where(adv < 0, torch.minimum(loss, -dual * adv), loss)


def cispo(log_ratio: PerToken, adv: PerToken, mask: Mask, *, low: float = 1.0, high: float = 4.0) -> PerToken:
    """−sg(clip(r, 1−low, 1+high)) A log p: clips the weight, never the gradient. MiniMax-M1, arXiv:2506.13585."""
    return -ratio(log_ratio).clamp(1 - low, 1 + high).detach() * adv * log_ratio


def gspo(log_ratio: PerToken, adv: PerToken, mask: Mask, *, low: float = 3e-4, high: float = 4e-4) -> PerToken:
    """ppo_clip on the sequence ratio s = exp(mean_t log r), token form sg(s)·r/sg(r). GSPO, arXiv:2507.18071.

    With `reduction: sequence_token_mean` its gradient equals that of the sequence form −min(s A, clip(s) A).
    """
    counted = torch.where(mask, log_ratio, 0)
    mean = (counted.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).detach().clamp(max=10)
    return clipped((mean + log_ratio - log_ratio.detach()).exp(), adv, low, high)


def ratio(log_ratio: PerToken) -> PerToken:
    return log_ratio.clamp(-20, 20).exp()


def clipped(r: PerToken, adv: PerToken, low: float, high: float) -> PerToken:
    return -torch.minimum(r * adv, r.clamp(1 - low, 1 + high) * adv)


SURROGATES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (reinforce, importance, ppo_clip, cispo, gspo)}
