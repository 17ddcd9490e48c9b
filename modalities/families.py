"""What the processors of model families want, where they differ. A family is one line of FAMILIES."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from transformers import ProcessorMixin

Messages = Sequence[Mapping[str, Any]]
Media = Sequence[Sequence[Any]]  # of each prompt: its waveforms, or its images

SECONDS = 30  # the clip that models without a window of their own were trained on


def extractor_of(processor: Any) -> Any:
    """What turns waveforms into features; None for a processor without ears."""
    return getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)


# ---- messages -> prompt


def templated(processor: Any, messages: Messages, _clips: Sequence[Any]) -> str:
    """By the processor's chat template, which reads content parts; a tokenizer's reads strings."""
    if not isinstance(processor, ProcessorMixin):
        return worded(processor, messages, _clips)
    parts = [{**m, "content": parts_of(m)} for m in messages]
    # the base method: Qwen2.5-Omni's own warns about speech output at every system prompt but one
    return ProcessorMixin.apply_chat_template(processor, parts, add_generation_prompt=True, tokenize=False)


def worded(processor: Any, messages: Messages, _clips: Sequence[Any]) -> str:
    """By a chat template that reads strings, media written as their placeholders."""
    strings = [{**m, "content": "".join(text_of(processor, p) for p in parts_of(m))} for m in messages]
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None)
    return tokenizer.apply_chat_template(strings, chat_template=template, add_generation_prompt=True, tokenize=False)


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def text_of(processor: Any, part: Mapping[str, Any]) -> str:
    return part["text"] if part["type"] == "text" else getattr(processor, f"{part['type']}_token")


def mistral_ids(processor: Any, messages: Messages, clips: Sequence[Any]) -> list[int]:
    """By mistral-common, which lays out ids, not text, and wants to see the audio: its length gives its tokens."""
    waves = iter(clips)
    parts = [{**m, "content": [spoken(processor, p, waves) for p in parts_of(m)]} for m in messages]
    return processor.tokenizer.apply_chat_template(parts, tokenize=True, return_dict=True)["input_ids"]


def spoken(processor: Any, part: dict[str, Any], waves: Any) -> dict[str, Any]:
    if part["type"] != "audio":
        return part
    file = io.BytesIO()
    soundfile.write(file, next(waves), extractor_of(processor).sampling_rate, format="WAV", subtype="FLOAT")
    return {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}


# ---- prompts and their media -> the model's inputs


def flat(processor: Any, prompts: Sequence[Any], audio: Media, images: Media) -> Mapping[str, Any]:
    """All clips in one list, all images in another."""
    heard, seen = ([medium for some in media for medium in some] for media in (audio, images))
    media: dict[str, Any] = {"audio": heard, "sampling_rate": extractor_of(processor).sampling_rate} if heard else {}
    media |= {"images": seen} if seen else {}
    return processor(text=list(prompts), padding=True, padding_side="left", return_tensors="pt", **media)


def gemma3n(processor: Any, prompts: Sequence[Any], audio: Media, images: Media) -> Mapping[str, Any]:
    """Images in a list for each prompt; clips always of one length, as its encoder hears a little of what follows; and
    in the padding a word, for the reason `xmodal_opd.tokens.response_tokens` gives."""
    media: dict[str, Any] = {"images": [list(some) for some in images]} if any(images) else {}
    if heard := [wave for some in audio for wave in some]:
        media |= {"audio": heard, "audio_kwargs": {"padding": "max_length", "max_length": half_a_minute(processor)}}
    words = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    out = processor(text=list(prompts), text_kwargs=words, **media)
    ids, real = out["input_ids"], out["attention_mask"].bool()
    return {**out, "input_ids": ids.where(real, ids[:, -1:])}


def smolvlm(processor: Any, prompts: Sequence[Any], _audio: Media, images: Media) -> Mapping[str, Any]:
    """Its image processor loses count at a prompt without images: it sees the others only. Its forward finds the tiles
    of a prompt by the placeholders before them, so the pictures need no row of their own."""
    texts, seen = list(prompts), {}
    if rows := [row for row, some in enumerate(images) if some]:
        pictures = [list(images[row]) for row in rows]
        seen = dict(processor.image_processor(pictures, return_row_col_info=True, return_tensors="pt"))
        grids = seen.pop("rows"), seen.pop("cols")
        expanded = processor.expand_text_with_image_tokens([texts[row] for row in rows], *grids)
        for row, text in zip(rows, expanded, strict=True):
            texts[row] = text
    return {**processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"), **seen}


def granite(processor: Any, prompts: Sequence[Any], audio: Media, _images: Media) -> Mapping[str, Any]:
    """Its encoder hears the padding behind a clip: always to the same length, or a clip would sound different in
    another batch. Its forward compares prompts with clips one by one: a prompt without one has silence, unused."""
    texts = list(prompts)
    sound: dict[str, Any] = {}
    if any(audio):
        silence = np.zeros(SECONDS * extractor_of(processor).sampling_rate, np.float32)
        heard = extractor_of(processor)([*(some[0] if some else silence for some in audio), silence])
        token, sizes = processor.audio_token, heard["audio_embed_sizes"]
        texts = [text.replace(token, token * size) for text, size in zip(texts, sizes[:-1], strict=True)]
        has = torch.tensor([bool(some) for some in audio])[:, None]
        sound["input_features"] = heard["input_features"][:-1]
        sound["input_features_mask"] = heard["input_features_mask"][:-1] & has
    return {**processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"), **sound}


def voxtral(processor: Any, prompts: Sequence[Any], audio: Media, _images: Media) -> Mapping[str, Any]:
    """Ids to pad, and of every clip as many windows of 30 s as it fills."""
    out = dict(processor.tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt"))
    clips = [windows(extractor_of(processor), wave) for some in audio for wave in some]
    return out | ({"input_features": torch.cat(clips)} if clips else {})


def windows(extractor: Any, wave: Any) -> torch.Tensor:
    """[windows, mels, frames] of one clip of any length."""
    sound = {"sampling_rate": extractor.sampling_rate, "truncation": False, "pad_to_multiple_of": extractor.n_samples}
    features = extractor(wave, padding=True, return_tensors="pt", **sound)["input_features"][0]
    return features.unflatten(-1, (-1, extractor.nb_max_frames)).transpose(0, 1)


# ---- at least how many tokens media take


def frames(processor: Any, samples: int) -> int:
    """One for every frame: encoders make at most that many."""
    return samples // getattr(extractor_of(processor), "hop_length", 160) + 1


def patches(processor: Any, height: int, width: int) -> int:
    looks = processor.image_processor
    if not (hasattr(looks, "get_number_of_image_patches") and hasattr(looks, "merge_size")):
        who = type(processor).__name__
        raise ValueError(f"{who} does not say how many tokens an image takes; give it a line in modalities/families.py")
    return looks.get_number_of_image_patches(height, width, {}) // looks.merge_size**2


def tiles(processor: Any, height: int, width: int) -> int:
    """The tiles of an image and the whole of it, each with the words around it."""
    count = processor.image_processor.get_number_of_image_patches(height, width, {})[0]
    return (count + 1) * (processor.image_seq_len + 20)


# ---- how many pixels an image is scaled to


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Have the image processor scale images to between `least` and `most` pixels; None leaves what it has.

    Raises ValueError for a processor that scales by another rule, or bounds that leave nothing.
    """
    if least is most is None:
        return
    looks: Any = getattr(processor, "image_processor", None)
    low, high = pixels_of(processor, looks)
    least, most = low if least is None else least, high if most is None else most
    if least > most:
        raise ValueError(f"images are to have at least {least:,} and at most {most:,} pixels; set both bounds to fit")
    if hasattr(looks, "min_pixels"):  # the older form; a processor may have both
        looks.min_pixels, looks.max_pixels = least, most
    if "shortest_edge" in (looks.size or {}):
        looks.size = type(looks.size)(shortest_edge=least, longest_edge=most)


