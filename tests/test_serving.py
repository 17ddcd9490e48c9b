"""The client of servers, against real HTTP servers: fair, bounded, patient; what died is found again."""

import asyncio
import gc
import json
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xmodal_opd.serving import Failure, Server, Servers, Session, gather


@dataclass
class Fake:
    """A server that answers with its own name, until `behave` says otherwise."""

    name: str = "a"
    behave: Callable[["Fake", Any, Any], None] | None = None
    port: int = 0
    asked: list[Any] = field(default_factory=list)
    now: int = 0
    most: int = 0
    well: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: Any, body: Any) -> None:
        with self.lock:
            self.asked.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            (self.behave or say)(self, handler, body)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self.lock:
                self.now -= 1


def send(handler: Any, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def say(fake: Fake, handler: Any, body: Any) -> None:
    send(handler, 200, {"name": fake.name, "body": body})


def hang(fake: Fake, handler: Any, body: Any) -> None:
    fake.closing.wait(20)


def hang_up(fake: Fake, handler: Any, body: Any) -> None:
    handler.close_connection = True


def slowly(fake: Fake, handler: Any, body: Any) -> None:
    time.sleep(0.1)
    say(fake, handler, body)


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            fake.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self) -> None:
            send(self, 200 if fake.well else 503, {})

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", fake.port), Handler)
    http.daemon_threads = True
    fake.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()


@contextmanager
def two(**behaviour: Any) -> Iterator[tuple[Fake, Fake]]:
    with running(Fake("a", behaviour.get("a"))) as a, running(Fake("b", behaviour.get("b"))) as b:
        yield a, b


def servers(*fakes: Fake, **options: Any) -> Servers:
    return Servers([fake.url for fake in fakes], **{"timeout": 20.0, "wait": 20.0} | options)


def post_all(pool: Servers, count: int, check: Callable[[Any], None] | None = None) -> list[Any]:
    async def main() -> list[Any]:
        async with pool.session() as session:
            asks = (session.post("/x", {"i": i}, check) for i in range(count))
            return await asyncio.gather(*asks, return_exceptions=True)

    return asyncio.run(main())


def names(replies: list[Any]) -> Counter[str]:
    return Counter(reply["name"] for reply in replies)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_request_gets_its_own_reply():
    with two() as fakes:
        assert [reply["body"]["i"] for reply in post_all(servers(*fakes), 20)] == list(range(20))


def test_equal_servers_get_equal_shares_and_a_slow_one_less():
    with two(a=slowly, b=slowly) as fakes:
        shares = names(post_all(servers(*fakes, concurrency=2), 20))
        assert abs(shares["a"] - shares["b"]) <= 2
    with two(a=lambda *what: time.sleep(0.5) or say(*what)) as fakes:
        shares = names(post_all(servers(*fakes, concurrency=1), 20))
        assert 0 < shares["a"] < shares["b"] / 2


def test_a_server_holds_no_more_than_its_share_at_a_time():
    with two(a=slowly, b=slowly) as fakes:
        assert len(post_all(servers(*fakes, concurrency=3), 18)) == 18
        assert [fake.most for fake in fakes] == [3, 3]


@pytest.mark.parametrize("broken", [hang, hang_up, lambda fake, handler, body: send(handler, 503, {})])
def test_what_one_server_cannot_do_another_does(broken: Any):
    began = time.monotonic()
    with two(a=broken) as fakes:
        replies = post_all(servers(*fakes, timeout=1.0, retries=6), 8)
        assert names(replies) == {"b": 8} and time.monotonic() - began < 15


def test_attempts_are_bounded_and_the_error_names_server_path_and_what_it_said():
    with running(Fake(behave=lambda fake, handler, body: send(handler, 500, "out of luck"))) as fake:
        (error,) = post_all(servers(fake, retries=2), 1)
    assert isinstance(error, Failure) and len(fake.asked) == 3
    assert str(error) == f'{fake.url}/x: HTTP 500: "out of luck"'


def test_a_wrong_request_is_not_repeated_and_its_server_stays():
    with running(Fake(behave=lambda fake, handler, body: send(handler, 400, "no"))) as fake:
        pool = servers(fake)
        errors = post_all(pool, 3)
    assert all("HTTP 400" in str(error) for error in errors) and len(fake.asked) == 3 and pool.all[0].up


def test_a_reply_that_does_not_pass_the_check_is_asked_again():
    def fresh(reply: Any) -> None:
        if reply["name"] == "a":
            raise Failure("old weights", again=True)

    with two() as fakes:
        assert names(post_all(servers(*fakes, retries=8), 6, fresh)) == {"b": 6}


