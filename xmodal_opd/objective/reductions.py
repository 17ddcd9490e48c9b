"""Reductions: mask of the whole step [B, T] -> factor per response [B, 1]. Loss of the step: Σ factor · per token.

Factors belong to the step, not to a micro-batch, so the losses of micro-batches simply add up. A response counts when
at least one of its tokens does: one the judge could not decide leaves the mean instead of pulling it to zero.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mask = Bool[Tensor, "B T"]
Factor = Float[Tensor, "B 1"]


def sequence(mask: Mask) -> Factor:
    """Σ over tokens, mean over responses. CORD, arXiv:2601.16547 Eq. 7 and 10; VLA-OPD, arXiv:2603.26666 Eq. 7."""
    return ones(mask) / responses(mask)


def token(mask: Mask) -> Factor:
    """Mean over the tokens of the step: long responses weigh more. DAPO, arXiv:2503.14476."""
    return ones(mask) / mask.sum().clamp(min=1)


def sequence_token_mean(mask: Mask) -> Factor:
    """Mean over responses of the mean over tokens. GRPO, arXiv:2402.03300; GSPO, arXiv:2507.18071."""
    return ones(mask) / mask.sum(1, keepdim=True).clamp(min=1) / responses(mask)


def constant(mask: Mask, *, length: int) -> Factor:
    """Σ over tokens / (responses · length), one length for all. Dr. GRPO, arXiv:2503.20783, with `group_center`."""
    return sequence(mask) / length


def ones(mask: Mask) -> Factor:
    return torch.ones(len(mask), 1, device=mask.device)


def responses(mask: Mask) -> Tensor:
    return mask.any(1).sum().clamp(min=1)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (sequence, token, sequence_token_mean, constant)}
