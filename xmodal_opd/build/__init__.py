"""From a recipe to live parts: the only file that names concrete classes."""

import atexit
import copy
import inspect
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modalities.audio import prepare as speech
from modalities.chat import DERIVED, ChatAdapter
from modalities.families import limit_pixels
from modalities.rows import count, find
from modalities.vision import prepare as scenes
from modalities.vision.benchmarks import LAYOUTS, questions
from xmodal_opd import checkpoint, dist, lora, models, schema
from xmodal_opd.background import read_ahead
from xmodal_opd.benchmark import Benchmark
from xmodal_opd.build import robots
from xmodal_opd.data import Shards
from xmodal_opd.engine.deepspeed_config import settings
from xmodal_opd.engine.plain import PlainEngine
from xmodal_opd.hidden import media_tokens, softcap
from xmodal_opd.objective import Term, pick
from xmodal_opd.objective.schedules import SCHEDULES
from xmodal_opd.rollout.ahead import Ahead
from xmodal_opd.rollout.demonstrated import Demonstrated
from xmodal_opd.rollout.env import EnvSampler
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.rollout.vllm import VLLMSampler
from xmodal_opd.scoring.answers import same_answers
from xmodal_opd.scoring.benchmarks import Ask, score
from xmodal_opd.scoring.forward import Responses
from xmodal_opd.scoring.judge import asker, build_judge
from xmodal_opd.scoring.served import ServedTeacher
from xmodal_opd.serving import Servers
from xmodal_opd.types import Adapter, Engine, Pair, SampleError, Sampler, Sampling

ADAPTERS: dict[str, Callable[..., Adapter]] = {  # one reads them all; a modality is what the model must be able to
    "text": ChatAdapter,
    "audio": partial(ChatAdapter, needs="audio"),
    "vision": partial(ChatAdapter, needs="image"),
}
STUDENT = "current"


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
        return self.models[STUDENT]

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


def launch(recipe: schema.Recipe) -> None:
    """Join the processes of this launch. Raises ValueError when they are not what engine and step are for."""
    ranks = dist.started()
    refuse_ranks(recipe, ranks)
    if ranks > 1:
        dist.join(device(recipe.engine.device))


def refuse_ranks(recipe: schema.Recipe, ranks: int) -> None:
    if ranks > 1 and recipe.engine.name == "plain":
        raise ValueError(f"{ranks} processes were started, but engine.name is plain, which is one; use deepspeed")
    if recipe.train.prompts % ranks:
        raise ValueError(
            f"train.prompts is {recipe.train.prompts} questions a step, which {ranks} ranks cannot share evenly; "
            f"use a multiple of {ranks}"
        )


