"""Rollouts as padded tensors, and cuts of a step that fit in memory. Responses are padded on the right."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xmodal_opd.types import Rollout, Scores, TokenBatch


def pad(
    rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], value: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, T] from rows of different lengths, filled up with `value` on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype).view(len(rows), width)


def response_tokens(rollouts: Sequence[Rollout]) -> Tensor:
    """Ids [B, T] int64. Behind an answer stands its last token again, which no mask counts: a pad token may have an
    embedding of zeros, and a model that divides by its length (Gemma 3n) then a gradient that is not a number."""
    width = max((len(r.tokens) for r in rollouts), default=0)
    return pad([[*r.tokens, *r.tokens[-1:] * (width - len(r.tokens))] for r in rollouts], 0.0, torch.long)


def token_batch(rollouts: Sequence[Rollout], scores: Scores | None = None) -> TokenBatch:
    """The step as numbers, in the order of `rollouts`; of a robot's decisions with the score `episode` [B]."""
    scores = scores if scores is not None else Scores()
    if any(r.episode is not None for r in rollouts):
        scores |= {"episode": torch.tensor([r.episode for r in rollouts])}
    return TokenBatch(
        mask=pad([[1.0] * len(r.tokens) for r in rollouts]).bool(),
        group=torch.tensor([r.group for r in rollouts], dtype=torch.long),
        student_logp=pad([r.logps for r in rollouts]),
        scores=scores,
    )


def cut(rollouts: Sequence[Rollout], budget: int, share: bool = True) -> Iterator[list[int]]:
    """Rows of `rollouts` in pieces of at most `budget` tokens, padding included; answers to one question stay together.

    A prompt has the length it was sampled with. It counts once where its answers `share` it, else with each of them. A
    question over the budget is a piece of its own.
    """
    by_pair: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        by_pair.setdefault(id(rollout.pair), []).append(row)
    piece: list[int] = []
    prompts = widest_prompt = widest = 0
    for rows in by_pair.values():
        prompt = max(widest_prompt, *(rollouts[r].prompt_tokens for r in rows), 0)
        width = max(widest, *(len(rollouts[r].tokens) for r in rows), 0)
        copies = 1 if share else len(rows)
        if piece and (prompts + copies) * prompt + (len(piece) + len(rows)) * width > budget:
            yield piece
            piece, prompts = [], 0
            prompt = max(rollouts[r].prompt_tokens for r in rows)
            width = max(len(rollouts[r].tokens) for r in rows)
        piece, prompts, widest_prompt, widest = piece + rows, prompts + copies, prompt, width
    if piece:
        yield piece
