"""Questions in the forms people keep them in -> drafts of samples, still without media. What all modalities share.

The student view holds the media, the teacher view the same as text. The teacher's text comes from the first of these
fields: `teacher_messages` (messages), `teacher_prompt` (text or messages), then those of the modality (`transcript`,
`text`, …: what stands for the medium; a list when there are several). A record without any is refused.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmodal_opd.types import SampleError

Message = dict[str, Any]

WHOLE = ("teacher_messages", "teacher_prompt")  # fields with all of the teacher's view
USED = {"messages", "prompt", "completion", "instruction", "answer", "solution", "meta", *WHOLE}
INLINE = "base64,"  # before the bytes of a medium that is in the record itself
LONGEST_PATH = 4096  # what Linux opens


@dataclass(frozen=True)
class Draft:
    """A sample whose media are still to be made or read."""

    where: str  # names the record in messages
    student: list[Message]
    teacher: list[Message]
    answer: str | None
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Medium:
    """How records mark one kind of medium, and where they name its files."""

    kind: str  # of our content parts; in angle brackets, its tag in text
    types: Sequence[str]  # of records' content parts
    places: Sequence[str]  # where a content part may name its file
    fields: Sequence[str]  # that list files beside the messages

    @property
    def tag(self) -> str:
        return f"<{self.kind}>"


@dataclass(frozen=True)
class Form:
    """What records of one modality may hold."""

    name: str
    media: Sequence[Medium]
    texts: Sequence[str]  # fields with what stands for the media in the teacher's view

    @property
    def kinds(self) -> str:
        return " or ".join(medium.kind for medium in self.media)


# ---- messages


def conversation(record: Mapping[str, Any], form: Form) -> list[Message]:
    """The messages up to the last user message, in content-part form; a closing answer is left out."""
    raw = record.get("messages", record.get("prompt"))
    messages = as_messages(raw, '"prompt" (text or messages) or "messages"', form)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise SampleError("its messages do not end in a user message")
    return messages


def as_messages(raw: Any, what: str, form: Form) -> list[Message]:
    """Text or messages -> messages in content-part form. Raises SampleError when it is neither."""
    raw = [{"role": "user", "content": raw}] if isinstance(raw, str) and raw.strip() else raw
    try:
        return [{"role": m["role"], "content": list(_parts(m["content"], form))} for m in raw]
    except (TypeError, KeyError):
        raise SampleError(f"it needs {what}, and has {raw!r}"[:300]) from None


def _parts(content: str | Sequence[Mapping[str, Any]], form: Form) -> Iterator[Message]:
    if isinstance(content, str):
        yield from _tagged(content, form.media)
        return
    for part in content:
        medium = next((medium for medium in form.media if part["type"] in medium.types), None)
        if part["type"] == "text":
            yield {"type": "text", "text": str(part["text"])}
        elif medium:
            named = [source for place in medium.places if (source := source_of(part.get(place)))]
            yield {"type": medium.kind, medium.kind: named[0]} if named else {"type": medium.kind}
        else:
            raise SampleError(f"a content part of type {part['type']!r} has no place in {form.name} shards")


def _tagged(text: str, media: Sequence[Medium]) -> Iterator[Message]:
    """Text cut at the tags of media."""
    if not media:
        yield from text_parts(text)
        return
    for i, piece in enumerate(text.split(media[0].tag)):
        yield from [{"type": media[0].kind}] * bool(i)
        yield from _tagged(piece, media[1:])


def text_parts(text: str) -> list[Message]:
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def media_parts(messages: Sequence[Message], kind: str | None = None) -> list[Message]:
    """The parts of one kind of medium, or of all kinds."""
    parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
    return [part for part in parts if kind in (None, part["type"])]


# ---- files


def listed(record: Mapping[str, Any], medium: Medium) -> list[str]:
    """Files named beside the messages, and bytes given there."""
    items = next((record[field] for field in medium.fields if field in record), [])
    items = [items] if isinstance(items, (str, dict)) else items
    return [item if isinstance(item, str) else source_of(item) or item["path"] for item in items]


def source_of(item: Any) -> str | None:
    """A path, an address, or bytes in base64 behind "base64,": of text, or of {"bytes", "path", "url"}."""
    if not isinstance(item, Mapping):
        return item if isinstance(item, str) else None
    if item.get("bytes"):
        return INLINE + item["bytes"]
    return next((item[name] for name in ("path", "url") if item.get(name)), None)


def opened(source: str, base: Path, kind: str) -> bytes | Path:
    """The bytes a record holds itself, or the path of its file. Raises SampleError for what is neither."""
    if source.startswith(("data:", INLINE)):
        try:
            return base64.b64decode(source.partition(INLINE)[2], validate=True)
        except ValueError as error:
            raise SampleError(f"the bytes of its {kind} are not base64 ({error})") from None
    if source.startswith(("http://", "https://")):
        raise SampleError(f"its {kind} is an address, {source}; download it and name the file")
    if len(source) > LONGEST_PATH or "\0" in source:
        raise SampleError(f"its {kind} is {len(source)} characters of text; bytes in base64 stand behind {INLINE!r}")
    return base / source.removeprefix("file://")


def read_source(source: str, base: Path, kind: str) -> bytes:
    """The bytes of a source. Raises SampleError when there are none."""
    found = opened(source, base, kind)
    try:
        data = found if isinstance(found, bytes) else found.read_bytes()
    except FileNotFoundError:
        raise SampleError(f"{kind} file {found}: no such file") from None
    except OSError as error:
        raise SampleError(f"{kind} file {found} cannot be read ({error})") from None
    if not data:
        raise SampleError(f"{kind} file {found} is empty" if isinstance(found, Path) else f"its {kind} is empty")
    return data


def take_sources(messages: list[Message], files: list[str], kind: str) -> list[str]:
    """The sources of all parts of a kind, in order: those they name, and `files` where they name none. They are taken
    out of the parts. Raises SampleError when files and places are not as many."""
    parts = media_parts(messages, kind)
    unnamed = [part for part in parts if kind not in part]
    if len(unnamed) != len(files):
        raise SampleError(f"it names {len(files)} {kind} files and has {len(unnamed)} places for them")
    for part, source in zip(unnamed, files, strict=True):
        part[kind] = source
    return [part.pop(kind) for part in parts]


# ---- the teacher


def teacher_of(record: Mapping[str, Any], student: list[Message], form: Form) -> list[Message]:
    """The view of text alone. Raises SampleError when the record has no text for it, or not one for each medium."""
    fields = (*WHOLE, *form.texts)
    field = next((name for name in fields if record.get(name)), None)
    if field is None:
        raise SampleError(f"it has no text for the teacher view; add one of {', '.join(fields)}")
    said = record[field]
    if field in WHOLE:
        messages = as_messages(said, f"text or messages in {field!r}", form)
        if found := media_parts(messages):
            raise SampleError(f"its {field!r} holds {found[0]['type']}, and the teacher reads text")
        return messages
    said, count = [said] if isinstance(said, str) else said, len(media_parts(student))
    if len(said) != count:
        raise SampleError(f"its {field!r} has {len(said)} texts for {count} {form.kinds} files")
    texts = iter(said)
    return [{**m, "content": _written(m["content"], texts)} for m in student]


def _written(parts: list[Message], texts: Iterator[str]) -> list[Message]:
    """One text part, each medium replaced by the text that stands for it."""
    return text_parts("\n".join(part["text"] if part["type"] == "text" else next(texts) for part in parts))


# ---- the rest of a record


def question_of(messages: Sequence[Message]) -> str:
    """What a judge is told was asked: the text of the last user message."""
    last = next((m for m in reversed(messages) if m["role"] == "user"), {"content": []})
    return "\n".join(part["text"] for part in last["content"] if part["type"] == "text")


def answer_of(record: Mapping[str, Any]) -> str | None:
    """`answer` or `solution`, or else `completion`, or the text of a closing assistant message. Raises SampleError for
    an answer of several."""
    answer = record.get("answer", record.get("solution"))
    if isinstance(answer, list | dict):
        raise SampleError(f"its answer is one text or number, and it has {answer!r}"[:300])
    return str(answer) if answer is not None else _closing(record)


def _closing(record: Mapping[str, Any]) -> str | None:
    messages = record.get("completion") or record.get("messages")
    if isinstance(messages, str) and record.get("completion"):
        return messages
    if not messages or isinstance(messages, str) or messages[-1].get("role") != "assistant":
        return None
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def meta_of(record: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Every field that has no other use, for filters and judges, and the closing assistant message as `response`."""
    used = USED | {*form.texts, *(field for medium in form.media for field in medium.fields)}
    rest = {name: value for name, value in record.items() if name not in used}
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
