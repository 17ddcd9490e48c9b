"""Values and gradients by chunks are those of the dense computation, without its logits of every token at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xmodal_opd.objective import pick, vocab
from xmodal_opd.objective.divergences import DIVERGENCES, reverse_kl

N, H, V = 13, 5, 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-11}


def inputs(n=N, dtype=torch.float32, wide_teacher=False):
    """Student hidden states and head, teacher hidden states and head; the teacher may be of another width."""
    g = torch.Generator().manual_seed(n)
    width = H + 2 if wide_teacher else H
    shapes = [(n, H), (V, H), (n, width), (V, width)]
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(fn, hs, ws, ht, wt, temperature=1.0):
    wide = torch.promote_types(hs.dtype, torch.float32)
    p, q = ((h @ w.T).to(wide) / temperature for h, w in ((hs, ws), (ht, wt)))
    return fn(p.log_softmax(-1), q.log_softmax(-1))


def assert_same(got, wanted, dtype):
    scale = wanted.abs().max().clamp(min=1e-3).item()
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def piece(name):
    return pick("divergence", DIVERGENCES, {name: {"k": 7}} if name.startswith("topk") else name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["shared", "shared and trained", "own", "own and trained"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_the_dense_one(name, head, dtype):
    hs, ws, ht, wt = inputs(dtype=dtype, wide_teacher=head.startswith("own"))
    leaves = [hs.requires_grad_(), ws.requires_grad_("trained" in head)]
    wt = ws if head.startswith("shared") else wt
    value = vocab.divergence(piece(name), hs, ws, ht.requires_grad_(), wt, chunk=4)
    wanted = dense(piece(name), hs, ws, ht.detach(), wt.detach())
    assert value.dtype == torch.float32
    assert_same(value, wanted, dtype)
    asked = [x for x in leaves if x.requires_grad]
    weight = torch.linspace(0, 2, N)
    slopes = [torch.autograd.grad((weight * x).sum(), asked) for x in (value, wanted)]
    for got, expected in zip(*slopes, strict=True):
        assert got.dtype == dtype
        assert_same(got, expected, dtype)


TOP = ["topk_forward_kl", "topk_reverse_kl", "topk_jsd"]


def top_and_whole(fn, sharp, cap=None):
    """fn of the student against a teacher of whom the 8 likeliest tokens are known, and against the whole teacher."""
    hs, ws, ht, wt = inputs(wide_teacher=True)
    leaves = [hs.requires_grad_(), ws.requires_grad_()]
    known = (sharp * ht @ wt.T).log_softmax(-1).topk(8)
    ids = torch.cat([known.indices, known.indices[:, :1]], 1)
    logq = torch.cat([known.values, torch.full((N, 1), -torch.inf)], 1)  # a column that does not count
    got = vocab.topk_divergence(fn, hs, ws, ids, logq, chunk=4, cap=cap)
    return got, vocab.divergence(fn, hs, ws, sharp * ht, wt, chunk=4, caps=(cap, None)), leaves


@pytest.mark.parametrize(
    "name, rest", [(n, r) for n in TOP for r in ("bucket", "renormalise", "drop") if (n, r) != ("topk_jsd", "drop")]
)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_likeliest_tokens_of_a_teacher_are_all_that_a_topk_divergence_needs(name, rest, cap):
    fn = pick("divergence", DIVERGENCES, {name: {"k": 5, "by": "teacher", "rest": rest}})
    got, wanted, leaves = top_and_whole(fn, 1, cap)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    weight = torch.linspace(0, 2, N)
    slopes = [torch.autograd.grad((weight * x).sum(), leaves) for x in (got, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TOP)
def test_a_rest_lost_in_rounding_is_never_taken_for_less_than_it_may_be(name):
    """A teacher so sure that its other tokens are lost when float32 adds up: the value is a bound from below."""
    got, wanted, _ = top_and_whole(pick("divergence", DIVERGENCES, {name: {"k": 5, "by": "teacher"}}), 12)
    assert (got <= wanted * 1.0001 + 1e-5).all() and (got >= 0.9 * wanted - 1e-5).all()


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 13])
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_any_number_of_tokens_in_any_chunk(name, n, chunk):
    hs, ws, ht, wt = inputs(n, torch.float64)
    hs.requires_grad_()
    ws.requires_grad_()
    value, wanted = vocab.divergence(piece(name), hs, ws, ht, wt, chunk=chunk), dense(piece(name), hs, ws, ht, wt)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), [hs, ws]), torch.autograd.grad(wanted.sum(), [hs, ws]))


@pytest.mark.parametrize("fn", [reverse_kl, DIVERGENCES["hellinger"]])
def test_gradient_of_value_with_weights_made_from_the_value(fn):
    """Each token's weight is its own divergence, held constant: the gradient must be D ∇D."""
    hs, ws, ht, wt = inputs(dtype=torch.float64)
    hs.requires_grad_()
    value, wanted = vocab.divergence(fn, hs, ws, ht, wt, chunk=4), dense(fn, hs, ws, ht, wt)
    got, expected = (torch.autograd.grad((d.detach() * d).sum(), hs)[0] for d in (value, wanted))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(name, shared):
    hs, ws, ht, wt = inputs(3, torch.float64)
    wt = ws.detach() if shared else wt  # the same memory, as a tied head comes

    def f(hidden):
        return vocab.divergence(DIVERGENCES[name], hidden, ws, ht, wt, chunk=2, temperature=1.5)

    assert torch.autograd.gradcheck(f, hs.requires_grad_())


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_temperature_divides_both_logits(name):
    hs, ws, ht, wt = inputs(dtype=torch.float64)
    hs.requires_grad_()
    ws.requires_grad_()
    value = vocab.divergence(DIVERGENCES[name], hs, ws, ht, wt, temperature=2.0)
    wanted = dense(DIVERGENCES[name], hs, ws, ht, wt, temperature=2.0)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), [hs, ws]), torch.autograd.grad(wanted.sum(), [hs, ws]))


