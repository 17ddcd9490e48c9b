"""Tiny random instances of real model classes, with their real processors and a tokenizer trained in the test."""

import base64
import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tools.tiny import model as tiny

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
        extra_special_tokens={"turn_token": "<|im_start|>", **named},
    )
    return other


def made(cls: type, config: Any, tokenizer, sure: float = 10) -> Any:
    """A random model that is sure of itself: to one that finds all tokens alike, every two views are the same."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sure)
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
    config = HF.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2, **TEXT)
    return made(HF.LlamaForCausalLM, config, tokenizer, sure=1), tokenizer


# ---- speech


def omni(tokenizer):
    text = {"num_hidden_layers": 2, "rope_parameters": MROPE | {"mrope_section": [4, 4, 4]}}
    audio = {"d_model": 96, "encoder_layers": 2, "encoder_ffn_dim": 192}
    vision = {"depth": 1, "fullatt_block_indexes": [0]}
    return tiny.make_model(tokenizer, 0, 96, text, audio, vision), tiny.make_processor(tokenizer)


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
    scaled = {"logits_scaling": 0.25, "embedding_multiplier": 5.0, "residual_multiplier": 0.5}
    config = HF.GraniteSpeechConfig(
        text_config={"model_type": "granite", "vocab_size": len(tokenizer), **TEXT, **scaled},
        encoder_config=encoder,
        projector_config=joined,
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    processor = HF.GraniteSpeechProcessor(HF.GraniteSpeechFeatureExtractor(), tokenizer)
    return made(HF.GraniteSpeechForConditionalGeneration, config, tokenizer), processor


def voxtral(tokenizer):
    words = HF.MistralCommonBackend(tekken(tokenizer))
    audio = {"num_mel_bins": 80, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    audio |= {"intermediate_size": 128, "max_source_positions": 1500}  # four states become one token
    config = HF.VoxtralConfig(
        audio_config=audio,
        text_config={"model_type": "llama", "vocab_size": words.vocab_size, "head_dim": 12, **TEXT},
        audio_token_id=words.convert_tokens_to_ids("[AUDIO]"),
    )
    processor = HF.VoxtralProcessor(whisper(seconds=30), words)
    return made(HF.VoxtralForConditionalGeneration, config, words), processor


def tekken(tokenizer) -> Path:
    """The same words as a file for mistral-common, with the tokens of Voxtral at their own places."""
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    learned = sorted(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"].items(), key=itemgetter(1))
    words = [bytes([i]) for i in range(256)]
    words += [bytes(map(bytes_of.get, word)) for word, _ in learned if len(word) > 1 and {*word} <= {*bytes_of}]
    tokens = {token["rank"]: str(token["token_str"].value) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    tokens |= {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    spoken = {"sampling_rate": 16000, "frame_rate": 12.5, "chunk_length_s": 30.0}
    mels = {"num_mel_bins": 80, "hop_length": 160, "window_size": 400}
    sizes = {"num_vocab_tokens": len(words), "default_vocab_size": len(words) + 40, "default_num_special_tokens": 40}
    content = {
        "config": {"pattern": r"\s?\w+|\W", "version": "v7", **sizes},
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": i, "token_str": tokens.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(40)
        ],
        "audio": {**spoken, "audio_encoding_config": mels},
    }
    file = Path(KEPT.name) / "tekken.json"
    file.write_text(json.dumps(content))
    return file


KEPT = TemporaryDirectory()  # mistral-common copies its file when the processor is saved


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
        image_processor=HF.SmolVLMImageProcessorPil(**edges, do_image_splitting=True),
        video_processor=HF.SmolVLMVideoProcessor(
            **edges, num_frames=2, fps=1, video_sampling={"video_size": {"longest_edge": 32}, "max_frames": 2, "fps": 1}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=template(image="<image>", turn="<|im_start|>{}: ", end="<end_of_utterance>\n"),
    )
    return made(HF.SmolVLMForConditionalGeneration, config, tokenizer), processor


# ---- both


def gemma3n(tokenizer):
    """Four layers of which two read the keys and values of the others, windows of 16 tokens, capped logits."""
    words = {"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>"}
    seen = {"eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    heard = {"eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    spare = {kind: {f"{kind}_{i}": f"<{kind}_{i}>" for i in range(2)} for kind in ("vision", "audio")}
    tokenizer = tokenizer_with(tokenizer, words | seen | spare["vision"] | heard | spare["audio"])
    first = ids(tokenizer, vision="<end_of_image>", audio="<end_of_audio>")
    config = HF.Gemma3nConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "head_dim": 12,
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": first["vision"],
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "final_logit_softcapping": 2.0,  # low enough to matter to a random model
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_size": 4,
            "vocab_offset": first["vision"],
        },
        audio_config={
            "vocab_size": 4,
            "vocab_offset": first["audio"],
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
        },
        vision_soft_tokens_per_image=4,
        **ids(tokenizer, **{f"{name}_id": token for name, token in (words | seen | heard).items()}),
    )
    processor = HF.Gemma3nProcessor(
        feature_extractor=HF.Gemma3nAudioFeatureExtractor(),
        image_processor=HF.SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        chat_template=template("<audio_soft_token>", "<image_soft_token>"),
        image_seq_length=4,
    )
    return made(HF.Gemma3nForConditionalGeneration, config, tokenizer), processor


class Family(NamedTuple):
    make: Callable[[Any], tuple[Any, Any]]  # tokenizer -> model and processor
    encoder: str | None = None  # parameters whose name starts so hear or see


FAMILIES = {
    "omni": Family(omni, "audio_tower"),
    "qwen2_audio": Family(qwen2_audio, "audio_tower"),
    "qwen3_omni": Family(qwen3_omni, "audio_tower"),
    "granite_speech": Family(granite_speech, "encoder"),
    "voxtral": Family(voxtral, "audio_tower"),
    "qwen2_5_vl": Family(qwen2_5_vl, "model.visual"),
    "qwen3_vl": Family(qwen3_vl, "model.visual"),
    "smolvlm": Family(smolvlm, "model.vision_model"),
    "gemma3n": Family(gemma3n, "model.audio_tower"),
    "qwen2": Family(qwen2),
    "llama": Family(llama),
}
