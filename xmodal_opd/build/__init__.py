"""From a recipe to live parts: the only package that names concrete classes."""

import atexit
import copy
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modalities.chat import DERIVED, ChatAdapter
from xmodal_opd import checkpoint, dist, schema
from xmodal_opd.build import robots
from xmodal_opd.build.engines import build_engine
from xmodal_opd.build.student import end_tokens, load_processor, load_student, prompt_limit
from xmodal_opd.build.teachers import refuse_contrast, served_teacher, teachers
from xmodal_opd.hidden import media_tokens
from xmodal_opd.objective import Term, pick
from xmodal_opd.objective.schedules import SCHEDULES
from xmodal_opd.rollout.ahead import Ahead
from xmodal_opd.rollout.demonstrated import Demonstrated
from xmodal_opd.rollout.env import EnvSampler
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.rollout.vllm import VLLMSampler
from xmodal_opd.scoring.answers import same_answers
from xmodal_opd.scoring.forward import Responses
from xmodal_opd.scoring.judge import build_judge
from xmodal_opd.scoring.served import ServedTeacher
from xmodal_opd.serving import Servers
from xmodal_opd.types import Adapter, Engine, Pair, Sampler, Sampling

ADAPTERS: dict[str, Callable[..., Adapter]] = {  # one reads them all; a modality is what the model must be able to
    "text": ChatAdapter,
    "audio": partial(ChatAdapter, needs="audio"),
    "vision": partial(ChatAdapter, needs="image"),
}


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    recipe: schema.Recipe
    models: dict[str, PreTrainedModel]  # "current" is the student; teachers by the name the recipe gives them
    served: dict[str, ServedTeacher]  # the teachers that are behind servers
    processor: Any
    adapter: Adapter
    sampler: Sampler
    responses: Responses
    terms: dict[str, Term]
    engine: Engine
    samplings: dict[str, Sampling]
    judge: Callable | None  # TRL's reward signature
    judged: frozenset[str]  # samplings whose answers the judge sees
    reference: Sampling | None  # the model's own answer that the judge compares with
    right: Callable[[str, str], bool]  # (answer, reference answer), for accuracy
    vocab: int | None  # real vocabulary size, when a teacher's head is padded differently
    memory: dict[str, Any] = field(default_factory=dict)  # what steps leave for later ones: JSON, kept in checkpoints

    @property
    def judge_apart(self) -> bool:
        """Whether the judge may run while models score: `self` asks the student, which then has its hands full."""
        return self.recipe.judge is not None and schema.piece_name(self.recipe.judge.name) != "self"

    @property
    def student(self) -> PreTrainedModel:
        return self.models[schema.STUDENT]

    @property
    def instructor(self) -> tuple[PreTrainedModel, str]:
        """The model and the view that an evaluation of episodes holds against the student."""
        name, view = schema.instructor(self.recipe)
        return self.models[name], view

    def sampler_at(self, step: int) -> Sampler:
        """The sampler of a training step, in which a robot may act as deep into its episodes as the recipe says, or
        what others did is read."""
        if not isinstance(self.recipe, schema.ActionRecipe) or not isinstance(self.sampler, EnvSampler):
            return self.sampler
        if self.recipe.data.demonstrations:
            return Demonstrated(self.sampler.adapter)
        return replace(self.sampler, depth=robots.depth(self.recipe, step))


