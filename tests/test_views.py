"""Views that are made of the student's, and how large a model sees its images."""

import numpy as np
import pytest
import torch
from conftest import noise, picture
from families import FAMILIES
from PIL import Image

from modalities.audio import media as sound
from modalities.chat import DERIVED, ChatAdapter
from modalities.families import limit_pixels
from modalities.vision import media as sight
from xmodal_opd import config
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.models import load_processor

SCALING = ["omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl"]  # families whose processors have bounds in pixels
BIG = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))


def asked(adapter: ChatAdapter, *more: str) -> dict:
    """A sample with a clip and an image, as far as the model reads them, and with further views in words."""
    media = {"q.flac": sound.encode(noise(0), 16000), "q.png": sight.encode(picture(0))}
    kinds = {"audio": "q.flac", "image": "q.png"}
    parts = [{"type": kind, kind: file} for kind, file in kinds.items() if kind in adapter.reads]
    words = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    views = {"student": [{"role": "user", "content": [*parts, *words[0]["content"]]}]}
    return {"__key__": "k", "views": views | dict.fromkeys(more, words), "media": media}


def seen(adapter: ChatAdapter, image: Image.Image):
    return adapter.laid_out("k", [{"role": "user", "content": [{"type": "image"}]}], images=[image])


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_view_has_the_students_tokens_over_other_media(family, name):
    _, model, processor, _ = family
    adapter = ChatAdapter(processor, 1024, derive=[name])
    pair = adapter.pair(asked(adapter))
    ours, theirs = (adapter.batch([pair.views[view]]) for view in ("student", name))
    assert ours.keys() == theirs.keys() and torch.equal(ours["input_ids"], theirs["input_ids"])
    features = [kind for kind, value in ours.items() if value.is_floating_point()]
    assert all(ours[f].shape == theirs[f].shape and not torch.equal(ours[f], theirs[f]) for f in features)
    assert bool(features) == (adapter.reads != ["text"])
    with torch.no_grad():
        ends = [model(**batch).logits[0, -1] for batch in (ours, theirs)]
    assert torch.isfinite(ends[1]).all() and (not features or not torch.equal(*ends))
    again = ChatAdapter(processor, 1024, derive=[name]).pair(asked(adapter)).views[name]
    assert all(torch.equal(theirs[f], adapter.batch([again])[f]) for f in features)


def test_a_view_that_the_shard_has_is_the_one_used(family):
    *_, processor, _ = family
    adapter = ChatAdapter(processor, 1024, derive=["blank", "degraded"])
    pair = adapter.pair(asked(adapter, "blank"))
    assert not pair.views["blank"]["audio"] and not pair.views["blank"]["images"]
    assert len(pair.views["degraded"]["images"]) == len(pair.views["student"]["images"])


def test_a_blank_image_is_grey_and_a_degraded_one_a_tenth_as_sharp():
    assert {sight.blank(picture(2)).size, sight.degraded(picture(2)).size} == {picture(2).size}
    assert sight.blank(picture(2)).getcolors() == [(90 * 76, (128, 128, 128))]
    coarse = np.asarray(sight.degraded(picture(0)))
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) <= 6 * 9 and sight.degraded(Image.new("RGB", (5, 3))).size
    assert abs(coarse.mean() - np.asarray(picture(0)).mean()) < 5


def test_a_blank_clip_is_silent_and_a_degraded_one_keeps_what_is_low():
    low, high = (np.sin(2 * np.pi * f * np.arange(16005) / 16000).astype(np.float32) for f in (200, 5000))
    assert not sound.blank(low).any() and len(sound.blank(low)) == len(sound.degraded(low)) == 16005
    assert np.abs(sound.degraded(low) - low).mean() < 0.3 and np.abs(sound.degraded(high)).mean() < 0.02


def test_shards_need_not_hold_what_can_be_derived(world):
    recipe = config.load(world["recipe"], ["objective.tokens.teacher.view=degraded"])
    parts = build(recipe)
    pair = next(pair for _, pair in open_shards(recipe)[0].pairs(parts.adapter))
    assert {*pair.views} == {"student", "teacher", "degraded"}


@pytest.mark.parametrize("name", SCALING)
def test_images_are_scaled_to_the_bounds_of_the_recipe(tokenizer, tmp_path, name):
    processor = FAMILIES[name].make(tokenizer)[1]
    adapter = ChatAdapter(processor, 4096)
    lengths = []
    for bounds in ((None, 60 * 60), (200 * 200, 200 * 200)):
        limit_pixels(processor, *bounds)
        view = seen(adapter, BIG)
        batch = adapter.batch([view])
        pixels = int(batch["image_grid_thw"][0].prod()) * processor.image_processor.patch_size**2
        assert pixels <= bounds[1] if bounds[0] is None else abs(pixels / bounds[1] - 1) < 0.3
        assert batch["input_ids"].shape[1] <= adapter.size(view)
        lengths.append(batch["input_ids"].shape[1])
    assert 3 * lengths[0] < lengths[1]
    processor.save_pretrained(tmp_path)
    again = ChatAdapter(load_processor(str(tmp_path)), 4096)
    assert torch.equal(again.batch([seen(again, BIG)])["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("name, reason", [("smolvlm", "a rule of its own"), ("gemma3n", "own"), ("qwen2", "no images")])
def test_bounds_that_a_processor_does_not_have_are_refused(tokenizer, name, reason):
    with pytest.raises(ValueError, match=f"{reason}, so model.min_pixels and model.max_pixels have no meaning"):
        limit_pixels(FAMILIES[name].make(tokenizer)[1], None, 5000)


def test_a_recipe_bounds_its_images_and_the_bounds_must_leave_something(world):
    parts = build(config.load(world["recipe"], ["model.max_pixels=6000"]))
    assert parts.processor.image_processor.size["longest_edge"] == 6000
    with pytest.raises(ValueError, match="at least 3,136 and at most 100 pixels"):
        build(config.load(world["recipe"], ["model.max_pixels=100"]))
