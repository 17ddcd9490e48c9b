"""Reductions: the whole step -> a factor for each of its rows [B, 1]. Loss of the step: Σ factor · per token.

Factors belong to the step, not to a micro-batch, so the losses of micro-batches simply add up. A response counts when
at least one of its tokens does: one the judge could not decide leaves the mean instead of pulling it to zero. A robot's
response is its episode, see `groups.py`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from xmodal_opd.objective.groups import once, tokens
from xmodal_opd.types import TokenBatch

Factor = Float[Tensor, "B 1"]


def sequence(batch: TokenBatch) -> Factor:
    """Σ over tokens, mean over responses. CORD, arXiv:2601.16547 Eq. 7 and 10; VLA-OPD, arXiv:2603.26666 Eq. 7."""
    return ones(batch) / responses(batch)


def token(batch: TokenBatch) -> Factor:
    """Mean over the tokens of the step: long responses weigh more. DAPO, arXiv:2503.14476."""
    return ones(batch) / batch.mask.sum().clamp(min=1)


def sequence_token_mean(batch: TokenBatch) -> Factor:
    """Mean over responses of the mean over tokens. GRPO, arXiv:2402.03300; GSPO, arXiv:2507.18071."""
    return ones(batch) / tokens(batch)[:, None].clamp(min=1) / responses(batch)


def constant(batch: TokenBatch, *, length: int) -> Factor:
    """Σ over tokens / (responses · length), one length for all. Dr. GRPO, arXiv:2503.20783, with `group_center`."""
    return sequence(batch) / length


def ones(batch: TokenBatch) -> Factor:
    return torch.ones(len(batch.mask), 1, device=batch.mask.device)


def responses(batch: TokenBatch) -> Tensor:
    return ((tokens(batch) > 0) & once(batch)).sum().clamp(min=1)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (sequence, token, sequence_token_mean, constant)}
