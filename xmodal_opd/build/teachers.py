"""The teachers of a recipe: copies of the student, other folders, and models behind servers."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from xmodal_opd import lora, models, schema
from xmodal_opd.build.engines import is_sharded
from xmodal_opd.build.student import load
from xmodal_opd.hidden import softcap
from xmodal_opd.objective import Term
from xmodal_opd.scoring.served import ServedTeacher
from xmodal_opd.serving import Servers
from xmodal_opd.types import Adapter


def teachers(recipe: schema.Recipe, student: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The models the recipe's terms and scorers name, besides the student itself, without gradient."""
    here = schema.teachers(recipe) - {schema.STUDENT, *recipe.teachers}
    return {name: teacher(recipe, name, student) for name in sorted(here)}


def teacher(recipe: schema.Recipe, name: str, student: PreTrainedModel) -> PreTrainedModel:
    """ "initial" and "ema" start as the student is now, and share what does not train; any other name is a folder or
    hub name to load. A LoRA student's adapter begins as nothing, so "initial" is its base."""
    sharded = is_sharded(recipe)
    if name == "initial":
        return lora.without_adapter(models.frozen_copy(student, share=not sharded))
    if name == "ema" and sharded:
        raise ValueError(
            "the teacher 'ema' needs the student's weights on every rank after a step, which engine.zero=3 has not; "
            "use engine.zero of 2 or less, or the teacher 'initial'"
        )
    if name == "ema":
        return models.frozen_copy(student)
    model = load(recipe, name).requires_grad_(False)
    refuse_other_vocabulary(recipe, name)
    return model


def served_teacher(
    recipe: schema.Recipe, name: str, terms: dict[str, Term], adapter: Adapter, processor: Any
) -> ServedTeacher:
    """Asked for as many of its likeliest tokens as the terms that name it look at."""
    part, top = recipe.teachers[name], 0
    for which, term in recipe.objective.items():
        here = {model for model, _ in schema.teachers_of(term.teacher).values()}
        if term.divergence and name in here and not terms[which].sampled:
            top = max(top, likeliest(f"objective.{which}", terms[which].divergence))
    servers = Servers(part.servers, part.timeout, part.retries, part.concurrency, part.wait)
    own, tokenizer = copy.deepcopy((adapter, getattr(processor, "tokenizer", processor)))  # it works in a thread
    return ServedTeacher(name, servers, own, tokenizer, part.model, top)


def likeliest(where: str, divergence: Callable[..., Any] | None) -> int:
    """How many of a teacher's likeliest tokens a divergence looks at. Raises ValueError when it wants all tokens, or
    others than those."""
    options = {o: p.default for o, p in inspect.signature(divergence).parameters.items()} if divergence else {}
    if options.get("by") != "teacher":
        raise ValueError(
            f"{where}.divergence looks beyond the teacher's likeliest tokens, which are all that a served teacher "
            "tells; use topk_forward_kl, topk_reverse_kl or topk_jsd with {by: teacher}, k2 or k3, or a policy term "
            "with the advantage teacher_logratio"
        )
    return options["k"]


def refuse_contrast(recipe: schema.Recipe, local: Mapping[str, PreTrainedModel]) -> None:
    """A contrast is taken of hidden states: they must be here, and what makes logits of them must be linear."""
    tilted = [source for source in schema.sources(recipe) if source.contrast]
    for name in (model for source in tilted for model, _ in schema.teachers_of(source).values()):
        if name in recipe.teachers:
            raise ValueError(f"teacher {name!r} is behind servers, which tell too little for a contrast; load it here")
        if softcap(local[name]) is not None:
            raise ValueError(f"teacher {name!r} caps its logits, and only plain ones can be put in contrast")


def refuse_other_vocabulary(recipe: schema.Recipe, name: str) -> None:
    """A teacher reads the student's token ids. Special tokens may differ, one in a hundred at most; words may not."""
    ours, theirs = (models.vocabulary(n, recipe.model.trust_remote_code) for n in (recipe.model.name, name))
    other = sum(theirs.get(token) != number for token, number in ours.items())
    if other > len(ours) / 100:
        raise ValueError(
            f"teacher {name!r} has another vocabulary than {recipe.model.name!r}: {other} of {len(ours)} tokens have "
            "other ids there, so the two cannot be compared token by token"
        )
