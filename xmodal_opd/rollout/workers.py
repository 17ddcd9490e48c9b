"""Worker processes, each with one simulated robot: asked all at once, and started anew when they die or hang.

A worker speaks `xmodal_opd.wire` on its standard streams. When it starts it sends {"value": what it is}, then answers
every [command, arguments…] with {"value"} or {"error", "kind"}. It ends when its input does, so none outlives the run.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

from xmodal_opd.background import later
from xmodal_opd.wire import receive, send

PRINTED = 4000  # bytes of what a worker printed that are kept
REFUSALS = ("AssetError", "ValueError", "TypeError")  # what would fail again; other errors are a simulator's own
LEAVING = 2.0  # seconds a process has to be gone, by itself so that its status is known, or killed


class Lost(RuntimeError):
    """A worker died, hung, broke its stream, or its simulator raised what is no refusal; the message says which. It
    starts anew when it is next asked."""


class Failed(RuntimeError):
    """An environment refused, and its worker lives on. `kind` is the type of the exception it raised: "AssetError" is
    for what is missing on this machine."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class Link:
    """A process and its streams, as `wire` reads and writes them. No wait is longer than until `deadline`; what the
    process prints meanwhile is taken, lest it waits for a reader, and the end of it kept."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env, start_new_session=True
        )
        streams = cast(list[Any], [self.process.stdin, self.process.stdout, self.process.stderr])
        self.input, self.output, self.errors = (stream.fileno() for stream in streams)
        for stream in streams:
            os.set_blocking(stream.fileno(), False)
        self.streams, self.deadline, self.printed = streams, 0.0, b""

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the stream. Raises TimeoutError at the deadline."""
        data = bytearray()
        while len(data) < size:
            self.wait(self.output, select.POLLIN)
            some = os.read(self.output, size - len(data))
            if not some:
                break
            data += some
        return bytes(data)

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            self.wait(self.input, select.POLLOUT)
            left = left[os.write(self.input, left) :]

    def flush(self) -> None:
        """Nothing is held back."""

    def wait(self, stream: int, event: int) -> None:
        """Until `stream` is ready, or has ended."""
        poll = select.poll()
        poll.register(stream, event)
        poll.register(self.errors, select.POLLIN)
        while (left := self.deadline - time.monotonic()) > 0:
            ready = {number for number, _ in poll.poll(left * 1000)}
            if self.errors in ready and not self.take():
                poll.unregister(self.errors)
            if stream in ready:
                return
        raise TimeoutError

    def take(self) -> bool:
        """Take what was printed. False where nothing is left, or the process will print no more."""
        try:
            some = os.read(self.errors, 65536)
        except BlockingIOError:
            return False
        self.printed = (self.printed + some)[-PRINTED:]
        return bool(some)

    def end(self) -> None:
        """Kill the process and all it started. One that a driver holds is not waited for longer than `LEAVING`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVING)
        for stream in self.streams:
            stream.close()

    def fate(self) -> str:
        """What became of a process whose stream ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVING)
        status = self.process.returncode
        if status is None:
            return "it closed its stream"
        return f"it was killed by signal {-status}" if status < 0 else f"it ended with status {status}"

    def last_words(self) -> str:
        while self.take():
            pass
        lines = [line.strip() for line in self.printed.decode(errors="replace").splitlines() if line.strip()]
        return f"; it last printed: {' | '.join(lines[-3:])[-400:]}" if lines else ""


