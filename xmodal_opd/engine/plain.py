"""One process, one device, plain torch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class PlainEngine:
    """Owns backward, clipping, the optimiser and precision; knows nothing of methods."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        schedule: Callable[[int], float],
        autocast: bool = False,
    ):
        self.model, self.clip, self.lr, self.schedule, self.autocast = model, clip, lr, schedule, autocast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        narrow = {p.dtype for p in self.parameters} - {torch.float32, torch.float64}
        if narrow:
            raise ValueError(
                f"weights in {', '.join(map(str, narrow))} are too coarse to train: an update of a thousandth rounds "
                "to nothing; set model.dtype=float32, and engine.autocast=true for products in bfloat16"
            )
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay)

    def precision(self) -> AbstractContextManager:
        """The context in which forwards run."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.autocast)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, step: int) -> dict[str, float]:
        """Clip and update at the schedule's rate. A gradient that is not finite is dropped: `skipped` is then 1."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        rate = self.lr * self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": rate, "skipped": float(not finite)}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