def pixels_of(processor: Any, looks: Any) -> tuple[int, int]:
    """The bounds it has. What most processors call edges are edges; those that call pixels so also take min_pixels."""
    if hasattr(looks, "min_pixels") and hasattr(looks, "max_pixels"):
        return looks.min_pixels, looks.max_pixels
    known = getattr(getattr(looks, "valid_kwargs", None), "__annotations__", {})
    if "min_pixels" not in known or "max_pixels" not in known:
        who = f"{type(processor).__name__} scales images by a rule of its own" if looks else "the model reads no images"
        raise ValueError(f"{who}, so model.min_pixels and model.max_pixels have no meaning for it; leave them out")
    return looks.size["shortest_edge"], looks.size["longest_edge"]


# ---- how long a clip may be, in samples


def window(processor: Any) -> int | None:
    return getattr(extractor_of(processor), "n_samples", None)


def half_a_minute(processor: Any) -> int:
    return SECONDS * extractor_of(processor).sampling_rate


def any_length(_processor: Any) -> None:
    """A longer clip has more tokens; only the prompt's limit ends it."""


class Family(NamedTuple):
    """How a processor lays out a prompt, is called, and how much its media may and do take."""

    lay_out: Callable[[Any, Messages, Sequence[Any]], Any] = templated
    call: Callable[[Any, Sequence[Any], Media, Media], Mapping[str, Any]] = flat
    clip_tokens: Callable[[Any, int], int] = frames
    image_tokens: Callable[[Any, int, int], int] = patches
    longest: Callable[[Any], int | None] = window
    clips: int | None = None  # that one prompt may have


FAMILIES: dict[str, Family] = {  # by processor class; every other one is a plain Family()
    "Qwen3OmniMoeProcessor": Family(longest=any_length),
    "VoxtralProcessor": Family(mistral_ids, voxtral, lambda *_: 0, longest=any_length),  # its ids are counted as words
    "GraniteSpeechProcessor": Family(worded, granite, longest=half_a_minute, clips=1),
    "SmolVLMProcessor": Family(call=smolvlm, image_tokens=tiles),
    "Gemma3nProcessor": Family(
        call=gemma3n,
        clip_tokens=lambda processor, _samples: processor.audio_seq_length + 8,
        image_tokens=lambda processor, _height, _width: processor.image_seq_length + 8,
        longest=half_a_minute,
    ),
}


def family_of(processor: Any) -> Family:
    return FAMILIES.get(type(processor).__name__, Family())
