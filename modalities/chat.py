"""Questions in text, speech, images and short videos as inputs of any model with a processor and chat template."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from modalities.audio import media as sound
from modalities.families import extractor_of, family_of, parts_of
from modalities.vision import media as sight
from modalities.vision import video
from xmodal_opd.types import Inputs, Pair, SampleError

FRAME = {"type": "image"}
DERIVED = {  # views that are the student's with other media in their place: what becomes of a clip, and of an image
    "blank": (sound.blank, sight.blank),
    "degraded": (sound.degraded, sight.degraded),
}


class ChatAdapter:
    """Views from shards: media decoded, prompts laid out by the model's own chat template."""

    def __init__(
        self,
        processor: Any,
        max_tokens: int,
        needs: str = "text",
        derive: Collection[str] = (),
        fps: float = 2.0,
        max_frames: int = 8,
    ):
        """derive: names of DERIVED, views made of the student's where a sample has none of that name. A video is seen
        as its frames, `fps` a second and no more than `max_frames`.

        Raises ValueError when the processor does not read what the student's views are made of: `needs`.
        """
        self.derive, self.frames = sorted(derive), partial(video.decode, fps=fps, most=max_frames)
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.extractor = extractor_of(processor)
        self.family = family_of(processor)
        self.max_tokens = max_tokens
        has = {"audio": self.extractor is not None, "image": hasattr(processor, "image_processor")}
        has["video"] = has["image"]
        self.reads = ["text", *(kind for kind, here in has.items() if here)]
        if needs not in self.reads:
            raise ValueError(
                f"the recipe's modality needs {needs}, but {self.who()} reads {self.all_it_reads()} only; take a model "
                "that reads it, or the modality it reads"
            )
        if needs == "image":
            self.family.image_tokens(processor, 64, 64)  # here rather than at the first image
        tokens = (getattr(processor, f"{kind}_token", None) for kind in ("audio", "image", "video"))
        self.placeholders = [token for token in tokens if isinstance(token, str)]

    def pair(self, sample: Mapping[str, Any]) -> Pair:
        """Raises SampleError when media cannot be decoded or a view is longer than the model reads."""
        key = sample["__key__"]
        views = {name: self.view(key, messages, sample["media"]) for name, messages in sample["views"].items()}
        views |= {name: derived(name, views["student"]) for name in self.derive if name not in views}
        return Pair(key, views, sample.get("answer"), sample.get("meta", {}))

    def view(self, key: str, messages: list[dict], media: Mapping[str, bytes]) -> Inputs:
        """{"key", "prompt": laid out, "audio": its waveforms, "images"}."""
        found: dict[str, list] = defaultdict(list)
        shown = []
        for message in messages:
            parts = [some for part in parts_of(message) for some in self.decoded(key, part, media)]
            shown.append({**message, "content": [part for part, _ in parts]})
            for part, medium in parts:
                found[part["type"]].append(medium)
        if self.family.clips is not None and len(found["audio"]) > self.family.clips:
            raise SampleError(f"sample {key!r} has {len(found['audio'])} clips in one view; {self.who()} reads one")
        return self.composed(key, shown, found["audio"], found["image"])

    def composed(self, key: str, messages: list[dict], audio: Sequence[Any], images: Sequence[Any]) -> Inputs:
        """A view of media that are decoded already. Raises SampleError when the model cannot read it."""
        try:
            view = self.laid_out(key, messages, audio, images)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise SampleError(f"sample {key!r} cannot be laid out by {self.who()}: {error}") from error
        return self.checked(view)

    def laid_out(self, key: str, messages: list[dict], audio: Sequence[Any] = (), images: Sequence[Any] = ()) -> Inputs:
        """A view of media that are decoded already; nothing is checked."""
        prompt = self.family.lay_out(self.processor, messages, audio)
        return {"key": key, "prompt": prompt, "audio": list(audio), "images": list(images)}

    def checked(self, view: Inputs) -> Inputs:
        if self.size(view) > self.max_tokens:
            self.batch([view])  # the bound is over the limit; the exact length may not be
        return view

    def size(self, view: Inputs) -> int:
        """Tokens of the prompt, and at least as many as its media take."""
        prompt = view["prompt"]
        words = len(prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"])
        heard = sum(self.family.clip_tokens(self.processor, len(wave)) for wave in view["audio"])
        return words + heard + sum(self.family.image_tokens(self.processor, i.height, i.width) for i in view["images"])

    def decoded(self, key: str, part: dict[str, Any], media: Mapping[str, bytes]) -> list[tuple[dict[str, Any], Any]]:
        """A part and its waveform or image, None of words; a video's frames are images, each behind its time."""
        if part["type"] == "text":
            self.check_text(key, part["text"])
            return [(part, None)]
        medium = self.medium(key, part, media)
        if part["type"] != "video":
            return [(part, medium)]
        times = [{"type": "text", "text": f"{seconds:.1f} s:"} for seconds, _ in medium]
        return [both for time, (_, image) in zip(times, medium, strict=True) for both in ((time, None), (FRAME, image))]

    def medium(self, key: str, part: Mapping[str, Any], media: Mapping[str, bytes]) -> Any:
        """A part's waveform or image, or a video's frames."""
        kind = part["type"]
        if kind not in self.reads:
            what = {"image": "an image", "video": "a video"}.get(kind, kind)
            raise SampleError(f"sample {key!r} has {what}, but {self.who()} reads {self.all_it_reads()} only")
        name = part[kind]
        if name not in media:
            have = ", ".join(sorted(media)) or "none"
            raise SampleError(f"sample {key!r} names the {kind} {name!r}, which its shard lacks (has: {have})")
        try:
            return {"audio": self.clip, "image": sight.decode, "video": self.frames}[kind](media[name])
        except SampleError as error:
            raise SampleError(f"sample {key!r}, {kind} {name!r}: {error}") from error

    def clip(self, data: bytes) -> sound.Wave:
        rate, longest = self.extractor.sampling_rate, self.family.longest(self.processor)
        wave = sound.decode(data, rate)
        if longest is not None and len(wave) > longest:
            seconds, limit = len(wave) / rate, longest / rate
            raise SampleError(f"{seconds:.1f} s is over the model's {limit:.1f} s; cut or drop it")
        return wave

    def check_text(self, key: str, text: str) -> None:
        if token := next((token for token in self.placeholders if token in text), None):
            raise SampleError(f"sample {key!r} has {token!r} in its text, which {self.who()} would take for a medium")

    def who(self) -> str:
        return type(self.processor).__name__

    def all_it_reads(self) -> str:
        return " and ".join(self.reads)

    def text(self, prompt: str) -> Inputs:
        """The view of a plain question in text. What a judge quotes may spell a placeholder: it is left out."""
        for token in self.placeholders:
            prompt = prompt.replace(token, "")
        return self.view(prompt[:40], [{"role": "user", "content": [{"type": "text", "text": prompt}]}], {})

    def batch(self, views: Sequence[Inputs]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [P, L], left-padded, and the features of all media in order."""
        prompts, audio, images = ([view[part] for view in views] for part in ("prompt", "audio", "images"))
        out = self.family.call(self.processor, prompts, audio, images)
        for view, length in zip(views, out["attention_mask"].sum(1).tolist(), strict=True):
            if length > self.max_tokens:
                what = f"sample {view['key']!r} has a prompt of {length} tokens"
                raise SampleError(f"{what}; the model reads {self.max_tokens}")
        return dict(out)

    def served(self, view: Inputs) -> tuple[list[int], list[dict[str, str]]]:
        """Ids with one placeholder for each medium, and the media, audio before images: their order within a kind is
        all a server asks for."""
        prompt, rate = view["prompt"], getattr(self.extractor, "sampling_rate", 0)
        media = [{"type": "audio_url", "url": sound.data_url(wave, rate)} for wave in view["audio"]]
        media += [{"type": "image_url", "url": sight.data_url(image)} for image in view["images"]]
        return list(prompt) if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"], media

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def derived(name: str, view: Inputs) -> Inputs:
    """The same prompt over other media of the same length and size, so of as many tokens."""
    clip, image = DERIVED[name]
    return {**view, "audio": [clip(wave) for wave in view["audio"]], "images": [image(i) for i in view["images"]]}
