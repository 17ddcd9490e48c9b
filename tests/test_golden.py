"""One hand-checkable number per piece. Contract tests find broken shapes; these find wrong formulas."""

from math import cos, e, exp, inf, log, nan, pi, sqrt
from pathlib import Path

import pytest
import torch

from xmodal_opd import config
from xmodal_opd.objective import Term, vocab
from xmodal_opd.objective.advantages import ADVANTAGES
from xmodal_opd.objective.divergences import DIVERGENCES, SAMPLED, gaussian_reverse_kl
from xmodal_opd.objective.order import order, sides
from xmodal_opd.objective.reductions import REDUCTIONS
from xmodal_opd.objective.schedules import SCHEDULES, b2f, f2b
from xmodal_opd.objective.surrogates import SURROGATES
from xmodal_opd.objective.weights import WEIGHTS
from xmodal_opd.types import Scores, TokenBatch

P, Q = (0.5, 0.25, 0.15, 0.1), (0.2, 0.3, 0.1, 0.4)  # student, teacher
# the two likeliest tokens of the student are (0, 1) with 0.25 left over; of the teacher (3, 1) with 0.65 and 0.3
P_STUDENT, Q_STUDENT = (0.5, 0.25, 0.25), (0.2, 0.3, 0.5)
P_TEACHER, Q_TEACHER = (0.1, 0.25, 0.65), (0.4, 0.3, 0.3)


def kl(a, b):
    return sum(x * log(x / y) for x, y in zip(a, b, strict=True))


def mix(a, b, w):
    return [w * x + (1 - w) * y for x, y in zip(a, b, strict=True)]


def jsd(p, q, beta):
    return beta * kl(q, mix(q, p, beta)) + (1 - beta) * kl(p, mix(q, p, beta))


DIVERGENCE = [
    ("forward_kl", {}, kl(Q, P)),
    ("reverse_kl", {}, kl(P, Q)),
    ("jeffreys", {"alpha": 0.2}, 0.2 * kl(Q, P) + 0.8 * kl(P, Q)),
    ("jsd", {"beta": 0.2}, jsd(P, Q, 0.2)),
    ("jsd", {"beta": 0.0}, kl(Q, P)),
    ("jsd", {"beta": 1.0}, kl(P, Q)),
    ("skew_forward_kl", {"alpha": 0.1}, kl(Q, mix(Q, P, 0.1))),
    ("skew_forward_kl", {"alpha": 0.0}, kl(Q, P)),
    ("skew_reverse_kl", {"alpha": 0.1}, kl(P, mix(P, Q, 0.1))),
    ("skew_reverse_kl", {"alpha": 0.0}, kl(P, Q)),
    ("total_variation", {}, (0.3 + 0.05 + 0.05 + 0.3) / 2),
    ("hellinger", {}, 1 - sum(sqrt(p * q) for p, q in zip(P, Q, strict=True))),
    ("hard_ce", {}, -log(0.1)),
    ("topk_forward_kl", {"k": 2}, kl(Q_TEACHER, P_TEACHER)),
    ("topk_forward_kl", {"k": 2, "by": "student"}, kl(Q_STUDENT, P_STUDENT)),
    ("topk_forward_kl", {"k": 2, "rest": "drop"}, kl((0.4, 0.3), (0.1, 0.25))),
    ("topk_forward_kl", {"k": 2, "rest": "renormalise"}, kl((4 / 7, 3 / 7), (2 / 7, 5 / 7))),
    ("topk_forward_kl", {"k": 4}, kl(Q, P)),
    ("topk_reverse_kl", {"k": 2}, kl(P_STUDENT, Q_STUDENT)),
    ("topk_reverse_kl", {"k": 2, "by": "teacher"}, kl(P_TEACHER, Q_TEACHER)),
    ("topk_reverse_kl", {"k": 2, "rest": "drop"}, kl((0.5, 0.25), (0.2, 0.3))),
    ("topk_reverse_kl", {"k": 2, "rest": "renormalise"}, kl((2 / 3, 1 / 3), (0.4, 0.6))),
    ("topk_reverse_kl", {"k": 9}, kl(P, Q)),
    ("topk_jsd", {"k": 2, "beta": 0.3}, jsd(P_STUDENT, Q_STUDENT, 0.3)),
]


