"""Schedules: (step, total) -> multiplier. `step` counts from 0; over the first `warmup` steps the value rises from 0.

For a learning rate the value multiplies the optimiser's own rate; for a loss term it is the scale itself. `f2b` and
`b2f` are schedules of how deep into its episodes a student acts, counted in decisions.
"""

import math
from collections.abc import Callable


def constant(step: int, total: int, *, start: float = 1.0, warmup: int = 0) -> float:
    """`start` throughout."""
    return start * rise(step, warmup)


def linear(step: int, total: int, *, start: float = 1.0, final: float = 0.0, warmup: int = 0) -> float:
    """A straight line from `start` after the warm-up to `final` at the last step."""
    return rise(step, warmup) * (start + (final - start) * progress(step, total, warmup))


def cosine(step: int, total: int, *, start: float = 1.0, final: float = 0.0, warmup: int = 0) -> float:
    """Half a cosine from `start` after the warm-up to `final` at the last step. SGDR, arXiv:1608.03983."""
    return rise(step, warmup) * (final + (start - final) * (1 + math.cos(math.pi * progress(step, total, warmup))) / 2)


def rise(step: int, warmup: int) -> float:
    """1/(warmup+1) at step 0, so that the first step already moves, and 1 from step `warmup` on."""
    return min(1.0, (step + 1) / (warmup + 1))


def progress(step: int, total: int, warmup: int) -> float:
    """0 until the warm-up ends, 1 at the last step (total − 1) and after."""
    return min(1.0, max(0.0, (step - warmup) / max(1, total - 1 - warmup)))


def f2b(step: int, *, limit: int, every: int = 6) -> int:
    """Decisions until an episode is cut: min(1 + ⌊step/every⌋, limit), front to back. TCOD, arXiv:2604.24005."""
    return min(1 + step // every, limit)


def b2f(step: int, expert: int, *, every: int = 5) -> int:
    """Decisions, of the `expert` many that the expert needs, which it takes before the student goes on:
    max(0, expert − 1 − ⌊step/every⌋), back to front. TCOD, arXiv:2604.24005."""
    return max(0, expert - 1 - step // every)


SCHEDULES: dict[str, Callable[..., float]] = {f.__name__: f for f in (constant, linear, cosine)}
