"""What the small default model learns of pictures once it has learnt to hear (see `tools/build_tiny.py`): where words
stand on a page, to read, the questions in text, and to answer by sight. The pictures it meets here are straight, sharp
and in five typefaces; those of a recipe are turned, blurred, grainy, and in others. That, and how few they are, is the
gap.

The audio encoder and the embeddings of tokens it hears rest throughout, and spoken questions come along, so that
hearing stays as it was.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from modalities.tasks import questions
from modalities.vision.draw import LINE, MARGIN, SIZES, font, wrap
from modalities.vision.tasks import scenes
from tools.tiny.lessons import aligned, answer_loss, example, fit
from tools.tiny.media import clips, moved, pictures, printed

SEEN = ("rendered", "digits", "geometry", "rendered", "digits", "charts", "geometry")
READS = (
    "rendered",
    "charts",
    "rendered",
    "digits",
)  # what is drawn as text or in columns of it; figures have no order of reading


def looked(adapter, scene, image: Any = None):
    """(view, answer ids) of a scene: in text, or as a picture and what is asked beside it."""
    text = {"type": "text", "text": scene.question if image is None else scene.prompt}
    parts = [text] if image is None else [{"type": "image"}, *([text] if scene.prompt else [])]
    view = adapter.laid_out(scene.instance, [{"role": "user", "content": parts}], [], [] if image is None else [image])
    return view, [*adapter.tokenizer(scene.response)["input_ids"], adapter.tokenizer.eos_token_id]


# ---- lessons


def learn_scenes(model, adapter, seed: int) -> None:
    """All scenes in text, what is new among them more often."""
    learn_text_of(model, adapter, seed, ("charts", "geometry", "rendered", "charts", "geometry", "digits"), 800)


def learn_figures(model, adapter, seed: int) -> None:
    """More of what is hard in text."""
    learn_text_of(model, adapter, seed + 20, ("charts", "charts", "geometry", "digits"), 600)


def learn_charts(model, adapter, seed: int) -> None:
    """And of what is hardest: which of several values is asked for."""
    learn_text_of(model, adapter, seed + 30, ("charts", "charts", "charts", "geometry"), 500, rate=2e-3)


def learn_text_of(model, adapter, seed: int, families: Sequence[str], steps: int, rate: float = 1.5e-3) -> None:
    """The language model on the text of scenes, with written and spoken questions of before among them. Embeddings of
    tokens that those are made of rest, as what the encoders say is said in them."""
    freeze(model, ("visual", "audio_tower"))
    heard, stream = clips("train", seed + 3, 2400), scenes(seed, "train", families)
    rng, old = random.Random(seed), written(seed + 5)
    table = model.get_input_embeddings().weight
    known, before = known_tokens(adapter, seed), table.detach().clone()

    def loss():
        with torch.no_grad():
            table[known] = before[known]
        some = [looked(adapter, next(stream)) for _ in range(36)] + [example(adapter, next(old)) for _ in range(6)]
        spoken = [example(adapter, question, wave) for question, wave in rng.sample(heard, 8)]
        return 0.8 * answer_loss(model, adapter, some) + 0.2 * answer_loss(model, adapter, spoken)

    fit(model, loss, steps, rate, "scenes")
    with torch.no_grad():
        table[known] = before[known]


def known_tokens(adapter, seed: int) -> list[int]:
    """Tokens of the questions of before, and those of special meaning."""
    asked = itertools.islice(written(seed), 5000)
    texts = [text for question in asked for text in (question.prompt, question.response)]
    seen = {token for ids in adapter.tokenizer(texts)["input_ids"] for token in ids}
    return sorted(
        seen | set(adapter.tokenizer.all_special_ids) | set(adapter.tokenizer("user\nassistant")["input_ids"])
    )


def learn_words(model, adapter, seed: int) -> None:
    """The vision encoder alone: each image token is the token of text that is drawn there, or the padding token."""
    blank = adapter.tokenizer.pad_token_id
    drawn = pictures(seed + 10, "train", 6000, ("rendered",), printed)
    seen = [(image, placed(adapter.tokenizer, *job)) for *job, image in drawn]
    seen = [(image, [blank if token is None else token for token in tokens]) for image, tokens in seen if tokens]
    rng = random.Random(seed)

    def loss():
        some = rng.sample(seen, 32)
        logits, _ = sighted(model, adapter, [moved(image, rng) for image, _ in some])
        return cross_entropy(logits, torch.tensor([token for _, tokens in some for token in tokens]))

    fit(model.visual, loss, 1200, 2e-3, "words")


def learn_to_read(model, adapter, seed: int) -> None:
    read(model, adapter, seed + 11, 4000, 800)


def learn_to_read_well(model, adapter, seed: int) -> None:
    """The same on other pictures, from the full rate again."""
    read(model, adapter, seed + 13, 5000, 1300)


def read(model, adapter, seed: int, count: int, steps: int) -> None:
    """The vision encoder alone, by CTC onto the language model's token embeddings, as the audio encoder learnt to hear:
    a page row by row, a chart column by column."""
    drawn = pictures(seed, "train", count, READS)
    seen = [(image, adapter.tokenizer(scene.shown)["input_ids"], scene.task == "charts") for scene, _, image in drawn]
    rng = random.Random(seed)

    def loss():
        some = rng.sample(seen, 32)
        logits, grids = sighted(model, adapter, [moved(image, rng) for image, *_ in some])
        pages = logits.split([rows * columns for rows, columns in grids])
        turned = [
            page.view(*grid, -1).transpose(0, 1).flatten(0, 1) if columns else page
            for page, grid, (_, _, columns) in zip(pages, grids, some, strict=True)
        ]
        return aligned(turned, [ids for _, ids, _ in some], adapter.tokenizer.pad_token_id)

    fit(model.visual, loss, steps, 1.5e-3, "reading")


def learn_to_look(model, adapter, seed: int) -> None:
    """Pictures with their answers, and among them scenes in text and spoken and written questions of before."""
    freeze(model, ("audio_tower", "embed_tokens"))
    seen, heard = pictures(seed + 12, "train", 3000, SEEN), clips("train", seed + 3, 2400)
    rng, stream, old = random.Random(seed), scenes(seed + 6, "train", SEEN), written(seed + 7)

    def loss():
        by_sight = [looked(adapter, scene, moved(image, rng)) for scene, _, image in rng.sample(seen, 24)]
        text = [looked(adapter, next(stream)) for _ in range(8)] + [example(adapter, next(old)) for _ in range(4)]
        spoken = [example(adapter, question, wave) for question, wave in rng.sample(heard, 6)]
        parts = ((0.6, by_sight), (0.2, text), (0.2, spoken))
        return sum(share * answer_loss(model, adapter, some) for share, some in parts)

    fit(model, loss, 350, 1e-3, "looking")


def freeze(model, parts: Sequence[str]) -> None:
    """Let all train but what has one of these words in its name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))


