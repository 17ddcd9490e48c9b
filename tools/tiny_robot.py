#!/usr/bin/env python
"""Build the small default policy from nothing: a 1.4-million-parameter Qwen2.5-Omni thinker that acts in Meta-World. It
acts well on the state in words, of which it saw many demonstrations; it sees where things are, and has hardly begun to
act by the camera, from two demonstrations of each task: that is the gap a first run of `configs/vla_opd.yaml` closes.

    MUJOCO_GL=egl python tools/tiny_robot.py xmodal_opd/assets/tiny_robot --seed 0
    MUJOCO_GL=egl python tools/tiny_robot.py runs/expert --expert   # one that does act by the camera, to teach others

Demonstrations are the scripted experts'. Each stage is a pure function of the one before and the seed, and is kept in
--work, so that a stopped build goes on.
"""

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TASKS = ("reach-v3", "reach-wall-v3", "button-press-topdown-v3", "door-unlock-v3", "button-press-topdown-wall-v3")
CHUNK, SIZE = 8, 4
CAMERA, PIXELS = "corner2", 112
MOVED = (-0.2, 0.12, -0.13)  # nearer to the table
MANY, FEW, TWO = 150, 64, 2  # demonstrations of each task: in words, located, and imitated by the camera
WANDERINGS = 180  # episodes of each task in which the hand is shoved all the time
FIRST = 1_000_000  # number of the first start state that is demonstrated; those of recipes are far below
NUMBERS = tuple(f"{n:+d}" for n in range(-255, 256))  # each a token of its own: half centimetres, with their sign
WAVES = 0.07  # how far waves go: about the embeddings of words
SPREAD = 1.5  # places: a number that is wanted also says that its neighbours are nearly right

type Step = tuple[str, str, Any, Any]  # task, state in words, picture, the expert's next actions [CHUNK, SIZE]


# ---- demonstrations


def demonstrate(job: tuple[str, int, bool, bool]) -> list[tuple[str, Any, Any]]:
    """(state in words, picture or None, the expert's next actions [CHUNK, SIZE]) at the steps of one episode; runs in
    worker processes. With `pushed` the hand is shoved now and then, and only steps without a shove ahead are kept."""
    task, start, pushed, seen = job
    rng, world = random.Random(f"{task} {start}"), world_of_this_process(seen)
    observation, steps, calm, after = world.reset(task, start), [], [], 0
    pushes = shoves(rng, 0.04 if pushed else 0.0, 3, 10)
    while after < CHUNK and len(steps) < 260:
        action, shove = world.expert(), next(pushes)
        steps.append((observation["text"], observation["images"].get(CAMERA), action))
        calm.append(shove is None or after > 0)
        observation = world.act((action if calm[-1] else 0.3 * action + shove)[None])
        after += observation["success"]
    kept = [t for t in range(len(steps) - CHUNK) if all(calm[t : t + CHUNK])]
    return [(*steps[t][:2], [action for *_, action in steps[t : t + CHUNK]]) for t in kept]


def wander(job: tuple[str, int]) -> list[tuple[str, Any, None]]:
    """(state in words, picture, None) at every fourth of a hundred steps of an expert who is often shoved."""
    from modalities.action.metaworld import MetaWorld

    task, start = job
    rng, world = random.Random(f"wander {task} {start}"), world_of_this_process(False)
    observation, steps = world.reset(task, start), []
    for step, shove in zip(range(100), shoves(rng, 0.08, 4, 14), strict=False):
        if step % 4 == start % 4:
            steps.append((observation["text"], MetaWorld.picture(world, PIXELS, PIXELS), None))
        action = world.expert()
        observation = world.act((action if shove is None else 0.2 * action + shove)[None])
    return steps


def shoves(rng: random.Random, chance: float, shortest: int, longest: int) -> Iterator[list[float] | None]:
    """What the hand is shoved by [SIZE] at every step, without end, or None: one begins with `chance`."""
    while True:
        if rng.random() < chance:
            steps, shove = rng.randint(shortest, longest), [rng.uniform(-1, 1) for _ in range(SIZE)]
            yield from [shove] * steps
        else:
            yield None


def world_of_this_process(seen: bool) -> Any:
    """One simulator for all episodes of a process. It goes on when a task is done: the last steps need labels too."""
    from modalities.action.metaworld import MetaWorld

    class Endless(MetaWorld):
        def over(self) -> bool:
            return False

        def picture(self, height: int, width: int) -> Any:
            return super().picture(height, width) if seen else None

    if (world := WORLDS.get(seen)) is None:
        world = WORLDS[seen] = Endless(CAMERA, PIXELS, PIXELS, moved=MOVED)
    return world


