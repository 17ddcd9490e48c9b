"""A robot's response is its episode: numbers by hand, and the same as if all its decisions stood in one row."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from math import nan, sqrt
from pathlib import Path

import pytest
import torch

from xmodal_opd import dist
from xmodal_opd.objective import Term
from xmodal_opd.objective.advantages import ADVANTAGES
from xmodal_opd.objective.order import order, sides
from xmodal_opd.objective.reductions import REDUCTIONS
from xmodal_opd.objective.weights import STEP_WEIGHTS
from xmodal_opd.scoring.outcomes import outcomes
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Scores, TokenBatch

# two start states, two episodes from each, of 2, 1, 2 and 1 decisions and 3, 3, 4 and 1 tokens, in no order
EPISODE, GROUP = [3, 1, 0, 3, 1, 7], [5, 9, 5, 5, 9, 9]
LENGTHS = [2, 2, 3, 1, 2, 1]
VALUES = [[1.0, 2.0, 99], [0.0, 1.0, 99], [4.0, 5.0, 6.0], [3.0, 99, 99], [2.0, 5.0, 99], [6.0, 99, 99]]  # 2, 2, 5, 6


def step(**scores) -> TokenBatch:
    mask = torch.arange(3)[None] < torch.tensor(LENGTHS)[:, None]
    numbers = {name: torch.tensor(value) for name, value in scores.items()}
    return TokenBatch(mask, torch.tensor(GROUP), torch.zeros(6, 3), Scores(numbers, episode=torch.tensor(EPISODE)))


REDUCED = [
    ("sequence", {}, [1 / 4] * 6),
    ("token", {}, [1 / 11] * 6),
    ("sequence_token_mean", {}, [1 / 12, 1 / 16, 1 / 12, 1 / 12, 1 / 16, 1 / 4]),
    ("constant", {"length": 10}, [1 / 40] * 6),
]


@pytest.mark.parametrize("name, options, expected", REDUCED)
def test_reductions_count_episodes(name, options, expected):
    assert REDUCTIONS[name](step(), **options)[:, 0].tolist() == pytest.approx(expected)


def test_an_episode_that_nobody_could_judge_is_no_response():
    batch = step(reward=[1.0, nan, 0.0, 1.0, nan, 0.0])
    judged = Term.build(advantages=["reward"], surrogate="reinforce", reduction="sequence_token_mean").judge(batch)
    assert judged.weight[:, 0].tolist() == pytest.approx([1 / 9, 0, 1 / 9, 1 / 9, 0, 1 / 3])


def test_an_episode_whose_first_decision_counts_no_token_is_still_one():
    batch = step()
    batch.mask[0] = False
    assert REDUCTIONS["sequence"](batch)[:, 0].tolist() == [1 / 4] * 6
    assert REDUCTIONS["sequence_token_mean"](batch)[3].item() == pytest.approx(1 / 4)


CENTRED = [  # the groups are worth (2, 5) and (2, 6): means 3.5 and 4, deviations 3/√2 and 4/√2
    ("group_center", {}, [-2.5, -1.5, -4, -3, 0.5, 1.5, 2.5, -0.5, -2, 1, 2]),
    ("leave_one_out", {}, [-5, -3, -8, -6, 1, 3, 5, -1, -4, 2, 4]),
    (
        "group_normalize",
        {"eps": 0.0},
        [x * sqrt(2) / 3 for x in (-2.5, -1.5)]
        + [x * sqrt(2) / 4 for x in (-4, -3)]
        + [x * sqrt(2) / 3 for x in (0.5, 1.5, 2.5, -0.5)]
        + [x * sqrt(2) / 4 for x in (-2, 1, 2)],
    ),
]


@pytest.mark.parametrize("name, options, expected", CENTRED)
def test_group_statistics_are_over_episodes(name, options, expected):
    batch = step()
    got = ADVANTAGES[name](batch, torch.tensor(VALUES), **options)[batch.mask]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_vla_opd_of_two_start_states_with_two_episodes_each():
    """arXiv:2603.26666 Eq. 6 and 7: −1/(B·G) Σ_j Σ_i Σ_t (log π_tea − log π_θ) log π_θ, the raw ratio as advantage."""
    logp = torch.tensor(
        [[-0.5, -1.0, 0], [-2.0, -0.25, 0], [-1.0, -1.5, -0.5], [-3.0, 0, 0], [-1.0, -1.0, 0], [-4.0, 0, 0]]
    )
    batch = replace(step(teacher_logp=VALUES), student_logp=logp)
    batch.scores["teacher_logp"] = -torch.tensor(VALUES)
    term = Term.build(advantages=["teacher_logratio"], surrogate="reinforce", reduction="sequence")
    judged, now = term.judge(batch), logp.clone().requires_grad_()
    assert judged.advantage[batch.mask].tolist() == [-0.5, -1, 2, -0.75, -3, -3.5, -5.5, 0, -1, -4, -2]
    (slope,) = torch.autograd.grad(term.loss(batch, judged, now), now)
    assert (4 * slope[batch.mask]).tolist() == [0.5, 1, -2, 0.75, 3, 3.5, 5.5, 0, 1, 4, 2]
    mean = Term.build(advantages=["teacher_logratio"], surrogate="reinforce", reduction="sequence_token_mean")
    (slope,) = torch.autograd.grad(mean.loss(batch, mean.judge(batch), now), now)
    assert slope[3, 0].item() == 0 and slope[0, 1].item() == pytest.approx(1 / 12) and slope[5, 0].item() == 2 / 4


def test_grpo_counts_successes_of_episodes():
    """Of four episodes from one state one succeeds, in a fifth as many decisions as another takes to fail."""
    episode, success = torch.tensor([0] * 5 + [1, 2, 3, 3]), torch.tensor([0.0] * 5 + [1, 0, 0, 0])
    batch = TokenBatch(torch.ones(9, 2).bool(), torch.zeros(9).long(), torch.zeros(9, 2), Scores(reward=success))
    batch.scores["episode"] = episode
    term = Term.build(advantages=["reward", {"group_normalize": {"eps": 0.0}}], surrogate="reinforce")
    advantage = term.judge(batch).advantage[:, 0].tolist()
    assert advantage == pytest.approx([-0.5] * 5 + [1.5, -0.5, -0.5, -0.5])  # mean ¼, deviation ½
    found = outcomes(batch)
    assert (found["difficulty/mean"], found["completions/mean_length/wrong"]) == (0.75, pytest.approx((10 + 2 + 4) / 3))
    ordered = order(sides(batch, torch.arange(9.0)[:, None].expand(9, 2)))  # worth 2, 5, 6 and 7.5; the second is right
    assert (ordered["pair_reversal"], ordered["return_right"]) == (pytest.approx(2 / 3), 5)
    assert ordered["return_wrong"] == pytest.approx((2 + 6 + 7.5) / 3)


# ---- whole episodes in one row


SCORES = ("teacher_logp", "teacher_divergence", "student_entropy", "degraded_logp")
OF_RESPONSES = {*ADVANTAGES, *STEP_WEIGHTS} - {"discount", "tip", "tip_confident"}  # these look at rows: at decisions


def whole() -> TokenBatch:
    """Twelve responses from three states, of 2 to 8 tokens."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.arange(8)[None] < torch.randint(2, 9, (12, 1), generator=draw)
    numbers = {name: torch.rand(12, 8, generator=draw, dtype=torch.float64) for name in SCORES}
    numbers |= {name: -value for name, value in numbers.items() if name.endswith("_logp")}
    numbers |= {"reward": (torch.rand(12, generator=draw) > 0.5).double(), "draw": torch.rand(12, generator=draw)}
    numbers["dual"] = torch.rand(12, generator=draw)
    logp = -torch.rand(12, 8, generator=draw, dtype=torch.float64)
    return TokenBatch(mask, torch.arange(12) % 3, logp, Scores(numbers))


