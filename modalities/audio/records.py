"""Questions in the forms people keep them in -> drafts of samples, still without audio.

The student view holds the audio, the teacher view the same as text. The teacher's text comes from the first of these
fields: `teacher_messages` (messages), `teacher_prompt` (text or messages), `transcript` or `text` (what is said in the
audio; a list when there are several). A record without any is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modalities.tasks import Question
from xmodal_opd.types import SampleError

Message = dict[str, Any]

TAG = "<audio>"
PLACES = ("audio", "audio_url", "path", "url")  # where a content part may name its file
TEXTS = ("teacher_messages", "teacher_prompt", "transcript", "text")
USED = {"messages", "prompt", "completion", "instruction", "audio", "audios", "answer", "solution", "meta", *TEXTS}


@dataclass(frozen=True)
class Draft:
    """A sample whose audio is still to be spoken (`speech`) or read (`audio`, paths as the record gave them)."""

    where: str  # names the record in messages
    student: list[Message]
    teacher: list[Message]
    answer: str | None
    meta: Mapping[str, Any]
    speech: str = ""
    audio: Sequence[str] = ()


def file_name(number: int) -> str:
    """Name of a sample's audio file, counted from 0."""
    return f"question{number + 1 if number else ''}.flac"


# ---- sources


def task_draft(question: Question, split: str, instruction: str = "") -> Draft:
    """A built-in question to be spoken."""
    meta = {"task": question.task, "instance": question.instance, "response": question.response, "split": split}
    return _spoken("tasks", [], question.prompt, instruction, question.answer, meta)


def text_draft(record: Mapping[str, Any], where: str, instruction: str = "") -> Draft:
    """A written question (`prompt`: text or messages; or `messages`) whose last user message is to be spoken."""
    *before, last = conversation(record)
    if any(part["type"] == "audio" for message in [*before, last] for part in message["content"]):
        raise SampleError("it has audio already; prepare it as audio, not as text")
    prompt = "\n".join(part["text"] for part in last["content"])
    instruction = record.get("instruction") or instruction
    return _spoken(where, before, prompt, instruction, answer_of(record), meta_of(record))


def _spoken(
    where: str, before: list[Message], prompt: str, instruction: str, answer: str | None, meta: Mapping[str, Any]
) -> Draft:
    student = [{"type": "audio", "audio": file_name(0)}, *_text(instruction)]
    question = "\n".join(filter(None, (prompt, instruction)))
    teacher = _text(question)
    hears, reads = ([*before, {"role": "user", "content": content}] for content in (student, teacher))
    return Draft(where, hears, reads, answer, {"question": question, **meta}, speech=prompt)


def audio_draft(record: Mapping[str, Any], where: str, instruction: str = "") -> Draft:
    """A question with recorded audio: messages whose parts name files (TRL), or `messages` with <audio> tags and
    `audios` (ms-swift), or just `audio`."""
    instruction = record.get("instruction") or instruction
    bare = "messages" not in record and "prompt" not in record
    messages = [{"role": "user", "content": [{"type": "audio"}]}] if bare else conversation(record)
    messages[-1]["content"] += _text(instruction)
    student, audio = _name_files(messages, _listed(record))
    teacher = _teacher(record, student, len(audio))
    meta = {"question": question_of(teacher), **meta_of(record)}
    return Draft(where, student, teacher, answer_of(record), meta, audio=audio)


# ---- messages


def conversation(record: Mapping[str, Any]) -> list[Message]:
    """The messages up to the last user message, in content-part form; a closing answer is left out."""
    raw = record.get("messages", record.get("prompt"))
    messages = as_messages(raw, '"prompt" (text or messages) or "messages"')
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise SampleError("its messages do not end in a user message")
    return messages


def as_messages(raw: Any, what: str) -> list[Message]:
    """Text or messages -> messages in content-part form. Raises SampleError when it is neither."""
    raw = [{"role": "user", "content": raw}] if isinstance(raw, str) and raw.strip() else raw
    try:
        return [{"role": m["role"], "content": list(_parts(m["content"]))} for m in raw]
    except (TypeError, KeyError):
        raise SampleError(f"it needs {what}, and has {raw!r}"[:300]) from None