class Worker:
    """One process, there when it is needed."""

    def __init__(self, command: Sequence[str], timeout: float, env: Mapping[str, str], name: str):
        self.command, self.timeout, self.env, self.name = command, timeout, env, name
        self.link: Link | None = None
        self.about: dict[str, Any] = {}

    def ask(self, request: Sequence[Any]) -> Any:
        """What it answers, or once it has started, where that is not so yet. Raises Lost and Failed."""
        if self.link is None:
            self.start()
        return self.answer(request)

    def start(self) -> None:
        """Raises Failed where the command cannot run, or the environment says why it cannot start."""
        try:
            self.link = Link(self.command, self.env)
        except OSError as error:
            raise Failed(f"environment {self.name!r} cannot start: {error}", "OSError") from error
        try:
            self.about = self.answer(None)
        except Failed:
            self.end()
            raise

    def answer(self, request: Sequence[Any] | None) -> Any:
        """The answer to a request, or the greeting of a worker that starts."""
        link = cast(Link, self.link)
        link.deadline = time.monotonic() + self.timeout
        try:
            if request is not None:
                send(link, list(request))
            reply = received(link)
        except TimeoutError:
            raise self.lost(f"no answer within {self.timeout:g} s") from None
        except (OSError, EOFError):
            raise self.lost(link.fate()) from None
        except ValueError as error:
            raise self.lost(f"its stream has noise on it ({error})") from error
        if "error" not in reply:
            return reply["value"]
        if request is not None and reply["kind"] not in REFUSALS:
            raise self.lost(f"it cannot {request[0]}: {reply['error']}")
        doing = f"cannot {request[0] if request else 'start'}"
        error = Failed(f"environment {self.name!r} {doing}: {reply['error']}", reply["kind"])
        error.add_note(link.printed.decode(errors="replace"))
        raise error

    def lost(self, why: str) -> Lost:
        words = self.link.last_words() if self.link else ""
        self.end()
        return Lost(why + words)

    def end(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.end()


class Workers:
    """`count` workers at most, started when they are first asked, and ended with the run."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        timeout: float,
        env: Mapping[str, str] | None = None,
        name: str = "simulator",
    ):
        """timeout: seconds for one answer, and for the start. env: on top of this process's. name: for messages."""
        around = surroundings(env or {})
        self.all = [Worker(command, timeout, around, name) for _ in range(count)]
        self.name = name
        self.lost = 0  # workers, until now
        weakref.finalize(self, end, self.all)  # at exit, too

    @property
    def count(self) -> int:
        return len(self.all)

    def ask(self, requests: Mapping[int, Sequence[Any]]) -> dict[int, Any]:
        """{worker: [command, arguments…]} -> {worker: its answer, or Lost}, all of them at the same time.

        Raises Failed for what an environment refuses; then all workers are ended, for some have more to say.
        """
        asked = {number: later(self.all[number].ask, request) for number, request in requests.items()}
        try:
            answers = {number: answered(future) for number, future in asked.items()}
        except BaseException:
            self.close()
            raise
        self.lost += sum(isinstance(answer, Lost) for answer in answers.values())
        return answers

    def about(self) -> dict[str, Any]:
        """What the environment is: {"size": numbers in an action, "tasks"}. Starts a worker.

        Raises Failed where it cannot, RuntimeError where it dies or hangs before it says so.
        """
        if self.all[0].link is None:
            try:
                later(self.all[0].start).result()
            except Lost as lost:
                raise RuntimeError(f"environment {self.name!r} does not start: {lost}") from lost
        return self.all[0].about

    def close(self) -> None:
        """End all workers. What is asked next starts them anew."""
        end(self.all)


def received(link: Link) -> dict[str, Any]:
    """The next answer. Raises ValueError for anything else."""
    try:
        reply = receive(link)
    except (KeyError, TypeError) as error:  # JSON, and no message
        raise ValueError(repr(error)) from error
    if not isinstance(reply, dict) or not reply.keys() & {"value", "error"}:
        raise ValueError(f"{reply!r:.80} is no answer")
    return reply


def end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.end()


def answered(future: Future[Any]) -> Any:
    try:
        return future.result()
    except Lost as lost:
        return lost


def surroundings(more: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a worker: it renders without a display unless told otherwise, on one thread."""
    found = {"MUJOCO_GL": "egl", **os.environ, "OMP_NUM_THREADS": "1", **more}
    if found["MUJOCO_GL"] in ("egl", "osmesa"):
        found.setdefault("PYOPENGL_PLATFORM", found["MUJOCO_GL"])
    return found
