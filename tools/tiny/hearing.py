"""What the small default model learns first: questions as text, hearing by CTC, spoken questions with their answers."""

import itertools
import random

import torch
from torch.nn.utils.rnn import pad_sequence

from modalities.tasks import questions
from tools.tiny.lessons import aligned, answer_loss, example, fit
from tools.tiny.media import clips


def learn_text(model, adapter, seed: int) -> None:
    stream = questions(seed, "train")
    some = lambda: [example(adapter, next(stream)) for _ in range(64)]  # noqa: E731
    fit(model, lambda: answer_loss(model, adapter, some()), 600, 2e-3, "text")


def learn_to_hear(model, adapter, seed: int) -> None:
    """The encoder alone, by CTC onto the language model's own token embeddings: what it hears comes out as the tokens
    of what was said, spread over time. The language model does not move."""
    heard = list(hearings(adapter, clips("train", seed + 1, 12000, pitches=(20, 85))))
    rng = random.Random(seed)
    fit(model.audio_tower, lambda: ctc(model, adapter, rng.sample(heard, 32)), 4500, 1.5e-3, "hearing")


def hearings(adapter, pairs: list):
    """(mel frames [80, frames], tokens said) of each clip."""
    for some in itertools.batched(pairs, 64):
        inputs = adapter.batch([example(adapter, question, wave, repeat=True)[0] for question, wave in some])
        frames = inputs["feature_attention_mask"].sum(1)
        for mels, length, (question, _) in zip(inputs["input_features"], frames, some, strict=True):
            yield mels[:, :length].to(torch.float16), adapter.tokenizer(question.prompt)["input_ids"]


def ctc(model, adapter, some: list):
    """Mean CTC loss of what was said, per token; the padding token is the blank."""
    lengths = torch.tensor([mels.shape[1] for mels, _ in some])
    mels = pad_sequence([masked(mels.float()).T for mels, _ in some], batch_first=True).transpose(1, 2)
    present = torch.arange(mels.shape[2]) < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        states = model.get_audio_features(mels, present.long()).last_hidden_state
        logits = states @ model.get_input_embeddings().weight.detach().T
    frames = model.audio_tower._get_feat_extract_output_lengths(lengths)[1]
    return aligned(logits.float().split(frames.tolist()), [ids for _, ids in some], adapter.tokenizer.pad_token_id)


def masked(mels):
    """One band of frequencies and one stretch of time blanked, as in SpecAugment (arXiv:1904.08779)."""
    mels = mels.clone()
    for axis, widest in ((0, 10), (1, 6)):
        width = int(torch.randint(widest + 1, ()))
        start = int(torch.randint(max(1, mels.shape[axis] - width), ()))
        mels.narrow(axis, start, min(width, mels.shape[axis] - start)).fill_(mels.mean())
    return mels


def learn_to_answer(model, adapter, seed: int) -> None:
    """Spoken questions with their answers, clean as the recording of a studio, and written ones among them."""
    asked = clips("train", seed + 2, 6000)
    rng, stream = random.Random(seed), questions(seed + 2, "train")

    def loss():
        some = [example(adapter, question, wave) for question, wave in rng.sample(asked, 24)]
        return answer_loss(model, adapter, some + [example(adapter, next(stream)) for _ in range(8)])

    fit(model, loss, 1200, 1e-3, "answering")
