"""A robot's decision: a chunk of action tokens behind a prompt, all of them at once or one after the other."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from xmodal_opd.hidden import continue_from, head, hidden_repeated, media_tokens, prefill, softcap, without_head
from xmodal_opd.objective.vocab import capped

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (hidden [B, H], place) -> token and log-prob, [B] each


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Mapping[str, Tensor],
    *,
    width: int,
    among: slice,
    placeholder: int | None,
    policy: float,
    temperature: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """`width` tokens from the window `among` of the vocabulary behind each of B prompts: ids [B, width], and their
    log-probs over the window at the temperature `policy`.

    placeholder: the id that stands for each token in one forward (OpenVLA-OFT, 2502.19645: tokens are independent given
    the prompt; attention stays the model's own, where theirs is bidirectional). None: one token after the other.
    temperature [B]: on top, 0 takes the likeliest token. draws [B, width]: uniform in [0, 1), float64, one for each
    token, so no row shifts another. Raises ValueError for a window with media tokens, and
    at a temperature for a model that caps its logits.
    """
    if softcap(model) is not None and policy != 1:
        raise ValueError(f"{type(model).__name__} caps its logits, so no temperature can divide them here; set it to 1")
    if any(among.start <= token < among.stop for token in media_tokens(model)):
        raise ValueError(f"ids {among.start} to {among.stop - 1} hold tokens that stand for media; take another window")
    weight = head(model)[among]

    def choose(hidden: Tensor, place: int) -> tuple[Tensor, Tensor]:
        logits = capped((hidden / policy @ weight.T).float(), softcap(model))
        chosen, logp = sample(logits, temperature, draws[:, place])
        return chosen + among.start, logp

    if placeholder is None:
        return one_by_one(model, prompts, width, choose)
    hidden = hidden_repeated(model, prompts, torch.full_like(draws, placeholder, dtype=torch.long), grad=False)
    both = [choose(hidden[:, place], place) for place in range(width)]
    return torch.stack([t for t, _ in both], 1), torch.stack([v for _, v in both], 1)


def one_by_one(
    model: PreTrainedModel, prompts: Mapping[str, Tensor], width: int, choose: Choose
) -> tuple[Tensor, Tensor]:
    """Each token behind those before it: ids and log-probs [B, width]."""
    cache = DynamicCache(config=model.config.get_text_config())
    last, position = prefill(model, prompts, cache)
    mask, both = prompts["attention_mask"], [choose(last, 0)]
    with without_head(model):
        for place in range(1, width):
            token = both[-1][0][:, None]
            last = continue_from(model, cache, token, mask, position)[:, -1]
            mask, position = torch.cat([mask, torch.ones_like(token)], 1), position + 1
            both.append(choose(last, place))
    return torch.stack([t for t, _ in both], 1), torch.stack([v for _, v in both], 1)


def sample(logits: Tensor, temperature: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """One place per row of [B, W], where its draw falls in the cumulated probabilities, and its log-prob at
    temperature 1."""
    logp = logits.log_softmax(-1)
    heated = (logp.double() / temperature.double().clamp(min=1e-6)[:, None]).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(heated, draw[:, None] * heated[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    chosen = torch.where(temperature == 0, logits.argmax(-1), drawn)
    return chosen, logp.gather(-1, chosen[:, None])[:, 0]
