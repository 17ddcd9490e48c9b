"""What several ranks do together, for test_engines.py: `torchrun … tests/ranks.py RECIPE FOLDER TASK…`.

A step is made of the same questions and answers at any number of ranks, dealt out like cards, so that ranks have
different numbers of rows and of micro-batches. Whatever a task finds out is written below FOLDER by rank 0.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from xmodal_opd import checkpoint, collect, config, dist, schema, step
from xmodal_opd.build import Parts, build
from xmodal_opd.build.engines import launch
from xmodal_opd.data import Shards
from xmodal_opd.engine.plain import PlainEngine
from xmodal_opd.objective import Term
from xmodal_opd.objective.advantages import ADVANTAGES
from xmodal_opd.objective.weights import WEIGHTS
from xmodal_opd.tokens import token_batch
from xmodal_opd.types import Pair, Rollout, Scores

QUESTIONS = 5
SCORES = ("student_entropy", "teacher_divergence", "teacher_logp", "sampler_logp", "degraded_logp")
OPTIONS = {"mismatch_mask": {"low": 0.05, "high": 2.0}, "tis": {"cap": 0.1}, "tip_confident": {"keep": 0.5}}
OPTIONS |= {"prefix": {"tokens": 2}, "position_decay": {"half_life": 2.0}, "clip": {"limit": 0.5}}
PIECES = [("weights", name) for name in WEIGHTS] + [("advantages", name) for name in ADVANTAGES]


def questions(parts: Parts, mixed: bool) -> list[Pair]:
    """Spoken questions; of a mixed step every second one, which is all that rank 1 has, is in writing."""
    shards = Shards(parts.recipe.data.train, shuffle=False)
    pairs = [pair for _, pair in islice(shards.pairs(parts.adapter), QUESTIONS)]
    written = [replace(p, views=dict.fromkeys(p.views, p.views["teacher"])) for p in pairs]
    return [written[i] if mixed and i % 2 else pairs[i] for i in range(QUESTIONS)]


def answers(pairs: Sequence[Pair], number: int) -> list[tuple[str, Rollout]]:
    """One answer to each question under `tokens`, one to three under `sequences`, of one to six tokens."""
    draw = torch.Generator().manual_seed(number)
    plan = [("tokens", i) for i in range(len(pairs))] + [
        ("sequences", i) for i in range(len(pairs)) for _ in "abc"[i % 3 :]
    ]
    out = []
    for name, i in plan:
        length = 1 + int(torch.randint(6, (), generator=draw))
        tokens = torch.randint(20, 200, (length,), generator=draw).tolist()
        logps = (-3 * torch.rand(length, generator=draw)).tolist()
        out.append((name, Rollout(pairs[i], tokens, logps, "", True, i, prompt_tokens=30 + 9 * i)))
    return out


def made_up_step(parts: Parts, number: int, mixed: bool = False) -> collect.Step:
    """This rank's part of step `number`, with scores and rewards made up."""
    everyone = answers(questions(parts, mixed), number)
    draw = torch.Generator().manual_seed(1000 + number)
    scores = {name: torch.rand(len(everyone), 6, generator=draw) for name in SCORES}
    rewards = 2 * torch.rand(len(everyone), generator=draw)  # half of them right
    whole = {name: torch.rand(len(everyone), generator=draw) for name in ("draw", "text_reward", "dual")}
    mine = [row for row, (_, r) in enumerate(everyone) if r.group % dist.world() == dist.rank()]
    rollouts = [everyone[row][1] for row in mine]
    batch = token_batch(rollouts)
    width = batch.mask.shape[1]
    whole = {name: value[mine] for name, value in (whole | {"reward": rewards}).items()}
    scores = Scores({name: value[mine, :width] for name, value in scores.items()} | whole)
    return collect.gathered(rollouts, [everyone[row][0] for row in mine], replace(batch, scores=scores), {})


def advance(parts: Parts, numbers: Sequence[int], mixed: bool = False) -> list[dict[str, float]]:
    """Steps `numbers` of training; what each measured."""
    parts = replace(parts, judged=frozenset(parts.recipe.rollout.samplings))
    return [step.learn(parts, made_up_step(parts, n, mixed), n) for n in numbers]


def weights_of(parts: Parts) -> dict[str, torch.Tensor]:
    with parts.engine.whole():
        return {name: p.detach().clone() for name, p in parts.student.named_parameters()}


