"""The objective: a recipe's named loss terms, each judged once per step, then summed over micro-batches."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from jaxtyping import Float
from torch import Tensor

from xmodal_opd.objective.advantages import ADVANTAGES
from xmodal_opd.objective.divergences import DIVERGENCES, SAMPLED
from xmodal_opd.objective.groups import unjudged
from xmodal_opd.objective.reductions import REDUCTIONS
from xmodal_opd.objective.schedules import SCHEDULES
from xmodal_opd.objective.surrogates import SURROGATES
from xmodal_opd.objective.weights import ROW_WEIGHTS, WEIGHTS
from xmodal_opd.types import Judged, Scores, TokenBatch

Spec = str | Mapping[str, Any]  # "jsd" or {"jsd": {"beta": 0.5}}


@dataclass(frozen=True)
class Term:
    """One named loss of a recipe: a distillation term (divergence) or a policy term (advantages and surrogate).

    A `sampled` divergence takes (log p, log q) of the sampled token, any other takes whole log-probability rows.
    """

    divergence: Callable[..., Tensor] | None = None
    sampled: bool = False
    surrogate: Callable[..., Tensor] | None = None
    advantages: tuple[Callable[..., Tensor], ...] = ()
    step_weights: tuple[Callable[..., Tensor], ...] = ()
    row_weights: tuple[Callable[..., Tensor], ...] = ()
    scale: float | Callable[[int, int], float] = 1.0
    reduction: Callable[..., Tensor] = REDUCTIONS["sequence"]

    @classmethod
    def build(
        cls,
        *,
        divergence: Spec | None = None,
        weights: Sequence[Spec] = (),
        advantages: Sequence[Spec] = (),
        surrogate: Spec | None = None,
        scale: float | int | Spec = 1.0,
        reduction: Spec = "sequence",
    ) -> "Term":
        """A term from the lines of a recipe. Raises ValueError for unknown pieces or options, and for half a term.

        A weight from outside (`module:function`) sees the whole step. scale: a number, or a schedule giving it.
        """
        refuse_half_a_term(divergence, advantages, surrogate)
        compare = None if divergence is None else pick("divergence", DIVERGENCES | SAMPLED, divergence)
        if surrogate is not None and "top_kl" in map(name_of, weights):
            raise ValueError("top_kl weighs tokens by the divergence, which a policy term has not")
        if {"margin_shift", "margin_mask"} <= set(map(name_of, advantages)):
            raise ValueError("margin_shift and margin_mask are two ways to the same margin; keep one of them")
        by_row = [name_of(w) in ROW_WEIGHTS for w in weights]
        picked = [pick("weight", WEIGHTS, w) for w in weights]
        return cls(
            divergence=compare,
            sampled=compare is not None and "logp" in inspect.signature(compare).parameters,
            surrogate=None if surrogate is None else pick("surrogate", SURROGATES, surrogate),
            advantages=tuple(pick("advantage", ADVANTAGES, a) for a in advantages),
            step_weights=tuple(w for w, row in zip(picked, by_row, strict=True) if not row),
            row_weights=tuple(w for w, row in zip(picked, by_row, strict=True) if row),
            scale=float(scale) if isinstance(scale, int | float) else pick("schedule", SCHEDULES, scale),
            reduction=pick("reduction", REDUCTIONS, reduction),
        )

    def at(self, step: int, total: int) -> "Term":
        """This term with its scale of that step."""
        return replace(self, scale=self.scale(step, total)) if callable(self.scale) else self

    @torch.no_grad()
    def judge(self, batch: TokenBatch) -> Judged:
        """The verdict on the whole step: weight = scale · Π step weights · reduction, zero outside the mask.

        A response whose advantage is NaN because its reward is, is left out: no weight, and not counted by the
        reduction. Any other NaN stays, for the engine's check on non-finite losses to name.
        """
        advantage = torch.zeros_like(batch.student_logp)
        for shape in self.advantages:
            advantage = shape(batch, advantage)
        mask = batch.mask & ~(advantage.isnan() & unjudged(batch)[:, None])
        weight = as_number(self.scale) * self.reduction(replace(batch, mask=mask)) * torch.ones_like(batch.student_logp)
        for w in self.step_weights:
            weight = weight * w(replace(batch, mask=mask))
        return Judged(torch.where(mask, weight, 0), torch.where(mask, advantage, 0))

    def loss(self, batch: TokenBatch, judged: Judged, per_token: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Loss of some of the step's responses; over all of them these sum to the loss of the step.

        per_token, with gradient: the divergence of each token, or for a policy term the student's log p now.
        """
        weight = judged.weight
        if self.surrogate:
            per_token = self.surrogate(per_token - batch.student_logp, judged.advantage, batch.mask)
        elif self.row_weights:
            batch = replace(batch, scores=Scores(batch.scores, divergence=per_token.detach()))
        for w in self.row_weights:
            weight = weight * w(batch)
        return (weight * torch.where(batch.mask, per_token, 0)).sum()


