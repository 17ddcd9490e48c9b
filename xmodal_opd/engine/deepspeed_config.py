"""The DeepSpeed configuration of a recipe: a few keys, or a JSON file of one's own. DeepSpeed itself is not needed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = ("optimizer", "scheduler", "train_batch_size", "fp16", "amp", "torch_autocast")  # decided by the recipe


def settings(stage: int | None, offload: Sequence[str], file: str | None, *, dtype: str, clip: float) -> dict[str, Any]:
    """The DeepSpeed configuration: what the recipe says, and what the user's own JSON `file` adds.

    Raises ValueError where the two disagree, naming the key, and for offload that the stage does not have.
    """
    given = read(file) if file else {}
    stage = int(given.get("zero_optimization", {}).get("stage", 2)) if stage is None else stage
    need = {"optimizer": 1, "parameters": 3}
    for what in offload:
        if stage < need[what]:
            raise ValueError(f"engine.offload: [{what}] needs engine.zero of {need[what]} or more, not {stage}")
    if dtype == "float16" or (dtype == "bfloat16" and stage == 0):
        raise ValueError(
            f"model.dtype {dtype} with engine.zero={stage} keeps no float32 weights to update; "
            "use bfloat16 with engine.zero of 1 or more, or float32"
        )
    zero: dict[str, Any] = {"stage": stage}
    zero |= {f"offload_{what.removesuffix('eters')}": {"device": "cpu"} for what in offload}
    if stage == 3:  # what comes next depends on a rank's own media: a guess would gather in another order than theirs
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    recipe = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip if stage else 0.0,  # stage 0 is clipped here: DeepSpeed would step on a NaN
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return joined(recipe, given, file or "")


def read(file: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.config {file!r} is not a DeepSpeed JSON file: {error}") from None
    given = without_auto(given)
    for key in OURS:
        if key in given:
            raise ValueError(f"engine.config {file!r} sets {key!r}, which the recipe decides (optim, model.dtype, …)")
    return given


def without_auto(tree: Any) -> Any:
    """Keys that are "auto" leave the choice to the trainer."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_auto(value) for key, value in tree.items() if value != "auto"}


def joined(recipe: Mapping[str, Any], given: Mapping[str, Any], file: str, above: str = "") -> dict[str, Any]:
    out = dict(recipe)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = joined(out[key], value, file, f"{above}{key}.")
        elif key in out and out[key] != value:
            raise ValueError(
                f"engine.config {file!r} sets {above}{key} to {value!r} and the recipe to {out[key]!r}; "
                'leave it out of the file, or write "auto" there'
            )
        else:
            out[key] = value
    return out
