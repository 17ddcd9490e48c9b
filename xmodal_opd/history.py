"""What runs left in their folders: summaries, metrics over the steps, answers to other questions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


TEXT, STUDENT = "eval/text_accuracy", "eval/student_accuracy"


def load_summaries(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """summary.json of each run; a run that does not name its `method` goes by its folder. Raises FileNotFoundError."""
    for folder in folders:
        if not (folder / "summary.json").is_file():
            raise FileNotFoundError(f"{folder} has no summary.json: it is not the folder of a run that came to its end")
    return [
        {"method": f.resolve().name, **json.loads((f / "summary.json").read_text("utf-8")), "elsewhere": elsewhere(f)}
        for f in folders
    ]


def elsewhere(folder: Path) -> dict[str, float]:
    """Student accuracy on other questions: of each eval/NAME.jsonl that `xmodal-opd eval` wrote into a run folder;
    answers to benchmarks, which have no two views, are left out."""
    others = sorted(path for path in (folder / "eval").glob("*.jsonl") if path.stem not in ("before", "after"))
    records = {path.stem: map(json.loads, path.read_text("utf-8").splitlines()) for path in others}
    right = {name: [r["student_correct"] for r in some if "student_correct" in r] for name, some in records.items()}
    return {name: fmean(some) for name, some in right.items() if some}


def tenths(rows: Rows, name: str) -> tuple[float | None, float | None]:
    """Means of a metric over the first and the last tenth of its values; None where it was never measured."""
    _, values = series(rows, name)
    few = max(1, len(values) // 10)
    return (fmean(values[:few]), fmean(values[-few:])) if values else (None, None)


def by_method(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    methods = dict.fromkeys(str(s["method"]) for s in summaries)
    return {method: [s for s in summaries if str(s["method"]) == method] for method in methods}


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run. An incomplete last line, of a run still going, is left out.

    Once the run has a summary, its evaluations before and after stand at step 0 and at the last step.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metrics.jsonl: it is not the folder of a run that took a step")
    text = path.read_text("utf-8")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if not rows or not (folder / "summary.json").is_file():
        return rows
    told = json.loads((folder / "summary.json").read_text("utf-8"))
    ends = {"before": 0, "after": rows[-1]["step"]}
    return rows + [
        {"step": step, TEXT: told[f"text_accuracy_{when}"], STUDENT: told[f"student_accuracy_{when}"]}
        for when, step in ends.items()
    ]


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was measured; of two values of one step the later in `rows`."""
    found = {int(row["step"]): float(row[name]) for row in rows if isinstance(row.get(name), int | float)}
    return sorted(found), [found[step] for step in sorted(found)]


def together(runs: Sequence[Rows], names: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Steps [S] at which every run has all these metrics, and their values [runs, names, S]."""
    each = [[dict(zip(*series(rows, name), strict=True)) for name in names] for rows in runs]
    steps = sorted(set.intersection(*(set(metric) for run in each for metric in run)))
    if not steps:
        raise ValueError(
            f"no step has {' and '.join(names)} in all {len(runs)} runs; evaluate on the way with eval.every"
        )
    return steps, np.array([[[metric[step] for step in steps] for metric in run] for run in each])