def refuse_half_a_term(divergence: Spec | None, advantages: Sequence[Spec], surrogate: Spec | None) -> None:
    if (divergence is None) == (surrogate is None):
        found = "neither" if divergence is None else "both"
        raise ValueError(f"a loss term has either a divergence or a surrogate; found {found}; make each its own term")
    if bool(advantages) != (surrogate is not None):
        have, lack = ("advantages", "surrogate") if advantages else ("surrogate", "advantages")
        raise ValueError(f"a loss term with {have} needs {lack}; found none; a policy term names both")
    if divergence is not None and name_of(divergence) == "k1":
        raise ValueError(
            "k1 as a loss has zero expected gradient and trains nothing; use k2 for the reverse KL, "
            "or advantages: [teacher_logratio] with a surrogate"
        )


def as_number(scale: float | Callable[[int, int], float]) -> float:
    if callable(scale):
        raise ValueError("the scale of this term follows a schedule; judge term.at(step, total)")
    return scale


def rows[Record: (TokenBatch, Judged)](record: Record, index: slice | Tensor) -> Record:
    """Some responses of a TokenBatch or Judged, with their scores."""

    def cut(value: Any) -> Any:
        return (
            Scores({name: score[index] for name, score in value.items()}) if isinstance(value, dict) else value[index]
        )

    return replace(record, **{field.name: cut(getattr(record, field.name)) for field in fields(record)})


def pick(kind: str, table: Mapping[str, Callable[..., Any]], spec: Spec) -> Callable[..., Any]:
    """The piece a recipe names, its options bound: "jsd", {"jsd": {"beta": 0.5}} or {"my_lab.losses:mine": {…}}.

    Raises ValueError naming what exists, for an unknown piece, an option it does not take, or one it needs.
    """
    name, options = name_of(spec), options_of(kind, spec)
    piece = outside(kind, name) if ":" in name else table.get(name)
    if piece is None:
        raise ValueError(f"unknown {kind} {name!r}{hint(name, table)}; there are: {', '.join(sorted(table))}")
    takes = {p.name: p for p in inspect.signature(piece).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in takes:
            known = ", ".join(sorted(takes)) or "no options"
            raise ValueError(f"{kind} {name!r} takes {known}, not {option!r}{hint(option, takes)}")
    missing = [option for option, p in takes.items() if p.default is p.empty and option not in options]
    if missing:
        raise ValueError(
            f"{kind} {name!r} needs a value for {', '.join(missing)}; write {{{name}: {{{missing[0]}: …}}}}"
        )
    bound = {o: fitted(f"{kind} {name!r}: option {o}", v, takes[o].annotation) for o, v in options.items()}
    return partial(piece, **bound) if bound else piece


def fitted(what: str, value: Any, wanted: Any) -> Any:
    """An option's value as the piece declares it: a whole number serves as a float; Annotated[float, 0]: one from 0."""
    if get_origin(wanted) is Annotated:
        kind, least = get_args(wanted)
        if not (value := fitted(what, value, kind)) >= least:
            raise ValueError(f"{what} is a number from {least} on; found {value!r}")
        return value
    if wanted in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(wanted) is Literal and value not in get_args(wanted):
        raise ValueError(
            f"{what} is {', '.join(get_args(wanted))}; found {value!r}{hint(str(value), get_args(wanted))}"
        )
    if isinstance(wanted, type) and not isinstance(value, wanted):
        raise ValueError(f"{what} is of type {wanted.__name__}; found {value!r}")
    return value


def name_of(spec: Spec) -> str:
    return spec if isinstance(spec, str) else next(iter(spec), "")


def name_of_piece(piece: Callable[..., Any]) -> str:
    """The name of a picked piece, whose options may be bound."""
    return getattr(piece.func if isinstance(piece, partial) else piece, "__name__", "")


def options_of(kind: str, spec: Spec) -> Mapping[str, Any]:
    if isinstance(spec, str):
        return {}
    options = next(iter(spec.values()), None) or {}
    if len(spec) != 1 or not isinstance(options, Mapping):
        raise ValueError(f"a {kind} is a name or {{name: {{option: value}}}}, one name each; found {dict(spec)!r}")
    return options


def outside(kind: str, name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot load {kind} {name!r}: {error}; give it as module:function, importable from here"
        ) from error


def hint(word: str, words: Iterable[str]) -> str:
    """The words "; did you mean …?", or nothing when nothing is close."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
