"""Before the first step: do sampler, training forward and teacher agree on the very same tokens?

Multimodal teachers are easily misaligned by a token or fed the wrong media, and training then fails in silence.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.scoring.forward import Responses, divergence, statistics
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Rollout

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # nats


@torch.no_grad()
def self_test(model: PreTrainedModel, responses: Responses, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Largest disagreements on `rollouts` (student view, no dropout): of prompt-sharing and repeated forward as a KL,
    and of sampler and forward as a log-prob. Raises RuntimeError when one is over the dtype's limit.
    """
    limit = LIMITS[model.dtype]
    mask = token_batch(rollouts).mask.to(model.device)
    plain = Responses(responses.adapter, share=False).hidden(model, rollouts, "student")
    ours = responses.hidden(model, rollouts, "student")
    kl = float(divergence(reverse_kl, (model, ours), (model, plain), mask, None).abs().max())
    logp, _ = statistics(model, plain, rollouts, mask)
    sampled = token_batch(rollouts).student_logp.to(model.device)
    gap = float(((logp - sampled) * mask).abs().max())
    found = {"selftest/prefix_kl": kl, "selftest/sampler_gap": gap}
    if kl > limit:
        raise RuntimeError(
            f"the training forward disagrees with itself: KL {kl:.2g} between sharing a prompt and repeating it, over "
            f"{limit:g}; set engine.share_prefix=false, and report this model"
        )
    if gap > 100 * limit:  # a log-prob moves far more than a KL does
        raise RuntimeError(
            f"sampler and training forward disagree on the same tokens: log-probs differ by {gap:.2g}, over "
            f"{100 * limit:g}; the prompt or its media are not the same on both sides"
        )
    return found
