"""Which decisions of an episode are the student's: TCOD's two curricula over depth, and OPAD's steps.

In two of the three an expert acts beside the student: the simulator's own, from the same start state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import numpy as np

from xmodal_opd.objective.schedules import b2f, f2b
from xmodal_opd.rollout.workers import Lost, Workers

AGAIN = 2  # times experts are asked anew when a worker was lost
Start = tuple[str, int]  # task, number


@dataclass(frozen=True)
class Depth:
    """Of one step. Without anything the student decides from start to end."""

    longest: int | None = None  # decisions, then an episode is cut
    lead: Callable[[int], int] | None = None  # decisions the expert needs -> how many of them it takes first
    forced: bool = False  # the student decides each time, and the expert's actions are taken

    @property
    def guided(self) -> bool:
        return self.forced or self.lead is not None


FULL = Depth()


def front_to_back(step: int, *, limit: int, every: int = 6) -> Depth:
    """Episodes of one decision at first, one more every so many steps, `limit` at most. TCOD, arXiv:2604.24005."""
    return Depth(longest=f2b(step, limit=limit, every=every))


def back_to_front(step: int, *, every: int = 5) -> Depth:
    """The expert takes all decisions but its last at first, one fewer every `every` steps, and the student goes on from
    there to the end. An episode that ends before is dropped. TCOD, arXiv:2604.24005."""
    return Depth(lead=lambda expert: b2f(step, expert, every=every))


def step_sampling(step: int) -> Depth:
    """Every decision of the expert's episode is a sample: the student decides behind what the expert did until then.
    OPAD, arXiv:2605.01347, whose episodes lie in a dataset."""
    return Depth(forced=True)


DEPTHS: dict[str, Callable[..., Depth]] = {"f2b": front_to_back, "b2f": back_to_front, "opad": step_sampling}


def expert_actions(workers: Workers, starts: Sequence[Start]) -> dict[Start, np.ndarray]:
    """The expert's actions [steps, size] from each start state to the end of its episode.

    Raises RuntimeError where a worker is lost each time, Failed where there is no expert.
    """
    found: dict[Start, np.ndarray] = {}
    for some in batched(starts, workers.count):
        for attempt in range(AGAIN + 1):
            try:
                found |= zip(some, together(workers, some), strict=True)
                break
            except Lost as lost:
                if attempt == AGAIN:
                    raise RuntimeError(f"the expert's worker was lost each time from {some}: {lost}") from lost
    return found


def together(workers: Workers, starts: Sequence[Start]) -> list[np.ndarray]:
    """The same, each in a worker of its own. Raises Lost."""
    actions: list[list[np.ndarray]] = [[] for _ in starts]
    seen = answers(workers, {n: ["reset", *start] for n, start in enumerate(starts)})
    while running := [n for n, what in seen.items() if not what["done"]]:
        chosen = answers(workers, {n: ["expert"] for n in running})
        seen = answers(workers, {n: ["act", chosen[n][None]] for n in running})
        for n in running:
            actions[n].append(chosen[n])
    if over := [start for start, some in zip(starts, actions, strict=True) if not some]:
        raise RuntimeError(f"task {over[0][0]!r}, start {over[0][1]} is over before it began; take another start state")
    return [np.stack(some) for some in actions]


def answers(workers: Workers, requests: Mapping[int, list[Any]]) -> dict[int, Any]:
    found = workers.ask(requests)
    for answer in found.values():
        if isinstance(answer, Lost):
            raise answer
    return found
