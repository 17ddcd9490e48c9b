"""Every listed piece obeys the contract of its slot, from the moment it is listed; and terms add up."""

import inspect
from dataclasses import replace
from math import nan

import pytest
import torch

from xmodal_opd.objective import Term, pick, rows
from xmodal_opd.objective.advantages import ADVANTAGES
from xmodal_opd.objective.divergences import DIVERGENCES, SAMPLED, gaussian_reverse_kl
from xmodal_opd.objective.groups import difficulty, unjudged
from xmodal_opd.objective.order import margin, sides
from xmodal_opd.objective.reductions import REDUCTIONS
from xmodal_opd.objective.schedules import SCHEDULES
from xmodal_opd.objective.surrogates import SURROGATES
from xmodal_opd.objective.weights import ROW_WEIGHTS, WEIGHTS, tip_axes
from xmodal_opd.schema import REWARDED
from xmodal_opd.types import Scores, TokenBatch

B, T, V = 4, 6, 9
LENGTHS = (6, 3, 5, 1)
SCORES = ("student_entropy", "teacher_divergence", "divergence", "teacher_logp", "sampler_logp", "degraded_logp")
TOP = {"topk_forward_kl", "topk_reverse_kl", "topk_jsd"}
VARIANTS = [
    *((name, {"k": 4} if name in TOP else {}) for name in DIVERGENCES),
    *((name, {"k": 4, "rest": "renormalise"}) for name in sorted(TOP)),
    ("topk_reverse_kl", {"k": 4, "by": "teacher"}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
]


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(width: int = T) -> TokenBatch:
    """Four responses to two prompts. Columns beyond T are padding, and padding is full of misleading numbers."""

    def numbers(seed: int, sign: int = 1) -> torch.Tensor:
        padding = 50 + 10 * random(B, width, seed=seed).abs()
        real = torch.nn.functional.pad(random(B, T, seed=seed + 100).abs(), (0, width - T))
        return sign * torch.where(mask, real, padding)

    mask = torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None]
    reward = torch.tensor([1.0, 0.25, 0.0, 1.0], dtype=torch.float64)
    scores = {name: numbers(seed, -1 if name == "sampler_logp" else 1) for seed, name in enumerate(SCORES)}
    draw = torch.tensor([0.3, 0.7, 0.2, 0.9], dtype=torch.float64)
    scores |= {"reward": reward, "text_reward": reward, "dual": reward, "draw": draw}
    return TokenBatch(mask, torch.tensor([7, 3, 3, 7]), numbers(9, sign=-1), Scores(scores))


@pytest.fixture
def batch() -> TokenBatch:
    return example()


@pytest.mark.parametrize("name, options", VARIANTS)
def test_divergence_is_positive_and_zero_at_equality(name, options):
    d, p, q = DIVERGENCES[name], random(B, T, V).log_softmax(-1), random(B, T, V, seed=1).log_softmax(-1)
    value = d(p, q, **options)
    assert value.shape == (B, T) and (value > 0).all()
    least = -q.amax(-1) if name == "hard_ce" else torch.zeros(B, T)  # a cross-entropy with a choice, not a distance
    torch.testing.assert_close(d(q, q, **options), least.to(q), atol=1e-12, rtol=0)
    torch.testing.assert_close(value[1:2], d(p[1:2], q[1:2], **options), msg="tokens must not look at each other")


@pytest.mark.parametrize("name, options", VARIANTS)
def test_divergence_has_the_gradient_of_its_value(name, options):
    q = random(3, V, seed=1).log_softmax(-1)
    logits = random(3, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s.log_softmax(-1), q, **options), logits)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_survives_float32_and_hopeless_tokens(name):
    logits = torch.tensor([[80.0, 0.0, -80.0]]).requires_grad_()
    value = DIVERGENCES[name](logits.log_softmax(-1), torch.tensor([[-80.0, 0.0, 80.0]]).log_softmax(-1))
    (slope,) = torch.autograd.grad(value.sum(), logits)
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()


@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.parametrize("name", sorted(TOP))
def test_a_bucket_never_exceeds_the_full_divergence(name, by):
    p, q = random(50, V).log_softmax(-1), random(50, V, seed=1).log_softmax(-1)
    full = DIVERGENCES[name.removeprefix("topk_")](p, q)
    assert (DIVERGENCES[name](p, q, k=3, by=by) <= full + 1e-12).all()


def test_truncated_reverse_kl_does_not_drain_its_support():
    """Without the constant log p the gradient also carries that of the top-k mass, pushing it out even at p = q."""
    s, q = random(1, 30).requires_grad_(), random(1, 30, seed=1).log_softmax(-1)
    p = s.log_softmax(-1)
    top = p.topk(5).indices
    plain = (p.exp() * (p - q)).gather(-1, top).sum()
    kept = DIVERGENCES["topk_reverse_kl"](p, q, k=5, rest="drop").sum()
    mass = p.exp().gather(-1, top).sum()
    slope = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in (plain, kept, mass)]
    torch.testing.assert_close(slope[0] - slope[1], slope[2])
    at_equality = DIVERGENCES["topk_reverse_kl"](p, p.detach(), k=5, rest="drop").sum()
    assert torch.autograd.grad(at_equality, s)[0].abs().max() < 1e-12


