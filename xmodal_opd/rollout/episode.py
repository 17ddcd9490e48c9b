"""One episode of a robot: what was seen and decided, what it goes back to when its worker is lost, and its film."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xmodal_opd.rollout.depth import Start
from xmodal_opd.rollout.workers import Lost
from xmodal_opd.types import Pair, Rollout, Sampling

AGAIN = 2  # times an episode is run anew when its worker was lost

Observation = Mapping[str, Any]  # modalities/action/environment.py has its fields


@dataclass(frozen=True)
class Decision:
    """What was decided on one observation; `tokens` are cut to the actions that were taken."""

    pair: Pair
    tokens: list[int]
    logps: list[float]
    prompt_tokens: int


@dataclass
class Episode:
    """One episode, waiting or running."""

    number: int  # unique in a call
    name: str  # of its sampling
    sampling: Sampling
    pair: Pair  # its start state
    group: int
    filmed: bool
    losses: int = 0
    seen: Observation | None = None
    actions: np.ndarray | None = None  # the chunk that goes out next, or is out
    guide: list[np.ndarray] = field(default_factory=list)  # the expert's chunks, where it has a part
    lead: int = 0  # how many of them it takes first
    led: int = 0  # and has taken
    forced: bool = False  # whether its chunks are taken, whatever was decided
    decisions: list[Decision] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.pair.meta["task"]

    @property
    def start(self) -> Start:
        return self.task, self.pair.meta["start"]

    @property
    def turn(self) -> int:
        """The depth of the student's next decision."""
        return self.lead + len(self.decisions)

    @property
    def where(self) -> str:
        return f"task {self.task!r}, start {self.pair.meta['start']}"

    def request(self) -> list[Any]:
        return ["reset", self.task, self.pair.meta["start"]] if self.seen is None else ["act", self.actions]

    def follows(self) -> bool:
        """Whether the expert's next chunk goes out; then it is at hand."""
        if self.led < self.lead:
            self.actions = self.guide[self.led]
        return self.led < self.lead

    def lost(self, why: Lost) -> None:
        """Back to its start. Raises RuntimeError where that was done often enough."""
        self.losses += 1
        if self.losses > AGAIN:
            raise RuntimeError(f"{self.where}: its worker was lost {self.losses} times, at last because of: {why}")
        self.seen, self.actions, self.led = None, None, 0
        self.decisions, self.frames = [], []

    def took(self, seen: Observation) -> None:
        """Note what is seen after a reset or a chunk, of which actions after the end were not taken."""
        before, self.seen = self.seen, seen
        if before is None or self.actions is None:
            if seen["done"]:
                raise RuntimeError(f"{self.where} is over before it began; take another start state")
            return
        taken = seen["steps"] - before["steps"]
        if (taken < len(self.actions) and not seen["done"]) or not taken:
            raise RuntimeError(f"{self.where}: {taken} of {len(self.actions)} actions were taken, and it is not over")
        if self.led < self.lead:
            self.led += 1
            return
        last, count = self.decisions[-1], taken * self.actions.shape[1]
        self.decisions[-1] = replace(last, tokens=last.tokens[:count], logps=last.logps[:count])

    def rollouts(self, text: Callable[[Sequence[int]], str]) -> list[Rollout]:
        end = self.seen or {}
        told = {"success": bool(end["success"]), "steps": int(end["steps"])}
        return [
            Rollout(
                replace(d.pair, meta={**d.pair.meta, **told}),
                *(d.tokens, d.logps, text(d.tokens), True, self.group, d.prompt_tokens),
                episode=self.number,
                turn=turn,
            )
            for turn, d in enumerate(self.decisions, self.lead)
        ]


@dataclass(frozen=True)
class Film:
    """Videos of the first episode from each of the first `starts` start states, one frame for each decision.

    encode: frames [height, width, 3] and how many a second -> the bytes of a file.
    """

    folder: Path
    encode: Callable[[Sequence[np.ndarray], float], bytes]
    starts: int = 1
    fps: float = 4.0

    def keep(self, episode: Episode) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{episode.name}-{episode.task}-{episode.pair.meta['start']}.mp4"
        (self.folder / name).write_bytes(self.encode(episode.frames, self.fps))
