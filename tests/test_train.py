"""Whole runs on a random tiny model and real spoken shards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import BRIEF
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from xmodal_opd import collect, config, step, train
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.checkpoint import latest
from xmodal_opd.objective import Term
from xmodal_opd.types import Pair, Rollout

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(world, tmp_path, *overrides, **options):
    recipe = config.load(world["recipe"], [f"run_dir={tmp_path / 'run'}", *overrides])
    return train.train(recipe, **options), tmp_path / "run"


def command(world, folder, *more):
    arguments = [sys.executable, "-m", "xmodal_opd.cli", "train", world["recipe"], f"run_dir={folder}", *more]
    with printed(folder).open("w") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment())


def printed(folder):
    return folder.with_suffix(".log")


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def weights(folder: Path):
    return load_file(latest(folder) / "model.safetensors") | {
        f"optimizer {i} {k}": v
        for i, state in torch.load(latest(folder) / "optimizer.pt", weights_only=True)["state"].items()
        for k, v in state.items()
    }


def test_a_run_leaves_everything_a_user_looks_for(world, tmp_path):
    summary, folder = run(world, tmp_path)
    names = ("text_accuracy", "student_accuracy", "gap")
    wanted = {f"{name}_{when}{ci}" for name in names for when in ("before", "after") for ci in ("", "_ci")}
    assert wanted | {"gap_closed", "seconds", "run_dir"} <= summary.keys()
    assert json.loads((folder / "summary.json").read_text())["method"] == "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "distill/tokens", "reward", "student_accuracy", "grad_norm"} <= lines[0].keys()
    assert "eval/text_accuracy" in lines[1] and lines[0]["distill/tokens"] > 0
    assert config.load(str(folder / "recipe.yaml")).name == "tiny"
    assert json.loads((folder / "provenance.json").read_text())["packages"]["torch"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG" and list(folder.glob("events.out.tfevents*"))
    records = [json.loads(line) for line in (folder / "eval" / "after.jsonl").read_text().splitlines()]
    assert len(records) == 6 and {"student", "text", "answer", "token_kl"} <= records[0].keys()
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    saved = latest(folder)
    again = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(saved)
    assert AutoProcessor.from_pretrained(saved).tokenizer.eos_token == "<|im_end|>"
    before = load_file(world["folder"] / "model" / "model.safetensors")
    moved = {n for n, p in again.state_dict().items() if n in before and not torch.equal(p, before[n])}
    assert moved and all(name.startswith("audio_tower") for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(world, tmp_path, seed):
    whole = command(world, tmp_path / "whole")
    assert whole.wait() == 0, printed(tmp_path / "whole").read_text()
    killed, rng = tmp_path / "killed", random.Random(seed)
    for goal in (1, 3):  # kill it soon after it gets this far, in the middle of whatever it does then
        process = command(world, killed, "--resume")
        while not (latest(killed) and int(latest(killed).name[-6:]) >= goal):
            assert process.poll() is None, printed(killed).read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.wait()
    last = command(world, killed, "--resume")
    assert last.wait() == 0, printed(killed).read_text()
    ours, expected = weights(killed), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    same = [(f / "eval" / "after.jsonl").read_text() for f in (killed, tmp_path / "whole")]
    assert same[0] == same[1]


STOPS = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of three steps that nothing stopped."""
    return run(world, tmp_path_factory.mktemp("whole"), *BRIEF, "train.steps=3")[1]


@STOPS
def test_a_signal_stops_a_run_after_its_step_and_it_goes_on_to_the_same_bits(
    world, whole, tmp_path, monkeypatch, capsys, number, code
):
    def struck(parts, pairs, at, *more):
        if at == 1:
            os.kill(os.getpid(), number)
        return step.train_step(parts, pairs, at, *more)

    steps = [*BRIEF, "train.steps=3", "checkpoint.every=3"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "train_step", struck)
        run(world, tmp_path, *steps)
    folder = tmp_path / "run"
    assert stopped.value.code == code and latest(folder).name == "step-000002"
    assert "--resume" in capsys.readouterr().out
    run(world, tmp_path, *steps, resume=True)
    ours, expected = weights(folder), weights(whole)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
@STOPS
def test_a_stopped_run_saves_after_its_step_and_says_how_to_go_on(world, tmp_path, number, code):
    process = command(world, tmp_path / "run", "train.steps=5000", "checkpoint.every=100000", "eval.every=0")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, printed(tmp_path / "run").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == code
    assert "--resume" in printed(tmp_path / "run").read_text()
    done = metrics.read_text().count("\n")
    assert latest(tmp_path / "run").name == f"step-{done:06d}"


