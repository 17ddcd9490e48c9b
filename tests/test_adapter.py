"""What the adapter makes of samples, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import make_pairs, picture
from families import FAMILIES, omni

from modalities.audio.media import encode
from modalities.chat import ChatAdapter
from modalities.vision import media as sight
from xmodal_opd.hidden import inputs_on, media_tokens
from xmodal_opd.types import SampleError


def sample(media: dict[str, bytes], part: dict | None = None) -> dict:
    student = [{"role": "user", "content": [part or {"type": "audio", "audio": "q.flac"}]}]
    teacher = [{"role": "user", "content": [{"type": "text", "text": "What is two plus two?"}]}]
    return {"__key__": "k7", "views": {"student": student, "teacher": teacher}, "answer": "four", "media": media}


def tone(seconds: float, rate: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(seconds * rate)) * 0.2)).astype(np.float32)


SOUND = {"type": "audio", "audio": "q.flac"}
SIGHT = {"type": "image", "image": "q.png"}
MEDIA = {"audio": (SOUND, {"q.flac": encode(tone(1.5), 8000)}), "image": (SIGHT, {"q.png": sight.encode(picture(0))})}


@pytest.mark.parametrize("kind", MEDIA)
def test_a_sample_becomes_views_the_model_can_read(family, kind):
    _, model, processor, adapter = family
    part, media = MEDIA[kind]
    if kind not in adapter.reads:
        what = {"audio": "audio", "image": "an image"}[kind]
        with pytest.raises(SampleError, match=f"'k7' has {what}, but {type(processor).__name__} reads text.* only"):
            adapter.pair(sample(media, part))
        return
    pair = adapter.pair(sample(media, part))
    if kind == "audio":
        assert len(pair.views["student"]["audio"][0]) == 24000 and pair.answer == "four"
    batch = inputs_on(model, adapter.batch([pair.views["student"], pair.views["teacher"]]))
    assert batch["attention_mask"][:, -1].all()
    assert torch.isin(batch["input_ids"][0], torch.tensor(media_tokens(model))).sum() > 3
    assert not torch.isin(batch["input_ids"][1], torch.tensor(media_tokens(model))).any()
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("kind", MEDIA)
def test_a_view_is_at_most_as_long_as_its_bound(family, kind):
    *_, adapter = family
    if kind in adapter.reads:
        view = adapter.pair(sample(MEDIA[kind][1], MEDIA[kind][0])).views["student"]
        assert adapter.batch([view])["input_ids"].shape[1] <= adapter.size(view)


def test_media_in_the_words_of_a_question_are_refused(family):
    *_, adapter = family
    for token in adapter.placeholders:
        with pytest.raises(SampleError, match=r"'k7' has '.*' in its text, which .* would take for a medium"):
            adapter.pair(sample({}, {"type": "text", "text": f"What is {token}?"}))


def test_a_question_of_a_judge_may_quote_a_placeholder(family):
    *_, adapter = family
    quoted = adapter.text("Is it right? " + "".join(adapter.placeholders))
    assert quoted["prompt"] == adapter.text("Is it right? ")["prompt"]
    assert adapter.batch([quoted])["input_ids"].shape[1] > 5


@pytest.mark.parametrize("name", ["omni", "granite_speech", "qwen2"])
def test_what_a_template_refuses_is_a_broken_sample(tokenizer, name, monkeypatch):
    processor = FAMILIES[name].make(tokenizer)[1]
    for part in (processor, getattr(processor, "tokenizer", processor)):
        monkeypatch.setattr(part, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SampleError, match=r"'k7' cannot be laid out by .*: roles must alternate"):
        ChatAdapter(processor, 512).pair(sample({}, {"type": "text", "text": "one"}))


def test_a_kind_of_part_nobody_reads_is_refused_by_name(family):
    *_, adapter = family
    with pytest.raises(SampleError, match=r"'k7' has smell, but .* reads text.* only"):
        adapter.pair(sample({}, {"type": "smell", "smell": "q.nose"}))


@pytest.mark.parametrize(
    ("media", "part", "message"),
    [
        ({}, None, "'k7' names the audio 'q.flac', which its shard lacks \\(has: none\\)"),
        ({"q.flac": b"junk"}, None, "'k7', audio 'q.flac': "),
        ({"q.flac": encode(np.zeros(8000, np.float32), 8000)}, None, "'k7', audio 'q.flac': .*silent"),
        ({"q.flac": encode(tone(10.5), 8000)}, None, "'k7', audio 'q.flac': 10.5 s is over the model's 10.0 s"),
        (
            {},
            {"type": "text", "text": "two plus " * 400},
            "'k7' has a prompt of .* the model reads 512",
        ),
    ],
    ids=["missing", "broken", "silent", "too long", "too many tokens"],
)
def test_samples_that_cannot_be_used_are_refused_by_name(tokenizer, media, part, message):
    adapter = ChatAdapter(omni(tokenizer)[1], 512)
    with pytest.raises(SampleError, match=message):
        adapter.pair(sample(media, part))


def test_padding_is_on_the_left_and_changes_no_prompt(family):
    *_, adapter = family
    views = [p.views["student"] for p in make_pairs(adapter, 3)]
    together = adapter.batch(views)
    for row, view in enumerate(views):
        alone = adapter.batch([view])["input_ids"][0]
        assert together["input_ids"][row][together["attention_mask"][row].bool()].tolist() == alone.tolist()


def test_audio_that_grows_past_the_limit_is_refused_before_it_is_sampled_from(tokenizer):
    processor = omni(tokenizer)[1]
    pair = ChatAdapter(processor, 512).pair(sample({"q.flac": encode(tone(8.0), 8000)}))
    view = pair.views["student"]
    length = ChatAdapter(processor, 512).batch([view])["input_ids"].shape[1]
    assert length <= ChatAdapter(processor, 512).size(view)
    assert ChatAdapter(processor, length).pair(sample({"q.flac": encode(tone(8.0), 8000)})).key == "k7"
    with pytest.raises(SampleError, match=f"'k7' has a prompt of {length} tokens; the model reads {length - 1}"):
        ChatAdapter(processor, length - 1).pair(sample({"q.flac": encode(tone(8.0), 8000)}))
