"""The ranks of a run, and what they tell each other. In a run of one process everything here is the identity.

Numbers of a step, records of an evaluation and decisions go over the CPU as Python objects; gradients and parameters
are the engine's affair.
"""

import atexit
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmodal_opd.types import Scores, TokenBatch

TIMEOUT = timedelta(minutes=30)  # that one rank waits for another: saving a large model on rank 0 must fit


def started() -> int:
    """Processes that torchrun, deepspeed or another launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> None:
    """Form one group of all processes of the launch, or of this one alone; a second call does nothing.

    device: "cpu", or "cuda", where every process then has its own GPU. Python objects always travel over the CPU.
    """
    if dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if started() == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Dissolve the group, once all ranks are done: one that merely ended could be taken for lost by the others. Several
    processes end here, with success."""
    if dist.is_initialized():
        gather(None)
        dist.destroy_process_group()
    if started() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # DeepSpeed's own references keep gloo's threads, which abort an interpreter that is taken apart


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather[T](value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank. What waits longest is also what synchronises."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def decided[T](value: T) -> T:
    """Rank 0's value, on every rank: what depends on a clock or a disk is decided once."""
    return gather(value)[0]


def say(text: str) -> None:
    """Print once."""
    if rank() == 0:
        print(text, flush=True)


def gather_step(batch: TokenBatch) -> tuple[TokenBatch, slice]:
    """The rows of all ranks as one step with groups and episodes kept apart, on this rank's device; and where its own
    rows are."""
    if world() == 1:
        return batch, slice(0, len(batch.group))
    parts = gather(to(batch, torch.device("cpu")))
    width = max(part.mask.shape[1] for part in parts)
    moved = apart([widened(part, width) for part in parts])
    scores = Scores({name: torch.cat([part.scores[name] for part in moved]) for name in moved[0].scores})
    mask, group, logp = (torch.cat([getattr(part, n) for part in moved]) for n in ("mask", "group", "student_logp"))
    first = sum(len(part.group) for part in parts[: rank()])
    whole = TokenBatch(mask, group, logp, scores)
    return to(whole, batch.mask.device), slice(first, first + len(batch.group))


def apart(parts: Sequence[TokenBatch]) -> list[TokenBatch]:
    """The parts of a step with numbers of groups and of episodes that no other part has."""

    def beyond(numbers: Iterable[Tensor]) -> int:
        return 1 + max((int(some.max()) for some in numbers if len(some)), default=0)

    group, moved = beyond(part.group for part in parts), []
    episode = beyond(part.scores["episode"] for part in parts if "episode" in part.scores)
    for r, part in enumerate(parts):
        scores = Scores({n: v + r * episode if n == "episode" else v for n, v in part.scores.items()})
        moved.append(replace(part, group=part.group + r * group, scores=scores))
    return moved


def widened(batch: TokenBatch, width: int) -> TokenBatch:
    def wide(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, width - value.shape[1])) if value.dim() == 2 else value

    scores = Scores({name: wide(value) for name, value in batch.scores.items()})
    return TokenBatch(wide(batch.mask), batch.group, wide(batch.student_logp), scores)


def to(batch: TokenBatch, device: torch.device) -> TokenBatch:
    scores = Scores({name: value.to(device) for name, value in batch.scores.items()})
    return TokenBatch(batch.mask.to(device), batch.group.to(device), batch.student_logp.to(device), scores)


def is_loss(error: Exception) -> bool:
    """Whether an error is a collective's, which fails when another rank does not come."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


@contextmanager
def losing_a_rank_is_told() -> Iterator[None]:
    """A collective that failed because another rank is gone or silent: RuntimeError with what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise RuntimeError(
            f"rank {rank()} lost another rank of this run, which was killed, failed, or was silent for "
            f"{TIMEOUT.seconds // 60} minutes; look at the other ranks' messages and at memory, then start the same "
            f"command with --resume: checkpoints are whole ({' '.join(str(error).split())[:160]})"
        ) from error
