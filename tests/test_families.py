"""Each family from its folder through shards, views, a sampled group and a step of CORD, and back into a folder."""

import base64
import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, make_pairs, noise, picture
from families import FAMILIES
from safetensors.torch import save_file

from modalities.audio import media as sound
from modalities.chat import ChatAdapter
from modalities.shards import write_shards
from modalities.tasks import questions
from modalities.vision import media as sight
from xmodal_opd import config, models, step
from xmodal_opd.build import ADAPTERS, build
from xmodal_opd.build.shards import open_shards
from xmodal_opd.encoders import encoded_once
from xmodal_opd.hidden import inputs_on, media_tokens, remembering_little
from xmodal_opd.objective.divergences import reverse_kl
from xmodal_opd.rollout.hf import HFSampler
from xmodal_opd.scoring.forward import Responses, divergence, token_logp
from xmodal_opd.selftest import check_sampler, check_sharing
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Sampling

FILES = {"audio": "question.flac", "image": "figure.png"}


def sample(kind: str | None, number: int, question) -> dict[str, bytes]:
    """A shard's sample: the question heard, seen with its words, or read; and read with a hint."""
    text = {"type": "text", "text": question.prompt}
    media = {"type": kind, kind: FILES[kind]} if kind else text
    hint = {"type": "text", "text": f"{question.prompt} It is {question.answer}."}
    views = {"student": [media, text] if kind == "image" else [media], "teacher": [hint]}
    record = {"views": {name: [{"role": "user", "content": parts}] for name, parts in views.items()}}
    files = {"json": json.dumps(record | {"answer": question.answer, "meta": {"task": question.task}}).encode()}
    if kind:
        data = sound.encode(noise(number), 16000) if kind == "audio" else sight.encode(picture(number))
        files[FILES[kind]] = data
    return files


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folders of four samples, by what their student view needs."""
    folder = tmp_path_factory.mktemp("families")
    asked = list(itertools.islice(questions(3, "train"), 4))
    for kind in (None, *FILES):
        render = lambda numbers, kind=kind: [sample(kind, n, asked[n]) for n in numbers]  # noqa: E731
        write_shards(folder / str(kind), {"kind": kind}, len(asked), render, progress=False)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory, family):
    """The family as a folder that transformers loads."""
    name, model, processor, _ = family
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def kind_of(adapter) -> str | None:
    return next((kind for kind in FILES if kind in adapter.reads), None)


def parts_of(saved, shards, adapter, *overrides):
    """Live parts of CORD on the family's folder, and two pairs from its shards."""
    data = shards / str(kind_of(adapter))
    where = [f"model.name={saved}", f"data.train={data}", f"data.test={data}", "name=family"]
    modality = {None: "text", "audio": "audio", "image": "vision"}[kind_of(adapter)]
    few = [f"modality={modality}", "rollout.max_tokens=5", "train.prompts=2", "optim.lr=1e-2", "train.threads=1"]
    recipe = config.load(str(ROOT / "configs" / "methods" / "cord.yaml"), [*where, *few, *overrides])
    parts = build(recipe)
    return parts, [pair for _, pair in itertools.islice(open_shards(recipe)[0].pairs(parts.adapter), 2)]


