"""How large the gap was, how much of it closed, and how sure that is. Numbers in, numbers out; imports nothing of ours.

A record is one question: {"key", "task", "text_correct", "student_correct"}. Accuracies are shares from 0 to 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, Any]
Interval = list[float]  # [low, high] of the 95 % percentile bootstrap
DRAWS = 2000


def bootstrap_interval(correct: Sequence[bool | float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean; the same for the same seed. Collapses to a point when all are alike."""
    low, high = _interval(resampled_means(np.asarray(correct, float)[:, None], seed)[:, 0])
    return low, high


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score (JASA 22, 1927): never a point, never beyond 0 and 1."""
    share, spread = right / count, z * z / count
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def shares(records: Sequence[Record]) -> dict[str, Any]:
    """How many of a benchmark's questions were decided, and which share of them is right, with its `_ci`."""
    decided = [r["correct"] for r in records if r["correct"] is not None]
    if not decided:
        return {"questions": 0, "accuracy": None}
    right = sum(decided)
    interval = list(wilson_interval(right, len(decided)))
    return {"questions": len(decided), "accuracy": right / len(decided), "accuracy_ci": interval}


def accuracies(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """Text and student accuracy and the gap between them on one evaluation, each with its `_ci`."""
    estimates = {
        "text_accuracy": lambda m: m[:, 0],
        "student_accuracy": lambda m: m[:, 1],
        "gap": lambda m: m[:, 0] - m[:, 1],
    }
    return {"questions": len(records), **_estimates(_with_draws(_columns(records), seed), estimates)}


def summary(before: Sequence[Record], after: Sequence[Record], seconds: float, seed: int = 0) -> dict[str, Any]:
    """What training did to the gap, each number with its `_ci`, overall and under `tasks`.

    gap_before and gap_after are taken from the text accuracy *before* training, as in CORD (arXiv:2601.16547 §4), so
    losing text skill does not close a gap; `gap_to_text_after` is taken from the text accuracy after. gap_closed = 1 −
    gap_after / gap_before; None, with the reason in `gap_closed_note`, where there was no gap to speak of. Intervals
    resample questions, all four answers to one together. Raises ValueError when the evaluations differ in questions.
    """
    pairs = paired(before, after)
    tasks = sorted({str(b["task"]) for b, _ in pairs})
    return {
        **change(pairs, seed),
        "seconds": round(seconds, 1),
        "tasks": {task: change([p for p in pairs if str(p[0]["task"]) == task], seed) for task in tasks},
    }


def paired(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The records of the two evaluations, question by question."""
    first, second = ({r["key"]: r for r in records} for records in (before, after))
    odd = sorted(set(first) ^ set(second), key=str)
    if odd or not first or len(first) != len(before) or len(second) != len(after):
        why = f"{len(odd)} are in only one of them, such as {odd[0]!r}" if odd else "keys are missing or double"
        raise ValueError(
            f"the evaluations before ({len(before)} questions) and after ({len(after)}) differ: {why};"
            " evaluate the same shards with the same eval.samples"
        )
    return [(first[key], second[key]) for key in first]


def change(pairs: Sequence[tuple[Record, Record]], seed: int = 0) -> dict[str, Any]:
    """The numbers of `summary` for some questions."""
    columns = np.hstack([_columns([b for b, _ in pairs]), _columns([a for _, a in pairs])])
    means = _with_draws(columns, seed)
    plain = {
        "text_accuracy_before": lambda m: m[:, 0],
        "text_accuracy_after": lambda m: m[:, 2],
        "student_accuracy_before": lambda m: m[:, 1],
        "student_accuracy_after": lambda m: m[:, 3],
        "gap_before": lambda m: m[:, 0] - m[:, 1],
        "gap_after": lambda m: m[:, 0] - m[:, 3],
        "gap_to_text_after": lambda m: m[:, 2] - m[:, 3],
    }
    return {"questions": len(pairs), **_estimates(means, plain), **gap_closed(means)}


def gap_closed(means: NDArray[np.float64]) -> dict[str, Any]:
    """1 − gap_after / gap_before, from the means [1 + DRAWS, 4] of text and student before, text and student after.

    The first row is the measurement, the others its resamples.
    """
    before, after = means[:, 0] - means[:, 1], means[:, 0] - means[:, 3]
    if (before <= 0).mean() > 0.025 or before[0] <= 0:
        note = f"the gap before training, {100 * before[0]:.1f} points, is not distinguishable from none"
        return {"gap_closed": None, "gap_closed_ci": None, "gap_closed_note": note}
    closed = 1 - after[before > 0] / before[before > 0]
    return {"gap_closed": float(closed[0]), "gap_closed_ci": list(_interval(closed[1:]))}


def resampled_means(columns: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[DRAWS, k]: column means [n, k] over questions drawn with replacement, rows kept together."""
    if not len(columns):
        raise ValueError("no questions to compute an interval from")
    rng, n = np.random.default_rng(seed), len(columns)
    block = 1 + 200_000 // n  # draws at once: bounded memory for many questions, few loops for few
    blocks = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    return np.concatenate([columns[rng.integers(0, n, (size, n))].mean(1) for size in blocks])


def _columns(records: Sequence[Record]) -> NDArray[np.float64]:
    """[n, 2]: text and student."""
    return np.array([[r["text_correct"], r["student_correct"]] for r in records], float).reshape(-1, 2)


def _with_draws(columns: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[1 + DRAWS, k]: the means, then the resampled means."""
    draws = resampled_means(columns, seed)
    return np.vstack([columns.mean(0), draws])


def _estimates(means: NDArray[np.float64], of: Mapping[str, Callable[[NDArray[np.float64]], Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, f in of.items():
        values = f(means)
        out |= {name: float(values[0]), f"{name}_ci": list(_interval(values[1:]))}
    return out


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
