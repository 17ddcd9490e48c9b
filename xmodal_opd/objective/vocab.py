"""Per-token values of hidden states x head, never holding [N, V] for more than one chunk of tokens.

One pass over chunks gives the value of every token and its gradient with respect to the student's hidden state, already
contracted with the head. The backward pass only multiplies by the weight that arrives for each token, so weights may
depend on the values and nothing is recomputed; a trainable head costs one more pass there. Softmax is float32 whatever
the input (float64 for float64). N: response tokens, flattened. Give response rows only, never the prompt's.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_opd.objective.divergences import reverse_kl

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**27}  # few enough for a laptop, and to keep a GPU's products busy

Divergence = Callable[[Tensor, Tensor], Tensor]
PerToken = Float[Tensor, " N"]
ROUNDING = 1e-7  # a rest below it is what float32 log-probabilities do not add up to
Window = int | slice | None  # the real vocabulary: its size, or the rows that tokens are chosen from
Caps = tuple[float | None, float | None]  # of the logits of student and teacher
# (student hidden [n, H], head, which rows these are, gradient wanted) -> value [n], its gradient in the logits [n, V]
Measure = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def divergence(
    fn: Divergence,
    hidden_s: Float[Tensor, "N H"],
    head_s: Float[Tensor, "V H"],
    hidden_t: Float[Tensor, "N J"],
    head_t: Float[Tensor, "U J"],
    *,
    chunk: int | None = None,
    temperature: float = 1.0,
    vocab: Window = None,
    caps: Caps = (None, None),
) -> PerToken:
    """fn(log p, log q) of student and teacher at each token, with gradient to the student's hidden states and head.

    fn: a piece of DIVERGENCES, or any function of two log-probability rows that treats rows independently.
    chunk: tokens at a time, by default as many as fit a fixed number of logits. temperature divides both logits.
    vocab: the real vocabulary size, to which heads padded to different sizes are cut; or a window of it, outside of
    which neither side has any mass.
    caps: c of a student and a teacher whose logits are c · tanh(hidden · head / c); None is plain logits.
    Raises ValueError when tokens do not pair up, or vocabularies differ and `vocab` does not say where to cut.
    """
    refuse_unpaired("student and teacher hidden states", hidden_s, hidden_t)
    same = is_same(head_s, head_t)
    head_s, head_t = real_vocabulary(head_s, head_t, vocab)
    hidden_t = hidden_t.to(head_t.dtype)
    slope_of = reverse_kl_slope if fn is reverse_kl else partial(any_slope, fn)

    def measure(hidden: Tensor, head: Tensor, rows: slice, slope: bool) -> tuple[Tensor, Tensor | None]:
        p, q = two_logps(hidden, head, hidden_t[rows], head if same else head_t, temperature, caps)
        value, gradient = slope_of(p, q, slope)
        gradient = gradient if gradient is None or temperature == 1 else gradient.div_(temperature)
        return value, through_cap(gradient, hidden, head, caps[0])

    return per_token(measure, hidden_s, head_s, chunk)


def topk_divergence(
    fn: Divergence,
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    ids: Int[Tensor, "N K"],
    logq: Float[Tensor, "N K"],
    *,
    chunk: int | None = None,
    vocab: Window = None,
    cap: float | None = None,
) -> PerToken:
    """fn(log p, log q) where of the teacher only its K likeliest tokens are known, with gradient to the student's side.

    What they leave of the teacher's mass is spread evenly over the other tokens, which is exact for any `fn` that looks
    at no more than those K and the sum of the rest: the topk_* pieces with by="teacher" and k ≤ K. A column that does
    not count repeats an id of its row with logq = −inf. Of a window it must be a teacher of that window: what it says
    of other tokens goes to the rest.
    """
    refuse_unpaired("student hidden states and teacher's tokens", hidden, ids)
    head = head[window_of(vocab)]
    if isinstance(vocab, slice):
        outside = (ids < vocab.start) | (ids >= vocab.stop)
        ids, logq = (ids - vocab.start).clamp(0, len(head) - 1), logq.masked_fill(outside, -math.inf)

    def measure(hidden: Tensor, head: Tensor, rows: slice, slope: bool) -> tuple[Tensor, Tensor | None]:
        p = logps(hidden, head, cap=cap)
        q = spread_rest(ids[rows], logq[rows].to(p.dtype), p.shape[-1])
        value, gradient = any_slope(fn, p, q, slope)
        return value, through_cap(gradient, hidden, head, cap)

    return per_token(measure, hidden, head, chunk)


def spread_rest(ids: Int[Tensor, "n K"], logq: Float[Tensor, "n K"], size: int) -> Float[Tensor, "n V"]:
    """Whole rows of log-probabilities from the K likeliest of each; no other token becomes as likely as the last."""
    rest = (1 - logq.double().exp().sum(-1, keepdim=True)).clamp(min=ROUNDING).log()
    known = logq > -math.inf
    even = (rest - (size - known.sum(-1, keepdim=True)).clamp(min=1).log()).to(logq.dtype)
    last = logq.masked_fill(~known, math.inf).amin(-1, keepdim=True)
    even = torch.minimum(even, last.nextafter(torch.full_like(last, -math.inf)))
    return even.repeat(1, size).scatter_reduce(-1, ids, logq, "amax")


def token_logp(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    ids: Int[Tensor, " N"],
    *,
    chunk: int | None = None,
    cap: float | None = None,
) -> PerToken:
    """log softmax(hidden · head) at the tokens `ids`, with gradient to the hidden states and the head."""
    refuse_unpaired("hidden states and tokens", hidden, ids)

    def measure(hidden: Tensor, head: Tensor, rows: slice, slope: bool) -> tuple[Tensor, Tensor | None]:
        p, index = logps(hidden, head, cap=cap), ids[rows, None]
        value = p.gather(-1, index)
        gradient = p.exp_().neg_().scatter_add_(-1, index, torch.ones_like(value)) if slope else None
        return value[:, 0], through_cap(gradient, hidden, head, cap)

    return per_token(measure, hidden, head, chunk)


def tilted(hidden: Float[Tensor, "*N H"], without: Float[Tensor, "*N H"], alpha: float) -> Float[Tensor, "*N H"]:
    """Hidden states of q, log q = log_softmax(log p + α (log p − log p₀)), from those of p and of p₀ before one head.

    RT-OPD, arXiv:2609.28778. Logits are linear in hidden states, and a softmax forgets what normalises each side, so no
    vocabulary is needed; a head whose logits are capped is not linear. α = 0 gives `hidden` to the bit.
    """
    return ((1 + alpha) * hidden.to(wide(hidden)) - alpha * without.to(wide(without))).to(hidden.dtype)


@torch.no_grad()
def statistics(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    ids: Int[Tensor, " N"],
    *,
    chunk: int | None = None,
    cap: float | None = None,
) -> tuple[PerToken, PerToken]:
    """log-probability of the tokens `ids` and entropy of the whole distribution in nats, without gradient."""
    refuse_unpaired("hidden states and tokens", hidden, ids)
    logp, entropy = (torch.empty(len(hidden), dtype=wide(head), device=hidden.device) for _ in range(2))
    with as_given(head):
        for rows in chunks(len(hidden), chunk or fitting(head)):
            p = logps(hidden[rows].to(head.dtype), head, cap=cap)
            logp[rows] = p.gather(-1, ids[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(p.exp(), p)
    return logp, entropy


def per_token(measure: Measure, hidden: Tensor, head: Tensor, chunk: int | None) -> Tensor:
    hidden, chunk = hidden.to(head.dtype), chunk or fitting(head)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        with as_given(head):
            return Bounded.apply(hidden, head, measure, chunk)  # pyright: ignore[reportReturnType]
    value = torch.empty(len(hidden), dtype=wide(head), device=hidden.device)
    with torch.no_grad(), as_given(head):
        for rows in chunks(len(hidden), chunk):
            value[rows] = measure(hidden[rows], head, rows, False)[0]
    return value


class Bounded(torch.autograd.Function):
    """Values from `measure`, chunk by chunk. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, measure: Measure, chunk: int) -> Tensor:
        value = torch.empty(len(hidden), dtype=wide(head), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(hidden), chunk):
            value[rows], slope = measure(hidden[rows], head, rows, gradient is not None)
            if gradient is not None and slope is not None:
                torch.mm(slope.to(head.dtype), head, out=gradient[rows])
        ctx.measure, ctx.chunk = measure, chunk
        ctx.save_for_backward(gradient, *((hidden, head) if ctx.needs_input_grad[1] else ()))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, *rest = ctx.saved_tensors
        to_hidden = None if gradient is None else (gradient * weight[:, None]).to(gradient.dtype)
        with as_given(weight):
            to_head = head_gradient(ctx.measure, rest[0], rest[1], weight, ctx.chunk) if rest else None
        return to_hidden, to_head, None, None


