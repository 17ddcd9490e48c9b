"""Sampling with the training model itself: the reference sampler, and the one that runs on a laptop.

The prompt (with its media encoder) runs once per question; its cache is expanded to all of the question's answers,
whatever their temperature, and they decode together. Finished answers leave the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from xmodal_opd.hidden import continue_from, inputs_on, media_tokens, prefill, projection, softcap
from xmodal_opd.objective.vocab import capped
from xmodal_opd.types import Adapter, Pair, Rollout, Sampling


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Mapping[str, Tensor],
    owner: Tensor,
    temperature: Tensor,
    *,
    max_tokens: int,
    eos: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and their log-probs at temperature 1 for B answers; answer b continues prompt `owner[b]`.

    temperature [B]: 0 takes the likeliest token. An answer ends with one of `eos`, which it keeps, or at `max_tokens`.
    Media placeholders are never chosen.
    """
    banned = torch.tensor(media_tokens(model), dtype=torch.long, device=owner.device)
    tokens: list[list[int]] = [[] for _ in owner]
    logps: list[list[float]] = [[] for _ in owner]
    ends = torch.tensor(list(eos), device=owner.device)
    cache = DynamicCache(config=model.config.get_text_config())
    last, position = prefill(model, prompts, cache)
    logits = capped(projection(model)(last), softcap(model))[owner]
    position, mask = position[owner], prompts["attention_mask"][owner]
    cache.batch_select_indices(owner)
    live = torch.arange(len(owner), device=owner.device)
    for t in range(max_tokens):
        chosen, logp = sample(logits.float(), temperature[live], banned, generator)
        for row, token, value in zip(live.tolist(), chosen.tolist(), logp.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(value)
        going = ~torch.isin(chosen, ends)
        if t + 1 == max_tokens or not going.any():
            break
        if not going.all():
            live, chosen, mask, position = live[going], chosen[going], mask[going], position[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        logits = continue_from(model, cache, chosen[:, None], mask, position)[:, -1]
        mask, position = torch.cat([mask, torch.ones_like(chosen[:, None])], 1), position + 1
    return tokens, logps


def sample(
    logits: Tensor, temperature: Tensor, banned: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token per row of [B, V] and its log-prob at temperature 1. Every row draws, so greedy rows shift no other."""
    open_to = logits.index_fill(1, banned, float("-inf"))
    heated = open_to / temperature.clamp(min=1e-6)[:, None]
    drawn = heated.softmax(-1).multinomial(1, generator=generator)[:, 0]
    chosen = torch.where(temperature == 0, open_to.argmax(-1), drawn)
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


@dataclass(frozen=True)
class HFSampler:
    model: PreTrainedModel
    adapter: Adapter
    eos: Sequence[int]
    max_tokens: int
    batch_tokens: int = 16384  # prompt and answer tokens decoded together, padding included
    whole: Callable[[], AbstractContextManager] = nullcontext  # within, the model needs no other rank
    exact: ClassVar[bool] = True  # its log-probs are the training model's own

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> dict[str, list[Rollout]]:
        """Rollouts per sampling, in the order of `pairs`, n to a pair; pair i's answers form group i.

        A pure function of the weights, the pairs and `seed`.
        """
        with self.whole():
            return self.of_all_views(pairs, samplings, seed)

    def of_all_views(
        self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int
    ) -> dict[str, list[Rollout]]:
        out: dict[str, list[Rollout]] = {name: [] for name in samplings}
        for view in sorted({s.view for s in samplings.values()}):
            here = {name: s for name, s in samplings.items() if s.view == view}
            size = self.pairs_at_once(pairs, view, sum(s.n for s in here.values()))
            for start in range(0, len(pairs), size):
                chunk = pairs[start : start + size]
                generator = torch.Generator(self.model.device).manual_seed(seed + start)
                for name, rollouts in self.answer(chunk, here, view, start, generator).items():
                    out[name] += rollouts
        return out

    def sync(self) -> None:
        """Nothing to do: it samples from the very model that trains."""

    def pairs_at_once(self, pairs: Sequence[Pair], view: str, answers: int) -> int:
        if not pairs:
            return 1
        longest = max((pair.views[view] for pair in pairs), key=self.adapter.size)
        width = self.adapter.batch([longest])["input_ids"].shape[1]
        return max(1, self.batch_tokens // ((width + self.max_tokens) * answers))

    def answer(
        self,
        pairs: Sequence[Pair],
        samplings: Mapping[str, Sampling],
        view: str,
        first: int,
        generator: torch.Generator,
    ) -> dict[str, list[Rollout]]:
        plan = [
            (name, i, s.temperature) for i in range(len(pairs)) for name, s in samplings.items() for _ in range(s.n)
        ]
        prompts = inputs_on(self.model, self.adapter.batch([p.views[view] for p in pairs]))
        device = self.model.device
        owner = torch.tensor([i for _, i, _ in plan], device=device)
        heat = torch.tensor([t for _, _, t in plan], device=device)
        tokens, logps = decode(
            self.model, prompts, owner, heat, max_tokens=self.max_tokens, eos=self.eos, generator=generator
        )
        lengths = prompts["attention_mask"].sum(1).tolist()
        out: dict[str, list[Rollout]] = {name: [] for name in samplings}
        for (name, i, _), ids, values in zip(plan, tokens, logps, strict=True):
            text, finished = self.adapter.decode(ids), ids[-1] in self.eos
            out[name].append(Rollout(pairs[i], ids, values, text, finished, first + i, lengths[i]))
        return out