@pytest.mark.parametrize("name, options, expected", DIVERGENCE)
def test_divergence_of_two_distributions(name, options, expected):
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in (P, Q))
    assert DIVERGENCES[name](p, q, **options).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name, expected", [("k1", log(2)), ("k2", log(2) ** 2 / 2), ("k3", 0.5 - 1 + log(2)), ("one_sided", 0)]
)
def test_estimate_from_a_token_twice_as_likely_for_the_student(name, expected):
    logp, logq = torch.tensor([0.6]).log(), torch.tensor([0.3]).log()
    assert SAMPLED[name](logp, logq).item() == pytest.approx(expected, abs=1e-6)


def test_reverse_kl_of_two_gaussians():
    """(0.4/0.2)²/2 + (1/0.5)²/2 with a width for each number; with one width for all ((0.4)² + 1²)/(2·0.25)."""
    p, q, std = torch.tensor([[[0.5, -1.0]], [[0.1, 0.0]], [[0.2, 0.5]]], dtype=torch.float64)
    assert gaussian_reverse_kl(p, q, std).tolist() == pytest.approx([4.0])
    assert gaussian_reverse_kl(p, q, 0.5).tolist() == pytest.approx([2.32])


def tiny(**scores) -> TokenBatch:
    """Two responses to one prompt: three tokens, and one token followed by padding that must not count."""
    return TokenBatch(
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        group=torch.tensor([4, 4]),
        student_logp=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -9.0, -9.0]]),
        scores=Scores({k: torch.tensor(v) for k, v in scores.items()}),
    )


H = [[0.0, 1.0, 2.0], [0.5, 99.0, 99.0]]  # the 98th percentile of 0, .5, 1, 2 is 1.94: scaled to 0, 1/1.94, 1, .5/1.94
D = [[0.8, 0.4, 0.0], [0.6, 99.0, 99.0]]  # scaled to 1, .5, 0, .75
RATIOS = [[-1 - log(8), -2.0, -3 - log(0.5)], [-4 - log(0.25), 9.0, 9.0]]
TIP = {"student_entropy": H, "teacher_divergence": D}

NEED = {"teacher_logp": [[-1.0, -1, -2], [-3, 9, 9]], "degraded_logp": [[-7.0, -1, -1], [-4, -9, 9]]}