def test_gaussian_reverse_kl_is_the_divergence_of_two_normal_distributions():
    p, q, std = (random(B, T, 3, seed=seed) for seed in (1, 2, 3))
    value = gaussian_reverse_kl(p, q, std.exp())
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(p, std.exp()), normal(q, std.exp())).sum(-1)
    torch.testing.assert_close(value, wanted)
    assert gaussian_reverse_kl(q, q, 0.1).abs().max() == 0
    assert torch.autograd.gradcheck(lambda m: gaussian_reverse_kl(m, q, 0.5), p.requires_grad_())


def test_a_term_distils_a_policy_of_continuous_actions(batch):
    """Means linear in what is seen, for T actions in each of B episodes: no vocabulary, the same masks and sums."""
    seen, teacher = random(B, T, 5), random(5, 2, seed=1)
    student = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    term = Term(divergence=gaussian_reverse_kl, reduction=REDUCTIONS["token"])
    optimizer = torch.optim.LBFGS([student], max_iter=50)

    def loss():
        optimizer.zero_grad()
        far = term.loss(batch, term.judge(batch), gaussian_reverse_kl(seen @ student, seen @ teacher, 0.5))
        far.backward()
        return far

    before = optimizer.step(loss)
    assert loss() < 1e-6 * before
    torch.testing.assert_close(student.detach(), teacher, atol=1e-3, rtol=0)


def expected_gradient(loss, s):
    """Σ_a p(a) ∇ loss(a): what the average of many sampled losses would differentiate to."""
    p = s.log_softmax(-1)
    each = [torch.autograd.grad(loss(p[a], a), s, retain_graph=True)[0] for a in range(len(s))]
    return sum(p[a].exp().item() * g for a, g in enumerate(each))


@pytest.mark.parametrize("name, minimises", [("k1", None), ("k2", "reverse_kl"), ("k3", "forward_kl")])
def test_what_each_estimator_really_minimises(name, minimises):
    s, q = random(V).requires_grad_(), random(V, seed=1).log_softmax(-1)
    got = expected_gradient(lambda logp, a: SAMPLED[name](logp, q[a]), s)
    wanted = torch.zeros(V, dtype=torch.float64)
    if minimises:
        (wanted,) = torch.autograd.grad(DIVERGENCES[minimises](s.log_softmax(-1), q), s)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimators_are_unbiased_as_numbers(name):
    p, q = random(V).log_softmax(-1), random(V, seed=1).log_softmax(-1)
    torch.testing.assert_close((p.exp() * SAMPLED[name](p, q)).sum(), DIVERGENCES["reverse_kl"](p, q))


def policy_gradients(chain, p, q):
    """−A ∇log p, in the logits, of a one-token response for every token [V, V] that could be sampled."""
    kl = DIVERGENCES["reverse_kl"](p, q).expand(V, 1)
    scores = Scores(teacher_logp=q[:, None], teacher_divergence=kl)
    batch = TokenBatch(torch.ones(V, 1, dtype=torch.bool), torch.arange(V), p[:, None], scores)
    advantage = Term.build(advantages=chain, surrogate="reinforce").judge(batch).advantage
    return -advantage * (torch.eye(V, dtype=torch.float64) - p.exp())


def test_kl_baseline_keeps_the_gradient_and_on_average_lowers_its_variance():
    """vOPD, arXiv:2605.07865. Every possible sample is enumerated; single draws of (p, q) may go the other way."""
    variance = []
    for seed in range(40):
        s, q = random(V, seed=seed).requires_grad_(), random(V, seed=seed + 1000).log_softmax(-1)
        p = s.detach().log_softmax(-1)
        plain, based = (
            policy_gradients(chain, p, q) for chain in (["teacher_logratio"], ["teacher_logratio", "kl_baseline"])
        )
        mean = p.exp() @ plain
        torch.testing.assert_close(p.exp() @ based, mean)
        torch.testing.assert_close(mean, torch.autograd.grad(DIVERGENCES["reverse_kl"](s.log_softmax(-1), q), s)[0])
        variance.append([(p.exp() @ (g - mean).square().sum(1)).item() for g in (plain, based)])
    ratio = torch.tensor(variance)
    assert (ratio[:, 1] / ratio[:, 0]).mean() < 0.97


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_is_finite_positive_and_blind_to_padding(name, batch):
    options = {"keep": 0.5} if "tip" in name else {}
    w = WEIGHTS[name](batch, **options)
    assert w.shape == (B, T) and torch.isfinite(w).all() and (w >= 0).all() and w[batch.mask].sum() > 0
    wider = example(T + 5)
    torch.testing.assert_close(WEIGHTS[name](wider, **options)[wider.mask], w[batch.mask])


@pytest.mark.parametrize(
    "name, options", [*((n, {}) for n in ROW_WEIGHTS), ("top_kl", {"k": 2}), ("prefix", {"tokens": 2})]
)
def test_row_weight_is_the_same_in_any_micro_batch(name, options, batch):
    whole = ROW_WEIGHTS[name](batch, **options)
    for index in (slice(0, 1), slice(1, 3), torch.tensor([3, 0])):
        part = rows(batch, index)
        torch.testing.assert_close(ROW_WEIGHTS[name](part, **options)[part.mask], whole[index][part.mask])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_of_a_step_without_tokens(name, batch):
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    assert torch.isfinite(WEIGHTS[name](nothing)).all()


