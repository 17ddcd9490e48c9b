"""What became of the gap: the closing table, the pictures, and the Markdown table over several runs."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xmodal_opd.statistics import accuracies as accuracies
from xmodal_opd.statistics import bootstrap_interval as bootstrap_interval
from xmodal_opd.statistics import shares
from xmodal_opd.statistics import summary as summary

Rows = Sequence[Mapping[str, Any]]
TEXT, STUDENT = "eval/text_accuracy", "eval/student_accuracy"
INK, TEXT_COLOUR, STUDENT_COLOUR, QUIET = "#22303c", "#2f6690", "#e07a3f", "#8a97a3"
COLOURS = (QUIET, TEXT_COLOUR, STUDENT_COLOUR, INK, "#4f9d69", "#a05195", "#d4a72c", "#7fb7d6")
CURVES = {  # title: the metrics drawn in one panel ("distill/" is every one that starts so)
    "loss": ("loss",),
    "token KL, student ‖ teacher": ("distill/", "eval/token_kl"),
    "−log p of what was shown": ("nll",),
    "judge reward": ("reward",),
    "success of sampled episodes": ("episode/success",),
}


# ---- tables


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


def tenths(rows: Rows, name: str) -> tuple[float | None, float | None]:
    """Means of a metric over the first and the last tenth of its values; None where it was never measured."""
    _, values = series(rows, name)
    few = max(1, len(values) // 10)
    return (fmean(values[:few]), fmean(values[-few:])) if values else (None, None)


def by_method(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    methods = dict.fromkeys(str(s["method"]) for s in summaries)
    return {method: [s for s in summaries if str(s["method"]) == method] for method in methods}


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


# ---- pictures


def curves(folder: Path) -> Path:
    """FOLDER/curves.png from FOLDER/metrics.jsonl: both accuracies and the gap, loss, KL, reward and success."""
    rows = read(folder)
    panels = {title: found for title, names in CURVES.items() if (found := _found(rows, names))}
    accuracy = len(_found(rows, (TEXT, STUDENT))) == 2
    acted = _found(rows, ("episodes",))
    what = "success from held-out start states" if acted else "accuracy on held-out questions"
    shape: list[Any] = [["accuracy"] * max(len(panels), 1)] * accuracy + [list(panels)] * bool(panels)
    figure = Figure(figsize=(10, 3.0 * len(shape) + 0.8), layout="constrained")
    axes = figure.subplot_mosaic(shape or [["nothing"]], height_ratios=[1.4, 1.0] if len(shape) == 2 else None)
    for title, axis in axes.items():
        _dress(axis, what if title == "accuracy" else title)
        for colour, name in zip((STUDENT_COLOUR, TEXT_COLOUR, QUIET, INK), panels.get(title, []), strict=False):
            _line(axis, *series(rows, name), colour, name if len(panels[title]) > 1 else "")
        if len(panels.get(title, [])) > 1:
            axis.legend(frameon=False, fontsize=8)
    if accuracy:
        _gap(axes["accuracy"], [rows])
        axes["accuracy"].legend(frameon=False, fontsize=9)
    return _save(figure, folder / "curves.png")


def gap_figure(runs: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """The gap closing over training, one panel a method: mean over its runs, and one standard deviation around it.

    runs: run folders (their metrics.jsonl) by the title of the panel. Raises ValueError for a run without evaluations.
    """
    figure = Figure(figsize=(1.2 + 4.4 * len(runs), 3.6), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (title, folders) in zip(axes, runs.items(), strict=True):
        _dress(axis, title)
        _gap(axis, [read(folder) for folder in folders])
    axes[0].set_ylabel("accuracy", color=QUIET)
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def metrics_figure(runs: Mapping[str, Sequence[Path]], names: Sequence[str], path: Path) -> Path:
    """Metrics over the steps, one panel each: smoothed means over the runs of each method, and one standard deviation.

    runs: run folders by method. Raises ValueError for a metric that a method's runs have not measured at any same step.
    """
    figure = Figure(figsize=(1.2 + 4.4 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        _dress(axis, name)
        for colour, (method, folders) in zip(cycle(COLOURS), runs.items()):
            steps, values = together([read(folder) for folder in folders], (name,))
            lines = np.array([smooth(line, max(1.0, len(steps) / 40)) for line in values[:, 0].tolist()])
            mean, spread = lines.mean(0), lines.std(0, ddof=1) if len(lines) > 1 else np.zeros(len(steps))
            axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, mean, color=colour, linewidth=1.8, label=method)
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


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


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Gaussian mean over about `width` neighbours on either side, without lag, and without a pull at the ends."""
    reach = min(round(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def together(runs: Sequence[Rows], names: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Steps [S] at which every run has all these metrics, and their values [runs, names, S]."""
    each = [[dict(zip(*series(rows, name), strict=True)) for name in names] for rows in runs]
    steps = sorted(set.intersection(*(set(metric) for run in each for metric in run)))
    if not steps:
        raise ValueError(
            f"no step has {' and '.join(names)} in all {len(runs)} runs; evaluate on the way with eval.every"
        )
    return steps, np.array([[[metric[step] for step in steps] for metric in run] for run in each])


def _found(rows: Rows, names: Sequence[str]) -> list[str]:
    have = {name: None for row in rows for name, value in row.items() if isinstance(value, int | float)}
    return [h for name in names for h in have if h == name or (name.endswith("/") and h.startswith(name))]


def _gap(axis: Axes, runs: Sequence[Rows]) -> None:
    """Text accuracy above, student below, what lies between them shaded; the gap in points at both ends."""
    steps, values = together(runs, (TEXT, STUDENT))
    text, student = values.mean(0)
    text_sd, student_sd = values.std(0, ddof=1) if len(runs) > 1 else np.zeros((2, len(steps)))
    axis.fill_between(steps, student, text, color=STUDENT_COLOUR, alpha=0.10, linewidth=0)
    for mean, spread, colour, label in (
        (text, text_sd, TEXT_COLOUR, "text view"),
        (student, student_sd, STUDENT_COLOUR, "student view"),
    ):
        axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.25, linewidth=0)
        axis.plot(steps, mean, color=colour, linewidth=2.2, marker="o", markersize=3.5, label=label)
    for at, side in ((0, "left"), (-1, "right")):
        gap = text[0] - student[at]
        middle = (
            (text[at] + student[at]) / 2 if gap > 0.1 else min(text[at], student[at]) - 0.06
        )  # not across the lines
        axis.annotate(f"gap {100 * gap:.0f}", (steps[at], middle), (-6 if at else 6, 0), textcoords="offset points",
                      ha=side, va="center", color=INK, fontsize=9, fontweight="bold")  # fmt: skip
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(0, 1.04)


def _line(axis: Axes, steps: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    """The values pale, and a smooth line over them when there are many."""
    many = len(values) > 20
    axis.plot(
        steps,
        values,
        color=colour,
        alpha=0.25 if many else 1.0,
        linewidth=1.0 if many else 1.8,
        label="" if many else label,
    )
    if many:
        axis.plot(steps, smooth(values, len(values) / 40), color=colour, linewidth=1.8, label=label)


def _dress(axis: Axes, title: str) -> None:
    """Every picture is over the steps of training."""
    axis.set_xlabel("step", color=QUIET)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c5ccd3")
    axis.tick_params(colors=QUIET, labelsize=8.5)
    axis.grid(axis="y", color="#e8ecef", linewidth=0.8)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    return path