WEIGHT = [  # options, scores, expected on the four real tokens
    ("student_entropy", {"keep": 0.4}, {"student_entropy": H}, [0, 1, 1, 0]),
    (
        "tip",
        {"keep": 0.7},
        TIP,
        [2, 0, 2, 0],
    ),  # scores 1, .758, 1 | .814; two of three and none of one; 4 tokens/2 kept
    ("tip", {"keep": 1.0}, TIP, [1, 1, 1, 1]),
    ("tip_confident", {"keep": 0.4}, TIP, [4, 0, 0, 0]),
    ("top_kl", {"k": 2, "alpha": 3.0}, {"divergence": [[0.1, 0.3, 0.2], [0.0, 9.0, 9.0]]}, [1, 3, 3, 3]),
    ("top_kl", {"k": 1}, {"divergence": [[0.2, 0.2, 0.2], [0.1, 9.0, 9.0]]}, [2, 1, 1, 2]),
    # the first token needs the media by 6, no other of the three does; the one of the other answer by 1
    ("media_tokens", {}, NEED, [1.5, 0.75, 0.75, 1]),
    ("media_tokens", {"keep": 0.5, "share": 0.8}, NEED, [1.2, 1.2, 0.6, 1]),
    ("media_tokens", {}, {**NEED, "degraded_logp": NEED["teacher_logp"]}, [1, 1, 1, 1]),
    # on average by 2 and 1: ±1 standard deviation of the two
    ("media_rollouts", {}, NEED, [2 / (1 + exp(-2))] * 3 + [2 / (1 + exp(2))]),
    ("media_rollouts", {"tau": 2.0}, NEED, [2 / (1 + exp(-1))] * 3 + [2 / (1 + exp(1))]),
    ("media_rollouts", {"tau": 0.001}, NEED, [2, 2, 2, 0]),  # e¹⁰⁰⁰ to e⁻¹⁰⁰⁰
    ("media_rollouts", {"without": "teacher"}, NEED, [1, 1, 1, 1]),
    ("dual", {}, {"dual": [0.1, 1.5]}, [0.1, 0.1, 0.1, 1.5]),
    ("gate", {"score": "asked"}, {"asked": [nan, 0.6]}, [0, 0, 0, 1]),
    ("gate", {"above": 0.0}, {"text_reward": [0.1, 0.0]}, [1, 1, 1, 0]),
    ("position_linear", {"beta": 2.0}, {}, [2, 1.5, 1, 2]),
    ("position_decay", {"half_life": 1.0}, {}, [1, 0.5, 0.25, 1]),
    ("prefix", {"tokens": 2}, {}, [1, 1, 0, 1]),
    # one of two is correct: d = 1/2
    ("dads", {}, {"reward": [1.5, 0.5]}, [1 - exp(-e / 2)] * 3 + [1]),
    ("dads", {"form": "exponential", "positive": "correct"}, {"reward": [0.5, 1.0]}, [1, 1, 1, exp(-e / 2)]),
    # the trainer finds the three tokens 8, 1 and ½ times as likely as the sampler: 4 in all, ∛4 on average; and ¼
    ("tis", {}, {"sampler_logp": RATIOS}, [2, 1, 0.5, 0.25]),
    ("tis", {"cap": 3.0, "level": "sequence"}, {"sampler_logp": RATIOS}, [3, 3, 3, 0.25]),
    ("tis", {"level": "geometric"}, {"sampler_logp": RATIOS}, [4 ** (1 / 3)] * 3 + [0.25]),
    ("mismatch_mask", {}, {"sampler_logp": RATIOS}, [0, 1, 1, 0]),
    ("mismatch_mask", {"level": "sequence"}, {"sampler_logp": RATIOS}, [1, 1, 1, 0]),
    ("mismatch_mask", {"low": 0.2, "high": 1.5, "level": "geometric"}, {"sampler_logp": RATIOS}, [0, 0, 0, 1]),
    # |log p - log q| is 9.9, 0 and 10 in the first answer, and 11 in the second
    ("gap_mask", {}, {"teacher_logp": [[-10.9, -2.0, -13.0], [7.0, 0.0, 0.0]]}, [1, 1, 0, 0]),
    ("balance", {"ratio": inf}, {"reward": [1.0, 0.0], "draw": [0.5, 0.5]}, [1, 1, 1, 0]),
    ("balance", {"ratio": 0.0}, {"reward": [1.0, 1.0], "draw": [0.5, 0.5]}, [0, 0, 0, 0]),
]


@pytest.mark.parametrize("name, options, scores, expected", WEIGHT)
def test_weight_of_four_tokens(name, options, scores, expected):
    batch = tiny(**scores)
    assert WEIGHTS[name](batch, **options)[batch.mask].tolist() == pytest.approx(expected, abs=1e-6)


def test_tip_prefers_the_confidently_wrong_and_the_uncertain():
    batch = tiny(**TIP)
    h, d = [0, 1 / 1.94, 1, 0.5 / 1.94], [1, 0.5, 0, 0.75]
    batch = TokenBatch(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4))
    batch.scores.update(
        student_entropy=torch.tensor([[0.0, 1, 2, 0.5]]), teacher_divergence=torch.tensor([[0.8, 0.4, 0, 0.6]])
    )
    soft_or = [a + b - a * b for a, b in zip(h, d, strict=True)]
    assert soft_or == pytest.approx([1, 0.757732, 1, 0.814433], abs=1e-6)
    assert WEIGHTS["tip"](batch, keep=0.75)[0].tolist() == pytest.approx([4 / 3, 0, 4 / 3, 4 / 3])
    assert WEIGHTS["tip_confident"](batch, keep=0.75)[0].tolist() == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3])


BALANCE = [  # ratio, right, wrong, kept
    (1.0, 3, 1, (1, 1)),
    (1.0, 1, 3, (1, 1)),
    (1.0, 2, 2, (2, 2)),
    (1.0, 4, 0, (4, 0)),
    (0.5, 4, 2, (1, 2)),
    (0.5, 1, 4, (1, 2)),
    (0.5, 2, 1, (2, 1)),  # half of one wrong answer is none: nothing can be done
    (1.2, 5, 3, (3, 3)),
    (1.2, 3, 5, (3, 2)),
    (2.0, 1, 3, (1, 3)),  # half of one right answer is none
    (2.0, 3, 3, (3, 1)),
]


