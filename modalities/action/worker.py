"""One environment in a process of its own: `python -m modalities.action.worker NAME OPTIONS`, commands on standard
input and answers on standard output, as `xmodal_opd.wire` has them. Whatever else prints goes to standard error.
"""

import contextlib
import json
import os
import select
import sys
import threading
import time
import traceback
from typing import Any, BinaryIO

from modalities.action.environment import Environment, make
from xmodal_opd.wire import receive, send

COMMANDS = ("reset", "act", "frame", "expert")
LEAVING = 5.0  # seconds a command may go on when nobody waits for its answer any more


def serve(environment: Environment, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer [command, arguments…] with {"value"} or {"error", "kind"} until the other side is gone."""
    with contextlib.suppress(EOFError):
        while True:
            command, *arguments = receive(source)
            send(sink, answer(environment, command, arguments))


def answer(environment: Environment, command: str, arguments: list[Any]) -> dict[str, Any]:
    if command not in COMMANDS:
        return {"error": f"there is no command {command!r}; there are: {', '.join(COMMANDS)}", "kind": "ValueError"}
    try:
        return {"value": getattr(environment, command)(*arguments)}
    except Exception as error:  # a simulator may raise anything; the other side decides what becomes of the episode
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        return {"error": str(error) or repr(error), "kind": type(error).__name__}


def leave() -> None:
    """End the process when the other side is gone, even while a simulator hangs."""
    poll = select.poll()
    poll.register(0, 0)  # for the end of the stream alone
    poll.poll()
    time.sleep(LEAVING)
    os._exit(1)


def main() -> None:
    name, options = sys.argv[1:]
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print what they like, and not into the messages
    threading.Thread(target=leave, daemon=True).start()
    try:
        environment = make(name, json.loads(options))
    except Exception as error:
        send(sink, {"error": str(error) or repr(error), "kind": type(error).__name__})
        raise SystemExit(1) from error
    about = {"size": environment.size, "tasks": list(environment.tasks), "facts": getattr(environment, "facts", {})}
    send(sink, {"value": about})
    serve(environment, sys.stdin.buffer, sink)
    os._exit(0)  # renderers print tracebacks while Python is taken apart


if __name__ == "__main__":
    main()