def test_draws_belong_to_the_question_the_step_and_the_seed_not_to_the_rank():
    def answers(*keys):
        return [Rollout(Pair(k, {}), [1], [0.0], "", True, group) for group, k in enumerate(keys) for _ in range(3)]

    whole, part = answers("a", "b", "c"), answers("c")
    names = ["x"] * 9
    drawn = collect.draws(whole, names, seed=1, step=2)
    assert drawn.unique().numel() == 9 and drawn.min() >= 0 and drawn.max() < 1
    assert torch.equal(collect.draws(part, names[:3], seed=1, step=2), drawn[6:])
    for other in (
        collect.draws(whole, names, 1, 3),
        collect.draws(whole, names, 2, 2),
        collect.draws(whole, ["y"] * 9, 1, 2),
    ):
        assert not (other == drawn).any()


ANCHOR = "{sampling: tokens, view: teacher, teacher: {model: initial}, divergence: forward_kl}"
SCORING = ["scoring.teacher={divergence: true}", "scoring.student={view: student}"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["objective.tokens.teacher.model=initial"], id="initial"),
        pytest.param(["objective.tokens.teacher.model=ema", "engine.ema_rate=0.5"], id="ema"),
        pytest.param(["objective.tokens.sampling=sequences", "rollout.samplings.tokens=null"], id="shared rollouts"),
        pytest.param([f"objective.anchor={ANCHOR}", "model.train=[all]"], id="text anchor"),
        pytest.param(["objective.tokens.divergence=k2", "objective.tokens.weights=[]"], id="sampled"),
        pytest.param(["objective.tokens.teacher.stop_gradient=false", "model.train=[all]"], id="both sides"),
        pytest.param(
            ["objective.tokens.teacher.stop_gradient=false", "model.train=[all]", "objective.tokens.divergence=k2"],
            id="both sides, sampled",
        ),
        pytest.param(["engine.share_prefix=false"], id="repeated prompts"),
        pytest.param(["engine.autocast=true"], id="autocast"),
        pytest.param(["model.train=[all]", *SCORING, "objective.tokens.weights=[tip]"], id="tip"),
    ],
)
def test_options_the_paper_leaves_open_move_the_student(world, overrides):
    parts = build(config.load(world["recipe"], overrides))
    asked = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 6)]
    lines = [step.train_step(parts, asked[3 * number :][:3], number) for number in (0, 1)]
    assert all(line["grad_norm"] > 0 and not line["skipped"] for line in lines)
    if any("anchor" in override for override in overrides):  # zero until the student has moved away
        assert lines[0]["distill/anchor"] == pytest.approx(0, abs=1e-6) and lines[1]["distill/anchor"] > 1e-6