def test_heads_padded_to_different_sizes_are_cut_to_the_real_vocabulary():
    hs, ws, ht, wt = inputs(dtype=torch.float64)
    hs.requires_grad_()
    ws.requires_grad_()
    value = vocab.divergence(reverse_kl, hs, ws[: V - 3], ht, wt, vocab=V - 8, chunk=4)
    wanted = dense(reverse_kl, hs, ws[: V - 8], ht, wt[: V - 8])
    torch.testing.assert_close(value, wanted)
    slope = torch.autograd.grad(value.sum(), ws)[0]
    assert slope[V - 8 :].abs().max() == 0 and slope[: V - 8].abs().max() > 0


@pytest.mark.parametrize(
    "cut, message", [(None, "40 vocabulary rows and the teacher 37"), (38, "vocab=38 is not within")]
)
def test_vocabularies_that_do_not_fit_are_refused(cut, message):
    hs, ws, ht, wt = inputs()
    with pytest.raises(ValueError, match=message):
        vocab.divergence(reverse_kl, hs, ws, ht, wt[: V - 3], vocab=cut)


def test_rows_that_do_not_pair_up_are_refused():
    hs, ws, ht, wt = inputs()
    with pytest.raises((ValueError, TypeError), match=r"13 and 12|hidden_t"):  # the second from the shape checker
        vocab.divergence(reverse_kl, hs, ws, ht[:-1], wt)


def test_teacher_gets_no_gradient():
    hs, ws, ht, wt = (x.requires_grad_() for x in inputs())
    vocab.divergence(reverse_kl, hs, ws, ht, wt).sum().backward()
    assert hs.grad is not None and ws.grad is not None and ht.grad is None and wt.grad is None


def test_only_the_head_may_learn():
    hs, ws, ht, wt = inputs(dtype=torch.float64)
    ws.requires_grad_()
    value, wanted = vocab.divergence(reverse_kl, hs, ws, ht, wt, chunk=4), dense(reverse_kl, hs, ws, ht, wt)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), ws), torch.autograd.grad(wanted.sum(), ws))


@pytest.mark.parametrize("fn", [reverse_kl, DIVERGENCES["total_variation"]])
def test_without_gradient_the_values_are_the_same(fn):
    hs, ws, ht, _ = inputs()
    with_gradient = vocab.divergence(fn, hs.requires_grad_(), ws, ht, ws)
    with torch.no_grad():
        value = vocab.divergence(fn, hs, ws, ht, ws)
    assert not value.requires_grad
    torch.testing.assert_close(value, with_gradient)