@pytest.mark.parametrize("ratio, right, wrong, kept", BALANCE)
def test_balance_keeps_so_many_answers(ratio, right, wrong, kept):
    """arXiv:2605.03677, counted by hand; of the class that is too large those with the lowest draws go."""
    count = right + wrong
    reward, draw = torch.tensor([1.0] * right + [0.0] * wrong), torch.linspace(1, 0, count)
    batch = TokenBatch(torch.ones(count, 1).bool(), torch.zeros(count).long(), torch.zeros(count, 1))
    batch.scores.update(reward=reward, draw=draw)
    weight = WEIGHTS["balance"](batch, ratio=ratio)[:, 0].tolist()
    assert weight == [1] * kept[0] + [0] * (right - kept[0]) + [1] * kept[1] + [0] * (wrong - kept[1])


SURE = [[-0.25, -0.5, -0.75], [-3.0, 9.0, 9.0]]

ADVANTAGE = [  # options, scores, advantage in, expected on the four real tokens
    ("reward", {}, {"reward": [1.0, -1.0]}, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [2, 3, 4, 3]),
    ("reward", {"scale": 0.5}, {"reward": [1.0, nan]}, [[0.0] * 3] * 2, [0.5, 0.5, 0.5, nan]),
    (
        "teacher_logratio",
        {"scale": 2.0},
        {"teacher_logp": [[-2.0, -1.0, -3.0], [-1.0, 0.0, 0.0]]},
        [[0.0] * 3] * 2,
        [-2, 2, 0, 6],
    ),
    # correct, and on average .5 and 3 nats unlikely to the teacher; and wrong
    ("teacher_confidence", {}, {"reward": [1.0, 1.5], "teacher_logp": SURE}, [[0.0] * 3] * 2, [-0.1] * 3 + [-0.4]),
    (
        "teacher_confidence",
        {"scale": 1.0, "limit": 9.0},
        {"reward": [0.5, 1.0], "teacher_logp": SURE},
        [[0.0] * 3] * 2,
        [0, 0, 0, -3],
    ),
    ("constant", {"value": 2.0}, {}, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [3, 4, 5, 6]),
    ("kl_baseline", {"scale": 2.0}, {"teacher_divergence": D}, [[1.0] * 3] * 2, [2.6, 1.8, 1, 2.2]),
    # the responses are worth 2 and 6, so the mean is 4 (over tokens it would be 3)
    ("group_center", {}, {}, [[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]], [-3, -2, -1, 2]),
    ("group_normalize", {"eps": 0.0}, {}, [[1.0] * 3, [-1.0, 99.0, 99.0]], [sqrt(1 / 2)] * 3 + [-sqrt(1 / 2)]),
    ("group_normalize", {"eps": 0.5}, {}, [[2.0] * 3, [nan] * 3], [2 / 1.5] * 3 + [nan]),
    ("leave_one_out", {}, {}, [[1.0] * 3, [3.0, 99.0, 99.0]], [-2, -2, -2, 2]),
    ("leave_one_out", {}, {}, [[2.0] * 3, [nan] * 3], [2, 2, 2, nan]),
    ("discount", {"gamma": 0.5}, {}, [[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]], [3, 4, 4, 8]),
    # the wrong answer has three tokens, the right one has one: two too many
    ("stcr", {"base": 2.0}, {"reward": [0.5, 1.0]}, [[-1.0, 1.0, 4.0], [6.0] * 3], [-1.75, 1.75, 7, 6]),
    ("stcr", {"base": 2.0, "of": "negative"}, {"reward": [0.5, 1.0]}, [[-1.0, 1.0, 4.0], [6.0] * 3], [-1.75, 1, 4, 6]),
    # right and worth 2, wrong and worth 3: m = -1, so 1.5 are missing
    (
        "margin_shift",
        {"delta": 0.5},
        {"reward": [1.0, 0.0]},
        [[1.0, 2.0, 3.0], [3.0, 9.0, 9.0]],
        [1.75, 2.75, 3.75, 2.25],
    ),
    ("margin_mask", {}, {"reward": [1.0, 0.0]}, [[1.0, 2.0, 3.0], [3.0, 9.0, 9.0]], [1, 2, 3, 3]),
    ("clip", {"limit": 2.0}, {}, [[-9.0, 1.0, 9.0], [0.0, 0.0, 0.0]], [-2, 1, 2, 0]),
]


