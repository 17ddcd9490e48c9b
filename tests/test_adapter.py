"""What an audio adapter makes of samples, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import make_pairs

from modalities.audio.adapter import AudioAdapter
from modalities.audio.media import encode
from xmodal_opd.types import SampleError


def sample(media: dict[str, bytes], part: dict | None = None) -> dict:
    student = [{"role": "user", "content": [part or {"type": "audio", "audio": "q.flac"}]}]
    teacher = [{"role": "user", "content": [{"type": "text", "text": "What is two plus two?"}]}]
    return {"__key__": "k7", "views": {"student": student, "teacher": teacher}, "answer": "four", "media": media}


def tone(seconds: float, rate: int = 8000) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(seconds * rate)) * 0.2)).astype(np.float32)


def test_a_sample_becomes_views_the_model_can_read(family):
    name, model, processor, adapter = family
    if name == "qwen2":
        with pytest.raises(SampleError, match="'k7' has audio, but Qwen2Tokenizer reads text only"):
            adapter.pair(sample({"q.flac": encode(tone(1.5), 8000)}))
        return
    pair = adapter.pair(sample({"q.flac": encode(tone(1.5), 8000)}))
    assert len(pair.views["student"]["audio"][0]) == 24000 and pair.answer == "four"
    batch = adapter.batch([pair.views["student"], pair.views["teacher"]])
    assert (
        batch["attention_mask"][:, -1].all()
        and (batch["input_ids"][0] == processor.tokenizer.audio_token_id).sum() > 10
    )
    assert torch.isfinite(model(**batch).logits).all()


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
    from conftest import omni

    adapter = AudioAdapter(omni(tokenizer)[1], 512)
    with pytest.raises(SampleError, match=message):
        adapter.pair(sample(media, part))


def test_padding_is_on_the_left_and_changes_no_prompt(family):
    name, _, _, adapter = family
    views = [p.views["student"] for p in make_pairs(adapter, 3, audio=name != "qwen2")]
    together = adapter.batch(views)
    for row, view in enumerate(views):
        alone = adapter.batch([view])["input_ids"][0]
        assert together["input_ids"][row][together["attention_mask"][row].bool()].tolist() == alone.tolist()


def test_audio_that_grows_past_the_limit_is_refused_before_it_is_sampled_from(tokenizer):
    from conftest import omni

    processor = omni(tokenizer)[1]
    pair = AudioAdapter(processor, 512).pair(sample({"q.flac": encode(tone(8.0), 8000)}))
    view = pair.views["student"]
    length = AudioAdapter(processor, 512).batch([view])["input_ids"].shape[1]
    assert length <= AudioAdapter(processor, 512).size(view)
    assert AudioAdapter(processor, length).pair(sample({"q.flac": encode(tone(8.0), 8000)})).key == "k7"
    with pytest.raises(SampleError, match=f"'k7' has a prompt of {length} tokens; the model reads {length - 1}"):
        AudioAdapter(processor, length - 1).pair(sample({"q.flac": encode(tone(8.0), 8000)}))