WORLDS: dict[bool, Any] = {}


def demonstrations(count: int, first: int, pushed: bool, seen: bool) -> list[Step]:
    """Those of `count` episodes of every task."""
    return played(demonstrate, [(task, first + i, pushed, seen) for i in range(count) for task in TASKS])


def wanderings(count: int, first: int) -> list[Step]:
    """What is seen in `count` episodes of every task, where the hand is shoved about; no actions."""
    return played(wander, [(task, first + i) for i in range(count) for task in TASKS])


def played(play: Callable[[Any], list[Any]], jobs: Sequence[tuple[Any, ...]]) -> list[Step]:
    from rich.progress import track

    with get_context("spawn").Pool(2) as pool:
        found = track(pool.imap(play, jobs, chunksize=8), play.__name__, len(jobs))
        return [(job[0], *step) for job, steps in zip(jobs, found, strict=True) for step in steps]


# ---- the model


def make_model(tokenizer: Any, seed: int) -> Any:
    """A thinker of about 1.4 million parameters; its ears are as small as their class allows, and not trained."""
    from tools.tiny import model as tiny

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "rope_parameters": rope}
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    vision = {"hidden_size": 96, "intermediate_size": 288}
    model = tiny.make_model(tokenizer, seed, 128, text, audio, vision)
    keep_numbers_in_line(model, tokenizer.convert_tokens_to_ids(NUMBERS))
    return model