@pytest.mark.parametrize("name, options, scores, before, expected", ADVANTAGE)
def test_advantage_of_four_tokens(name, options, scores, before, expected):
    batch = tiny(**scores)
    after = ADVANTAGES[name](batch, torch.tensor(before), **options)
    assert after[batch.mask].tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


RETURNS = (-0.19, -0.11, -0.40, -0.30)  # right, wrong, right, wrong
SHIFT = [
    ("mean", "spread", (0.055, -0.355, -0.155, -0.545)),
    ("mean", "lift", (0.30, -0.11, 0.09, -0.30)),
    ("mean", "down", (-0.19, -0.60, -0.40, -0.79)),
    ("min_max", "spread", (0.155, -0.455, -0.055, -0.645)),
]


def answers_worth(returns, rights, tokens=2) -> tuple[TokenBatch, torch.Tensor]:
    """Answers to one prompt, whose tokens lie evenly around the return."""
    adv = torch.tensor(returns)[:, None] + torch.linspace(-0.1, 0.1, tokens)
    batch = TokenBatch(torch.ones_like(adv).bool(), torch.zeros(len(adv)).long(), torch.zeros_like(adv))
    batch.scores["reward"] = torch.tensor(rights, dtype=torch.float32)
    return batch, adv


@pytest.mark.parametrize("mode, direction, expected", SHIFT)
def test_margin_shift_of_four_answers(mode, direction, expected):
    """arXiv:2605.03677: m = -0.09 between means and -0.29 between extremes; to 0.4 are missing 0.49 and 0.69."""
    batch, adv = answers_worth(RETURNS, (1, 0, 1, 0))
    after = ADVANTAGES["margin_shift"](batch, adv, delta=0.4, mode=mode, direction=direction)
    assert after.mean(1).tolist() == pytest.approx(expected, abs=1e-6)


MASK = [  # returns of two right and three wrong answers, options, which stay
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 0.6}, [0, 1, 1, 1, 1]),  # .3 -> without 0: .8 (without .5: .45)
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 0.9}, [0, 1, 0, 1, 1]),  # .8 -> .95
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 9.0}, [0, 1, 0, 0, 1]),  # to the last of either side
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 9.0, "rho": 1.0}, [1, 1, 1, 1, 1]),
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 9.0, "rho": 0.7}, [0, 1, 0, 1, 1]),  # one of two and two of three stay
    ((0.0, 1.0), (0.5, 0.2, -0.1), {"delta": 0.4, "mode": "min_max"}, [0, 1, 1, 1, 1]),  # -.5 -> .5 (or -.2)
    ((0.4, 0.4), (0.5, 0.5, 0.5), {"delta": 0.0, "mode": "min_max"}, [1, 1, 1, 1, 1]),  # nothing helps
    ((0.4, 0.5), (0.1, 0.1, 0.1), {"delta": 0.3}, [1, 1, 1, 1, 1]),  # .35 already
]


@pytest.mark.parametrize("right, wrong, options, stay", MASK)
def test_margin_mask_of_five_answers(right, wrong, options, stay):
    batch, adv = answers_worth((*right, *wrong), (1, 1, 0, 0, 0))
    after = ADVANTAGES["margin_mask"](batch, adv, **options)
    assert torch.equal(after, adv * torch.tensor(stay)[:, None])


def test_order_of_four_groups():
    """All right; all wrong; right .3 over wrong .2; right .1 and .5 around wrong .3, one pair of two reversed."""
    batch, adv = answers_worth((0.7, 0.6, 0.3, 0.2, 0.1, 0.5, 0.3, 9.0), (1, 0, 1, 0, 1, 1, 0, nan))
    batch = TokenBatch(batch.mask, torch.tensor([5, 6, 7, 7, 2, 2, 2, 2]), batch.student_logp, batch.scores)
    assert order(sides(batch, adv)) == {
        **dict.fromkeys(("all_right", "all_wrong", "consistent", "reversed"), 1 / 4),
        "pair_reversal": pytest.approx(1 / 3),
        "return_right": pytest.approx((0.7 + 0.3 + 0.1 + 0.5) / 4),
        "return_wrong": pytest.approx((0.6 + 0.2 + 0.3) / 3),
    }


