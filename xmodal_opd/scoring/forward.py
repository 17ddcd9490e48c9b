"""What local models think of sampled answers: hidden states under a view, and the numbers read off them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xmodal_opd import dist
from xmodal_opd.hidden import head, hidden_repeated, hidden_shared, inputs_on, softcap
from xmodal_opd.objective import vocab
from xmodal_opd.objective.vocab import Divergence, Window
from xmodal_opd.tokens import response_tokens
from xmodal_opd.types import Adapter, Inputs, Rollout, TeacherSignal

Side = tuple[PreTrainedModel, Tensor]  # a model and its hidden states [B, T, H]


@dataclass(frozen=True)
class Responses:
    """Runs answers behind their prompts under any view, the prompt once per question where `share` holds."""

    adapter: Adapter
    share: bool = True
    together: bool = False  # every rank makes the same calls, and runs the parts of the model that any of them needs
    among: slice | None = None  # the only ids that answers are chosen from; None: any
    placeholder: int | None = None  # fed in place of an answer's own tokens, which then do not depend on each other
    temperature: float = 1.0  # of the policy: divides the logits of every model, wherever it is scored

    def contrasted(
        self,
        model: PreTrainedModel,
        rollouts: Sequence[Rollout],
        view: str,
        against: tuple[str, float] | None,
        grad: bool = False,
    ) -> Tensor:
        """As `hidden`, and with `against` = (other view, α) tilted away from what the same model makes of that view."""
        hidden = self.hidden(model, rollouts, view, grad)
        if against is None:
            return hidden
        other, alpha = against
        return vocab.tilted(hidden, self.hidden(model, rollouts, other, grad), alpha)

    def hidden(self, model: PreTrainedModel, rollouts: Sequence[Rollout], view: str, grad: bool = False) -> Tensor:
        """Hidden states [B, T, H] that predict each token of `rollouts` when the question is seen as `view`, divided by
        the temperature. Raises ValueError at a temperature for a model that caps its logits.

        With `placeholder` a whole answer comes out of one forward, as in OpenVLA-OFT, arXiv:2502.19645: what stands
        before the place of a token predicts it. There attention is bidirectional over the placeholders; here it is the
        model's own, so the place of a token sees those before it, and an answer cut short needs no more of them.
        """
        if self.temperature == 1:
            return self.predicting(model, rollouts, view, grad)
        if softcap(model) is not None:
            who = type(model).__name__
            raise ValueError(f"{who} caps its logits, so no temperature can divide them here; set it to 1")
        return self.predicting(model, rollouts, view, grad) / self.temperature

    def predicting(self, model: PreTrainedModel, rollouts: Sequence[Rollout], view: str, grad: bool) -> Tensor:
        tokens = response_tokens(rollouts).to(model.device)
        if self.placeholder is not None:
            tokens = torch.full_like(tokens, self.placeholder)
        asked = list({id(r.pair): r for r in rollouts}.values()) if self.share else rollouts
        prompts = self.prompts(model, asked, view)
        count, width = tokens.shape
        if not prompts:  # no rank has an answer for this model and view
            return head(model).new_zeros(0, width, head(model).shape[1])
        lent = len(prompts["input_ids"]) - len(asked)
        if self.together:  # the second token of an answer is a forward of its own, and other ranks may have one
            tokens = torch.nn.functional.pad(tokens, (0, max(0, 2 - width), 0, lent))
        if not self.share:
            return hidden_repeated(model, prompts, tokens, grad)[:count, :width]
        place = {id(r.pair): i for i, r in enumerate(asked)}
        owner = [place[id(r.pair)] for r in rollouts] + list(range(len(asked), len(asked) + lent))
        owner = torch.tensor(owner, device=model.device)
        return hidden_shared(model, prompts, tokens, owner, grad)[:count, :width]

    def prompts(self, model: PreTrainedModel, rollouts: Sequence[Rollout], view: str) -> dict[str, Tensor]:
        """The model's inputs for the rollouts' prompts, and behind them for what other ranks lend."""
        views = [r.pair.views[view] for r in rollouts]
        with torch.autocast("cpu", enabled=False):  # features are the extractor's own, whatever the model runs in
            inputs = self.adapter.batch(views) if views else {}
            lent = self.lent(views, set(inputs)) if self.together else []
            return inputs_on(model, self.adapter.batch([*views, *lent]) if lent else inputs)

    def lent(self, views: Sequence[Inputs], kinds: set[str]) -> list[Inputs]:
        """Views of other ranks with kinds of input (audio, pixels, any at all) that `views` has none of.

        A rank without them would not run the encoder whose parameters the others gather, or whose gradient they sum.
        """
        everyone = dist.gather(kinds)
        every, scarce = set().union(*everyone), set().union(*everyone) - set.intersection(*everyone)
        if not scarce:
            return []
        having = {kind: next(v for v in views if kind in self.adapter.batch([v])) for kind in sorted(scarce & kinds)}
        offers = {kind: view for some in reversed(dist.gather(having)) for kind, view in some.items()}
        out: list[Inputs] = []
        for kind in sorted(every - kinds):
            if kind not in kinds:  # what was lent for another kind may have brought it
                out.append(offers[kind])
                kinds = kinds | set(self.adapter.batch(out[-1:]))
        return out


def flat(hidden: Tensor, mask: Tensor) -> Tensor:
    """[N, H]: hidden states of real tokens only; `mask` [B, T'] may be wider than `hidden` [B, T, H]."""
    return hidden[mask[:, : hidden.shape[1]]]


def sampled_tokens(rollouts: Sequence[Rollout], among: slice | None = None) -> Tensor:
    """[N]: the tokens of all answers in the order of `flat`, as places in the window `among`.

    Raises ValueError for one outside of it.
    """
    tokens = torch.tensor([token for r in rollouts for token in r.tokens], dtype=torch.long)
    if among is None:
        return tokens
    if (outside := (tokens < among.start) | (tokens >= among.stop)).any():
        first = tokens[outside][0].item()
        raise ValueError(f"an answer has token {first}, but tokens are chosen from {among.start} to {among.stop - 1}")
    return tokens - among.start


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] from values [N] of the real tokens, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def token_logp(
    model: PreTrainedModel, hidden: Tensor, rollouts: Sequence[Rollout], mask: Tensor, among: slice | None = None
) -> Tensor:
    """log p [B, T] of the sampled tokens `among` a window or all, with gradient where `hidden` has one."""
    ids = sampled_tokens(rollouts, among).to(hidden.device)
    return spread(vocab.token_logp(flat(hidden, mask), window(model, among), ids, cap=softcap(model)), mask)


