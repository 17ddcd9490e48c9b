"""A LoRA student: only the adapter moves, its base is its teacher, and a checkpoint holds the adapter alone."""

import json
import subprocess
import sys
import time

import peft
import pytest
import torch
from conftest import BRIEF, make_pairs
from safetensors.torch import load_file

from xmodal_opd import checkpoint, config, inspect, lora, models, train
from xmodal_opd.build import build
from xmodal_opd.build.student import load_student
from xmodal_opd.checkpoint import latest
from xmodal_opd.rollout.hf import HFSampler, Sampling
from xmodal_opd.scoring.forward import Responses, token_logp
from xmodal_opd.tokens import token_batch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LORA = ["model.lora={rank: 4, alpha: 8}", "model.train=null", "eval.every=0"]
PROJECTOR = ["model.lora={rank: 4, parts: [language_model]}", "model.train=[projector]", "eval.every=0"]


def load(world, *overrides):
    return config.load(world["recipe"], overrides)


def run(world, folder, *overrides, **options):
    train.train(load(world, f"run_dir={folder}", *overrides), **options)
    return latest(folder)


def base(world):
    return models.load_model(str(world["folder"] / "model"))


def logits(model, parts):
    inputs = parts.adapter.batch([pair.views["student"] for pair in make_pairs(parts.adapter, 2)])
    with torch.no_grad():
        return model(**inputs).logits