def enumerated(tokens: int):
    """(log p [V^T, T] with gradient, its logits, the sampler's log-probs, rewards) of all answers of T tokens; the
    sampler is the same model with perturbed weights."""
    s = [random(*[V] * (t + 1), seed=t).requires_grad_() for t in range(tokens)]
    answers = torch.cartesian_prod(*[torch.arange(V)] * tokens).view(-1, tokens)

    def logp(logits):
        rows = [x.log_softmax(-1)[tuple(answers[:, : t + 1].T)] for t, x in enumerate(logits)]
        return torch.stack(rows, 1)

    sampler = logp([x.detach() + 0.7 * random(*x.shape, seed=50 + t) for t, x in enumerate(s)])
    return logp(s), s, sampler, random(len(answers), seed=9)


def expected_policy_gradient(weights, tokens: int):
    """E over the sampler of the gradient of a policy term, and the exact gradient of −E over the trainer of its reward,
    each Σ over all answers; and the ratios."""
    logp, s, sampler, reward = enumerated(tokens)
    scores = Scores(reward=reward, sampler_logp=sampler)
    batch = TokenBatch(torch.ones_like(sampler).bool(), torch.arange(len(reward)), logp.detach(), scores)
    term = Term.build(advantages=["reward"], surrogate="importance", weights=weights, reduction="sequence")
    judged = term.judge(batch)
    chances = sampler.sum(1).exp()
    assert chances.sum().item() == pytest.approx(1)
    judged = replace(judged, weight=judged.weight * len(reward) * chances[:, None])
    got = torch.autograd.grad(term.loss(batch, judged, logp), s, retain_graph=True)
    wanted = torch.autograd.grad(-(logp.sum(1).exp() * reward).sum(), s, retain_graph=True)
    return [torch.cat([g.flatten() for g in side]) for side in (got, wanted)]


def test_importance_weights_without_a_cap_undo_the_difference_between_sampler_and_trainer():
    """Every answer is enumerated, so this is the expectation itself. Over several tokens only the product is exact."""
    for weights, tokens in (
        ([{"tis": {"cap": float("inf")}}], 1),
        ([{"tis": {"cap": float("inf"), "level": "sequence"}}], 1),
        ([{"tis": {"cap": float("inf"), "level": "sequence"}}], 3),
    ):
        got, wanted = expected_policy_gradient(weights, tokens)
        torch.testing.assert_close(got, wanted)

    def error(weights, tokens):
        got, wanted = expected_policy_gradient(weights, tokens)
        return ((got - wanted).norm() / wanted.norm()).item()

    assert error([{"tis": {"cap": float("inf")}}], 3) > 0.05, "tokens alone leave the states uncorrected"
    assert error([{"tis": {"cap": 2.0}}], 1) > 0.01, "a cap is a bias"
    errors = [error([{"tis": {"cap": cap, "level": "sequence"}}], 3) for cap in (2.0, 8.0, 100.0)]
    assert errors == sorted(errors, reverse=True) and error([], 1) > errors[-1]


def test_a_mask_loses_exactly_the_mass_it_leaves_out():
    inside = [{"mismatch_mask": {"low": 0.8, "high": 1.3}}, {"tis": {"cap": float("inf")}}]
    got, _ = expected_policy_gradient(inside, 1)
    logp, s, sampler, reward = enumerated(1)
    kept = ((logp - sampler).exp() >= 0.8) & ((logp - sampler).exp() <= 1.3)
    assert 0 < kept.sum() < len(kept)
    mass = (logp.exp() * kept).detach()
    (wanted,) = torch.autograd.grad(-(mass * logp * reward[:, None]).sum(), s)
    torch.testing.assert_close(got, wanted)


def test_tip_does_not_let_a_few_wild_entropies_flatten_the_rest():
    """The scale of uncertainty ends at the 98th percentile: 0.98 here, though one token has an entropy of 50."""
    h = torch.linspace(0, 1, 101)[None].clone()
    h[0, -1] = 50
    batch = TokenBatch(torch.ones(1, 101, dtype=torch.bool), torch.zeros(1, dtype=torch.long), torch.zeros(1, 101))
    batch.scores.update(student_entropy=h, teacher_divergence=h)
    scaled, _ = tip_axes(batch, "teacher")
    assert scaled[0, [0, 49, 98, 100]].tolist() == pytest.approx([0, 0.5, 1, 1], abs=1e-5)


