"""What `check --dry` says of models it has not loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from xmodal_opd import cli, config, dry, models
from xmodal_opd.build import build

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = {"Qwen2-Audio-7B-Instruct": 8_397_094_912, "Qwen2.5-Omni-7B": 8_931_813_888}  # parameters of the weights
PUBLISHED |= {"Qwen2.5-VL-3B-Instruct": 3_754_622_976}
PAPERS = ["cord_qwen2_audio_7b", "cord_qwen2_5_omni_7b"]
SIZES = [(name, 4, "160 answers of at most 200 tokens, 32,000 in all") for name in PAPERS]
SIZES += [("apo_qwen2_5_vl_3b", 8, "1024 answers of at most 4096 tokens, 4,194,304 in all")]


def test_a_teacher_that_is_still_to_be_trained_is_told_without_asking_a_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--dry", str(CONFIGS / "uni_opd_omni.yaml")]) == 1
    told = "no model at 'runs/expert-digits/model': there is no such folder; if another run is to make it, the header"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_recorded_shapes_have_the_published_number_of_parameters(name):
    model = models.empty_model(str(CONFIGS / "models" / name), "bfloat16")
    assert dry.count(model) == PUBLISHED[name]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("name", "devices", "answers"), SIZES)
def test_the_papers_recipes_resolve_without_weights_and_fit_the_devices_they_name(name, devices, answers, capsys):
    assert cli.main(["check", "--dry", str(CONFIGS / f"{name}.yaml"), "--devices", str(devices)]) == 0
    told = capsys.readouterr().out
    assert answers in told
    totals = [float(line.split()[-2]) for line in told.splitlines() if line.startswith(("  training", "  sampling"))]
    assert len(totals) == 2 and all(10 < total < 76 for total in totals)


def test_what_the_paper_settles_is_what_the_recipes_say():
    for name in PAPERS:
        recipe = config.load(str(CONFIGS / f"{name}.yaml"))
        tokens, group = recipe.rollout.samplings["tokens"], recipe.rollout.samplings["sequences"]
        assert (tokens.n, tokens.temperature, group.n, group.temperature) == (1, 1.0, 4, 1.5)
        assert recipe.objective["tokens"].weights[0] == {"top_kl": {"k": 20, "alpha": 2.0}}
        assert (recipe.optim.lr, recipe.rollout.max_tokens, recipe.train.steps) == (3e-5, 200, 3000)


def test_apo_has_the_numbers_of_its_paper():
    recipe = config.load(str(CONFIGS / "apo_qwen2_5_vl_3b.yaml"))
    group, policy, reference = recipe.rollout.samplings["group"], *recipe.objective.values()
    assert (group.n, group.temperature, recipe.train.prompts, recipe.rollout.max_tokens) == (8, 1.0, 128, 4096)
    assert recipe.train.prompts * group.n / recipe.train.minibatches == 64
    assert policy.advantages == ["reward", {"group_normalize": {"eps": 1e-9}}, "stcr"]
    assert (policy.surrogate, policy.reduction) == ("ppo_clip", "token")
    assert (reference.divergence, reference.weights, reference.scale) == ("k3", ["dads"], 1e-3)
    assert (reference.teacher.model, reference.teacher.view) == ("initial", "student")
    assert (recipe.model.min_pixels, recipe.model.max_pixels) == (4 * 28 * 28, 10_000 * 16 * 16)


def test_memory_is_divided_by_stage():
    plan = dry.planned(config.load(str(CONFIGS / "cord_qwen2_audio_7b.yaml")), 4)
    moving, whole = dry.trainable(plan.student), dry.size(plan.student)
    held = [dry.held(replace(plan, stage=stage)) for stage in (None, 0, 1, 2, 3)]
    assert [h["weights"] for h in held] == [whole] * 4 + [whole / 4]
    assert [h["gradients"] / moving for h in held] == [4, 4, 4, 1, 1]
    assert [h["moments and masters"] / moving for h in held] == [8, 8, 3, 3, 3]
    aside = config.load(str(CONFIGS / "cord_qwen2_audio_7b.yaml"), ["engine.offload=[optimizer]"])
    assert dry.held(replace(plan, recipe=aside))["moments and masters"] == 0


def test_activations_counted_without_data_are_those_a_real_run_keeps():
    real, empty = models.load_model("default"), models.empty_model("default")
    assert dry.remembered(empty, 32) == pytest.approx(dry.remembered(real, 32, "cpu"), rel=0.05)


def test_lora_trains_what_the_shape_says_and_its_initial_teacher_costs_nothing_below_zero_3():
    lora = ["model.lora={rank: 8}", "model.train=null", "objective.tokens.teacher.model=initial"]
    student = build(config.load(str(CONFIGS / "cord_audio.yaml"), lora)).student
    plan = dry.planned(config.load(str(CONFIGS / "cord_audio.yaml"), lora), 1)
    assert dry.trainable(plan.student) == dry.trainable(student)
    teachers = [dry.held(replace(plan, stage=stage))["teachers"] for stage in (None, 2, 3)]
    assert teachers == [0, 0, dry.size(plan.student)]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("objective.tokens.divergence=reverse_kk", "unknown divergence 'reverse_kk'"),
        ("engine.offload=[parameters]", "needs engine.zero of 3 or more"),
        ("train.prompts=30", "30 questions a step, which 4 ranks cannot share"),
        ("engine={name: plain, zero: null}", "4 processes were started, but engine.name is plain"),
        ("model.train=[audoi]", "model.train names 'audoi'"),
    ],
)
def test_what_does_not_exist_is_told(more, told, capsys):
    assert cli.main(["check", "--dry", str(CONFIGS / "cord_qwen2_5_omni_7b.yaml"), more, "--devices", "4"]) == 1
    assert told in capsys.readouterr().err
