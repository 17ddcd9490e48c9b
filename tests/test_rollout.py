"""The decode loop against `generate`, and what the sampler says against what the training forward says."""

import pytest
import torch
from conftest import make_pairs
from transformers import GenerationConfig

from xmodal_opd.hidden import media_tokens
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.tokens import cut, token_batch
from xmodal_opd.types import Sampling


@pytest.fixture
def setup(family):
    _, model, _, adapter = family
    pairs = make_pairs(adapter, 4)
    return model, adapter, pairs, HFSampler(model, adapter, [model.generation_config.eos_token_id], 12)


def test_greedy_decoding_equals_generate_token_by_token(setup):
    model, adapter, pairs, sampler = setup
    prompts = adapter.batch([p.views["student"] for p in pairs])
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=sampler.eos)
    greedy.suppress_tokens = media_tokens(model) or None
    expected = model.generate(**prompts, generation_config=greedy)[:, prompts["input_ids"].shape[1] :].tolist()
    ours = sampler.generate(pairs, {"a": Sampling(temperature=0.0)}, seed=0)["a"]
    for rollout, row in zip(ours, expected, strict=True):
        assert rollout.tokens == row[: len(rollout.tokens)]
        assert len(rollout.tokens) == 12 or rollout.finished


def test_sampler_and_training_forward_agree_on_the_same_tokens(setup):
    model, adapter, pairs, sampler = setup
    answers = sampler.generate(pairs, {"one": Sampling(1, 1.0), "four": Sampling(4, 1.5)}, seed=3)
    rollouts = answers["one"] + answers["four"]
    assert [len(answers[name]) for name in ("one", "four")] == [4, 16]
    mask = token_batch(rollouts).mask
    logp, _ = statistics(model, Responses(adapter).hidden(model, rollouts, "student"), rollouts, mask)
    torch.testing.assert_close(logp, token_batch(rollouts).student_logp, atol=2e-4, rtol=1e-4)


def test_same_seed_same_answers_and_another_seed_others(setup):
    *_, pairs, sampler = setup
    once, again, other = (sampler.generate(pairs, {"a": Sampling(2, 1.0)}, seed=s)["a"] for s in (1, 1, 2))
    assert [r.tokens for r in once] == [r.tokens for r in again] != [r.tokens for r in other]


def test_answers_do_not_depend_on_what_else_is_in_the_batch(setup):
    model, adapter, pairs, sampler = setup
    alone = [sampler.generate([p], {"a": Sampling(temperature=0.0)}, seed=0)["a"][0].tokens for p in pairs]
    together = sampler.generate(pairs, {"a": Sampling(temperature=0.0)}, seed=0)["a"]
    assert [r.tokens for r in together] == alone
    small = HFSampler(model, adapter, sampler.eos, 12, batch_tokens=1)
    assert [r.tokens for r in small.generate(pairs, {"a": Sampling(temperature=0.0)}, seed=0)["a"]] == alone


def test_an_answer_ends_with_the_end_token_or_at_the_limit(setup):
    model, adapter, pairs, sampler = setup
    first = sampler.generate(pairs, {"a": Sampling(temperature=0.0)}, seed=0)["a"][0].tokens
    stopped = HFSampler(model, adapter, [first[2]], 12).generate(pairs[:1], {"a": Sampling(temperature=0.0)}, seed=0)[
        "a"
    ][0]
    end = first.index(first[2]) + 1
    assert stopped.tokens == first[:end] and stopped.finished
    assert all(
        r.finished == (r.tokens[-1] in sampler.eos) for r in sampler.generate(pairs, {"a": Sampling()}, seed=0)["a"]
    )


def test_groups_are_questions_and_cuts_keep_them_whole(setup):
    *_, pairs, sampler = setup
    rollouts = sampler.generate(pairs, {"a": Sampling(3, 1.0)}, seed=0)["a"]
    assert [r.group for r in rollouts] == [i for i in range(4) for _ in range(3)]
    for budget in (1, 300, 10**6):
        pieces = list(cut(rollouts, budget))
        assert sorted(row for piece in pieces for row in piece) == list(range(12))
        homes = {}
        for number, piece in enumerate(pieces):
            for row in piece:
                assert homes.setdefault(rollouts[row].group, number) == number
    assert len(list(cut(rollouts, 1))) == 4 and len(list(cut(rollouts, 10**6))) == 1
