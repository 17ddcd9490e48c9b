"""One step ahead: servers answer the next step's questions while judge, teachers and training work on this one's."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import ClassVar

from xmodal_opd import dist
from xmodal_opd.background import later
from xmodal_opd.types import Pair, Rollout, Sampler, Sampling

Answers = dict[str, list[Rollout]]


@dataclass
class Ahead:
    """A sampler that may be asked in advance.

    Its weights change only once what was asked in advance is answered, so all answers of a step are of one and the
    same: the weights of one step ago, or in the first step of a run and of a resumption the student's own.
    """

    sampler: Sampler
    exact: ClassVar[bool] = False
    synced: int = 0  # how often weights were brought
    age: int = 0  # of the last answers: updates between the weights they are of and the student's
    coming: tuple[int, int, Future[Answers]] | None = None  # its seed, `synced` when it was asked, the answers

    def begin(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> None:
        """Ask now what `generate` will be asked with the same seed, and do not wait."""
        self.coming = seed, self.synced, later(self.sampler.generate, pairs, samplings, seed)

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> Answers:
        """What was asked in advance, or else what is asked here. Raises what the sampler raised."""
        if self.coming is None or self.coming[0] != seed:
            self.age = 0
            return self.sampler.generate(pairs, samplings, seed)
        (_, synced, answers), self.coming = self.coming, None
        self.age = self.synced - synced
        return answers.result()

    def sync(self) -> None:
        """Bring the student's weights once every rank has the answers that the older ones still owe."""
        wait([self.coming[2]] if self.coming else [])
        dist.gather(None)
        self.sampler.sync()
        self.synced += 1