def test_inputs_are_left_as_they_were():
    tensors = inputs()
    before = [x.clone() for x in tensors]
    for fn in (reverse_kl, DIVERGENCES["jsd"]):
        vocab.divergence(fn, tensors[0].requires_grad_(), *tensors[1:], temperature=2.0).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_autocast_does_not_lower_the_precision():
    hs, ws, ht, wt = inputs()
    wanted = vocab.divergence(reverse_kl, hs.requires_grad_(), ws, ht, wt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = vocab.divergence(reverse_kl, hs.bfloat16().float(), ws, ht, wt)
        again = vocab.divergence(reverse_kl, hs, ws, ht, wt)
        with torch.no_grad():
            without = vocab.divergence(reverse_kl, hs, ws, ht, wt)
    assert value.dtype == torch.float32 and torch.equal(again, wanted) and torch.equal(without, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [0, 13])
def test_token_logp_is_the_dense_one(n, dtype):
    hidden, head, _, _ = inputs(n, dtype)
    hidden.requires_grad_()
    head.requires_grad_()
    ids = torch.arange(n) * 7 % V
    wide = torch.promote_types(dtype, torch.float32)
    value = vocab.token_logp(hidden, head, ids, chunk=4)
    wanted = (hidden @ head.T).to(wide).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    if n:
        assert_same(value, wanted, dtype)
    weight = torch.linspace(0, 2, n)
    slopes = [torch.autograd.grad((weight * x).sum(), [hidden, head]) for x in (value, wanted)]
    for got, expected in zip(*slopes, strict=True):
        assert got.shape == expected.shape
        if n:
            assert_same(got, expected, dtype)


def test_statistics_are_the_dense_ones():
    hidden, head, _, _ = inputs(dtype=torch.float64)
    ids = torch.arange(N) % V
    logp, entropy = vocab.statistics(hidden.requires_grad_(), head, ids, chunk=4)
    full = (hidden @ head.T).log_softmax(-1).detach()
    torch.testing.assert_close(logp, full[torch.arange(N), ids])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not logp.requires_grad and not entropy.requires_grad


def test_default_chunk_follows_the_vocabulary():
    assert vocab.fitting(torch.empty(151_936, 1)) == 55
    assert vocab.fitting(torch.empty(1000, 1)) > 3000


class Watch(TorchDispatchMode):
    """Notes the most elements any operation returned, and how many matrix products there were."""

    elements, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        for x in out if isinstance(out, list | tuple) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("fn", [reverse_kl, DIVERGENCES["jsd"]])
@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_is_larger_than_two_chunks_of_logits(fn, trained):
    hs, ws, ht, _ = inputs(200)
    hs.requires_grad_()
    ws.requires_grad_(trained)
    with Watch() as seen:
        vocab.divergence(fn, hs, ws, ht, ws, chunk=16).sum().backward()
        vocab.token_logp(hs, ws, torch.zeros(200, dtype=torch.long), chunk=16).sum().backward()
        vocab.statistics(hs, ws, torch.zeros(200, dtype=torch.long), chunk=16)
    assert 200 * H <= seen.elements <= 2 * 16 * V


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("shared, products", [(True, 2), (False, 3)])
def test_one_head_for_both_sides_is_multiplied_once(name, shared, products):
    """Per chunk of tokens: the logits, of both sides together where the head is one, and the gradient back."""
    hs, ws, ht, wt = inputs()
    with Watch() as seen:
        vocab.divergence(DIVERGENCES[name], hs.requires_grad_(), ws, ht, ws.detach() if shared else wt, chunk=5)
    assert seen.products == 3 * products


@pytest.mark.parametrize("caps", [(2.0, 2.0), (2.0, None), (None, 0.5)])
def test_capped_logits_are_those_of_the_dense_form_in_value_and_gradient(caps):
    torch.manual_seed(3)
    hidden, head = torch.randn(5, 4, dtype=torch.float64), 3 * torch.randn(7, 4, dtype=torch.float64)
    other, ids = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    moved = hidden.requires_grad_(), head.requires_grad_()
    p, q = (
        (x @ head.T if cap is None else cap * torch.tanh(x @ head.T / cap)).log_softmax(-1)
        for x, cap in zip((hidden, other), caps, strict=True)
    )
    wanted = (p.exp() * (p - q.detach())).sum(-1), p.gather(1, ids[:, None])[:, 0]
    ours = (
        vocab.divergence(reverse_kl, hidden, head, other, head.detach(), caps=caps, chunk=2),
        vocab.token_logp(hidden, head, ids, cap=caps[0], chunk=2),
    )
    torch.testing.assert_close(vocab.statistics(hidden, head, ids, cap=caps[0])[0], wanted[1])
    for value, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(value, expected)
        weight = torch.linspace(-1, 2, 5, dtype=torch.float64)
        slopes = (torch.autograd.grad(v, moved, weight, retain_graph=True) for v in (value, expected))
        torch.testing.assert_close(*slopes)