CLIP = {"low": 0.5, "high": 0.5}
SURROGATE = [  # ratio, options, then for A = +1 and A = −1: loss, and its slope in log p
    ("reinforce", 2, {}, (-log(2), log(2)), (-1, 1)),
    ("importance", 2, {}, (-2, 2), (-2, 2)),
    ("importance", exp(30), {}, (-exp(20), exp(20)), (0, 0)),
    ("ppo_clip", 2, {"high": 9.0}, (-2, 2), (-2, 2)),
    ("ppo_clip", 2, CLIP, (-1.5, 2), (0, 2)),
    ("ppo_clip", 1 / 4, CLIP, (-1 / 4, 1 / 2), (-1 / 4, 0)),
    ("ppo_clip", 8, {**CLIP, "dual": 3.0}, (-1.5, 3), (0, 0)),
    ("ppo_clip", 2, {**CLIP, "dual": 3.0}, (-1.5, 2), (0, 2)),
    ("cispo", 2, {}, (-2 * log(2), 2 * log(2)), (-2, 2)),
    ("cispo", 2, CLIP, (-1.5 * log(2), 1.5 * log(2)), (-1.5, 1.5)),
    ("cispo", 1 / 4, CLIP, (log(4) / 2, -log(4) / 2), (-1 / 2, 1 / 2)),
]


@pytest.mark.parametrize("name, ratio, options, loss, slope", SURROGATE)
def test_surrogate_of_a_token(name, ratio, options, loss, slope):
    log_ratio = torch.full((1, 2), log(ratio), dtype=torch.float64).requires_grad_()
    adv, mask = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    value = SURROGATES[name](log_ratio, adv, mask, **options)
    assert value[0].tolist() == pytest.approx(loss)
    assert torch.autograd.grad(value.sum(), log_ratio)[0][0].tolist() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(
    "options, loss, slope", [({"low": 9.0, "high": 9.0}, -2, -2), ({"low": 0.5, "high": 0.5}, -1.5, 0)]
)
def test_gspo_clips_the_geometric_mean_of_the_ratios(options, loss, slope):
    log_ratio = torch.tensor([[log(8), log(0.5), 77.0]]).requires_grad_()  # the mean of log 8 and log ½ is log 2
    mask = torch.tensor([[True, True, False]])
    value = SURROGATES["gspo"](log_ratio, torch.ones(1, 3), mask, **options)
    assert value[mask].tolist() == pytest.approx([loss, loss])
    assert torch.autograd.grad(value[mask].sum(), log_ratio)[0][0].tolist() == pytest.approx([slope, slope, 0])


REDUCTION = [  # lengths 3 and 1, and a response without tokens that does not count
    ("sequence", {}, [1 / 2, 1 / 2]),
    ("token", {}, [1 / 4, 1 / 4]),
    ("sequence_token_mean", {}, [1 / 6, 1 / 2]),
    ("constant", {"length": 10}, [1 / 20, 1 / 20]),
]


@pytest.mark.parametrize("name, options, expected", REDUCTION)
def test_reduction_of_three_tokens_and_one(name, options, expected):
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    batch = TokenBatch(mask, torch.zeros(3).long(), torch.zeros(3, 3))
    assert REDUCTIONS[name](batch, **options)[:2, 0].tolist() == pytest.approx(expected)


SCHEDULE = [
    ("constant", 7, {"start": 0.3}, 0.3),
    ("constant", 0, {"warmup": 4}, 0.2),
    ("constant", 4, {"warmup": 4}, 1),
    ("linear", 0, {}, 1),
    ("linear", 5, {"start": 2.0, "final": 1.0}, 1.5),
    ("linear", 10, {"final": 0.1}, 0.1),
    ("linear", 7, {"warmup": 4}, 0.5),
    ("cosine", 5, {}, 0.5),
    ("cosine", 2, {"final": 0.5}, 0.5 + 0.25 * (1 + cos(pi / 5))),
    ("cosine", 10, {}, 0),
]


@pytest.mark.parametrize("name, step, options, expected", SCHEDULE)
def test_schedule_over_eleven_steps(name, step, options, expected):
    assert SCHEDULES[name](step, 11, **options) == pytest.approx(expected)


def test_depths_of_the_two_curricula():
    """TCOD, arXiv:2604.24005: at most 30 decisions, one more every 6 steps; an expert of 12, one fewer every 5."""
    assert [f2b(k, limit=30, every=6) for k in (0, 5, 6, 59, 300)] == [1, 1, 2, 10, 30]
    assert [b2f(k, 12, every=5) for k in (0, 4, 5, 54, 55, 300)] == [11, 11, 10, 1, 0, 0]


