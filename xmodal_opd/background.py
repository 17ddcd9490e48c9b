"""Work beside the loop, in a thread: the judge while models score, the next questions while a step trains."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import islice

PATIENCE = 10  # seconds a loop that ends early gives the reading it no longer needs


def later[**P, T](call: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
    """Run `call` in a thread that never keeps the program alive; `.result()` waits for it and raises what it raised."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **options))
        except BaseException as error:  # whatever it is, the loop must hear of it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=getattr(call, "__name__", "later")).start()
    return future


def now[**P, T](call: Callable[P, T], *args: P.args, **options: P.kwargs) -> Future[T]:
    """The same for what cannot run beside the loop: it runs here, at once."""
    future: Future[T] = Future()
    future.set_result(call(*args, **options))
    return future


def read_ahead[T](items: Iterator[T], size: int) -> Iterator[T]:
    """The same items in the same order: while `size` of them are used, a thread reads the next `size`.

    What reading raises is raised where the first of those would come.
    """
    coming = later(lambda: list(islice(items, size)))
    try:
        while taken := coming.result():
            coming = later(lambda: list(islice(items, size)))
            yield from taken
    finally:
        wait([coming], PATIENCE)
