"""What rewards say of a step, and how far APO's factors go, in the metrics."""

from dataclasses import replace
from itertools import islice
from math import exp, nan

import pytest
import torch

from xmodal_opd import collect, config
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.objective import Term
from xmodal_opd.scoring.outcomes import entropies, outcomes, shaping
from xmodal_opd.step import train_step
from xmodal_opd.types import Scores, TokenBatch


def batch(rewards, groups, lengths, **scores) -> TokenBatch:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    scores = Scores({name: torch.tensor(value) for name, value in scores.items()}, reward=torch.tensor(rewards))
    return TokenBatch(mask, torch.tensor(groups), torch.zeros(mask.shape), scores)


def test_lengths_and_difficulty_of_four_groups():
    """All right (the undecided aside), all wrong, one of two and two of three right."""
    rewards = [1.5, 1.0, nan, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0, 0.5]
    told = outcomes(batch(rewards, [0, 0, 0, 1, 1, 2, 2, 7, 7, 7], [2, 4, 9, 1, 3, 6, 5, 8, 5, 7]))
    assert told == pytest.approx(
        {
            "completions/mean_length/right": 5.0,
            "completions/mean_length/wrong": 4.0,
            "difficulty/mean": (0 + 1 + 1 / 2 + 1 / 3) / 4,
            "difficulty/all_right": 1 / 4,
            "difficulty/to_0.25": 0,
            "difficulty/to_0.5": 2 / 4,
            "difficulty/to_0.75": 0,
            "difficulty/to_1": 0,
            "difficulty/all_wrong": 1 / 4,
        }
    )


def test_without_a_verdict_nothing_is_said():
    assert outcomes(batch([nan, nan], [0, 0], [1, 2])) == {}
    assert "completions/mean_length/right" not in outcomes(batch([0.0, nan], [0, 0], [1, 2]))


def test_the_factors_of_apo_are_told_as_means_over_the_decided():
    some = batch([1.0, 0.0, nan], [0, 0, 0], [1, 3, 9])
    policy = Term.build(advantages=["reward", {"stcr": {"base": 2.0, "of": "negative"}}], surrogate="ppo_clip")
    kl = Term.build(divergence="k3", weights=["dads"])
    assert shaping(policy, some) == pytest.approx({"stcr": (1 + 1.75) / 2})
    assert shaping(kl, some) == pytest.approx({"dads": (1 - exp(-exp(1) / 2) + 1) / 2})
    assert shaping(Term.build(divergence="k3"), some) == {}


def test_entropy_is_a_mean_over_tokens():
    told = entropies(batch([0.0, 0.0], [0, 0], [1, 3], student_entropy=[[1.0, 99, 99], [2.0, 3.0, 4.0]]))
    assert told == {"entropy/student": 2.5}


def test_groups_of_two_samplings_are_two_groups(world):
    """The only reader of the tokens' rewards is a weight, and both samplings number their groups from 0."""
    overrides = ["objective.tokens.weights=[dads]", "scoring={own: {view: student}}"]
    parts = build(config.load(world["recipe"], overrides))
    assert parts.judged == {"tokens", "sequences"}
    parts = replace(parts, judge=lambda prompts, completions, **_: [float(len(completions) == 3)] * len(completions))
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 3)]
    step, told = collect.sample(parts, pairs, 0)
    assert len(step.samplings) == 3 + 12 and told["difficulty/all_right"] == told["difficulty/all_wrong"] == 0.5
    assert told["entropy/own"] > 0
    assert train_step(parts, pairs, 0)["dads/tokens"] == 1


def test_a_step_without_a_judge_says_nothing_of_verdicts(world):
    parts = build(config.load(world["recipe"], ["judge=null", "objective.sequences=null"]))
    pairs = [pair for _, pair in islice(open_shards(parts.recipe)[0].pairs(parts.adapter), 2)]
    values = train_step(parts, pairs, 0)
    assert not [name for name in values if name.startswith(("difficulty", "reward", "completions/mean_length/"))]
