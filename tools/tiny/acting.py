"""The small policy and its lessons: to act on the state in words, to see where things are, to act by the camera."""

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import torch

from modalities.action.adapter import QUESTION, ActionAdapter
from modalities.action.metaworld import LOOKS
from modalities.action.tokens import BINS, ActionTokens
from tools.tiny import model as thinker
from tools.tiny.demonstrations import CAMERA, CHUNK, PIXELS, SIZE, Step, demonstrations, wanderings
from tools.tiny.lessons import fit
from xmodal_opd.hidden import head, hidden_repeated

MANY, FEW, TWO = 150, 64, 2  # demonstrations of each task: in words, located, and imitated by the camera


WANDERINGS = 180  # episodes of each task in which the hand is shoved all the time


FIRST = 1_000_000  # number of the first start state that is demonstrated; those of recipes are far below


NUMBERS = tuple(f"{n:+d}" for n in range(-255, 256))  # each a token of its own: half centimetres, with their sign


WAVES = 0.07  # how far waves go: about the embeddings of words


SPREAD = 1.5  # places: a number that is wanted also says that its neighbours are nearly right


def new_policy(seed: int) -> tuple[Any, ActionAdapter]:
    """A policy with random weights, and the adapter it is asked through."""
    words = [f"user\nassistant\ngrip hand goal {what}\n{QUESTION.format(say.lower())}" for say, what in LOOKS.values()]
    tokenizer = thinker.make_tokenizer(words * 50, 512, NUMBERS, BINS)
    tokens = ActionTokens(len(tokenizer), CHUNK, SIZE)
    processor = thinker.make_processor(tokenizer)
    adapter = ActionAdapter(processor, 400, tokens=tokens, cameras=[CAMERA], image_size=PIXELS)
    return make_model(tokenizer, seed), adapter


