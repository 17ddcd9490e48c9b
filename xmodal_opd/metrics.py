"""What a run measures, step by step: metrics.jsonl, TensorBoard events and the line on the console."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from xmodal_opd import dist

Record = Callable[[int, Mapping[str, Any]], None]  # steps done, what was measured
JSONL = "metrics.jsonl"
SHOWN = {  # on the console: the metrics it may stand for, best first ("distill/" is the first that starts so), and how
    "loss": (("loss",), "{:.4g}"),
    "KL": (("distill/",), "{:.3g}"),
    "NLL": (("nll",), "{:.3g}"),
    "success": (("episode/success",), "{:.0%}"),
    "reward": (("reward",), "{:.2f}"),
    "student": (("eval/student_accuracy", "student_accuracy"), "{:.1%}"),
}

SUMMED = (
    "episodes",
    "environment_steps",
    "loss",
    "distill/",
    "num_tokens",
    "judge_failures",
    "teacher_failures",
)  # over ranks: each has its share of these


class Metrics(AbstractContextManager["Metrics"]):
    """Writes one JSON object a step to FOLDER/metrics.jsonl, flushed, and the same to TensorBoard.

    resume_step: steps done when the run goes on; later lines of the interrupted run are dropped, and so is a line that
    was cut short, so no step is there twice.
    """

    def __init__(self, folder: Path, resume_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        keep(folder / JSONL, resume_step)
        self.file = (folder / JSONL).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None, flush_secs=30)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """step: steps done, with this one. Values: numbers, 0-d tensors or what JSON has; NaN and ±inf become null."""
        line = {"step": step} | {name: plain(value) for name, value in values.items()}
        self.file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def keep(path: Path, last: int) -> None:
    """Drop the lines of metrics.jsonl after step `last`, and what a killed writer left behind. All of them or none."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step(line) <= last]
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def plain(value: Any) -> Any:
    """A value as JSON has it: tensors and numpy numbers as numbers, non-finite numbers as None."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reward_metrics(rewards: Sequence[float | None], groups: Sequence[int]) -> dict[str, float]:
    """TRL's `reward`, `reward_std` (mean over groups) and `frac_reward_zero_std` (groups that teach nothing).

    rewards [B]: None or NaN where the judge could not decide; those are left out.
    """
    by_group: dict[int, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None and not math.isnan(reward):
            by_group.setdefault(group, []).append(reward)
    if not by_group:
        return {}
    spread = [stdev(some) if len(some) > 1 else 0.0 for some in by_group.values()]
    return {
        "reward": fmean(r for some in by_group.values() for r in some),
        "reward_std": fmean(spread),
        "frac_reward_zero_std": fmean(s == 0 for s in spread),
    }


def over_ranks(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of one step from those of every rank: sums of what is counted, means of all else.

    Ranks have as many answers each, so means over answers are exact; `entropy` counts a rank's tokens as one.
    """
    together: dict[str, list[float]] = {}
    for some in values:
        for name, value in some.items():
            together.setdefault(name, []).append(value)
    return {name: sum(some) if name.startswith(SUMMED) else fmean(some) for name, some in together.items()}


class Progress(AbstractContextManager["Progress"]):
    """The line on the console: a bar on a terminal; elsewhere plain lines, one each `seconds` and the first and last.

    total: steps of the run. start: steps done before this process.
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None, seconds: float = 15.0):
        self.total, self.start, self.seconds = total, start, seconds
        self.console = console or Console()
        self.began = self.printed = time.monotonic()
        self.seen: dict[str, Any] = {}
        self.bar = self.task = None
        if self.console.is_terminal:
            columns = ("{task.completed}/{task.total}", BarColumn(5), "{task.fields[shown]}")  # 80 columns in all
            self.bar = Bar(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=self.console)
            self.task = self.bar.add_task("", total=total, completed=start, shown="")
            self.bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """step: steps done. A value that is not measured every step stays until the next."""
        now = time.monotonic()
        self.seen |= {name: value for name, value in values.items() if plain(value) is not None}
        left = (now - self.began) / max(step - self.start, 1) * (self.total - step)
        parts = [*shown(self.seen), str(timedelta(seconds=round(left)))]
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, shown="  ".join(parts))
        elif step in (self.start + 1, self.total) or now - self.printed >= self.seconds:
            self.printed = now
            self.console.print(f"step {step}/{self.total} · {' · '.join(parts)} left", highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __exit__(self, *_: object) -> None:
        self.close()


def shown(values: Mapping[str, Any]) -> list[str]:
    """What the console shows of the metrics."""
    parts: list[str] = []
    for label, (names, form) in SHOWN.items():
        found = [n for name in names for n in values if n == name or (name.endswith("/") and n.startswith(name))]
        if found:
            parts.append(f"{label} {form.format(plain(values[found[0]]))}")
    return parts


def _step(line: str) -> float:
    """Of a line of metrics.jsonl; infinite when it was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


@contextmanager
def recording(run: Path, done: int, total: int) -> Iterator[Record]:
    """Where the loop reports a step: the run folder and the console, on rank 0."""
    if dist.rank():
        yield lambda step, values: None
        return
    with Metrics(run, done) as metrics, Progress(total, done) as progress:

        def record(step: int, values: Mapping[str, Any]) -> None:
            metrics.write(step, values)
            progress.update(step, values)

        yield record
