"""What a recipe needs, from the shapes of its models alone: parameters, memory per device, tokens per step.

Models are built on the meta device, where tensors have shapes and no data: eight billion parameters cost nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xmodal_opd import config, models, schema
from xmodal_opd.build import build_term
from xmodal_opd.build.engines import refuse_ranks
from xmodal_opd.build.robots import share
from xmodal_opd.build.student import make_trainable
from xmodal_opd.engine.deepspeed_config import settings as deepspeed_settings
from xmodal_opd.hidden import head, name_of
from xmodal_opd.objective import pick
from xmodal_opd.objective.schedules import SCHEDULES
from xmodal_opd.objective.vocab import LOGITS_AT_ONCE

GB = 1e9
PROBE = 32  # tokens


@dataclass(frozen=True)
class Plan:
    """A recipe, its models without data, and where they go."""

    recipe: schema.Recipe
    student: PreTrainedModel
    teachers: dict[str, PreTrainedModel]
    stage: int | None  # of ZeRO; None for the plain engine
    devices: int


def dry(recipe: schema.Recipe, devices: int) -> Iterator[str]:
    """Everything the recipe names, resolved without weights, tokenizers, data or servers; a line for each part.

    devices: the ranks it would run on, each with its own GPU. Raises ValueError in one sentence for what cannot be.
    """
    refuse_ranks(recipe, devices)
    for name, term in recipe.objective.items():
        build_term(name, term)
    pick("schedule", SCHEDULES, recipe.optim.schedule)
    plan = planned(recipe, devices)
    roles = sorted({models.role_of(name) for name, p in plan.student.named_parameters() if p.requires_grad})
    yield f"model      {described(plan.student)}; {amount(trainable(plan.student))} train ({', '.join(roles)})"
    yield from (f"teacher    {name}: {described(model)}" for name, model in plan.teachers.items())
    yield from (f"teacher    {name}: {', '.join(served.servers)}" for name, served in recipe.teachers.items())
    yield from tokens(recipe, devices)
    yield f"memory     of each of {devices} devices, {engine(plan)}; an estimate"
    yield from table("training", training(plan))
    yield from table("sampling and evaluating", resting(plan))


def planned(recipe: schema.Recipe, devices: int) -> Plan:
    student = shape(recipe, recipe.model.name)
    make_trainable(student, recipe)
    others = sorted(schema.teachers(recipe) - {*schema.OWN, *recipe.teachers})
    return Plan(recipe, student, {name: shape(recipe, name) for name in others}, zero(recipe), devices)


def shape(recipe: schema.Recipe, name: str) -> PreTrainedModel:
    """The model without data: from the config recorded in the package where there is one, else from its own."""
    return models.empty_model(config.recorded(name) or name, recipe.model.dtype)


def described(model: PreTrainedModel) -> str:
    return f"{type(model).__name__}, {amount(count(model))} parameters"


def amount(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def size(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def tokens(recipe: schema.Recipe, devices: int) -> Iterator[str]:
    """How many tokens a step samples and reads, at most."""
    if isinstance(recipe, schema.ActionRecipe):
        yield from decisions(recipe, devices)
        return
    questions, longest = recipe.train.prompts, recipe.rollout.max_tokens
    samplings = recipe.rollout.samplings
    answers = questions * sum(s.n for s in samplings.values())
    plan = ", ".join(f"{s.n} at temperature {s.temperature:g} ({name})" for name, s in samplings.items())
    yield f"a step     {questions} questions; answers to each: {plan}"
    limit = recipe.model.max_prompt_tokens
    prompts = f", behind prompts of {limit:,} at most, {questions * limit:,} in all" if limit else ""
    yield f"           {answers} answers of at most {longest} tokens, {answers * longest:,} in all{prompts}"


def decisions(recipe: schema.ActionRecipe, devices: int) -> Iterator[str]:
    """What a step plays or reads, what a decision is, and how many simulators run."""
    robot = recipe.robot
    yield f"a step     {shown(recipe) if recipe.data.demonstrations else played(recipe)}"
    size = f"{robot.chunk} actions of {robot.size} numbers, {robot.chunk * robot.size} tokens"
    yield f"           a decision is {size}, {robot.decoding}"
    shares = [share(robot.workers, rank, devices) for rank in range(devices)]
    yield f"           {sum(shares)} workers in all, each with a simulator; {max(shares)} a process"


def shown(recipe: schema.ActionRecipe) -> str:
    return f"{recipe.train.prompts} decisions of {recipe.data.demonstrations}; episodes of the test alone"


def played(recipe: schema.ActionRecipe) -> str:
    starts, robot, samplings = recipe.train.prompts, recipe.robot, recipe.rollout.samplings
    plan = ", ".join(f"{s.n} at temperature {s.temperature * robot.temperature:g} ({n})" for n, s in samplings.items())
    count = starts * sum(s.n for s in samplings.values())
    return f"{count} episodes in {robot.name}, from {starts} start states: {plan}"


def zero(recipe: schema.Recipe) -> int | None:
    """The ZeRO stage, None for the plain engine. Raises ValueError for settings that DeepSpeed would refuse."""
    how = recipe.engine
    if how.name == "plain":
        return None
    own = deepspeed_settings(how.zero, how.offload, how.config, dtype=recipe.model.dtype, clip=recipe.optim.clip)
    return own["zero_optimization"]["stage"]


def engine(plan: Plan) -> str:
    if plan.stage is None:
        return "plain engine"
    aside = " and ".join(plan.recipe.engine.offload)
    return f"DeepSpeed ZeRO-{plan.stage}, {plan.recipe.model.dtype}{f', {aside} in main memory' if aside else ''}"


def table(title: str, parts: Mapping[str, float]) -> Iterator[str]:
    yield f"  {title + ':':40} {sum(parts.values()) / GB:8.2f} GB"
    yield from (f"    {name:38} {value / GB:8.2f} GB" for name, value in parts.items() if value)


def training(plan: Plan) -> dict[str, float]:
    """Bytes on a device while a micro-batch is trained. The activations of a media encoder that trains come on top."""
    logits = min(LOGITS_AT_ONCE["cuda"], plan.recipe.engine.micro_tokens * head(plan.student).shape[0])
    return held(plan) | {
        "activations of the language model": activations(plan) * plan.recipe.engine.micro_tokens,
        "logits of a chunk, both sides": 4.0 * 4 * logits,
    }


def resting(plan: Plan) -> dict[str, float]:
    """Bytes on a device while the model itself samples, or answers are compared in an evaluation."""
    own = plan.recipe.rollout.name == "hf"
    return held(plan) | {
        "the whole model, gathered": float(size(plan.student)) if plan.stage == 3 else 0.0,
        "keys and values of the sampler": cache(plan.student) * plan.recipe.rollout.batch_tokens if own else 0.0,
    }


def held(plan: Plan) -> dict[str, float]:
    """Bytes that stay: weights, float32 gradients, AdamW's two moments and, under ZeRO 1 to 3, float32 masters
    (arXiv 1910.02054 §5, with gradients summed in float32)."""
    moving, stage, aside = trainable(plan.student), plan.stage or 0, plan.recipe.engine.offload
    moments, gradients, weights = (plan.devices if stage >= first else 1 for first in (1, 2, 3))
    return {
        "weights": 0.0 if "parameters" in aside else size(plan.student) / weights,
        "gradients": 4.0 * moving / gradients,
        "moments and masters": 0.0 if "optimizer" in aside else (12.0 if stage else 8.0) * moving / moments,
        "teachers": float(sum(map(size, plan.teachers.values())) + copied(plan)),
    }


def copied(plan: Plan) -> int:
    """Bytes of the student's copies that teach: what trains of it; nothing where an adapter is put off; the whole of it
    at ZeRO-3, where ranks hold parts that no copy can share."""
    own, moving = schema.teachers(plan.recipe), trainable(plan.student) * plan.student.dtype.itemsize
    initial = size(plan.student) if plan.stage == 3 else 0 if plan.recipe.model.lora else moving
    return initial * ("initial" in own) + moving * ("ema" in own)


def activations(plan: Plan) -> float:
    """Bytes a token leaves behind in the language model for the backward pass."""
    model, text = plan.student, plan.student.config.get_text_config()
    each = 2 * remembered(model, PROBE) / PROBE - remembered(model, 2 * PROBE) / (2 * PROBE)  # less what grows squared
    if not plan.recipe.engine.activation_checkpointing:
        return each
    return each / text.num_hidden_layers + text.num_hidden_layers * text.hidden_size * model.dtype.itemsize


def remembered(model: PreTrainedModel, length: int, device: str = "meta") -> int:
    """Bytes that autograd keeps of one run of the language model over `length` tokens, weights not counted."""
    inner = model.get_submodule(name_of(model, model.get_input_embeddings()).rpartition(".")[0])
    kept: dict[int, Tensor] = {p.untyped_storage()._cdata: p for p in model.parameters()}
    weights = len(kept)

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    whole = model.config.get_text_config().hidden_size
    embedded = torch.zeros(1, length, whole, dtype=model.dtype, device=device, requires_grad=True)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inner(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=torch.arange(length, device=device)[None],
            use_cache=False,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in [*kept.values()][weights:])


def cache(model: PreTrainedModel) -> float:
    """Bytes of keys and values of one token."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * text.num_key_value_heads * width * model.dtype.itemsize