def build(recipe: schema.Recipe, run: Path | None = None) -> Parts:
    """Live parts on the recipe's device, which write to the run's folder where there is one. Raises ValueError in one
    sentence for what cannot be built."""
    terms = {name: build_term(name, term) for name, term in recipe.objective.items()}
    schedule = pick("schedule", SCHEDULES, recipe.optim.schedule)
    student = load_student(recipe)
    processor = load_processor(recipe)
    adapter = build_adapter(recipe, processor, prompt_limit(recipe, student))
    others = teachers(recipe, student)  # copies of the student, before an engine takes its parameters apart
    refuse_contrast(recipe, {STUDENT: student, **others})
    engine = build_engine(recipe, student, lambda step: schedule(step, recipe.train.steps))
    sampler = build_sampler(recipe, student, processor, adapter, engine, run)
    return Parts(
        recipe=recipe,
        models={STUDENT: student} | others,
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


def load_processor(recipe: schema.Recipe) -> Any:
    """The model's own processor, which scales images as the recipe says."""
    part = recipe.model
    processor = models.load_processor(part.name, part.trust_remote_code)
    limit_pixels(processor, part.min_pixels, part.max_pixels)
    return processor


def load_student(recipe: schema.Recipe) -> PreTrainedModel:
    """The recipe's model with what trains set: what model.train names, and an adapter where the recipe has one."""
    student = load(recipe, recipe.model.name)
    make_trainable(student, recipe)
    return student


def make_trainable(student: PreTrainedModel, recipe: schema.Recipe) -> None:
    settings, train = recipe.model.lora, recipe.model.train
    if settings is None:
        models.set_trainable(student, ["all"] if train is None else train)
        return
    moving = models.set_trainable(student, train or [])
    modules = lora.target_modules(student, settings.targets, settings.parts)
    lora.inject(student, modules, settings.rank, settings.alpha, moving)


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


def build_engine(recipe: schema.Recipe, student: PreTrainedModel, schedule: Callable[[int], float]) -> Engine:
    """Raises ImportError without DeepSpeed where the recipe asks for it."""
    part, optim = recipe.engine, recipe.optim
    options: dict[str, Any] = optim.model_dump(include={"lr", "betas", "weight_decay", "clip"})
    options |= {"schedule": schedule, "autocast": part.autocast}
    if part.activation_checkpointing:
        models.checkpoint_activations(student)
    if part.name == "plain":
        return PlainEngine(student, **options)
    if student.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.join(student.device.type)
    try:
        from xmodal_opd.engine.deepspeed import DeepSpeedEngine
    except ImportError as error:
        raise ImportError(
            f"engine.name=deepspeed needs DeepSpeed: pip install 'xmodal-opd[deepspeed]' ({error})"
        ) from None
    return DeepSpeedEngine(student, deepspeed_settings(recipe), **options)


def deepspeed_settings(recipe: schema.Recipe) -> dict[str, Any]:
    part = recipe.engine
    return settings(part.zero, part.offload, part.config, dtype=recipe.model.dtype, clip=recipe.optim.clip)


def is_sharded(recipe: schema.Recipe) -> bool:
    """Whether no rank holds the student whole (ZeRO-3)."""
    return recipe.engine.name == "deepspeed" and deepspeed_settings(recipe)["zero_optimization"]["stage"] == 3


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


def device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{dist.local_rank()}" if name == "cuda" and dist.started() > 1 else name


def prompt_limit(recipe: schema.Recipe, model: PreTrainedModel) -> int:
    """Tokens a prompt may have: what the recipe says, or what the model reads less the longest answer."""
    reads = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    return recipe.model.max_prompt_tokens or reads - recipe.rollout.max_tokens


def end_tokens(model: PreTrainedModel, processor: Any) -> list[int]:
    """Ids that end an answer, from the model's generation config or its tokenizer."""
    config_ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = config_ids if config_ids is not None else getattr(processor, "tokenizer", processor).eos_token_id
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def teachers(recipe: schema.Recipe, student: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The models the recipe's terms and scorers name, besides the student itself, without gradient."""
    here = schema.teachers(recipe) - {STUDENT, *recipe.teachers}
    return {name: teacher(recipe, name, student) for name in sorted(here)}


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


def load(recipe: schema.Recipe, name: str) -> PreTrainedModel:
    model = recipe.model
    return models.load_model(name, model.dtype, model.trust_remote_code, device(recipe.engine.device))


def views_of_shards(recipe: schema.Recipe) -> set[str]:
    """The views every sample must have: all but those that the adapter makes where they are missing."""
    return schema.views_of_all(recipe) - DERIVED.keys()


def views_of_teachers(recipe: schema.Recipe, meta: Mapping[str, Any]) -> set[str]:
    """The views that a training sample of that meta must have besides. Raises SampleError when none teaches it, or it
    is of no kind that has a dual weight."""
    try:
        if recipe.dual:
            schema.kind_in(recipe.dual, meta)
        return schema.views_of_its_teachers(recipe, meta) - DERIVED.keys()
    except ValueError as error:
        raise SampleError(str(error)) from None


def training_shards(recipe: schema.Recipe, seed: int = 0, shuffle: bool = True) -> Shards:
    """This rank's training samples, as far as they are fit for the recipe's teachers."""
    views, needs = views_of_shards(recipe), partial(views_of_teachers, recipe)
    where = {"rank": dist.rank(), "world": dist.world()}
    return Shards(schema.learnt_from(recipe), seed=seed, shuffle=shuffle, views=views, needs=needs, **where)


def open_shards(recipe: schema.Recipe) -> tuple[Shards | robots.Starts, Shards | robots.Starts]:
    """(training shards, shuffled without end; test shards, in order), made first where the recipe says how; or the
    start states of a robot's episodes, and of those to learn from what others did, where the recipe says where that is.
    """
    seed = recipe.train.seed if recipe.data.seed is None else recipe.data.seed
    if isinstance(recipe, schema.ActionRecipe):
        learnt, tests = robots.starts(recipe, seed, dist.rank(), dist.world())
        return training_shards(recipe, seed) if recipe.data.demonstrations else learnt, tests
    if recipe.data.prepare is not None:
        prepare_shards(recipe.data.prepare, recipe.data.train, "train", recipe.data.prepare.train)
    return training_shards(recipe, seed), open_tests(recipe)


def training_pairs(parts: Parts, shards: Shards | robots.Starts, position: int) -> Iterator[tuple[int, Pair]]:
    """This rank's pairs from a position on, those of the next step read in a thread while this one trains."""
    if isinstance(shards, robots.Starts):
        return shards.pairs(parts.adapter, position)
    adapter = copy.deepcopy(parts.adapter)  # a tokenizer that two threads share mixes up their padding
    return read_ahead(shards.pairs(adapter, position), parts.recipe.train.prompts // dist.world())


def open_tests(recipe: schema.Recipe) -> Shards | robots.Starts:
    """The test shards, in order, made first where the recipe says how; or the start states of the test."""
    if isinstance(recipe, schema.ActionRecipe):
        return robots.starts(recipe, 0, 0, 1)[1]
    if recipe.data.prepare is not None:
        prepare_shards(recipe.data.prepare, recipe.data.test, "test", recipe.data.prepare.test)
    return Shards(recipe.data.test, shuffle=False, views=views_of_shards(recipe))


def open_benchmark(recipe: schema.Recipe, name: str, source: str) -> Benchmark:
    """A benchmark in files as a hub has them. Raises ValueError for a layout that is not known, and for files that are
    not of it."""
    if name not in LAYOUTS:
        raise ValueError(f"there is no layout {name!r} of a benchmark; there are: {', '.join(LAYOUTS)}")
    files, part = find(source), recipe.eval.extractor
    next(questions(name, files))  # what is wrong with the files is told before a model is loaded
    ask: Ask | None = None if part is None else asker("eval.extractor", **part.model_dump())
    return Benchmark(name, questions(name, files), count(files), partial(score, name, ask=ask))


def refuse_view(view: str) -> None:
    """Raises ValueError for a view that a benchmark's question does not have."""
    if view not in (have := ("student", *DERIVED)):
        raise ValueError(f"a benchmark's question has no view {view!r}; it has: {', '.join(have)}")


def prepare_shards(settings: schema.Prepare, folder: str, split: str, count: int) -> None:
    """Built-in questions, spoken or drawn; shards that are there already, with the same settings, are kept."""
    if dist.rank() == 0:
        made = scenes if isinstance(settings, schema.Scenes) else speech
        made.prepare(folder, count=count, split=split, **settings.model_dump(exclude={"train", "test"}))
    dist.gather(None)


def ask(sampler: Sampler, adapter: Adapter, texts: list[str]) -> list[str]:
    """The student's own greedy answers to prompts in text."""
    views = [adapter.text(text) for text in texts]
    pairs = [Pair(f"prompt {i}", {"student": view}) for i, view in enumerate(views)]
    return [r.text for r in sampler.generate(pairs, {"": Sampling(temperature=0.0)}, seed=0)[""]]
