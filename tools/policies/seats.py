"""What a policy is to an evaluation: it sees seats, and answers each with a chunk of actions."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from modalities.action.environment import Observation
from modalities.action.protocols import Protocol as Rules


class Unusable(ValueError):
    """What a policy answered is no chunk of actions. The episode has failed; the others go on."""


@dataclass(frozen=True)
class Seat:
    """One episode that waits for a decision."""

    key: str  # task/start
    task: str
    start: int
    seen: Observation
    expert: Callable[[], np.ndarray]  # what the simulator's own script would do here


class Policy(Protocol):
    @property
    def identity(self) -> Mapping[str, Any]:
        """What results depend on, beside its name."""
        ...

    @property
    def threads(self) -> bool:
        """Whether `act` may be called by several threads at once."""
        ...

    def reset(self, key: str) -> None:
        """An episode begins, or begins again."""
        ...

    def act(self, seats: Sequence[Seat]) -> list[np.ndarray]: ...


class Together:
    """A policy for one thread at a time, asked by many: who waits meanwhile is answered in one batch."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.waiting: list[tuple[Seat, Future[np.ndarray]]] = []
        self.guard, self.busy = threading.Lock(), threading.Lock()

    def act(self, seat: Seat) -> np.ndarray:
        if self.policy.threads:
            return self.policy.act([seat])[0]
        answer: Future[np.ndarray] = Future()
        with self.guard:
            self.waiting.append((seat, answer))
        with self.busy:
            with self.guard:
                some, self.waiting = self.waiting, []
            if some:
                self.answer(some)
        return answer.result()

    def answer(self, some: Sequence[tuple[Seat, Future[np.ndarray]]]) -> None:
        try:
            answers = self.policy.act([seat for seat, _ in some])
        except Exception as error:  # all who wait must hear of it
            if isinstance(error, Unusable) and len(some) > 1:  # but for what one of them did: each is asked alone
                for one in some:
                    self.answer([one])
                return
            for _, future in some:
                future.set_exception(error)
            return
        for (_, future), actions in zip(some, answers, strict=True):
            future.set_result(actions)


def prepared(images: Mapping[str, np.ndarray], rules: Rules | None) -> dict[str, np.ndarray]:
    """Pictures as the protocol shows them to a model that is served; cropping is the model's."""
    if rules is None or rules.resize is None:
        return dict(images)
    from modalities.vision import media

    return {name: media.shown(image, rules.resize, rules.jpeg, rules.lobes) for name, image in images.items()}
