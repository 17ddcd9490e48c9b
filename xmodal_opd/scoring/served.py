"""Teachers behind vLLM servers: their log-probs of the student's very tokens, and their likeliest tokens at each place.

Prompt and answer go there as token ids, and the ids that come back must be those that were sent. A prompt of text goes
to /v1/completions; one with media to /inference/v1/generate (a server started with --enable-scale-out), which takes
ids too and sets the media in where their placeholders stand.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xmodal_opd.serving import Failure, Server, Servers, Session, answers_health, gather
from xmodal_opd.types import Adapter, Rollout, TeacherSignal

Source = tuple[str, str]  # (teacher, view)
Answers = Mapping[int, TeacherSignal | str]  # row of the step -> what the teacher said, or why it said nothing
NEVER = -9999.0  # how vLLM writes −inf
PROBED = 128  # tokens of the vocabulary that a server is asked to read


@dataclass(frozen=True)
class ServedTeacher:
    """One teacher. top: likeliest tokens asked for at each place; 0 for none. tokenizer: the student's."""

    name: str
    servers: Servers
    adapter: Adapter
    tokenizer: Any
    model: str | None = None  # as the servers call it; None: the one they serve
    top: int = 0

    def __post_init__(self) -> None:
        self.servers.ready = self.ready

    async def answer(self, rollouts: Sequence[Rollout], view: str) -> list[TeacherSignal | str]:
        """What it says of each answer, or in words why it said nothing. Raises RuntimeError when what came back does
        not belong to what was sent, and ValueError for a server that is not this teacher."""
        prompts = {id(r.pair): self.adapter.served(r.pair.views[view]) for r in rollouts}
        async with self.servers.session() as session:
            return await gather(self.ask(session, r, prompts[id(r.pair)]) for r in rollouts)

    async def ask(
        self, session: Session, rollout: Rollout, prompt: tuple[list[int], list[dict[str, str]]]
    ) -> TeacherSignal | str:
        ids, media = [*prompt[0], *rollout.tokens], prompt[1]
        try:
            reply = await session.post(*self.request(ids, media))
        except Failure as failure:
            return str(failure)
        return self.read(reply, rollout, None if media else ids)

    def request(self, ids: list[int], media: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        """Where to, and what: prompt and answer to be read, and one token generated that nobody looks at."""
        how = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self.top}
        body: dict[str, Any] = {"return_token_ids": True} | ({"model": self.model} if self.model else {})
        if media:
            return "/inference/v1/generate", body | {"token_ids": ids, "content_parts": media, "sampling_params": how}
        return "/v1/completions", body | {"prompt": ids} | how

    def read(self, reply: Any, rollout: Rollout, whole: list[int] | None) -> TeacherSignal:
        """The numbers of a reply in either form. It must be of all ids that were sent, or of the answer's where media
        were set in before them (`whole` is None)."""
        tokens = rollout.tokens
        try:
            part = reply if "prompt_logprobs" in reply else reply["choices"][0]
            sent, told = part["prompt_token_ids"], part["prompt_logprobs"]
            if (sent if whole else sent[-len(tokens) :]) != (whole or tokens) or len(told) != len(sent):
                raise RuntimeError(f"{self.about(rollout)}: other token ids came back than were sent")
            places = [{int(token): e["logprob"] for token, e in place.items()} for place in told[-len(tokens) :]]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RuntimeError(f"{self.about(rollout)}: the reply is not vLLM's ({error!r})") from None
        if any(math.isnan(logp) for place in places for logp in place.values()):
            raise RuntimeError(f"{self.about(rollout)}: a log-prob is nan")
        own = [self.finite(places[i].get(token), token, i, rollout) for i, token in enumerate(tokens)]
        ids, logq = self.likeliest(places, rollout)
        return TeacherSignal(torch.tensor(own), ids, logq)

    def finite(self, logp: float | None, token: int, place: int, rollout: Rollout) -> float:
        """A log-prob as it must be."""
        if logp is None or not NEVER < logp < 1e-3:
            found = "none" if logp is None else logp
            raise RuntimeError(f"{self.about(rollout)}: the log-prob of token {token} at place {place} is {found}")
        return float(logp)

    def likeliest(self, places: Sequence[Mapping[int, float]], rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, K] ids and log-probs, most likely first. What has no probability does not count, nor do ids beyond the
        student's vocabulary, which padding of a larger head makes possible: the column repeats the first id at −inf."""
        ids, logq = [], []
        for place in places:
            best = sorted(place, key=lambda t: -place[t])[: self.top]  # the answer's own token may come on top of these
            known = [t for t in best if t < len(self.tokenizer) and place[t] > NEVER]
            if self.top and not known:
                raise RuntimeError(f"{self.about(rollout)}: none of its likeliest tokens is one of the student's")
            ids.append(known + known[:1] * (self.top - len(known)))
            logq.append([place[t] for t in known] + [-math.inf] * (self.top - len(known)))
        shape = len(places), self.top
        return torch.tensor(ids, dtype=torch.long).view(shape), torch.tensor(logq, dtype=torch.float32).view(shape)

    def about(self, rollout: Rollout) -> str:
        return f"teacher {self.name!r} on the answer to {rollout.pair.key!r}"

    async def ready(self, session: Session, server: Server) -> None:
        """Whether a server is this teacher, and reads the student's tokens. Raises ValueError when it is not."""
        await answers_health(session, server)
        text, ours = probe_text(self.tokenizer)
        try:
            models = [m["id"] for m in (await session.get(server, "/v1/models")).json()["data"]]
            body = {"prompt": text, "add_special_tokens": False, "model": self.model or models[0]}
            theirs = (await session.call(server, "/tokenize", body))["tokens"]
        except Failure as failure:
            if failure.again:
                raise
            raise ValueError(f"teacher {self.name!r}: {server.url} is not a vLLM server ({failure})") from None
        if self.model not in (None, *models):
            raise ValueError(
                f"teacher {self.name!r}: {server.url} has no model {self.model!r}; it serves {', '.join(models)}"
            )
        if theirs != ours:
            raise ValueError(
                f"teacher {self.name!r}: the model of {server.url} has another vocabulary than the student (a text of "
                f"{len(ours)} tokens is {len(theirs)} there), so the two cannot be compared token by token"
            )