def pieces_of(batch: TokenBatch, width: int = 3) -> tuple[TokenBatch, list[tuple[int, slice]]]:
    """The same responses cut into decisions of `width` tokens, in an order that mixes them; and where each was."""
    cuts = [(row, slice(at, at + width)) for at in range(0, 8, width) for row in range(12) if batch.mask[row, at]]
    cuts = [cuts[i] for i in torch.randperm(len(cuts), generator=torch.Generator().manual_seed(1)).tolist()]

    def cut(value: torch.Tensor) -> torch.Tensor:
        if value.dim() == 1:
            return torch.stack([value[row] for row, _ in cuts])
        padded = torch.nn.functional.pad(value, (0, width))
        return torch.stack([padded[row, at] for row, at in cuts])

    scores = Scores({name: cut(value) for name, value in batch.scores.items()})
    scores["episode"] = torch.tensor([100 - row for row, _ in cuts])
    return TokenBatch(cut(batch.mask), cut(batch.group), cut(batch.student_logp), scores), cuts


def joined(values: torch.Tensor, cuts: list[tuple[int, slice]]) -> torch.Tensor:
    out = torch.zeros(12, 12, dtype=values.dtype)
    for (row, at), some in zip(cuts, values, strict=True):
        out[row, at] = some
    return out[:, :8]