def test_tip_keeps_the_same_share_of_every_response(batch):
    kept = (WEIGHTS["tip"](batch, keep=0.5) > 0).sum(1)
    assert kept.tolist() == [n // 2 for n in LENGTHS]
    assert (WEIGHTS["tip"](batch) * batch.mask).sum().item() == pytest.approx(sum(LENGTHS))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_is_finite_and_blind_to_padding_and_order(name, batch):
    def shape(b):
        return ADVANTAGES[name](b, b.student_logp)

    a = shape(batch)
    assert a.shape == (B, T) and torch.isfinite(a[batch.mask]).all()
    wider, shuffled = example(T + 5), rows(batch, torch.tensor([2, 0, 3, 1]))
    torch.testing.assert_close(shape(wider)[wider.mask], a[batch.mask])
    back = torch.tensor([1, 3, 0, 2])
    torch.testing.assert_close(shape(shuffled)[back][batch.mask], a[batch.mask])


@pytest.mark.parametrize("name", [n for n in ADVANTAGES if n not in ("reward", "group_center")])
def test_an_undecided_response_does_not_touch_the_others(name, batch):
    before = random(B, T, seed=5)
    before[1] = nan
    without = torch.tensor([0, 2, 3])
    alone = ADVANTAGES[name](rows(batch, without), before[without])
    torch.testing.assert_close(
        ADVANTAGES[name](batch, before)[without][batch.mask[without]], alone[batch.mask[without]]
    )


@pytest.mark.parametrize("name", ["group_center", "group_normalize", "leave_one_out"])
def test_group_statistics_count_responses_not_tokens(name, batch):
    """Repeating a response's reward over more tokens must not change anybody's advantage."""
    lengthened = replace(batch, mask=torch.ones_like(batch.mask))
    adv = ADVANTAGES["reward"](batch, torch.zeros(B, T, dtype=torch.float64))
    torch.testing.assert_close(ADVANTAGES[name](batch, adv)[:, 0], ADVANTAGES[name](lengthened, adv)[:, 0])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_equal_rewards_give_exactly_no_advantage_whatever_the_lengths(reward):
    mask = torch.arange(60)[None] < torch.arange(1, 61)[:, None]
    batch = TokenBatch(mask, torch.arange(60) // 2, torch.zeros(60, 60))
    assert ADVANTAGES["group_normalize"](batch, torch.full((60, 60), reward)).abs().max() == 0


def groups_of(count: int, size: int, seed: int = 0) -> tuple[TokenBatch, torch.Tensor]:
    """`count` prompts with `size` answers of 1 to T tokens, right or wrong at random; and their advantages."""
    rows = count * size
    lengths = 1 + random(rows, seed=seed).abs().mul(3).long().clamp(max=T - 1)
    adv = random(rows, T, seed=seed + 1)
    batch = TokenBatch(torch.arange(T) < lengths[:, None], torch.arange(rows) % count, torch.zeros_like(adv))
    batch.scores.update(reward=(random(rows, seed=seed + 2) > 0).double(), draw=random(rows, seed=seed + 3))
    return batch, adv


@pytest.mark.parametrize("direction", ["spread", "lift", "down"])
@pytest.mark.parametrize("mode", ["mean", "min_max"])
def test_a_margin_shift_brings_every_mixed_group_to_delta_and_touches_no_other(mode, direction):
    batch, adv = groups_of(count=40, size=4)
    before = margin(sides(batch, adv), mode)
    after = ADVANTAGES["margin_shift"](batch, adv, delta=0.4, mode=mode, direction=direction)
    low, mixed = before < 0.4, ~before.isnan()
    assert low.any() and (before >= 0.4).any() and not mixed.all()
    torch.testing.assert_close(margin(sides(batch, after), mode)[low], torch.full_like(before[low], 0.4))
    assert torch.equal(after[~low], adv[~low]), "groups that are far enough apart, or of one kind, stay to the bit"
    shift = (after - adv)[low]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))


def test_answers_without_a_verdict_are_neither_right_nor_wrong(batch):
    batch, adv = groups_of(count=10, size=6)
    reward = batch.scores["reward"].clone()
    reward[::7] = nan
    batch = replace(batch, scores=Scores(batch.scores, reward=reward))
    decided = (~reward.isnan()).nonzero()[:, 0]
    for chain in (["margin_shift"], [{"margin_mask": {"delta": 1.0}}]):
        shape = pick("advantage", ADVANTAGES, chain[0])
        after = shape(batch, adv)
        assert torch.equal(after[::7], adv[::7]) and not torch.equal(after, adv)
        torch.testing.assert_close(after[decided], shape(rows(batch, decided), adv[decided]))
    weight = WEIGHTS["balance"](batch)
    assert (weight[::7] == 1).all()
    assert torch.equal(weight[decided], WEIGHTS["balance"](rows(batch, decided)))


def test_balance_leaves_as_many_right_as_wrong_answers_and_chooses_by_the_draw_alone():
    batch, _ = groups_of(count=30, size=8)
    weight, right = WEIGHTS["balance"](batch)[:, 0], batch.scores["reward"] == 1
    for group in range(30):
        here = batch.group == group
        counts = [int((weight * (here & side)).sum()) for side in (right, ~right)]
        both = min((here & right).sum(), (here & ~right).sum()) > 0
        assert counts[0] == counts[1] if both else sum(counts) == 8
    back = torch.arange(240).flip(0)
    assert torch.equal(WEIGHTS["balance"](rows(batch, back))[back][:, 0], weight)
    other = replace(batch, scores=Scores(batch.scores, draw=-batch.scores["draw"]))
    assert not torch.equal(WEIGHTS["balance"](other)[:, 0], weight)