def test_a_saved_model_gives_the_same_logits_and_prompts_again(family, saved):
    _, model, _, adapter = family
    loaded = models.load_model(str(saved))
    assert type(loaded) is type(model)
    inputs = adapter.batch([pair.views["student"] for pair in make_pairs(adapter, 2)])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    again = ChatAdapter(models.load_processor(str(saved)), 512)
    for pair, other in zip(make_pairs(adapter, 2), make_pairs(again, 2), strict=True):
        for name in pair.views:
            ours, theirs = adapter.batch([pair.views[name]]), again.batch([other.views[name]])
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("train", [["encoder", "projector"], ["language_model"]], ids=["media", "language"])
def test_a_step_of_cord_moves_what_should_train_and_nothing_else(family, saved, shards, train):
    name, *_, adapter = family
    if FAMILIES[name].encoder is None and train[0] != "language_model":
        pytest.skip("a model of text has no encoder")
    parts, pairs = parts_of(saved, shards, adapter, f"model.train={json.dumps(train)}")
    before = {name: value.clone() for name, value in parts.student.named_parameters()}
    metrics = step.train_step(parts, pairs, 0)
    after = dict(parts.student.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert metrics["grad_norm"] > 0 and all(torch.isfinite(value).all() for value in after.values())
    assert {models.role_of(name) for name in moved} == {*train}
    asked = {name for name, value in after.items() if value.requires_grad}
    assert {models.role_of(name) for name in asked} == {*train} and moved <= asked
    still = {name for name in asked - moved if after[name].grad is not None and after[name].grad.abs().sum() > 0}
    assert not still


def test_the_teacher_reading_the_students_view_is_the_student(family, saved, shards):
    *_, adapter = family
    parts, pairs = parts_of(saved, shards, adapter)
    model = parts.student
    rollouts = parts.sampler.generate(pairs, {"a": Sampling(2)}, seed=1)["a"]
    mask = token_batch(rollouts).mask
    assert check_sampler(model, parts.responses, rollouts) < 1e-3
    assert check_sharing(model, parts.responses, rollouts) < 1e-4
    student, teacher = (Responses(parts.adapter, share).hidden(model, rollouts, "student") for share in (True, False))
    assert divergence(reverse_kl, (model, student), (model, teacher), mask, parts.vocab).abs().max() < 1e-4
    other = parts.responses.hidden(model, rollouts, "teacher")
    assert divergence(reverse_kl, (model, student), (model, other), mask, parts.vocab).abs().max() > 1e-2


def test_views_with_and_without_media_share_a_batch(family):
    _, model, _, adapter = family
    pairs = make_pairs(adapter, 3)
    mixed = [pairs[0].views["teacher"], *(p.views["student"] for p in pairs), pairs[1].views["teacher"]]
    with torch.no_grad():
        together = model(**inputs_on(model, adapter.batch(mixed))).logits
        for view, row in zip(mixed, together, strict=True):
            alone = model(**adapter.batch([view])).logits[0]
            torch.testing.assert_close(row[-1], alone[-1], atol=2e-5, rtol=1e-4)


def test_one_forward_leaves_nothing_behind_for_the_next(family):
    _, model, _, adapter = family
    pairs = make_pairs(adapter, 3)
    sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 4)
    rollouts = sampler.generate(pairs, {"a": Sampling(2)}, seed=1)["a"]
    responses = Responses(adapter)
    first = responses.hidden(model, rollouts[:2], "student")
    for others in (rollouts[2:], rollouts):
        for view in ("teacher", "student"):
            responses.hidden(model, others, view)
    model(**adapter.batch([pairs[2].views["student"]]))  # by the model's own positions
    assert torch.equal(responses.hidden(model, rollouts[:2], "student"), first)


def test_several_media_in_one_view_are_read_in_their_order(family):
    _, model, processor, adapter = family
    adapter, kind = ChatAdapter(processor, 1024), kind_of(adapter)
    if kind is None or adapter.family.clips == 1:
        pytest.skip("reads no media, or one clip")
    made = [noise(i) for i in (0, 1)] if kind == "audio" else [picture(i) for i in (0, 1)]
    ask = [{"type": kind}, {"type": "text", "text": "then"}, {"type": kind}]
    ends = []
    for some in (made, made[::-1]):
        media = (some, []) if kind == "audio" else ([], some)
        view = adapter.laid_out("k", [{"role": "user", "content": ask}], *media)
        ends.append(model(**adapter.batch([view])).logits[0, -1])
    assert not torch.allclose(*ends, atol=1e-6)


def everything(adapter, clip: int, image: int):
    """A view of all kinds of media the model reads, in one question."""
    media = [noise(clip)] if "audio" in adapter.reads else [], [picture(image)] if "image" in adapter.reads else []
    parts = [
        {"type": "text", "text": "what"},
        *({"type": "image"} for _ in media[1]),
        *({"type": "audio"} for _ in media[0]),
    ]
    return adapter.laid_out("k", [{"role": "user", "content": parts}], *media)


def test_sound_sight_and_words_go_into_one_view(family):
    _, model, processor, _ = family
    adapter = ChatAdapter(processor, 1024)
    if not {"audio", "image"} <= {*adapter.reads}:
        pytest.skip("does not both hear and see")
    views = [everything(adapter, i, i) for i in range(2)]
    pairs = [Pair(str(i), {"student": some}) for i, some in enumerate(views)]
    sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 5)
    with encoded_once([model], adapter):
        rollouts = sampler.generate(pairs, {"a": Sampling(2)}, seed=0)["a"]
        assert check_sampler(model, Responses(adapter), rollouts) < 1e-3
        assert check_sharing(model, Responses(adapter), rollouts) < 1e-4
    first = model(**adapter.batch(views[:1])).logits[0, -1]
    for other in (everything(adapter, 1, 0), everything(adapter, 0, 1)):
        assert not torch.allclose(model(**adapter.batch([other])).logits[0, -1], first, atol=1e-6)


