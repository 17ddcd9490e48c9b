"""What the answers to one prompt say together: [B] or [B, T] in, for each response the value of its group out.

A response counts when it has tokens and the judge could decide it: its reward is not NaN. A robot's response is an
episode: where scores["episode"] [B] exists, rows with one number there are decisions of one response, which counts once
and whose value is the mean over all its tokens. Elsewhere every row is a response.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from xmodal_opd.types import TokenBatch

PerResponse = Float[Tensor, " B"]


def leaders(batch: TokenBatch) -> Int[Tensor, " B"]:
    """The first row of each row's response: the row itself, but for an episode."""
    rows = torch.arange(len(batch.group), device=batch.group.device)
    episode = batch.scores.get("episode")
    if episode is None:
        return rows
    number = episode.unique(return_inverse=True)[1]
    return rows.scatter_reduce(0, number, rows, "amin", include_self=False)[number]


def once(batch: TokenBatch) -> Bool[Tensor, " B"]:
    """True at one row of every response."""
    return leaders(batch) == torch.arange(len(batch.group), device=batch.group.device)


def summed(batch: TokenBatch, values: Shaped[Tensor, " B"]) -> Shaped[Tensor, " B"]:
    """Σ of `values` over the rows of each row's response."""
    first = leaders(batch)
    return torch.zeros_like(values).index_add(0, first, values)[first]


def tokens(batch: TokenBatch) -> Int[Tensor, " B"]:
    """How many tokens each row's response has."""
    return summed(batch, batch.mask.sum(1))


def means(batch: TokenBatch, values: Float[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The mean of `values` over the tokens of each row's response, in float64: float32 would tell lengths apart."""
    return summed(batch, torch.where(batch.mask, values, 0).double().sum(1)) / tokens(batch).clamp(min=1)


def unjudged(batch: TokenBatch) -> Bool[Tensor, " B"]:
    """Responses whose reward is NaN: the judge could not decide. None of them where no judge ran."""
    rewards = batch.scores.get("reward")
    return torch.zeros_like(batch.group, dtype=torch.bool) if rewards is None else rewards.isnan()


def correct(batch: TokenBatch) -> Bool[Tensor, " B"]:
    """Reward of 1 or more: right, whatever half a point of format adds; the format alone is not. NaN is not.

    APO, arXiv:2506.21655, whose rewards are 0, 0.5, 1 and 1.5, writes it as trunc(R).
    """
    return batch.scores["reward"] >= 1


def counts(batch: TokenBatch) -> Bool[Tensor, " B"]:
    """Responses that have tokens and a verdict."""
    return (tokens(batch) > 0) & ~unjudged(batch)


def difficulty(batch: TokenBatch) -> PerResponse:
    """d = 1 − the share of its group that is correct; 1 for a group in which nothing counts. APO, arXiv:2506.21655."""
    counted = counts(batch)
    number = group_sum(batch, torch.ones_like(counted), counted)
    return 1 - group_sum(batch, correct(batch), counted) / number.clamp(min=1)


def group_sum(batch: TokenBatch, values: Tensor, counted: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Σ of `values` [B] over the `counted` responses of each response's group, in float64; of an episode as its first
    row has them."""
    group, counted = batch.group.unique(return_inverse=True)[1], counted & once(batch)
    sums = torch.zeros(len(group), dtype=torch.float64, device=group.device)
    return sums.index_add(0, group[counted], values[counted].double())[group]


def group_max(batch: TokenBatch, values: Tensor, counted: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The largest of `values` [B] over the `counted` responses of each response's group, in float64; 0 without any."""
    group = batch.group.unique(return_inverse=True)[1]
    most = torch.zeros(len(group), dtype=torch.float64, device=group.device)
    return most.scatter_reduce(0, group[counted], values[counted].double(), "amax", include_self=False)[group]


def group_statistics(batch: TokenBatch, adv: Float[Tensor, "B T"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased std (0 for one) and number of the decided responses in each response's group, each [B, 1].

    A response's value is the mean of its tokens' advantages; one that is NaN is not decided.
    """
    value = means(batch, adv)
    decided = (tokens(batch) > 0) & ~value.isnan()
    count = group_sum(batch, torch.ones_like(value), decided)
    mean = group_sum(batch, value, decided) / count.clamp(min=1)
    std = (group_sum(batch, (value - mean).square(), decided) / (count - 1).clamp(min=1)).sqrt()
    return mean[:, None].to(adv.dtype), std[:, None].to(adv.dtype), count[:, None].to(adv.dtype)