def window(model: PreTrainedModel, among: slice | None) -> Tensor:
    """The rows of the output projection that tokens are chosen from."""
    return head(model) if among is None else head(model)[among]


def divergence(fn: Divergence, student: Side, teacher: Side, mask: Tensor, size: Window) -> Tensor:
    """fn(log p, log q) [B, T] over the whole vocabulary of `size`, or a window of it, with gradient to the student's
    side alone."""
    (model_s, hidden_s), (model_t, hidden_t) = student, teacher
    theirs = flat(hidden_t.detach(), mask).to(hidden_s.device)
    caps = softcap(model_s), softcap(model_t)
    per_token = vocab.divergence(fn, flat(hidden_s, mask), head(model_s), theirs, head(model_t), vocab=size, caps=caps)
    return spread(per_token, mask)


def divergence_from(
    fn: Callable[..., Tensor],
    sampled: bool,
    student: Side,
    signals: Sequence[TeacherSignal],
    rollouts: Sequence[Rollout],
    mask: Tensor,
    size: Window,
) -> Tensor:
    """The same from what a teacher elsewhere told, one signal to an answer: fn(log p, log q) of the `sampled` tokens,
    or of its likeliest ones."""
    model, hidden = student
    logp, ids, logq = (
        torch.cat([getattr(s, part) for s in signals]).to(mask.device) for part in ("logp", "ids", "logq")
    )
    if sampled:
        among = size if isinstance(size, slice) else None
        return fn(token_logp(model, hidden, rollouts, mask, among), spread(logp, mask))
    per_token = vocab.topk_divergence(fn, flat(hidden, mask), head(model), ids, logq, vocab=size, cap=softcap(model))
    return spread(per_token, mask)


def divergence_of_both(fn: Divergence, student: Side, teacher: Side, mask: Tensor, size: Window) -> Tensor:
    """The same value, with gradient to both sides: the teacher's from the divergence with its sides exchanged."""
    value = divergence(fn, student, teacher, mask, size)
    back = divergence(lambda q, p: fn(p, q), teacher, student, mask, size)
    return value + (back - back.detach()).to(value.device)


@torch.no_grad()
def statistics(
    model: PreTrainedModel, hidden: Tensor, rollouts: Sequence[Rollout], mask: Tensor, among: slice | None = None
) -> tuple[Tensor, Tensor]:
    """log-prob of the sampled tokens and entropy of the distribution they came from, each [B, T]."""
    ids = sampled_tokens(rollouts, among).to(hidden.device)
    logp, entropy = vocab.statistics(flat(hidden, mask), window(model, among), ids, cap=softcap(model))
    return spread(logp, mask), spread(entropy, mask)