def test_answers_that_are_left_out_still_count_in_the_denominator_and_in_the_returns():
    """The path of arXiv:2605.03677 as released: Σ over counted tokens / (all tokens of the answer) / all answers."""
    batch, _ = groups_of(count=5, size=4)
    batch.scores["teacher_logp"] = 8 * random(20, T, seed=8)
    chain = ["teacher_logratio", {"margin_shift": {"delta": 0.4}}]
    weights = ["balance", {"gap_mask": {"limit": 5.0}}]
    term = Term.build(advantages=chain, surrogate="reinforce", weights=weights, reduction="sequence_token_mean")
    logp = random(20, T, seed=6)
    got = term.loss(batch, term.judge(batch), batch.student_logp + logp)
    ratio = batch.scores["teacher_logp"] - batch.student_logp
    adv = ADVANTAGES["margin_shift"](batch, ratio, delta=0.4)
    kept = WEIGHTS["balance"](batch)[:, 0] == 1
    total = 0.0
    for row in kept.nonzero()[:, 0].tolist():
        real = batch.mask[row] & (ratio[row].abs() < 5)
        total -= (adv[row] * logp[row])[real].sum().item() / int(batch.mask[row].sum())
    assert 0 < kept.sum() < 20 and (ratio.abs() >= 5)[batch.mask].any()
    assert got.item() == pytest.approx(total / 20)


def test_the_judge_is_asked_for_every_piece_that_reads_its_reward(batch):
    for name, piece in (ADVANTAGES | WEIGHTS).items():
        silent = replace(batch, scores=Scores({k: v for k, v in batch.scores.items() if k != "reward"}))
        try:
            piece(silent, batch.student_logp) if name in ADVANTAGES else piece(silent)
        except KeyError as error:
            assert "'reward'" in str(error) and name in REWARDED
        else:
            assert name not in REWARDED


def test_a_response_without_tokens_does_not_count_in_its_group(batch):
    cleared = replace(batch, mask=batch.mask & torch.tensor([True, True, False, True])[:, None])
    adv = ADVANTAGES["reward"](batch, torch.zeros(B, T, dtype=torch.float64))
    assert ADVANTAGES["group_center"](cleared, adv)[1, 0] == 0  # alone now: the other answer to its prompt is gone
    assert ADVANTAGES["group_center"](batch, adv)[1, 0] == 0.125


def test_leave_one_out_subtracts_the_mean_of_the_others():
    reward = torch.tensor([1.0, 0.0, 0.0, 0.5])
    batch = TokenBatch(torch.ones(4, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.long), torch.zeros(4, 1))
    others = torch.stack([reward[torch.arange(4) != i].mean() for i in range(4)])
    torch.testing.assert_close(ADVANTAGES["leave_one_out"](batch, reward[:, None])[:, 0], reward - others)


def outcomes(rewards, groups, lengths) -> TokenBatch:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    logp = torch.zeros(mask.shape, dtype=torch.float64)
    return TokenBatch(mask, torch.tensor(groups), logp, Scores(reward=torch.tensor(rewards, dtype=torch.float64)))


def omega(batch: TokenBatch, **options) -> list[float]:
    """Of each response, where every advantage is negative."""
    return (-ADVANTAGES["stcr"](batch, -torch.ones_like(batch.student_logp), base=1.1, **options)[:, 0]).tolist()


def test_a_group_that_is_all_right_or_all_wrong_is_not_shaped_by_apo():
    batch = outcomes([1, 1.5, 1, 0, 0.5, 0.5], [0, 0, 0, 1, 1, 1], [1, 2, 9, 1, 2, 9])
    assert omega(batch) == [1] * 6 and difficulty(batch).tolist() == [0] * 3 + [1] * 3
    for form in ("saturating", "exponential"):
        for positive in ("advantage", "correct"):
            assert (WEIGHTS["dads"](batch, form=form, positive=positive) == 1).all()


def test_apo_treats_groups_of_any_size_and_order_apart():
    rewards, groups, lengths = [1, 0, 0, 1, 1, 0.5, 0], [5, 2, 5, 2, 2, 9, 9], [2, 8, 4, 2, 4, 9, 1]
    batch = outcomes(rewards, groups, lengths)
    assert omega(batch) == pytest.approx([1, 2 - 1.1**-5, 2 - 1.1**-2, 1, 1, 1, 1])
    assert difficulty(batch).tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3, 1, 1])
    assert omega(outcomes([1.0], [0], [3])) == omega(outcomes([0.0], [0], [3])) == [1]


def test_format_alone_may_be_an_advantage_but_never_right():
    """One of four is right without format, one has the format alone: above the mean of .5 and longer than the right."""
    batch = outcomes([1, 0.75, 0, 0], [0] * 4, [2, 5, 1, 1])
    kappa = [WEIGHTS["dads"](batch, positive=p)[:, 0].lt(1).tolist() for p in ("advantage", "correct")]
    assert kappa == [[True, True, False, False], [True, False, False, False]]
    adv = torch.tensor([[0.5], [0.25], [-1], [-1]]).expand(4, 5)
    scaled = [ADVANTAGES["stcr"](batch, adv, base=1.1, of=of)[1, 0] for of in ("wrong", "negative")]
    assert torch.stack(scaled).tolist() == pytest.approx([0.25 * (2 - 1.1**-3), 0.25])


