"""A policy that chooses among a window of the vocabulary, at a temperature, a chunk of tokens at a time: what is scored
and trained is what its logits say, worked out here from the logits of whole forwards.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from modalities.action.adapter import ActionAdapter
from modalities.action.tokens import ActionTokens
from xmodal_opd import collect, config, schema, step
from xmodal_opd.build import Parts, build
from xmodal_opd.hidden import head
from xmodal_opd.models import load_model, load_processor
from xmodal_opd.objective import Term, vocab
from xmodal_opd.objective.divergences import DIVERGENCES, forward_kl, hard_ce, reverse_kl
from xmodal_opd.scoring.forward import (
    Responses,
    divergence,
    divergence_from,
    divergence_of_both,
    statistics,
    token_logp,
)
from xmodal_opd.scoring.mismatch import trainer_logp
from xmodal_opd.selftest import check_sampler, check_sharing
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Scores, TeacherSignal

CHUNK, SIZE, HEAT = 2, 3, 1.6


@pytest.fixture(scope="module")
def robot():
    """The model of the package, another with other weights for its teacher, an adapter and four decisions."""
    processor = load_processor("default")
    model, teacher = load_model("default"), load_model("default")
    with torch.no_grad():
        for n, p in enumerate(teacher.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    end = len(processor.tokenizer)
    adapter = ActionAdapter(processor, 400, tokens=ActionTokens(end, CHUNK, SIZE), cameras=["front"], image_size=28)
    return model, teacher, adapter, decisions(adapter, [6, 6, 3, 6])


def decisions(adapter: ActionAdapter, lengths: list[int]) -> list[Rollout]:
    rng = np.random.default_rng(0)
    among, out = adapter.tokens.among, []
    for i, length in enumerate(lengths):
        image = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        seen = {"images": {"front": image}, "state": np.zeros(2, np.float32), "text": f"hand {i} 7", "steps": 0}
        seen |= {"instruction": "Push", "success": False, "done": False}
        pair = adapter.observed(f"push/0/{i}/0", seen, {"task": "push"})  # pyright: ignore[reportArgumentType]
        tokens = rng.integers(among.start, among.stop, length).tolist()
        out.append(Rollout(pair, tokens, [0.0] * length, "", True, 0, 60, episode=i // 2, turn=i % 2))
    return out


FORMS = ["parallel", "autoregressive"]


def responses_of(adapter: ActionAdapter, form: str, heat: float = HEAT, share: bool = True) -> Responses:
    placeholder = adapter.tokens.among.start + 5 if form == "parallel" else None
    return Responses(adapter, share, among=adapter.tokens.among, placeholder=placeholder, temperature=heat)


def dense(model, responses: Responses, rollout: Rollout, view: str) -> torch.Tensor:
    """log p [T, 256] of one decision: the whole sequence through the whole model, its logits cut and divided."""
    prompt = responses.adapter.batch([rollout.pair.views[view]])
    given = rollout.tokens if responses.placeholder is None else [responses.placeholder] * len(rollout.tokens)
    width = prompt["input_ids"].shape[1]
    prompt = dict(prompt) | {"input_ids": torch.cat([prompt["input_ids"], torch.tensor([given])], 1)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    logits = model(**prompt).logits[0, width - 1 : -1]
    return (logits[:, responses.among] / responses.temperature).log_softmax(-1)


def rows(model, responses, rollouts, view="student") -> torch.Tensor:
    """[N, 256]."""
    return torch.cat([dense(model, responses, r, view) for r in rollouts])


def places(rollouts, responses) -> torch.Tensor:
    return torch.tensor([t - responses.among.start for r in rollouts for t in r.tokens])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("heat", [1.0, HEAT])
@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_the_logits_in_the_window(robot, form, heat, share):
    model, teacher, adapter, rollouts = robot
    responses, mask = responses_of(adapter, form, heat, share), token_batch(rollouts).mask
    with torch.no_grad():
        for who, view in ((model, "student"), (teacher, "teacher"), (teacher, "student")):
            want = rows(who, responses, rollouts, view)
            hidden = responses.hidden(who, rollouts, view)
            logp, entropy = statistics(who, hidden, rollouts, mask, responses.among)
            chosen = want.gather(-1, places(rollouts, responses)[:, None])[:, 0]
            torch.testing.assert_close(logp[mask], chosen, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(token_logp(who, hidden, rollouts, mask, responses.among)[mask], logp[mask])
            torch.testing.assert_close(entropy[mask], -(want.exp() * want).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_kl_of_a_chunk_is_the_sum_of_its_categorical_kls(robot, form):
    model, teacher, adapter, rollouts = robot
    responses, mask = responses_of(adapter, form), token_batch(rollouts).mask
    with torch.no_grad():
        own, other = ((w, responses.hidden(w, rollouts, v)) for w, v in ((model, "student"), (teacher, "teacher")))
        for r, rollout in enumerate(rollouts):
            p, q = dense(model, responses, rollout, "student"), dense(teacher, responses, rollout, "teacher")
            kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True))
            got = divergence(reverse_kl, own, other, mask, responses.among)
            assert got[r].sum().item() == pytest.approx(kl, rel=1e-3) and kl > 0.01


def test_tokens_of_a_parallel_chunk_do_not_depend_on_each_other(robot):
    model, _, adapter, rollouts = robot
    one = rollouts[0]
    other = replace(one, tokens=[one.tokens[0], *(t - 1 for t in one.tokens[1:5]), one.tokens[5]])
    logps = {}
    for form in FORMS:
        responses, mask = responses_of(adapter, form), token_batch([one, other]).mask
        with torch.no_grad():
            hidden = responses.hidden(model, [one, other], "student")
            logps[form] = token_logp(model, hidden, [one, other], mask, responses.among)
    assert torch.equal(*logps["parallel"][:, [0, 5]]) and (logps["parallel"][0] != logps["parallel"][1])[1:5].all()
    assert logps["autoregressive"][0, 5] != logps["autoregressive"][1, 5]


def test_a_decision_cut_short_is_the_beginning_of_the_whole_one(robot):
    model, _, adapter, rollouts = robot
    responses, whole = responses_of(adapter, "parallel"), rollouts[0]
    short = replace(whole, tokens=whole.tokens[:SIZE])
    with torch.no_grad():
        hidden = [responses.hidden(model, [r], "student")[0, :SIZE] for r in (whole, short)]
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)


LOSSES = ["reverse_kl", "forward_kl", "hard_ce", "logp"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_dense_computation(robot, form, loss):
    model, teacher, adapter, rollouts = robot
    rollouts, weight = rollouts[1:3], torch.linspace(0.5, 2, 9)
    responses, mask = responses_of(adapter, form), token_batch(rollouts).mask
    some = [model.get_output_embeddings().weight, model.get_input_embeddings().weight]
    some += [p for name, p in model.named_parameters() if "layers.1.mlp" in name or "visual.patch_embed" in name]
    hidden = responses.hidden(model, rollouts, "student", grad=True)
    p = rows(model, responses, rollouts)
    if loss == "logp":
        got = token_logp(model, hidden, rollouts, mask, responses.among)
        wanted = p.gather(-1, places(rollouts, responses)[:, None])[:, 0]
    else:
        with torch.no_grad():
            theirs, q = responses.hidden(teacher, rollouts, "teacher"), rows(teacher, responses, rollouts, "teacher")
        got = divergence(DIVERGENCES[loss], (model, hidden), (teacher, theirs), mask, responses.among)
        wanted = DIVERGENCES[loss](p, q)
    slopes = [torch.autograd.grad((weight * x).sum(), some, allow_unused=True) for x in (got[mask], wanted)]
    for ours, theirs in zip(*slopes, strict=True):
        if theirs is not None:
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, atol=1e-3 * max(scale, 1e-4), rtol=1e-3)
    outside = slopes[0][0].clone()
    outside[responses.among] = 0
    assert some[0] is some[1] or not outside.any(), "rows outside of the window get nothing"


def test_the_whole_window_is_as_good_as_no_window_to_the_bit(robot):
    """And without any of the three, what is computed is what was computed before there were any."""
    model, teacher, adapter, rollouts = robot
    plain, mask = Responses(adapter), token_batch(rollouts).mask
    same = Responses(adapter, among=slice(0, len(model.get_output_embeddings().weight)), temperature=1.0)
    with torch.no_grad():
        own, other = ((who, plain.hidden(who, rollouts, "student")) for who in (model, teacher))
        assert torch.equal(own[1], same.hidden(model, rollouts, "student"))
        assert torch.equal(*(divergence(forward_kl, own, other, mask, w) for w in (None, same.among)))
        assert torch.equal(*(token_logp(*own, rollouts, mask, w) for w in (None, same.among)))
        assert torch.equal(*(statistics(*own, rollouts, mask, w)[1] for w in (None, same.among)))


def test_a_teacher_elsewhere_is_compared_in_the_window(robot):
    """Its likeliest tokens, some of them outside; and its log q of the sampled ones."""
    model, teacher, adapter, rollouts = robot
    responses, mask = responses_of(adapter, "autoregressive", 1.0), token_batch(rollouts).mask
    with torch.no_grad():
        own = model, responses.hidden(model, rollouts, "student")
        signals, q = [], [dense(teacher, responses, r, "teacher") for r in rollouts]
        for rollout, there in zip(rollouts, q, strict=True):
            top = there.topk(4)
            ids = torch.cat([top.indices + adapter.tokens.among.start, torch.full((len(there), 1), 3)], 1)
            logq = torch.cat([top.values, torch.full((len(there), 1), -0.1)], 1)
            chosen = there.gather(-1, places([rollout], responses)[:, None])[:, 0]
            signals.append(TeacherSignal(chosen, ids, logq))
        fn = lambda p, q: DIVERGENCES["topk_forward_kl"](p, q, k=4)  # noqa: E731
        got = divergence_from(fn, False, own, signals, rollouts, mask, responses.among)
        wanted = fn(rows(model, responses, rollouts), torch.cat(q))
        torch.testing.assert_close(got[mask], wanted, atol=1e-4, rtol=1e-3)
        sampled = divergence_from(lambda logp, logq: logp - logq, True, own, signals, rollouts, mask, responses.among)
        logp = rows(model, responses, rollouts).gather(-1, places(rollouts, responses)[:, None])[:, 0]
        torch.testing.assert_close(sampled[mask], logp - torch.cat([s.logp for s in signals]), atol=1e-4, rtol=1e-4)


def test_both_sides_may_learn_in_the_window(robot):
    model, teacher, adapter, rollouts = robot
    rollouts = rollouts[:2]
    responses, mask = responses_of(adapter, "parallel"), token_batch(rollouts).mask
    own, other = ((w, responses.hidden(w, rollouts, v, True)) for w, v in ((model, "student"), (teacher, "teacher")))
    heads = [who.get_output_embeddings().weight for who in (model, teacher)]
    got = torch.autograd.grad(divergence_of_both(reverse_kl, own, other, mask, responses.among).sum(), heads)
    both = [rows(who, responses, rollouts, v) for who, v in ((model, "student"), (teacher, "teacher"))]
    wanted = torch.autograd.grad(reverse_kl(*both).sum(), heads)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


def test_what_is_no_token_of_the_window_is_told(robot):
    model, _, adapter, rollouts = robot
    responses, among = responses_of(adapter, "parallel"), adapter.tokens.among
    wrong = [replace(rollouts[0], tokens=[among.stop, *rollouts[0].tokens[1:]])]
    hidden, mask = responses.hidden(model, wrong, "student"), token_batch(wrong).mask
    with pytest.raises(
        ValueError, match=f"token {among.stop}, but tokens are chosen from {among.start} to {among.stop - 1}"
    ):
        token_logp(model, hidden, wrong, mask, among)
    w = model.get_output_embeddings().weight
    with pytest.raises(ValueError, match=r"vocab=slice\(5, 99999, None\) is not within"):
        vocab.divergence(reverse_kl, hidden[0], w, hidden[0], w, vocab=slice(5, 99999))


def test_a_temperature_is_refused_where_logits_are_capped(robot):
    *_, adapter, rollouts = robot
    small: Any = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2ForCausalLM(Gemma2Config(**small))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits, so no temperature can divide them"):
        Responses(adapter, temperature=1.6).hidden(capped, rollouts, "student")


@pytest.mark.parametrize("form", FORMS)
def test_the_self_test_and_the_trainers_log_probs_know_the_policy(robot, form):
    model, _, adapter, rollouts = robot
    responses = responses_of(adapter, form)
    with torch.no_grad():
        said = [dense(model, responses, r, "student") for r in rollouts]
    sampled = [
        replace(r, logps=p.gather(-1, places([r], responses)[:, None])[:, 0].tolist())
        for r, p in zip(rollouts, said, strict=True)
    ]
    assert check_sampler(model, responses, sampled) < 1e-3
    assert check_sharing(model, responses, sampled) < 1e-4
    batch = token_batch(sampled)
    logp = trainer_logp(model, responses, sampled, ["student"] * 4, batch.mask, lambda some: [list(range(len(some)))])
    torch.testing.assert_close(logp[batch.mask], batch.student_logp[batch.mask], atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="sampler and training forward disagree"):
        check_sampler(model, replace(responses, temperature=1.0), sampled)


# ---- a whole step


OBJECTIVES = {  # VLA-OPD, arXiv:2603.26666, and the losses it compares with
    "reinforce": {"advantages": ["teacher_logratio"], "surrogate": "reinforce"},
    "reverse": {"divergence": "reverse_kl"},
    "forward": {"divergence": "forward_kl"},
    "hard": {"divergence": "hard_ce"},
    "sampled": {"divergence": "k2"},
}
SCORING = "scoring={teacher: {model: initial, view: teacher, divergence: true}}"


def live(world, pieces: dict) -> Parts:
    """A run of one term with these pieces, summed over tokens, against the initial model reading the teacher's view."""
    parts = build(config.load(world["recipe"], [SCORING, "model.train=[language_model]"]))
    teacher = {"model": "initial", "view": "teacher"}
    spec = schema.Term.model_validate({"sampling": "tokens", "teacher": teacher, "reduction": "sequence", **pieces})
    recipe = parts.recipe.model_copy(update={"objective": {"term": spec}})
    terms = {"term": Term.build(**pieces, reduction="sequence")}
    return replace(parts, recipe=recipe, terms=terms, judged=frozenset())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_vla_opd_is_its_formula(world, name):
    """Two episodes of two decisions: Σ over all tokens / 2, of the student's view against the teacher's, both among 256
    tokens at a temperature of 1.6."""
    parts = live(world, OBJECTIVES[name])
    end = len(parts.processor.tokenizer)
    among = slice(end - 256, end)
    responses = replace(parts.responses, among=among, placeholder=end - 3, temperature=HEAT)
    parts = replace(parts, responses=responses)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head(parts.student).mul_(5)  # or random weights find all tokens alike
    rollouts = []
    for i, length in enumerate((4, 2, 4, 3)):
        views = {"student": parts.adapter.text(f"look {i}"), "teacher": parts.adapter.text(f"two plus {i}")}
        tokens = torch.randint(end - 256, end, (length,), generator=draw).tolist()
        rollouts.append(
            Rollout(Pair(str(i), views), tokens, [0.0] * length, "", True, 0, 30, episode=i // 2, turn=i % 2)
        )
    with torch.no_grad():
        p, q = rows(parts.student, responses, rollouts), rows(parts.models["initial"], responses, rollouts, "teacher")
    batch, chosen = token_batch(rollouts), places(rollouts, responses)[:, None]
    logp, logq = p.gather(-1, chosen)[:, 0], q.gather(-1, chosen)[:, 0]
    batch = replace(batch, student_logp=torch.zeros(batch.mask.shape).masked_scatter(batch.mask, logp))
    scores = collect.local_scores(parts, rollouts, batch.mask)
    torch.testing.assert_close(scores["teacher_logp"][batch.mask], logq, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores["teacher_divergence"][batch.mask], reverse_kl(p, q), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores["teacher_entropy"][batch.mask], -(q.exp() * q).sum(-1), atol=1e-4, rtol=1e-4)
    batch = replace(batch, scores=Scores(batch.scores | scores))
    found = collect.gathered(rollouts, ["tokens"] * 4, batch)
    values = {
        "reinforce": torch.zeros(13),  # −A (log p − log p at sampling)
        "reverse": reverse_kl(p, q),
        "forward": forward_kl(p, q),
        "hard": hard_ce(p, q),
        "sampled": (logp - logq).square() / 2,
    }
    told = step.backward(parts, found, step.judged(parts, found, 0))
    assert told["loss/term"] == pytest.approx(values[name].sum().item() / 2, rel=1e-3, abs=2e-3)
    moving = [x for x in parts.student.parameters() if x.requires_grad and x.grad is not None]
    got = [x.grad.clone() for x in moving if x.grad is not None]
    p = rows(parts.student, responses, rollouts)
    again = p.gather(-1, chosen)[:, 0]
    formula = {
        "reinforce": -(logq - logp) * again,  # Eq. 6 and 7
        "reverse": reverse_kl(p, q),
        "forward": forward_kl(p, q),
        "hard": -p[torch.arange(13), q.argmax(-1)],
        "sampled": (again - logq).square() / 2,
    }
    wanted = torch.autograd.grad(formula[name].sum() / 2, moving)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3 * theirs.abs().max().item() + 1e-7, rtol=2e-3)
