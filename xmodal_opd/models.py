"""Models: loading them, what moves and what rests, copies and averages."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from xmodal_opd.hidden import projection

ASSETS = Path(__file__).parent / "assets"
DEFAULTS = {"default": "tiny", "default_robot": "tiny_robot"}
CLASSES = {  # checkpoints of a larger model of which only the part that writes text is trained
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

# what parts of a model are called in transformers; a projector may lie inside its encoder
ROLES = ("encoder", "projector", "language_model")
ENCODERS = {"audio_tower", "encoder", "visual", "vision_tower", "vision_model"}
PROJECTORS = {"multi_modal_projector", "projector", "connector", "merger", "merger_list", "deepstack_merger_list"}
PROJECTORS |= {"embed_audio", "embed_vision", "audio_tower.proj", "audio_tower.proj1", "audio_tower.proj2"}

END_TO_END = ("Qwen2_5OmniAudioEncoder", "Qwen3OmniMoeAudioEncoder")  # lay the clips of a batch end to end


def folder_of(name: str) -> str:
    """ "default" is the small model in the package, "default_robot" the small policy; anything else is a folder or a
    hub name."""
    return str(ASSETS / DEFAULTS[name]) if name in DEFAULTS else name


def load_model(
    name: str, dtype: str = "float32", trust_remote_code: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """A model of the class its config names, without dropout.

    Raises ValueError when the folder has no config or names a class transformers does not have.
    """
    folder = folder_of(name)
    cls = class_of(name, trust_remote_code)
    try:
        model: Any = cls.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are broken ({error}); copy or download them anew") from error
    refuse(model)
    return attend_in_blocks(model.to(device).eval())


def refuse(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that cannot be trained here, with the reason."""
    projection(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; only models that write behind their prompt are trained here")
    if getattr(model.config, "has_lora_adapter", False):
        raise ValueError(
            f"{name} brings a LoRA adapter that it switches on for audio and off for text, so its two views are two "
            "models; merge the adapter into the weights and set has_lora_adapter to false in its config.json"
        )


def class_of(name: str, trust_remote_code: bool = False) -> Any:
    """The transformers class that the config of `name` names. Raises ValueError when there is none."""
    config = load_config(folder_of(name), trust_remote_code)
    architecture = (config.get("architectures") or ["?"])[0]
    cls = getattr(transformers, CLASSES.get(architecture, architecture), None)
    if cls is None and trust_remote_code:
        cls = transformers.AutoModelForCausalLM
    if cls is None:
        raise ValueError(
            f"model {name!r} is a {architecture}, which transformers {transformers.__version__} does not have; "
            "set model.trust_remote_code=true if the checkpoint brings its own code and you trust it"
        )
    return cls


def empty_model(name: str, dtype: str = "float32") -> PreTrainedModel:
    """The model on the meta device: every shape, and no weights. Only its config.json is read."""
    cls = class_of(name)
    with torch.device("meta"):
        return cls(cls.config_class.from_pretrained(folder_of(name))).to(getattr(torch, dtype)).eval()


def attend_in_blocks(model: Any) -> Any:
    """Let encoders that lay clips end to end attend clip by clip. Their own eager and SDPA forms mask one square over
    all clips, whose cost grows with the square of the batch; flash attention has no such square."""
    for module in model.modules():
        if type(module).__name__ in END_TO_END and module.config._attn_implementation in ("eager", "sdpa"):
            module.set_attn_implementation("blocks")
    return model


def block_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA within each block [cu_seq_lens_q[i], cu_seq_lens_q[i + 1]) of sequences laid end to end.

    query, key, value [1, heads, L, D] -> [1, L, heads, D].
    """
    lengths = cu_seq_lens_q.diff().tolist()
    blocks = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in blocks]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("blocks", block_attention)


def load_config(folder: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """The raw config.json. Raises ValueError when there is none."""
    if is_path(folder) and not Path(folder).is_dir():
        raise ValueError(
            f"no model at {folder!r}: there is no such folder; if another run is to make it, the header of the recipe "
            "tells how"
        )
    try:
        return transformers.PreTrainedConfig.get_config_dict(folder, trust_remote_code=trust_remote_code)[0]
    except OSError as error:
        raise ValueError(
            f"no model at {folder!r}: expected a folder with config.json and model.safetensors, a hub name, or "
            f'"default" for the small model in the package ({str(error).splitlines()[0]})'
        ) from error


def is_path(name: str) -> bool:
    """Whether a name cannot be a hub's, which is NAME or OWNER/NAME."""
    return name.startswith(("/", "./", "../", "~", "runs/")) or name.count("/") > 1


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json has no output projection of its own."""
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def load_processor(name: str, trust_remote_code: bool = False) -> Any:
    """The model's own processor (or tokenizer, for a model of text alone)."""
    return transformers.AutoProcessor.from_pretrained(folder_of(name), trust_remote_code=trust_remote_code)


def vocabulary(name: str, trust_remote_code: bool = False) -> dict[str, int]:
    """The ids of all tokens a model reads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(name), trust_remote_code=trust_remote_code)
    return tokenizer.get_vocab()


def role_of(name: str) -> str:
    """ "encoder", "projector" or "language_model": the part a parameter or module belongs to, by its name."""
    words = name.split(".")
    if PROJECTORS & {*words, *map(".".join, pairwise(words))}:
        return "projector"
    return "encoder" if ENCODERS & {*words} else "language_model"


def encoders(model: nn.Module) -> list[nn.Module]:
    """The media encoders: the modules of that role that lie in no other."""
    named = ((*name.rpartition(".")[::2], module) for name, module in model.named_modules())
    return [module for above, name, module in named if name in ENCODERS and role_of(above) == "language_model"]


def matching(names: Sequence[str], parts: Sequence[str], key: str) -> list[str]:
    """Those of `names` that one of `parts` means: a role, a piece of the name, or "all".

    Raises ValueError for a part that means none, naming the recipe's `key` and what exists.
    """

    def means(part: str, name: str) -> bool:
        return part == "all" or (role_of(name) == part if part in ROLES else part in name)

    for part in parts:
        if not any(means(part, name) for name in names):
            roles = ", ".join(sorted({role_of(name) for name in names}))
            have = ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
            raise ValueError(f"{key} names {part!r}, which nothing here matches; roles: {roles}; parts: {have}")
    return [name for name in names if any(means(part, name) for part in parts)]


def set_trainable(model: nn.Module, train: Sequence[str]) -> list[str]:
    """Freeze all but the parameters that `train` means, as `matching` reads it; returns their names."""
    names = matching([name for name, _ in model.named_parameters()], train, "model.train")
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return names


def frozen_copy(model: PreTrainedModel, share: bool = True) -> PreTrainedModel:
    """The model as it is now, without gradient. With `share`, parameters that do not train are not copied."""
    shared = {id(p): p for p in model.parameters() if share and not p.requires_grad}
    return copy.deepcopy(model, memo=shared).eval().requires_grad_(False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let layers forget their activations and run again in the backward pass, where `hidden.remembering_little` holds.

    Raises ValueError for a model whose layers do not run alone.
    """
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model).__name__} has layers that read the keys and values of earlier ones, which are gone when a "
            "layer runs again; set engine.activation_checkpointing=false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for name in [n for n, value in vars(layer).items() if "dropout" in n and isinstance(value, float)]:
                setattr(layer, name, 0.0)  # a layer checkpoints in training mode only, which is not for its dropout


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, rate: float) -> None:
    """average += rate * (model - average), for every parameter that trains."""
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        if mean is not now:
            mean.lerp_(now.to(mean.dtype), rate)
