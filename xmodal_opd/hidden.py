"""The forward of responses under a view, up to the hidden states that the output projection would read.

The prompt with its media runs once per group, with gradient; its key-value cache is expanded to the answers and only
they are run on. `hidden_repeated` is the plain form it must equal: every answer behind its own copy of the prompt.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

FEATURES = ("pixel_values", "input_features")  # in the names of what forwards that read images or audio take
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # inputs [P, L] that say of each token what it is; 0: text


def projection(model: PreTrainedModel) -> nn.Linear:
    """The last layer, from hidden states to the vocabulary. Raises ValueError for a model that writes no text."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no output projection: it is not a model that writes text")
    if layer.bias is not None:
        raise ValueError(f"{type(model).__name__} adds a bias to its logits; only a plain output projection is read")
    return layer


def softcap(model: PreTrainedModel) -> float | None:
    """c of a model whose logits are c · tanh(projection / c) (Gemma), None for the others."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def head(model: PreTrainedModel) -> Tensor:
    """The output projection's weight [V, H]."""
    return projection(model).weight


def inputs_on(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model is and, if they are features, in its dtype: Qwen3-Omni does not see to it.

    The inputs are the student's, and a teacher may be a model of text alone: ValueError for a view with media.
    """
    if inputs and not reads_media(model):
        if more := sorted(set(inputs) - {"input_ids", "attention_mask", *TOKEN_TYPES}):
            raise ValueError(
                f"the teacher {type(model).__name__} reads text alone, and its view has media ({', '.join(more)}); "
                "give it a view of text"
            )
        inputs = {name: value for name, value in inputs.items() if name not in TOKEN_TYPES}
    features = {name: value.to(model.dtype) for name, value in inputs.items() if value.is_floating_point()}
    return {name: value.to(model.device) for name, value in {**inputs, **features}.items()}


def reads_media(model: PreTrainedModel) -> bool:
    return any(feature in name for feature in FEATURES for name in inspect.signature(model.forward).parameters)


@torch.enable_grad()
def hidden_shared(
    model: PreTrainedModel, prompts: Mapping[str, Tensor], tokens: Tensor, owner: Tensor, grad: bool = True
) -> Tensor:
    """Hidden states that predict each response token, the prompt run once however many responses it has.

    prompts: model inputs for P left-padded prompts; tokens [B, T]; owner [B] gives each response's prompt.
    Returns [B, T, H] before the output projection. Column t predicts token t: this is the only shift by one.
    """
    with torch.set_grad_enabled(grad):
        cache = DynamicCache(config=model.config.get_text_config())
        last, start = prefill(model, prompts, cache)
        first = last[owner][:, None]
        if tokens.shape[1] == 1:
            return first
        cache.batch_select_indices(owner)
        with without_head(model):
            rest = continue_from(model, cache, tokens[:, :-1], prompts["attention_mask"][owner], start[owner])
        return torch.cat([first, rest], dim=1)


def prefill(model: PreTrainedModel, prompts: Mapping[str, Tensor], cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Run P prompts into an empty cache: the hidden state behind each prompt [P, H] and the next position [P, 1]."""
    positions = positions_for(model, prompts)
    with without_head(model):
        hidden = model(**prompts, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return hidden[:, -1], next_position(positions)


def continue_from(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor, before: Tensor, start: Tensor) -> Tensor:
    """One more stretch of tokens [B, t] behind a cache; `before` [B, L] masks what is cached, `start` [B, 1] is the
    position of the first token. Returns the model's logits (or hidden states, inside `without_head`)."""
    mask = torch.cat([before, torch.ones_like(tokens)], dim=1)
    positions = start + torch.arange(tokens.shape[1], device=tokens.device)
    return model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits


@torch.enable_grad()
def hidden_repeated(model: PreTrainedModel, prompts: Mapping[str, Tensor], tokens: Tensor, grad: bool = True) -> Tensor:
    """The same as `hidden_shared` with one prompt per response (P = B), each run as one sequence."""
    width = prompts["input_ids"].shape[1]
    inputs = dict(prompts) | {"input_ids": torch.cat([prompts["input_ids"], tokens], dim=1)}
    inputs["attention_mask"] = torch.cat([prompts["attention_mask"], torch.ones_like(tokens)], dim=1)
    inputs |= {k: torch.cat([prompts[k], torch.zeros_like(tokens)], dim=1) for k in TOKEN_TYPES if k in prompts}
    before = positions_for(model, prompts)
    after = next_position(before) + torch.arange(tokens.shape[1], device=tokens.device)
    inputs["position_ids"] = torch.cat([before, after.expand(*before.shape[:-1], -1)], dim=-1)
    with torch.set_grad_enabled(grad), without_head(model), remembering_little(model, grad):
        out = model(**inputs, **cache_of_shared_layers(model)).logits
    return out[:, width - 1 : -1]


def cache_of_shared_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Layers that read the keys and values of earlier ones (Gemma 3n) find them in a cache alone; others need none."""
    config = model.config.get_text_config()
    if not getattr(config, "num_kv_shared_layers", 0):
        return {"use_cache": False}
    return {"past_key_values": DynamicCache(config=config), "use_cache": True}


def positions_for(model: nn.Module, prompts: Mapping[str, Tensor]) -> Tensor:
    """Position of every token of left-padded prompts: [P, L], or [3, P, L] from a model with multimodal rope.

    Asked for here, not left to the forward, which keeps what it found for the next call and counts answers as prompt.
    """
    family = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if family is None:
        return (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
    known = dict(prompts)
    if "feature_attention_mask" in prompts:
        known["audio_seqlens"] = prompts["feature_attention_mask"].sum(1)
    takes = inspect.signature(family.get_rope_index).parameters  # pyright: ignore[reportArgumentType]
    return family.get_rope_index(**{k: v for k, v in known.items() if k in takes})[0]  # pyright: ignore[reportCallIssue]


def next_position(positions: Tensor) -> Tensor:
    """[P, 1]: the position after the last token. A prompt ends in text, whose positions are the same on every axis."""
    return (positions.view(-1, *positions.shape[-2:])[0, :, -1:] + 1).long()


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[None]:
    """Within, `.logits` are the hidden states before the output projection, which is neither run nor remembered.

    What a family does to its logits by a constant factor (Granite) is done to the hidden states, which is the same.
    """
    layer, config, cap = projection(model), model.config.get_text_config(), softcap(model)
    parent, _, name = name_of(model, layer).rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, nn.Identity())
    if cap is not None:
        vars(config)["final_logit_softcapping"] = None  # an assignment is refused: the type is checked to be a number
    try:
        yield
    finally:
        setattr(owner, name, layer)
        if cap is not None:
            config.final_logit_softcapping = cap


def media_tokens(model: PreTrainedModel) -> list[int]:
    """Ids that stand for media in a prompt. In an answer they would ask for media that are not there."""
    names = ("audio_token_id", "image_token_id", "video_token_id")
    found = (getattr(model.config, name, None) for name in names)
    return [token for token in found if token is not None and token < projection(model).out_features]


def name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


@contextmanager
def remembering_little(model: PreTrainedModel, grad: bool) -> Iterator[None]:
    """The layers of a model prepared by `checkpoint_activations`, in a forward with gradient."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers if grad else []:
        layer.training = True  # of the layer alone, not of what is in it
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
