"""The small policy in the package: what ships is what the documents say of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modalities.action.environment import AssetError
from modalities.action.metaworld import MetaWorld
from tools.tiny.demonstrations import MOVED, TASKS
from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.episodes import evaluate
from xmodal_opd.inspect import evaluate_only
from xmodal_opd.models import ASSETS
from xmodal_opd.types import Pair

TASK = "button-press-topdown-v3"


def test_the_models_in_the_package_are_12_mb_at_most():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_it_learnt_the_tasks_of_its_recipe_and_two_that_are_not_trained_from_the_place_of_its_camera():
    recipe = config.load("vla_opd")
    assert set(TASKS) - set(recipe.data.tasks) == {"reach-v3", "reach-wall-v3"}
    assert tuple(recipe.robot.options["moved"]) == MOVED


def needs_a_driver():
    try:
        MetaWorld(width=28, height=28).reset("reach-v3", 0)
    except AssetError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_runner_of_benchmarks_counts_what_the_evaluation_counts(tmp_path):
    needs_a_driver()
    starts = [f"data.tasks=[{TASK}]", "data.test=5", "eval.kl=false"]
    ours = evaluate_only(config.load("vla_opd", starts), None, str(tmp_path / "ours.jsonl"))
    options = ["--workers", "2", "--episodes-per-task", "5", "--output", tmp_path / "theirs"]
    model = ["--policy", ASSETS / "tiny_robot", "--recipe", "configs/vla_opd.yaml", "--tasks", TASK]
    command = [sys.executable, "tools/eval_robot.py", "--suite", "metaworld", *model, *options]
    subprocess.run(list(map(str, command)), check=True, cwd=Path(__file__).parents[1])
    lines = [json.loads(line) for line in (tmp_path / "theirs" / "episodes.jsonl").read_text().splitlines()]
    theirs = {line["start"]: (line["success"], line["steps"]) for line in lines if "start" in line}
    assert theirs == {n: (r["student_correct"], r["student_steps"]) for n, r in enumerate(ours)}


def test_it_acts_well_on_words():
    needs_a_driver()
    parts = build(config.load("vla_opd", ["robot.workers=2"]))
    pairs = [Pair(f"{TASK}/{n}", {}, None, {"task": TASK, "start": n}) for n in range(2)]
    records = evaluate(pairs, parts.sampler, parts.responses, parts.instructor, batch=2)
    parts.sampler.workers.close()
    assert all(r["text_correct"] for r in records)
    assert all(0 < r["token_kl"] < 10 and Path(r["key"]).parts[0] == r["task"] for r in records)