def shaken(model):
    """The model with an adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("overrides", [LORA, PROJECTOR], ids=["adapter", "adapter and projector"])
def test_one_step_moves_the_adapter_and_what_was_named_beside_it(world, tmp_path, overrides):
    saved = run(world, tmp_path / "run", *overrides, *BRIEF, "train.steps=1")
    before, after = base(world).state_dict(), build(load(world, *overrides)).student
    lora.load(saved, after)
    state = after.state_dict()
    others = {n for n, p in after.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert others == (set() if overrides == LORA else {n for n in before if models.role_of(n) == "projector"})
    at_base = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    assert at_base.keys() == before.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(at_base[name], tensor)}
    assert moved == {name for name in others if name.startswith("audio_tower")}  # it saw no image
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if ".lora_B." in name)
    where = {models.role_of(name) for name in state if ".lora_" in name}
    assert where == ({"language_model"} if others else {"encoder", "projector", "language_model"})


def test_the_initial_teacher_is_the_base_in_the_same_memory(world):
    parts = build(load(world, *LORA, "objective.tokens.teacher.model=initial"))
    student, teacher = shaken(parts.student), parts.models["initial"]
    held = {p.data_ptr() for p in student.parameters()}
    assert {p.data_ptr() for p in teacher.parameters()} <= held and not lora.layers(teacher)
    assert torch.equal(logits(teacher, parts), logits(base(world), parts))
    assert not torch.equal(logits(teacher, parts), logits(student, parts))


def test_what_trains_beside_the_adapter_is_all_that_a_teacher_copies(world):
    recipe = load(world, *PROJECTOR, "objective.tokens.teacher.model=initial", "scoring.slow.model=ema")
    parts = build(recipe)
    student = shaken(parts.student)
    held = {p.data_ptr() for p in student.parameters()}

    def own(model):
        return {name for name, p in model.named_parameters() if p.data_ptr() not in held}

    moving = {name for name, p in student.named_parameters() if p.requires_grad}
    assert own(parts.models["initial"]) == {name for name in moving if ".lora_" not in name}
    assert own(parts.models["ema"]) == moving
    assert torch.equal(logits(parts.models["initial"], parts), logits(base(world), parts))
    assert torch.equal(logits(parts.models["ema"], parts), logits(base(world), parts))
    models.update_ema(parts.models["ema"], student, 1.0)
    assert torch.equal(logits(parts.models["ema"], parts), logits(student, parts))


@pytest.mark.parametrize("overrides", [LORA, PROJECTOR], ids=["adapter", "adapter and projector"])
def test_a_checkpoint_is_the_adapter_alone_for_us_and_for_peft(world, tmp_path, overrides):
    parts = build(load(world, *overrides))
    student = shaken(parts.student)
    checkpoint.save(tmp_path, student, parts.processor, parts.engine, {"step": 1}, keep=1)
    saved = latest(tmp_path)
    size = sum(t.numel() for t in load_file(saved / "adapter_model.safetensors").values())
    assert size == sum(p.numel() for n, p in student.named_parameters() if ".lora_" in n)
    assert not (saved / "model.safetensors").exists()
    assert (saved / "trained.safetensors").exists() == (overrides == PROJECTOR)
    ours = build(load(world, *overrides)).student
    checkpoint.load(saved, ours, parts.engine)
    assert torch.equal(logits(ours, parts), logits(student, parts))
    theirs = base(world)
    if overrides == PROJECTOR:
        theirs.load_state_dict(load_file(saved / "trained.safetensors"), strict=False)
    theirs = peft.PeftModel.from_pretrained(theirs, saved).eval()
    assert torch.equal(logits(theirs, parts), logits(student, parts))


@pytest.mark.parametrize("overrides", [LORA, PROJECTOR], ids=["adapter", "adapter and projector"])
def test_an_export_is_a_plain_folder_and_leaves_the_student_as_it_was(world, tmp_path, overrides):
    parts = build(load(world, *overrides))
    student = shaken(parts.student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    checkpoint.export(student, parts.processor, tmp_path / "plain")
    after = student.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    plain = models.load_model(str(tmp_path / "plain"))
    assert plain.state_dict().keys() == base(world).state_dict().keys()
    torch.testing.assert_close(logits(plain, parts), logits(student, parts), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(world, tmp_path):
    ema = ["objective.tokens.teacher.model=ema", "engine.ema_rate=0.5"]
    once = run(world, tmp_path / "once", *PROJECTOR, *ema, "train.steps=4")
    killed = tmp_path / "killed"
    code = [sys.executable, "-m", "xmodal_opd.cli", "train", world["recipe"], f"run_dir={killed}", *PROJECTOR, *ema]
    process = subprocess.Popen(code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (latest(killed) and latest(killed).name >= "step-000002"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    twice = run(world, killed, *PROJECTOR, *ema, "train.steps=4", resume=True)
    for name in ("adapter_model.safetensors", "trained.safetensors", "ema.safetensors"):
        ours, expected = load_file(twice / name), load_file(once / name)
        assert ours.keys() == expected.keys() and all(torch.equal(ours[n], expected[n]) for n in expected), name
    ours, expected = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (twice, once))
    assert all(torch.equal(ours[i][k], expected[i][k]) for i in expected for k in expected[i])


def test_eval_and_export_read_an_adapter_and_what_was_made_of_it(world, tmp_path, capsys):
    from xmodal_opd.cli import main

    saved = run(world, tmp_path / "run", *LORA, "train.steps=2", "optim.lr=1e-2", "eval.samples=3")
    recipe = str(tmp_path / "run" / "recipe.yaml")
    records = inspect.evaluate_only(config.load(recipe), str(saved), str(tmp_path / "eval.jsonl"))
    after = [json.loads(line) for line in (tmp_path / "run" / "eval" / "after.jsonl").read_text().splitlines()]
    assert records == after
    export = ["export", recipe, "--checkpoint", str(saved), "--output", str(tmp_path / "plain")]
    assert main(export) == 0 and "model folder" in capsys.readouterr().out
    merged = inspect.evaluate_only(config.load(recipe), str(tmp_path / "plain"), str(tmp_path / "plain.jsonl"))
    assert [r["student"] for r in merged] == [r["student"] for r in after]
    assert main(export) == 1 and "plain is there already; name a folder that is not" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds an adapter, and the recipe has no model.lora"):
        inspect.evaluate_only(load(world), str(saved), "no.jsonl")
    with pytest.raises(ValueError, match=r"another adapter than the recipe's .*; rank there: 4\); use"):
        inspect.evaluate_only(load(world, "model.lora={rank: 2}", "model.train=null"), str(saved), "no.jsonl")


def test_an_adapter_works_wherever_the_model_is_run(family):
    _, model, _, adapter = family
    with torch.no_grad():  # the session's models are shared: what is put in here comes out again
        lora.inject(model, lora.target_modules(model, "all-linear", ["all"]), 4, 8)
    try:
        shaken(model)
        pairs = make_pairs(adapter, 2)
        sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 6)
        rollouts = sampler.generate(pairs, {"a": Sampling(2)}, seed=1)["a"]
        batch = token_batch(rollouts)
        for share in (True, False):
            hidden = Responses(adapter, share).hidden(model, rollouts, "student", grad=True)
            logp = token_logp(model, hidden, rollouts, batch.mask)
            torch.testing.assert_close(logp.detach(), batch.student_logp, atol=1e-4, rtol=1e-4)
            slopes = torch.autograd.grad(logp.sum(), weights(model), allow_unused=True, materialize_grads=True)
            assert sum(slope.abs().sum() for slope in slopes) > 0
    finally:
        lora.without_adapter(model).requires_grad_(True)


def weights(model):
    return [p for n, p in model.named_parameters() if ".lora_B." in n]


def test_a_base_in_bfloat16_trains_through_an_adapter_in_float32(world, tmp_path):
    saved = run(world, tmp_path / "run", *LORA, *BRIEF, "model.dtype=bfloat16", "train.steps=1")
    adapter = load_file(saved / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={rnk: 4}"], r"unknown key 'model.lora.rnk' \(did you mean 'rank'\?\); keys here: alpha, parts"),
        (["model.lora={rank: 0}"], "'model.lora.rank' is 0: .*greater than or equal to 1"),
        (["model.lora={alpha: 0}"], "'model.lora.alpha' is 0"),
        (["model.lora={parts: []}"], r"'model.lora.parts' is \[\]"),
        (["model.lora={targets: q_proj}"], "'model.lora.targets.*' is 'q_proj'"),
        (["model.lora={targets: [q_prj]}"], r"targets names 'q_prj', which is no linear layer of .*; there: .*q_proj"),
        (["model.lora={targets: [lm_head]}"], "targets names 'lm_head', which is no linear layer"),
        (["model.lora={parts: [decoder]}"], "lora.parts names 'decoder', which nothing here matches; roles: encoder"),
        (["model.lora={}", "model.train=[all]"], "frees .* more that model.lora adapts; .* narrow model.train"),
        (["model.lora={}", "model.train=[encoder]"], "more that model.lora adapts"),
        (["model.lora={}", "model.train=[]"], r"'model.train' is \[\]"),
        (["model.train=[audio_tower, projektor]"], "model.train names 'projektor', which nothing here matches"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(world, overrides, message):
    train_nothing_else = ["model.train=null"] if len(overrides) == 1 and "lora" in overrides[0] else []
    with pytest.raises(ValueError, match=message):
        load_student(load(world, *train_nothing_else, *overrides))


def test_roles_are_the_parts_of_a_model(world):
    student = load_student(load(world, "model.train=[encoder]"))
    roles = {n: models.role_of(n) for n, _ in student.named_parameters()}
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {n for n in roles if roles[n] == "encoder"}
    assert roles["audio_tower.conv1.weight"] == "encoder" and roles["audio_tower.proj.weight"] == "projector"
    assert roles["model.embed_tokens.weight"] == models.role_of("lm_head.weight") == "language_model"
