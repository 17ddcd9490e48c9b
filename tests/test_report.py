"""What a run leaves behind: metrics that survive a resume, intervals that can be trusted, tables and pictures."""

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from rich.progress import track
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xmodal_opd import figures, history, report
from xmodal_opd.history import STUDENT, TEXT
from xmodal_opd.metrics import Metrics, Progress, reward_metrics
from xmodal_opd.statistics import accuracies, bootstrap_interval, gap_closed, paired, resampled_means, summary


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(text: list[int], student: list[int], tasks: str = "a") -> list[dict[str, Any]]:
    return [
        {"key": f"q{i}", "task": tasks[i % len(tasks)], "text_correct": bool(t), "student_correct": bool(s)}
        for i, (t, s) in enumerate(zip(text, student, strict=True))
    ]


def share(right: int, of: int) -> list[int]:
    return [1] * right + [0] * (of - right)


# ---- metrics


def test_each_step_is_one_line_there_as_soon_as_written(tmp_path: Path):
    with Metrics(tmp_path / "new" / "run") as metrics:
        metrics.write(1, {"loss": torch.tensor(0.5), "n": np.int64(3), "note": "ü"})
        assert lines(tmp_path / "new" / "run") == [{"step": 1, "loss": 0.5, "n": 3, "note": "ü"}]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"a": float("nan"), "b": torch.tensor(math.inf), "c": {"d": [-math.inf, 1]}})
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": {"d": [None, 1]}}]


def test_a_resumed_run_has_every_step_once(tmp_path: Path):
    with Metrics(tmp_path) as metrics:
        for step in range(6):
            metrics.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with Metrics(tmp_path, resume_step=3) as metrics:
        metrics.write(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    assert not list(tmp_path.glob("*.part"))


def test_tensorboard_has_the_numbers_and_forgets_the_steps_resumed_over(tmp_path: Path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"distill/tokens": step / 2, "gone": math.nan})
    with Metrics(tmp_path, resume_step=3) as metrics:
        metrics.write(4, {"distill/tokens": 40.0})
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert board.Tags()["scalars"] == ["distill/tokens"]
    assert [(e.step, e.value) for e in board.Scalars("distill/tokens")] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 40.0)]


def test_reward_metrics_leave_out_the_undecided():
    got = reward_metrics([1.0, 0.0, None, 1.0, 1.0, math.nan], [0, 0, 0, 1, 1, 2])
    assert got == pytest.approx({"reward": 0.75, "reward_std": 0.5**0.5 / 2, "frac_reward_zero_std": 0.5})
    assert reward_metrics([None], [0]) == {}


def test_without_a_terminal_progress_is_a_few_plain_lines():
    out = io.StringIO()
    with Progress(100, 40, Console(file=out, width=80), seconds=3600.0) as progress:
        for step in range(41, 101):
            accuracy = {STUDENT: 0.5} if step == 50 else {}
            acted = {"nll": 1.5, "episode/success": 0.25}
            progress.update(step, {"loss": 1 / step, "distill/tokens": 0.25, "reward": math.nan, **accuracy, **acted})
    first, last = out.getvalue().splitlines()
    assert first.startswith("step 41/100 · loss 0.02439 · KL 0.25 · NLL 1.5 · success 25% · ") and "reward" not in first
    assert "step 100/100" in last and "student 50.0%" in last and last.endswith("0:00:00 left")


def test_on_a_terminal_progress_is_one_line_of_80_columns():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    values = {"loss": 0.12345, "distill/tokens": 0.0123, "reward": 0.52, STUDENT: 0.612}
    with Progress(3000, 0, console) as progress:
        progress.update(1200, values)
        for _ in track(range(2), "evaluating", console=console, transient=True):
            pass
    shown = [line for line in out.getvalue().replace("\r", "\n").splitlines() if "student 61.2%" in line]
    assert shown and "1200/3000" in shown[-1] and shown[-1].rstrip().endswith("0:00:00")