def test_a_teacher_in_contrast_with_itself_without_media():
    """RT-OPD, arXiv:2609.28778 at α = 1: q ∝ p²/p₀ = .25/.4, .09/.4, .04/.2, and KL(student‖q). α = 0 is p itself."""
    p, blank, student = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64).log()
    head = torch.eye(3, dtype=torch.float64)
    far = vocab.tilted(p[None] + 3, blank[None] - 1, 1.0)  # what is added to all logits is nothing
    q = [0.625 / 1.05, 0.225 / 1.05, 0.2 / 1.05]
    assert far.softmax(-1)[0].tolist() == pytest.approx(q)
    d = vocab.divergence(DIVERGENCES["reverse_kl"], student[None], head, far, head)
    assert d.item() == pytest.approx(kl((0.2, 0.5, 0.3), q)) == pytest.approx(0.341797, abs=1e-6)
    assert torch.equal(vocab.tilted(p, blank, 0.0), p)


def test_va_opd_averages_two_groups_of_tokens_and_weighs_rollouts_within_their_group():
    """arXiv:2605.21924 Eq. 2–6: Σ_k w_k (½ mean over the top 20 % by a + ½ mean over the others), Σ_k w_k = 1."""
    batch = tiny(**NEED)
    per_token = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    weights = ["media_tokens", "media_rollouts"]
    term = Term.build(divergence="reverse_kl", weights=weights, reduction="sequence_token_mean")
    first = 1 / (1 + exp(-2))
    wanted = first * (0.5 * 1 + 0.5 * (2 + 4) / 2) + (1 - first) * 8
    assert term.loss(batch, term.judge(batch), per_token).item() == pytest.approx(wanted)


def test_x_opd_is_two_terms_against_one_teacher_that_reads():
    """arXiv:2603.24596 Eq. 1–5: λ·(log q(y|text) − log p(y|text)) + (1−λ)·(log q(y|text) − log p(y|speech))."""
    recipe = config.read(Path(__file__).parents[1] / "configs" / "methods" / "x_opd.yaml")["objective"]
    keys = ("advantages", "surrogate", "reduction", "scale")
    terms = {n: Term.build(**{k: v for k, v in t.items() if k in keys}) for n, t in recipe.items()}
    assert [(t["sampling"], t.get("view", "student")) for t in recipe.values()] == [
        ("read", "teacher"),
        ("heard", "student"),
    ]
    batch = tiny(teacher_logp=[[-0.5, -2.5, -1.0], [-3.0, 9, 9]])
    verdicts = {name: term.judge(batch) for name, term in terms.items()}
    for verdict in verdicts.values():
        assert verdict.advantage[batch.mask].tolist() == [0.5, -0.5, 2.0, 1.0]
        assert verdict.weight[batch.mask].tolist() == pytest.approx([0.5 / 4] * 4)


AUDIO = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.34, 0.33, 0.33]]
TEXT = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.15, 0.75], [0.3, 0.3, 0.4]]


@pytest.mark.parametrize("chunk", [None, 3])
def test_cord_token_loss(chunk):
    """arXiv:2601.16547 Eq. 2 and 4–7 on four tokens: K = 2, α = β = 2."""
    logits = torch.tensor(AUDIO, dtype=torch.float64).log().requires_grad_()
    head = torch.eye(3, dtype=torch.float64)
    term = Term.build(divergence="reverse_kl", weights=[{"top_kl": {"k": 2}}, "position_linear"], reduction="sequence")
    assert term.divergence is not None
    d = vocab.divergence(term.divergence, logits, head, torch.tensor(TEXT).double().log(), head, chunk=chunk)
    assert d.tolist() == pytest.approx([0.026812, 0.223805, 0.011084, 0.010525], abs=1e-6)
    batch = TokenBatch(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4))
    loss = term.loss(batch, term.judge(batch), d[None])
    assert loss.item() == pytest.approx(0.878570, abs=1e-6)
    (slope,) = torch.autograd.grad(loss, logits)
    assert (slope[1] / (10 / 3)).tolist() == pytest.approx([0.346243, -0.220389, -0.125854], abs=1e-6)
    assert slope[0].sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("surrogate", ["reinforce", "importance"])
