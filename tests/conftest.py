"""Tiny random instances of real model classes, with their real processors, made once a session."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperFeatureExtractor,
)

from modalities.audio.adapter import AudioAdapter
from modalities.tasks import questions
from tools import build_tiny
from xmodal_opd.models import attend_in_blocks
from xmodal_opd.types import Pair


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    texts = [f"user\nassistant\n{q.prompt} {q.response}" for q in itertools.islice(questions(0, "train"), 500)]
    return build_tiny.make_tokenizer(texts)


def omni(tokenizer):
    return build_tiny.make_model(tokenizer, 0), build_tiny.make_processor(tokenizer)


def qwen2_audio(tokenizer):
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 80,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 500,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
        },
        audio_token_index=token("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=10)
    processor = Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=build_tiny.TEMPLATE)
    return model, processor


def qwen2(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.chat_template = build_tiny.TEMPLATE
    return model, tokenizer


ROOT = Path(__file__).parents[1]
FAMILIES = {"omni": omni, "qwen2_audio": qwen2_audio, "qwen2": qwen2}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tokenizer):
    """(name, model, processor, adapter) of each supported class."""
    model, processor = FAMILIES[request.param](tokenizer)
    return request.param, attend_in_blocks(model.eval()), processor, AudioAdapter(processor, 512)


def make_pairs(adapter: AudioAdapter, count: int, audio: bool = True) -> list[Pair]:
    """Questions under an audio view of seconds of noise, all of different lengths, and a text view."""
    pairs = []
    for i, q in enumerate(itertools.islice(questions(1, "train"), count)):
        wave = np.random.default_rng(i).normal(0, 0.1, 8000 + 2400 * i).astype(np.float32)
        text = [{"role": "user", "content": [{"type": "text", "text": q.prompt}]}]
        spoken = [{"role": "user", "content": [{"type": "audio", "audio": "q.flac"}]}]
        views = {"teacher": {"key": str(i), "prompt": adapter.template(text), "audio": []}}
        views["student"] = (
            {"key": str(i), "prompt": adapter.template(spoken), "audio": [wave]} if audio else views["teacher"]
        )
        pairs.append(Pair(f"q{i}", views, q.answer, {"task": q.task}))
    return pairs


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer):
    """A folder with a random tiny model and spoken shards, and a recipe on them: {"folder", "recipe"}."""
    from modalities.audio.prepare import prepare

    folder = tmp_path_factory.mktemp("world")
    model, processor = omni(tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for split, count in (("train", 24), ("test", 6)):
        prepare(folder / split, count=count, split=split, accents=["en-us"], per_shard=8, progress=False, workers=1)
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
include: [{ROOT / "configs" / "methods" / "cord.yaml"}]
name: tiny
model: {{name: {folder / "model"}, train: [audio_tower]}}
data: {{train: {folder / "train"}, test: {folder / "test"}}}
rollout: {{max_tokens: 8}}
optim: {{lr: 1e-3}}
train: {{steps: 4, prompts: 3, threads: 1}}
eval: {{every: 2, during: 3}}
checkpoint: {{every: 1, keep: 2}}
"""
    )
    return {"folder": folder, "recipe": str(recipe)}
