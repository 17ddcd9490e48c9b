"""Sampling from a simulated robot: the student decides on chunks of actions, one forward for all running episodes.

Each worker runs one episode. A round batches what all of them see, decodes a chunk of action tokens for each, and sends
the chunks out together; nothing is rendered between two decisions. A decision is one `Rollout`.

What is drawn depends on the seed, the episode's number and the turn alone, so neither on how many workers there are nor
on which of them was lost. What shares a forward does: it moves log-probs by their last bits, and a draw that falls on
such a bit goes the other way.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from xmodal_opd.hidden import inputs_on
from xmodal_opd.rollout.decode import decode
from xmodal_opd.rollout.depth import FULL, Depth, Start, expert_actions
from xmodal_opd.rollout.episode import Decision, Episode, Film
from xmodal_opd.rollout.workers import Lost, Workers
from xmodal_opd.types import Adapter, Inputs, Pair, Rollout, SampleError, Sampling


class Acting(Adapter, Protocol):
    """An adapter that also knows a robot."""

    def observed(self, key: str, observation: Any, meta: dict[str, Any]) -> Pair:
        """The views of what is seen before a decision."""
        ...

    def actions(self, tokens: Sequence[int]) -> np.ndarray:
        """A chunk [C, size] in the simulator's units. Raises SampleError for tokens that are no actions."""
        ...

    def ids(self, actions: Any) -> list[int]:
        """The tokens of such a chunk. Raises SampleError for actions that have none."""
        ...


