"""Teachers in contrast with themselves under another view, and gates on what the model says to another view."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import make_pairs, with_method
from families import FAMILIES

from modalities.chat import ChatAdapter, derived
from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.build.teachers import refuse_contrast
from xmodal_opd.collect import sample
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.step import train_step
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Sampling


@pytest.fixture
def live(world, tmp_path):
    """(method, overrides) -> live parts of that method on the tiny model, and three questions."""

    def make(method, *overrides):
        parts = build(config.load(with_method(world, tmp_path, method), overrides))
        return parts, [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 3)]

    return make


@pytest.mark.parametrize("name", ["omni", "qwen2_5_vl"])
def test_hidden_states_in_contrast_are_the_distribution_of_the_paper(tokenizer, name):
    model, processor = FAMILIES[name].make(tokenizer)
    adapter = ChatAdapter(processor, 512)
    pairs = make_pairs(adapter, 2)
    pairs = [replace(p, views=p.views | {"blank": derived("blank", p.views["student"])}) for p in pairs]
    sampler = HFSampler(model.eval(), adapter, [tokenizer.eos_token_id], 6)
    rollouts = sampler.generate(pairs, {"a": Sampling(2)}, seed=0)["a"]
    responses, mask = Responses(adapter), token_batch(rollouts).mask
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        p, blank = ((responses.hidden(model, rollouts, v) @ head.T).log_softmax(-1) for v in ("student", "blank"))
        q = (p + 0.7 * (p - blank)).log_softmax(-1)
        hidden = responses.contrasted(model, rollouts, "student", ("blank", 0.7))
        logp, entropy = statistics(model, hidden, rollouts, mask)
    assert (p - blank)[mask].abs().max() > 0.05
    ids = torch.tensor([token for r in rollouts for token in r.tokens])
    torch.testing.assert_close(logp[mask], q[mask].gather(-1, ids[:, None])[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[mask], -(q.exp() * q).sum(-1)[mask], atol=1e-4, rtol=1e-4)


def test_no_contrast_is_plain_distillation_to_the_bit(live):
    runs = []
    for contrast in ("null", "{view: blank, alpha: 0}", "{view: blank, alpha: 1}"):
        teacher = f"{{model: initial, view: teacher, contrast: {contrast}}}"
        parts, pairs = live("opd", f"objective.tokens.teacher={teacher}")
        loss = train_step(parts, pairs, 0)["loss"]
        runs.append((loss, [p.detach().clone() for p in parts.student.parameters() if p.requires_grad]))
    (plain, weights), (zero, same), (one, _) = runs
    assert plain == zero and all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert one != plain


def test_a_scorer_in_contrast_scores_and_may_sample(live):
    scorer = "scoring.tilted={model: initial, view: student, contrast: {view: degraded, alpha: 0.5}}"
    parts, pairs = live("opd_pg", scorer, "objective.tokens.advantages=[{teacher_logratio: {scorer: tilted}}]")
    step, _ = sample(parts, pairs, 0)
    plain, tilted = step.batch.student_logp, step.batch.scores["tilted_logp"]
    assert not torch.allclose(plain, tilted, atol=1e-3) and torch.isfinite(tilted).all()


def test_a_gate_opens_where_the_answer_to_the_text_was_right(live):
    parts, pairs = live("rt_opd")

    def judge(prompts, completions, **_):
        return [1.0, 0.0, None]

    step, _ = sample(replace(parts, judge=judge), pairs, 0)
    reward = step.everyone.scores["text_reward"]
    assert step.samplings == ["tokens"] * 3 + ["text"] * 3
    assert reward.nan_to_num(7).tolist() == [1, 0, 7] * 2
    assert step.everyone.scores["reward"].isnan().tolist() == [True] * 3 + [False, False, True]
    weight = parts.terms["tokens"].row_weights[0](step.everyone)
    assert weight[:3, 0].tolist() == [1, 0, 0]


def test_contrasts_that_cannot_be_taken_are_refused(live, tokenizer):
    parts, _ = live("rt_opd")
    capped = FAMILIES["gemma3n"].make(tokenizer)[0]
    with pytest.raises(ValueError, match="teacher 'initial' caps its logits"):
        refuse_contrast(parts.recipe, {"initial": capped})
    expert = ["teachers.expert.servers=['http://127.0.0.1:1']", "scoring.teacher={model: expert, contrast: {}}"]
    with pytest.raises(ValueError, match="teacher 'expert' is behind servers, which tell too little for a contrast"):
        live("opd_pg", *expert)