def built(recipe: str, *overrides: str) -> Parts:
    torch.manual_seed(0)  # of an adapter's first values
    return build(config.load(recipe, ["model.train=[all]", "engine.micro_tokens=110", "optim.lr=1e-4", *overrides]))


def gradient(parts: Parts, kind: str, piece: str) -> torch.Tensor:
    """The gradient of one term with one piece over the whole step, summed over ranks without any engine's help."""
    spec = {piece: OPTIONS[piece]} if piece in OPTIONS else piece
    if kind == "weights":
        on = "sequences" if piece in schema.REWARDED else "tokens"
        of = {"sampling": on, "divergence": "reverse_kl", "weights": [spec]}
    else:
        chain = ["reward", spec] if piece not in ("reward", "constant", "teacher_logratio") else [spec]
        of = {"sampling": "sequences", "advantages": chain, "surrogate": "reinforce"}
    term = schema.Term.model_validate(of)
    recipe = parts.recipe.model_copy(update={"objective": {"term": term}})
    terms = {"term": Term.build(**term.model_dump(exclude={"sampling", "view", "teacher"}))}
    options = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 1.0, "schedule": lambda step: 1.0}
    engine = PlainEngine(parts.student, **options)
    parts = replace(parts, recipe=recipe, terms=terms, engine=engine, judged=frozenset({"sequences"}))
    parts.student.zero_grad()
    made = made_up_step(parts, 0)
    step.backward(parts, made, step.judged(parts, made, 0))
    slopes = torch.cat([p.grad.flatten() for p in parts.student.parameters() if p.grad is not None])
    if dist.world() > 1:
        torch.distributed.all_reduce(slopes)
    return slopes


# ---- tasks


def pieces(recipe: str, folder: Path) -> None:
    parts = built(recipe, "engine.name=deepspeed", "engine.zero=0")
    found = {f"{kind} {name}": gradient(parts, kind, name) for kind, name in PIECES}
    if dist.rank() == 0:
        torch.save(found, folder / "pieces.pt")


def steps(recipe: str, folder: Path, *overrides: str) -> None:
    """Three steps, then a checkpoint; FOLDER/metrics.json tells what the steps measured."""
    mixed = "mixed" in overrides
    parts = built(recipe, "engine.name=deepspeed", *(o for o in overrides if o != "mixed"))
    told = advance(parts, range(3), mixed)
    saved(parts, folder, 3)
    if dist.rank() == 0:
        (folder / "metrics.json").write_text(json.dumps(told))


def saved(parts: Parts, folder: Path, number: int) -> None:
    checkpoint.save(folder, parts.student, parts.processor, parts.engine, {"step": number}, keep=9)


def resume(recipe: str, folder: Path, *overrides: str) -> None:
    """Go on from FOLDER's last checkpoint for two steps."""
    parts = built(recipe, "engine.name=deepspeed", *overrides)
    found = checkpoint.latest(folder)
    assert found is not None
    state = checkpoint.load(found, parts.student, parts.engine)
    advance(parts, range(state["step"], state["step"] + 2))
    saved(parts, folder, state["step"] + 2)


def go_on(recipe: str, folder: Path, *overrides: str) -> None:
    """Two steps, a checkpoint, two more steps and another: what a resumed run must equal."""
    parts = built(recipe, "engine.name=deepspeed", *overrides)
    advance(parts, [0, 1])
    saved(parts, folder, 2)
    advance(parts, [2, 3])
    saved(parts, folder / "whole", 4)


TASKS = {f.__name__: f for f in (pieces, steps, resume, go_on)}


def main(recipe: str, folder: str, *tasks: str) -> None:
    """Each task is "name [name=value …]", its files below FOLDER/NUMBER of the task or where `in=` says."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    launch(config.load(recipe, ["engine.name=deepspeed", f"train.prompts={dist.started()}"]))
    for number, task in enumerate(tasks):
        name, *overrides = task.split()
        there = next((o[3:] for o in overrides if o.startswith("in=")), str(number))
        place = Path(folder) / there
        if dist.rank() == 0:
            place.mkdir(parents=True, exist_ok=True)
        dist.gather(None)
        TASKS[name](recipe, place, *(o for o in overrides if not o.startswith("in=")))
        dist.say(f"{task}: done")
    dist.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
