"""Scenes to be drawn, and people's own images, as drafts of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from modalities.records import (
    Draft,
    Form,
    Medium,
    Message,
    answer_of,
    conversation,
    listed,
    media_parts,
    meta_of,
    question_of,
    take_sources,
    teacher_of,
    text_parts,
)
from modalities.vision.tasks import Scene
from xmodal_opd.types import SampleError

IMAGE = Medium("image", ("image", "image_url"), ("image", "image_url", "path", "url"), ("images", "image"))
VIDEO = Medium("video", ("video", "video_url"), ("video", "video_url", "path", "url"), ("videos", "video"))
FORM = Form("image", [IMAGE, VIDEO], ("transcript", "text", "caption"))  # what the image says or shows
ASKING = ("question", "query", "conversations")  # where others keep what is asked; an image alone would lose it
GROUNDING = ("<ref-object>", "<bbox>")  # ms-swift's
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")  # of videos


@dataclass(frozen=True)
class Drawn(Draft):
    """A draft whose image is to be drawn (`scene`) or read (`files`: name in the sample -> source in the record)."""

    scene: Scene | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def scene_draft(scene: Scene, split: str, instruction: str = "") -> Drawn:
    """A built-in question whose picture is to be drawn."""
    image = {"type": "image", "image": file_name("image", 0)}
    sees = [image, *text_parts("\n".join(filter(None, (scene.prompt, instruction))))]
    question = "\n".join(filter(None, (scene.question, instruction)))
    student, teacher = ([{"role": "user", "content": content}] for content in (sees, text_parts(question)))
    meta = {"task": scene.task, "instance": scene.instance, "response": scene.response, "split": split}
    return Drawn("scenes", student, teacher, scene.answer, {"question": question, **meta}, scene=scene)


def refuse_grounding(messages: Sequence[Message], *answers: str | None) -> None:
    """Raises SampleError where a text holds a place for what ms-swift keeps in `objects`."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    if tag := next((tag for tag in GROUNDING if any(tag in text for text in [*texts, *filter(None, answers)])), None):
        raise SampleError(f"it has {tag}, a place for one of its `objects`, which are not read; write their text there")


def image_draft(record: Mapping[str, Any], where: str, instruction: str = "") -> Drawn:
    """A question with images or videos: messages whose parts hold or name them (TRL), with <image> and <video> tags
    (ms-swift), or `image` and `prompt`. Where nothing marks their place, they come before the first question."""
    bare = "messages" not in record and "prompt" not in record
    own = record.get("instruction")  # one for all records does not say what this one asks
    if bare and not own and (name := next((name for name in ASKING if record.get(name)), None)):
        raise SampleError(f"what it asks is in {name!r}; it is read in `prompt` or `messages`")
    student = [{"role": "user", "content": []}] if bare else conversation(record, FORM)
    student[-1]["content"] += text_parts(own or instruction)
    files = _take_files(student, record)
    teacher = teacher_of(record, student, FORM)
    meta = {"question": question_of(teacher), **meta_of(record, FORM)}
    answer = answer_of(record)
    refuse_grounding(student, answer, meta.get("response"))
    return Drawn(where, student, teacher, answer, meta, files=files)


def _take_files(messages: list[Message], record: Mapping[str, Any]) -> dict[str, str]:
    """{name in the sample: source} of all images and videos; the parts are left with the names."""
    given = {medium.kind: listed(record, medium) for medium in FORM.media}
    if not media_parts(messages):
        asked = next(message for message in messages if message["role"] == "user")
        asked["content"][:0] = [{"type": kind} for kind, sources in given.items() for _ in sources]
    files = {}
    for kind, sources in given.items():
        for i, source in enumerate(take_sources(messages, sources, kind)):
            name = file_name(kind, i, source)
            media_parts(messages, kind)[i][kind] = name
            files[name] = source
    if not files:
        raise SampleError("it has no image and no video; name one in its messages, or in `images`")
    return files


def file_name(kind: str, number: int, source: str = "") -> str:
    """Name of a sample's file, counted from 0. A video keeps its suffix."""
    suffix = PurePath(source).suffix.lower()
    return f"question{number + 1 if number else ''}{'.png' if kind == 'image' else _known(suffix)}"


def _known(suffix: str) -> str:
    return suffix if suffix in SUFFIXES else SUFFIXES[0]