def test_apo_leaves_the_undecided_out():
    batch = outcomes([1, nan, 0, 0], [0] * 4, [2, 90, 5, 1])
    without = rows(batch, torch.tensor([0, 2, 3]))
    assert omega(batch)[1] == 1 and difficulty(batch).tolist() == pytest.approx([2 / 3] * 4)
    assert [omega(batch)[i] for i in (0, 2, 3)] == omega(without)
    kappa = WEIGHTS["dads"](batch)[:, 0]
    assert kappa[1] == 1 and kappa[[0, 2, 3]].tolist() == WEIGHTS["dads"](without)[:, 0].tolist()
    silent = outcomes([nan] * 3, [0, 0, 1], [1, 2, 3])
    assert omega(silent) == [1] * 3 and (WEIGHTS["dads"](silent) == 1).all()


@pytest.mark.parametrize("name, piece", [*ADVANTAGES.items(), *WEIGHTS.items()], ids=[*ADVANTAGES, *WEIGHTS])
def test_pieces_that_read_the_reward_are_known_for_it(name, piece, batch):
    without = replace(batch, scores=Scores({k: v for k, v in batch.scores.items() if k != "reward"}))
    inputs = (without, batch.student_logp) if name in ADVANTAGES else (without,)
    if name in REWARDED:
        with pytest.raises(KeyError, match="no scorer computed 'reward'"):
            piece(*inputs)
    else:
        piece(*inputs)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_reinforce_when_on_policy(name, batch):
    logp, adv = batch.student_logp.clone().requires_grad_(), random(B, T, seed=3)
    loss = SURROGATES[name](logp - batch.student_logp, adv, batch.mask)[batch.mask].sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0][batch.mask], -adv[batch.mask])


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_blind_to_padding_and_other_responses(name):
    narrow, wide = example(), example(T + 5)

    def value(b):
        return SURROGATES[name](b.student_logp * 0.3, b.scores["teacher_logp"] - 0.5, b.mask)

    torch.testing.assert_close(value(wide)[wide.mask], value(narrow)[narrow.mask])
    torch.testing.assert_close(value(rows(narrow, slice(1, 3))), value(narrow)[1:3])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gspo_token_form_has_the_gradient_of_its_sequence_form(advantage, batch):
    log_ratio = (0.3 * random(B, T, seed=4)).requires_grad_()
    adv, mask = torch.full((B, T), advantage, dtype=torch.float64), batch.mask
    tokens = SURROGATES["gspo"](log_ratio, adv, mask, low=0.1, high=0.1)
    (got,) = torch.autograd.grad((REDUCTIONS["sequence_token_mean"](batch) * tokens)[mask].sum(), log_ratio)
    s = ((log_ratio * mask).sum(1) / mask.sum(1)).exp()
    sequence = -torch.minimum(s * advantage, s.clamp(0.9, 1.1) * advantage).mean()
    torch.testing.assert_close(got, torch.autograd.grad(sequence, log_ratio)[0])
    assert (got.abs().sum(1) == 0).any() and (got.abs().sum(1) > 0).any(), "the test should see both branches"


