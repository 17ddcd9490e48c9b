"""The small policy in the package: what ships is what the documents say of it."""

from pathlib import Path

import pytest

from modalities.action.environment import AssetError
from modalities.action.metaworld import MetaWorld
from tools.tiny_robot import TASKS
from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.episodes import evaluate
from xmodal_opd.models import ASSETS
from xmodal_opd.types import Pair


def test_the_models_in_the_package_are_12_mb_at_most():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_it_learnt_the_tasks_of_its_recipe_and_one_that_is_not_trained():
    assert set(TASKS) - set(config.load("vla_opd").data.tasks) == {"button-press-v3"}


def test_it_acts_well_on_words():
    try:
        MetaWorld(width=28, height=28).reset("reach-v3", 0)
    except AssetError as error:
        pytest.skip(str(error))
    parts = build(config.load("vla_opd", ["robot.workers=2"]))
    pairs = [Pair(f"coffee-button-v3/{n}", {}, None, {"task": "coffee-button-v3", "start": n}) for n in range(2)]
    records = evaluate(pairs, parts.sampler, parts.responses, parts.instructor, batch=2)
    parts.sampler.workers.close()
    assert all(r["text_correct"] and r["text_steps"] < 50 for r in records)
    assert all(0 < r["token_kl"] < 10 and Path(r["key"]).parts[0] == r["task"] for r in records)