def test_cord_sequence_loss(surrogate):
    """arXiv:2601.16547 Eq. 9 and 10: four answers to one prompt, judged 1, 0, 0, 1."""
    mask = torch.arange(3)[None] < torch.tensor([3, 2, 1, 3])[:, None]
    logp = torch.linspace(-2, -0.1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    batch = TokenBatch(mask, torch.zeros(4, dtype=torch.long), logp.detach())
    batch.scores["reward"] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    term = Term.build(advantages=["reward", "group_center"], surrogate=surrogate, reduction="sequence")
    judged = term.judge(batch)
    assert judged.advantage[mask].tolist() == [0.5] * 3 + [-0.5] * 3 + [0.5] * 3
    (slope,) = torch.autograd.grad(term.loss(batch, judged, logp), logp)
    a = torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(-(a * (logp * mask).sum(1)).sum() / 4, logp)
    torch.testing.assert_close(slope, wanted)


APO_ACCURACY, APO_FORMAT = (1, 1, 0, 0, 0, 0, 1, 0), (0.5, 0.5, 0.5, 0, 0.5, 0, 0, 0.5)
APO_LENGTHS = (300, 500, 900, 200, 4096, 450, 400, 401)


def test_apo_on_a_group_of_eight():
    """arXiv:2506.21655, its code: three of eight are correct, d = .625; the correct have 400 tokens on average."""
    mask = torch.arange(4096)[None] < torch.tensor(APO_LENGTHS)[:, None]
    reward = torch.tensor(APO_ACCURACY) + torch.tensor(APO_FORMAT)
    batch = TokenBatch(mask, torch.zeros(8).long(), torch.zeros(mask.shape), Scores(reward=reward))
    grpo = Term.build(advantages=["reward", {"group_normalize": {"eps": 1e-9}}], surrogate="ppo_clip")
    plain = [1.368150, 1.368150, -0.315727, -1.157666, -0.315727, -1.157666, 0.526212, -0.315727]
    assert grpo.judge(batch).advantage[:, 0].tolist() == pytest.approx(plain, abs=6e-7)
    shaped = Term.build(advantages=["reward", {"group_normalize": {"eps": 1e-9}}, "stcr"], surrogate="ppo_clip")
    omega_a = [1.368150, 1.368150, -0.317302, -1.157666, -0.327183, -1.158244, 0.526212, -0.315730]
    advantage = shaped.judge(batch).advantage
    assert advantage[:, 0].tolist() == pytest.approx(omega_a, abs=6e-7)
    assert (advantage == torch.where(mask, advantage[:, :1], 0)).all()
    omega = ADVANTAGES["stcr"](batch, torch.ones(mask.shape, dtype=torch.float64))[:, 0]
    assert omega.tolist() == pytest.approx([1, 1, 1.004987, 1, 1.036285, 1.000500, 1, 1.000010], abs=6e-7)
    kappa = WEIGHTS["dads"](batch)
    assert kappa[:, 0].tolist() == pytest.approx([0.639173, 0.639173, 1, 1, 1, 1, 0.639173, 1], abs=6e-7)


F_SATURATING = (0.2881, 0.4932, 0.6392, 0.7431, 0.8171, 0.8698, 0.9073)
F_EXPONENTIAL = (0.0927, 0.1302, 0.1829, 0.2569, 0.3608, 0.5068, 0.7119)


@pytest.mark.parametrize("form, values", [("saturating", F_SATURATING), ("exponential", F_EXPONENTIAL)])
def test_dads_of_one_to_seven_correct_in_eight(form, values):
    for right, value in enumerate(values, 1):
        reward = torch.tensor([1.0] * right + [0.0] * (8 - right))
        batch = TokenBatch(torch.ones(8, 1).bool(), torch.zeros(8).long(), torch.zeros(8, 1), Scores(reward=reward))
        kappa = WEIGHTS["dads"](batch, form=form)[:, 0].tolist()
        assert kappa == pytest.approx([value] * right + [1] * (8 - right), abs=6e-5)


def test_every_piece_has_a_number():
    tested = [DIVERGENCE, WEIGHT, ADVANTAGE, [*SURROGATE, ("gspo",)], REDUCTION, SCHEDULE]
    tables = [DIVERGENCES, WEIGHTS, ADVANTAGES, SURROGATES, REDUCTIONS, SCHEDULES]
    for rows, table in zip(tested, tables, strict=True):
        assert {row[0] for row in rows} == table.keys()