def test_reductions_agree_on_equal_lengths():
    batch = TokenBatch(torch.ones(3, 5, dtype=torch.bool), torch.zeros(3).long(), torch.zeros(3, 5))
    token, per_response = REDUCTIONS["token"](batch), REDUCTIONS["sequence_token_mean"](batch)
    torch.testing.assert_close(token, per_response)
    torch.testing.assert_close(token, REDUCTIONS["sequence"](batch) / 5)
    torch.testing.assert_close(token, REDUCTIONS["constant"](batch, length=5))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_ignores_padding_and_responses_without_tokens(name, batch):
    options = {"length": 7} if name == "constant" else {}
    mask = torch.nn.functional.pad(batch.mask, (0, 3, 0, 2))
    padded = TokenBatch(mask, torch.zeros(len(mask)).long(), torch.zeros(mask.shape))
    torch.testing.assert_close(REDUCTIONS[name](padded, **options)[:B], REDUCTIONS[name](batch, **options))
    assert torch.isfinite(REDUCTIONS[name](replace(padded, mask=torch.zeros_like(mask)), **options)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_stays_between_its_ends(name):
    values = [SCHEDULES[name](step, 20, warmup=5) for step in range(25)]
    assert values[:6] == sorted(values[:6]) and values[0] > 0 and values[5] == 1
    assert all(0 <= v <= 1 for v in values) and values[5:] == sorted(values[5:], reverse=True)


CUTS = [slice(0, 1), slice(1, 3), slice(3, 4)]
TERMS = [
    {"divergence": "jsd", "weights": ["tip", {"top_kl": {"k": 2}}, "position_linear"], "reduction": reduction}
    for reduction in ("token", "sequence", "sequence_token_mean", {"constant": {"length": 100}})
] + [
    {"divergence": "reverse_kl", "weights": ["student_entropy"], "scale": 0.5},
    {"surrogate": "ppo_clip", "advantages": ["reward", "group_normalize"], "weights": ["position_decay"]},
    {"surrogate": "gspo", "advantages": ["reward", "leave_one_out"], "reduction": "sequence_token_mean"},
    {"divergence": "reverse_kl", "weights": ["dads"], "reduction": "sequence_token_mean"},
    {"surrogate": "ppo_clip", "advantages": ["reward", "group_normalize", "stcr"], "reduction": "token"},
    {"surrogate": "importance", "advantages": ["teacher_logratio", "margin_shift"], "weights": ["balance", "gap_mask"]},
]


def per_token(term: Term, s: torch.Tensor, cut=slice(None)) -> torch.Tensor:
    logp, q = s[cut].log_softmax(-1), random(B, T, V, seed=1)[cut].log_softmax(-1)
    return term.divergence(logp, q) if term.divergence else logp[..., 0]


@pytest.mark.parametrize("recipe", TERMS, ids=str)
def test_micro_batches_add_up_to_the_step(recipe, batch):
    term, s = Term.build(**recipe), random(B, T, V).requires_grad_()
    batch = replace(batch, student_logp=s.detach().log_softmax(-1)[..., 0] + 0.01)
    judged = term.judge(batch)
    whole = term.loss(batch, judged, per_token(term, s))
    parts = [term.loss(rows(batch, c), rows(judged, c), per_token(term, s, c)) for c in CUTS]
    added = torch.stack(parts).sum()
    torch.testing.assert_close(added, whole)
    slope, summed = (torch.autograd.grad(x, s)[0] for x in (whole, added))
    torch.testing.assert_close(summed, slope)
    assert slope[~batch.mask].abs().max() == 0 and slope[batch.mask].abs().max() > 0


@pytest.mark.parametrize("recipe", TERMS, ids=str)
def test_garbage_in_the_padding_never_reaches_the_loss(recipe):
    batch, term = example(), Term.build(**recipe)
    values = term.loss(batch, term.judge(batch), batch.student_logp)
    dirty = replace(batch, student_logp=batch.student_logp.where(batch.mask, nan))
    dirty.scores.update({k: v.where(batch.mask, nan) for k, v in batch.scores.items() if v.dim() == 2})
    torch.testing.assert_close(term.loss(dirty, term.judge(dirty), dirty.student_logp), values)


def test_row_weights_see_the_divergence_as_a_constant(batch):
    term = Term.build(divergence="reverse_kl", weights=[{"top_kl": {"k": 1, "alpha": 3.0}}], reduction="sequence")
    d = batch.scores["divergence"].clone().requires_grad_()
    stale = replace(batch, scores=Scores())
    (slope,) = torch.autograd.grad(term.loss(stale, term.judge(stale), d), d)
    torch.testing.assert_close(slope, torch.where(batch.mask, WEIGHTS["top_kl"](batch, k=1, alpha=3.0) / B, 0))


def test_any_weight_is_a_constant_and_its_padding_is_ignored(batch):
    d = batch.scores["divergence"].clone().requires_grad_()
    garbage = torch.where(batch.mask, 1.0, nan)
    term = replace(
        Term.build(divergence="reverse_kl", reduction="sequence"),
        step_weights=(lambda b: garbage,),
        row_weights=(lambda b: b.scores["divergence"],),
    )
    loss = term.loss(batch, term.judge(batch), d)
    torch.testing.assert_close(loss, d[batch.mask].square().sum() / B)
    torch.testing.assert_close(torch.autograd.grad(loss, d)[0], torch.where(batch.mask, d.detach() / B, 0))


@pytest.mark.parametrize(
    "chain", [["reward", "group_center"], ["reward", "group_normalize", "teacher_logratio", "clip"]]
)
def test_a_response_the_judge_could_not_decide_is_left_out_not_failed(chain, batch):
    reward = batch.scores["reward"].clone()
    reward[2] = nan
    failing = replace(batch, scores=Scores(batch.scores, reward=reward))
    without = rows(batch, torch.tensor([0, 1, 3]))
    assert unjudged(failing).tolist() == [False, False, True, False] and not unjudged(batch).any()
    for reduction in ("sequence", "token", "sequence_token_mean"):
        term = Term.build(advantages=chain, surrogate="importance", weights=["student_entropy"], reduction=reduction)
        judged, wanted = term.judge(failing), term.judge(without)
        assert judged.weight[2].abs().max() == 0 and judged.advantage[2].abs().max() == 0
        others = rows(judged, torch.tensor([0, 1, 3]))
        torch.testing.assert_close((others.weight, others.advantage), (wanted.weight, wanted.advantage))
        assert torch.isfinite(term.loss(failing, judged, failing.student_logp))


def test_when_the_judge_decides_nothing_there_is_no_loss(batch):
    silent = replace(batch, scores=Scores(batch.scores, reward=torch.full((B,), nan)))
    term = Term.build(advantages=["reward", "group_normalize"], surrogate="importance")
    assert term.loss(silent, term.judge(silent), silent.student_logp).item() == 0


def test_a_distillation_term_does_not_care_what_the_judge_could_decide(batch):
    silent = replace(batch, scores=Scores(batch.scores, reward=torch.full((B,), nan)))
    term = Term.build(divergence="reverse_kl")
    torch.testing.assert_close(term.judge(silent).weight, term.judge(batch).weight)


def test_a_nan_that_is_not_the_judges_stays_visible(batch):
    batch.scores["teacher_logp"][0, 0] = nan
    term = Term.build(advantages=["teacher_logratio"], surrogate="importance")
    assert term.loss(batch, term.judge(batch), batch.student_logp).isnan()


def test_scale_may_follow_a_schedule(batch):
    term = Term.build(divergence="reverse_kl", scale={"linear": {"start": 0.5, "final": 0.1}})
    assert [term.at(step, 5).scale for step in (0, 2, 4)] == pytest.approx([0.5, 0.3, 0.1])
    with pytest.raises(ValueError, match=r"term.at\(step, total\)"):
        term.judge(batch)
    half = Term.build(divergence="reverse_kl", scale=0.5)
    torch.testing.assert_close(term.at(0, 5).judge(batch).weight, half.judge(batch).weight)


def test_a_term_knows_whether_its_divergence_reads_sampled_tokens():
    assert Term.build(divergence="k2").sampled and Term.build(divergence="xmodal_opd.objective.divergences:k3").sampled
    assert not Term.build(divergence={"jsd": {"beta": 0.1}}).sampled


def test_a_piece_may_live_elsewhere():
    term = Term.build(
        divergence="forward_kl", weights=[{"xmodal_opd.objective.weights:prefix": {"tokens": 2}}, "top_kl"]
    )
    assert len(term.step_weights) == len(term.row_weights) == 1


REFUSED = [
    ({}, "either a divergence or a surrogate; found neither"),
    ({"divergence": "jsd", "surrogate": "importance", "advantages": ["reward"]}, "found both"),
    ({"surrogate": "importance"}, "with surrogate needs advantages"),
    ({"divergence": "jsd", "advantages": ["reward"]}, "with advantages needs surrogate"),
    ({"divergence": "k1"}, "k1 as a loss has zero expected gradient"),
    ({"divergence": "jds"}, "unknown divergence 'jds'; did you mean 'jsd'"),
    ({"divergence": {"jsd": {"betta": 0.5}}}, "'jsd' takes beta, not 'betta'; did you mean 'beta'"),
    ({"divergence": {"jsd": {}, "k2": {}}}, "one name each"),
    ({"divergence": {"jsd": 0.5}}, "a divergence is a name or"),
    ({"divergence": "nowhere.at:all"}, "cannot load divergence 'nowhere.at:all'"),
    ({"divergence": "math:nothing"}, "cannot load divergence 'math:nothing'"),
    ({"divergence": "jsd", "reduction": "tokn"}, "unknown reduction 'tokn'; did you mean 'token'"),
    ({"divergence": "jsd", "reduction": "constant"}, "'constant' needs a value for length"),
    ({"divergence": "jsd", "weights": ["top_k"]}, "unknown weight 'top_k'; did you mean 'top_kl'"),
    ({"divergence": "jsd", "weights": [{"tis": {"level": "sequense"}}]}, "did you mean 'sequence'"),
    ({"surrogate": "importance", "advantages": ["margin_shift", {"margin_mask": {"rho": 0.5}}]}, "keep one of them"),
    ({"surrogate": "importance", "advantages": [{"margin_shift": {"mode": "minmax"}}]}, "did you mean 'min_max'"),
    ({"surrogate": "ppo", "advantages": ["reward"]}, "unknown surrogate 'ppo'"),
]


@pytest.mark.parametrize("recipe, message", REFUSED)
def test_a_wrong_recipe_is_refused_with_advice(recipe, message):
    with pytest.raises(ValueError, match=message):
        Term.build(**recipe)


@pytest.mark.parametrize(
    "options, message", [({"by": "both"}, "by is student or teacher"), ({"rest": "tail"}, "bucket")]
)
def test_unknown_supports_are_refused(options, message):
    p = random(2, V).log_softmax(-1)
    with pytest.raises(ValueError, match=message):
        DIVERGENCES["topk_reverse_kl"](p, p, **options)


def test_truncated_jsd_is_refused():
    p = random(2, V).log_softmax(-1)
    with pytest.raises(ValueError, match="not a divergence"):
        DIVERGENCES["topk_jsd"](p, p, k=2, rest="drop")


def test_a_missing_score_names_those_that_exist(batch):
    with pytest.raises(KeyError, match="no scorer computed 'expert_logp'"):
        ADVANTAGES["teacher_logratio"](batch, batch.student_logp, scorer="expert")


TABLES = [DIVERGENCES, SAMPLED, WEIGHTS, ADVANTAGES, SURROGATES, REDUCTIONS, SCHEDULES]
PIECES = [(n, f) for table in TABLES for n, f in table.items()]


@pytest.mark.parametrize("name, piece", PIECES, ids=[n for n, _ in PIECES])
def test_a_piece_follows_the_house_rules(name, piece):
    assert name == piece.__name__ and piece.__doc__, "the recipe name is the function name, and it says what it does"
    assert len(inspect.getsource(piece).splitlines()) <= 20
    options = [p for p in inspect.signature(piece).parameters.values() if p.default is not p.empty]
    assert all(p.kind is p.KEYWORD_ONLY for p in options), "options are keyword-only"


def test_a_balance_below_nothing_is_refused(batch):
    with pytest.raises(ValueError, match=r"ratio is -1\.0; give right answers for one wrong one"):
        WEIGHTS["balance"](batch, ratio=-1.0)


def test_whole_numbers_serve_as_floats_and_other_types_are_refused():
    assert pick("divergence", DIVERGENCES, {"jsd": {"beta": 1}}).keywords == {"beta": 1.0}
    assert pick("surrogate", SURROGATES, {"ppo_clip": {"dual": 3}}).keywords == {"dual": 3.0}
    with pytest.raises(ValueError, match="weight 'top_kl': option k is of type int; found '20'"):
        pick("weight", WEIGHTS, {"top_kl": {"k": "20"}})