def build(recipe: schema.Recipe, run: Path | None = None) -> Parts:
    """Live parts on the recipe's device, which write to the run's folder where there is one. Raises ValueError in one
    sentence for what cannot be built."""
    terms = {name: build_term(name, term) for name, term in recipe.objective.items()}
    schedule = pick("schedule", SCHEDULES, recipe.optim.schedule)
    student = load_student(recipe)
    processor = load_processor(recipe)
    adapter = build_adapter(recipe, processor, prompt_limit(recipe, student))
    others = teachers(recipe, student)  # copies of the student, before an engine takes its parameters apart
    refuse_contrast(recipe, {schema.STUDENT: student, **others})
    engine = build_engine(recipe, student, lambda step: schedule(step, recipe.train.steps))
    sampler = build_sampler(recipe, student, processor, adapter, engine, run)
    return Parts(
        recipe=recipe,
        models={schema.STUDENT: student} | others,
        served={name: served_teacher(recipe, name, terms, adapter, processor) for name in recipe.teachers},
        processor=processor,
        adapter=adapter,
        sampler=sampler,
        responses=build_responses(recipe, adapter),
        terms=terms,
        engine=engine,
        samplings={name: sampling(s) for name, s in recipe.rollout.samplings.items()},
        judge=None if recipe.judge is None else build_judge(recipe.judge.name, partial(ask, sampler, adapter)),
        judged=frozenset(schema.judged(recipe)),
        reference=sampling(recipe.judge.reference) if recipe.judge and recipe.judge.reference else None,
        right=right,
        vocab=len(getattr(processor, "tokenizer", processor)),
    )


def build_adapter(recipe: schema.Recipe, processor: Any, limit: int) -> Adapter:
    options: dict[str, Any] = recipe.model.model_dump(include={"fps", "max_frames"})
    options |= {"derive": schema.views(recipe) & DERIVED.keys()}
    if isinstance(recipe, schema.ActionRecipe):
        return robots.adapter(recipe, processor, limit, **options)
    return ADAPTERS[recipe.modality](processor, limit, **options)


def build_responses(recipe: schema.Recipe, adapter: Adapter) -> Responses:
    policy: dict[str, Any] = {}
    if isinstance(recipe, schema.ActionRecipe) and isinstance(adapter, robots.ActionAdapter):
        policy = robots.policy(recipe, adapter)
    return Responses(adapter, recipe.engine.share_prefix, together=dist.world() > 1, **policy)


def build_sampler(
    recipe: schema.Recipe, student: PreTrainedModel, processor: Any, adapter: Adapter, engine: Engine, run: Path | None
) -> Sampler:
    if isinstance(recipe, schema.ActionRecipe) and isinstance(adapter, robots.ActionAdapter):
        return robots.sampler(recipe, student, adapter, engine.whole)
    part, ends = recipe.rollout, end_tokens(student, processor)
    if part.name == "hf":
        return HFSampler(student, adapter, ends, part.max_tokens, part.batch_tokens, whole=engine.whole)

    def export(folder: Path) -> None:
        with engine.whole():
            if dist.rank() == 0:
                checkpoint.export(student, processor, folder)
                checkpoint.as_served(folder)

    sampler = VLLMSampler(
        Servers(part.servers, part.timeout, part.retries, part.concurrency, part.wait),
        copy.deepcopy(adapter) if part.ahead else adapter,  # a tokenizer that two threads share mixes up their padding
        eos=ends,
        banned=media_tokens(student),
        max_tokens=part.max_tokens,
        export=export,
        run=dist.decided(uuid.uuid4().hex[:12]),
        folder=Path(part.sync_folder or run or tempfile.gettempdir()) / "weights",
        over_nccl=part.transfer == "nccl",
    )
    if dist.rank() == 0:
        atexit.register(sampler.clear)
    return Ahead(sampler) if part.ahead else sampler


def sampling(part: schema.Sampling) -> Sampling:
    return Sampling(part.n, part.temperature, part.view)


def right(response: str, answer: str) -> bool:
    """Whether a response reaches the answer; what cannot be compared counts as wrong."""
    return bool(same_answers([(response, answer)])[0])


def build_term(name: str, term: schema.Term) -> Term:
    pieces = term.model_dump(exclude={"sampling", "view", "teacher"})
    try:
        return Term.build(**pieces)
    except ValueError as error:
        raise ValueError(f"objective.{name}: {error}") from None


def ask(sampler: Sampler, adapter: Adapter, texts: list[str]) -> list[str]:
    """The student's own greedy answers to prompts in text."""
    views = [adapter.text(text) for text in texts]
    pairs = [Pair(f"prompt {i}", {"student": view}) for i, view in enumerate(views)]
    return [r.text for r in sampler.generate(pairs, {"": Sampling(temperature=0.0)}, seed=0)[""]]
