"""Every recipe in configs/ resolves; every method takes a step that is finite and reaches the student."""

import shutil
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import yaml
from teacher import Teacher, serving

from xmodal_opd import config, schema
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.models import load_model, load_processor
from xmodal_opd.step import train_step

ROOT = Path(__file__).parents[1]
SHARED = ("audio.yaml", "vision.yaml", "robot.yaml", "cord_7b.yaml", "vla_opd_7b.yaml")  # settings that recipes include
RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name not in SHARED]
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_method_takes_a_finite_step(path, world, tmp_path):
    tree = yaml.safe_load(Path(world["recipe"]).read_text()) | {"include": [str(path)]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with serving_any(tree["model"]["name"], config.read(path)) as overrides:
        parts = build(config.load(str(tmp_path / "recipe.yaml"), overrides))
        moves(parts)


@contextmanager
def serving_any(folder, tree):
    """Where to find the teachers that a method has behind servers."""
    if not tree.get("teachers"):
        yield []
        return
    with serving(Teacher(load_model(folder), load_processor(folder))) as teacher:
        yield [f"teachers.{name}.servers=['{teacher.url}']" for name in tree["teachers"]]


def moves(parts):
    if parts.judge:  # a random model is never right, and equal rewards teach nothing
        parts = replace_judge(parts)
    before = {n: p.detach().clone() for n, p in parts.student.named_parameters()}
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 3)]
    values = train_step(parts, pairs, 0)
    assert not values["skipped"] and values["grad_norm"] > 0
    assert any(not (p == before[n]).all() for n, p in parts.student.named_parameters())


def replace_judge(parts):
    from dataclasses import replace

    return replace(parts, judge=lambda prompts, completions, **_: [float(i % 2) for i in range(len(completions))])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_and_says_what_it_is(path):
    recipe = config.load(str(path))
    dumped = yaml.safe_load(config.dump(recipe))
    assert recipe.name == path.stem and recipe == schema.kind_of(dumped).model_validate(dumped)


def test_cord_is_the_papers():
    tree = config.read(ROOT / "configs" / "methods" / "cord.yaml")
    assert tree["objective"]["tokens"]["weights"] == [
        {"top_kl": {"k": 20, "alpha": 2.0}},
        {"position_linear": {"beta": 2.0}},
    ]
    assert tree["rollout"]["samplings"] == {
        "tokens": {"n": 1, "temperature": 1.0},
        "sequences": {"n": 4, "temperature": 1.5},
    }


def test_uni_opd_tells_how_the_teacher_orders_right_and_wrong(world, tmp_path):
    tree = yaml.safe_load(Path(world["recipe"]).read_text())
    tree |= {"include": [str(ROOT / "configs" / "methods" / "uni_opd.yaml")]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    parts = replace_judge(build(config.load(str(tmp_path / "recipe.yaml"))))
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 3)]
    values = train_step(parts, pairs, 0)
    shares = [values[f"order/{name}/tokens"] for name in ("all_right", "all_wrong", "consistent", "reversed")]
    assert sum(shares) == pytest.approx(1) and 0 <= values["order/pair_reversal/tokens"] <= 1
    assert values["order/return_right/tokens"] < 0 and values["order/return_wrong/tokens"] < 0  # a mean of -KL's


def test_what_cannot_teach_or_train_is_refused(world, tmp_path):
    from tools.tiny import model as tiny

    load = lambda *overrides: build(config.load(world["recipe"], overrides))  # noqa: E731
    with pytest.raises(ValueError, match=r"weights in torch\.bfloat16 are too coarse to train"):
        load("model.dtype=bfloat16")
    other = tmp_path / "other"
    shutil.copytree(world["folder"] / "model", other)
    words = tiny.make_tokenizer(["other words make other tokens, and these are other words"])
    tiny.make_processor(words).save_pretrained(other)
    with pytest.raises(ValueError, match="has another vocabulary"):
        load(f"objective.tokens.teacher.model={other}")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights in .*other are broken"):
        load(f"model.name={other}")
