"""What a judge's rewards say of a step's answers, and how a term is shaped by them: numbers for the metrics."""

from collections.abc import Callable

import torch
from torch import Tensor

from xmodal_opd.objective import Term, name_of_piece
from xmodal_opd.objective.groups import correct, counts, difficulty, group_sum, once
from xmodal_opd.objective.groups import tokens as tokens_of
from xmodal_opd.types import TokenBatch

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def outcomes(batch: TokenBatch) -> dict[str, float]:
    """Of the decided answers [B]: mean tokens of the right and of the wrong; of their groups: mean difficulty d, and
    the shares with d = 0, in each quarter up to 1, and d = 1, which add up to 1. Empty where nothing was decided."""
    counted, right, tokens = counts(batch) & once(batch), correct(batch), tokens_of(batch).double()
    if not counted.any():
        return {}
    lengths = {"right": tokens[counted & right], "wrong": tokens[counted & ~right]}
    d = difficulty(batch)[counted]
    weight = 1 / group_sum(batch, torch.ones_like(tokens), counted)[counted]  # so that each group counts once
    share = lambda of: ((of.double() * weight).sum() / weight.sum()).item()  # noqa: E731
    return {
        **{f"completions/mean_length/{what}": some.mean().item() for what, some in lengths.items() if len(some)},
        "difficulty/mean": share(d),
        "difficulty/all_right": share(d == 0),
        **{f"difficulty/to_{top:g}": share((d > 0) & (d > top - 0.25) & (d <= top) & (d < 1)) for top in QUARTERS},
        "difficulty/all_wrong": share(d == 1),
    }


def shaping(term: Term, batch: TokenBatch) -> dict[str, float]:
    """The mean over decided answers of APO's ω ("stcr") and κ ("dads"), where the term has them."""
    factors: dict[str, Callable[..., Tensor]] = {"stcr": omega, "dads": lambda piece, batch: piece(batch)}
    out: dict[str, float] = {}
    for piece in (*term.advantages, *term.step_weights):
        name = name_of_piece(piece)
        if name in factors and (counted := counts(batch) & once(batch)).any():
            out[name] = factors[name](piece, batch)[counted, 0].double().mean().item()
    return out


def omega(piece: Callable[..., Tensor], batch: TokenBatch) -> Tensor:
    """The factor [B, T] on advantages below zero."""
    return -piece(batch, -torch.ones_like(batch.student_logp))


def entropies(batch: TokenBatch) -> dict[str, float]:
    """The mean entropy over all tokens of every local scorer's model, in nats."""
    kinds = [name for name in batch.scores if name.endswith("_entropy")] if batch.mask.any() else []
    return {f"entropy/{k.removesuffix('_entropy')}": batch.scores[k][batch.mask].mean().item() for k in kinds}
