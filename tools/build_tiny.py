#!/usr/bin/env python
"""Build the small default model from nothing: a few-million-parameter Qwen2.5-Omni thinker that answers questions well
as text and as clean speech, and some as clean pictures: the only speech and pictures it meets here. Background noise is
new to it, and so are turned and blurred pictures. That, and how little it saw, is the gap a first run closes.

    python tools/build_tiny.py xmodal_opd/assets/tiny --seed 0

Stages, from one seed: questions as text; hearing, by CTC; spoken questions with their answers; then those of sight, in
`tiny_sight.py`. Each stage is a pure function of the one before and the seed, and is kept in --work, so that a stopped
build goes on.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ACCENTS = ("en-us",)
EXTRA = 300  # spare tokens for later skills, such as 256 action bins; not trained here
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
# pixels of white paper are zero: patches go through layers that know no bias, where ink would be lost beside the white
WHITE = {"image_mean": [1.0] * 3, "image_std": [0.3] * 3}
REPEAT = "Repeat what was said."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts, size: int = 768, whole: Sequence[str] = (), extra: int = EXTRA):
    """A byte-level BPE of Qwen2's kind with `size` tokens, trained on the tasks' own words. `whole` are words that are
    tokens besides, and at the end of the vocabulary are `extra` spare ones."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens=NAMED,
    )
    words: Any = [AddedToken(word, lstrip=True, normalized=False) for word in whole]
    tokenizer.add_tokens(words)
    tokenizer.add_tokens(["<|im_start|>", *(f"<|extra_{i}|>" for i in range(extra))], special_tokens=True)
    return tokenizer


def make_processor(tokenizer) -> Any:
    """80 mels every 20 ms, at most 10 s of speech; images of 56 to 224 pixels a side."""
    import transformers

    library: Any = transformers  # its lazy names and keyword configs are beyond a type checker
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return library.Qwen2_5OmniProcessor(
        image_processor=library.Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2, **WHITE),
        video_processor=library.Qwen2VLVideoProcessor(size=size, patch_size=14, merge_size=2, **WHITE),
        feature_extractor=library.WhisperFeatureExtractor(
            feature_size=80, hop_length=320, chunk_length=10, n_fft=512, return_attention_mask=True
        ),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    )


SPECIAL = {
    "audio_token_index": "<|AUDIO|>",
    "image_token_index": "<|IMAGE|>",
    "video_token_index": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "user_token_id": "user",
}


def sizes(vocabulary: int, width: int) -> dict[str, dict[str, Any]]:
    """The parts of a thinker's config, of about 4 million parameters at a width of 192."""
    text = {
        "vocab_size": (vocabulary + 63) // 64 * 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 8, 8]},
        "tie_word_embeddings": True,
    }
    audio = {
        "num_mel_bins": 80,
        "d_model": 192,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 576,
        "output_dim": width,
        "n_window": 250,  # one attention window covers the longest clip
        "max_source_positions": 256,
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0, 1, 2],  # windows of 112 pixels would cut lines of text
    }
    return {"text_config": text, "audio_config": audio, "vision_config": vision}


