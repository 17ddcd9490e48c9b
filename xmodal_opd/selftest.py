"""Before anything is measured: do sampler and training forward agree on the very same tokens?

A multimodal forward is easily off by a token or fed the wrong media, and training then fails in silence.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xmodal_opd import dist
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.scoring.forward import Responses, divergence, statistics, token_logp
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Rollout

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # nats
APART = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}  # of a gradient; a cut one is over 2 % off
PROBED = 8  # trainable tensors, from first to last, whose gradients are compared


class CannotShare(RuntimeError):
    """This model's prompt cannot be shared among its answers in the training forward; the message says why."""


def sharing(model: PreTrainedModel, responses: Responses, rollouts: Sequence[Rollout]) -> tuple[Responses, str]:
    """The self-test on sampled answers: `responses`, and where they may not share prompts although asked to, why.

    Call it within `Engine.whole`, on every rank with the same answers. Raises RuntimeError as `check_sampler` does.
    """
    alone, why = replace(responses, together=False), ""
    check_sampler(model, alone, rollouts)
    try:
        if responses.share:
            check_sharing(model, alone, rollouts)
    except CannotShare as error:
        why = str(error)
    whys = [reason for reason in dist.gather(why) if reason]
    return replace(responses, share=responses.share and not whys), "".join(whys[:1])


def check_sampler(model: PreTrainedModel, responses: Responses, rollouts: Sequence[Rollout]) -> float:
    """Largest difference of log-probs, sampler against the plain forward of the student view.

    Raises RuntimeError when it is over a hundred times the dtype's limit on a KL: a log-prob moves far more.
    """
    limit = 100 * LIMITS[model.dtype]
    batch = token_batch(rollouts)
    mask = batch.mask.to(model.device)
    hidden = replace(responses, share=False, together=False).hidden(model, rollouts, "student")
    logp, _ = statistics(model, hidden, rollouts, mask, responses.among)
    gap = float(((logp - batch.student_logp.to(model.device)) * mask).abs().max())
    if not gap <= limit:  # a NaN disagrees, too
        raise RuntimeError(
            f"sampler and training forward disagree on the same tokens: log-probs differ by {gap:.2g}, over {limit:g}; "
            "the prompt or its media are not the same on both sides, or servers compute in another dtype (--dtype)"
        )
    return gap


def check_sharing(model: PreTrainedModel, responses: Responses, rollouts: Sequence[Rollout]) -> float:
    """Largest KL between the forward that shares a prompt and the plain one; their gradients must agree too.

    Raises CannotShare when they do not, or when the model's cache fails.
    """
    if model.is_gradient_checkpointing:
        raise CannotShare("activation checkpointing runs a layer again without the cache that holds a shared prompt")
    mask = token_batch(rollouts).mask.to(model.device)
    plain, slope = probe(model, replace(responses, share=False, together=False), rollouts, mask)
    try:
        ours, shared_slope = probe(model, replace(responses, share=True, together=False), rollouts, mask)
    except Exception as error:  # whatever a family's cache does, training can go on without it
        raise CannotShare(f"{type(model).__name__} fails behind a shared prompt: {error}") from error
    with torch.no_grad():
        kl = float(divergence(reverse_kl, (model, ours), (model, plain), mask, responses.among).abs().max())
    apart = float((shared_slope - slope).norm() / slope.norm().clamp(min=1e-12))
    if not (kl <= LIMITS[model.dtype] and apart <= APART[model.dtype]):  # a NaN disagrees, too
        raise CannotShare(f"KL {kl:.2g} and {apart:.1%} of the gradient lie between a shared and a repeated prompt")
    return kl


def probe(
    model: PreTrainedModel, responses: Responses, rollouts: Sequence[Rollout], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states of the student view, and the gradient of the answers' log-prob in a few trainable tensors."""
    hidden = responses.hidden(model, rollouts, "student", grad=True)
    moving = [p for p in model.parameters() if p.requires_grad]
    some = moving[:: max(1, len(moving) // PROBED)]
    total = token_logp(model, hidden, rollouts, mask, responses.among).sum()
    slopes = torch.autograd.grad(total, some, allow_unused=True, materialize_grads=True)
    return hidden.detach(), torch.cat([s.flatten().float() for s in slopes])
