"""Tiny random instances of real model classes, with their real processors and a tokenizer trained in the test."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers

from tools import build_tiny

HF: Any = transformers  # its lazy names are beyond a type checker
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 1024}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
VISION = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
AUDIO = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}


def template(audio: str = "", image: str = "", turn: str = "<|im_start|>{}\n", end: str = "<|im_end|>\n") -> str:
    """A chat template that reads content parts, in a family's own tokens."""
    start, ours = turn.format("{{ message['role'] }}"), turn.format("assistant")
    return (
        f"{{% for message in messages %}}{start}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'audio' %}}{audio}{{% elif part['type'] == 'image' %}}{image}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ours}{{% endif %}}"
    )


STRINGS = (  # as the templates of text models: content is one string
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_with(tokenizer, named: Mapping[str, str]) -> Any:
    """The same words, with a family's own special tokens."""
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    other = HF.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=dict(named),
    )
    other.add_tokens(["<|im_start|>"], special_tokens=True)
    return other


def made(cls: type, config: Any, tokenizer) -> Any:
    torch.manual_seed(0)
    model = cls(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def ids(tokenizer, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def whisper(mels: int = 80, seconds: int = 10, **more: Any) -> Any:
    return HF.WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds, **more)


# ---- text


def qwen2(tokenizer):
    tokenizer = tokenizer_with(tokenizer, {})
    tokenizer.chat_template = STRINGS
    return made(HF.Qwen2ForCausalLM, HF.Qwen2Config(vocab_size=len(tokenizer), **TEXT), tokenizer), tokenizer


def llama(tokenizer):
    tokenizer = tokenizer_with(tokenizer, {})
    tokenizer.chat_template = STRINGS
    config = HF.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **TEXT)
    return made(HF.LlamaForCausalLM, config, tokenizer), tokenizer


# ---- speech


def omni(tokenizer):
    return build_tiny.make_model(tokenizer, 0), build_tiny.make_processor(tokenizer)


def qwen2_audio(tokenizer):
    audio = {"num_mel_bins": 80, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    audio |= {"d_model": 32, "max_source_positions": 500}
    config = HF.Qwen2AudioConfig(
        audio_config=audio,
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = HF.Qwen2AudioProcessor(feature_extractor=whisper(), tokenizer=tokenizer)  # brings its template
    return made(HF.Qwen2AudioForConditionalGeneration, config, tokenizer), processor


def qwen3_omni(tokenizer):
    tokenizer = tokenizer_with(tokenizer, {**VISION, **AUDIO})
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 12}
    audio = {"num_mel_bins": 80, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    audio |= {"d_model": 32, "output_dim": 48, "downsample_hidden_size": 16, "n_window": 50, "n_window_infer": 200}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    names = ids(
        tokenizer,
        audio_token_id="<|audio_pad|>",
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        audio_start_token_id="<|audio_start|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
        user_token_id="user",
    )
    text = {**TEXT, **experts, "vocab_size": len(tokenizer), "rope_parameters": MROPE}
    config = HF.Qwen3OmniMoeThinkerConfig(audio_config=audio, vision_config=vision, text_config=text, **names)
    processor = HF.Qwen3OmniMoeProcessor(
        image_processor=HF.Qwen2VLImageProcessor(size=PIXELS, patch_size=16, merge_size=2),
        video_processor=HF.Qwen2VLVideoProcessor(size=PIXELS, patch_size=16, merge_size=2),
        feature_extractor=whisper(return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=template(
            "<|audio_start|><|audio_pad|><|audio_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )
    return made(HF.Qwen3OmniMoeThinkerForConditionalGeneration, config, tokenizer), processor


def granite_speech(tokenizer):
    tokenizer = tokenizer_with(tokenizer, {"audio_token": "<|audio|>"})
    tokenizer.chat_template = STRINGS  # the real one reads strings, too
    encoder = {"num_layers": 2, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "context_size": 50, "max_pos_emb": 64}
    joined = {"model_type": "blip_2_qformer", "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64}
    joined |= {"num_hidden_layers": 1, "num_attention_heads": 2, "cross_attention_frequency": 1}
    scaled = {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.5}
    config = HF.GraniteSpeechConfig(
        text_config={"model_type": "granite", "vocab_size": len(tokenizer), **TEXT, **scaled},
        encoder_config=encoder,
        projector_config=joined,
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    processor = HF.GraniteSpeechProcessor(HF.GraniteSpeechFeatureExtractor(), tokenizer)
    return made(HF.GraniteSpeechForConditionalGeneration, config, tokenizer), processor


# ---- sight


def qwen2_5_vl(tokenizer):
    tokenizer = tokenizer_with(tokenizer, VISION)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
    config = HF.Qwen2_5_VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": MROPE, **TEXT},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **vision_ids(tokenizer),
    )
    processor = HF.Qwen2_5_VLProcessor(
        image_processor=HF.Qwen2VLImageProcessor(size=PIXELS, patch_size=14, merge_size=2),
        video_processor=HF.Qwen2VLVideoProcessor(size=PIXELS, patch_size=14, merge_size=2),
        tokenizer=tokenizer,
        chat_template=template(image=SEEN),
    )
    return made(HF.Qwen2_5_VLForConditionalGeneration, config, tokenizer), processor


def vision_ids(tokenizer) -> dict[str, int]:
    return ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def qwen3_vl(tokenizer):
    tokenizer = tokenizer_with(tokenizer, VISION)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = HF.Qwen3VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": MROPE, "head_dim": 12, **TEXT},
        vision_config=vision,
        **vision_ids(tokenizer),
    )
    processor = HF.Qwen3VLProcessor(
        image_processor=HF.Qwen2VLImageProcessor(size=PIXELS, patch_size=16, merge_size=2),
        video_processor=HF.Qwen3VLVideoProcessor(size=PIXELS, patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        chat_template=template(image=SEEN),
    )
    return made(HF.Qwen3VLForConditionalGeneration, config, tokenizer), processor


def smolvlm(tokenizer):
    places = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = tokenizer_with(tokenizer, named)
    tokenizer.add_tokens(places, special_tokens=True)
    config = HF.SmolVLMConfig(
        vision_config={**SIZES, "hidden_size": 32, "image_size": 32, "patch_size": 8},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **TEXT,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = HF.SmolVLMProcessor(
        image_processor=HF.SmolVLMImageProcessor(**edges, do_image_splitting=True),
        video_processor=HF.SmolVLMVideoProcessor(
            **edges, num_frames=2, fps=1, video_sampling={"video_size": {"longest_edge": 32}, "max_frames": 2, "fps": 1}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template(image="<image>", turn="<|im_start|>{}: ", end="<end_of_utterance>\n"),
    )
    return made(HF.SmolVLMForConditionalGeneration, config, tokenizer), processor


class Family(NamedTuple):
    make: Callable[[Any], tuple[Any, Any]]  # tokenizer -> model and processor
    encoder: str | None = None  # parameters whose name starts so hear or see


FAMILIES = {
    "omni": Family(omni, "audio_tower"),
    "qwen2_audio": Family(qwen2_audio, "audio_tower"),
    "qwen3_omni": Family(qwen3_omni, "audio_tower"),
    "granite_speech": Family(granite_speech, "encoder"),
    "qwen2_5_vl": Family(qwen2_5_vl, "model.visual"),
    "qwen3_vl": Family(qwen3_vl, "model.visual"),
    "smolvlm": Family(smolvlm, "model.vision_model"),
    "qwen2": Family(qwen2),
    "llama": Family(llama),
}