def _parts(content: str | Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    if isinstance(content, str):
        for i, text in enumerate(content.split(TAG)):
            yield from [{"type": "audio"}] * bool(i) + _text(text)
        return
    for part in content:
        if part["type"] == "text":
            yield {"type": "text", "text": str(part["text"])}
        elif part["type"] in ("audio", "input_audio"):
            named = [part[place] for place in PLACES if isinstance(part.get(place), str)]
            yield {"type": "audio", "audio": named[0]} if named else {"type": "audio"}
        else:
            raise SampleError(f"a content part of type {part['type']!r} has no place in audio shards")


def _text(text: str) -> list[Message]:
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def _listed(record: Mapping[str, Any]) -> list[str]:
    """Files named beside the messages."""
    audio = record.get("audios", record.get("audio", []))
    audio = [audio] if isinstance(audio, (str, dict)) else audio
    return [a["path"] if isinstance(a, dict) else a for a in audio]


def _name_files(messages: list[Message], listed: list[str]) -> tuple[list[Message], list[str]]:
    """(messages whose audio parts name the sample's own files, the paths these come from)."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "audio"]
    unnamed = [part for part in parts if "audio" not in part]
    if len(unnamed) != len(listed) or not parts:
        raise SampleError(f"it names {len(listed)} audio files and has {len(unnamed)} places for them")
    for part, path in zip(unnamed, listed, strict=True):
        part["audio"] = path
    paths = [part["audio"] for part in parts]
    for i, part in enumerate(parts):
        part["audio"] = file_name(i)
    return messages, paths


def _teacher(record: Mapping[str, Any], student: list[Message], count: int) -> list[Message]:
    field = next((name for name in TEXTS if record.get(name)), None)
    if field is None:
        raise SampleError(f"it has no text for the teacher view; add one of {', '.join(TEXTS)}")
    said = record[field]
    if field.startswith("teacher"):
        messages = as_messages(said, f"text or messages in {field!r}")
        if any(part["type"] == "audio" for message in messages for part in message["content"]):
            raise SampleError(f"its {field!r} holds audio, and the teacher reads text")
        return messages
    said = [said] if isinstance(said, str) else said
    if len(said) != count:
        raise SampleError(f"its {field!r} has {len(said)} texts for {count} audio files")
    texts = iter(said)
    return [{**m, "content": _written(m["content"], texts)} for m in student]


def _written(parts: list[Message], texts: Iterator[str]) -> list[Message]:
    """One text part, each audio replaced by what is said in it."""
    return _text("\n".join(next(texts) if part["type"] == "audio" else part["text"] for part in parts))


# ---- the rest of a record


def question_of(messages: Sequence[Message]) -> str:
    """What a judge is told was asked: the text of the last user message."""
    last = next((m for m in reversed(messages) if m["role"] == "user"), {"content": []})
    return "\n".join(part["text"] for part in last["content"] if part["type"] == "text")


def answer_of(record: Mapping[str, Any]) -> str | None:
    """`answer` or `solution`, or else `completion`, or the text of a closing assistant message."""
    answer = record.get("answer", record.get("solution"))
    return str(answer) if answer is not None else _closing(record)


def _closing(record: Mapping[str, Any]) -> str | None:
    messages = record.get("completion") or record.get("messages")
    if isinstance(messages, str) and record.get("completion"):
        return messages
    if not messages or isinstance(messages, str) or messages[-1].get("role") != "assistant":
        return None
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def meta_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every field that has no other use, for filters and judges, and the closing assistant message as `response`."""
    rest = {name: value for name, value in record.items() if name not in USED}
    closing = _closing(record)
    return {**rest, **({"response": closing} if closing else {}), **(record.get("meta") or {})}


def read_lines(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """(where, record or what is wrong with the line) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at a U+2028 inside a string
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            record = json.loads(line)
            yield where, record if isinstance(record, dict) else "it is not a JSON object"
        except ValueError as error:
            yield where, f"it is not JSON ({error})"
