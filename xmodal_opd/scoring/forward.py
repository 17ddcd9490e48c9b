"""What local models think of sampled answers: hidden states under a view, and the numbers read off them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xmodal_opd.models import head, hidden_repeated, hidden_shared, softcap
from xmodal_opd.objective import vocab
from xmodal_opd.objective.vocab import Divergence
from xmodal_opd.tokens import response_tokens
from xmodal_opd.types import Adapter, Rollout

Side = tuple[PreTrainedModel, Tensor]  # a model and its hidden states [B, T, H]


@dataclass(frozen=True)
class Responses:
    """Runs answers behind their prompts under any view, the prompt once per question where `share` holds."""

    adapter: Adapter
    share: bool = True

    def hidden(self, model: PreTrainedModel, rollouts: Sequence[Rollout], view: str, grad: bool = False) -> Tensor:
        """Hidden states [B, T, H] that predict each token of `rollouts` when the question is seen as `view`."""
        tokens = response_tokens(rollouts).to(model.device)
        if not self.share:
            prompts = self.prompts(model, rollouts, view)
            return hidden_repeated(model, prompts, tokens, grad)
        firsts = {id(r.pair): r for r in rollouts}
        place = {question: i for i, question in enumerate(firsts)}
        owner = torch.tensor([place[id(r.pair)] for r in rollouts], device=model.device)
        return hidden_shared(model, self.prompts(model, list(firsts.values()), view), tokens, owner, grad)

    def prompts(self, model: PreTrainedModel, rollouts: Sequence[Rollout], view: str) -> dict[str, Tensor]:
        with torch.autocast("cpu", enabled=False):  # features are the extractor's own, whatever the model runs in
            inputs = self.adapter.batch([r.pair.views[view] for r in rollouts])
        return {name: value.to(model.device) for name, value in inputs.items()}


def flat(hidden: Tensor, mask: Tensor) -> Tensor:
    """[N, H]: hidden states of real tokens only; `mask` [B, T'] may be wider than `hidden` [B, T, H]."""
    return hidden[mask[:, : hidden.shape[1]]]


def sampled_tokens(rollouts: Sequence[Rollout]) -> Tensor:
    """[N]: the tokens of all answers in the order of `flat`."""
    return torch.tensor([token for r in rollouts for token in r.tokens])


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] from values [N] of the real tokens, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def token_logp(model: PreTrainedModel, hidden: Tensor, rollouts: Sequence[Rollout], mask: Tensor) -> Tensor:
    """log p [B, T] of the sampled tokens, with gradient where `hidden` has one."""
    ids = sampled_tokens(rollouts).to(hidden.device)
    return spread(vocab.token_logp(flat(hidden, mask), head(model), ids, cap=softcap(model)), mask)


def divergence(fn: Divergence, student: Side, teacher: Side, mask: Tensor, size: int | None) -> Tensor:
    """fn(log p, log q) [B, T] over the whole vocabulary of `size`, with gradient to the student's side alone."""
    (model_s, hidden_s), (model_t, hidden_t) = student, teacher
    theirs = flat(hidden_t.detach(), mask).to(hidden_s.device)
    caps = softcap(model_s), softcap(model_t)
    per_token = vocab.divergence(fn, flat(hidden_s, mask), head(model_s), theirs, head(model_t), vocab=size, caps=caps)
    return spread(per_token, mask)


def divergence_of_both(fn: Divergence, student: Side, teacher: Side, mask: Tensor, size: int | None) -> Tensor:
    """The same value, with gradient to both sides: the teacher's from the divergence with its sides exchanged."""
    value = divergence(fn, student, teacher, mask, size)
    back = divergence(lambda q, p: fn(p, q), teacher, student, mask, size)
    return value + (back - back.detach()).to(value.device)


@torch.no_grad()
def statistics(
    model: PreTrainedModel, hidden: Tensor, rollouts: Sequence[Rollout], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """log-prob of the sampled tokens and entropy of the distribution they came from, each [B, T]."""
    ids = sampled_tokens(rollouts).to(hidden.device)
    logp, entropy = vocab.statistics(flat(hidden, mask), head(model), ids, cap=softcap(model))
    return spread(logp, mask), spread(entropy, mask)