def test_what_an_encoder_gave_is_remembered_as_it_was(tokenizer):
    model, processor = FAMILIES["gemma3n"].make(tokenizer)
    adapter = ChatAdapter(processor, 512)
    inputs = adapter.family.call(processor, ["<image_soft_token>"], [[]], [[picture(0)]])
    tower = model.eval().model.vision_tower
    with torch.no_grad(), encoded_once([model], adapter):
        given = [
            tower(pixel_values=inputs["pixel_values"], do_pooling=False).last_hidden_state.mul_(8) + 0 for _ in "abc"
        ]
    assert all(torch.equal(given[0], one) for one in given[1:])


def test_the_layout_is_that_of_the_processor_itself(family):
    _, model, processor, adapter = family
    kind = kind_of(adapter)
    pair = make_pairs(adapter, 1)[0]
    view, ours = pair.views["student"], adapter.batch([pair.views["student"]])
    if isinstance(view["prompt"], list):
        file = base64.b64encode(sound.encode(view["audio"][0], 16000)).decode()
        asked = [{"role": "user", "content": [{"type": "audio", "base64": file}]}]
        theirs = processor.apply_chat_template(asked, chat_template="")  # transformers 5.5 fails at none
    elif kind is None:
        theirs = processor([view["prompt"]], return_tensors="pt")
    else:
        media = {"audio": view["audio"]} if kind == "audio" else {"images": [view["images"]]}
        theirs = processor(text=[view["prompt"]], return_tensors="pt", **media)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    if features := {"audio": "input_features", "image": "pixel_values"}.get(str(kind)):
        got, expected = ours[features], theirs[features]
        both = tuple(slice(min(sizes)) for sizes in zip(got.shape, expected.shape, strict=True))  # more silence behind
        near = (got[both] - expected[both]).abs() < 2e-3
        assert near.float().mean() > 0.99  # all but the frames that reach into the silence
    assert media_tokens_in(model, ours["input_ids"]) > 0 or kind is None


def media_tokens_in(model, tokens) -> int:
    return int(torch.isin(tokens, torch.tensor(media_tokens(model))).sum())


def test_an_answer_may_hold_the_marks_around_media(family):
    """No sampler bans them; a forward that takes them for the beginning of an image would be off from there on."""
    _, model, processor, _ = family
    adapter = ChatAdapter(processor, 1024)
    pairs = [Pair(str(i), {"student": everything(adapter, i, i)}) for i in range(2)]
    marks = set(adapter.tokenizer.all_special_ids) - {*media_tokens(model), model.generation_config.eos_token_id}
    answers = [[*sorted(marks)[:12], 5, *sorted(marks)[:3]], [7, *sorted(marks)[::-1][:9]]]
    rollouts = [
        Rollout(p, a, [0.0] * len(a), "", False, i) for i, (p, a) in enumerate(zip(pairs, answers, strict=True))
    ]
    mask = token_batch(rollouts).mask
    shared, plain = (Responses(adapter, share).hidden(model, rollouts, "student") for share in (True, False))
    torch.testing.assert_close(shared[mask], plain[mask], atol=2e-4, rtol=1e-3)


def test_a_family_runs_in_bfloat16(family, saved):
    *_, adapter = family
    model = models.load_model(str(saved), "bfloat16")
    sampler = HFSampler(model, adapter, [model.generation_config.eos_token_id], 4)
    rollouts = sampler.generate(make_pairs(adapter, 2), {"a": Sampling(2)}, seed=0)["a"]
    assert check_sampler(model, Responses(adapter), rollouts) < 1
    assert (
        inputs_on(model, adapter.batch([make_pairs(adapter, 1)[0].views["student"]]))["input_ids"].dtype == torch.long
    )


@pytest.mark.parametrize("name", ["omni", "qwen3_omni"])
def test_the_part_that_writes_text_is_taken_out_of_a_larger_checkpoint(tokenizer, tmp_path, name):
    """As published: the thinker's weights under their prefix, in a config with a talker that is not loaded."""
    model, processor = FAMILIES[name].make(tokenizer)
    whole = {"omni": "Qwen2_5OmniForConditionalGeneration", "qwen3_omni": "Qwen3OmniMoeForConditionalGeneration"}[name]
    cls = getattr(transformers, whole)
    config = cls.config_class(thinker_config=model.config.to_dict(), enable_audio_output=False)
    config.architectures = [whole]
    config.save_pretrained(tmp_path)
    save_file({f"thinker.{k}": v.contiguous() for k, v in state_of(model).items()}, tmp_path / "model.safetensors")
    loaded = models.load_model(str(tmp_path))
    assert type(loaded) is type(model)
    adapter = ChatAdapter(processor, 512)
    inputs = adapter.batch([pair.views["student"] for pair in make_pairs(adapter, 2)])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, models.attend_in_blocks(model.eval())(**inputs).logits)


