"""Mathematical equality by `math-verify`, in a child process that time can end: this very file, run as a program."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def maths_equal(pairs: Sequence[tuple[str, str]], seconds: float = 2.0) -> list[bool | None]:
    """Mathematical equality of (answer, reference) pairs by `math-verify`; None where it took longer than `seconds`.

    Runs in a child process, in whose main thread a signal can end it: the library has no other limit, and without one
    a tower of powers written by a model stops the run for good. Seconds are the processor's: a busy machine is no harm.
    """
    if not pairs:
        return []
    limit = 120 + 5 * seconds * len(pairs)  # for what the child's own limit misses
    command = [sys.executable, "-P", str(Path(__file__)), str(seconds)]
    try:
        done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, timeout=limit)
        lines, error = done.stdout.split(), done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        lines, error = (late.stdout or b"").decode().split(), ""
    if error and not lines:
        raise RuntimeError(f"math-verify did not start: {error.strip().splitlines()[-1]}")
    verdicts = [{"1": True, "0": False}.get(line) for line in lines]
    return verdicts + [None] * (len(pairs) - len(verdicts))


def require_maths() -> None:
    """Raises ImportError when `math-verify` is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("`maths: true` needs math-verify, which is not installed: pip install 'xmodal-opd[maths]'")


class _TookTooLong(BaseException):
    """Not an Exception: the library swallows those."""


def _stop(*_: object) -> None:
    raise _TookTooLong


def _compare_maths(seconds: float) -> None:
    """Child process: JSON pairs (answer, reference) from stdin; a line 1, 0 or - (took too long) for each."""
    signal.signal(signal.SIGPROF, _stop)
    for pair in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            given, gold = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=0) for text in pair)
            line = str(int(verify(gold, given, timeout_seconds=0)))
            signal.setitimer(signal.ITIMER_PROF, 0)
        except _TookTooLong:
            line = "-"
        print(line, flush=True)


if __name__ == "__main__":
    # only the LaTeX reader: the library's reader of plain expressions ends in sympy's `eval`
    from math_verify import LatexExtractionConfig, parse, verify

    _compare_maths(float(sys.argv[1]))