def make_model(tokenizer: Any, seed: int) -> Any:
    """A thinker of about 1.4 million parameters; its ears are as small as their class allows, and not trained."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "rope_parameters": rope}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    vision = {"hidden_size": 96, "intermediate_size": 288}
    model = thinker.make_model(tokenizer, seed, 128, text, audio, vision)
    keep_numbers_in_line(model, tokenizer.convert_tokens_to_ids(NUMBERS))
    return model


def keep_numbers_in_line(model: Any, ids: Sequence[int]) -> None:
    """Embed every number as waves of its value, and keep it so, but for the decay of weights: what is nearly a number
    is read nearly as that number. With embeddings of their own, an encoder that is off by a centimetre says something
    else altogether, and the gradient through the language model does not tell it where to go."""
    weight, where = model.get_input_embeddings().weight, torch.tensor(ids)
    lengths = torch.logspace(math.log10(12), math.log10(1200), weight.shape[1] // 2)
    angles = 2 * math.pi * torch.tensor([int(n) for n in NUMBERS])[:, None] / lengths
    with torch.no_grad():
        weight[where] = WAVES * torch.cat([angles.sin(), angles.cos()], -1)
    weight.register_hook(lambda slope: slope.index_fill(0, where, 0))


def views(adapter: Any, steps: Sequence[Step], seen: bool) -> list[Any]:
    """What the student sees at some steps, or what the teacher reads."""
    asked = [(QUESTION.format(LOOKS[task][0].lower()), text, image) for task, text, image, _ in steps]
    if not seen:
        return [adapter.asked("", f"{text}\n{question}") for question, text, _ in asked]
    return [adapter.asked("", question, [adapter.image("", {CAMERA: image}, CAMERA)]) for question, _, image in asked]


def action_logp(model: Any, adapter: Any, steps: Sequence[Step], seen: bool) -> Any:
    """Log-probs [n, CHUNK * SIZE, 256] of the next actions."""
    blank = torch.full((len(steps), CHUNK * SIZE), adapter.tokenizer.pad_token_id)
    hidden = hidden_repeated(model, adapter.batch(views(adapter, steps, seen)), blank)
    return (hidden @ head(model)[adapter.tokens.among].T).log_softmax(-1)


def imitation(model: Any, adapter: Any, steps: Sequence[Step], seen: bool) -> Any:
    """Mean cross-entropy of the demonstrated tokens, each spread over its neighbours."""
    wanted = torch.tensor([adapter.ids(actions) for *_, actions in steps]) - adapter.tokens.among.start
    return spread_out(action_logp(model, adapter, steps, seen), wanted)


def spread_out(logp: Any, wanted: Any) -> Any:
    """Mean cross-entropy of log-probs [.., W] with the places `wanted` [..], whose neighbours are nearly right."""
    places = torch.arange(logp.shape[-1], dtype=logp.dtype)
    near = (-((places - wanted[..., None]) ** 2) / (2 * SPREAD**2)).exp()
    return -(near / near.sum(-1, keepdim=True) * logp).sum(-1).mean()


def learn_states(model: Any, adapter: Any, seed: int) -> None:
    """Many demonstrations, in words."""
    steps, rng = demonstrations(MANY, FIRST + 1000, pushed=True, seen=False), random.Random(seed)
    fit(model, lambda: imitation(model, adapter, rng.sample(steps, 64), seen=False), 700, 2.5e-3, "states")


def learn_places(model: Any, adapter: Any, seed: int) -> None:
    """The vision encoder alone: its first tokens are the numbers of the state, in order, as the language model reads
    them. First on what experts see, then on what anyone may see who goes astray."""
    shown, astray = demonstrations(FEW, FIRST, pushed=True, seen=True), wanderings(WANDERINGS, FIRST + 100_000)
    locate(model, adapter, shown, seed, 2100, 1.5e-3, "places")
    locate(model, adapter, astray, seed, 1400, 1.2e-3, "places of who goes astray")


def locate(model: Any, adapter: Any, shown: Sequence[Step], seed: int, steps: int, rate: float, name: str) -> None:
    rng = random.Random(seed)

    def loss() -> Any:
        drawn = rng.sample(shown, 32)
        told = [adapter.tokenizer.convert_tokens_to_ids(re.findall(r"[+-]\d+", text)) for _, text, *_ in drawn]
        return far_off(model, adapter, [image for _, _, image, _ in drawn], told)

    fit(model.visual, loss, steps, rate, name)


def far_off(model: Any, adapter: Any, images: Sequence[Any], numbers: Sequence[Sequence[int]]) -> Any:
    """How far images' first tokens are from the embeddings of `numbers`, as a part of how long these are."""
    inputs = adapter.processor.image_processor(images=list(images), return_tensors="pt")
    states = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    states = torch.cat(list(states)) if isinstance(states, tuple | list) else states
    wanted = model.get_input_embeddings()(torch.tensor(numbers)).detach()
    found = states.view(len(images), -1, states.shape[-1])[:, : wanted.shape[1]]
    return (found - wanted).square().sum() / wanted.square().sum()


def learn_to_see(model: Any, adapter: Any, seed: int) -> None:
    """To act by the camera: a little, from two demonstrations of each task. The language model stays, and with it what
    it does with words."""
    shown, rng = demonstrations(TWO, FIRST, pushed=True, seen=True), random.Random(seed)

    def loss() -> Any:
        return imitation(model, adapter, rng.sample(shown, 48), seen=True)

    fit(model.visual, loss, 20, 1e-3, "seeing", warmup=10, final=1.0)


def learn_from_words(model: Any, adapter: Any, seed: int) -> None:
    """To act by the camera as the same model does that reads the state, wherever the hand may be: an expert."""
    shown = demonstrations(FEW, FIRST, pushed=True, seen=True) + wanderings(WANDERINGS, FIRST + 100_000)
    rng = random.Random(seed)
    fit(model.visual, lambda: apart(model, adapter, rng.sample(shown, 48)), 300, 1e-3, "expert")


def apart(model: Any, adapter: Any, steps: Sequence[Step]) -> Any:
    """Mean of both KLs between what the model does by the camera and what it does by words, which stays."""
    seen = action_logp(model, adapter, steps, seen=True)
    with torch.no_grad():
        read = action_logp(model, adapter, steps, seen=False)
    return ((seen.exp() - read.exp()) * (seen - read)).sum(-1).mean() / 2


LESSONS = {"states": learn_states, "places": learn_places}
STUDENT, EXPERT = LESSONS | {"seeing": learn_to_see}, LESSONS | {"expert": learn_from_words}
