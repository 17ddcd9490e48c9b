"""The records that flow through a run. No logic lives here, and this file imports nothing of ours.

Axes:  B responses   T response tokens   V vocabulary   H hidden   N response tokens, flattened   G rollouts per prompt
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Inputs = Mapping[str, Any]  # one view of one question; only the adapter that made it looks inside


class SampleError(ValueError):
    """One sample cannot be used; the message names it and the reason. The data pipeline counts and skips it."""


@dataclass(frozen=True)
class Pair:
    """One question under named views ("student": the audio, "teacher": its transcript). Made by an adapter."""

    key: str
    views: Mapping[str, Inputs]
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, as token ids: they are what is scored, text is never tokenised again."""

    pair: Pair
    tokens: list[int]  # includes the end-of-sequence token when `finished`
    logps: list[float]  # log-prob of each token under the sampling policy at temperature 1
    text: str
    finished: bool
    group: int  # answers to the same prompt from the same sampling share a group
    prompt_tokens: int = 0  # length of the prompt it was sampled from, media included
    episode: int | None = None  # of a robot's decision: which episode of its sampling, and which decision in it
    turn: int = 0


@dataclass(frozen=True)
class Sampling:
    """n answers per question at a temperature; 0 is greedy."""

    n: int = 1
    temperature: float = 1.0
    view: str = "student"


class Scores(dict[str, Tensor]):
    """What scorers measured, by name: [B, T] per token or [B] per response. A missing name lists those that exist."""

    def __missing__(self, name: str) -> Tensor:
        have = ", ".join(sorted(self)) or "none"
        raise KeyError(f"no scorer computed {name!r} (have: {have}); add it under `scoring:` in the recipe")


@dataclass(frozen=True)
class TokenBatch:
    """Responses as numbers per token. Prompts, media and vocabularies are already gone."""

    mask: Bool[Tensor, "B T"]
    group: Int[Tensor, " B"]
    student_logp: Float[
        Tensor, "B T"
    ]  # log p of the sampled token under the weights this step trains; ratios start at 1
    scores: Scores = field(default_factory=Scores)


@dataclass(frozen=True)
class TeacherSignal:
    """What a teacher elsewhere tells of one answer. (Of a local teacher the hidden states and the head are at hand.)"""

    logp: Float[Tensor, " T"]  # log q of the answer's own tokens
    ids: Int[Tensor, "T K"]  # its likeliest tokens at each place, most likely first
    logq: Float[Tensor, "T K"]  # their log q; −inf where a column repeats an id because there was no other


@dataclass(frozen=True)
class Judged:
    """What a loss term decided about each token, once per step and before any gradient."""

    weight: Float[Tensor, "B T"]  # scale, step-wide weights and reduction, multiplied; zero outside the mask
    advantage: Float[Tensor, "B T"]


@runtime_checkable
class Adapter(Protocol):
    """Turns samples into pairs, and views into a model's inputs. The only part that knows a modality."""

    def pair(self, sample: Mapping[str, Any]) -> Pair:
        """Raises SampleError, naming the sample, when it cannot be used."""
        ...

    def text(self, prompt: str) -> Inputs:
        """The view of a plain question in text, for judges that ask the model itself."""
        ...

    def batch(self, views: Sequence[Inputs]) -> dict[str, Tensor]:
        """The model's keyword inputs for left-padded prompts: `input_ids`, `attention_mask` and media features."""
        ...

    def size(self, view: Inputs) -> int:
        """At least as many tokens as the view's prompt has, media included; what cuts batches to fit."""
        ...

    def served(self, view: Inputs) -> tuple[list[int], list[dict[str, str]]]:
        """The same prompt for a server that lays media out itself: its ids with one placeholder for each medium, and
        the media in order as {"type": "audio_url" | "image_url" | "video_url", "url": "data:…"}."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a response, special tokens left out."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Owns the student's parameters: where they are, precision, gradient, clipping and optimiser. Knows no method.

    With several ranks every rank makes the same calls in the same order.
    """

    def run[T](self, forward: Callable[[], T]) -> T:
        """`forward()` in the engine's precision; forwards whose loss goes to `backward` are run through here."""
        ...

    def whole(self, write: bool = False) -> AbstractContextManager:
        """Within, the student is an ordinary model with all its parameters on every rank, and no forward waits for
        another rank. With `write`, changes to the parameters are kept."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the step's loss; shares of ranks and micro-batches are summed."""
        ...

    def step(self, step: int) -> dict[str, float]:
        """Clip and update: `grad_norm`, `learning_rate`, `skipped` (1: the gradient was not finite and is dropped)."""
        ...

    def save(self, folder: Path) -> None:
        """The optimiser's state, readable at any number of ranks."""
        ...

    def load(self, folder: Path) -> None:
        """What `save` wrote; the student's own weights are loaded before."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Lets the student answer."""

    exact: ClassVar[bool]  # whether its log-probs are the training model's own, to the bit

    def generate(self, pairs: Sequence[Pair], samplings: Mapping[str, Sampling], seed: int) -> dict[str, list[Rollout]]:
        """Rollouts per sampling, in the order of `pairs`, n to a pair; pair i's answers form group i."""
        ...

    def sync(self) -> None:
        """The student's weights have moved: whoever answers from here on has the new ones."""
        ...