def written(seed: int):
    return questions(seed, "train")


def sighted(model, adapter, images: list) -> tuple[Any, list[tuple[int, int]]]:
    """Logits [tokens of all images, vocabulary] of what each image token is nearest to; rows and columns of each."""
    inputs = adapter.processor.image_processor(images=images, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        states = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        states = torch.cat(list(states)) if isinstance(states, (tuple, list)) else states
        logits = states @ model.get_input_embeddings().weight.detach().T
    return logits.float(), [(rows // 2, columns // 2) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def placed(tokenizer, scene, look) -> list[int | None] | None:
    """For each image token of a page, the token of its text that is drawn there, in order; None where two would be."""
    width, height = SIZES["text"]
    across, text, face = width // LINE, scene.picture["text"], font(look.font, look.size)
    out: list[int | None] = [None] * (across * height // LINE)
    encoded = tokenizer(text, return_offsets_mapping=True)
    starts = [0, *itertools.accumulate(len(line) + 1 for line in wrap(text, face, width - 2 * MARGIN).split("\n"))]
    cell = -1
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        begin += text[begin] == " "
        row = max(i for i, start in enumerate(starts) if start <= begin)
        left, right = (face.getlength(text[starts[row] : place]) for place in (begin, end))
        column = min(int((MARGIN + (left + right) / 2) // LINE), across - 1)
        cell = max(row * across + column, cell + 1)
        if cell >= len(out):
            return None
        out[cell] = token
    return out
