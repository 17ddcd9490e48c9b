"""Image-question benchmarks as they come from a hub -> samples as shards have them.

Field names and forms: MathVista (arXiv:2310.02255, the data format of its README), MathVerse (2403.14624, testmini),
MMStar (2403.20330), MMMU (2311.16502, its parquet files), ChartQA (2203.10244: its repository's JSON, and the two
parquet forms of hubs). Where a benchmark ships the whole prompt (MathVista `query`, MathVerse `query_wo`) that is what
is asked; the one-line instructions below are our own wording.

A sample has the view `student`; its `meta` holds what is scored: `task` (the benchmark's own category) and `doc`.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from modalities.records import opened, source_of
from modalities.rows import Row, rows
from xmodal_opd.types import SampleError

LETTER = "Answer with the letter of the right option."
TAG = re.compile(r"<image (\d+)>")
MMMU_IMAGES = range(1, 8)
HUMAN = ("human", "augmented")  # of ChartQA, as `human_or_machine` numbers them


@dataclass(frozen=True)
class Item:
    """One question: `<image N>` in the text stands for images[N], and images without a place come first."""

    text: str
    images: Mapping[int, Any]  # {"bytes", "path"} as parquet has it, bytes, or a path
    answer: Any
    task: str
    doc: Mapping[str, Any] = field(default_factory=dict)  # what scoring needs, besides key and answer


@dataclass(frozen=True)
class Layout:
    """How one benchmark writes a question down."""

    item: Callable[[Row], Item]
    needs: Sequence[tuple[str, ...]]  # every record has a field of each group
    key: str | None = None  # the field that names a question; default: its place in the file
    folders: Sequence[str] = ()  # where images may be that are named beside the file


def mathvista(row: Row) -> Item:
    fields = row.fields
    doc = {name: fields.get(name) for name in ("question_type", "answer_type", "precision")}
    choices = [str(choice) for choice in fields.get("choices") or []]
    refuse_no_options(fields["question_type"] == "multi_choice", choices)
    doc |= {"choices": choices, "query": fields["query"]}
    image = fields.get("decoded_image") or fields["image"]
    return Item(fields["query"], {1: image}, fields["answer"], str(fields["metadata"]["task"]), doc)


def refuse_no_options(choice: bool, options: Sequence[str]) -> None:
    if choice and not 1 < len(options) <= len(ascii_uppercase):
        raise SampleError(f"it asks for a choice among {len(options)} options")


def mathverse(row: Row) -> Item:
    """The version "Text Only" has no image."""
    fields = row.fields
    images = {1: fields["image"]} if fields.get("image") else {}
    doc = {"question_type": fields["question_type"], "question": fields.get("question_for_eval") or fields["question"]}
    return Item(fields["query_wo"], images, fields["answer"], str(fields["problem_version"]), doc)


def mmstar(row: Row) -> Item:
    """The options are in the question."""
    fields = row.fields
    return Item(f"{fields['question']}\n{LETTER}", {1: fields["image"]}, fields["answer"], str(fields["category"]))


def mmmu(row: Row) -> Item:
    """`options` is a list, or a list written as text; the subject is in the id: validation_Accounting_1."""
    fields = row.fields
    options = [str(option) for option in listed(fields["options"])]
    choice = fields["question_type"] == "multiple-choice"
    refuse_no_options(choice, options)
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    how = LETTER if choice else "Answer with a word, a number or a short phrase."
    text = "\n".join([str(fields["question"]), *(lines if choice else []), how])
    images = {n: image for n in MMMU_IMAGES if (image := fields.get(f"image_{n}"))}
    subject = "_".join(str(fields["id"]).split("_")[1:-1])
    doc = {"question_type": fields["question_type"], "options": options, "id": str(fields["id"])}
    return Item(text, images, None if fields["answer"] == "?" else answers(fields["answer"]), subject or "all", doc)


def chartqa(row: Row) -> Item:
    """The fields have other names in the repository and in each hub form; so has who wrote the question."""
    fields = row.fields
    question, answer = (next(fields[n] for n in names if n in fields) for names in CHARTQA[:2])
    text = f"{question}\nAnswer with a word or a number."
    return Item(text, {1: fields.get("image") or fields["imgname"]}, answer, chartqa_split(row))


def chartqa_split(row: Row) -> str:
    """Who wrote the question; in the repository's JSON the file's name tells."""
    told = row.fields.get("human_or_machine", row.fields.get("type", row.file.stem))
    if isinstance(told, int):
        return HUMAN[told]
    return next((name for name in HUMAN if name in told), "augmented" if "machine" in told else "all")


CHARTQA = (("query", "question"), ("label", "answer"), ("image", "imgname"))
LAYOUTS: dict[str, Layout] = {
    "mathvista": Layout(
        mathvista,
        (("pid",), ("query",), ("decoded_image", "image"), ("question_type",), ("answer_type",), ("metadata",)),
        key="pid",
    ),
    "mathverse": Layout(
        mathverse,
        (("sample_index",), ("query_wo",), ("question",), ("question_type",), ("problem_version",)),
        key="sample_index",
        folders=("images",),
    ),
    "mmstar": Layout(mmstar, (("index",), ("question",), ("image",), ("answer",), ("category",)), key="index"),
    "mmmu": Layout(mmmu, (("id",), ("question",), ("options",), ("question_type",), ("image_1",)), key="id"),
    "chartqa": Layout(chartqa, CHARTQA, folders=("png",)),
}


def questions(name: str, files: Sequence[Path]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, how to read its sample) of every record. Reading one raises SampleError for a record that is of no use.

    Raises ValueError when the first record is not of this layout, and for a key that comes twice.
    """
    layout, keys = LAYOUTS[name], set[str]()
    for row in rows(files):
        if not keys:
            refuse_another(name, row)
        key = f"{row.file.stem}:{row.number}" if layout.key is None else str(row.fields.get(layout.key, row.where))
        if key in keys:
            raise ValueError(f"{row.where} has the {layout.key} {key!r}, which was there before; name each file once")
        keys.add(key)
        yield key, partial(sample, layout, key, row)
    if not keys:
        raise ValueError(f"there is no record in {', '.join(map(str, files))}")