def test_a_dead_server_is_asked_nothing_until_it_is_back():
    with running(Fake("b")) as b:
        dead = Fake("a", port=free_port())
        pool = servers(dead, b)
        assert names(post_all(pool, 6)) == {"b": 6} and not pool.all[0].up
        assert "no connection" in pool.all[0].why
        with running(dead):
            deadline = time.monotonic() + 15
            while not names(post_all(pool, 6))["a"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_requests_wait_for_the_only_server_to_come_back():
    fake = Fake(port=free_port())

    def later() -> None:
        time.sleep(1.0)
        with running(fake):
            fake.closing.clear()
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert names(post_all(servers(fake), 5)) == {"a": 5}
    finally:
        done.set()
        thread.join()


def test_a_server_that_dies_in_the_middle_of_a_reply_loses_nothing():
    def dying(fake: Fake, handler: Any, body: Any) -> None:
        if len(fake.asked) <= 4:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"name": ')
            handler.close_connection = True
            handler.connection.close()
        else:
            say(fake, handler, body)

    with two(a=dying) as fakes:
        replies = post_all(servers(*fakes, retries=5), 12)
    assert [reply["body"]["i"] for reply in replies] == list(range(12))


def test_when_nobody_answers_the_error_says_what_each_server_did():
    dead, ill = Fake("a", port=free_port()), Fake("b", well=False)
    with running(ill):
        errors = post_all(servers(dead, ill, wait=0.5), 3)
    assert len({str(error) for error in errors}) == 1
    for part in ("0.5 s", f"{dead.url} (no connection (ConnectError))", f"{ill.url} (HTTP 503)"):
        assert part in str(errors[0])


def test_a_server_is_made_ready_before_each_return_and_not_in_between():
    seen: list[str] = []

    async def ready(session: Session, server: Server) -> None:
        await session.get(server, "/health")
        seen.append(server.url)

    with running(Fake()) as fake:
        pool = servers(fake, ready=ready)
        post_all(pool, 3)
        post_all(pool, 3)
        assert seen == [fake.url]
        pool.all[0].set_aside("new weights")
        post_all(pool, 3)
        assert seen == [fake.url] * 2


def test_a_server_that_is_refused_ends_the_session_in_its_words():
    async def ready(session: Session, server: Server) -> None:
        raise ValueError("this server serves another model")

    with two() as fakes:
        errors = post_all(servers(*fakes, ready=ready), 2)
        assert {str(error) for error in errors} == {"this server serves another model"}
        assert not fakes[0].asked


def test_settling_waits_for_the_first_word_on_every_server():
    async def main(pool: Servers) -> list[bool]:
        async with pool.session() as session:
            await session.settle()
        return [server.up for server in pool.all]

    with running(Fake()) as fake:
        assert asyncio.run(main(servers(fake, Fake(port=free_port())))) == [True, False]


def test_a_proxy_of_the_environment_does_not_stand_before_loopback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with running(Fake()) as fake:
        local = Servers([f"http://localhost:{fake.port}"], wait=5.0)
        assert names(post_all(local, 1)) == {"a": 1} and names(post_all(servers(fake), 1)) == {"a": 1}


def test_a_session_notices_the_return_of_a_server_that_another_session_set_aside():
    async def main(pool: Servers) -> list[Any]:
        async with pool.session() as one, pool.session() as other:
            await asyncio.gather(one.settle(), other.settle())
            pool.all[0].set_aside("another session found it gone")
            return [await other.post("/ask", 1), await one.post("/ask", 2)]

    with running(Fake("a")) as fake:
        assert len(asyncio.run(main(servers(fake, wait=5.0)))) == 2


def test_a_call_that_is_given_up_while_it_closes_what_servers_left_leaves_nothing_open():
    together, said = threading.Barrier(16), threading.Event()

    def say_and_hang_up(*what: Any) -> None:
        together.wait(20)  # 16 connections
        say(*what)
        said.wait(20)
        hang_up(*what)

    async def main(pool: Servers) -> None:
        async with pool.session() as session:
            await gather(session.post("/x", i) for i in range(16))
            said.set()
            await asyncio.sleep(0.5)  # the next call finds all 16 hung up, and closes one a turn of the loop
            call = asyncio.create_task(session.get(pool.all[0], "/health"))
            for _ in range(6):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    gc.collect()
    with running(Fake(behave=say_and_hang_up)) as fake, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        asyncio.run(main(servers(fake)))
        gc.collect()
    assert not [str(warning.message) for warning in warned]


def test_an_address_that_is_none_ends_the_wait_with_its_reason():
    async def main(pool: Servers) -> None:
        async with pool.session() as session:
            await asyncio.wait_for(session.settle(), 10)

    with pytest.raises(ValueError, match="http://h:abc cannot be asked"):
        asyncio.run(main(Servers(["http://h:abc"])))
