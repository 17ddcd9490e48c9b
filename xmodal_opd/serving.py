"""Requests to OpenAI-compatible and vLLM servers: each attempt bounded, repeated with a growing pause, fair to several.

One endpoint (the `llm` judge): `connect()` opens a client, `send` is one attempt, `patiently` repeats it.

Several servers that give the same answers (`rollout/vllm.py`, `scoring/served.py`):

    servers = Servers(["http://127.0.0.1:8000", "http://127.0.0.1:8001"], timeout=60)

    async def ask(bodies):
        async with servers.session() as session:
            return await gather(session.post("/v1/completions", body) for body in bodies)

    replies = asyncio.run(ask(bodies))  # or on a thread, while something else runs

What is known of the servers outlives a session; connections do not.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

Client = httpx.AsyncClient

RETRIED = {408, 409, 425, 429}  # and every 5xx
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
CONNECT = 10.0  # seconds
PROBE = 5.0  # seconds a server that was set aside has to say that it is well, and the longest pause between two probes


class Failure(RuntimeError):
    """Why a request has no reply, in words worth counting; `again` says whether asking once more may help, `detail`
    is what the server said about it."""

    def __init__(self, reason: str, again: bool = False, detail: str = ""):
        super().__init__(reason)
        self.again = again
        self.detail = detail


# ---- one endpoint


def connect(headers: Mapping[str, str] | None = None) -> Client:
    """A client that reaches loopback past any proxy of the environment. Of its own it bounds only the time to connect;
    `send` bounds the rest."""
    limits = httpx.Limits(max_connections=None)
    direct = {f"all://{host}": httpx.AsyncHTTPTransport(limits=limits) for host in LOOPBACK}
    return Client(headers=headers, timeout=httpx.Timeout(None, connect=CONNECT), limits=limits, mounts=direct)


async def send(client: Client, url: str, body: Any = None, *, timeout: float, method: str = "POST") -> httpx.Response:
    """One attempt; `timeout` seconds bound all of it, slow bodies included. Raises Failure for all but a 200."""
    limit = anyio.move_on_after(timeout)  # httpx's own limits are per read

    async def called() -> httpx.Response:
        with limit:
            return await client.request(method, url, json=body)
        raise Failure("timed out", again=True)

    # Any call may be the one that closes the pool's old connections. httpx shields that from anyio's cancellation but
    # not from asyncio's, which leaves open what was not reached; so asyncio's stays outside, and anyio's goes in.
    call = asyncio.create_task(called())
    try:
        response = await asyncio.shield(call)
    except httpx.HTTPError as error:
        raise Failure(f"no connection ({type(error).__name__})", again=True) from None
    finally:
        limit.cancel()
        await asyncio.gather(call, return_exceptions=True)
    if response.status_code != 200:
        again = response.status_code >= 500 or response.status_code in RETRIED
        raise Failure(f"HTTP {response.status_code}", again, response.text[:400])
    return response


async def patiently[T](attempt: Callable[[], Awaitable[T]], retries: int) -> T:
    """What `attempt` returns, called up to 1 + retries times while it raises a Failure that may pass."""
    for number in range(retries):
        try:
            return await attempt()
        except Failure as failure:
            if not failure.again:
                raise
        await asyncio.sleep(pause(number))
    return await attempt()


async def gather[T](calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return, in order; the first error ends the others."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def pause(number: int) -> float:
    """Seconds to wait after attempt `number` failed, from 0."""
    return min(0.25 * 2**number, 8.0)


# ---- several servers


@dataclass
class Server:
    """One address and what is known of it."""

    url: str
    up: bool = False  # a server is asked nothing before it was found well
    why: str = "not asked yet"  # it is not up

    def set_aside(self, why: str) -> None:
        self.up, self.why = False, why


Ready = Callable[["Session", Server], Awaitable[None]]


async def answers_health(session: "Session", server: Server) -> None:
    """vLLM and most OpenAI-compatible servers answer GET /health with 200 once they can work."""
    await session.get(server, "/health", timeout=PROBE)


@dataclass
class Servers:
    """Servers of equal worth at `urls`, addresses without /v1.

    timeout: seconds of one attempt. retries: more attempts after one that failed for a reason that may pass, on
    whichever server is free then. concurrency: requests one server holds at a time. wait: seconds a request waits when
    no server is up. ready: awaited before a server is asked for the first time, and whenever it comes back after it was
    set aside; a Failure keeps it aside, to be tried again, and a ValueError ends the session that tried.
    """

    urls: Sequence[str]
    timeout: float = 300.0
    retries: int = 3
    concurrency: int = 64
    wait: float = 600.0
    headers: Mapping[str, str] | None = None
    ready: Ready = answers_health
    all: list[Server] = field(init=False)

    def __post_init__(self) -> None:
        self.all = [Server(url.rstrip("/").removesuffix("/v1")) for url in self.urls]

    @asynccontextmanager
    async def session(self) -> AsyncIterator["Session"]:
        """Connections for requests of one event loop; servers that are aside are probed while it is open."""
        async with connect(self.headers) as client:
            session = Session(self, client)
            for server in self.all:
                if not server.up:
                    session.probe(server)
            try:
                yield session
            finally:
                await session.close()


class Session:
    """Requests to whichever server has the fewest."""

    def __init__(self, servers: Servers, client: Client):
        self.servers, self.client = servers, client
        self.busy = {server.url: 0 for server in servers.all}
        self.given = dict(self.busy)
        self.change = asyncio.Event()
        self.probes: dict[str, asyncio.Task[None]] = {}
        self.tried: set[str] = set()
        self.refused: Exception | None = None

    async def post(self, path: str, body: Any, check: Callable[[Any], None] | None = None) -> Any:
        """The JSON reply. `check` may raise a Failure about it, which counts as one of the attempt.

        Raises Failure naming the server when no attempt succeeded, and what `ready` raises.
        """

        async def attempt() -> Any:
            server = await self.free()
            self.busy[server.url] += 1
            self.given[server.url] += 1
            try:
                return await self.ask(server, path, body, check)
            finally:
                self.busy[server.url] -= 1
                self.change.set()

        return await patiently(attempt, self.servers.retries)

    async def ask(self, server: Server, path: str, body: Any, check: Callable[[Any], None] | None) -> Any:
        """One attempt with this server, which is set aside when it fails for a reason that may pass."""
        try:
            reply = await self.call(server, path, body)
            if check is not None:
                check(reply)
            return reply
        except Failure as failure:
            if failure.again:
                server.set_aside(str(failure))
                self.probe(server)
            detail = f": {failure.detail}" if failure.detail else ""
            raise Failure(f"{server.url}{path}: {failure}{detail}", failure.again) from None

    async def call(self, server: Server, path: str, body: Any = None) -> Any:
        """The JSON reply of one server to one POST, or None when it has no body. Raises Failure."""
        response = await send(self.client, server.url + path, body, timeout=self.servers.timeout)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise Failure("reply is not JSON") from None

    async def get(self, server: Server, path: str, timeout: float | None = None) -> httpx.Response:
        limit = self.servers.timeout if timeout is None else timeout
        return await send(self.client, server.url + path, timeout=limit, method="GET")

    async def free(self) -> Server:
        """The server with the fewest requests, once one has room. Raises Failure when none is up for too long."""
        deadline = None
        while True:
            if self.refused is not None:
                raise self.refused
            up = [server for server in self.servers.all if server.up]
            room = [server for server in up if self.busy[server.url] < self.servers.concurrency]
            if room:
                return min(room, key=lambda s: (self.busy[s.url], self.given[s.url]))
            for server in self.servers.all:
                if not server.up:  # another session may have set it aside
                    self.probe(server)
            deadline = None if up else deadline or asyncio.get_running_loop().time() + self.servers.wait
            try:
                async with asyncio.timeout_at(deadline):
                    await self.changed()
            except TimeoutError:
                raise Failure(self.nobody()) from None

    async def changed(self) -> None:
        self.change.clear()
        await self.change.wait()

    def nobody(self) -> str:
        told = ", ".join(f"{server.url} ({server.why})" for server in self.servers.all)
        return f"no server answered for {self.servers.wait:g} s: {told}; start one, and go on with --resume"

    def probe(self, server: Server) -> None:
        """Find out in the background when a server that is aside is well again."""
        if server.url not in self.probes or self.probes[server.url].done():
            self.probes[server.url] = asyncio.create_task(self.watch(server))

    async def watch(self, server: Server) -> None:
        number = 0
        while not await self.try_once(server):
            await asyncio.sleep(min(pause(number), PROBE))
            number += 1

    async def try_once(self, server: Server) -> bool:
        """Whether there is nothing more to wait for: the server is up, or is refused."""
        try:
            await self.servers.ready(self, server)
            server.up = True
        except Failure as failure:
            server.why = str(failure)
        except ValueError as error:
            self.refused = error
        except Exception as error:  # whatever it is, who waits for this server must hear of it
            self.refused = ValueError(f"{server.url} cannot be asked: {error!r}")
        self.tried.add(server.url)
        self.change.set()
        return server.up or self.refused is not None

    async def settle(self) -> None:
        """Until every server was tried at least once in this session. Raises what refuses one."""
        while self.refused is None and any(not s.up and s.url not in self.tried for s in self.servers.all):
            await self.changed()
        if self.refused is not None:
            raise self.refused

    async def close(self) -> None:
        for task in self.probes.values():
            task.cancel()
        await asyncio.gather(*self.probes.values(), return_exceptions=True)
