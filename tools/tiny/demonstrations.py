"""What the small policy learns from in Meta-World: episodes of the scripted experts, shoved now and then, and of a hand
that is shoved all the time."""

import random
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

from rich.progress import track

from modalities.action.metaworld import MetaWorld

TASKS = ("reach-v3", "reach-wall-v3", "button-press-topdown-v3", "door-unlock-v3", "button-press-topdown-wall-v3")


CHUNK, SIZE = 8, 4


CAMERA, PIXELS = "corner2", 112


MOVED = (-0.2, 0.12, -0.13)  # nearer to the table

type Step = tuple[str, str, Any, Any]  # task, state in words, picture, the expert's next actions [CHUNK, SIZE]


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
    with get_context("spawn").Pool(2) as pool:
        found = track(pool.imap(play, jobs, chunksize=8), play.__name__, len(jobs))
        return [(job[0], *step) for job, steps in zip(jobs, found, strict=True) for step in steps]
