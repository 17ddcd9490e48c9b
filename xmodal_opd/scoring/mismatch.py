"""Sampler and trainer apart: what the trainer thinks of answers that another program, or older weights, sampled."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xmodal_opd.objective import name_of_piece
from xmodal_opd.objective.divergences import k3
from xmodal_opd.scoring.forward import Responses, token_logp
from xmodal_opd.types import Rollout, TokenBatch


@torch.no_grad()
def trainer_logp(
    model: PreTrainedModel,
    responses: Responses,
    rollouts: Sequence[Rollout],
    views: Sequence[str],
    mask: Tensor,
    pieces: Callable[[Sequence[Rollout]], list[list[int]]],
) -> Tensor:
    """log p [B, T] of the sampled tokens under `model` as it is now, computed as the loss will: the ratio starts at 1.

    views: the view each answer was sampled from. pieces: which answers fit into one forward.
    """
    out = torch.zeros(mask.shape)
    for view in sorted(set(views)):
        mine = [row for row, seen in enumerate(views) if seen == view]
        for piece in pieces([rollouts[row] for row in mine]):
            rows = [mine[i] for i in piece]
            some = [rollouts[row] for row in rows]
            here = mask[rows].to(model.device)
            logp = token_logp(model, responses.hidden(model, some, view), some, here, responses.among)
            out[rows] = logp.float().cpu()
    return out


def mismatch(batch: TokenBatch) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's, under TRL's names where it has one.

    `sampling/kl`: the k3 estimate of KL(sampler ‖ trainer) in nats a token. Empty without tokens.
    """
    if not batch.mask.any():
        return {}
    trainer, sampler = (x[batch.mask].double() for x in (batch.student_logp, batch.scores["sampler_logp"]))
    apart, ratio = (trainer - sampler).abs(), (trainer - sampler).clamp(-20, 20).exp()
    return {
        "sampling/sampling_logp_difference/mean": apart.mean().item(),
        "sampling/sampling_logp_difference/max": apart.max().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
        "sampling/kl": k3(sampler, trainer).mean().item(),
    }


def likelihood(batch: TokenBatch) -> dict[str, float]:
    """`nll`: the mean of −log p of the tokens under the trainer, in nats; of answers that nobody sampled."""
    return {"nll": -batch.student_logp[batch.mask].double().mean().item()}


def corrected(weight: Callable[..., Tensor], batch: TokenBatch) -> dict[str, float]:
    """The share of tokens that a `tis` holds at its cap, or a `mismatch_mask` leaves out; nothing for other weights."""
    name = name_of_piece(weight)
    if name not in ("tis", "mismatch_mask") or not batch.mask.any():
        return {}
    now = weight(batch)
    hit = now == 0 if name == "mismatch_mask" else now < partial(weight, cap=math.inf)(batch)
    return {f"sampling/{'capped' if name == 'tis' else 'masked'}_ratio": hit[batch.mask].double().mean().item()}
