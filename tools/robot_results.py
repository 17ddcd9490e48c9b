"""What an evaluation of robots keeps and tells: a line for each episode, a JSON in lerobot-eval's form, a table."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xmodal_opd.statistics import wilson_interval


@dataclass(frozen=True)
class Setting:
    """What the numbers depend on. Two runs with the same setting may share an output."""

    suite: str
    environment: str
    options: Mapping[str, Any]
    chunk: int | None
    policy: str
    identity: Mapping[str, Any]
    protocol: str | None
    versions: Mapping[str, str]
    facts: Mapping[str, Any]  # what the environment says of itself


@dataclass
class Ledger:
    """OUTPUT/episodes.jsonl: the setting, and then a line for every finished episode, which is on the disk at once."""

    folder: Path
    setting: Setting
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Raises ValueError when the folder holds episodes of another setting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "episodes.jsonl"
        setting: dict[str, Any] = json.loads(json.dumps(asdict(self.setting)))
        told = whole_lines(path)
        if told and (other := [name for name in setting if told[0].get(name) != setting[name]]):
            raise ValueError(
                f"{self.folder} holds episodes with {other[0]} {told[0].get(other[0])!r}, and this run has "
                f"{setting[other[0]]!r}; name another --output, or remove that one to start anew"
            )
        self.done = {f"{r['task']}/{r['start']}": r for r in told[1:]}
        write(path, [setting, *told[1:]])
        if (actions := self.folder / "actions.jsonl").is_file():
            write(actions, whole_lines(actions))

    def add(self, record: dict[str, Any]) -> None:
        with self.lock, (self.folder / "episodes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.done[f"{record['task']}/{record['start']}"] = record

    def keep(self, actions: dict[str, Any]) -> None:
        """A line of OUTPUT/actions.jsonl, which `recorded:` plays again."""
        with self.lock, (self.folder / "actions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(actions) + "\n")


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON; behind the last newline is nothing, or what a kill tore. Raises ValueError naming the file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    try:
        told = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is no file of this program ({error}); name another --output") from None
    if not all(isinstance(line, dict) for line in told):
        raise ValueError(f"{path} is no file of this program; name another --output")
    return told


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """In the place of what was there, at once."""
    aside = path.with_suffix(".new")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)


def eval_info(
    records: Sequence[Mapping[str, Any]], setting: Setting, tasks: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What lerobot 0.6.1's eval_info.json holds, and under "xmodal_opd" what it does not: intervals, lost workers, the
    setting. A reward is 1 at the step that succeeds. Times are those of all episodes, one after the other."""
    groups = {task: [r for r in records if r["task"] == task] for task in dict.fromkeys(r["task"] for r in records)}
    per_task = [
        {"task_group": setting.suite, "task_id": tasks.index(task), "metrics": metrics(some)}
        for task, some in groups.items()
    ]
    spent = sum(r["seconds"] for r in records)
    times = {"eval_s": spent, "eval_ep_s": spent / max(1, len(records))}
    return {
        "per_task": per_task,
        "per_group": {setting.suite: aggregated(records)},
        "overall": {**aggregated(records), **times},
        "xmodal_opd": {
            "tasks": {task: success(some) for task, some in groups.items()},
            "suite": success(records),
            "setting": asdict(setting),
            "wall_s": seconds,
        },
    }


def metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One task's, episode by episode."""
    rewards = [float(r["success"]) for r in records]
    films = {"video_paths": [r["video"] for r in records if "video" in r], "predicted_video_paths": []}
    return {"sum_rewards": rewards, "max_rewards": rewards, "successes": [r["success"] for r in records], **films}


def aggregated(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of = metrics(records)
    mean = sum(of["sum_rewards"]) / len(records) if records else float("nan")
    means = {"avg_sum_reward": mean, "avg_max_reward": mean, "pc_success": 100 * mean, "n_episodes": len(records)}
    return {**means, "video_paths": of["video_paths"], "predicted_video_paths": []}


def success(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of episodes that succeed with Wilson's 95 % interval, their mean length, and what went wrong."""
    right, count = sum(r["success"] for r in records), len(records)
    if not count:
        return {"episodes": 0, "success": None}
    return {
        "episodes": count,
        "success": right / count,
        "success_ci": list(wilson_interval(right, count)),
        "steps": sum(r["steps"] for r in records) / count,
        "lost": sum(r["lost"] for r in records),
        "errors": sum(r["error"] is not None for r in records),
    }


def report(records: Sequence[Mapping[str, Any]], tasks: Sequence[str], suite: str, also: Sequence[str]) -> None:
    """The table, and below it what its numbers do not say."""
    table = Table("task", *(("episodes"), "success %", "95 %", "steps"))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {task: success([r for r in records if r["task"] == task]) for task in tasks}
    for name, of in {**rows, suite: success(records)}.items():
        if name == suite:
            table.add_section()
        if of["episodes"]:
            low, high = of["success_ci"]
            numbers = (f"{100 * of['success']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{of['steps']:.0f}")
            table.add_row(name, str(of["episodes"]), *numbers)
    console = Console()
    console.print(table)
    for line in also:
        console.print(line, highlight=False, markup=False)


def remarks(
    records: Sequence[Mapping[str, Any]], given_up: Mapping[str, str], differs: Sequence[str] = ()
) -> list[str]:
    """given_up: episode -> why. differs: in what this is not the published benchmark."""
    lost = sum(r["lost"] for r in records)
    lines = [f"{lost} times a worker was lost, and its episode run again"] if lost else []
    wrong = [r for r in records if r["error"] is not None]
    lines += [f"{len(wrong)} episodes failed by the policy's answer, such as: {wrong[0]['error']}"] if wrong else []
    lines += [f"given up, and not counted: {key}: {why}" for key, why in given_up.items()]
    if given_up:
        lines.append("run the same command again to try these once more")
    if differs:
        lines.append(f"not comparable with published results: {'; '.join(differs)}")
    return lines
