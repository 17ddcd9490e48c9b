"""A teacher behind a server teaches what the same teacher would here; whatever is missing or misplaced is told."""

import socket
from itertools import islice
from math import nan

import pytest
import torch
from teacher import Refused, Teacher, serving

from xmodal_opd import collect, config, models, step, train
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.models import load_model, load_processor

NAME = "objective.tokens.teacher.model"
PLAIN = ["objective.sequences=null", "judge=null", "objective.tokens.weights=[]", "optim.clip=1e9"]


@pytest.fixture(scope="module")
def expert(world):
    """A folder with another model than the student, and the same behind a server."""
    folder = world["folder"] / "expert"
    model = load_model(str(world["folder"] / "model"))
    processor = load_processor(str(world["folder"] / "model"))
    model.resize_token_embeddings(len(processor.tokenizer))  # a random head would give its padding some mass
    for part in (model, processor):
        part.save_pretrained(world["folder"] / "student")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + 1)))
    for part in (model, processor):
        part.save_pretrained(folder)
    with serving(Teacher(models.attend_in_blocks(model.eval()), processor)) as teacher:
        yield folder, teacher


@pytest.fixture
def teacher(expert):
    folder, teacher = expert
    teacher.asked.clear()
    yield folder, teacher
    teacher.spoil = None


def recipe(world, *overrides):
    return config.load(world["recipe"], [*PLAIN, f"model.name={world['folder'] / 'student'}", *overrides])


def at(teacher, *more):
    settings = ["retries: 0", "wait: 5", *more]
    return f"teachers.expert={{servers: ['{teacher.url}'], {', '.join(settings)}}}"


def stepped(parts, count=3):
    """Metrics of a first step, and its gradient."""
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), count)]
    sampled, metrics = collect.sample(parts, pairs, 0)
    metrics |= step.backward(parts, sampled, step.judged(parts, sampled, 0))
    return metrics, {n: p.grad for n, p in parts.student.named_parameters() if p.grad is not None}, sampled


def both(world, teacher, *overrides):
    """The same step with the teacher loaded here, and behind the server."""
    folder, served = teacher
    here = stepped(build(recipe(world, f"{NAME}={folder}", *overrides)))
    there = stepped(build(recipe(world, at(served), f"{NAME}=expert", *overrides)))
    return here, there


