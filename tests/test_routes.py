"""Questions that go to one of several teachers each: as if every teacher taught its own questions alone."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from teacher import Refused, Teacher, serving
from transformers import Qwen2Config, Qwen2ForCausalLM

from xmodal_opd import collect, config, models, step
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards, training_shards
from xmodal_opd.objective import rows as take
from xmodal_opd.teachers import try_teachers

COUNT = 6  # questions of three tasks
POLICY = "{sampling: tokens, advantages: [teacher_logratio], surrogate: reinforce}"
PLAIN = [
    "objective.sequences=null",
    "rollout.samplings.sequences=null",
    "judge=null",
    "objective.tokens.weights=[]",
    "optim.clip=1e9",
]


@pytest.fixture(scope="module")
def experts(world):
    """Folders of two other models than the student, the second of text alone; and the student's own."""
    student, folders = world["folder"] / "model", {"student": world["folder"] / "here"}
    model, processor = models.load_model(str(student)), models.load_processor(str(student))
    model.resize_token_embeddings(len(processor.tokenizer))
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": len(processor.tokenizer) + 7}
    deaf = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    for name, one, reader in (
        ("student", model, processor),
        ("expert", disturbed(model), processor),
        ("deaf", disturbed(deaf), processor.tokenizer),
    ):
        folders[name] = world["folder"] / f"routed-{name}"
        one.save_pretrained(folders[name])
        reader.save_pretrained(folders[name])
    return folders


def disturbed(model):
    model = models.frozen_copy(model, share=False)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def route(folders, **more):
    """By task: an expert under the student's own view, a model of text alone, and the student reading."""
    to = {
        "arithmetic": {"model": str(folders["expert"]), "view": "student"},
        "ordering": {"model": str(folders["deaf"])},
        "choice": {},
    }
    return {"field": "task", "to": to | more}


def built(world, folders, *overrides):
    return build(config.load(world["recipe"], [*PLAIN, f"model.name={folders['student']}", *overrides]))


