"""One process, one device, plain torch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

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

    def run[T](self, forward: Callable[[], T]) -> T:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return forward()

    def whole(self, write: bool = False) -> AbstractContextManager:
        return nullcontext()

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

    def save(self, folder: Path) -> None:
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
