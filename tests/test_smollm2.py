"""SmolLM2 with ears: the questions it is asked, the language model inside unchanged, and what the tool teaches from."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modalities.chat import ChatAdapter
from modalities.facts import LISTED, facts
from modalities.tasks import split_of
from tools import build_smollm2_audio as tool
from tools.tiny.lessons import fit
from xmodal_opd import models


def test_every_fact_is_asked_once_and_has_one_answer():
    asked = facts()
    assert len({q.prompt for q in asked}) == len({q.instance for q in asked}) == len(asked)
    assert all(q.answer and q.answer != q.instance.removeprefix(f"{q.task} ") for q in asked if q.task != "plural")
    for family in LISTED:
        counts = [sum(q.task == family and split_of(q) == split for q in asked) for split in ("train", "test")]
        assert counts[0] > counts[1] > 0, family


def test_hearing_is_never_taught_a_held_out_question():
    said = tool.sayings(facts(), seed=0, count=3000)
    held_out = [q for q in facts() if split_of(q) == "test"]
    assert not {q.prompt for q in held_out} & set(said)
    assert {q.prompt for q in facts()} & set(said), "no question of the train split among them"
    heard = set(" ".join(said).replace("?", "").split())
    words = [word for q in held_out for word in q.instance.removeprefix(f"{q.task} ").split()]
    assert sum(word in heard for word in words) > 0.95 * len(words), "words of held-out questions, in others"
    assert said == tool.sayings(facts(), seed=0, count=3000)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, eos_token_id=2, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval()


def test_the_language_model_inside_is_itself_to_the_bit(llama, tmp_path):
    tool.compose(llama, seed=0, width=16, layers=1).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path))
    ids = torch.randint(20, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, llama(ids).logits)


@torch.no_grad()
def test_what_hearing_trains_is_what_the_language_model_is_given(llama):
    model = tool.compose(llama, seed=0, width=16, layers=1)
    mels, frames = torch.randn(2, 80, 50 * tool.SECONDS), torch.tensor([50 * tool.SECONDS, 61])
    states, lengths = tool.embed(model, mels, frames)
    for i, length in enumerate(lengths.tolist()):
        ids = torch.tensor([[5, *[tool.AUDIO["<|AUDIO|>"]] * length, 7, 8]])
        given = model.get_input_embeddings()(ids)
        given[0, 1 : 1 + length] = states[i, :length]
        present = (torch.arange(mels.shape[2]) < frames[i])[None].long()
        media = {"input_features": mels[i : i + 1], "feature_attention_mask": present}
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits
        torch.testing.assert_close(whole, llama(inputs_embeds=given).logits, atol=1e-5, rtol=0)


def test_hearing_is_learnt_and_the_language_model_does_not_move(llama):
    model = tool.compose(llama, seed=0, width=16, layers=1)
    before = {name: p.clone() for name, p in model.language_model.named_parameters()}
    rng = random.Random(0)
    heard = [(torch.randn(80, 50 * tool.SECONDS).half(), 100, rng.choices(range(20, 40), k=3)) for _ in range(4)]
    vocabulary = [*range(20, 40), tool.BLANK]
    losses = []

    def loss():
        losses.append(tool.ctc(model, heard, vocabulary, tool.LESSONS["hearing"]))
        return losses[-1]

    fit(tool.ears(model), loss, 30, 1e-2, "test")
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.language_model.named_parameters())


@pytest.mark.slow
def test_the_real_model_answers_and_is_itself_inside(tmp_path):
    text, tokenizer = tool.load_text(tool.weights(tmp_path))
    model = tool.compose(text, seed=0)
    adapter = ChatAdapter(tool.make_processor(tokenizer), 512)
    some = [q for q in facts() if q.instance in ("capital France", "capital Japan", "opposite hot", "plural mouse")]
    views = [tool.example(adapter, q) for q in some]
    inputs = adapter.batch(views)
    with torch.no_grad():
        plain, inside = (m(**inputs).logits.log_softmax(-1) for m in (text, model))
    torch.testing.assert_close(inside, plain, atol=1e-4, rtol=0)
    said = tool.answers(model, adapter, views)
    assert all(tool.graded(adapter, some, said)), [adapter.decode(ids) for ids in said]