def pairs_of(parts, count=COUNT):
    """As many questions of every task, mixed."""
    every = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 24)]
    tasks = [[pair for pair in every if pair.meta["task"] == task] for task in ("arithmetic", "ordering", "choice")]
    return [pair for some in islice(zip(*tasks, strict=False), count // 3) for pair in some]


def slopes(parts, sampled):
    parts.student.zero_grad()
    metrics = step.backward(parts, sampled, step.judged(parts, sampled, 0))
    return metrics["loss"], torch.cat([p.grad.flatten() for p in parts.student.parameters() if p.grad is not None])


def part_of(sampled, rows):
    """The step with some of its answers alone."""
    index = torch.tensor(rows)
    batch = take(sampled.batch, index)
    return collect.gathered([sampled.rollouts[r] for r in rows], [sampled.sampling[r] for r in rows], batch)


@pytest.mark.parametrize("divergence, stop", [("reverse_kl", "true"), ("k2", "true"), ("reverse_kl", "false")])
def test_every_teacher_teaches_its_own_questions_in_one_step(world, experts, divergence, stop):
    only_own = {
        task: {"model": "current", "view": view} for task, view in (("arithmetic", "student"), ("ordering", "teacher"))
    }
    there = route(experts, **(only_own if stop == "false" else {}))
    shape = [f"objective.tokens.divergence={divergence}", f"objective.tokens.teacher.stop_gradient={stop}"]
    parts = built(world, experts, *shape, f"objective.tokens.teacher.route={there}")
    sampled, _ = collect.sample(parts, pairs_of(parts), 0)
    tasks = [r.pair.meta["task"] for r in sampled.rollouts]
    assert len(Counter(tasks)) == 3 and len(step.pieces(parts, sampled.rollouts)) == 1
    loss, slope = slopes(parts, sampled)
    losses, wanted = [], torch.zeros_like(slope)
    for task, target in there["to"].items():
        rows = [r for r, name in enumerate(tasks) if name == task]
        alone = [f"objective.tokens.teacher.{key}={value}" for key, value in target.items() if value]
        other = built(world, experts, *shape, *alone)
        value, theirs = slopes(other, part_of(sampled, rows))
        losses.append(value * len(rows) / COUNT)
        wanted += theirs * len(rows) / COUNT
    assert loss == pytest.approx(sum(losses), rel=1e-5) and min(losses[1:]) >= 0
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_a_routed_scorer_is_each_teacher_on_its_rows_in_any_micro_batch(world, experts):
    plain = [f"scoring.{name}={{model: {experts[name]}, view: {view}}}" for name, view in VIEWS.items()]
    routed = f"scoring.teacher={{divergence: true, route: {route(experts)}}}"
    told = []
    for tokens in (16384, 120):
        parts = built(world, experts, routed, *plain, "scoring.own={}", f"engine.micro_tokens={tokens}")
        sampled, _ = collect.sample(parts, pairs_of(parts), 0)
        told.append(sampled.batch.scores)
    assert len(step.pieces(parts, sampled.rollouts)) > 2
    for row, rollout in enumerate(sampled.rollouts):
        name = {"arithmetic": "expert", "ordering": "deaf", "choice": "own"}[rollout.pair.meta["task"]]
        for kind in ("logp", "entropy"):
            torch.testing.assert_close(told[0][f"teacher_{kind}"][row], told[0][f"{name}_{kind}"][row])
    for name, value in told[0].items():
        torch.testing.assert_close(told[1][name], value, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (told[0]["teacher_divergence"] * sampled.batch.mask).max() > 1e-3


VIEWS = {"expert": "student", "deaf": "teacher"}


@pytest.mark.parametrize(
    "term", ["{sampling: tokens, divergence: k2, teacher: {route: ROUTE}}", POLICY], ids=["divergence", "scorer"]
)
def test_served_teachers_on_a_route_read_their_questions_alone_and_tell_what_local_ones_do(world, experts, term):
    expert = Teacher(models.load_model(str(experts["expert"])), models.load_processor(str(experts["expert"])))
    out = []
    with serving(expert) as teacher:
        for name in (str(experts["expert"]), "expert"):
            there = route(experts, arithmetic={"model": name, "view": "teacher"}, ordering={"model": "initial"})
            server = [f"teachers.expert={{servers: ['{teacher.url}']}}"] if name == "expert" else []
            scorer = [f"scoring.teacher.route={there}"] if term == POLICY else []
            objective = ["objective.tokens=null", f"objective.term={term.replace('ROUTE', str(there))}"]
            parts = built(world, experts, *objective, *scorer, *server)
            sampled, metrics = collect.sample(parts, pairs_of(parts), 0)
            out.append((slopes(parts, sampled), sampled, metrics))
    (here, local, _), (there, remote, metrics) = out
    tasks = Counter(r.pair.meta["task"] for r in remote.rollouts)
    assert len(teacher.asked) == tasks["arithmetic"] and metrics["teacher_failures"] == 0
    assert there[0] == pytest.approx(here[0], rel=1e-3)
    torch.testing.assert_close(there[1], here[1], rtol=1e-3, atol=1e-3 * here[1].abs().max().item())
    if term == POLICY:
        ours, theirs = local.batch.scores, remote.batch.scores
        torch.testing.assert_close(theirs["teacher_logp"], ours["teacher_logp"], rtol=0, atol=1e-3)
        assert "teacher_entropy" in ours and "teacher_entropy" not in theirs, "a server tells no entropy"


def test_one_teacher_of_a_route_may_be_silent_for_a_step_and_not_all_of_them(world, experts, capsys):
    reads = lambda name: Teacher(models.load_model(str(experts[name])), models.load_processor(str(experts[name])))  # noqa: E731
    with serving(reads("expert")) as one, serving(reads("student")) as other:
        there = route(experts, arithmetic={"model": "one"}, ordering={"model": "other"})
        servers = [f"teachers.{n}={{servers: ['{t.url}'], retries: 0}}" for n, t in (("one", one), ("other", other))]
        objective = ["objective.tokens=null", f"objective.term={POLICY}", f"scoring.teacher.route={there}"]
        parts = built(world, experts, *objective, *servers)
        pairs = pairs_of(parts)
        one.spoil = silent
        sampled, metrics = collect.sample(parts, pairs, 0)
        kept = Counter(r.pair.meta["task"] for r in sampled.rollouts)
        assert kept == {"ordering": 2, "choice": 2} and metrics["teacher_failures"] == 2
        assert "2 of 6 answers are left out" in capsys.readouterr().out
        with pytest.raises(RuntimeError, match="teacher 'one' gave nothing for any of the 4 answers"):
            try_teachers(parts, sampled.rollouts)
        other.spoil = silent
        with pytest.raises(RuntimeError, match=r"teacher 'one' and 'other' gave nothing for any of the 4 answers"):
            collect.sample(parts, pairs, 0)
        alone = [pair for pair in pairs if pair.meta["task"] != "ordering"][:2]
        sampled, metrics = collect.sample(parts, alone, 0)
        assert [r.pair.meta["task"] for r in sampled.rollouts] == ["choice"] and metrics["teacher_failures"] == 1


def silent(told):
    raise Refused(500)


def test_a_question_that_no_route_leads_anywhere_is_skipped_and_counted(world, experts):
    load = lambda there: config.load(world["recipe"], [f"scoring.teacher.route={there}"])  # noqa: E731
    short = {"field": "task", "to": {"arithmetic": {}, "ordering": {}}}
    shards = training_shards(load(short), shuffle=False)
    shards._check = lambda enough: None
    kept = list(shards.samples(epochs=1))
    assert {sample["meta"]["task"] for sample in kept} == {"arithmetic", "ordering"} and shards.skipped == 24 - len(
        kept
    )
    assert set(shards.broken.values()) == {
        "no teacher: its meta.task is 'choice', and the recipe has routes to teachers for arithmetic, ordering"
    }
    with pytest.raises(RuntimeError, match=r"24 of 24 samples are broken.* its meta has no field 'subject'"):
        list(training_shards(load({**short, "field": "subject"})).samples(epochs=1))
    hinted = {"field": "task", "to": {"arithmetic": {"view": "hints"}, "ordering": {}, "choice": {}}}
    shards = training_shards(load(hinted), shuffle=False)
    shards._check = lambda enough: None
    list(shards.samples(epochs=1))
    assert shards.skipped == 8 and set(shards.broken.values()) == {"it has no view 'hints' (has: student, teacher)"}


def test_a_teacher_of_text_alone_is_not_given_media(world, experts):
    parts = built(world, experts, f"scoring.teacher={{model: {experts['deaf']}, view: student}}")
    with pytest.raises(
        ValueError, match=r"Qwen2ForCausalLM reads text alone, and its view has media \(.*input_features"
    ):
        collect.sample(parts, pairs_of(parts, 3), 0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["objective.tokens.teacher.route={field: task, to: {}}"], "route.to"),
        (
            [
                "teachers.expert={servers: ['http://127.0.0.1:1']}",
                "objective.tokens.teacher.route={field: task, to: {a: {model: exprt}}}",
            ],
            r"tokens.teacher.route.to.a.model names 'exprt' \(did you mean 'expert'\?\)",
        ),
        (
            [
                "teachers.expert={servers: ['http://127.0.0.1:1']}",
                "scoring.teacher={divergence: true, route: {field: task, to: {a: {model: expert}}}}",
            ],
            "scoring.teacher.divergence needs the whole vocabulary of 'expert'",
        ),
        (
            ["objective.tokens.teacher={stop_gradient: false, route: {field: task, to: {a: {model: initial}, b: {}}}}"],
            "stop_gradient=false needs a teacher that moves: model current, not 'initial'",
        ),
        (
            ["objective.sequences.teacher.route={field: task, to: {a: {model: initial}, b: {}}}"],
            "objective.sequences is a policy term, which asks no teacher",
        ),
    ],
)
def test_a_route_that_cannot_be_is_refused(world, overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load(world["recipe"], overrides)
