#!/usr/bin/env python
"""Build the small default policy from nothing: a 1.4-million-parameter Qwen2.5-Omni thinker that acts in Meta-World. It
acts well on the state in words, of which it saw many demonstrations, and worse by the camera, of which it saw few: that
is the gap a first run of `configs/vla_opd.yaml` closes.

    MUJOCO_GL=egl python tools/tiny_robot.py xmodal_opd/assets/tiny_robot --seed 0

Demonstrations are the scripted experts'. Each stage is a pure function of the one before and the seed, and is kept in
--work, so that a stopped build goes on.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TASKS = ("button-press-topdown-v3", "coffee-button-v3", "handle-press-v3", "faucet-open-v3", "button-press-v3")
CHUNK, SIZE = 8, 4
CAMERA, PIXELS = "corner2", 112
MANY, FEW = 150, 3  # demonstrations of each task: in words, and seen
FIRST = 1_000_000  # number of the first start state that is demonstrated; those of recipes are far below
NUMBERS = tuple(f"{n:+d}" for n in range(-255, 256))  # each a token of its own: half centimetres, with their sign
SPREAD = 1.5  # places: a number that is wanted also says that its neighbours are nearly right


# ---- demonstrations


def demonstrate(job: tuple[str, int, bool, bool]) -> list[tuple[str, Any, Any]]:
    """(state in words, picture or None, the expert's next actions [CHUNK, SIZE]) at the steps of one episode; runs in
    worker processes. With `pushed` the hand is shoved now and then, and only steps without a shove ahead are kept."""
    task, start, pushed, seen = job
    rng, world = random.Random(f"{task} {start}"), world_of_this_process(seen)
    observation, steps, calm, after = world.reset(task, start), [], [], 0
    shoves = 0
    while after < CHUNK and len(steps) < 260:
        action = world.expert()
        steps.append((observation["text"], observation["images"].get(CAMERA), action))
        if pushed and not shoves and rng.random() < 0.04:
            shoves, shove = rng.randint(3, 10), [rng.uniform(-1, 1) for _ in range(SIZE)]
        calm.append(not shoves or after > 0)
        observation = world.act((action if calm[-1] else 0.3 * action + shove)[None])  # pyright: ignore[reportPossiblyUnboundVariable]
        shoves = max(0, shoves - 1)
        after += observation["success"]
    kept = [t for t in range(len(steps) - CHUNK) if all(calm[t : t + CHUNK])]
    return [(*steps[t][:2], [action for *_, action in steps[t : t + CHUNK]]) for t in kept]


def world_of_this_process(seen: bool) -> Any:
    """One simulator for all episodes of a process. It goes on when a task is done: the last steps need labels too."""
    from modalities.action.metaworld import MetaWorld

    class Endless(MetaWorld):
        def over(self) -> bool:
            return False

        def picture(self, height: int, width: int) -> Any:
            return super().picture(height, width) if seen else None

    if (world := WORLDS.get(seen)) is None:
        world = WORLDS[seen] = Endless(CAMERA, PIXELS, PIXELS)
    return world


WORLDS: dict[bool, Any] = {}


def demonstrations(count: int, first: int, pushed: bool, seen: bool) -> list[tuple[str, str, Any, Any]]:
    """(task, state in words, picture, actions) of `count` episodes of every task."""
    from rich.progress import track

    jobs = [(task, first + i, pushed, seen) for i in range(count) for task in TASKS]
    with get_context("spawn").Pool(2) as pool:
        found = track(pool.imap(demonstrate, jobs, chunksize=8), "demonstrating", len(jobs))
        return [(task, *step) for (task, *_), steps in zip(jobs, found, strict=True) for step in steps]


# ---- the model


def make_model(tokenizer: Any, seed: int) -> Any:
    """A thinker of about 1.4 million parameters; its ears are as small as their class allows, and not trained."""
    from tools import build_tiny

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "rope_parameters": rope}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    vision = {"hidden_size": 96, "intermediate_size": 288}
    return build_tiny.make_model(tokenizer, seed, 128, text, audio, vision)


def views(adapter: Any, steps: Sequence[tuple[str, str, Any, Any]], seen: bool) -> list[Any]:
    """What the student sees at some steps, or what the teacher reads."""
    from modalities.action.adapter import QUESTION
    from modalities.action.metaworld import LOOKS

    asked = [(QUESTION.format(LOOKS[task][0].lower()), text, image) for task, text, image, _ in steps]
    if not seen:
        return [adapter.asked("", f"{text}\n{question}") for question, text, _ in asked]
    return [adapter.asked("", question, [adapter.image("", {CAMERA: image}, CAMERA)]) for question, _, image in asked]


def imitation(model: Any, adapter: Any, steps: Sequence[tuple[str, str, Any, Any]], seen: bool) -> Any:
    """Mean cross-entropy of the demonstrated tokens, each spread over its neighbours."""
    import torch

    from xmodal_opd.models import head, hidden_repeated

    tokens = adapter.tokens
    wanted = torch.tensor([adapter.ids(actions) for *_, actions in steps]) - tokens.among.start
    blank = torch.full_like(wanted, adapter.tokenizer.pad_token_id)
    hidden = hidden_repeated(model, adapter.batch(views(adapter, steps, seen)), blank)
    return spread_out((hidden @ head(model)[tokens.among].T).log_softmax(-1), wanted)


def spread_out(logp: Any, wanted: Any) -> Any:
    """Mean cross-entropy of log-probs [.., W] with the places `wanted` [..], whose neighbours are nearly right."""
    import torch

    places = torch.arange(logp.shape[-1], dtype=logp.dtype)
    near = (-((places - wanted[..., None]) ** 2) / (2 * SPREAD**2)).exp()
    return -(near / near.sum(-1, keepdim=True) * logp).sum(-1).mean()


# ---- lessons


def learn_states(model: Any, adapter: Any, seed: int) -> None:
    """Many demonstrations, in words."""
    from tools.build_tiny import fit

    steps, rng = demonstrations(MANY, FIRST + 1000, pushed=True, seen=False), random.Random(seed)
    fit(model, lambda: imitation(model, adapter, rng.sample(steps, 64), seen=False), 1500, 2.5e-3, "states")


def learn_places(model: Any, adapter: Any, seed: int) -> None:
    """The vision encoder alone, on the pictures of a few: its first tokens are the numbers of the state, in order, as
    the language model has learnt to read them."""
    from tools.build_tiny import fit

    shown, rng = demonstrations(FEW, FIRST, pushed=False, seen=True), random.Random(seed)
    first = adapter.tokenizer.convert_tokens_to_ids(NUMBERS[0])
    numbers = [[int(n) - int(NUMBERS[0]) for n in re.findall(r"[+-]\d+", text)] for _, text, *_ in shown]
    seen = [(image, wanted) for (_, _, image, _), wanted in zip(shown, numbers, strict=True)]

    def loss() -> Any:
        images, wanted = zip(*rng.sample(seen, 32), strict=True)
        return far_off(model, adapter, images, wanted, slice(first, first + len(NUMBERS)))

    fit(model.visual, loss, 600, 1.5e-3, "places")


def far_off(model: Any, adapter: Any, images: Sequence[Any], wanted: Sequence[Sequence[int]], among: slice) -> Any:
    """Mean cross-entropy of numbers (places in the window `among` of the vocabulary) with images' first tokens."""
    import torch

    inputs = adapter.processor.image_processor(images=list(images), return_tensors="pt")
    states = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    states = torch.cat(list(states)) if isinstance(states, tuple | list) else states
    states = states.view(len(images), -1, states.shape[-1])[:, : len(wanted[0])]
    logp = (states @ model.get_input_embeddings().weight[among].detach().T).log_softmax(-1)
    return spread_out(logp, torch.tensor(wanted))


def learn_to_see(model: Any, adapter: Any, seed: int) -> None:
    """A few by the camera, and those in words among them."""
    from tools.build_tiny import fit

    read, rng = demonstrations(MANY, FIRST + 1000, pushed=True, seen=False), random.Random(seed)
    shown = demonstrations(FEW, FIRST, pushed=False, seen=True)

    def loss() -> Any:
        by_sight = imitation(model, adapter, rng.sample(shown, 24), seen=True)
        return by_sight + imitation(model, adapter, rng.sample(read, 24), seen=False)

    fit(model, loss, 150, 5e-4, "seeing")


STAGES = {"states": learn_states, "places": learn_places, "seeing": learn_to_see}


def build(folder: Path, work: Path, seed: int) -> None:
    """Train what is not yet in `work`, and write the policy with its processor to `folder` in bfloat16."""
    import torch

    from modalities.action.adapter import QUESTION, ActionAdapter
    from modalities.action.metaworld import LOOKS
    from modalities.action.tokens import BINS, ActionTokens
    from tools.build_tiny import make_processor, make_tokenizer

    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    words = [f"user\nassistant\ngrip hand goal {what}\n{QUESTION.format(say.lower())}" for say, what in LOOKS.values()]
    tokenizer = make_tokenizer(words * 50, 512, NUMBERS, BINS)
    processor, model = make_processor(tokenizer), make_model(tokenizer, seed)
    tokens = ActionTokens(len(tokenizer), CHUNK, SIZE)
    adapter = ActionAdapter(processor, 400, tokens=tokens, cameras=[CAMERA], image_size=PIXELS)
    for name, stage in STAGES.items():
        kept = work / f"{name}.pt"
        if not kept.exists():
            torch.manual_seed(seed)
            stage(model, adapter, seed)
            torch.save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept, weights_only=True))
        print(f"after {name}, {time.monotonic() - began:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {size:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/tiny_robot"), help="where stages are kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    build(arguments.folder, arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