def state_of(model) -> dict[str, torch.Tensor]:
    """Without what is tied to another."""
    tied = set(model.all_tied_weights_keys)
    return {name: value for name, value in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize(
    ("cls", "sizes", "message"),
    [
        (
            "BertModel",
            {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
            "has no output projection",
        ),
        ("GPTJForCausalLM", {"n_embd": 16, "n_head": 2, "rotary_dim": 4}, "adds a bias to its logits"),
        ("T5ForConditionalGeneration", {"d_model": 16, "d_ff": 16, "num_heads": 2}, "is an encoder-decoder"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_at_load(tmp_path, cls, sizes, message):
    kind = getattr(transformers, cls)
    layers = {"num_hidden_layers": 1, "n_layer": 1, "num_layers": 1, "vocab_size": 32}
    kind(kind.config_class(**sizes, **layers)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{cls} {message}"):
        models.load_model(str(tmp_path))


def test_a_checkpoint_with_an_adapter_for_audio_alone_is_refused(tokenizer, tmp_path):
    model, _ = FAMILIES["granite_speech"].make(tokenizer)
    model.config.has_lora_adapter = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a LoRA adapter that it switches on for audio and off for text"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "modality", "needs"),
    [("qwen2", "audio", "audio"), ("smolvlm", "audio", "audio"), ("granite_speech", "vision", "image")],
)
def test_a_model_that_cannot_read_the_questions_is_refused_at_load(tokenizer, name, modality, needs):
    processor = FAMILIES[name].make(tokenizer)[1]
    message = rf"the recipe's modality needs {needs}, but {type(processor).__name__} reads text.* only; take a model"
    with pytest.raises(ValueError, match=message):
        ADAPTERS[modality](processor, 512)


def test_a_processor_whose_images_nobody_can_count_is_refused_at_load(tokenizer):
    looks = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.LlavaProcessor(looks, tokenizer, patch_size=16)
    with pytest.raises(ValueError, match=r"LlavaProcessor does not say how many tokens an image takes; give it a line"):
        ChatAdapter(processor, 512, needs="image")


def test_activation_checkpointing_changes_no_gradient_or_is_refused(tokenizer, family):
    name, *_, adapter = family
    model = models.attend_in_blocks(FAMILIES[name].make(tokenizer)[0].eval())
    pairs = make_pairs(adapter, 2)
    rollouts = [Rollout(pair, [5, 6, 7 + i], [0.0] * 3, "", False, i) for i, pair in enumerate(pairs)]
    slopes = [slopes_of(model, adapter, rollouts)]
    refused = {"gemma3n": "has layers that read the keys and values of earlier ones"}
    refused["granite_speech"] = "does not support gradient checkpointing"  # transformers' own words
    if name in refused:
        with pytest.raises(ValueError, match=f"{type(model).__name__} {refused[name]}"):
            models.checkpoint_activations(model)
        return
    models.checkpoint_activations(model)
    slopes.append(slopes_of(model, adapter, rollouts))
    assert slopes[0].keys() == slopes[1].keys()
    scale = max(float(slope.norm()) for slope in slopes[0].values())
    for part, slope in slopes[0].items():
        torch.testing.assert_close(slopes[1][part], slope, atol=1e-5 * scale, rtol=1e-3)


def slopes_of(model, adapter, rollouts) -> dict[str, torch.Tensor]:
    model.zero_grad()
    mask = token_batch(rollouts).mask
    with remembering_little(model, True):
        hidden = Responses(adapter, share=False).hidden(model, rollouts, "student", grad=True)
        token_logp(model, hidden, rollouts, mask).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "seconds"), [("qwen3_omni", 13), ("voxtral", 31)])
def test_clips_longer_than_the_extractors_window_are_read_to_their_end(tokenizer, name, seconds):
    model, processor = FAMILIES[name].make(tokenizer)
    model, adapter = models.attend_in_blocks(model.eval()), ChatAdapter(processor, 1024)
    noise = np.random.default_rng(0).normal(0, 0.1, seconds * 16000).astype(np.float32)
    media = {"long.flac": sound.encode(noise, 16000)}
    view = adapter.view("k", [{"role": "user", "content": [{"type": "audio", "audio": "long.flac"}]}], media)
    short = make_pairs(adapter, 1)[0].views["student"]
    batch = adapter.batch([view, short])
    assert media_tokens_in(model, batch["input_ids"][:1]) > 10 * seconds
    (wave,) = view["audio"]
    waves = wave, np.where(np.arange(len(wave)) < len(wave) - 8000, wave, 0)  # the last half second is gone
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
        ends = [model(**adapter.batch([{**view, "audio": [wave]}])).logits[0, -1] for wave in waves]
    assert not torch.allclose(*ends, atol=1e-6)
