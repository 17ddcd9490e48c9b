"""The student and its processor, loaded as a recipe says."""

from typing import Any

import torch
from transformers import PreTrainedModel

from modalities.families import limit_pixels
from xmodal_opd import dist, lora, models, schema


def device(name: str) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{dist.local_rank()}" if name == "cuda" and dist.started() > 1 else name


def load(recipe: schema.Recipe, name: str) -> PreTrainedModel:
    model = recipe.model
    return models.load_model(name, model.dtype, model.trust_remote_code, device(recipe.engine.device))


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


def load_processor(recipe: schema.Recipe) -> Any:
    """The model's own processor, which scales images as the recipe says."""
    part = recipe.model
    processor = models.load_processor(part.name, part.trust_remote_code)
    limit_pixels(processor, part.min_pixels, part.max_pixels)
    return processor


def prompt_limit(recipe: schema.Recipe, model: PreTrainedModel) -> int:
    """Tokens a prompt may have: what the recipe says, or what the model reads less the longest answer."""
    reads = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    return recipe.model.max_prompt_tokens or reads - recipe.rollout.max_tokens


def end_tokens(model: PreTrainedModel, processor: Any) -> list[int]:
    """Ids that end an answer, from the model's generation config or its tokenizer."""
    config_ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = config_ids if config_ids is not None else getattr(processor, "tokenizer", processor).eos_token_id
    return list(ids) if isinstance(ids, list | tuple) else [ids]
