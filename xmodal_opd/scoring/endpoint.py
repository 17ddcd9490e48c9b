"""A model behind an OpenAI-compatible endpoint, asked many questions at a time: a judge, or a reader of answers."""

import asyncio
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from xmodal_opd.serving import Client, Failure, connect, patiently, send


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask."""

    url: str
    model: str
    key: str | None = field(repr=False)
    timeout: float
    retries: int
    concurrency: int
    max_tokens: int


async def replies_of(endpoint: Endpoint, questions: Sequence[str]) -> list[str | Failure]:
    """The reply to each question, or why there is none."""
    gate, lost = asyncio.Semaphore(endpoint.concurrency), [0]  # lost: requests in a row without any reply
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}

    async def one(client: Client, question: str) -> str | Failure:
        async with gate:
            if lost[0] >= endpoint.concurrency:
                return Failure("endpoint is down")
            try:
                reply = await patiently(lambda: ask_once(client, endpoint, question), endpoint.retries)
            except Failure as failure:
                lost[0] = lost[0] + 1 if failure.again else 0
                return failure
            lost[0] = 0
            return reply

    async with connect(headers) as client:
        return list(await asyncio.gather(*map(one, repeat(client), questions)))


def asker(who: str, **options: Any) -> Callable[[list[str]], list[str | Failure]]:
    """What the model behind an endpoint replies, with the options of the judge `llm` (`judge.py`) but `to`."""
    names = ("url", "model", "api_key_env", "timeout", "retries", "concurrency", "max_tokens")
    endpoint = endpoint_at(who, *(options[name] for name in names))
    return lambda questions: asyncio.run(replies_of(endpoint, questions))


async def ask_once(client: Client, endpoint: Endpoint, question: str) -> str:
    """What the model says to one question. Raises Failure."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": endpoint.max_tokens,
    }
    response = await send(client, f"{endpoint.url}/chat/completions", body, timeout=endpoint.timeout)
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        raise Failure("reply is not a chat completion") from None


def endpoint_at(who: str, url: str, model: str, api_key_env: str | None, *limits: Any) -> Endpoint:
    """`limits` as Endpoint has them, in order. Raises ValueError, with who asks, for an address or key that is none."""
    if not re.match(r"https?://[^/\s]+", url):
        raise ValueError(f"{who} cannot ask {url!r}; give the address up to /v1, such as http://127.0.0.1:8000/v1")
    return Endpoint(url.rstrip("/").removesuffix("/chat/completions"), model, _key(who, api_key_env), *limits)


def _key(who: str, name: str | None) -> str | None:
    key = os.environ.get(name, "").strip() if name else None
    if name and not (key and key.isascii() and key.isprintable()):
        raise ValueError(f"{who} reads its key from the environment variable {name!r}, which is unset or not a key")
    return key
