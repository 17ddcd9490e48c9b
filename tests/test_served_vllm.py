"""A teacher behind the real vLLM on CPU says what the same teacher says here, of text and of speech, and teaches it."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from test_vllm import asked, distribution, disturbed, python, run, serving, small, written  # noqa: F401
from transformers import Qwen2Config, Qwen2ForCausalLM

from xmodal_opd import checkpoint, collect, config, models, step
from xmodal_opd.build import build
from xmodal_opd.hidden import head
from xmodal_opd.scoring.forward import Responses, statistics
from xmodal_opd.scoring.judge import QUESTION, build_judge, judge
from xmodal_opd.scoring.served import ask_teachers
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def expert(python, tmp_path_factory):  # noqa: F811
    """The default model with some noise in its layers: in a folder, and behind a server."""
    folder = tmp_path_factory.mktemp("expert")
    model, processor = models.load_model("default"), models.load_processor("default")
    disturbed(model, 0.2)
    checkpoint.export(model, processor, folder / "here")
    shutil.copytree(folder / "here", folder / "there")
    checkpoint.as_served(folder / "there")
    with serving(python, folder / "there", 1, 512, "--max-logprobs", "40") as (server,):
        yield folder / "here", server.url


RECIPE = """
name: served
model: {{name: default, train: [audio_tower]}}
data: {{train: none, test: none}}
rollout: {{max_tokens: 24, samplings: {{tokens: {{n: 2}}}}}}
teachers: {{expert: {{servers: ['{url}']}}}}
"""
TOP = (
    "{{sampling: tokens, divergence: {{{name}: {{k: 40, by: teacher}}}}, teacher: {{model: '{model}', view: {view}}}}}"
)
POLICY = "{sampling: tokens, advantages: [teacher_logratio], surrogate: importance}"


def parts_for(tmp_path: Path, url: str, *overrides: str):
    path = tmp_path / "served.yaml"
    path.write_text(RECIPE.format(url=url))
    return build(config.load(str(path), list(overrides)))


@pytest.mark.parametrize("view", ["teacher", "student"])
def test_log_probs_and_likeliest_tokens_are_those_of_the_same_model_here(expert, tmp_path, view):
    folder, url = expert
    term = TOP.format(name="topk_forward_kl", model="expert", view=view)
    parts = parts_for(tmp_path, url, f"objective={{tokens: {term}}}")
    rollouts = parts.sampler.generate(asked(parts.adapter, 12), parts.samplings, seed=1)["tokens"]
    source = ("expert", view)
    told = ask_teachers(parts.served, {source: range(len(rollouts))}, rollouts)[source]
    teacher, mask = models.load_model(str(folder)), token_batch(rollouts).mask
    with torch.no_grad():
        hidden = Responses(parts.adapter).hidden(teacher, rollouts, view)
        logp, _ = statistics(teacher, hidden, rollouts, mask)
        whole = (hidden @ head(teacher).T).log_softmax(-1)
    sampled, likeliest, shared = [], [], []
    for row, rollout in enumerate(rollouts):
        said, n = told[row], len(rollout.tokens)
        here, counts = whole[row, :n], said.logq > -torch.inf  # the head's padding does not count
        sampled.append((said.logp - logp[row, :n]).abs())
        likeliest.append((said.logq - here.gather(1, said.ids)).abs()[counts])
        best = [{t for t in place.topk(40).indices.tolist() if t < parts.vocab} for place in here]
        told_here = [set(ids[some].tolist()) for ids, some in zip(said.ids, counts, strict=True)]
        shared += [len(a & b) / len(b) for a, b in zip(told_here, best, strict=True)]
    distribution(f"sampled tokens, {view} view", torch.cat(sampled))
    distribution(f"40 likeliest tokens, {view} view", torch.cat(likeliest))
    assert torch.cat(sampled).max() < 1e-3 and torch.cat(likeliest).max() < 2e-3
    assert sum(shared) / len(shared) > 0.995, "ties at the end of the list may fall either way"


def gradient(parts, pairs):
    sampled, metrics = collect.sample(parts, pairs, 0)
    metrics |= step.backward(parts, sampled, step.judged(parts, sampled, 0))
    return metrics, torch.cat([p.grad.flatten() for p in parts.student.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("method", "view"),
    [("topk_forward_kl", "teacher"), ("topk_reverse_kl", "student"), ("policy", "teacher"), ("policy", "student")],
)
def test_a_step_has_nearly_the_gradient_of_the_same_teacher_here(expert, tmp_path, view, method):
    folder, url = expert
    taken = {}
    for name in ("expert", str(folder)):
        term = POLICY if method == "policy" else TOP.format(name=method, model=name, view=view)
        scoring = f"scoring={{teacher: {{model: '{name}', view: {view}}}}}"
        parts = parts_for(tmp_path, url, f"objective={{tokens: {term}}}", *([scoring] if method == "policy" else []))
        taken[name] = gradient(parts, asked(parts.adapter, 6))
        assert all(value == value for value in taken[name][0].values())
    (there, slope), (here, wanted) = taken.values()
    apart = ((slope - wanted).norm() / wanted.norm()).item()
    print(f"\n{method}, {view} view: loss {there['loss']:.6g} and {here['loss']:.6g}, gradients {apart:.1e} apart")
    assert (
        wanted.norm() > 0 and apart < 1e-2 and there["loss"] == pytest.approx(here["loss"], rel=1e-2, abs=1e-4)
    )  # the rest is 1 - sum


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = {"The capital is Paris.": 1.0, "It is London.": 0.0, "I think that it is Paris.": 1.0}


def fitted(tokenizer, questions: dict[str, float]) -> Qwen2ForCausalLM:
    """A small model that has learnt these verdicts by heart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for question, verdict in questions.items():
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([tokenizer(f"{text}{verdict:.0f}<|im_end|>")["input_ids"]])
            logits = model(input_ids=ids).logits[0, -3:-1]
            torch.nn.functional.cross_entropy(logits, ids[0, -2:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_llm_judge_gets_its_verdicts_from_vllm(python, tokenizer, tmp_path):  # noqa: F811
    judging = copy.deepcopy(tokenizer)
    judging.chat_template = CHATML
    asked_about = {QUESTION.format(prompt="", response=said, target="Paris"): right for said, right in SAID.items()}
    for part in (fitted(judging, asked_about), judging):
        part.save_pretrained(tmp_path / "judge")
    rollouts = [Rollout(Pair(said, {}, "Paris"), [1], [0.0], said, True, 0) for said in SAID]
    with serving(python, tmp_path / "judge", 1, 1024) as (server,):
        reward = build_judge({"llm": {"model": str(tmp_path / "judge"), "url": f"{server.url}/v1"}})
        rewards, reasons = judge(reward, rollouts)
    assert rewards == list(SAID.values()) and not reasons


def test_a_run_that_samples_one_step_ahead(python, small, written, tmp_path):  # noqa: F811
    shutil.copytree(models.folder_of("default"), tmp_path / "served")
    checkpoint.as_served(tmp_path / "served")
    term = "objective.tokens.weights=[{tis: {cap: 2.0}}]"
    with serving(python, tmp_path / "served", 1, 512) as (server,):
        how = ["rollout.name=vllm", f"rollout.servers=['{server.url}']", "rollout.ahead=1", "eval.samples=6", term]
        _, lines = run(written, tmp_path / "run", "train.steps=5", *how)
    assert [line["rollout/age"] for line in lines] == [0, 1, 1, 1, 1]
    apart = [line["sampling/sampling_logp_difference/mean"] for line in lines]
    print(f"\n|logp of trainer - of sampler| by step, one update apart after the first: {apart}")
    assert apart[0] < 1e-4 < min(apart[1:]) and all(line["sampling/kl"] >= 0 for line in lines)
    assert all(line["grad_norm"] > 0 and not line["skipped"] for line in lines)
    assert all(0 <= line["sampling/capped_ratio/tokens"] < 0.5 for line in lines)