def test_a_run_goes_on_as_what_it_was_and_is_measured_anew(world, tmp_path, capsys):
    _, folder = run(world, tmp_path, "train.steps=1", "eval.every=0")
    (folder / "eval" / "after.jsonl").write_text("of a shorter run")
    summary, _ = run(world, tmp_path, "train.steps=2", "eval.every=0", resume=True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2 and summary["questions"] == 6
    with pytest.raises(ValueError, match=r"run of another recipe \(optim.lr: 0.001 there, 0.5 now\)"):
        run(world, tmp_path, "optim.lr=0.5", resume=True)
    with pytest.raises(ValueError, match=r"run of another recipe \(eval.samples: None there, 2 now\)"):
        run(world, tmp_path, "eval.samples=2", resume=True)
    run(world, tmp_path / "new", "train.steps=1", *BRIEF, resume=True)  # a script that always resumes
    assert f"nothing to resume in {tmp_path / 'new' / 'run'}: a new run begins there" in capsys.readouterr().out


def test_an_average_of_the_weights_is_kept_and_comes_back(world, tmp_path):
    teacher = ["objective.tokens.teacher.model=ema", "engine.ema_rate=0.5", *BRIEF]
    run(world, tmp_path / "once", *teacher, "train.steps=2")
    run(world, tmp_path / "twice", *teacher, "train.steps=1")
    run(world, tmp_path / "twice", *teacher, "train.steps=2", resume=True)
    once, twice = (load_file(latest(tmp_path / name / "run") / "ema.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
    student = load_file(latest(tmp_path / "once" / "run") / "model.safetensors")
    assert any(not torch.equal(once[name], student[name]) for name in once)


def test_a_disk_that_fills_up_in_the_middle_is_told_with_what_is_good(world, tmp_path, monkeypatch, capsys):
    from xmodal_opd.cli import main
    from xmodal_opd.metrics import Metrics

    write = Metrics.write

    def full(self, step, values):
        if step == 2:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(self, step, values)

    monkeypatch.setattr(Metrics, "write", full)
    assert main(["train", world["recipe"], f"run_dir={tmp_path / 'run'}", "eval.every=0"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full, and metrics.jsonl could not be written; the last good checkpoint is" in error
    assert "step-000001; make room and run with --resume" in error


def test_the_command_makes_its_shards_once_and_ends_with_the_table(world, tmp_path, capsys):
    from xmodal_opd.cli import main

    data = [f"data.{split}={tmp_path / split}" for split in ("train", "test")]
    options = [*data, "data.prepare={train: 6, test: 3}", "train.steps=1", "eval.every=0"]
    assert main(["train", world["recipe"], *options, f"run_dir={tmp_path / 'one'}"]) == 0
    shown = capsys.readouterr().out
    assert "closed" in shown and "n = 3" in shown and shown.strip().endswith(f"run folder: {tmp_path / 'one'}")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("t*/*.tar")}
    assert main(["train", world["recipe"], *options, f"run_dir={tmp_path / 'two'}"]) == 0
    assert made and {path: path.stat().st_mtime_ns for path in tmp_path.glob("t*/*.tar")} == made


def test_a_nan_advantage_without_a_judge_reaches_the_engine(world):
    parts = build(config.load(world["recipe"], ["judge=null", "objective.sequences=null"]))
    pairs = [pair for _, (_, pair) in zip(range(2), open_shards(parts.recipe)[0].pairs(parts.adapter), strict=False)]
    sampled, _ = collect.sample(parts, pairs, 0)
    lost = Term.build(surrogate="reinforce", advantages=[f"{__name__}:nothing"])
    assert step.judge_term(parts, lost, "tokens", sampled).advantage.isnan().any()


def nothing(batch, advantage):
    return advantage + float("nan")


def test_minibatches_are_updates_on_parts_of_the_same_step(world):
    """Where no update happens between them, their mean is the gradient of the whole step, and the metrics are its."""
    found = {}
    for count in (1, 3):
        parts = build(config.load(world["recipe"], [f"train.minibatches={count}"]))
        pairs = [
            pair for _, (_, pair) in zip(range(4), open_shards(parts.recipe)[0].pairs(parts.adapter), strict=False)
        ]
        slopes = []
        parts.engine.step = lambda number, parts=parts, slopes=slopes: (
            slopes.append(torch.cat([p.grad.flatten() for p in parts.engine.parameters if p.grad is not None]))
            or parts.student.zero_grad()
            or {"skipped": float(len(slopes) == 2), "grad_norm": float(len(slopes))}
        )
        values = step.train_step(parts, pairs, 0)
        found[count] = torch.stack(slopes).mean(0), values
        assert len(slopes) == count and (count == 1 or len({float(slope.norm()) for slope in slopes}) > 1)
        assert values["skipped"] == (count == 3) and values["grad_norm"] == (count + 1) / 2
    torch.testing.assert_close(found[3][0], found[1][0], atol=1e-6, rtol=1e-3)
    for name in ("loss", "loss/tokens", "distill/tokens"):
        assert found[3][1][name] == pytest.approx(found[1][1][name], rel=1e-4)
    sampled, _ = collect.sample(parts, pairs, 0)
    dealt = step.minibatches(sampled, 3)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(sampled.rollouts)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_however_a_step_is_cut_the_gradient_is_the_same(world):
    gradients = []
    for budget in (10**6, 200, 1):
        parts = build(config.load(world["recipe"], [f"engine.micro_tokens={budget}", "optim.clip=1e9"]))
        # a random model rarely ends an answer and is never right: end at any fifth token, and reward by length
        ragged = replace(parts.sampler, eos=list(range(0, parts.vocab, 5)))
        parts = replace(
            parts, sampler=ragged, judge=lambda prompts, completions, **_: [len(c) % 3 for c in completions]
        )
        pairs = [
            pair for _, (_, pair) in zip(range(3), open_shards(parts.recipe)[0].pairs(parts.adapter), strict=False)
        ]
        kept = {}
        parts.engine.step = lambda _number, parts=parts, kept=kept: (
            kept.update({n: p.grad.clone() for n, p in parts.student.named_parameters() if p.grad is not None}) or {}
        )
        values = step.train_step(parts, pairs, 0)
        assert 1 < values["completions/mean_length"] < 8 and values["reward_std"] > 0
        gradients.append(kept)
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, slope in gradients[0].items():
            torch.testing.assert_close(other[name], slope, atol=1e-5, rtol=1e-3)
