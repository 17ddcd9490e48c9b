"""Media are encoded once: how often an encoder runs is counted, and no value or gradient may change by a bit."""

from contextlib import nullcontext

import pytest
import torch
from conftest import make_pairs
from families import FAMILIES

from modalities.chat import ChatAdapter
from xmodal_opd import config, encoders, models, step
from xmodal_opd.build import build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.encoders import encoded_once
from xmodal_opd.rollout.hf import HFSampler, Sampling
from xmodal_opd.scoring.forward import Responses
from xmodal_opd.types import Pair

HINT = {"type": "text", "text": "one plus two"}


@pytest.fixture
def runs(monkeypatch):
    """Counts the forwards of an encoder's class: {"n": how many}."""

    def watch(encoder):
        count, forward = {"n": 0}, type(encoder).forward

        def counted(*args, **options):
            count["n"] += 1
            return forward(*args, **options)

        monkeypatch.setattr(type(encoder), "forward", counted)
        return count

    return watch


def hinted(adapter, pairs):
    """The pairs with a third view: the student's media, and words beside them."""
    kind = next(kind for kind in ("audio", "image") if kind in adapter.reads)
    out = []
    for pair in pairs:
        media = pair.views["student"]
        asked = [{"role": "user", "content": [{"type": kind}, HINT]}]
        view = adapter.laid_out(pair.key, asked, media["audio"], media["images"])
        out.append(Pair(pair.key, {**pair.views, "hinted": view}, pair.answer, pair.meta))
    return out


def test_a_teacher_that_hears_or_sees_the_same_adds_no_run_and_changes_nothing(family, runs):
    name, model, _, adapter = family
    if not models.encoders(model):
        pytest.skip("it reads text alone")
    pairs = hinted(adapter, make_pairs(adapter, 2))
    sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 5)
    rollouts = sampler.generate(pairs, {"a": Sampling(2)}, seed=1)["a"]
    count, found = runs(model.get_submodule(FAMILIES[name].encoder)), {}
    for how, within in (("again", nullcontext()), ("once", encoded_once([model], adapter))):
        model.zero_grad()
        count["n"] = 0
        with within:
            student = Responses(adapter).hidden(model, rollouts, "student", grad=True)
            teacher = Responses(adapter).hidden(model, rollouts, "hinted")
            (student * teacher).sum().backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        found[how] = count["n"], [student.detach(), teacher, *(slope.clone() for slope in slopes)]
    model.zero_grad()
    assert found["again"][0] == 2 * found["once"][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found["again"][1], found["once"][1], strict=True))
    assert not any("forward" in vars(encoder) for encoder in models.encoders(model))


@pytest.mark.parametrize(
    ("overrides", "again", "once"),
    [
        # sampling; the student's forward; the teacher's under the hint
        pytest.param(["model.train=[encoder]"], 3, 2, id="trained"),
        # nothing of the encoder moves: all that hear the same clips hear them once
        pytest.param(["model.train=[language_model]"], 3, 1, id="frozen"),
        pytest.param(["model.train=[language_model]", "objective.tokens.teacher.model=initial"], 3, 1, id="initial"),
        pytest.param(["model.train=[encoder]", "objective.tokens.teacher.model=initial"], 3, 3, id="another encoder"),
        pytest.param(["model.train=null", "model.lora={rank: 2, parts: [language_model]}"], 3, 1, id="lora"),
        pytest.param(["model.train=[encoder]", "scoring.hint={view: hinted}"], 4, 2, id="scored"),
    ],
)
def test_a_step_encodes_once_and_its_loss_and_gradient_are_the_same_to_the_bit(
    world, runs, monkeypatch, overrides, again, once
):
    recipe = config.load(world["recipe"], ["objective.tokens.teacher.view=hinted", *overrides])
    found = {}
    for how, within in (("again", lambda *_: nullcontext()), ("once", encoded_once)):
        monkeypatch.setattr(step, "encoded_once", within)
        torch.manual_seed(0)
        parts = build(recipe)
        shards = open_shards(config.load(world["recipe"]))[0].pairs(parts.adapter)
        pairs = hinted(parts.adapter, [pair for _, (_, pair) in zip(range(3), shards, strict=False)])
        slopes = {}
        parts.engine.step = lambda _number, parts=parts, slopes=slopes: (
            slopes.update({n: p.grad.clone() for n, p in parts.student.named_parameters() if p.grad is not None}) or {}
        )
        count = runs(parts.student.audio_tower)
        metrics = step.train_step(parts, pairs, 0)
        found[how] = count["n"], metrics, slopes
    assert (found["again"][0], found["once"][0]) == (again, once)
    assert found["again"][1] == found["once"][1] and found["once"][1]["distill/tokens"] > 0
    assert found["again"][2].keys() == found["once"][2].keys()
    assert all(torch.equal(slope, found["once"][2][name]) for name, slope in found["again"][2].items())


class Batches(ChatAdapter):
    """An adapter that counts the batches it makes, of ids alone."""

    def __init__(self):
        self.made = 0

    def batch(self, views):
        self.made += 1
        return {"input_ids": torch.tensor([view["ids"] for view in views])}


def test_a_batch_of_the_very_same_views_is_made_once_and_given_in_copies():
    adapter, views = Batches(), [{"ids": [1, 2]}, {"ids": [3, 4]}]
    with encoded_once([], adapter):
        first = adapter.batch(views)
        first["input_ids"].zero_()
        assert adapter.batch(list(views))["input_ids"].tolist() == [[1, 2], [3, 4]] and adapter.made == 1
        adapter.batch(views[::-1])
        adapter.batch([dict(view) for view in views])
        for number in range(50):  # views that come and go do not pass for one another
            assert adapter.batch([{"ids": [number]}])["input_ids"].tolist() == [[number]]
        assert adapter.made == 53
    adapter.batch(views)
    assert adapter.made == 54 and "batch" not in vars(adapter)


def test_other_media_other_weights_and_too_many_bytes_are_encoded_anew(monkeypatch):
    encoder = torch.nn.Linear(4, 4).requires_grad_(False)
    model = torch.nn.ModuleDict({"audio_tower": encoder})
    count = []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (count.append(1), x @ self.weight)[1])
    one, two = torch.ones(2, 4), torch.zeros(2, 4)
    with encoded_once([model], Batches()):
        assert torch.equal(encoder(one), encoder(one.clone())) and len(count) == 1
        encoder(two)
        assert len(count) == 2
        encoder.weight.mul_(2)
        assert torch.equal(encoder(one), one @ encoder.weight) and len(count) == 3
        monkeypatch.setattr(encoders, "KEPT", 64)  # one input of 32 bytes and its output
        encoder(two)
        encoder(one)
        encoder(one)
        encoder(two)
        assert len(count) == 6
    encoder(one)
    encoder(one)
    assert len(count) == 8