@pytest.mark.parametrize("view", ["teacher", "student"])
@pytest.mark.parametrize(
    "divergence",
    [
        "{topk_forward_kl: {k: 20, by: teacher}}",
        "{topk_reverse_kl: {k: 20, by: teacher}}",
        "{topk_jsd: {k: 7, by: teacher, rest: renormalise}}",
        "{k2: {}}",
    ],
)
def test_a_served_teacher_gives_the_gradient_of_a_local_one(world, teacher, view, divergence):
    pieces = [f"objective.tokens.divergence={divergence}", f"objective.tokens.teacher.view={view}"]
    (metrics, gradient, _), (served, slope, _) = both(world, teacher, *pieces)
    assert served["loss"] == pytest.approx(metrics["loss"], rel=1e-4) and metrics["loss"] > 1e-3
    assert served["teacher_failures"] == 0 and slope.keys() == gradient.keys()
    for name, wanted in gradient.items():
        torch.testing.assert_close(slope[name], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    asked = teacher[1].asked
    assert len(asked) == 3 and all(bool(body.get("content_parts")) == (view == "student") for body in asked)
    assert all(
        (b.get("sampling_params") or b)["prompt_logprobs"]
        == {"{k2": 0, "{topk_j": 7}.get(divergence[:7].rstrip(": {}"), 20)
        for b in asked
    )


def test_a_served_scorer_gives_the_log_probs_of_a_local_one(world, teacher):
    policy = "{sampling: tokens, advantages: [teacher_logratio], surrogate: importance}"
    folder, served = teacher
    names = [("here", f"scoring.teacher.model={folder}"), ("there", "scoring.teacher.model=expert")]
    taken = {}
    for place, name in names:
        server = [at(served)] if place == "there" else []
        parts = build(recipe(world, *server, "objective.tokens=null", f"objective.policy={policy}", name))
        taken[place] = stepped(parts)
    (_, gradient, here), (metrics, slope, there) = taken["here"], taken["there"]
    torch.testing.assert_close(there.batch.scores["teacher_logp"], here.batch.scores["teacher_logp"], rtol=0, atol=1e-4)
    for name, wanted in gradient.items():
        torch.testing.assert_close(slope[name], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert metrics["teacher_failures"] == 0


TOP = "objective.tokens.divergence={topk_reverse_kl: {k: 20, by: teacher}}"


def sequences(world, teacher, *more):
    """A recipe whose groups of four the served teacher reads."""
    term = "{sampling: sequences, divergence: {topk_forward_kl: {by: teacher}}, teacher: {model: expert}}"
    return recipe(world, at(teacher), f"objective.groups={term}", TOP, f"{NAME}=expert", *more)


def test_answers_a_teacher_fails_on_are_left_out_and_counted(world, teacher, capsys):
    served, lost = teacher[1], []

    def every_third(told):
        if len(served.asked) % 3 == 0:
            lost.append(served.asked[-1]["prompt"])
            raise Refused(400)

    served.spoil = every_third
    parts = build(sequences(world, served))
    metrics, gradient, sampled = stepped(parts)
    assert metrics["teacher_failures"] == len(lost) == 5 and len(sampled.rollouts) == 15 - 5
    assert not any(prompt[-len(r.tokens) :] == r.tokens for prompt in lost for r in sampled.rollouts)
    assert len(sampled.batch.mask) == len(sampled.sampling) == 10
    assert all(torch.isfinite(g).all() for g in gradient.values())
    assert "5 of 15 answers are left out: a teacher said nothing of them" in capsys.readouterr().out


def test_a_step_without_a_teacher_at_all_is_an_error_and_the_checkpoint_is_good(world, teacher, tmp_path):
    served = teacher[1]

    def dies_in_the_second_step(told):
        if len(served.asked) > 8 + 3:  # eight answers at the start, three a step
            raise Refused(500)

    served.spoil = dies_in_the_second_step
    overrides = [TOP, f"{NAME}=expert", f"run_dir={tmp_path / 'run'}", "eval.every=0", "train.steps=2"]
    with pytest.raises(RuntimeError, match=r"gave nothing for any of the 3 answers .*the last checkpoint is good"):
        train.train(recipe(world, at(served, "timeout: 5"), *overrides))
    assert train.checkpoint.latest(tmp_path / "run").name == "step-000001"
    served.spoil = None
    train.train(recipe(world, at(served, "timeout: 7"), *overrides), resume=True)
    assert train.checkpoint.latest(tmp_path / "run").name == "step-000002"


def test_a_teacher_that_is_not_there_is_told_before_anything_is_measured(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{taken.getsockname()[1]}"
        gone = f"teachers.expert={{servers: ['{where}'], wait: 1}}"
        with pytest.raises(RuntimeError, match=rf"teacher 'expert' gave nothing .*no server answered for 1 s: {where}"):
            train.train(recipe(world, gone, TOP, f"{NAME}=expert", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run" / "eval").exists()


def forget(told):
    """The teacher says nothing of the answer's second token."""
    own = told["prompt_token_ids"][-2]
    told["prompt_logprobs"][-2].pop(str(own))


def not_a_number(told):
    told["prompt_logprobs"][-1][str(told["prompt_token_ids"][-1])]["logprob"] = nan


def not_a_number_either(told):
    """Not the answer's own token, but a likelier one."""
    others = [e for token, e in told["prompt_logprobs"][-1].items() if int(token) != told["prompt_token_ids"][-1]]
    others[0]["logprob"] = nan


def one_more(told):
    """A token before the prompt that nobody sent."""
    told["prompt_token_ids"].insert(0, 1)
    told["prompt_logprobs"].insert(0, None)


def minus_infinity(told):
    told["prompt_logprobs"][-1][str(told["prompt_token_ids"][-1])]["logprob"] = -9999.0


def another_answer(told):
    told["prompt_token_ids"][-1] += 1


def shifted(told):
    told["prompt_logprobs"].pop()


def another_form(told):
    told.pop("prompt_logprobs")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forget, r"teacher 'expert' on the answer to '.*': the log-prob of token \d+ at place \d+ is none"),
        (not_a_number, "is nan"),
        (not_a_number_either, "is nan"),
        (one_more, "other token ids came back than were sent"),
        (minus_infinity, "is -9999.0"),
        (another_answer, "other token ids came back than were sent"),
        (shifted, "other token ids came back than were sent"),
        (another_form, "the reply is not vLLM's"),
    ],
)
def test_what_is_missing_or_misplaced_is_an_error_by_name(world, teacher, spoil, message):
    teacher[1].spoil = spoil
    parts = build(recipe(world, at(teacher[1]), TOP, f"{NAME}=expert"))
    with pytest.raises(RuntimeError, match=message):
        stepped(parts)


def test_a_token_beyond_the_students_vocabulary_does_not_count(world, teacher):
    """A larger head is padded; what falls on the padding belongs to the rest."""

    def padded(told):
        for place in told["prompt_logprobs"][1:]:
            place["99999"] = {"logprob": -0.5, "rank": 1}

    teacher[1].spoil = padded
    _, _, sampled = stepped(build(recipe(world, at(teacher[1]), TOP, f"{NAME}=expert")))
    (answers,) = sampled.told.values()
    assert all((said.ids < 99999).all() and said.ids.shape[1] == 20 for said in answers.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{NAME}=expret"],
            r"objective.tokens.teacher.model names 'expret' \(did you mean 'expert'\?\); teachers has",
        ),
        (["scoring.teacher={model: exper}"], r"scoring.teacher.model names 'exper' \(did you mean 'expert'\?\)"),
        (
            ["scoring.teacher={model: expert, divergence: true}"],
            "scoring.teacher.divergence needs the whole vocabulary",
        ),
        (["teachers.ema={servers: ['http://127.0.0.1:1']}"], "teachers.ema is the name of a model already"),
        (["teachers.expert.server=x"], "unknown key 'teachers.expert.server' .did you mean 'servers'"),
        (["teachers.expert.servers=[]"], "teachers.expert.servers"),
    ],
)
def test_a_wrong_recipe_is_refused_with_advice(world, teacher, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe(world, at(teacher[1]), *overrides)


@pytest.mark.parametrize("divergence", ["reverse_kl", "{topk_reverse_kl: {k: 20}}", "total_variation"])
def test_a_divergence_that_wants_the_whole_vocabulary_is_refused(world, teacher, divergence):
    with pytest.raises(ValueError, match=r"objective.tokens.divergence looks beyond the teacher's likeliest tokens"):
        build(recipe(world, at(teacher[1]), f"{NAME}=expert", f"objective.tokens.divergence={divergence}"))


def test_a_server_that_is_not_this_teacher_is_refused_at_the_start(world, teacher, monkeypatch):
    served = teacher[1]
    with pytest.raises(ValueError, match="has no model 'novice'; it serves expert"):
        stepped(build(recipe(world, at(served, "model: novice"), TOP, f"{NAME}=expert")))
    reply = Teacher.reply

    def otherwise(self, path, body):
        told = reply(self, path, body)
        return told | {"tokens": told["tokens"][:-1]} if path == "/tokenize" else told

    monkeypatch.setattr(Teacher, "reply", otherwise)
    with pytest.raises(ValueError, match="has another vocabulary than the student"):
        train.train(recipe(world, at(served), TOP, f"{NAME}=expert", f"run_dir={world['folder'] / 'refused'}"))
