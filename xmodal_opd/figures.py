"""Pictures of runs: the curves of one, the gap closing and metrics over several."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from xmodal_opd.history import STUDENT, TEXT, Rows, read, series, together

INK, TEXT_COLOUR, STUDENT_COLOUR, QUIET = "#22303c", "#2f6690", "#e07a3f", "#8a97a3"


COLOURS = (QUIET, TEXT_COLOUR, STUDENT_COLOUR, INK, "#4f9d69", "#a05195", "#d4a72c", "#7fb7d6")


CURVES = {  # title: the metrics drawn in one panel ("distill/" is every one that starts so)
    "loss": ("loss",),
    "token KL, student ‖ teacher": ("distill/", "eval/token_kl"),
    "−log p of what was shown": ("nll",),
    "judge reward": ("reward",),
    "success of sampled episodes": ("episode/success",),
}


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


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Gaussian mean over about `width` neighbours on either side, without lag, and without a pull at the ends."""
    reach = min(round(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


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
