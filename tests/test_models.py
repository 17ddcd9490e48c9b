"""Sharing a prompt among its answers must change nothing: not the values, not any gradient, media included."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import make_pairs
from families import FAMILIES, omni
from transformers import DynamicCache

from modalities.chat import ChatAdapter
from xmodal_opd import models
from xmodal_opd.hidden import head, reads_media
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.forward import Responses, divergence, divergence_of_both, token_logp
from xmodal_opd.selftest import CannotShare, check_sampler, check_sharing, sharing
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Sampling


@pytest.fixture
def rollouts(family):
    _, model, _, adapter = family
    pairs = make_pairs(adapter, 3)
    sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 9)
    return sampler.generate(pairs, {"a": Sampling(3, 1.0)}, seed=5)["a"]


def gradients(model, adapter, rollouts, view, share):
    model.zero_grad()
    mask = token_batch(rollouts).mask
    hidden = Responses(adapter, share=share).hidden(model, rollouts, view, grad=True)
    logp = token_logp(model, hidden, rollouts, mask)
    (logp * torch.linspace(-1, 2, logp.numel()).view_as(logp)).sum().backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logp.detach(), slopes


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_shared_prompt_equals_repeated_prompt_in_values_and_gradients(family, rollouts, view):
    name, model, _, adapter = family
    (ours, slopes), (plain, expected) = (gradients(model, adapter, rollouts, view, share) for share in (True, False))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert slopes.keys() == expected.keys()
    if (encoder := FAMILIES[name].encoder) and view == "student":
        assert any(n.startswith(encoder) and g.abs().sum() > 0 for n, g in slopes.items())
    scale = max(float(g.norm()) for g in expected.values())
    for part, slope in slopes.items():
        torch.testing.assert_close(
            slope, expected[part], atol=2e-5 * scale, rtol=2e-3, msg=lambda m, p=part: f"{p}: {m}"
        )


@pytest.mark.parametrize("name", ["omni", "qwen3_omni"])
def test_clips_attend_each_to_itself_and_give_what_the_masked_square_gives(tokenizer, name):
    model, processor = FAMILIES[name].make(tokenizer)
    model, adapter = model.eval(), ChatAdapter(processor, 512)
    model.audio_tower.set_attn_implementation("sdpa")
    inputs = adapter.batch([pair.views["student"] for pair in make_pairs(adapter, 3)])

    def heard():
        model.zero_grad()
        states = model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"]).last_hidden_state
        states.square().sum().backward()
        return states.detach(), next(model.audio_tower.parameters()).grad.clone()

    square = heard()
    models.attend_in_blocks(model)
    assert model.audio_tower.config._attn_implementation == "blocks"
    torch.testing.assert_close(heard(), square, atol=1e-4, rtol=1e-4)


def test_self_test_passes_and_catches_a_misaligned_sampler(family, rollouts):
    _, model, _, adapter = family
    assert check_sampler(model, Responses(adapter), rollouts) < 1e-2
    assert check_sharing(model, Responses(adapter), rollouts) < 1e-4
    shifted = [replace(r, logps=[v - 1 for v in r.logps]) for r in rollouts]
    with pytest.raises(RuntimeError, match="sampler and training forward disagree"):
        check_sampler(model, Responses(adapter), shifted)


def test_a_cache_that_loses_the_gradient_is_noticed(family, rollouts, monkeypatch):
    _, model, _, adapter = family
    select = DynamicCache.batch_select_indices

    def cut_off(cache, indices):
        select(cache, indices)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(DynamicCache, "batch_select_indices", cut_off)
    with pytest.raises(CannotShare, match="of the gradient"):
        check_sharing(model, Responses(adapter), rollouts)
    responses, why = sharing(model, Responses(adapter), rollouts)
    assert not responses.share and "of the gradient" in why


def test_only_named_parts_train_and_copies_share_the_rest(tokenizer):
    model, _ = omni(tokenizer)
    names = models.set_trainable(model, ["audio_tower"])
    assert names and all(n.startswith("audio_tower") for n in names)
    copy = models.frozen_copy(model)
    pairs = dict(
        zip(dict(model.named_parameters()), zip(model.parameters(), copy.parameters(), strict=True), strict=True)
    )
    assert all((a is b) == (n not in names) for n, (a, b) in pairs.items())
    with torch.no_grad():
        model.audio_tower.proj.weight.add_(1.0)
    models.update_ema(copy, model, 0.25)
    torch.testing.assert_close(copy.audio_tower.proj.weight, model.audio_tower.proj.weight - 0.75)
    with pytest.raises(
        ValueError, match=r"model.train names 'audoi', which nothing here .* roles: encoder, .*audio_tower"
    ):
        models.set_trainable(model, ["audoi"])


def test_without_stop_gradient_both_sides_move_as_in_the_dense_form(tokenizer):
    model = FAMILIES["qwen2"].make(tokenizer)[0].double()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sides = [torch.randn(2, 3, 48, dtype=torch.float64, requires_grad=True) for _ in "st"]
    p, q = ((side @ head(model).T).log_softmax(-1) for side in sides)
    dense = ((p.exp() * (p - q)).sum(-1) * mask).sum()
    expected = torch.autograd.grad(dense, [*sides, head(model)])
    for form, moved in ((divergence, sides[:1]), (divergence_of_both, [*sides, head(model)])):
        value = form(reverse_kl, (model, sides[0]), (model, sides[1]), mask, None).sum()
        slopes = torch.autograd.grad(value, moved)
        torch.testing.assert_close(value, dense)
        torch.testing.assert_close(slopes, expected[: len(slopes)])


def test_answers_shorter_than_the_widest_of_their_piece_keep_their_tokens(family, rollouts):
    _, model, _, adapter = family
    cut = [replace(r, tokens=r.tokens[:2], logps=r.logps[:2]) for r in rollouts[:3]]
    some = [*cut, *rollouts[3:]]
    mask = token_batch(some).mask
    hidden = Responses(adapter).hidden(model, some, "student")
    whole = token_logp(model, hidden, some, mask)
    torch.testing.assert_close(token_logp(model, hidden[:3], cut, mask[:3]), whole[:3])


def test_a_model_that_gives_nan_does_not_pass_the_self_test(family, rollouts):
    _, model, _, adapter = family
    lost = [replace(r, logps=[float("nan")] * len(r.logps)) for r in rollouts]
    with pytest.raises(RuntimeError, match="sampler and training forward disagree"):
        check_sampler(model, Responses(adapter), lost)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["Mine"], "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(
        ValueError, match=r"is a Mine, which transformers .* does not have; set model.trust_remote_code"
    ):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize(
    "name, reads",
    [("Phi4MultimodalForCausalLM", True), ("Gemma3nForConditionalGeneration", True), ("Qwen2ForCausalLM", False)],
)
def test_a_model_that_reads_media_is_told_by_its_forward(name, reads):
    kind = getattr(transformers, name)
    assert reads_media(kind.__new__(kind)) == reads
