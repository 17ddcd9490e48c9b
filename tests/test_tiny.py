"""The tools that build the models in the package run from nothing to a folder that loads; of every lesson one step."""

from contextlib import nullcontext

import pytest
import torch

from modalities.action.environment import AssetError
from modalities.action.metaworld import MetaWorld
from tools import build_tiny
from tools.tiny import acting, hearing, lessons, media, sight
from xmodal_opd.models import load_model, load_processor


def brief(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every lesson one step long, on a handful of examples. Returns the names of the fits that ran, as they run."""
    fits: list[str] = []

    def fit(model, loss_of, steps, rate, name, **options):
        fits.append(name)
        lessons.fit(model, loss_of, 1, rate, name, **options)

    for module in (hearing, sight, acting):
        monkeypatch.setattr(module, "fit", fit)
    few = lambda count: min(32, count // 40)  # noqa: E731 (300 that measure, thousands that teach)
    clips, pictures = media.clips, media.pictures
    few_clips = lambda split, seed, count, **options: clips(split, seed, few(count), **options)  # noqa: E731
    few_pictures = lambda seed, split, count, *rest: pictures(seed, split, few(count), *rest)  # noqa: E731
    for module in (hearing, sight, media):
        monkeypatch.setattr(module, "clips", few_clips)
    for module in (sight, media):
        monkeypatch.setattr(module, "pictures", few_pictures)
    for name in ("MANY", "FEW", "TWO", "WANDERINGS"):
        monkeypatch.setattr(acting, name, 1)
    return fits


@pytest.mark.slow
def test_the_model_that_hears_and_sees_is_built_from_nothing_and_goes_on(tmp_path, monkeypatch, capsys):
    fits = brief(monkeypatch)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # bfloat16 is slow on some
    build_tiny.build(tmp_path / "model", tmp_path / "work", 0, None)
    assert len(fits) == len(build_tiny.lessons(from_base=False)) == len(list((tmp_path / "work").glob("*.pt")))
    model, processor = load_model(str(tmp_path / "model")), load_processor(str(tmp_path / "model"))
    assert sum(p.numel() for p in model.parameters()) > 4e6
    assert processor.tokenizer.decode(processor.tokenizer("one plus two")["input_ids"]) == "one plus two"
    told = capsys.readouterr().out
    assert told.count("'worn': {") == len(fits), "what was learnt is told after every lesson"
    count, looking = len(fits), tmp_path / "work" / "looking.pt"
    before, charts = (torch.load(file, weights_only=True) for file in (looking, looking.with_stem("charts")))
    assert any(not torch.equal(value, charts[name]) for name, value in before.items()), "a lesson teaches something"
    looking.unlink()
    build_tiny.build(tmp_path / "again", tmp_path / "work", 0, None)
    assert len(fits) == count + 1, "only what is not kept is learnt again"
    assert all(torch.equal(value, before[name]) for name, value in torch.load(looking, weights_only=True).items())


@pytest.mark.slow
def test_the_policy_and_its_teacher_are_built_from_nothing(tmp_path, monkeypatch):
    try:
        MetaWorld().reset("reach-v3", 0)
    except AssetError as error:
        pytest.skip(str(error))
    fits = brief(monkeypatch)
    model, adapter = acting.new_policy(0)
    lessons.teach(model, adapter, acting.STUDENT, tmp_path / "work", 0)
    assert fits == ["states", "places", "places of who goes astray", "seeing"]
    lessons.teach(model, adapter, acting.EXPERT, tmp_path / "work", 0)
    assert fits[4:] == ["expert"], "the lessons that both have are kept"
    lessons.save(model, adapter.processor, tmp_path / "policy")
    assert 1e6 < sum(p.numel() for p in load_model(str(tmp_path / "policy")).parameters()) < 2e6
