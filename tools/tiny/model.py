"""A few-million-parameter Qwen2.5-Omni thinker with random weights, its tokenizer and its processor."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from xmodal_opd.models import attend_in_blocks

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
