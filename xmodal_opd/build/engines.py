"""The processes of a launch, and the engine that owns the student's parameters in them."""

import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from xmodal_opd import dist, models, schema
from xmodal_opd.build.student import device
from xmodal_opd.engine.deepspeed_config import settings
from xmodal_opd.engine.plain import PlainEngine
from xmodal_opd.types import Engine


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