@pytest.mark.parametrize("name", sorted(OF_RESPONSES))
def test_an_episode_in_decisions_is_the_response_in_one_row(name):
    batch = whole()
    some, cuts = pieces_of(batch)
    if name in ADVANTAGES:
        wanted = ADVANTAGES[name](batch, batch.student_logp)
        got = ADVANTAGES[name](some, some.student_logp)
        assert name == "clip" or not torch.equal(wanted[batch.mask], batch.student_logp[batch.mask])
    else:
        wanted, got = STEP_WEIGHTS[name](batch), STEP_WEIGHTS[name](some)
    torch.testing.assert_close(joined(got, cuts)[batch.mask], wanted[batch.mask])


TERMS = [
    {"surrogate": "reinforce", "advantages": ["teacher_logratio"]},
    {"surrogate": "ppo_clip", "advantages": ["reward", "group_normalize"], "reduction": "sequence_token_mean"},
    {"surrogate": "ppo_clip", "advantages": ["reward", "leave_one_out", "stcr"], "reduction": "token"},
    {"surrogate": "reinforce", "advantages": ["teacher_logratio", "margin_shift"], "weights": ["balance"]},
]


@pytest.mark.parametrize("recipe", TERMS)
def test_a_term_on_decisions_is_the_term_on_whole_episodes(recipe):
    batch, term = whole(), Term.build(**recipe)
    some, _ = pieces_of(batch)
    one, other = (term.loss(b, term.judge(b), 0.9 * b.student_logp) for b in (batch, some))
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("recipe", TERMS)
def test_episodes_of_one_decision_are_ordinary_answers_to_the_bit(recipe):
    batch, term = whole(), Term.build(**recipe)
    numbered = replace(batch, scores=Scores(batch.scores, episode=torch.arange(12).flip(0) + 40))
    one, other = (term.judge(b) for b in (batch, numbered))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.advantage, other.advantage)


# ---- rollouts and ranks


def decision(episode: int | None, turn: int) -> Rollout:
    return Rollout(Pair(f"{episode}/{turn}", {}), [1, 2], [-1.0, -2.0], "", True, 0, episode=episode, turn=turn)


def test_decisions_bring_their_episode():
    assert token_batch([decision(4, 0), decision(2, 0), decision(4, 1)]).scores["episode"].tolist() == [4, 2, 4]
    assert "episode" not in token_batch([decision(None, 0)]).scores


def test_ranks_number_their_episodes_alike_and_the_step_keeps_them_apart():
    batch = step()
    first, second = dist.apart([batch, replace(batch, group=batch.group - 5)])
    assert first.scores["episode"].tolist() == EPISODE
    assert second.scores["episode"].tolist() == [8 + e for e in EPISODE]
    assert second.group.tolist() == [10 + g - 5 for g in GROUP]
    assert [p.group.tolist() for p in dist.apart([batch])] == [GROUP]


TWO = """
import sys, torch
sys.path.insert(0, "tests")
from test_episodes import step
from xmodal_opd import dist
from xmodal_opd.objective.reductions import REDUCTIONS
dist.join("cpu")
whole, mine = dist.gather_step(step())
print("factor", REDUCTIONS["sequence"](whole)[mine, 0].tolist(), flush=True)
dist.leave()
"""


def test_a_step_of_two_ranks_has_the_episodes_of_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[1]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(root)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO], cwd=root, env={**os.environ, **launch, "RANK": r}, stdout=-1, text=True
        )
        for r in "01"
    ]
    for process in both:
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and f"factor {[1 / 8] * 6}" in told