def keep_numbers_in_line(model: Any, ids: Sequence[int]) -> None:
    """Embed every number as waves of its value, and keep it so, but for the decay of weights: what is nearly a number
    is read nearly as that number. With embeddings of their own, an encoder that is off by a centimetre says something
    else altogether, and the gradient through the language model does not tell it where to go."""
    import torch

    weight, where = model.get_input_embeddings().weight, torch.tensor(ids)
    lengths = torch.logspace(math.log10(12), math.log10(1200), weight.shape[1] // 2)
    angles = 2 * math.pi * torch.tensor([int(n) for n in NUMBERS])[:, None] / lengths
    with torch.no_grad():
        weight[where] = WAVES * torch.cat([angles.sin(), angles.cos()], -1)
    weight.register_hook(lambda slope: slope.index_fill(0, where, 0))


def views(adapter: Any, steps: Sequence[Step], seen: bool) -> list[Any]:
    """What the student sees at some steps, or what the teacher reads."""
    from modalities.action.adapter import QUESTION
    from modalities.action.metaworld import LOOKS

    asked = [(QUESTION.format(LOOKS[task][0].lower()), text, image) for task, text, image, _ in steps]
    if not seen:
        return [adapter.asked("", f"{text}\n{question}") for question, text, _ in asked]
    return [adapter.asked("", question, [adapter.image("", {CAMERA: image}, CAMERA)]) for question, _, image in asked]


def action_logp(model: Any, adapter: Any, steps: Sequence[Step], seen: bool) -> Any:
    """Log-probs [n, CHUNK * SIZE, 256] of the next actions."""
    import torch

    from xmodal_opd.hidden import head, hidden_repeated

    blank = torch.full((len(steps), CHUNK * SIZE), adapter.tokenizer.pad_token_id)
    hidden = hidden_repeated(model, adapter.batch(views(adapter, steps, seen)), blank)
    return (hidden @ head(model)[adapter.tokens.among].T).log_softmax(-1)


def imitation(model: Any, adapter: Any, steps: Sequence[Step], seen: bool) -> Any:
    """Mean cross-entropy of the demonstrated tokens, each spread over its neighbours."""
    import torch

    wanted = torch.tensor([adapter.ids(actions) for *_, actions in steps]) - adapter.tokens.among.start
    return spread_out(action_logp(model, adapter, steps, seen), wanted)


def spread_out(logp: Any, wanted: Any) -> Any:
    """Mean cross-entropy of log-probs [.., W] with the places `wanted` [..], whose neighbours are nearly right."""
    import torch

    places = torch.arange(logp.shape[-1], dtype=logp.dtype)
    near = (-((places - wanted[..., None]) ** 2) / (2 * SPREAD**2)).exp()
    return -(near / near.sum(-1, keepdim=True) * logp).sum(-1).mean()


# ---- lessons


def learn_states(model: Any, adapter: Any, seed: int) -> None:
    """Many demonstrations, in words."""
    from tools.tiny.lessons import fit

    steps, rng = demonstrations(MANY, FIRST + 1000, pushed=True, seen=False), random.Random(seed)
    fit(model, lambda: imitation(model, adapter, rng.sample(steps, 64), seen=False), 700, 2.5e-3, "states")


def learn_places(model: Any, adapter: Any, seed: int) -> None:
    """The vision encoder alone: its first tokens are the numbers of the state, in order, as the language model reads
    them. First on what experts see, then on what anyone may see who goes astray."""
    shown, astray = demonstrations(FEW, FIRST, pushed=True, seen=True), wanderings(WANDERINGS, FIRST + 100_000)
    locate(model, adapter, shown, seed, 2100, 1.5e-3, "places")
    locate(model, adapter, astray, seed, 1400, 1.2e-3, "places of who goes astray")


def locate(model: Any, adapter: Any, shown: Sequence[Step], seed: int, steps: int, rate: float, name: str) -> None:
    from tools.tiny.lessons import fit

    rng = random.Random(seed)

    def loss() -> Any:
        drawn = rng.sample(shown, 32)
        told = [adapter.tokenizer.convert_tokens_to_ids(re.findall(r"[+-]\d+", text)) for _, text, *_ in drawn]
        return far_off(model, adapter, [image for _, _, image, _ in drawn], told)

    fit(model.visual, loss, steps, rate, name)


def far_off(model: Any, adapter: Any, images: Sequence[Any], numbers: Sequence[Sequence[int]]) -> Any:
    """How far images' first tokens are from the embeddings of `numbers`, as a part of how long these are."""
    import torch

    inputs = adapter.processor.image_processor(images=list(images), return_tensors="pt")
    states = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    states = torch.cat(list(states)) if isinstance(states, tuple | list) else states
    wanted = model.get_input_embeddings()(torch.tensor(numbers)).detach()
    found = states.view(len(images), -1, states.shape[-1])[:, : wanted.shape[1]]
    return (found - wanted).square().sum() / wanted.square().sum()


def learn_to_see(model: Any, adapter: Any, seed: int) -> None:
    """To act by the camera: a little, from two demonstrations of each task. The language model stays, and with it what
    it does with words."""
    from tools.tiny.lessons import fit

    shown, rng = demonstrations(TWO, FIRST, pushed=True, seen=True), random.Random(seed)

    def loss() -> Any:
        return imitation(model, adapter, rng.sample(shown, 48), seen=True)

    fit(model.visual, loss, 20, 1e-3, "seeing", warmup=10, final=1.0)


def learn_from_words(model: Any, adapter: Any, seed: int) -> None:
    """To act by the camera as the same model does that reads the state, wherever the hand may be: an expert."""
    from tools.tiny.lessons import fit

    shown = demonstrations(FEW, FIRST, pushed=True, seen=True) + wanderings(WANDERINGS, FIRST + 100_000)
    rng = random.Random(seed)
    fit(model.visual, lambda: apart(model, adapter, rng.sample(shown, 48)), 300, 1e-3, "expert")


def apart(model: Any, adapter: Any, steps: Sequence[Step]) -> Any:
    """Mean of both KLs between what the model does by the camera and what it does by words, which stays."""
    import torch

    seen = action_logp(model, adapter, steps, seen=True)
    with torch.no_grad():
        read = action_logp(model, adapter, steps, seen=False)
    return ((seen.exp() - read.exp()) * (seen - read)).sum(-1).mean() / 2


STAGES = {"states": learn_states, "places": learn_places}
STUDENT, EXPERT = STAGES | {"seeing": learn_to_see}, STAGES | {"expert": learn_from_words}


def build(folder: Path, work: Path, seed: int, stages: Mapping[str, Callable[..., None]]) -> None:
    """Train the stages that are not yet in `work`, and write the policy with its processor to `folder` in bfloat16."""
    import torch

    from modalities.action.adapter import QUESTION, ActionAdapter
    from modalities.action.metaworld import LOOKS
    from modalities.action.tokens import BINS, ActionTokens
    from tools.tiny.model import make_processor, make_tokenizer

    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    words = [f"user\nassistant\ngrip hand goal {what}\n{QUESTION.format(say.lower())}" for say, what in LOOKS.values()]
    tokenizer = make_tokenizer(words * 50, 512, NUMBERS, BINS)
    processor, model = make_processor(tokenizer), make_model(tokenizer, seed)
    tokens = ActionTokens(len(tokenizer), CHUNK, SIZE)
    adapter = ActionAdapter(processor, 400, tokens=tokens, cameras=[CAMERA], image_size=PIXELS)
    for name, stage in stages.items():
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
    parser.add_argument("--expert", action="store_true", help="the one that acts well by the camera, to teach others")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    build(arguments.folder, arguments.work, arguments.seed, EXPERT if arguments.expert else STUDENT)


if __name__ == "__main__":
    main()
