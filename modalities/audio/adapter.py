"""Spoken and written questions as inputs of any audio model that has a transformers processor and chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import ProcessorMixin

from modalities.audio.media import decode
from xmodal_opd.types import Inputs, Pair, SampleError


class AudioAdapter:
    """Views from shards: audio decoded to the model's rate, prompts laid out by the model's own chat template."""

    def __init__(self, processor: Any, max_tokens: int):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.extractor = getattr(processor, "feature_extractor", None)
        self.max_tokens = max_tokens

    def pair(self, sample: Mapping[str, Any]) -> Pair:
        """Raises SampleError when media cannot be decoded or a view is longer than the model reads."""
        key = sample["__key__"]
        views = {name: self.view(key, name, messages, sample["media"]) for name, messages in sample["views"].items()}
        return Pair(key, views, sample.get("answer"), sample.get("meta", {}))

    def view(self, key: str, name: str, messages: list[dict], media: Mapping[str, bytes]) -> Inputs:
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
        audio = [self.waveform(key, p["audio"], media) for p in parts if p["type"] == "audio"]
        view = {"key": key, "prompt": self.template(messages), "audio": audio}
        if self.size(view) > self.max_tokens:
            self.batch([view])  # the bound is over the limit; the exact length may not be
        return view

    def size(self, view: Inputs) -> int:
        """Tokens of the prompt, with one for every frame of its audio: encoders make at most that many."""
        hop = getattr(self.extractor, "hop_length", 1)
        frames = sum(len(wave) // hop + 1 for wave in view["audio"])
        return len(self.tokenizer(view["prompt"])["input_ids"]) + frames

    def waveform(self, key: str, name: str, media: Mapping[str, bytes]) -> np.ndarray:
        if self.extractor is None:
            raise SampleError(f"sample {key!r} has audio, but {type(self.processor).__name__} reads text only")
        if name not in media:
            have = ", ".join(sorted(media)) or "none"
            raise SampleError(f"sample {key!r} names the audio {name!r}, which its shard lacks (has: {have})")
        try:
            wave = decode(media[name], self.extractor.sampling_rate)
        except ValueError as error:
            raise SampleError(f"sample {key!r}, audio {name!r}: {error}") from error
        if len(wave) > self.extractor.n_samples:
            seconds, limit = (n / self.extractor.sampling_rate for n in (len(wave), self.extractor.n_samples))
            raise SampleError(
                f"sample {key!r}, audio {name!r}: {seconds:.1f} s is over the model's {limit:.1f} s; cut or drop it"
            )
        return wave

    def template(self, messages: list[dict]) -> str:
        kind = ProcessorMixin if isinstance(self.processor, ProcessorMixin) else type(self.processor)
        # the base method: Qwen2.5-Omni's own warns about speech output at every system prompt but one
        return kind.apply_chat_template(self.processor, messages, add_generation_prompt=True, tokenize=False)

    def text(self, prompt: str) -> Inputs:
        """The view of a plain question in text."""
        return self.view(prompt[:40], "text", [{"role": "user", "content": [{"type": "text", "text": prompt}]}], {})

    def batch(self, views: Sequence[Inputs]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [P, L], left-padded, and the features of all audio in order."""
        audio = [wave for view in views for wave in view["audio"]]
        rate = getattr(self.extractor, "sampling_rate", None)
        extra = {"audio": audio, "sampling_rate": rate} if audio else {}
        texts = [view["prompt"] for view in views]
        out = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **extra)
        for view, length in zip(views, out["attention_mask"].sum(1).tolist(), strict=True):
            self.check_length(f"{view['key']!r}", length)
        return dict(out)

    def check_length(self, what: str, length: int) -> None:
        if length > self.max_tokens:
            raise SampleError(f"sample {what} has a prompt of {length} tokens; the model reads {self.max_tokens}")

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
