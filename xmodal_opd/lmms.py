"""Answers question by question in the form lmms-eval writes and reads (0.7.3): a samples JSONL for each task.

FOLDER/DATE_samples_TASK.jsonl has a line a question, and FOLDER/DATE_results.json what lmms-eval's viewer lists it by.
A line has `doc_id` (its number), `target`, `input` (the text asked), `resps` and `filtered_resps`, `token_counts`,
`doc_hash`, and metrics: `score`, 1 or 0, which is what a comparison with a baseline looks for, and of a benchmark the
answer that was read (`extracted`) and `how`. Documents themselves are not in it, as there.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
SIDES = ("student", "text")  # the two answers of an evaluation on tasks of our own
EXTRA = ("key", "task", "extracted", "how")


def write(records: Sequence[Record], name: str, folder: Path, date: str, model: str) -> list[Path]:
    """The files written. records: of benchmarks, or of an evaluation, which then are the tasks NAME_student, NAME_text.

    Undecided answers are left out; a number in `doc_id` is theirs all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_task = tasks(records, name)
    written = []
    for task, samples in by_task.items():
        written.append(folder / f"{date}_samples_{task}.jsonl")
        written[-1].write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), encoding="utf-8")
    written.append(folder / f"{date}_results.json")
    written[-1].write_text(json.dumps(results(by_task, date, model), indent=2, ensure_ascii=False), encoding="utf-8")
    return written


def tasks(records: Sequence[Record], name: str) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task."""
    if records and "benchmark" not in records[0]:
        return {f"{name}_{side}": numbered([one_side(r, side) for r in records]) for side in SIDES}
    names = dict.fromkeys(r["benchmark"] for r in records)
    return {task: numbered([r for r in records if r["benchmark"] == task]) for task in names}


def one_side(record: Record, side: str) -> dict[str, Any]:
    return {**record, "response": record[side], "correct": record[f"{side}_correct"]}


def numbered(records: Sequence[Record]) -> list[dict[str, Any]]:
    """In the order of their numbers: the question's place in its benchmark, or among the records."""
    samples = [sample(r.get("place", n), r) for n, r in enumerate(records) if r["correct"] is not None]
    return sorted(samples, key=lambda s: s["doc_id"])


def sample(number: int, record: Record) -> dict[str, Any]:
    """One line: an answer that no filter changed."""
    asked = {"key": record["key"], "question": record.get("question"), "answer": record["answer"]}
    return {
        "doc_id": number,
        "target": str(record["answer"]),
        "input": record.get("question") or "",
        "resps": [record["response"]],
        "filtered_resps": record["response"],
        "token_counts": [None],
        "doc_hash": sha256(json.dumps(asked, indent=2, ensure_ascii=False).encode()).hexdigest(),
        "score": float(record["correct"]),
        **{name: record[name] for name in EXTRA if name in record},
    }


def results(by_task: Mapping[str, Sequence[Record]], date: str, model: str) -> dict[str, Any]:
    """Mean score of each task, under lmms-eval's names for metric and filter."""
    counts = {task: {"original": len(samples), "effective": len(samples)} for task, samples in by_task.items()}
    means = {
        task: {"alias": task, "score,none": sum(s["score"] for s in samples) / len(samples)}
        for task, samples in by_task.items()
        if samples
    }
    return {"results": means, "n-samples": counts, "config": {"model": "xmodal-opd"}, "model_name": model, "date": date}