# ---- statistics


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_mean():
    correct = [bool(v) for v in share(60, 200)]
    low, high = bootstrap_interval(correct, seed=1)
    assert (low, high) == bootstrap_interval(correct, seed=1) != bootstrap_interval(correct, seed=2)
    assert low < 0.3 < high
    # the normal approximation: 1.96 * sqrt(0.3 * 0.7 / 200) = 0.0635
    assert (high - low) / 2 == pytest.approx(0.0635, abs=0.01)
    assert bootstrap_interval([True] * 5) == (1.0, 1.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(0)
    covered = [
        low <= 0.7 <= high
        for trial in range(40)
        for low, high in [bootstrap_interval([rng.random() < 0.7 for _ in range(60)], trial)]
    ]
    assert sum(covered) / len(covered) > 0.85


def test_no_questions_give_no_interval():
    with pytest.raises(ValueError, match="no questions"):
        bootstrap_interval([])


def test_the_gap_is_taken_from_the_text_before_training():
    got = summary(records(share(9, 10), share(3, 10)), records(share(8, 10), share(6, 10)), 12.34)
    assert got["gap_before"] == pytest.approx(0.6) and got["gap_after"] == pytest.approx(0.3)
    assert got["gap_to_text_after"] == pytest.approx(0.2)
    assert got["gap_closed"] == pytest.approx(0.5)
    assert (got["text_accuracy_after"], got["student_accuracy_after"], got["seconds"]) == (0.8, 0.6, 12.3)
    assert json.loads(json.dumps(got)) == got


def test_losing_the_text_closes_no_gap():
    got = summary(records([1] * 20, share(5, 20)), records(share(5, 20), share(5, 20)), 1.0)
    assert got["gap_closed"] == pytest.approx(0) and got["gap_to_text_after"] == 0


def test_every_interval_holds_its_number_and_the_gap_is_paired():
    same = share(50, 100)
    got = summary(records(same, same[::-1], "ab"), records(same, share(90, 100), "ab"), 1.0)
    for part in (got, *got["tasks"].values()):
        for name in [n[:-3] for n in part if n.endswith("_ci") and part[n] is not None]:
            low, high = part[f"{name}_ci"]
            assert low <= part[name] <= high, name
    # the student is right where the text is: their difference has no spread, though each accuracy has
    paired_up = accuracies(records(same, same))
    assert paired_up["gap_ci"] == [0, 0] and paired_up["text_accuracy_ci"][0] < 0.5


def test_tasks_are_told_apart():
    got = summary(records([1] * 40, [0, 1] * 20, "ab"), records([1] * 40, [1] * 40, "ab"), 1.0)
    assert got["tasks"]["a"]["gap_closed"] == 1 and got["tasks"]["b"]["gap_closed"] is None
    assert got["tasks"]["a"]["questions"] == 20 and got["questions"] == 40


@pytest.mark.parametrize(("text", "student"), [(5, 5), (5, 6), (6, 5)])
def test_without_a_gap_nothing_is_closed_and_the_reason_is_given(text: int, student: int):
    got = summary(records(share(text, 10), share(student, 10)), records(share(9, 10), share(9, 10)), 1.0)
    assert got["gap_closed"] is None and got["gap_closed_ci"] is None
    assert f"{10 * (text - student):.1f} points, is not distinguishable" in got["gap_closed_note"]


def test_the_closed_share_of_given_means():
    means = np.tile([[0.9, 0.3, 0.9, 0.6]], (101, 1))
    assert gap_closed(means)["gap_closed"] == pytest.approx(0.5)


def test_questions_are_resampled_with_all_their_answers():
    columns = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    draws = resampled_means(columns, 0)
    assert (draws[:, 0] == draws[:, 1]).all() and draws[:, 0].std() > 0


@pytest.mark.parametrize(
    ("after", "message"), [(records([1, 1], [1, 0]), "'q2'"), (records([1] * 3, [1] * 3)[:1] * 3, "only one")]
)
def test_evaluations_of_different_questions_are_refused(after: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        paired(records([1, 1, 1], [0, 0, 0]), after)


def test_pairs_go_by_key_not_by_order():
    before = records([1, 0, 1], [0, 0, 1])
    assert paired(before, before[::-1]) == [(r, r) for r in before]


# ---- tables


def three_tasks(right: float) -> list[dict[str, Any]]:
    rng = random.Random(3)
    return records([1] * 60, [int(rng.random() < right) for _ in range(60)], "abc")


def test_the_closing_table_fits_80_columns_and_says_what_happened():
    got = summary(three_tasks(0.3), three_tasks(0.8), 184.0)
    got["tasks"] = {"a very long name of a task indeed": got["tasks"]["a"], "[b]": got["tasks"]["b"]}
    out = io.StringIO()
    report.print_summary(got, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for name in ("text_accuracy_before", "student_accuracy_before", "student_accuracy_after", "gap_closed"):
        assert f"{100 * got[name]:.1f}" in text
        assert "…".join(f"{100 * v:.0f}" for v in got[f"{name}_ci"]) in text
    assert "n = 60" in text and "[b]" in text and "3 min 4 s" in text


def test_the_closing_table_says_why_nothing_was_closed():
    got = summary(records([1] * 9, [1] * 9), records([1] * 9, [1] * 9), 1.0)
    out = io.StringIO()
    report.print_summary(got, Console(file=out, width=80))
    assert "none" in out.getvalue() and "not distinguishable" in out.getvalue()


def test_one_evaluation_has_a_table_too():
    out = io.StringIO()
    kls = [{"token_kl": kl} for kl in (0.1, 0.3, 0.1, 0.3)]
    rows = [r | kl for r, kl in zip(records([1, 1, 1, 1], [1, 0, 1, 0], "ab"), kls, strict=True)]
    report.print_accuracies(rows, Console(file=out, width=80))
    assert "token KL(student view || text view): 0.200 nats [0.1" in out.getvalue()
    rows = [line.split() for line in out.getvalue().splitlines() if "100.0" in line]
    assert rows == [["all", "100.0", "50.0", "50.0"], ["a", "100.0", "100.0", "0.0"], ["b", "100.0", "0.0", "100.0"]]


def test_the_table_over_runs_has_a_line_a_method(tmp_path: Path):
    for name, method, after in (("r1", "CORD", 0.7), ("r2", "CORD", 0.9), ("r3", None, 0.5)):
        (tmp_path / name).mkdir()
        made = summary(three_tasks(0.3), three_tasks(after), 1.0) | ({"method": method} if method else {})
        (tmp_path / name / "summary.json").write_text(json.dumps(made))
    summaries = history.load_summaries([tmp_path / name for name in ("r1", "r2", "r3")])
    head, rule, cord, other = report.table(summaries).splitlines()
    assert head.count("|") == rule.count("|") == cord.count("|") == other.count("|")
    after = [100 * s["student_accuracy_after"] for s in summaries]
    mean, spread = (after[0] + after[1]) / 2, abs(after[0] - after[1]) / 2**0.5
    assert cord.startswith("| CORD | 2 | 100.0 ± 0.0 |") and f"| {mean:.1f} ± {spread:.1f} |" in cord
    assert other.startswith("| r3 | 1 |") and f"| {after[2]:.1f} |" in other


def test_a_run_without_a_gap_is_not_averaged_in():
    some, none = ({"method": "m", **summary(three_tasks(b), three_tasks(0.8), 1.0)} for b in (0.3, 1.0))
    assert report.table([some, none]).rstrip().endswith(f"| {100 * some['gap_closed']:.1f} (1 of 2) |")


def test_other_questions_that_a_run_was_asked_are_a_column(tmp_path: Path):
    for name, right in (("r1", 8), ("r2", 4)):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(
            json.dumps(summary(three_tasks(0.3), three_tasks(0.7), 1.0) | {"method": "APO" if name == "r1" else "GRPO"})
        )
        for file in ("before", "after") if name == "r2" else ("before", "after", "speech"):
            answers = records([1] * 10, share(right, 10))
            (tmp_path / name / "eval" / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in answers))
    (tmp_path / "r2" / "eval" / "bench.jsonl").write_text('{"benchmark": "mmstar", "correct": true}\n')
    head, _, apo, grpo = report.table(history.load_summaries([tmp_path / "r1", tmp_path / "r2"])).splitlines()
    assert head.endswith("| closed % | speech |") and apo.endswith("| 80.0 |") and grpo.endswith("| – |")


def test_metrics_have_a_table_of_their_first_and_last_tenth(tmp_path: Path):
    for seed in (0, 1):
        with Metrics(tmp_path / str(seed)) as metrics:
            for step in range(1, 21):
                metrics.write(step, {"entropy": 1 / step + seed})
    runs = {"APO": [tmp_path / "0", tmp_path / "1"]}
    head, _, line = report.metrics_table(runs, ["entropy", "never"]).splitlines()
    first, last = (1 + 1 / 2) / 2 + 0.5, (1 / 19 + 1 / 20) / 2 + 0.5
    assert head == "| method | runs | entropy, first tenth | last | never, first tenth | last |"
    assert line == f"| APO | 2 | {first:.3f} ± 0.707 | {last:.3f} ± 0.707 | – | – |"


def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no summary\.json"):
        history.load_summaries([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl"):
        figures.curves(tmp_path)


# ---- pictures


def make_run(folder: Path, seed: int, evaluations: bool = True, steps: int = 60) -> Path:
    rng = random.Random(seed)
    with Metrics(folder) as metrics:
        if evaluations:
            metrics.write(0, {TEXT: 0.98, STUDENT: 0.36})
        for step in range(1, steps + 1):
            values = {"loss": 3 / step, "distill/tokens": 1 / step, "reward": rng.random()}
            if evaluations and step % 20 == 0:
                values |= {TEXT: 0.97, STUDENT: 0.36 + 0.005 * step + 0.02 * rng.random()}
            metrics.write(step, values)
    return folder


def shows(path: Path, colour: str) -> bool:
    """Whether a picture has pixels of this colour."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return bool((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any())


def test_curves_are_drawn_from_the_metrics(tmp_path: Path):
    picture = figures.curves(make_run(tmp_path / "run", 0))
    assert picture == tmp_path / "run" / "curves.png"
    assert shows(picture, figures.TEXT_COLOUR) and shows(picture, figures.STUDENT_COLOUR)
    bare = figures.curves(make_run(tmp_path / "bare", 0, evaluations=False))
    assert not shows(bare, figures.TEXT_COLOUR) and shows(bare, figures.STUDENT_COLOUR)


def test_the_evaluations_before_and_after_are_the_ends_of_the_curves(tmp_path: Path):
    folder = make_run(tmp_path, 0, evaluations=False)
    (folder / "summary.json").write_text(json.dumps(summary(three_tasks(0.3), three_tasks(0.8), 1.0)))
    told = history.load_summaries([folder])[0]
    steps, values = history.together([history.read(folder)], (TEXT, STUDENT))
    assert steps == [0, 60] and values[0, 1].tolist() == [told[f"student_accuracy_{w}"] for w in ("before", "after")]
    assert shows(figures.curves(folder), figures.TEXT_COLOUR)


def test_curves_of_one_step_and_of_a_run_still_writing(tmp_path: Path):
    folder = make_run(tmp_path, 0, steps=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')
    assert figures.curves(folder).stat().st_size > 10_000


def test_curves_of_a_run_that_measured_nothing(tmp_path: Path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan})
    assert figures.curves(tmp_path).is_file()


def test_the_gap_figure_shows_the_spread_over_seeds(tmp_path: Path):
    runs = [make_run(tmp_path / str(seed), seed) for seed in range(3)]
    one = figures.gap_figure({"CORD": runs[:1]}, tmp_path / "one.png")
    three = figures.gap_figure({"CORD": runs, "other": runs[1:]}, tmp_path / "three.png")
    assert imread(three).shape[1] > 1.5 * imread(one).shape[1]
    steps, values = history.together([history.read(run) for run in runs], (TEXT, STUDENT))
    assert steps == [0, 20, 40, 60] and values.shape == (3, 2, 4)
    assert values[:, 1, 0].tolist() == [0.36] * 3 and values[:, 1, -1].std() > 0


def test_metrics_are_drawn_a_panel_each_and_a_line_a_method(tmp_path: Path):
    runs = [make_run(tmp_path / str(seed), seed) for seed in range(3)]
    one = figures.metrics_figure({"GRPO": runs[:1]}, ["reward"], tmp_path / "one.png")
    two = figures.metrics_figure({"GRPO": runs[:1], "APO": runs[1:]}, ["reward", "loss"], tmp_path / "two.png")
    assert imread(two).shape[1] > 1.5 * imread(one).shape[1]
    assert shows(two, figures.COLOURS[1]) and not shows(one, figures.COLOURS[1])
    with pytest.raises(ValueError, match="no step has entropy in all 1 runs"):
        figures.metrics_figure({"GRPO": runs[:1]}, ["entropy"], tmp_path / "none.png")


def test_the_gap_figure_of_runs_without_evaluations_says_what_to_set(tmp_path: Path):
    with pytest.raises(ValueError, match=r"eval\.every"):
        figures.gap_figure({"m": [make_run(tmp_path / "r", 0, evaluations=False)]}, tmp_path / "gap.png")


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert figures.smooth([2.0] * 50, 3.0) == pytest.approx([2.0] * 50)
    ramp = figures.smooth([float(i) for i in range(101)], 4.0)
    assert len(ramp) == 101 and ramp[50] == pytest.approx(50)