def refuse_another(name: str, row: Row) -> None:
    """Raises ValueError when a record lacks a field of its layout, naming the layouts it would fit."""
    lacking = [group for group in LAYOUTS[name].needs if not any(field in row.fields for field in group)]
    if lacking:
        fits = [other for other, layout in LAYOUTS.items() if all(set(g) & row.fields.keys() for g in layout.needs)]
        hint = f"it is of the layout {' or '.join(fits)}" if fits else f"layouts: {', '.join(LAYOUTS)}"
        raise ValueError(
            f"{row.where} has no {' or '.join(map(repr, lacking[0]))}, as {name} has "
            f"(has: {', '.join(row.fields)}); {hint}"
        )


def sample(layout: Layout, key: str, row: Row) -> dict[str, Any]:
    """A record in the form of a shard's sample. Raises SampleError naming the record."""
    try:
        item = layout.item(row)
        media = {f"image_{n}": data(image, row.file, layout.folders) for n, image in item.images.items()}
        parts = content(item.text, media)
    except SampleError as error:
        raise SampleError(f"{row.where}: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise SampleError(f"{row.where} cannot be read: {what} (has: {', '.join(row.fields)})") from None
    if item.answer is None or item.answer in ("", []):
        raise SampleError(f"{row.where} has no answer; of many benchmarks' test splits none are published")
    asked = "".join(part.get("text", "") for part in parts).strip()
    views = {"student": [{"role": "user", "content": parts}]}
    meta = {"task": item.task, "question": asked, "doc": {**item.doc, "key": key, "answer": item.answer}}
    return {"__key__": key, "views": views, "answer": shown(item.answer), "meta": meta, "media": media}


def content(text: str, media: Mapping[str, bytes]) -> list[dict[str, str]]:
    """Text and images as content parts: an image stands at its first tag, or first of all; later tags become words."""
    parts, end, placed = [], 0, set[str]()
    for tag in TAG.finditer(text):
        name = f"image_{tag[1]}"
        if name not in media:
            raise SampleError(f"its text speaks of {tag[0]}, which it does not have")
        parts += words(text[end : tag.start()])
        parts += words(f"(image {tag[1]})") if name in placed else [{"type": "image", "image": name}]
        placed.add(name)
        end = tag.end()
    first = [{"type": "image", "image": name} for name in media if name not in placed]
    return first + parts + words(text[end:])


def words(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text.strip() else []


def data(image: Any, file: Path, folders: Sequence[str]) -> bytes:
    """The bytes of an image file in any of the forms it is kept in. A path is one beside the records, and inside; it
    may be a link to elsewhere, as all files of a hub's cache are."""
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
        image = image["bytes"]
    if isinstance(image, bytes):
        return image
    source, root = source_of(image), file.parent.absolute()
    if not source:
        raise SampleError("it has no image")
    if isinstance(held := opened(source, root, "image"), bytes):
        return held
    places = [Path(os.path.normpath(root / folder / source)) for folder in ("", *folders)]
    found = next((place for place in places if place.is_relative_to(root) and place.is_file()), None)
    if found is None:
        raise SampleError(f"its image {source!r} is not beside it: no {' and no '.join(map(str, places))}")
    return found.read_bytes()


def listed(value: Any) -> list[Any]:
    """A list, also where it is written as text. Raises ValueError for anything else."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except SyntaxError:
        value = None
    if not isinstance(value, list):
        raise ValueError("its list of options is none")
    return value


def answers(value: Any) -> Any:
    """Several right answers are a list of texts, maybe written as text; "[0, 1)" and [0, 1] are one answer."""
    try:
        found = listed(value)
    except ValueError:
        return value
    return found if all(isinstance(one, str) for one in found) else value


def shown(answer: Any) -> str:
    return " | ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