def probe_text(tokenizer: Any) -> tuple[str, list[int]]:
    """A text made of tokens from all over the vocabulary, and its ids."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [i for i in range(0, len(tokenizer), max(1, len(tokenizer) // PROBED)) if i not in special]
    pieces = [piece for piece in map(tokenizer.decode, ids) if piece.isprintable()]
    text = " ".join(pieces)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def ask_teachers(
    teachers: Mapping[str, ServedTeacher], wanted: Mapping[Source, Sequence[int]], rollouts: Sequence[Rollout]
) -> dict[Source, Answers]:
    """What every teacher says of the rows it is wanted for. Raises RuntimeError when none of them says anything; but
    not over a single row, which a route may have led there alone: it may be that answer that cannot be read."""

    if not wanted:
        return {}

    async def all_of_them() -> list[list[TeacherSignal | str]]:
        return await gather(
            teachers[name].answer([rollouts[r] for r in rows], view) for (name, view), rows in wanted.items()
        )

    lists = zip(wanted.items(), asyncio.run(all_of_them()), strict=True)
    told: dict[Source, Answers] = {source: dict(zip(rows, said, strict=True)) for (source, rows), said in lists}
    if sum(map(len, told.values())) > 1:
        refuse_silence(told)
    return told


def refuse_silence(told: Mapping[Source, Answers]) -> None:
    """Raises RuntimeError when these teachers were asked, and said nothing of any answer."""
    said = [answer for answers in told.values() for answer in answers.values()]
    if said and all(isinstance(answer, str) for answer in said):
        names = " and ".join(repr(name) for name in dict.fromkeys(name for name, _ in told))
        raise RuntimeError(
            f"teacher {names} gave nothing for any of the {len(said)} answers of the step ({said[0]}); the last "
            "checkpoint is good: go on with --resume once it answers"
        )