@dataclass(frozen=True)
class EnvSampler:
    """Rollouts of robots. Pairs are start states: `meta` has "task" and "start"; views are made of what is seen."""

    model: PreTrainedModel
    adapter: Acting
    workers: Workers
    width: int  # tokens of a decision
    among: slice  # of the vocabulary: the tokens that are actions
    placeholder: int | None = None
    temperature: float = 1.0  # of the policy: it divides all its logits, sampled and scored
    whole: Callable[[], AbstractContextManager] = nullcontext  # within, the model needs no other rank
    film: Film | None = None
    depth: Depth = FULL  # which decisions are the student's; of a training step
    known: dict[Start, np.ndarray] = field(default_factory=dict)  # what experts did, asked for once in a run
    exact: ClassVar[bool] = True  # its log-probs are the training model's own

    @property
    def lost(self) -> int:
        """Workers lost until now; each cost an episode that was run again."""
        return self.workers.lost

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> dict[str, list[Rollout]]:
        """Rollouts per sampling, by start state, then episode (n to a start state), then turn. The episodes from
        pair i form group i; one that is over before the student's first decision has none.

        A function of the weights, the pairs and `seed`, up to the rounding of what shares a forward. Raises
        RuntimeError for an episode whose worker is lost each time, SampleError for decisions that are no actions.
        """
        plan = [
            (name, sampling, i, place)
            for name, sampling in samplings.items()
            for i in range(len(pairs))
            for place in range(sampling.n)
        ]
        starts = self.film.starts if self.film else 0
        episodes = [
            Episode(number, name, sampling, pairs[i], i, filmed=i < starts and place == 0)
            for number, (name, sampling, i, place) in enumerate(plan)
        ]
        self.guide(episodes)
        with self.whole():
            self.play(episodes, seed)
        if episodes and not any(episode.decisions for episode in episodes):
            raise RuntimeError("no decision was left to the student: the expert ended every episode of this step")
        out: dict[str, list[Rollout]] = {name: [] for name in samplings}
        for episode in episodes:
            out[episode.name] += episode.rollouts(self.adapter.decode)
        return out

    def sync(self) -> None:
        """Nothing to do: it samples from the very model that trains."""

    def guide(self, episodes: Sequence[Episode]) -> None:
        """Tell episodes what the expert does from their start states, where it has a part in them."""
        if not self.depth.guided:
            return
        starts = sorted({e.start for e in episodes} - self.known.keys())
        self.known.update(expert_actions(self.workers, starts))
        for episode in episodes:
            actions = self.known[episode.start]
            chunk = self.width // actions.shape[1]
            episode.guide = [actions[at : at + chunk] for at in range(0, len(actions), chunk)]
            episode.lead = self.depth.lead(len(episode.guide)) if self.depth.lead else 0
            episode.forced = self.depth.forced

    def play(self, episodes: Sequence[Episode], seed: int) -> None:
        """Run all of them to their ends, as many at a time as there are workers."""
        waiting, running = list(episodes), dict[int, Episode]()
        tasks: dict[int, str] = {}  # what a worker has loaded
        while waiting or running:
            for worker in sorted(set(range(self.workers.count)) - set(running)):
                if waiting:
                    running[worker] = waiting.pop(next_for(tasks.get(worker), waiting))
                    tasks[worker] = running[worker].task
            self.decide([e for e in running.values() if e.seen is not None and not e.follows()], seed)
            gone = self.asked(running, {worker: episode.request() for worker, episode in running.items()})
            gone |= self.filmed({worker: episode for worker, episode in running.items() if worker not in gone})
            waiting[:0] = [running.pop(worker) for worker in sorted(gone)]
            for worker in [worker for worker, episode in running.items() if self.over(episode)]:
                self.finish(running.pop(worker))

    def asked(self, running: Mapping[int, Episode], requests: Mapping[int, list[Any]]) -> set[int]:
        """Send chunks and resets out and note what is seen then. Returns the workers that were lost."""
        answers = self.workers.ask(requests)
        for worker, answer in answers.items():
            running[worker].lost(answer) if isinstance(answer, Lost) else running[worker].took(answer)
        return {worker for worker, answer in answers.items() if isinstance(answer, Lost)}

    def filmed(self, running: Mapping[int, Episode]) -> set[int]:
        """A frame of the episodes that are filmed. Returns the workers that were lost."""
        answers = self.workers.ask({worker: ["frame"] for worker, episode in running.items() if episode.filmed})
        for worker, answer in answers.items():
            running[worker].lost(answer) if isinstance(answer, Lost) else running[worker].frames.append(answer)
        return {worker for worker, answer in answers.items() if isinstance(answer, Lost)}

    def over(self, episode: Episode) -> bool:
        done, longest = episode.seen is not None and episode.seen["done"], self.depth.longest
        if episode.forced:
            longest = len(episode.guide)
        return done or (longest is not None and len(episode.decisions) >= longest)

    def finish(self, episode: Episode) -> None:
        if self.film and episode.filmed:
            self.film.keep(episode)

    def decide(self, episodes: Sequence[Episode], seed: int) -> None:
        """The next decision of each, one forward for each view they are seen under."""
        for view in sorted({e.sampling.view for e in episodes}):
            here = [e for e in episodes if e.sampling.view == view]
            pairs = [self.observed(e) for e in here]
            tokens, logps, lengths = self.answers([p.views[view] for p in pairs], here, seed)
            for episode, pair, ids, values, length in zip(here, pairs, tokens, logps, lengths, strict=True):
                episode.decisions.append(Decision(pair, ids, values, length))
                chunk = self.actions(episode, ids, values)
                episode.actions = episode.guide[len(episode.decisions) - 1] if episode.forced else chunk

    def observed(self, episode: Episode) -> Pair:
        meta = {**episode.pair.meta, "modality": "action"}
        key = f"{episode.task}/{meta['start']}/{episode.number}/{episode.turn}"
        return self.adapter.observed(key, episode.seen, meta)

    def answers(
        self, views: Sequence[Inputs], episodes: Sequence[Episode], seed: int
    ) -> tuple[list[list[int]], list[list[float]], list[int]]:
        """Tokens and log-probs of each decision, and the length of its prompt."""
        prompts = inputs_on(self.model, self.adapter.batch(views))
        device = prompts["input_ids"].device
        draws = np.stack([drawn(seed, e.number, len(e.decisions), self.width) for e in episodes])
        heat = torch.tensor([e.sampling.temperature for e in episodes], device=device)
        tokens, logps = decode(
            self.model,
            prompts,
            width=self.width,
            among=self.among,
            placeholder=self.placeholder,
            policy=self.temperature,
            temperature=heat,
            draws=torch.from_numpy(draws).to(device),
        )
        return tokens.tolist(), logps.tolist(), prompts["attention_mask"].sum(1).tolist()

    def actions(self, episode: Episode, tokens: list[int], logps: list[float]) -> np.ndarray:
        if not np.isfinite(logps).all():
            raise SampleError(
                f"{episode.where}, turn {len(episode.decisions) - 1}: the model's log-probs are not finite"
            )
        try:
            return self.adapter.actions(tokens)
        except SampleError as error:
            raise SampleError(f"{episode.where}, turn {len(episode.decisions) - 1}: {error}") from error


def next_for(task: str | None, waiting: Sequence[Episode]) -> int:
    """The place of the first episode of the task a worker has loaded, or else of the first one: another task may take
    a simulator ten seconds."""
    return next((i for i, episode in enumerate(waiting) if episode.task == task), 0)


def drawn(seed: int, episode: int, turn: int, width: int) -> np.ndarray:
    """The uniform numbers [width] that a decision is drawn with."""
    return np.random.default_rng([seed, episode, turn]).random(width)