def head_gradient(measure: Measure, hidden: Tensor, head: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Σ_n weight_n · slope_n ⊗ hidden_n [V, H], summed in float32: bfloat16 would lose the later chunks."""
    total = torch.zeros(head.shape, dtype=wide(head), device=head.device)
    for rows in chunks(len(hidden), chunk):
        _, slope = measure(hidden[rows], head, rows, True)
        if slope is not None:
            total.addmm_(slope.mul_(weight[rows, None]).T, hidden[rows].to(total.dtype))
    return total.to(head.dtype)


def reverse_kl_slope(p: Tensor, q: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """D = Σ p·d and, if asked, its gradient p·(d − D) in the logits; d = log p − log q. Overwrites both arguments."""
    d, p = q.neg_().add_(p), p.exp_()
    value = torch.linalg.vecdot(p, d)
    return value, p.mul_(d.sub_(value[:, None])) if slope else None


def any_slope(fn: Divergence, p: Tensor, q: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """fn(p, q) and, if asked, its gradient in the student's logits: autograd for fn, by hand for the softmax."""
    if not slope:
        return fn(p, q), None
    with torch.enable_grad():
        value = fn(p.requires_grad_(), q)
        (gradient,) = torch.autograd.grad(value.sum(), p)
    return value.detach(), gradient - p.detach().exp_().mul_(gradient.sum(-1, keepdim=True))


def two_logps(
    hidden_s: Tensor, head_s: Tensor, hidden_t: Tensor, head_t: Tensor, temperature: float, caps: Caps
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides; where one head serves both, from one product."""
    if head_s is not head_t or caps[0] != caps[1]:
        return logps(hidden_s, head_s, temperature, caps[0]), logps(hidden_t, head_t, temperature, caps[1])
    p, q = logps(torch.cat([hidden_s, hidden_t]), head_s, temperature, caps[0]).tensor_split(2)
    return p, q


def logps(hidden: Tensor, head: Tensor, temperature: float = 1.0, cap: float | None = None) -> Tensor:
    logits = capped((hidden @ head.T).to(wide(head)), cap)
    return (logits if temperature == 1 else logits.div_(temperature)).log_softmax(-1)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), what Gemma samples from; the logits themselves without a cap."""
    return logits if cap is None else (logits / cap).tanh() * cap


def through_cap(gradient: Tensor | None, hidden: Tensor, head: Tensor, cap: float | None) -> Tensor | None:
    """A gradient in the capped logits as one in hidden · head, whose product is made anew rather than held."""
    if gradient is None or cap is None:
        return gradient
    return gradient.mul_(1 - ((hidden @ head.T).to(wide(head)) / cap).tanh().square())


def as_given(x: Tensor) -> torch.autocast:
    """No autocast: the backward pass runs outside of it, and must compute what the forward did."""
    return torch.autocast(x.device.type, enabled=False)


def wide(head: Tensor) -> torch.dtype:
    return torch.promote_types(head.dtype, torch.float32)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one matrix in memory, also when one of them is detached."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def window_of(vocab: Window) -> slice:
    return vocab if isinstance(vocab, slice) else slice(0, vocab)


def real_vocabulary(head_s: Tensor, head_t: Tensor, vocab: Window) -> tuple[Tensor, Tensor]:
    sizes = len(head_s), len(head_t)
    if vocab is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} vocabulary rows and the teacher {sizes[1]}; if they differ by padding only, "
            "give vocab=<tokens in the tokenizer>; if they are different vocabularies, they cannot be compared"
        )
    window = window_of(vocab)
    if vocab is not None and not 0 <= window.start < window.stop <= min(sizes):
        raise ValueError(f"vocab={vocab} is not within the {sizes[0]} student and {sizes[1]} teacher rows")
    return head_s[window], head_t[window]


def refuse_unpaired(what: str, a: Tensor, b: Tensor) -> None:
    if len(a) != len(b):
        raise ValueError(f"{what} must be of the same response tokens; found {len(a)} and {len(b)}")


def fitting(head: Tensor) -> int:
    """Tokens per chunk."""
    return max(1, LOGITS_AT_ONCE["cpu" if head.device.type == "cpu" else "cuda"] // len(head))


def chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(a, min(a + size, n)) for a in range(0, n, size))
