"""A sampler that is not the trainer: its answers are weighed, and what lies between the two is told."""

from dataclasses import replace
from itertools import islice
from math import log

import pytest
import torch

from xmodal_opd import collect, config, step
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.models import frozen_copy
from xmodal_opd.objective import pick
from xmodal_opd.objective.weights import WEIGHTS
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.mismatch import corrected, mismatch
from xmodal_opd.types import Scores, TokenBatch


@pytest.mark.parametrize(
    "weight, share",
    [({"tis": {"cap": 2.0}}, 0.25), ({"mismatch_mask": {"low": 0.5, "high": 2.0}}, 0.5), ("position_linear", None)],
)
def test_what_a_correction_did_is_told_as_a_share_of_tokens(weight, share):
    ratio = torch.tensor([[4.0, 1.0, 0.25], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = TokenBatch(mask, torch.tensor([0, 0]), ratio.log(), Scores(sampler_logp=torch.zeros(2, 3)))
    told = corrected(pick("weight", WEIGHTS, weight), batch)
    assert list(told.values()) == ([] if share is None else [share])


def test_the_metrics_on_two_tokens():
    """The trainer finds one token twice as likely as the sampler and one half: k3 gives 1 − log 2 and −½ + log 2."""
    batch = TokenBatch(torch.tensor([[True, True, False]]), torch.tensor([0]), torch.tensor([[log(2), -log(2), 9.0]]))
    batch.scores["sampler_logp"] = torch.zeros(1, 3)
    told = mismatch(batch)
    assert told["sampling/kl"] == pytest.approx(0.25)
    assert told["sampling/sampling_logp_difference/mean"] == pytest.approx(log(2))
    assert [told[f"sampling/importance_sampling_ratio/{x}"] for x in ("min", "mean", "max")] == pytest.approx(
        [0.5, 1.25, 2.0]
    )
    assert mismatch(replace(batch, mask=torch.zeros(1, 3).bool())) == {}


class Apart(HFSampler):
    exact = False


def perturbed(parts):
    """The parts, with a sampler whose weights are not the student's."""
    other = frozen_copy(parts.student.requires_grad_(True))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    s = parts.sampler
    return replace(parts, sampler=Apart(other, s.adapter, s.eos, s.max_tokens, s.batch_tokens))


def pairs_of(parts, count):
    return [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), count)]


def test_the_trainer_scores_what_another_sampled_and_its_ratios_start_at_one(world):
    mixed = "rollout.samplings.text={n: 1, view: teacher}"
    parts = perturbed(build(config.load(world["recipe"], ["engine.micro_tokens=200", mixed])))
    sampled, metrics = collect.sample(parts, pairs_of(parts, 3), 0)
    batch = sampled.batch
    for rollout, seen, trainer, sampler in zip(
        sampled.rollouts, sampled.sampling, batch.student_logp, batch.scores["sampler_logp"], strict=True
    ):
        n = len(rollout.tokens)
        assert sampler[:n].tolist() == pytest.approx(rollout.logps)
        prompt = parts.adapter.batch([rollout.pair.views[parts.samplings[seen].view]])
        prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([rollout.tokens])], 1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        with torch.no_grad():
            logp = parts.student(**prompt).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        torch.testing.assert_close(trainer[:n], expected, atol=1e-4, rtol=1e-4)
    apart = (batch.student_logp - batch.scores["sampler_logp"])[batch.mask].abs()
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(apart.max().item()) and apart.mean() > 0.01
    assert metrics["sampling/kl"] > 0


def test_a_term_tells_what_its_weights_held_back_and_trains(world):
    weights = "objective.sequences.weights=[{tis: {cap: 1.0}}, {mismatch_mask: {low: 0.9, high: 1.1}}]"
    parts = perturbed(build(config.load(world["recipe"], [weights])))
    parts = replace(parts, judge=lambda prompts, completions, **_: [len(c) % 3 for c in completions])
    metrics = step.train_step(parts, pairs_of(parts, 2), 0)
    assert 0 < metrics["sampling/capped_ratio/sequences"] < 1 and 0 < metrics["sampling/masked_ratio/sequences"] < 1
    assert metrics["grad_norm"] > 0 and not metrics["skipped"]


def test_where_the_trainer_samples_there_is_one_log_prob_and_no_further_forward(world, monkeypatch):
    monkeypatch.setattr(collect, "trainer_logp", None)
    parts = build(config.load(world["recipe"]))
    sampled, metrics = collect.sample(parts, pairs_of(parts, 2), 0)
    assert torch.equal(sampled.batch.student_logp, sampled.batch.scores["sampler_logp"])
    assert not any(name.startswith("sampling/") for name in metrics)
