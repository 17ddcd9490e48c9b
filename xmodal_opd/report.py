"""What became of the gap, in tables: at the end of a run or an evaluation, and in Markdown over several runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xmodal_opd.history import by_method, read, tenths
from xmodal_opd.statistics import accuracies, bootstrap_interval, shares


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Accuracies (of a robot: success) and gap before and after, in percent with 95 % intervals, overall and per task;
    fits 80 columns."""
    heads = {
        "teacher" if acts(summary) else "text": "text_accuracy_before",
        "student\nbefore": "student_accuracy_before",
        "student\nafter": "student_accuracy_after",
        "gap\nbefore": "gap_before",
        "gap\nafter": "gap_after",
        "closed\n%": "gap_closed",
    }
    return _table(heads, summary, summary["tasks"])


def acts(summary: Mapping[str, Any]) -> bool:
    """Whether it is of a robot's episodes, each from a start state, and not of answers to questions."""
    return summary.get("modality") == "action"


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """The closing table and what is to be said below it."""
    console = console or Console()
    console.print(closing_table(summary))
    for line in remarks(summary):
        console.print(line, style="dim", highlight=False, markup=False)


def print_accuracies(records: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Text and student accuracy of one evaluation and the gap between them, overall and per task."""
    tasks = {task: [r for r in records if str(r["task"]) == task] for task in sorted({str(r["task"]) for r in records})}
    heads = {"text": "text_accuracy", "student": "student_accuracy", "gap": "gap"}
    parts = {task: accuracies(some) for task, some in tasks.items()}
    console = console or Console()
    console.print(_table(heads, accuracies(records), parts))
    if records and records[0].get("token_kl") is not None:
        kls = [r["token_kl"] for r in records]
        low, high = bootstrap_interval(kls)
        console.print(
            f"token KL(student view || text view): {fmean(kls):.3f} nats [{low:.3f}, {high:.3f}]", style="dim"
        )


def print_benchmarks(records: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Accuracy of each benchmark and its categories, and how answers were read that the published rule did not read."""
    console = console or Console()
    for name in dict.fromkeys(r["benchmark"] for r in records):
        some = [r for r in records if r["benchmark"] == name]
        tasks = {task: shares([r for r in some if r["task"] == task]) for task in sorted({r["task"] for r in some})}
        console.print(_table({name: "accuracy"}, shares(some), tasks, width=40))
        for line in readings(some):
            console.print(line, style="dim", highlight=False, markup=False)


def readings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about the answers that the published rule did not read, and about the intervals."""
    ways = Counter(r["how"] for r in records if r["correct"] is not None)
    undecided = Counter(r["how"] for r in records if r["correct"] is None)
    of = f"of {len(records)} answers"
    told = {
        "quick": f"{ways['quick']} {of} were read by quick rules, not by the published evaluation's own",
        "model": f"{ways['model']} {of} were read or compared by a model",
        "random": f"{ways['random']} {of} named no option, and one was drawn, as published",
    }
    lines = [f"{text}." for way, text in told.items() if ways[way]]
    if undecided:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in undecided.most_common())
        lines.append(f"{sum(undecided.values())} {of} are undecided and left out ({reasons}); run again to ask again.")
    return [*lines, "Percent, with 95 % Wilson intervals over questions."]


def _table(
    heads: Mapping[str, str], whole: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]], width: int = 20
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold", max_width=width)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, part in {"all": whole, **(tasks if len(tasks) > 1 else {})}.items():
        label = f"[bold]{escape(name)}[/]\n[dim]n = {part['questions']}[/]"
        table.add_row(label, *(_cell(part, value) for value in heads.values()), end_section=part is whole)
    return table


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Sentences under the table: what the text view became, why a share is missing, how to read it."""
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    what, ones = ("teacher's success", "start states") if acts(summary) else ("text accuracy", "questions")
    return [
        "The {} after training: {}; gap to it: {}.".format(
            what, *(_cell(summary, name, "{} ({})") for name in ("text_accuracy_after", "gap_to_text_after"))
        ),
        *([f"Gap closed: {summary['gap_closed_note']}."] if "gap_closed_note" in summary else []),
        f"Percent, with 95 % intervals over {ones}; gaps are from the {what} before training.",
        f"Took {minutes} min {seconds} s" + (f", {summary['episodes']} episodes." if acts(summary) else "."),
    ]


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line a method: its runs (seeds), and mean ± standard deviation over them, in percent; last, the
    accuracy on other questions where runs have it."""
    others = sorted({name for s in summaries for name in s.get("elsewhere", {})})
    heads = ["text before", "after", "student before", "after", "gap before", "after", "closed %", *others]
    names = ("text_accuracy_before", "text_accuracy_after", "student_accuracy_before", "student_accuracy_after")
    names += ("gap_before", "gap_after", "gap_closed")
    rows = {}
    for method, runs in by_method(summaries).items():
        cells = [_mean_sd([run[name] for run in runs]) for name in names]
        rows[method] = [*cells, *(_mean_sd([run.get("elsewhere", {}).get(name) for run in runs]) for name in others)]
    return _markdown(heads, rows, {method: len(runs) for method, runs in by_method(summaries).items()})


def metrics_table(runs: Mapping[str, Sequence[Path]], names: Sequence[str]) -> str:
    """Markdown, one line a method: means of metrics over the first and the last tenth of the steps, ± over its runs."""
    rows = {}
    for method, folders in runs.items():
        steps = [read(folder) for folder in folders]
        parts = [[tenths(some, name)[end] for some in steps] for name in names for end in (0, 1)]
        rows[method] = [_mean_sd(part, scale=1.0, digits=3) for part in parts]
    heads = [head for name in names for head in (f"{name}, first tenth", "last")]
    return _markdown(heads, rows, {method: len(folders) for method, folders in runs.items()})


def _markdown(heads: Sequence[str], rows: Mapping[str, Sequence[str]], runs: Mapping[str, int]) -> str:
    lines = [["method", "runs", *heads], ["---", *["---:"] * (1 + len(heads))]]
    lines += [[method.replace("|", "/"), str(runs[method]), *cells] for method, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(part: Mapping[str, Any], name: str, form: str = "{}\n[dim]{}[/]") -> str:
    """A number and its interval, in percent; tenths in the interval only where there are questions enough for them."""
    if part[name] is None:
        return "[dim]none[/]"
    digits = 1 if part["questions"] >= 1000 else 0
    return form.format(f"{100 * part[name]:.1f}", "…".join(f"{100 * v:.{digits}f}" for v in part[f"{name}_ci"]))


def _mean_sd(values: Sequence[float | None], scale: float = 100.0, digits: int = 1) -> str:
    known = [scale * v for v in values if v is not None]
    mean = f"{fmean(known):.{digits}f}" if known else "–"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return mean + spread + (f" ({len(known)} of {len(values)})" if 0 < len(known) < len(values) else "")
