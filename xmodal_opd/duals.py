"""Dual weights: how much the answers of each kind of sample are distilled, by how far their teacher is still ahead.

OPOD, arXiv:2607.20918: for each modality a multiplier β of the constraint that its teacher is at most ε nats ahead.
What is remembered between steps is {kind: {"beta", "seen", "slack"}}, plain numbers that a checkpoint keeps.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xmodal_opd.schema import Dual
from xmodal_opd.types import TokenBatch

State = Mapping[str, Mapping[str, float]]
NEW = {"beta": 1.0, "seen": 0, "slack": 0.0}


def weights(state: State, kinds: Sequence[str]) -> Tensor:
    """β [B] of each response's kind."""
    return torch.tensor([state.get(kind, NEW)["beta"] for kind in kinds])


def ahead(batch: TokenBatch, kinds: Sequence[str], scorer: str) -> dict[str, float]:
    """c̄ of each kind: the mean over its responses of the mean over tokens of relu(log q − log p)."""
    gap = torch.where(batch.mask, batch.scores[f"{scorer}_logp"] - batch.student_logp, 0).clamp(min=0)
    each = (gap.double().sum(1) / batch.mask.sum(1).clamp(min=1)).tolist()
    found: dict[str, list[float]] = {}
    for kind, value in zip(kinds, each, strict=True):
        found.setdefault(kind, []).append(value)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def updated(state: State, gaps: Mapping[str, float], settings: Dual) -> dict[str, dict[str, float]]:
    """The state after a step with these c̄: over the first `warmup` steps of a kind its ε becomes their mean, at least
    `least`; from then on β ← clip(β + rate · (c̄ − ε), low, high). A c̄ that is not finite moves nothing: its step's
    gradient is dropped, too."""
    out = {kind: dict(values) for kind, values in state.items()}
    for kind, gap in gaps.items():
        if not math.isfinite(gap):
            continue
        now = out.setdefault(kind, dict(NEW))
        now["seen"] += 1
        if now["seen"] <= settings.warmup:
            now["slack"] += (gap - now["slack"]) / now["seen"]
        else:
            beta = now["beta"] + settings.rate * (gap - max(now["slack"], settings.least))
            now["beta"] = min(max(beta, settings.low), settings.high)
    return out


def described(state: State, gaps: Mapping[str, float]) -> dict[str, float]:
    """For the metrics: β that the step used, and c̄ that it found."""
    betas = {f"dual/{kind}": state.get(kind, NEW)["beta"] for kind in gaps}
    return betas | {f"dual/{kind}/ahead": gap for kind, gap in gaps.items()}
