"""LoRA (arXiv 2106.09685) through PEFT: the adapter goes into the model's own layers, so that class and names stay.

What an adapter adds starts at zero. Without it a LoRA student is its base, to the bit: no second copy is a teacher.
There is no dropout: the log-probs that are trained are those that were sampled.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xmodal_opd.hidden import projection
from xmodal_opd.models import matching

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
OTHERS = "trained.safetensors"  # weights that train beside the adapter
PREFIX = "base_model.model."  # PEFT's, before the name of every module


def target_modules(model: Any, targets: str | Sequence[str], parts: Sequence[str]) -> list[str]:
    """The linear layers that `targets` ("all-linear", or ends of names) mean in `parts`; never the output projection.

    Raises ValueError for a target or a part that is not there, listing what is.
    """
    head = projection(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    inside = matching(linear, parts, "model.lora.parts")
    if targets == "all-linear":
        return inside
    for target in targets:
        if not any(is_at(name, target) for name in inside):
            have = ", ".join(sorted({name.rpartition(".")[2] for name in inside}))
            raise ValueError(f"model.lora.targets names {target!r}, which is no linear layer of {parts}; there: {have}")
    return [name for name in inside if any(is_at(name, target) for target in targets)]


def is_at(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def inject(model: Any, modules: Sequence[str], rank: int, alpha: int, beside: Sequence[str] = ()) -> None:
    """Give `modules` an adapter, in float32 over any base; it and the parameters `beside` train, all else rests.

    Raises ImportError without PEFT, and ValueError when a layer would train in full under its own adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("model.lora needs peft: pip install 'xmodal-opd[lora]'") from None
    both = [name for name in modules if f"{name}.weight" in beside]
    if both:
        raise ValueError(
            f"model.train frees {both[0]} and {len(both) - 1} more that model.lora adapts; a layer trains or its "
            "adapter: narrow model.train or model.lora.parts"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules))
    config.base_model_name_or_path = model.name_or_path
    inject_adapter_in_model(config, model)
    for layer in layers(model).values():
        layer.lora_A.float()
        layer.lora_B.float()
    for name in beside:
        model.get_parameter(name).requires_grad_(True)


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name; none in a model without an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def without_adapter(model: Any) -> Any:
    """The model, its adapted layers put back as they were in its base. For a copy: what it shares stays shared."""
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    return model


def merged_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`state` (default: the model's) as its plain class names and holds it: W + alpha / rank * B A for adapted layers.

    Nothing of the model changes. `state` may come from elsewhere, such as weights gathered over ranks.
    """
    state = model.state_dict() if state is None else state
    merged = {n.replace(".base_layer.", "."): tensor for n, tensor in state.items() if ".lora_" not in n}
    for name, layer in layers(model).items():
        a, b = (state[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + layer.scaling["default"] * (b @ a)).to(weight.dtype)
    return merged


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of a state dict under the names PEFT saves them by."""
    return {
        PREFIX + name.replace(".default.", "."): tensor.detach().contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }


def save(model: Any, folder: Path) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained(base, folder)` reads it, and beside it, in
    `trained.safetensors`, what else trains: for `base.load_state_dict(load_file(…), strict=False)` before that."""
    model.peft_config["default"].save_pretrained(folder)
    save_file(adapter_state(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    others = others_of(model)
    if others:
        save_file({name: p.detach().contiguous() for name, p in others.items()}, folder / OTHERS)


def load(folder: Path, model: Any) -> None:
    """Read what `save` wrote into a model of the same recipe. Raises ValueError when it is of another one."""
    saved = load_file(folder / WEIGHTS)
    here = adapter_state(model.state_dict())
    other = [n for n in sorted({*saved, *here}) if n not in saved or n not in here or saved[n].shape != here[n].shape]
    others = load_file(folder / OTHERS) if (folder / OTHERS).is_file() else {}
    other += sorted(others.keys() ^ others_of(model).keys())
    if other:
        settings = json.loads((folder / CONFIG).read_text())
        raise ValueError(
            f"{folder} holds another adapter than the recipe's ({other[0]} differs; rank there: {settings['r']}); "
            "use the recipe.yaml of its own run folder"
        )
    names = [name for name in model.state_dict() if ".lora_" in name]
    model.load_state_dict({name: saved[key] for name, key in zip(names, here, strict=True)} | others, strict=False)


def others_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train beside the adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()
