"""Questions to be spoken, and recordings, as drafts of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from modalities.tasks import Question
from xmodal_opd.types import SampleError

AUDIO = Medium("audio", ("audio", "input_audio"), ("audio", "audio_url", "path", "url"), ("audios", "audio"))
FORM = Form("audio", [AUDIO], ("transcript", "text"))  # what is said in the audio


@dataclass(frozen=True)
class Spoken(Draft):
    """A draft whose audio is to be spoken (`speech`) or read (`audio`, as the record gave them)."""

    speech: str = ""
    audio: Sequence[str] = ()


def file_name(number: int) -> str:
    """Name of a sample's audio file, counted from 0."""
    return f"question{number + 1 if number else ''}.flac"


def task_draft(question: Question, split: str, instruction: str = "") -> Spoken:
    """A built-in question to be spoken."""
    meta = {"task": question.task, "instance": question.instance, "response": question.response, "split": split}
    return _spoken("tasks", [], question.prompt, instruction, question.answer, meta)


def text_draft(record: Mapping[str, Any], where: str, instruction: str = "") -> Spoken:
    """A written question (`prompt`: text or messages; or `messages`) whose last user message is to be spoken."""
    *before, last = conversation(record, FORM)
    if media_parts([*before, last]):
        raise SampleError("it has audio already; prepare it as audio, not as text")
    prompt = "\n".join(part["text"] for part in last["content"])
    instruction = record.get("instruction") or instruction
    return _spoken(where, before, prompt, instruction, answer_of(record), meta_of(record, FORM))


def _spoken(
    where: str, before: list[Message], prompt: str, instruction: str, answer: str | None, meta: Mapping[str, Any]
) -> Spoken:
    student = [{"type": "audio", "audio": file_name(0)}, *text_parts(instruction)]
    question = "\n".join(filter(None, (prompt, instruction)))
    teacher = text_parts(question)
    hears, reads = ([*before, {"role": "user", "content": content}] for content in (student, teacher))
    return Spoken(where, hears, reads, answer, {"question": question, **meta}, speech=prompt)


def audio_draft(record: Mapping[str, Any], where: str, instruction: str = "") -> Spoken:
    """A question with recorded audio: messages whose parts name files (TRL), or `messages` with <audio> tags and
    `audios` (ms-swift), or just `audio`."""
    instruction = record.get("instruction") or instruction
    bare = "messages" not in record and "prompt" not in record
    student = [{"role": "user", "content": [{"type": "audio"}]}] if bare else conversation(record, FORM)
    student[-1]["content"] += text_parts(instruction)
    audio = take_sources(student, listed(record, AUDIO), "audio")
    if not audio:
        raise SampleError("it names 0 audio files and has 0 places for them")
    for i, part in enumerate(media_parts(student)):
        part["audio"] = file_name(i)
    teacher = teacher_of(record, student, FORM)
    meta = {"question": question_of(teacher), **meta_of(record, FORM)}
    return Spoken(where, student, teacher, answer_of(record), meta, audio=audio)