def make_model(
    tokenizer,
    seed: int,
    width: int = 192,
    text: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Any:
    """A thinker with all its towers, of the `sizes` above but for what is given of its parts."""
    import torch
    import transformers

    from xmodal_opd.models import attend_in_blocks

    library: Any = transformers
    given = {"text_config": text or {}, "audio_config": audio or {}, "vision_config": vision or {}}
    parts = {name: {**size, **given[name]} for name, size in sizes(len(tokenizer), width).items()}
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    torch.manual_seed(seed)
    model = library.Qwen2_5OmniThinkerForConditionalGeneration(
        library.Qwen2_5OmniThinkerConfig(**parts, **tokens, tie_word_embeddings=True)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return attend_in_blocks(model)


def example(adapter, question, wave=None, repeat: bool = False):
    """(view, answer ids): answer the question, or repeat it. As text, or as a waveform at 16 kHz."""
    parts = [{"type": "text", "text": question.prompt}] if wave is None else [{"type": "audio"}]
    parts += [{"type": "text", "text": REPEAT}] if repeat else []
    ids = adapter.tokenizer(question.prompt if repeat else question.response)["input_ids"]
    messages = [{"role": "user", "content": parts}]
    view = adapter.laid_out(question.instance, messages, [] if wave is None else [wave])
    return view, [*ids, adapter.tokenizer.eos_token_id]


def cross_entropy(model, adapter, examples):
    """Mean negative log-likelihood of the answers' tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    from xmodal_opd.hidden import hidden_repeated
    from xmodal_opd.tokens import pad

    views, answers = zip(*examples, strict=True)
    tokens = pad(answers, -100.0, torch.long)
    prompts = adapter.batch(views)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_repeated(model, prompts, tokens.clamp(min=0))
        logits = model.get_output_embeddings()(hidden)
    return cross_entropy(logits.float().transpose(1, 2), tokens, ignore_index=-100)


def fit(
    model, loss_of: Callable[[], Any], steps: int, rate: float, name: str, warmup: int = 50, final: float = 0.1
) -> None:
    """AdamW with a short warm-up and a linear decay to the part `final`."""
    import torch
    from rich.progress import track

    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, weight_decay=0.01)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * (1 - (1 - final) * s / steps)
    )
    model.train()
    for step in track(range(steps), name):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        shape.step()
        if (step + 1) % 50 == 0:
            print(f"{name} {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


def utterance(question_and_voice):
    """Waveform at 16 kHz; runs in worker processes."""
    import torch
    import torchaudio

    from modalities.audio.speech import speak

    torch.set_num_threads(1)
    question, voice = question_and_voice
    wave, rate = speak(question.prompt, voice)
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000).numpy()


def clips(split: str, seed: int, count: int, pitches: tuple[int, int] = (35, 65)) -> list:
    """(question, waveform) pairs in random voices of the split."""
    from multiprocessing import get_context

    from modalities.audio.speech import random_voice
    from modalities.tasks import questions

    rng = random.Random(seed)
    asked = list(itertools.islice(questions(seed, split), count))
    jobs = [(question, random_voice(rng, split, ACCENTS, pitches=pitches)) for question in asked]
    with get_context("spawn").Pool(2) as pool:
        return list(zip(asked, pool.map(utterance, jobs, chunksize=32), strict=True))


def accuracy(model, adapter, asked: list) -> dict[str, float]:
    """Share of right final answers per task, greedily; asked: (task, view, answer)."""
    import torch

    from xmodal_opd.rollout.hf import decode

    right: dict[str, list[bool]] = {"all": []}
    for some in itertools.batched(asked, 24):
        prompts = adapter.batch([view for _, view, _ in some])
        eos = [adapter.tokenizer.eos_token_id]
        ids, _ = decode(model, prompts, torch.arange(len(some)), torch.zeros(len(some)), max_tokens=40, eos=eos)
        for (task, _, wanted), answer in zip(some, ids, strict=True):
            ok = adapter.decode(answer).rpartition("answer: ")[2] == wanted
            right.setdefault(task, []).append(ok)
            right["all"].append(ok)
    return {task: round(sum(v) / len(v), 3) for task, v in right.items()}


def held_out(adapter, seed: int) -> dict[str, list]:
    """What the accuracies after each stage are of: 300 questions as text and as clean speech; 300 scenes as text, as
    the clean pictures of these lessons, and as the worn ones of a recipe's test."""
    from modalities.vision.draw import random_look
    from modalities.vision.tasks import SCENES
    from tools.tiny_sight import clean, looked, pictures

    spoken = clips("test", seed + 9999, 300)
    asked = {
        "text": [(q.task, example(adapter, q)[0], q.answer) for q, _ in spoken],
        "audio": [(q.task, example(adapter, q, wave)[0], q.answer) for q, wave in spoken],
    }
    looks = {"clean": clean, "worn": lambda rng: random_look(rng, "test")}
    for name, look in looks.items():
        drawn = pictures(seed + 9998, "test", 300, tuple(SCENES), look)
        asked["scenes"] = [(s.task, looked(adapter, s)[0], s.answer) for s, _, _ in drawn]
        asked[name] = [(s.task, looked(adapter, s, image)[0], s.answer) for s, _, image in drawn]
    return asked


def learn_text(model, adapter, seed: int) -> None:
    from modalities.tasks import questions

    stream = questions(seed, "train")
    some = lambda: [example(adapter, next(stream)) for _ in range(64)]  # noqa: E731
    fit(model, lambda: cross_entropy(model, adapter, some()), 600, 2e-3, "text")


def learn_to_hear(model, adapter, seed: int) -> None:
    """The encoder alone, by CTC onto the language model's own token embeddings: what it hears comes out as the tokens
    of what was said, spread over time. The language model does not move."""
    heard = list(hearings(adapter, clips("train", seed + 1, 12000, pitches=(20, 85))))
    rng = random.Random(seed)
    fit(model.audio_tower, lambda: ctc(model, adapter, rng.sample(heard, 32)), 4500, 1.5e-3, "hearing")


def hearings(adapter, pairs: list):
    """(mel frames [80, frames], tokens said) of each clip."""
    import torch

    for some in itertools.batched(pairs, 64):
        inputs = adapter.batch([example(adapter, question, wave, repeat=True)[0] for question, wave in some])
        frames = inputs["feature_attention_mask"].sum(1)
        for mels, length, (question, _) in zip(inputs["input_features"], frames, some, strict=True):
            yield mels[:, :length].to(torch.float16), adapter.tokenizer(question.prompt)["input_ids"]


def ctc(model, adapter, some: list):
    """Mean CTC loss of what was said, per token; the padding token is the blank."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([mels.shape[1] for mels, _ in some])
    mels = pad_sequence([masked(mels.float()).T for mels, _ in some], batch_first=True).transpose(1, 2)
    present = torch.arange(mels.shape[2]) < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        states = model.get_audio_features(mels, present.long()).last_hidden_state
        logits = states @ model.get_input_embeddings().weight.detach().T
    frames = model.audio_tower._get_feat_extract_output_lengths(lengths)[1]
    return aligned(logits.float().split(frames.tolist()), [ids for _, ids in some], adapter.tokenizer.pad_token_id)


def aligned(logits, targets: list[list[int]], blank: int):
    """Mean CTC loss, per token, of logits ([length, vocabulary] of each) against their tokens."""
    import torch
    from torch.nn.functional import ctc_loss
    from torch.nn.utils.rnn import pad_sequence

    from xmodal_opd.tokens import pad

    logp = pad_sequence([one.log_softmax(-1) for one in logits])
    lengths, sizes = (torch.tensor([len(one) for one in some]) for some in (logits, targets))
    return ctc_loss(logp, pad(targets, 0.0, torch.long), lengths, sizes, blank=blank, zero_infinity=True)


def masked(mels):
    """One band of frequencies and one stretch of time blanked, as in SpecAugment (arXiv:1904.08779)."""
    import torch

    mels = mels.clone()
    for axis, widest in ((0, 10), (1, 6)):
        width = int(torch.randint(widest + 1, ()))
        start = int(torch.randint(max(1, mels.shape[axis] - width), ()))
        mels.narrow(axis, start, min(width, mels.shape[axis] - start)).fill_(mels.mean())
    return mels


def learn_to_answer(model, adapter, seed: int) -> None:
    """Spoken questions with their answers, clean as the recording of a studio, and written ones among them."""
    from modalities.tasks import questions

    asked = clips("train", seed + 2, 6000)
    rng, stream = random.Random(seed), questions(seed + 2, "train")

    def loss():
        some = [example(adapter, question, wave) for question, wave in rng.sample(asked, 24)]
        return cross_entropy(model, adapter, some + [example(adapter, next(stream)) for _ in range(8)])

    fit(model, loss, 1200, 1e-3, "answering")


def stages(from_base: bool) -> dict[str, Callable[[Any, Any, int], None]]:
    """By name, in their order; a base has been through those of text and speech."""
    from tools import tiny_sight

    spoken = {"text": learn_text, "hearing": learn_to_hear, "answering": learn_to_answer}
    seen = {
        "words": tiny_sight.learn_words,
        "reading": tiny_sight.learn_to_read,
        "reading well": tiny_sight.learn_to_read_well,
        "scenes": tiny_sight.learn_scenes,
        "figures": tiny_sight.learn_figures,
        "charts": tiny_sight.learn_charts,
        "looking": tiny_sight.learn_to_look,
    }
    return seen if from_base else spoken | seen


def build(folder: Path, work: Path, seed: int, base: Path | None) -> None:
    """Train what is not yet in `work`, and write the model with its processor to `folder` in bfloat16."""
    import torch

    from modalities.chat import ChatAdapter
    from modalities.tasks import questions
    from xmodal_opd.models import load_model, load_processor

    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    asked = itertools.islice(questions(seed, "train"), 20000)
    words = f"user\nassistant\n{REPEAT} {{0.prompt}} {{0.response}}"
    tokenizer = load_processor(str(base)).tokenizer if base else make_tokenizer(words.format(q) for q in asked)
    processor = make_processor(tokenizer)
    model = make_model(tokenizer, seed)
    if base:
        kept = load_model(str(base)).state_dict()
        model.load_state_dict({k: v for k, v in kept.items() if not k.startswith("visual.")}, strict=False)
    adapter = ChatAdapter(processor, 512)
    tests = held_out(adapter, seed)
    for name, stage in stages(base is not None).items():
        kept = work / f"{name}.pt"
        if not kept.exists():
            torch.manual_seed(seed)
            model.requires_grad_(True)
            stage(model, adapter, seed)
            torch.save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept, weights_only=True))
        figures = {view: accuracy(model, adapter, some) for view, some in tests.items()}
        print(f"after {name}, {time.monotonic() - began:.0f} s: {figures}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="where finished stages are kept")
    parser.add_argument("--base", type=Path, help="a folder built before, to go on from after the stages of speech")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    build(arguments.folder, arguments.work, arguments.seed, arguments.base)


if __name__ == "__main__":
    main()
