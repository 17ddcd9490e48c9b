"""Dual weights: what moves them, that a checkpoint keeps them, and the one-sided loss they weigh."""

import json
from itertools import islice

import pytest
import torch
from conftest import BRIEF, with_method
from safetensors.torch import load_file

from modalities.vision import prepare as scenes
from xmodal_opd import collect, config, duals, train
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards, training_shards
from xmodal_opd.checkpoint import latest
from xmodal_opd.data import Shards
from xmodal_opd.objective.divergences import SAMPLED
from xmodal_opd.schema import Dual
from xmodal_opd.types import Scores, TokenBatch

SETTINGS = Dual(sampling="group", rate=0.5, warmup=2, least=0.02, low=0.1, high=1.5)


def after(*gaps: float) -> dict[str, float]:
    """What is remembered of images whose teacher was this far ahead, step by step."""
    state = {}
    for gap in gaps:
        state = duals.updated(state, {"image": gap}, SETTINGS)
    return state["image"]


def test_a_weight_follows_how_far_the_teacher_is_ahead():
    """arXiv:2607.20918: β ← clip(β + η (c̄ − ε), .1, β_max), ε from the warm-up."""
    assert after(0.2, 0.4) == {"beta": 1.0, "seen": 2, "slack": pytest.approx(0.3)}
    assert after(0.2, 0.4, 0.9)["beta"] == pytest.approx(1 + 0.5 * 0.6)
    assert after(0.2, 0.4, 0.1)["beta"] == pytest.approx(1 - 0.5 * 0.2)
    assert after(0.2, 0.4, *[9.0] * 3)["beta"] == 1.5
    assert after(0.001, 0.001, 0.01)["beta"] == pytest.approx(1 - 0.5 * 0.01), "no less than 0.02 is asked for"


def test_a_weight_falls_to_its_floor_once_the_teacher_is_hardly_ahead():
    betas = [after(0.2, 0.2, *[0.01] * steps)["beta"] for steps in range(14)]
    assert betas == sorted(betas, reverse=True) and betas[-1] == betas[-2] == 0.1


def test_a_step_that_was_not_finite_moves_no_weight():
    assert after(0.2, 0.4, float("nan"), float("inf")) == after(0.2, 0.4)


def test_kinds_are_apart_and_each_response_counts_once():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    logp = torch.tensor([[-3.0, -1.0], [-2.0, 0.0], [-1.0, -1.0]])
    scores = Scores(teacher_logp=torch.tensor([[-1.0, -2.0], [-1.0, 9.0], [-5.0, -1.0]]))
    batch = TokenBatch(mask, torch.tensor([0, 0, 1]), logp, scores)
    gaps = duals.ahead(batch, ["image", "image", "text"], "teacher")
    assert gaps == {"image": (2 / 2 + 1) / 2, "text": 0.0}
    state = duals.updated({}, gaps, SETTINGS.model_copy(update={"warmup": 1}))
    state = duals.updated(state, {"image": 2.0}, SETTINGS.model_copy(update={"warmup": 1}))
    assert duals.weights(state, ["text", "image", "new"]).tolist() == [1.0, 1.5, 1.0]


def test_the_one_sided_loss_acts_only_where_the_teacher_is_ahead():
    logp = torch.tensor([-2.0, -1.0, -1.0]).requires_grad_()
    value = SAMPLED["one_sided"](logp, torch.tensor([-0.5, -1.0, -3.0]))
    assert value.tolist() == [1.5, 0, 0]
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == [-1, 0, 0]


def test_a_resumed_run_has_the_weights_of_one_that_never_stopped(world, tmp_path):
    short = [*BRIEF, "rollout.samplings.group.n=2", "dual.field=task", "dual.warmup=1", "dual.rate=0.02"]
    recipe = with_method(world, tmp_path, "opod")

    def run(name, steps, **options):
        folder = tmp_path / name
        train.train(config.load(recipe, [*short, f"run_dir={folder}", f"train.steps={steps}"]), **options)
        saved = latest(folder)
        return json.loads((saved / "trainer.json").read_text()), load_file(saved / "model.safetensors")

    whole, weights = run("whole", 2)
    run("halves", 1)
    again, same = run("halves", 2, resume=True)
    assert again["memory"] == whole["memory"] and all(torch.equal(weights[name], same[name]) for name in weights)
    assert {*whole["memory"]["dual"]} <= {"arithmetic", "ordering", "choice"}
    assert any(values["beta"] not in (1.0, 0.1, 2.0) for values in whole["memory"]["dual"].values())


def test_built_in_questions_are_of_the_modality_that_the_student_is_shown(world, tmp_path):
    recipe = config.load(with_method(world, tmp_path, "opod"), ["rollout.samplings.group.n=2"])
    parts = build(recipe)
    pairs = [pair for _, pair in islice(open_shards(recipe)[0].pairs(parts.adapter), 2)]
    metrics = collect.sample(parts, pairs, 0)[1]
    assert {name for name in metrics if name.startswith("dual/")} == {"dual/audio", "dual/audio/ahead"}
    scenes.prepare(tmp_path / "drawn", count=2, families=["charts"], per_shard=2, progress=False, workers=1)
    drawn = list(Shards(str(tmp_path / "drawn")).samples(epochs=1))
    assert {sample["meta"]["modality"] for sample in drawn} == {"image"} and len(drawn) == 2


def test_a_field_that_samples_do_not_have_is_told(world, tmp_path):
    recipe = config.load(with_method(world, tmp_path, "opod"), ["dual.field=mdoality"])
    with pytest.raises(RuntimeError, match=r"broken, .*no dual weight: its meta has no field 'mdoality' \(has: moda"):
        list(training_shards(recipe).samples(epochs=1))


def test_a_dual_weight_of_a_sampling_or_scorer_that_is_not_there_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match=r"dual reads the answers of a sampling \(group\) and the score of a scorer"):
        config.load(with_method(world, tmp_path, "opod"), ["dual.scorer=nobody"])
    with pytest.raises(
        ValueError, match=r"objective\.tokens has the weight 'dual', which the recipe's part `dual:` mak"
    ):
        config.load(with_method(world, tmp_path, "opod"), ["dual=null"])
